#!/usr/bin/env python3
"""From the records of runs: tables, verdicts on the paper's claims, figures. It trains nothing.

    python results/report.py                             every preset that has records beside this file
    python results/report.py --readme                    the same, and the generated parts of both READMEs
    python results/report.py --tsne data/cifar10-jpeg    the same, and Fig. 2 anew from the checkpoints in runs/

Each preset's folder gets TABLE.md, CLAIMS.md and the figures. All is made before the first file is written, so a record
that is refused changes nothing; but the points of --tsne are kept at once. In reading order: records, tables,
verdicts, figures, Fig. 2, READMEs.
"""
from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import os
import re
import sys
import warnings
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import torch

HOME = Path(__file__).resolve().parent
sys.path.insert(0, str(HOME.parent))
import ctl

# ----------------------------------------------------------------------------------------------------------- records

TAUS = (0.07, 0.3, 0.7, 1.0)
MATCHED = "contrastive, match_step True"
TABLE_1 = list(ctl.PAPER["cifar10"])  # (loss, tau) of its ten rows
COLUMNS = {"accuracy": ("accuracy, %", 2), "knn": ("kNN, %", 2), "uniformity": ("uniformity", 3),
           "tolerance": ("tolerance", 3)}
Rows = dict  # (loss and what departs from the preset, tau) -> the runs of each seed
Groups = dict  # (preset, dataset, protocol version) -> Rows: what differs in one of the three is never averaged

# What a record must hold, by example: a text, a whole number, a number or null.
METRICS = dict.fromkeys(COLUMNS, 0.5)
RECORD = {
    "protocol_version": 1, "data": {"sha256": "", "train": 1},
    "environment": {"torch": "", "precision": "", "device": ""},
    "config": {**dict.fromkeys(("loss", "preset", "dataset", "schedule", "bank_init"), ""), "lr": 0.5, "probe_lr": 0.5,
               **dict.fromkeys(("seed", "epochs", "batch_size", "width"), 1), "tau": 0.5},
    "final": {**METRICS, "accuracy_heldout": 0.5, "profile": 11 * [0.5], "untrained": METRICS}}


def check(value, example, where: str) -> None:
    """Raise BadInput where a value is missing or of another kind than the example. where: the file, then the key."""
    kind = (int, float, type(None)) if isinstance(example, float) else type(example)
    if not isinstance(value, kind) or isinstance(value, (int, float)) and not abs(value) < 1e9:
        raise ctl.BadInput(f"{where} is missing or of the wrong kind")
    if isinstance(example, dict):
        for key in example:
            check(value.get(key, ...), example[key], f"{where}: {key}")  # an Ellipsis is of no kind that is right
    if isinstance(example, list):  # of one entry: of any length
        if len(example) not in (1, len(value)):
            raise ctl.BadInput(f"{where} has {len(value)} entries, not {len(example)}")
        for entry in value:
            check(entry, example[0], where)


def read_json(path: Path, example: dict) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ctl.BadInput(f"{path} is not JSON: remove it, or make it anew")
    check(value, example, str(path))
    return value


class Run(NamedTuple):
    """A record that is whole and stands where it belongs."""
    path: Path
    record: dict
    config: dict
    departs: dict[str, str]  # the settings that depart from the preset, by the file's name
    final: dict  # the metrics


def read_run(path: Path) -> Run:
    record = ctl.read_record(path)
    check(record, RECORD, str(path))
    config, departs = record["config"], {}
    if record["protocol_version"] == ctl.PROTOCOL_VERSION:  # settings of another version may be unknown here
        try:
            ctl.Config(**config)
        except (ctl.BadInput, TypeError) as error:
            raise ctl.BadInput(f"{path}: config: {error}")
    for field in re.findall(rf"_({'|'.join(map(re.escape, config))})-", path.stem):
        value = config[field]
        departs[field] = "-".join(map(str, value)) if isinstance(value, list) else str(value)
    name = ctl.cell_prefix(config["loss"], config["tau"]) + "".join(f"_{field}-{departs[field]}" for field in departs)
    if path.parts[-3:] != (config["preset"], config["dataset"], f"{name}_seed{config['seed']}.json"):
        raise ctl.BadInput(f"{path} holds a record of another run, or is a copy: move it away")
    return Run(path, record, config, departs, record["final"])


def check_alike(run: Run, other: Run) -> None:
    """Raise BadInput, naming the key, where two records of one table differ in more than their names say."""
    named = {key for key in run.departs | other.departs if run.departs.get(key) != other.departs.get(key)}
    here, there = ({**one.config, "sha256 of the images": one.record["data"]["sha256"]} for one in (run, other))
    # Another kind of CPU rounds a pixel of `shapes` differently.
    if named & {"size", "subset", "test_subset"} or run.config["dataset"] == "shapes":
        named.add("sha256 of the images")
    for key in sorted((here.keys() & there.keys()) - named - {"loss", "tau", "k", "seed"}):
        if here[key] != there[key]:
            raise ctl.BadInput(f"{run.path}: {key} is {here[key]}, but {there[key]} in {other.path}: records "
                               "of one table must agree in it; move one of them away")


