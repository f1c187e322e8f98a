#!/usr/bin/env python3
"""From the records of runs: tables, verdicts on the paper's claims, figures. It trains nothing.

    python results/report.py                             every preset that has records beside this file
    python results/report.py --readme                    the same, and the generated parts of both READMEs
    python results/report.py --tsne data/cifar10-jpeg    the same, and Fig. 2 anew from the checkpoints in runs/

Each preset's folder gets TABLE.md, CLAIMS.md and the figures. All is made before the first file is written, so a record
that is refused changes nothing. In reading order: records, tables, verdicts, figures, Fig. 2, READMEs.
"""
from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import os
import re
import statistics
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import torch

HOME = Path(__file__).resolve().parent
sys.path.insert(0, str(HOME.parent))
import ctl

# ----------------------------------------------------------------------------------------------------------- records

COLUMNS = {"accuracy": ("accuracy, %", 2), "knn": ("kNN, %", 2), "uniformity": ("uniformity", 3),
           "tolerance": ("tolerance", 3)}
STEP = ("augmentation", "forward", "similarities and loss", "backward", "optimiser", "bank update")
TABLE_1 = list(ctl.PAPER["cifar10"])  # (loss, tau) of its ten rows
ORDER = list(dict.fromkeys(loss for loss, _ in TABLE_1))
Rows = dict  # (loss and what departs from the preset, tau) -> the runs of each seed
Groups = dict  # (preset, dataset, protocol version) -> Rows: what differs in one of the three is never averaged

# What the files must hold, by example: a text, a whole number, a number or null; [x]: a list of any length.
METRICS = dict.fromkeys(COLUMNS, 0.5)
RECORD = {
    "protocol_version": 1, "data": {"sha256": "", "train": 1},
    "environment": {"torch": "", "precision": "", "device": ""},
    "config": {**dict.fromkeys(("loss", "preset", "dataset", "schedule", "bank_init"), ""), "lr": 0.5, "probe_lr": 0.5,
               **dict.fromkeys(("seed", "epochs", "batch_size", "width"), 1), "tau": 0.5},
    "final": {**METRICS, "accuracy_heldout": 0.5, "profile": 11 * [0.5], "untrained": METRICS}}
PLANES = {"protocol_version": 1, "planes": [{"tau": 0.5, "knn": 0.5, "tsne": {"x": [0.5], "y": [0.5], "label": [1]}}]}
SPEED = {"environment": {"threads": 1}, "parts_ms": dict.fromkeys(STEP, 0.5),
         **dict.fromkeys(("step_ms", "network_ms", "step_over_network", "images_per_second"), 0.5),
         "peak_memory_mib": 0.5, "training_hours": 0.5}


def check(path: Path, value, example, key: str = "") -> None:
    """Raise BadInput, naming file and key, where a value is missing or of another kind than the example."""
    right = {dict: lambda: isinstance(value, dict), str: lambda: isinstance(value, str),
             list: lambda: isinstance(value, list) and len(example) in (1, len(value)),
             int: lambda: type(value) is int and 0 <= value < 2 ** 31,
             float: lambda: value is None or type(value) in (int, float) and abs(value) < 1e6}[type(example)]
    if not right():
        raise ctl.BadInput(f"{path}: {key or 'the whole'} is {str(value)[:40]!r}, which is of the wrong kind")
    for name, one in example.items() if isinstance(example, dict) else ():
        if name not in value:
            raise ctl.BadInput(f"{path} has no {key}{'.' * bool(key)}{name}")
        check(path, value[name], one, f"{key}{'.' * bool(key)}{name}")
    for one in value if isinstance(example, list) else ():
        check(path, one, example[0], key)


def read_json(path: Path, example: dict) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ctl.BadInput(f"{path} is not JSON: remove it, or make it anew")
    check(path, value, example)
    return value


class Run(NamedTuple):
    """A record that is whole and stands where it belongs."""
    path: Path
    record: dict
    config: dict
    departs: dict[str, str]  # the settings that depart from the preset, by the file's name
    final: dict  # the metrics

    def row(self) -> tuple[str, float | None]:
        return ", ".join([self.config["loss"], *map(" ".join, self.departs.items())]), self.config["tau"]