def read_groups(results: Path) -> Groups:
    """All records: as in Table 1, then what departs from the preset, then the untrained networks. Raises BadInput for a
    record that is broken, misplaced, or of another kind."""
    groups, first = {}, {}
    for run in map(read_run, sorted(results.glob("*/*/*.json"))):
        key = run.config["preset"], run.config["dataset"], run.record["protocol_version"]
        check_alike(run, first.setdefault(key, run))
        check_alike(run, first.setdefault((*key, *run.departs.items()), run))
        # A row of Table 1 without a record is shown as missing, but for presets that show a few rows only.
        rows = groups.setdefault(key, {row: [] for row in TABLE_1 if key[0] not in ("quick", "smoke")})
        name = ", ".join([run.config["loss"], *map(" ".join, run.departs.items())])
        rows.setdefault((name, run.config["tau"]), []).append(run)
    losses = [loss for loss, _ in TABLE_1]

    def place(row: tuple) -> tuple:
        loss, _, departs = row[0].partition(", ")
        return departs, [*losses, loss].index(loss), loss, row[1] or 0
    for key, rows in groups.items():
        rows = {row: sorted(rows[row], key=lambda run: run.config["seed"]) for row in sorted(rows, key=place)}
        untrained = {run.config["seed"]: run._replace(final=run.final["untrained"])  # the same for all runs of a seed
                     for run in runs_of(rows) if not run.departs}
        groups[key] = {**rows, ("untrained", None): list(untrained.values())}
    return groups


def runs_of(rows: Rows) -> list[Run]:
    return [run for runs in rows.values() for run in runs]


def measured(rows: Rows, name: str, key: str) -> dict:
    """tau (None where the row has none) -> the values of all seeds, where there are any."""
    found = {tau: [run.final[key] for run in runs if run.final[key] is not None]
             for (row, tau), runs in rows.items() if row == name}
    return {tau: values for tau, values in found.items() if values}


# ------------------------------------------------------------------------------------------------------------ tables

NONE = "No records yet."


def markdown(head: list, lines: list[list]) -> str:
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in (head, ["---"] * len(head), *lines))


def mean_sd(values: list[float], digits: int) -> str:
    if not values:
        return "–"
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread} ({len(values)})"


def link(path: Path, folder: Path) -> str:
    return os.path.relpath(path, folder).replace(os.sep, "/").replace(" ", "%20")


def in_paper(dataset: str) -> bool:
    return dataset.split("-")[0] in ctl.PAPER


def table(rows: Rows, folder: Path | None = None) -> str:
    """Ours beside the paper's. Without a folder: the rows of Table 1; with one: all rows, and links from there."""
    dataset = runs_of(rows)[0].config["dataset"]
    beside = ctl.TABULATED if in_paper(dataset) else ()
    head, lines = ["loss", "τ"], []
    for key, (title, _) in COLUMNS.items():
        head += [title, "paper"] if key in beside else [title]
    for name, tau in rows if folder else [*TABLE_1, ("untrained", None)]:
        line, paper = [name, tau or ""], ctl.paper_values(dataset, name, tau)
        for key, (_, digits) in COLUMNS.items():
            line.append(mean_sd(measured(rows, name, key).get(tau, []), digits))
            line += [paper[key] or "–"] if key in beside else []
        if folder:
            links = " ".join(f"[{run.config['seed']}]({link(run.path, folder)})" for run in rows[name, tau])
            line.append("" if name == "untrained" else links or "missing")
        lines.append(line)
    return markdown(head + ["records"] * bool(folder), lines)


def about(rows: Rows) -> str:
    run = runs_of(rows)[0]
    return f"{run.record['data']['train']:,} training images, {run.config['epochs']} epochs"


def caption(rows: Rows) -> str:
    """The protocol of a table, from its records."""
    machines = {"torch {torch}, {precision}, {device}".format(**run.record["environment"]) for run in runs_of(rows)}
    protocol = ("batch {batch_size}, ResNet-18 of width {width}, SGD with learning rate {lr}, {schedule} schedule, "
                "bank from {bank_init}; linear probe with learning rate {probe_lr}").format(**runs_of(rows)[0].config)
    return (f"{about(rows)}, {protocol}. A row that names a setting departs in it. Accuracy is the probe's after its "
            "last epoch; kNN has k = 200. Each value is the mean over seeds ± the standard deviation; the number of "
            "seeds is in brackets. The last row is the network before training. Run with "
            f"{'; '.join(sorted(machines))}.")