def read_run(path: Path) -> Run:
    record = ctl.read_record(path)
    check(path, record, RECORD)
    config, place = record["config"], path.parts[-3:]
    if record["protocol_version"] == ctl.PROTOCOL_VERSION:  # settings of another version may be unknown here
        try:
            settings = ctl.Config(**config)
            place = Path(f"{ctl.cell_path(settings, config['dataset'])}.json").parts
        except (ctl.BadInput, TypeError) as error:
            raise ctl.BadInput(f"{path}: config: {error}")
        config = ctl.plain(settings.study())
    fields = "|".join(map(re.escape, sorted(config, key=len, reverse=True)))
    prefix = re.escape(ctl.cell_prefix(config["loss"], config["tau"]))
    name = re.fullmatch(rf"{prefix}((?:_(?:{fields})-.+)?)_seed{config['seed']}", path.stem)
    if not name or path.parts[-3:] != place or path.parts[-3:-1] != (config["preset"], config["dataset"]):
        raise ctl.BadInput(f"{path} holds a record of another run, or is a copy: move it away")
    departs = dict(re.findall(rf"_({fields})-(.+?)(?=_(?:{fields})-|$)", name[1]))
    return Run(path, record, config, departs, record["final"])


def check_alike(run: Run, other: Run) -> None:
    """Raise BadInput, naming the key, where two records of one table differ in more than their names say."""
    named = {key for key in run.departs | other.departs if run.departs.get(key) != other.departs.get(key)}
    here, there = ({**one.config, "sha256 of the images": one.record["data"]["sha256"]} for one in (run, other))
    # Another kind of CPU rounds a pixel of `shapes` differently.
    if named & {"size", "subset", "test_subset"} or run.config["dataset"] == "shapes":
        named.add("sha256 of the images")
    for key in sorted((here.keys() | there.keys()) - named - {"loss", "tau", "k", "seed"}):
        if here.get(key) != there.get(key):
            raise ctl.BadInput(f"{run.path}: {key} is {here.get(key)}, but {there.get(key)} in {other.path}: records "
                               "of one table must agree in it; move one of them away")


def read_groups(results: Path, preset: str | None = None) -> Groups:
    """All records, in the order of Table 1. Raises BadInput for one that is broken, misplaced, or of another kind."""
    groups: Groups = {}
    first: dict[tuple, Run] = {}
    for path in sorted(results.glob(f"{preset or '*'}/*/*.json")):
        run = read_run(path)
        key = run.config["preset"], run.config["dataset"], run.record["protocol_version"]
        check_alike(run, first.setdefault(key, run))
        check_alike(run, first.setdefault((*key, *run.departs.items()), run))
        rows = groups.setdefault(key, {row: [] for row in TABLE_1})  # a row without a record is shown as missing
        rows.setdefault(run.row(), []).append(run)

    def order(row: tuple) -> tuple:
        loss, _, departs = row[0].partition(", ")
        return departs, [*ORDER, loss].index(loss), loss, row[1] or 0
    return {key: {row: sorted(rows[row], key=lambda run: run.config["seed"]) for row in sorted(rows, key=order)}
            for key, rows in groups.items()}


def runs_of(rows: Rows) -> list[Run]:
    return [run for runs in rows.values() for run in runs]


def measured(rows: Rows, name: str, key: str) -> dict:
    """tau -> the values of all seeds, where there are any; tau None for what has none, such as the untrained network,
    which is the same for all runs of a seed."""
    found = {tau: [run.final[key] for run in runs] for (row, tau), runs in rows.items() if row == name}
    if name == "untrained":
        before = {run.config["seed"]: run.final["untrained"][key] for run in runs_of(rows) if not run.departs}
        found = {None: list(before.values())}
    known = {tau: [value for value in values if value is not None] for tau, values in found.items()}
    return {tau: values for tau, values in known.items() if values}


# ------------------------------------------------------------------------------------------------------------ tables


def markdown(head: list, lines: list[list]) -> str:
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in (head, ["---"] * len(head), *lines))


def mean_sd(values: list[float], digits: int) -> str:
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread} ({len(values)})"


def link(path: Path, folder: Path) -> str:
    return os.path.relpath(path, folder).replace(os.sep, "/").replace(" ", "%20")


def table(rows: Rows, folder: Path | None = None) -> str:
    """Ours beside the paper's. Without a folder: the rows of Table 1; with one: all rows, and links from there."""
    dataset = runs_of(rows)[0].config["dataset"]
    beside = ctl.TABULATED if dataset.split("-")[0] in ctl.PAPER else ()
    head, lines = ["loss", "τ"], []
    for key, (title, _) in COLUMNS.items():
        head += [title, "paper"] if key in beside else [title]
    for (name, tau), runs in {**rows, ("untrained", None): []}.items():
        if folder is None and (name, tau) not in TABLE_1 and name != "untrained":
            continue
        line, paper = [name, tau or ""], ctl.paper_values(dataset, name, tau)
        for key, (_, digits) in COLUMNS.items():
            line.append(mean_sd(measured(rows, name, key).get(tau, []), digits))
            line += [paper[key] or "–"] if key in beside else []
        links = " ".join(f"[{run.config['seed']}]({link(run.path, folder)})" for run in runs) if folder else ""
        lines.append(line + [links or "missing" * (name != "untrained")] * bool(folder))
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
                          *(interval(gain, 2) if gain else "–" for gain in gains)])
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
TAUS = (0.07, 0.3, 0.7, 1.0)
MATCHED = "contrastive, match_step True"

# Each measure takes one seed's runs, (name, tau) -> metrics. It raises KeyError or TypeError where one is missing or
# null.


def over_tau(cells: dict, key: str, loss: str = "contrastive") -> list:
    return [cells[loss, tau][key] for tau in TAUS]


def best(cells: dict, loss: str = "contrastive", taus: tuple = TAUS) -> float:
    return max(taus, key=lambda tau: cells[loss, tau]["accuracy_heldout"])


def accuracy_at_best(cells: dict) -> float:
    return cells["contrastive", best(cells)]["accuracy"]


def reverse_u(cells: dict, loss: str = "contrastive") -> float:
    inside = cells[loss, best(cells, loss, TAUS[1:-1])]["accuracy"]
    return inside - max(cells[loss, TAUS[0]]["accuracy"], cells[loss, TAUS[-1]]["accuracy"])


def flatness(cells: dict) -> float:
    ordinary, hard = over_tau(cells, "uniformity"), over_tau(cells, "uniformity", "hard")
    flat = (max(ordinary) - min(ordinary)) / 4 - (max(hard) - min(hard))
    return flat if best(cells, "hard") > best(cells) else min(flat, 0.0)


def uselessness(cells: dict) -> float:
    untrained = cells["triplet", None]["untrained"]["accuracy"]
    return (accuracy_at_best(cells) - untrained) / 4 - (cells["triplet", None]["accuracy"] - untrained)


SMALLEST = "the smallest step from one τ to the next; p: Page's test"
# A claim, its measure, what its effect is. A dict holds trends: their values at the four tau should rise.
CLAIMS = {
    "C1": ("ordinary loss: uniformity falls as τ grows",
           {"": lambda c: [-value for value in over_tau(c, "uniformity")]}, SMALLEST),
    "C2": ("ordinary loss: tolerance grows with τ",
           {"": lambda c: [+value for value in over_tau(c, "tolerance")]}, SMALLEST),
    "C3": ("ordinary loss: accuracy against τ is a reverse U", reverse_u, "accuracy at τ = 0.3 or 0.7 (by the held-out "
           "labels), less that at the better end (0.07 or 1, by the test images)"),
    "C4": ("the simple loss is much worse than the ordinary loss at its best τ",
           lambda c: accuracy_at_best(c) - c["simple", None]["accuracy"] - 2, "accuracy lost, less 2 points"),
    "C5": ("hard simple is competitive with the ordinary loss at its best τ",
           lambda c: c["hard-simple", None]["accuracy"] - accuracy_at_best(c) + 1, "accuracy gained, plus 1 point"),
    "C6": ("hard loss: more uniform than the ordinary loss at the same τ",
           lambda c: statistics.mean(over_tau(c, "uniformity", "hard")) - statistics.mean(over_tau(c, "uniformity")),
           "the gain in uniformity, mean over the four τ"),
    "C7": ("hard loss: uniformity almost flat in τ, best τ larger than the ordinary loss's", flatness,
           "a quarter of the ordinary loss's range of uniformity over τ, less the hard loss's; 0 at most where its "
           "best τ is not larger"),
    "C8": ("as τ falls, the gap from the positive to the nearest negative widens; as τ grows, the positive's "
           "similarity grows", {"gap": lambda c: [profile[1] - profile[0] for profile in over_tau(c, "profile")],
                                "positive": lambda c: [+profile[0] for profile in over_tau(c, "profile")]}, SMALLEST),
    "C9": ("the τ→0 loss learns nothing useful", uselessness, "a quarter of the ordinary loss's gain in accuracy over "
           "the untrained network, less the triplet loss's gain"),
    "M": ("ours, not the paper's: C3 holds also where the step does not grow as 1/τ", lambda c: reverse_u(c, MATCHED),
          "as C3, of the loss times τ (`--match-step`)"),
}