def ladder(rows: Rows) -> str:
    """Does the best tau move with longer training, or with a wider network? tau 0.3 less tau 0.07, seed by seed."""
    lines = []
    for name in dict.fromkeys(name for name, _ in rows):
        pairs = [(small, large) for small in rows.get((name, 0.07), []) for large in rows.get((name, 0.3), [])
                 if small.config["seed"] == large.config["seed"]]
        if pairs and name.split(",")[0] == "contrastive" and pairs[0][0].departs.keys() <= {"epochs", "width"}:
            gains = [[large.final[key] - small.final[key] for small, large in pairs
                      if None not in (small.final[key], large.final[key])] for key in ("accuracy", "knn")]
            lines.append([pairs[0][0].config["epochs"], pairs[0][0].config["width"], len(pairs),
                          *(interval(gain, 2)[0] if gain else "–" for gain in gains)])
    head = ["epochs", "width", "seeds", "accuracy at τ = 0.3 less that at 0.07 (95 % interval)", "the same of kNN"]
    return markdown(head, sorted(lines)) if lines else NONE


# ---------------------------------------------------------------------------------------------------------- verdicts
#
# Where the paper gives no number for its words, these do: "competitive" is at most 1 point of accuracy worse, "much
# worse" more than 2 (the authors' one repeated setting has a standard deviation of 0.30); "flat", and "nothing useful",
# are at most a quarter of the ordinary loss's range or gain.

NEEDS = """τ is 0.07, 0.3, 0.7, 1.0.

- C1, C2 and C8 say that something grows or falls with τ. Page's trend test over the seeds that have all four τ decides,
  one-sided, 2.5 % each way. It rejects equality, not a step in the wrong place. So the smallest step, the largest
  against the trend, stands beside it. Where the 95 % interval of that step lies wholly on the wrong side, the verdict
  names it. C8 is confirmed if both its trends are, refuted if either is. That the positive tends to 1 is shown
  (figure 8), not tested.
- Every other claim has an effect for each seed that has all runs it needs; above 0 speaks for the claim. Confirmed: the
  95 % interval (Student's t over the seeds) lies above 0. Refuted: it lies below 0. Else undecided.
- The best τ of a loss is chosen by `accuracy_heldout`, the accuracy on a fifth of the training labels, never on test
  data.
- Fewer than two seeds decide nothing. The nine claims are tested without correction for their number. These rules were
  written before the first records of `narrow` and `paper`, and after those of `mini` had been seen.
"""
class Cells(dict):
    """One seed's runs: (name, tau) -> metrics. KeyError and TypeError say that a run is missing, a metric null."""

    def over_tau(self, key: str, loss: str = "contrastive") -> list:
        return [self[loss, tau][key] for tau in TAUS]

    def best(self, loss: str = "contrastive", taus: tuple = TAUS) -> float:
        return max(taus, key=lambda tau: self[loss, tau]["accuracy_heldout"])

    def accuracy(self, loss: str, tau: float | None = None) -> float:
        return self[loss, tau]["accuracy"]

    def at_best(self) -> float:
        return self.accuracy("contrastive", self.best())

    def reverse_u(self, loss: str) -> float:
        ends = max(self.accuracy(loss, TAUS[0]), self.accuracy(loss, TAUS[-1]))
        return self.accuracy(loss, self.best(loss, TAUS[1:-1])) - ends

    def flatness(self) -> float:
        ordinary, hard = self.over_tau("uniformity"), self.over_tau("uniformity", "hard")
        flat = (max(ordinary) - min(ordinary)) / 4 - (max(hard) - min(hard))
        return flat if self.best("hard") > self.best() else min(flat, 0.0)

    def gain(self, accuracy: float) -> float:
        return accuracy - self.accuracy("untrained")