class Finding(NamedTuple):
    """What the records say of a claim."""
    verdict: str
    effect: str = "–"
    of_each_seed: str = "–"
    seeds: int = 0


def mean_interval(values: list[float]) -> tuple[float, float, float]:
    """The mean, and the ends of its 95 % interval by Student's t: infinite for one value."""
    from scipy.stats import ttest_1samp
    mean = statistics.mean(values)
    if max(values) == min(values):
        return (mean, mean, mean) if len(values) > 1 else (mean, -math.inf, math.inf)
    with warnings.catch_warnings():  # SciPy's, of values that are nearly equal
        warnings.simplefilter("ignore")
        low, high = ttest_1samp(values, 0).confidence_interval()
    return mean, float(low), float(high)


def interval(values: list[float], digits: int = 3) -> str:
    mean, low, high = mean_interval(values)
    return f"{mean:.{digits}f}" + (f" ({low:.{digits}f} to {high:.{digits}f})" if math.isfinite(low) else "")


def judge_effect(effects: dict[int, float]) -> Finding:
    """effects: seed -> effect; above 0 speaks for the claim."""
    if not effects:
        return Finding("undecided")
    values = list(effects.values())
    _, low, high = mean_interval(values)
    verdict = "confirmed" if low > 0 else "refuted" if high < 0 else "undecided"
    return Finding(verdict, interval(values), ", ".join(f"{seed}: {v:.3f}" for seed, v in effects.items()), len(values))


def judge_trend(trend: dict[int, list[float]]) -> Finding:
    """trend: seed -> the values at the four tau, which should rise."""
    from scipy.stats import page_trend_test
    if not trend:
        return Finding("undecided")
    steps = {f"τ {a} → {b}": {seed: row[i + 1] - row[i] for seed, row in trend.items()}
             for i, (a, b) in enumerate(zip(TAUS, TAUS[1:]))}
    at = min(steps, key=lambda step: statistics.mean(steps[step].values()))
    least, rows = judge_effect(steps[at]), list(trend.values())
    effect, verdict = f"{at}: {least.effect}", "undecided"
    if len(rows) > 1:
        rises, falls = (page_trend_test(values).pvalue for values in (rows, [row[::-1] for row in rows]))
        verdict = "confirmed" if rises <= 0.025 else "refuted" if falls <= 0.025 else "undecided"
        effect += f"; p = {rises:.2g}"
    if verdict == "confirmed" and least.verdict == "refuted":
        verdict += f", except {at}"
    return least._replace(verdict=verdict, effect=effect)


def judge_trends(found: dict[str, Finding]) -> Finding:
    """Of a claim that has several: refuted if one is, confirmed if all are."""
    verdicts = {finding.verdict: None for finding in found.values()}
    exceptions = "".join(verdict.removeprefix("confirmed") for verdict in verdicts)
    verdict = next((verdict for verdict in ("refuted", "undecided") if verdict in verdicts), f"confirmed{exceptions}")
    say = lambda field: "; ".join(f"{name} {getattr(finding, field)}".strip() for name, finding in found.items())
    return Finding(verdict, say("effect"), say("of_each_seed"), min(finding.seeds for finding in found.values()))


def judge(rows: Rows) -> dict[str, Finding]:
    seeds: dict[int, dict] = {}
    for run in runs_of(rows):
        seeds.setdefault(run.config["seed"], {})[run.row()] = run.final

    def of_each_seed(measure) -> dict:
        found = {}
        for seed, cells in sorted(seeds.items()):
            with contextlib.suppress(KeyError, TypeError):
                found[seed] = measure(cells)
        return found

    findings = {}
    for name, (_, measure, _) in CLAIMS.items():
        if isinstance(measure, dict):
            findings[name] = judge_trends({what: judge_trend(of_each_seed(trend)) for what, trend in measure.items()})
        else:
            findings[name] = judge_effect(of_each_seed(measure))
    return findings


def claims(rows: Rows, whole: bool = False) -> str:
    """A line a verdict; whole: with the effect of each seed, and what the effect is."""
    lines = []
    for name, found in judge(rows).items():
        claim, _, meaning = CLAIMS[name]
        more = [found.of_each_seed, meaning] if whole else [found.seeds]
        lines.append([name, claim, f"**{found.verdict}**", found.effect, *more])
    more = ["of each seed", "what the effect is"] if whole else ["seeds"]
    return markdown(["", "claim", "verdict", "effect (95 % interval)", *more], lines)


def compare(groups: Groups) -> str:
    """The paper's nine claims, and what each preset says of them."""
    columns: dict[str, dict] = {}
    for preset in ("mini", "narrow", "paper"):
        found = {f"{preset}, {dataset}": judge(rows) for (name, dataset, version), rows in groups.items()
                 if (name, version) == (preset, ctl.PROTOCOL_VERSION) and dataset.split("-")[0] in ctl.PAPER}
        columns |= found or ({} if preset == "paper" else {preset: {}})

    def cell(found: Finding | None) -> str:
        if not found or not found.seeds:
            return "runs are missing" if found else NONE
        return f"**{found.verdict}**: {found.effect}; {seeds_in_words(found.seeds)}"
    lines = [[name, CLAIMS[name][0], *(cell(findings.get(name)) for findings in columns.values())]
             for name in list(CLAIMS)[:9]]
    return markdown(["", "the paper's claim", *columns], lines)


def seeds_in_words(*counts: int) -> str:
    few, many = min(counts), max(counts)
    return f"{few} to {many} seeds" if few < many else "one seed" if few == 1 else f"{few} seeds"


# ----------------------------------------------------------------------------------------------------------- figures

# Okabe and Ito: told apart by all readers.
COLOURS = {"contrastive": "#0072b2", "hard": "#d55e00", MATCHED: "#009e73", "simple": "#cc79a7", "untrained": "#666666"}
STYLE = {"svg.hashsalt": "ctl", "font.size": 11, "axes.titlesize": 12, "figure.titlesize": 12,
         "axes.spines.top": False, "axes.spines.right": False}
METADATA = {"svg": {"Date": None, "Creator": None}, "png": {"Software": None}}  # the same file on any day


def draw(rows: Rows, planes: list[dict]) -> dict[str, bytes]:
    """The paper's Figs. 2 to 9 from the records, as SVG and PNG: file name -> content. A caller's own backend, settings
    and open figures stay as they are: pyplot is not used."""
    import matplotlib
    from matplotlib.figure import Figure
    run, files = runs_of(rows)[0], {}
    title = f"preset {run.config['preset']}: {run.config['dataset']}, {about(rows)}"
    stem = f"{run.config['dataset']}-v{run.record['protocol_version']}"
    figures = {f"{stem}-dilemma": (draw_dilemma, 7.2), f"{stem}-profile": (draw_profiles, 6.4),
               f"{stem}-tsne": (functools.partial(draw_planes, planes), 5.2), "penalty": (draw_penalty, 4.5)}
    default = {key: value for key, value in matplotlib.rcParamsDefault.items() if key != "backend"}
    with matplotlib.rc_context({**default, **STYLE}):
        for name, (fill, height) in figures.items():
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
        axis.axhline(statistics.mean(points[None]), **style)
    elif points:
        spread = [statistics.stdev(values) if len(values) > 1 else math.nan for values in points.values()]
        means = list(map(statistics.mean, points.values()))
        axis.errorbar(list(points), means, spread, marker="o", markersize=5, capsize=3, **style)