SMALLEST = "the smallest step from one τ to the next; p: Page's test"
# A claim, its measures, what its effect is. A measure is an effect, above 0 where it speaks for the claim, or a trend,
# whose values at the four tau should rise. C8 has two.
CLAIMS = {
    "C1": ("ordinary loss: uniformity falls as τ grows",
           {"": lambda c: [-value for value in c.over_tau("uniformity")]}, SMALLEST),
    "C2": ("ordinary loss: tolerance grows with τ",
           {"": lambda c: [+value for value in c.over_tau("tolerance")]}, SMALLEST),
    "C3": ("ordinary loss: accuracy against τ is a reverse U", {"": lambda c: c.reverse_u("contrastive")},
           "accuracy at τ = 0.3 or 0.7 (by the held-out labels), less that at the better end (0.07 or 1, by the test "
           "images)"),
    "C4": ("the simple loss is much worse than the ordinary loss at its best τ",
           {"": lambda c: c.at_best() - c.accuracy("simple") - 2}, "accuracy lost, less 2 points"),
    "C5": ("hard simple is competitive with the ordinary loss at its best τ",
           {"": lambda c: c.accuracy("hard-simple") - c.at_best() + 1}, "accuracy gained, plus 1 point"),
    "C6": ("hard loss: more uniform than the ordinary loss at the same τ",
           {"": lambda c: mean(c.over_tau("uniformity", "hard")) - mean(c.over_tau("uniformity"))},
           "the gain in uniformity, mean over the four τ"),
    "C7": ("hard loss: uniformity almost flat in τ, best τ larger than the ordinary loss's", {"": Cells.flatness},
           "a quarter of the ordinary loss's range of uniformity over τ, less the hard loss's; 0 at most where its "
           "best τ is not larger"),
    "C8": ("as τ falls, the gap from the positive to the nearest negative widens; as τ grows, the positive's "
           "similarity grows", {"gap": lambda c: [profile[1] - profile[0] for profile in c.over_tau("profile")],
                                "positive": lambda c: [+profile[0] for profile in c.over_tau("profile")]}, SMALLEST),
    "C9": ("the τ→0 loss learns nothing useful",
           {"": lambda c: c.gain(c.at_best()) / 4 - c.gain(c.accuracy("triplet"))}, "a quarter of the ordinary loss's "
           "gain in accuracy over the untrained network, less the triplet loss's gain"),
    "M": ("ours, not the paper's: C3 holds also where the step does not grow as 1/τ",
          {"": lambda c: c.reverse_u(MATCHED)}, "as C3, of the loss times τ (`--match-step`)"),
}


class Finding(NamedTuple):
    """What the records say of a claim."""
    verdict: str
    effect: str = "–"
    of_each_seed: str = "–"
    seeds: int = 0


def interval(values: list[float], digits: int = 3) -> tuple[str, float, float]:
    """The mean and its 95 % interval by Student's t, in words; the interval's ends, infinite for one value."""
    from scipy.stats import ttest_1samp
    words = f"{mean(values):.{digits}f}"
    if len(values) == 1:
        return words, -math.inf, math.inf
    with warnings.catch_warnings():  # SciPy's, of values that are equal, or nearly
        warnings.simplefilter("ignore")
        low, high = ttest_1samp(values, 0).confidence_interval()
    return f"{words} ({low:.{digits}f} to {high:.{digits}f})", low, high


def judge_effect(effects: dict[int, float]) -> Finding:
    """effects: seed -> effect; above 0 speaks for the claim."""
    words, low, high = interval(list(effects.values()))
    verdict = "confirmed" if low > 0 else "refuted" if high < 0 else "undecided"
    return Finding(verdict, words, ", ".join(f"{seed}: {effect:.3f}" for seed, effect in effects.items()), len(effects))


def judge_trend(trend: dict[int, list[float]]) -> Finding:
    """trend: seed -> the values at the four tau, which should rise. The smallest step is its effect."""
    from scipy.stats import page_trend_test
    steps = {f"τ {a} → {b}": {seed: row[i + 1] - row[i] for seed, row in trend.items()}
             for i, (a, b) in enumerate(zip(TAUS, TAUS[1:]))}
    at = min(steps, key=lambda step: mean(steps[step].values()))
    least, verdict = judge_effect(steps[at]), "undecided"
    effect = f"{at}: {least.effect}"
    if len(trend) > 1:
        rises, falls = (page_trend_test([row[::way] for row in trend.values()]).pvalue for way in (1, -1))
        verdict = "confirmed" if rises <= 0.025 else "refuted" if falls <= 0.025 else "undecided"
        effect += f"; p = {rises:.2g}"
    if verdict == "confirmed" and least.verdict == "refuted":
        verdict += f", except {at}"
    return least._replace(verdict=verdict, effect=effect)


def join(found: dict[str, Finding]) -> Finding:
    """Of a claim that has several measures: refuted if one is, confirmed if all are."""
    verdicts = {finding.verdict: None for finding in found.values()}
    exceptions = "".join(verdict.removeprefix("confirmed") for verdict in verdicts)
    verdict = next((verdict for verdict in ("refuted", "undecided") if verdict in verdicts), f"confirmed{exceptions}")
    say = lambda field: "; ".join(f"{name} {getattr(finding, field)}".strip() for name, finding in found.items())
    return Finding(verdict, say("effect"), say("of_each_seed"), min(finding.seeds for finding in found.values()))


def judge_measure(measure, seeds: dict[int, Cells]) -> Finding:
    found = {}
    for seed, cells in sorted(seeds.items()):
        with contextlib.suppress(KeyError, TypeError):
            found[seed] = measure(cells)
    if not found:
        return Finding("undecided")
    return judge_trend(found) if isinstance(next(iter(found.values())), list) else judge_effect(found)