def draw_dilemma(figure, rows: Rows, title: str) -> bool:
    """Figs. 4 and 6, 5 and 7, 9: uniformity, tolerance and accuracy against tau."""
    dataset, before = runs_of(rows)[0].config["dataset"], measured(rows, "untrained", "accuracy")
    untrained = f" (untrained: {statistics.mean(before[None]):.1f})" if before else ""
    panels = [("uniformity", "ours and paper", "uniformity (larger = more uniform)"),
              ("tolerance", "ours and paper", "tolerance"),
              ("accuracy", "ours", f"linear accuracy, %, ours{untrained}"),
              ("accuracy", "paper", "linear accuracy, %, the paper's")]
    axes, ticks, counts = figure.subplots(2, 2, sharex=True).flatten(), set(TAUS), set()
    for axis, (key, whose, heading) in zip(axes, panels):
        for name, colour in COLOURS.items():
            ours, label = measured(rows, name, key), name.replace("match_step True", "loss times τ")
            # The untrained network's accuracy, far below, would flatten the curves: it stands in the heading.
            if "ours" in whose and (name, key) != ("untrained", "accuracy"):
                line = ":" if name == "untrained" else "-"
                draw_curve(axis, ours, color=colour, linestyle=line, label=f"{label}, ours")
                ticks |= {tau for tau in ours if tau and tau < 0.05}
                counts |= set(map(len, ours.values()))
            if "paper" in whose:
                taus = [None, *sorted({*TAUS, *ctl.PAPER_ACCURACY["cifar10"]})]
                theirs = {tau: [ctl.paper_values(dataset, name, tau)[key]] for tau in taus}
                theirs = {tau: value for tau, value in theirs.items() if value != [None]}
                draw_curve(axis, theirs, color=colour, linestyle="--", alpha=0.6, label=f"{label}, the paper's")
        axis.set(xscale="log", xlabel="temperature τ", title=heading)
        axis.set_xticks(sorted(ticks), [f"{tau:g}" for tau in sorted(ticks)])
        axis.minorticks_off()
        axis.tick_params(labelbottom=True)
    # The same span in points, so that a step looks as large in one panel as in the other.
    limits = [axis.get_ylim() for axis in axes[2:]]
    half = max(high - low for low, high in limits) / 2
    for axis, (low, high) in zip(axes[2:], limits):
        axis.set_ylim((low + high) / 2 - half, (low + high) / 2 + half)
    axes[3].set_visible(dataset.split("-")[0] in ctl.PAPER)
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=10)
    spread = "mean ± standard deviation over " if max(counts, default=0) > 1 else ""
    figure.suptitle(f"{title}\n{spread}{seeds_in_words(*counts or {0})}")
    return True


def draw_profiles(figure, rows: Rows, title: str) -> bool:
    """Fig. 8: the mean similarity of the positive and of the ten nearest negatives, at the four tau of Table 1."""
    found = measured(rows, "contrastive", "profile")
    profiles = {tau: [p for p in found.get(tau, []) if None not in p] for tau in TAUS}
    counts = [len(some) for some in profiles.values() if some]
    for tau, axis in zip(TAUS, figure.subplots(2, 2).flat):
        means = list(map(statistics.mean, zip(*profiles[tau]))) or [0] * 11
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
    for plane, axis in zip(planes, figure.subplots(1, len(planes), squeeze=False).flat if planes else []):
        points = list(zip(*(plane["tsne"][key] for key in ("x", "y", "label"))))
        for place, label in enumerate(classes):  # five colours, then the next marker: told apart without the hue
            x, y = ([point[i] for point in points if point[2] == label] for i in (0, 1))
            axis.scatter(x, y, s=10, color=list(COLOURS.values())[place % 5], marker="ox^s+"[place // 5 % 5],
                         label=names.get(label, f"class {label}"))
        axis.set(title=f"τ = {plane['tau']}: kNN accuracy {plane['knn']} %", xticks=[], yticks=[])
    if 0 < len(classes) <= 20:
        figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=5, markerscale=2)
    figure.suptitle(f"{title}\nt-SNE of embeddings of test images, by class")
    return bool(planes)


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


def read_planes(path: Path, rows: Rows) -> list[dict]:
    """The points of Fig. 2: what --tsne kept in that file, else what old records hold. Nothing is computed."""
    runs = [run for tau in FIG_2
            for run in [run for run in rows.get(("contrastive", tau), []) if run.record.get("tsne")][:1]]
    planes = [{"tau": run.config["tau"], "knn": run.final["knn"], "tsne": run.record["tsne"]} for run in runs]
    for run, plane in zip(runs, planes):
        check(run.path, plane, PLANES["planes"][0])
    kept = read_json(path, PLANES) if path.exists() else None
    if kept:
        planes = kept["planes"] if kept["protocol_version"] == runs_of(rows)[0].record["protocol_version"] else []
    return planes


def compute_planes(dataset: str, preset: str, groups: Groups, runs: Path) -> tuple[str, list[dict]]:
    """t-SNE of the first 1,000 test images, by the preset's checkpoints of seed 0, and the dataset's own name."""
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits
    planes: list[dict] = []
    if not list(runs.glob(f"{preset}/*/contrastive_tau*_seed0.pt")):
        return dataset, planes
    some = ctl.make_config(preset, dataset=dataset)
    data = ctl.take_subset(ctl.load_dataset(dataset, HOME.parent / "data", some.size), some)
    rows = groups.get((preset, data.name, ctl.PROTOCOL_VERSION), {})
    for run in (run for tau in FIG_2 for run in rows.get(("contrastive", tau), []) if run.config["seed"] == 0):
        config = ctl.Config(**run.config)
        path = runs / f"{ctl.cell_path(config, data.name)}.pt"
        saved = ctl.load_checkpoint(path) if path.exists() else None
        if not saved:
            continue
        if saved.get("config") != run.config or data.name != "shapes" and saved.get("data") != data.sha256():
            raise ctl.BadInput(f"{path} is of another run than {run.path}, or of other images: move it away")
        model, _ = ctl.make_model(config, torch.device("cpu"))
        model.load_state_dict(saved["model"])
        _, z = ctl.embed(model, data.test_images[:1000])
        # Another number of threads gives another picture; the start by PCA fails where all embeddings are equal.
        with threadpool_limits(1):
            places = TSNE(perplexity=min(30.0, len(z) / 4), init="random", random_state=0).fit_transform(z.numpy())
        x, y = ([round(value, 1) for value in column] for column in places.T.tolist())
        planes.append({"tau": config.tau, "knn": run.final["knn"],
                       "tsne": {"x": x, "y": y, "label": data.test_labels[:1000].tolist()}})
    return data.name, planes


# ----------------------------------------------------------------------------------------------------------- READMEs

NONE = "No records yet."
MARKER = re.compile(r"(<!-- report: ([^\n]*?) -->\n)(.*?)(<!-- /report -->)", re.DOTALL)


def costs(folder: Path) -> str:
    """What speed.py measured: a row for each of its files; links are from the folder."""
    digits = {"step_ms": 1, "network_ms": 1, "step_over_network": 3, "images_per_second": 0, "peak_memory_mib": 0,
              "training_hours": 1}
    lines = []
    for path in sorted((HOME / "profile").glob("*.json")):
        found = read_json(path, SPEED)
        values = [(found["parts_ms"][part], 1) for part in STEP]
        values += [(found[key], places) for key, places in digits.items()]
        lines.append([f"[{path.stem}]({link(path, folder)})", found["environment"]["threads"],
                      *("–" if value is None else f"{value:.{places}f}" for value, places in values)])
    return markdown(["", "threads", *STEP, "the step, ms", "network alone", "step / network", "images/s", "MiB",
                     "training, h"], lines)


def part(words: str, groups: Groups, folder: Path) -> str:
    """What belongs behind the marker `<!-- report: WORDS -->` of the README in that folder."""
    kinds = {"table": table, "rows": lambda rows: table(rows, folder), "claims": claims,
             "effects": lambda rows: claims(rows, whole=True), "ladder": ladder}
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