def judge(rows: Rows) -> dict[str, Finding]:
    seeds: dict[int, Cells] = {}
    for row, runs in rows.items():
        for run in runs:
            seeds.setdefault(run.config["seed"], Cells())[row] = run.final
    return {claim: join({name: judge_measure(measure, seeds) for name, measure in measures.items()})
            for claim, (_, measures, _) in CLAIMS.items()}


def effects(rows: Rows) -> str:
    """A line a verdict, with the effect of each seed, and what the effect is."""
    lines = [[name, CLAIMS[name][0], f"**{found.verdict}**", found.effect, found.of_each_seed, CLAIMS[name][2]]
             for name, found in judge(rows).items()]
    return markdown(["", "claim", "verdict", "effect (95 % interval)", "of each seed", "what the effect is"], lines)


def compare(groups: Groups) -> str:
    """The paper's nine claims, and what each preset says of them."""
    columns = {f"{preset}, {dataset}": judge(rows) for (preset, dataset, version), rows in groups.items()
               if in_paper(dataset) and version == ctl.PROTOCOL_VERSION}
    lines = []
    for name in list(CLAIMS)[:9]:
        found = [findings[name] for findings in columns.values()]
        lines.append([name, CLAIMS[name][0],
                      *(f"**{one.verdict}**: {one.effect}; {seeds_in_words(one.seeds)}" if one.seeds
                        else "runs are missing" for one in found)])
    return markdown(["", "the paper's claim", *columns], lines)


def seeds_in_words(*counts: int) -> str:
    few, many = min(counts), max(counts)
    return f"{few} to {many} seeds" if few < many else "one seed" if few == 1 else f"{few} seeds"


# ----------------------------------------------------------------------------------------------------------- figures

PAPER_TAUS = (None, *sorted({*TAUS, *ctl.PAPER_ACCURACY["cifar10"]}))
# Okabe and Ito: told apart by all readers.
COLOURS = {"contrastive": "#0072b2", "hard": "#d55e00", MATCHED: "#009e73", "simple": "#cc79a7", "untrained": "#666666"}
STYLE = {"svg.hashsalt": "ctl", "font.size": 11, "axes.titlesize": 12, "figure.titlesize": 12,
         "axes.spines.top": False, "axes.spines.right": False}
METADATA = {"svg": {"Date": None, "Creator": None}, "png": {"Software": None}}  # the same file on any day


def draw(rows: Rows, planes: list[dict]) -> dict[str, bytes]:
    """The paper's Figs. 2 to 9 from the records, as SVG and PNG: file name -> content. A caller's own backend, settings
    and open figures stay as they are: pyplot is not used."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except Exception as error:  # not installed, or an MPLBACKEND or a matplotlibrc that it refuses
        ctl.say(f"figures are left out, for want of a working matplotlib: {' '.join(str(error).split())[:150]}")
        return {}
    run, files = runs_of(rows)[0], {}
    title = f"preset {run.config['preset']}: {run.config['dataset']}, {about(rows)}"
    stem = f"{run.config['dataset']}-v{run.record['protocol_version']}"
    figures = {f"{stem}-dilemma": (7.2, draw_dilemma), f"{stem}-profile": (6.4, draw_profiles),
               "penalty": (4.5, draw_penalty)}
    if planes:
        figures[f"{stem}-tsne"] = 5.2, functools.partial(draw_planes, planes)
    style = {**matplotlib.rcParamsDefault, **STYLE}
    del style["backend"]
    with matplotlib.rc_context(style):
        for name, (height, fill) in figures.items():
            figure = Figure(figsize=(8.5, height), layout="constrained")
            if not fill(figure, rows, title):
                continue
            for kind, metadata in METADATA.items():
                buffer = io.BytesIO()
                figure.savefig(buffer, format=kind, dpi=150, metadata=metadata)
                files[f"{name}.{kind}"] = buffer.getvalue()
    return files


def draw_curve(axis, points: dict, **style) -> None:
    """Mean and standard deviation against tau; a level line where there is no tau."""
    if None in points:
        axis.axhline(mean(points[None]), **style)
    elif points:
        spread = [stdev(values) if len(values) > 1 else math.nan for values in points.values()]
        means = list(map(mean, points.values()))
        axis.errorbar(list(points), means, spread, marker="o", markersize=5, capsize=3, **style)


def draw_dilemma(figure, rows: Rows, title: str) -> bool:
    """Figs. 4 and 6, 5 and 7, 9: uniformity, tolerance and accuracy against tau."""
    dataset, before = runs_of(rows)[0].config["dataset"], measured(rows, "untrained", "accuracy")
    untrained = f" (untrained: {mean(before[None]):.1f})" if before else ""
    headings = ("uniformity (larger = more uniform)", "tolerance", f"linear accuracy, %, ours{untrained}",
                "linear accuracy, %, the paper's")
    axes, ticks, counts = figure.subplots(2, 2, sharex=True).flatten(), set(TAUS), {0}
    for axis, heading in zip(axes, headings):
        axis.set(xscale="log", xlabel="temperature τ", title=heading)
    for name, colour in COLOURS.items():
        label, line = name.replace("match_step True", "loss times τ"), ":" if name == "untrained" else "-"
        for key, ours_at, paper_at in (("uniformity", 0, 0), ("tolerance", 1, 1), ("accuracy", 2, 3)):
            # The untrained network's accuracy, far below, would flatten the curves: it stands in the heading.
            if (name, key) != ("untrained", "accuracy"):
                ours = measured(rows, name, key)
                draw_curve(axes[ours_at], ours, color=colour, linestyle=line, label=f"{label}, ours")
                ticks |= {tau for tau in ours if tau and tau < 0.05}
                counts |= set(map(len, ours.values()))
            paper = {tau: ctl.paper_values(dataset, name, tau)[key] for tau in PAPER_TAUS}
            paper = {tau: [value] for tau, value in paper.items() if value is not None}
            draw_curve(axes[paper_at], paper, color=colour, linestyle="--", alpha=0.6, label=f"{label}, the paper's")
    for axis in axes:
        axis.set_xticks(sorted(ticks), [f"{tau:g}" for tau in sorted(ticks)])
        axis.minorticks_off()
        axis.tick_params(labelbottom=True)
    # The same span in points, so that a step looks as large in one panel as in the other.
    limits = [axis.get_ylim() for axis in axes[2:]]
    half = max(high - low for low, high in limits) / 2
    for axis, (low, high) in zip(axes[2:], limits):
        axis.set_ylim((low + high) / 2 - half, (low + high) / 2 + half)
    axes[3].set_visible(in_paper(dataset))
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=10)
    counts = counts - {0} or {0}
    spread = "mean ± standard deviation over " if max(counts) > 1 else ""
    figure.suptitle(f"{title}\n{spread}{seeds_in_words(*counts)}")
    return True


def draw_profiles(figure, rows: Rows, title: str) -> bool:
    """Fig. 8: the mean similarity of the positive and of the ten nearest negatives, at the four tau of Table 1."""
    found = measured(rows, "contrastive", "profile")
    profiles = {tau: [p for p in found.get(tau, []) if None not in p] for tau in TAUS}
    counts = [len(some) for some in profiles.values() if some]
    for tau, axis in zip(TAUS, figure.subplots(2, 2).flat):
        means = list(map(mean, zip(*profiles[tau]))) or [0] * 11
        axis.bar(["pos", *(f"n{place}" for place in range(1, 11))], means, color=["#d55e00"] + ["#0072b2"] * 10)
        axis.set(title=f"τ = {tau}{'' if profiles[tau] else ': no records yet'}", ylim=(0, 1), ylabel="mean similarity")
    figure.suptitle(f"{title}; {seeds_in_words(*counts or [0])}\npos: an image and a view of itself; n1 to n10: an "
                    "image and views of the ten others nearest to it")
    return bool(counts)


def draw_planes(planes: list[dict], figure, rows: Rows, title: str) -> bool:
    """Fig. 2: t-SNE of embeddings of test images, at a small and a larger tau."""
    cifar10 = "airplane automobile bird cat deer dog frog horse ship truck".split()
    names = dict(enumerate(cifar10 if runs_of(rows)[0].config["dataset"].split("-")[0] == "cifar10" else []))
    classes = sorted({label for plane in planes for label in plane["tsne"]["label"]})
    for plane, axis in zip(planes, figure.subplots(1, len(planes), squeeze=False).flat):
        points = list(zip(*(plane["tsne"][key] for key in ("x", "y", "label"))))
        for place, label in enumerate(classes):  # five colours, then the next marker: told apart without the hue
            x, y = ([point[i] for point in points if point[2] == label] for i in (0, 1))
            axis.scatter(x, y, s=10, color=list(COLOURS.values())[place % 5], marker="ox^s+"[place // 5 % 5],
                         label=names.get(label, f"class {label}"))
        axis.set(title=f"τ = {plane['tau']}: kNN accuracy {plane['knn']} %", xticks=[], yticks=[])
    if len(classes) <= 20:
        figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=5, markerscale=2)
    figure.suptitle(f"{title}\nt-SNE of embeddings of test images, by class")
    return True


def draw_penalty(figure, rows: Rows, title: str) -> bool:
    """Fig. 3: Eq. 5 for negatives drawn evenly from [-1, 1]."""
    axis = figure.subplots()
    s = torch.rand(1, 200, generator=ctl.generator("figure 3"), dtype=torch.float64).sort(dim=1).values * 2 - 1
    for tau, line, colour in zip(TAUS, ("-", "--", "-.", ":"), COLOURS.values()):
        r = ctl.relative_penalty(s, torch.tensor([0]), tau)  # the first is the positive
        axis.plot(s[0, 1:].tolist(), r[0, 1:].tolist(), line, color=colour, label=f"τ = {tau}")
    axis.set(xlabel="similarity of the negative", ylabel="relative penalty r", yscale="log", ylim=(1e-6, 1),
             title="Eq. 5: how the push is shared among 199 negatives")
    axis.legend()
    return True


# ------------------------------------------------------------------------------------------ Fig. 2, from checkpoints

FIG_2 = (0.07, 0.2)  # the tau whose embeddings the paper shows on a plane
PLANES = {"protocol_version": 1, "planes": [{"tau": 0.5, "knn": 0.5, "tsne": {"x": [0.5], "y": [0.5], "label": [1]}}]}


def read_planes(path: Path, rows: Rows) -> list[dict]:
    """The points of Fig. 2: what --tsne kept in that file, else what old records hold. Nothing is computed."""
    if path.exists():
        kept = read_json(path, PLANES)
        return kept["planes"] if kept["protocol_version"] == runs_of(rows)[0].record["protocol_version"] else []
    planes = []
    for tau in FIG_2:
        for run in [run for run in rows.get(("contrastive", tau), []) if run.record.get("tsne")][:1]:
            planes.append({"tau": tau, "knn": run.final["knn"], "tsne": run.record["tsne"]})
            check(planes[-1], PLANES["planes"][0], str(run.path))
    return planes


def compute_planes(source: str, results: Path, rows: Rows, runs: Path) -> bool:
    """t-SNE of the dataset's first 1,000 test images, by checkpoints of seed 0. The points are kept beside the records;
    False where there is no such checkpoint."""
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits
    planes = []
    for run in (run for tau in FIG_2 for run in rows.get(("contrastive", tau), []) if run.config["seed"] == 0):
        path = Path(runs, *run.path.parts[-3:]).with_suffix(".pt")
        saved = ctl.load_checkpoint(path) if path.exists() else None
        if not saved:
            continue
        config = ctl.Config(**run.config)
        data = ctl.load_dataset(source, HOME.parent / "data", config.size)
        if data.name != config.dataset:
            continue
        data = ctl.take_subset(data, config)
        ctl.refuse_other(path, saved, {**run.record, "data": data.sha256()})
        model, _ = ctl.make_model(config, torch.device("cpu"))
        model.load_state_dict(saved["model"])
        _, z = ctl.embed(model, data.test_images[:1000])
        # Another number of threads gives another picture; the start by PCA fails where all embeddings are equal.
        with threadpool_limits(1):
            places = TSNE(perplexity=min(30.0, len(z) / 4), init="random", random_state=0).fit_transform(z.numpy())
        x, y = ([round(value, 1) for value in column] for column in places.T.tolist())
        points = {"x": x, "y": y, "label": data.test_labels[:1000].tolist()}
        planes.append({"tau": config.tau, "knn": run.final["knn"], "tsne": points})
    if planes:
        content = json.dumps({"protocol_version": ctl.PROTOCOL_VERSION, "planes": planes}, sort_keys=True) + "\n"
        ctl.write_whole(results / config.preset / f"{config.dataset}-tsne.json", content.encode())
    return bool(planes)


# ----------------------------------------------------------------------------------------------------------- READMEs

MARKER = re.compile(r"(<!-- report: ([^\n]*?) -->\n)(.*?)(<!-- /report -->)", re.DOTALL)
PARTS = ("augmentation", "forward", "similarities and loss", "backward", "optimiser", "bank update")  # of a step
COSTS = {"step_ms": ("the step, ms", 1), "network_ms": ("network alone", 1), "step_over_network": ("step / network", 3),
         "images_per_second": ("images/s", 0), "peak_memory_mib": ("MiB", 0), "training_hours": ("training, h", 1)}
SPEED = {"environment": {"threads": 1}, "parts_ms": dict.fromkeys(PARTS, 0.5), **dict.fromkeys(COSTS, 0.5)}


def costs(folder: Path) -> str:
    """What speed.py measured: a row for each of its files; links are from the folder."""
    lines = []
    for path in sorted((HOME / "profile").glob("*.json")):
        found = read_json(path, SPEED)
        values = [(found["parts_ms"][part], 1) for part in PARTS]
        values += [(found[key], digits) for key, (_, digits) in COSTS.items()]
        lines.append([f"[{path.stem}]({link(path, folder)})", found["environment"]["threads"],
                      *("–" if value is None else f"{value:.{digits}f}" for value, digits in values)])
    return markdown(["", "threads", *PARTS, *(title for title, _ in COSTS.values())], lines)


def part(words: str, groups: Groups, folder: Path) -> str:
    """What belongs behind the marker `<!-- report: WORDS -->` of the README in that folder."""
    kinds = {"table": table, "rows": functools.partial(table, folder=folder), "effects": effects, "ladder": ladder}
    match words.split():
        case ["compare"]:
            return compare(groups)
        case ["costs"]:
            return costs(folder)
        case [kind, preset, dataset] if kind in kinds and preset in ctl.PRESETS:
            rows = groups.get((preset, dataset, ctl.PROTOCOL_VERSION))
            return kinds[kind](rows) if rows else NONE
    raise ctl.BadInput(f"{folder / 'README.md'}: a marker says {words!r}: it is compare, or costs, or one of "
                       f"{', '.join(kinds)} with a preset and a dataset")


def fill_in(path: Path, groups: Groups) -> bytes:
    """A README with its parts between markers made anew."""
    text = path.read_text(encoding="utf-8")
    filled, count = MARKER.subn(lambda found: f"{found[1]}{part(found[2], groups, path.parent)}\n{found[4]}", text)
    if not len(re.findall(r"<!--\s*report", text)) == len(re.findall(r"<!--\s*/\s*report", text)) == count:
        raise ctl.BadInput(f"{path} has a `<!-- report: … -->` that is misspelt, or has no `<!-- /report -->`: mend it")
    return filled.encode()


def make_files(results: Path, groups: Groups) -> dict[Path, bytes]:
    """Each preset's files; tables and verdicts are printed too."""
    files: dict[Path, bytes] = {}
    for (preset, dataset, version), rows in groups.items():
        folder, title = results / preset, f"preset {preset}, dataset {dataset}, protocol version {version}"
        ours, verdicts = table(rows, folder), effects(rows)
        ctl.say(f"\n{title}\n\n{ours}\n\n{verdicts}")
        # A preset's datasets and versions stand one below the other.
        files.setdefault(folder / "TABLE.md", f"# Table 1, preset {preset}: ours beside the paper's\n".encode())
        files.setdefault(folder / "CLAIMS.md", f"# The paper's claims, preset {preset}\n\n{NEEDS}".encode())
        files[folder / "TABLE.md"] += f"\n## {title}\n\n{ours}\n\n{caption(rows)}\n".encode()
        files[folder / "CLAIMS.md"] += f"\n## {title}\n\n{verdicts}\n".encode()
        drawn = draw(rows, read_planes(folder / f"{dataset}-tsne.json", rows))
        files |= {folder / name: content for name, content in drawn.items()}
    return files