def make_files(results: Path, groups: Groups, planes: dict[tuple, list[dict]]) -> dict[Path, bytes]:
    """Each preset's files; tables and verdicts are printed too. planes: those of Fig. 2 that were computed now."""
    files, drawing = {}, True
    try:
        import matplotlib.figure  # noqa: F401
    except Exception as error:  # not installed, or an MPLBACKEND or a matplotlibrc that it refuses
        drawing = False
        ctl.say(f"figures are left out, for want of a working matplotlib: {' '.join(str(error).split())[:150]}")
    for key, rows in groups.items():
        folder, title = results / key[0], "preset {}, dataset {}, protocol version {}".format(*key)
        ours, verdicts, kept = table(rows, folder), claims(rows, whole=True), folder / f"{key[1]}-tsne.json"
        ctl.say(f"\n{title}\n\n{ours}\n\n{verdicts}")
        heads = {"TABLE.md": f"# Table 1, preset {key[0]}: ours beside the paper's\n",
                 "CLAIMS.md": f"# The paper's claims, preset {key[0]}\n\n{NEEDS}"}
        for name, text in (("TABLE.md", f"{ours}\n\n{caption(rows)}"), ("CLAIMS.md", verdicts)):
            before = files.get(folder / name, heads[name].encode())
            files[folder / name] = before + f"\n## {title}\n\n{text}\n".encode()
        if key in planes:
            content = json.dumps({"protocol_version": key[2], "planes": planes[key]}, sort_keys=True)
            files[kept] = content.encode() + b"\n"
        if drawing:
            drawn = draw(rows, planes.get(key) or read_planes(kept, rows))
            files |= {folder / name: content for name, content in drawn.items()}
    return files


def report(results: Path, preset: str | None, readme: bool, tsne: str | None, runs: Path) -> None:
    if readme and results.resolve() != HOME:
        raise ctl.BadInput("--readme fills the project's own READMEs, from its own records: leave out --results")
    groups, planes = read_groups(results, None if readme else preset), {}
    chosen = {key: rows for key, rows in groups.items() if preset in (None, key[0])}
    if not chosen:
        raise ctl.BadInput(f"no records of {preset or 'any preset'} in {results}: run some first")
    if tsne:
        for name in sorted({key[0] for key in chosen}):
            dataset, found = compute_planes(tsne, name, groups, runs)
            planes |= {(name, dataset, ctl.PROTOCOL_VERSION): found} if found else {}
        if not planes:
            raise ctl.BadInput(f"{runs} has no checkpoint of contrastive, tau 0.07 or 0.2, seed 0, with a record")
    files = make_files(results, chosen, planes)
    for path in (HOME.parent / "README.md", HOME / "README.md"):
        if readme and path.exists():
            files[path] = fill_in(path, groups)
    for path, content in files.items():
        if not path.exists() or path.read_bytes() != content:
            ctl.write_whole(path, content)


def main(argv: list[str] | None = None) -> None:
    parser = ctl.Parser("report.py")
    parser.description = (__doc__ or "").split("\n")[0]
    parser.add_argument("--results", default=str(HOME), help="folder of the records [where this file lies]")
    parser.add_argument("--preset", choices=list(ctl.PRESETS), help="report that preset alone [all that have records]")
    parser.add_argument("--readme", action="store_true", help="fill the generated parts of both READMEs too")
    parser.add_argument("--tsne", metavar="DATASET", help="compute Fig. 2 from the checkpoints of that dataset")
    parser.add_argument("--runs", default=str(HOME.parent / "runs"), help="folder of the checkpoints [runs/]")
    given = parser.parse_args(argv)
    results, runs = (Path(os.path.expanduser(folder)) for folder in (given.results, given.runs))
    try:
        report(results, given.preset, given.readme, given.tsne, runs)
    except ImportError as error:
        raise ctl.BadInput(f"{error}: the verdicts need scipy, --tsne needs scikit-learn")


if __name__ == "__main__":
    sys.exit(ctl.one_line("report.py", main))