def main(argv: list[str] | None = None) -> None:
    parser = ctl.Parser("report.py", (__doc__ or "").split("\n")[0])
    parser.add_argument("--results", default=HOME, help="folder of the records [where this file lies]")
    parser.add_argument("--preset", choices=list(ctl.PRESETS), help="report that preset alone [all that have records]")
    parser.add_argument("--readme", action="store_true", help="fill the generated parts of both READMEs too")
    parser.add_argument("--tsne", metavar="DATASET", help="compute Fig. 2 from the checkpoints of that dataset")
    parser.add_argument("--runs", default=HOME.parent / "runs", help="folder of the checkpoints [runs/]")
    given = parser.parse_args(argv)
    results, runs = Path(given.results).expanduser(), Path(given.runs).expanduser()
    if given.readme and results.resolve() != HOME:
        raise ctl.BadInput("--readme fills the project's own READMEs, from its own records: leave out --results")
    try:
        groups = read_groups(results)
        chosen = {key: rows for key, rows in groups.items() if given.preset in (None, key[0])}
        if not chosen:
            raise ctl.BadInput(f"no records of {given.preset or 'any preset'} in {results}: run some first")
        if given.tsne:
            found = [compute_planes(given.tsne, results, chosen[key], runs) for key in chosen
                     if key[2] == ctl.PROTOCOL_VERSION]
            if not any(found):
                raise ctl.BadInput(f"{runs} has no checkpoint of contrastive, tau 0.07 or 0.2, seed 0, with a record")
        files = make_files(results, chosen)
        for path in (HOME.parent / "README.md", HOME / "README.md"):
            if given.readme and path.exists():
                files[path] = fill_in(path, groups)
        for path, content in files.items():
            if not path.exists() or path.read_bytes() != content:
                ctl.write_whole(path, content)
    except ImportError as error:
        raise ctl.BadInput(f"{error}: the verdicts need scipy, --tsne needs scikit-learn")


if __name__ == "__main__":
    os.environ.pop("MPLBACKEND", None)  # a notebook's, which the interpreter of .venv may not have
    sys.exit(ctl.one_line("report.py", main))
