#!/usr/bin/env python3
"""From the records of runs: tables, verdicts on the paper's claims, figures. It trains nothing.

    python results/report.py                             every preset that has records beside this file
    python results/report.py --readme                    the same, and the generated parts of both READMEs
    python results/report.py --tsne data/cifar10-jpeg    the same, and Fig. 2 anew from the checkpoints in runs/

Each preset's folder gets TABLE.md, CLAIMS.md and the figures. All is made before the first file is written, so a record
that is refused changes nothing; but the points of --tsne are kept at once. In reading order: records, tables,
verdicts, figures, Fig. 2, READMEs.
"""
import collections
import contextlib
import io
import json
import math
import os
import re
import sys
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
UNTRAINED = "untrained", None
Groups = dict  # (preset, dataset, protocol version) -> list[Run]: what differs in one of the three is never averaged


class Run(NamedTuple):
    """A record that is whole and stands where it belongs."""
    path: Path
    record: dict
    config: dict
    departs: dict[str, str]  # the settings that depart from the preset, by the file's name
    row: tuple  # of the table: (loss and what departs, tau)
    final: dict  # the metrics

    @property
    def stem(self) -> Path:
        """How the names of its table's figures begin."""
        return self.path.parents[1] / f"{self.config['dataset']}-v{self.record['protocol_version']}"

    @property
    def in_paper(self) -> bool:
        return self.config["dataset"].split("-")[0] in ctl.PAPER


def parse(path: Path, text: str) -> dict:
    """The JSON of a file. To ask it for a key that is missing raises BadInput, which names the file and the key."""
    class Found(dict):
        def __missing__(self, key):
            raise ctl.BadInput(f"{path} has no {key!r}")
    try:
        return json.loads(text, object_hook=Found)
    except ValueError:
        raise ctl.BadInput(f"{path} is not JSON: remove it, or make it anew")


def read_run(path: Path) -> Run:
    record = parse(path, json.dumps(ctl.read_record(path)))
    config = record["config"]
    named = re.findall(rf"_({'|'.join(config)})-", path.stem)
    departs = {field: str(config[field]).strip("[]").replace(", ", "-") for field in named}  # milestones-160-190
    name = ctl.cell_prefix(config["loss"], config["tau"]) + "".join(f"_{field}-{departs[field]}" for field in departs)
    if path.parts[-3:] != (config["preset"], config["dataset"], f"{name}_seed{config['seed']}.json"):
        raise ctl.BadInput(f"{path} holds a record of another run, or is a copy: move it away")
    row = ", ".join([config["loss"], *map(" ".join, departs.items())]), config["tau"]
    return Run(path, record, config, departs, row, record["final"])


def check_alike(run: Run, seen: dict) -> None:
    """Raise BadInput, naming the key, where records of one table differ in more than their names say."""
    may_differ = {"loss", "tau", "k", "seed", *run.departs}
    settings = {key: value for key, value in run.config.items() if key not in may_differ}
    if run.config["dataset"] != "shapes":  # another kind of CPU rounds a pixel of these differently
        of = "sha256 of the images (size {size}, subset {subset}, test_subset {test_subset})".format_map(run.config)
        settings[of] = run.record["data"]["sha256"]
    for key, value in settings.items():
        usual, path = seen.setdefault(key, (value, run.path))
        if value != usual:
            raise ctl.BadInput(f"{run.path}: {key} is {value}, but {usual} in {path}: records of one table must agree "
                               "in it; move one of them away")


def read_groups(results: Path) -> Groups:
    """All records, in the order of the table, then the untrained networks. Raises BadInput for one that is broken or
    misplaced."""
    groups, seen = {}, {}
    for run in map(read_run, sorted(results.glob("*/*/*.json"))):
        key = run.config["preset"], run.config["dataset"], run.record["protocol_version"]
        check_alike(run, seen.setdefault(key, {}))
        groups.setdefault(key, []).append(run)
    for runs in groups.values():
        runs.sort(key=lambda run: (place(run.row), run.config["seed"]))
        untrained = {run.config["seed"]: run._replace(row=UNTRAINED, final=run.final["untrained"])
                     for run in runs if not run.departs}  # the same for all runs of a seed
        runs += untrained.values()
    return groups


def place(row: tuple) -> tuple:
    """As in Table 1, then what departs from the preset, then the untrained networks."""
    loss, _, departs = row[0].partition(", ")
    losses = [known for known, _ in TABLE_1]
    return row == UNTRAINED, departs, [*losses, loss].index(loss), loss, row[1] or 0


def measured(runs: list[Run], name: str, key: str) -> dict:
    """tau (None where the row has none) -> the values of all seeds, where there are any."""
    found = {}
    for run in runs:
        if run.row[0] == name and run.final[key] is not None:
            found.setdefault(run.row[1], []).append(run.final[key])
    return found


# ------------------------------------------------------------------------------------------------------------ tables

COLUMNS = {"accuracy": ("accuracy, %", 2), "knn": ("kNN, %", 2), "uniformity": ("uniformity", 3),
           "tolerance": ("tolerance", 3)}


def markdown(head: list, lines: list[list]) -> str:
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in (head, ["---"] * len(head), *lines))


def link(words, path: Path, folder: Path) -> str:
    return f"[{words}]({Path(os.path.relpath(path, folder)).as_posix().replace(' ', '%20')})"


def table(runs: list[Run], folder: Path | None = None) -> str:
    """Ours beside the paper's. Without a folder: the rows of Table 1; with one: all rows, and links from there."""
    config, rows = runs[0].config, {UNTRAINED, *TABLE_1}
    if folder:
        # A row of Table 1 without a record is shown as missing, but for presets that show a few rows only.
        rows = {run.row for run in runs} | {UNTRAINED, *(TABLE_1 if config["preset"] not in ("quick", "smoke") else ())}
    beside = ctl.TABULATED if runs[0].in_paper else ()
    head, lines = ["loss", "τ"], []
    for key, (title, _) in COLUMNS.items():
        head += [title, "paper"] if key in beside else [title]
    for name, tau in sorted(rows, key=place):
        line, paper = [name, tau or ""], ctl.paper_values(config["dataset"], name, tau)
        for key, (_, digits) in COLUMNS.items():
            values = measured(runs, name, key).get(tau, [])
            spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
            line.append(f"{mean(values):.{digits}f}{spread} ({len(values)})" if values else "–")
            line += [paper[key] or "–"] if key in beside else []
        if folder:
            links = [link(run.config["seed"], run.path, folder) for run in runs if run.row == (name, tau)]
            line.append("" if name == "untrained" else " ".join(links) or "missing")
        lines.append(line)
    return markdown(head + ["records"] * bool(folder), lines)


def about(run: Run) -> str:
    return f"{run.record['data']['train']:,} training images, {run.config['epochs']} epochs"


def caption(runs: list[Run]) -> str:
    """The protocol of a table, from its records."""
    machines = {"torch {torch}, {precision}, {device}".format_map(run.record["environment"]) for run in runs}
    protocol = ("batch {batch_size}, ResNet-18 of width {width}, SGD with learning rate {lr}, {schedule} schedule, "
                "bank from {bank_init}; linear probe with learning rate {probe_lr}")
    return (f"{about(runs[0])}, {protocol.format_map(runs[0].config)}. A row that names a setting departs in it. "
            "Accuracy is the probe's after its last epoch; kNN has k = 200. Each value is the mean over seeds ± the "
            "standard deviation; the number of seeds is in brackets. The last row is the network before training. "
            f"Run with {'; '.join(sorted(machines))}.")


def ladder(runs: list[Run]) -> str:
    """Does the best tau move with longer training, or with a wider network? tau 0.3 less tau 0.07, seed by seed."""
    lines = []
    for name in dict.fromkeys(run.row[0] for run in runs if run.departs.keys() <= {"epochs", "width"}):
        small, large = ({run.config["seed"]: run for run in runs if run.row == (name, tau)} for tau in (0.07, 0.3))
        seeds = sorted(small.keys() & large.keys())
        if seeds and name.startswith("contrastive"):
            gains = [{seed: large[seed].final[key] - small[seed].final[key] for seed in seeds}
                     for key in ("accuracy", "knn")]
            config = small[seeds[0]].config
            lines.append([config["epochs"], config["width"], len(seeds),
                          *(judge_effect(gain, 2).effect for gain in gains)])
    return markdown(["epochs", "width", "seeds", "accuracy at τ = 0.3 less that at 0.07 (95 % interval)",
                     "the same of kNN"], sorted(lines))


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

    def accuracy(self, loss: str) -> float:
        return self[loss, self.best(loss) if loss == "contrastive" else None]["accuracy"]

    def reverse_u(self, loss: str) -> float:
        accuracy = dict(zip(TAUS, self.over_tau("accuracy", loss)))
        return accuracy[self.best(loss, (0.3, 0.7))] - max(accuracy[0.07], accuracy[1.0])

    def flatness(self) -> float:
        ordinary, hard = self.over_tau("uniformity"), self.over_tau("uniformity", "hard")
        flat = (max(ordinary) - min(ordinary)) / 4 - (max(hard) - min(hard))
        return flat if self.best("hard") > self.best() else min(flat, 0.0)

    def gain(self, loss: str) -> float:
        return self.accuracy(loss) - self.accuracy("untrained")


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
           {"": lambda c: c.accuracy("contrastive") - c.accuracy("simple") - 2}, "accuracy lost, less 2 points"),
    "C5": ("hard simple is competitive with the ordinary loss at its best τ",
           {"": lambda c: c.accuracy("hard-simple") - c.accuracy("contrastive") + 1}, "accuracy gained, plus 1 point"),
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
           {"": lambda c: c.gain("contrastive") / 4 - c.gain("triplet")}, "a quarter of the ordinary loss's "
           "gain in accuracy over the untrained network, less the triplet loss's gain"),
    "M": ("ours, not the paper's: C3 holds also where the step does not grow as 1/τ",
          {"": lambda c: c.reverse_u(MATCHED)}, "as C3, of the loss times τ (`--match-step`)"),
}


class Finding(NamedTuple):
    """What the records say of a claim."""
    verdict: str = "undecided"
    effect: str = "–"
    of_each_seed: str = "–"
    seeds: int = 0


def judge_effect(effects: dict[int, float], digits: int = 3) -> Finding:
    """effects: seed -> effect; above 0 speaks for the claim. The 95 % interval of their mean is Student's."""
    from scipy.stats import t
    values, half = list(effects.values()), math.inf
    middle = mean(values)
    words = f"{middle:.{digits}f}"
    if len(values) > 1:
        half = t.ppf(0.975, len(values) - 1) * stdev(values) / math.sqrt(len(values))
        words += f" ({middle - half:.{digits}f} to {middle + half:.{digits}f})"
    verdict = "confirmed" if middle > half else "refuted" if middle < -half else "undecided"
    return Finding(verdict, words, ", ".join(f"{seed}: {effect:.3f}" for seed, effect in effects.items()), len(values))


def judge_trend(trend: dict[int, list[float]]) -> Finding:
    """trend: seed -> the values at the four tau, which should rise. The smallest step is its effect."""
    from scipy.stats import page_trend_test
    steps = {f"τ {a} → {b}": {seed: row[i + 1] - row[i] for seed, row in trend.items()}
             for i, (a, b) in enumerate(zip(TAUS, TAUS[1:]))}
    at = min(steps, key=lambda step: mean(steps[step].values()))
    least = judge_effect(steps[at])
    effect = f"{at}: {least.effect}"
    if len(trend) == 1:
        return least._replace(effect=effect)
    rises, falls = (page_trend_test([row[::way] for row in trend.values()]).pvalue for way in (1, -1))
    verdict = "confirmed" if rises <= 0.025 else "refuted" if falls <= 0.025 else "undecided"
    if verdict == "confirmed" and least.verdict == "refuted":
        verdict += f", except {at}"
    return least._replace(verdict=verdict, effect=f"{effect}; p = {rises:.2g}")


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
        return Finding()
    return judge_trend(found) if isinstance(next(iter(found.values())), list) else judge_effect(found)


def judge(runs: list[Run]) -> dict[str, Finding]:
    seeds: dict[int, Cells] = {}
    for run in runs:
        seeds.setdefault(run.config["seed"], Cells())[run.row] = run.final
    return {claim: join({name: judge_measure(measure, seeds) for name, measure in measures.items()})
            for claim, (_, measures, _) in CLAIMS.items()}


def effects(runs: list[Run]) -> str:
    """A line a verdict, with the effect of each seed, and what the effect is."""
    lines = [[name, CLAIMS[name][0], f"**{found.verdict}**", found.effect, found.of_each_seed, CLAIMS[name][2]]
             for name, found in judge(runs).items()]
    return markdown(["", "claim", "verdict", "effect (95 % interval)", "of each seed", "what the effect is"], lines)


def compare(groups: Groups) -> str:
    """The paper's nine claims, and what each preset says of them."""
    columns = {f"{preset}, {dataset}": judge(runs) for (preset, dataset, version), runs in groups.items()
               if runs[0].in_paper and version == ctl.PROTOCOL_VERSION}
    lines = [[name, CLAIMS[name][0], *(in_short(found[name]) for found in columns.values())] for name in CLAIMS]
    return markdown(["", "the paper's claim", *columns], lines[:9])  # the tenth is ours


def in_short(found: Finding) -> str:
    return f"**{found.verdict}**: {found.effect}; {in_words([found.seeds])}" if found.seeds else "runs are missing"


def in_words(counts: list[int]) -> str:
    few, many = min(counts, default=0), max(counts, default=0)
    return f"{few} to {many} seeds" if few < many else "one seed" if few == 1 else f"{few} seeds"


# ----------------------------------------------------------------------------------------------------------- figures

PAPER_TAUS = (None, *sorted({*TAUS, *ctl.PAPER_ACCURACY["cifar10"]}))
# Okabe and Ito: told apart by all readers.
COLOURS = {"contrastive": "#0072b2", "hard": "#d55e00", MATCHED: "#009e73", "simple": "#cc79a7", "untrained": "#666666"}
STYLE = {"svg.hashsalt": "ctl", "font.size": 11, "axes.titlesize": 12, "figure.titlesize": 12,
         "axes.spines.top": False, "axes.spines.right": False}
METADATA = {"svg": {"Date": None, "Creator": None}, "png": {"Software": None}}  # the same file on any day


def draw(runs: list[Run]) -> dict[Path, bytes]:
    """The paper's Figs. 2 to 9 from the records, as SVG and PNG. A caller's own backend, settings and open figures stay
    as they are: pyplot is not used."""
    import matplotlib.style
    from matplotlib.figure import Figure
    config, stem, files = runs[0].config, runs[0].stem, {}
    title = f"preset {config['preset']}: {config['dataset']}, {about(runs[0])}"
    figures = {f"{stem}-dilemma": (draw_dilemma, 7.2), f"{stem}-profile": (draw_profiles, 6.4),
               f"{stem}-tsne": (draw_planes, 5.2), stem.with_name("penalty"): (draw_penalty, 4.5)}
    with matplotlib.style.context(["default", STYLE]):
        for name, (fill, height) in figures.items():
            figure = Figure(figsize=(8.5, height), layout="constrained")
            if fill(figure, runs, title):
                for kind, metadata in METADATA.items():
                    buffer = io.BytesIO()
                    figure.savefig(buffer, format=kind, dpi=150, metadata=metadata)
                    files[Path(f"{name}.{kind}")] = buffer.getvalue()
    return files


def draw_curve(axis, points: dict, **style) -> None:
    """Mean and standard deviation against tau; a level line where there is no tau."""
    if None in points:
        axis.axhline(mean(points[None]), **style)
    elif points:
        spread = [stdev(values) if len(values) > 1 else math.nan for values in points.values()]
        means = list(map(mean, points.values()))
        axis.errorbar(list(points), means, spread, marker="o", markersize=5, capsize=3, **style)


def draw_dilemma(figure, runs: list[Run], title: str) -> bool:
    """Figs. 4 and 6, 5 and 7, 9: uniformity, tolerance and accuracy against tau."""
    dataset, before = runs[0].config["dataset"], measured(runs, "untrained", "accuracy")
    untrained = f" (untrained: {mean(before[None]):.1f})" if before else ""
    axes = figure.subplots(2, 2, sharex=True).flatten()
    panels = (("uniformity", "uniformity (larger = more uniform)", True, True), ("tolerance", "tolerance", True, True),
              ("accuracy", f"linear accuracy, %, ours{untrained}", True, False),
              ("accuracy", "linear accuracy, %, the paper's", False, True))
    ticks = sorted({*TAUS, *(run.row[1] for run in runs if (run.row[1] or 1) < 0.05)})
    for axis, (key, heading, with_ours, with_papers) in zip(axes, panels):
        axis.set(xscale="log", xlabel="temperature τ", title=heading)
        for name, colour in COLOURS.items():
            label, line = name.replace("match_step True", "loss times τ"), ":" if name == "untrained" else "-"
            # The untrained network's accuracy, far below, would flatten the curves: it stands in the heading.
            if with_ours and (name, key) != ("untrained", "accuracy"):
                draw_curve(axis, measured(runs, name, key), color=colour, linestyle=line, label=f"{label}, ours")
            paper = {tau: ctl.paper_values(dataset, name, tau)[key] for tau in PAPER_TAUS if with_papers}
            paper = {tau: [value] for tau, value in paper.items() if value is not None}
            draw_curve(axis, paper, color=colour, linestyle="--", alpha=0.6, label=f"{label}, the paper's")
        axis.set_xticks(ticks, [f"{tau:g}" for tau in ticks])
        axis.minorticks_off()
        axis.tick_params(labelbottom=True)
    # The same span in points, so that a step looks as large in one panel as in the other.
    limits = [axis.get_ylim() for axis in axes[2:]]
    half = max(high - low for low, high in limits) / 2
    for axis, (low, high) in zip(axes[2:], limits):
        axis.set_ylim((low + high) / 2 - half, (low + high) / 2 + half)
    axes[3].set_visible(runs[0].in_paper)
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=10)
    counts = collections.Counter(run.row for run in runs if run.row[0] in COLOURS).values()
    spread = "mean ± standard deviation over " if max(counts, default=0) > 1 else ""
    figure.suptitle(f"{title}\n{spread}{in_words(counts)}")
    return True


def draw_profiles(figure, runs: list[Run], title: str) -> bool:
    """Fig. 8: the mean similarity of the positive and of the ten nearest negatives, at the four tau of Table 1."""
    found = measured(runs, "contrastive", "profile")
    profiles = {tau: [p for p in found.get(tau, []) if None not in p] for tau in TAUS}
    counts = [len(some) for some in profiles.values() if some]
    for tau, axis in zip(TAUS, figure.subplots(2, 2).flat):
        means = list(map(mean, zip(*profiles[tau]))) or [0] * 11
        axis.bar(["pos", *(f"n{place}" for place in range(1, 11))], means, color=["#d55e00"] + ["#0072b2"] * 10)
        axis.set(title=f"τ = {tau}{'' if profiles[tau] else ': no records yet'}", ylim=(0, 1), ylabel="mean similarity")
    figure.suptitle(f"{title}; {in_words(counts)}\npos: an image and a view of itself; n1 to n10: an "
                    "image and views of the ten others nearest to it")
    return bool(counts)


def draw_planes(figure, runs: list[Run], title: str) -> bool:
    """Fig. 2: t-SNE of embeddings of test images, at a small and a larger tau."""
    planes, dataset = read_planes(runs), runs[0].config["dataset"]
    cifar10 = "airplane automobile bird cat deer dog frog horse ship truck".split()
    names = dict(enumerate(cifar10 if dataset.split("-")[0] == "cifar10" else []))
    classes = sorted({label for plane in planes for label in plane["tsne"]["label"]})
    for at, plane in enumerate(planes):
        axis = figure.add_subplot(1, len(planes), at + 1)
        for place, label in enumerate(classes):  # five colours, then the next marker: told apart without the hue
            x, y = ([value for value, its in zip(plane["tsne"][key], plane["tsne"]["label"]) if its == label]
                    for key in "xy")
            axis.scatter(x, y, s=10, color=list(COLOURS.values())[place % 5], marker="ox^s+"[place // 5 % 5],
                         label=names.get(label, f"class {label}"))
        axis.set(title=f"τ = {plane['tau']}: kNN accuracy {plane['knn']} %", xticks=[], yticks=[])
    if 0 < len(classes) <= 20:
        figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=5, markerscale=2)
    figure.suptitle(f"{title}\nt-SNE of embeddings of test images, by class")
    return bool(planes)


def draw_penalty(figure, runs: list[Run], title: str) -> bool:
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

FIG_2 = [("contrastive", 0.07), ("contrastive", 0.2)]  # the rows whose embeddings the paper shows on a plane


def read_planes(runs: list[Run]) -> list[dict]:
    """The points of Fig. 2: what --tsne kept, else what old records hold. Nothing is computed."""
    path = Path(f"{runs[0].stem}-tsne.json")
    if path.exists():
        return parse(path, path.read_text(encoding="utf-8"))
    first = {run.row: run for run in reversed(runs) if run.row in FIG_2 and run.record.get("tsne")}
    return [{"tau": row[1], "knn": first[row].final["knn"], "tsne": first[row].record["tsne"]}
            for row in FIG_2 if row in first]


def compute_planes(source: str, runs: list[Run], checkpoints: Path) -> None:
    """t-SNE of the dataset's first 1,000 test images, by checkpoints of seed 0. The points are kept beside the records,
    for `read_planes`. Raises BadInput where there is no such checkpoint."""
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits
    planes = {}
    for run in runs:
        path = Path(checkpoints, *run.path.parts[-3:]).with_suffix(".pt")
        if run.row not in FIG_2 or run.config["seed"] != 0 or not path.exists():
            continue
        config, saved = ctl.Config(**run.config), ctl.load_checkpoint(path)
        data = ctl.load_dataset(source, HOME.parent / "data", config.size)
        if not saved or data.name != config.dataset:
            continue
        data = ctl.take_subset(data, config)
        ctl.refuse_other(path, saved, {**run.record, "data": data.sha256()})
        model, _ = ctl.make_model(config, torch.device("cpu"))
        model.load_state_dict(saved["model"])
        _, z = ctl.embed(model, data.test_images[:1000])
        # Another number of threads gives another picture; the start by PCA fails where all embeddings are equal.
        with threadpool_limits(1):
            places = TSNE(perplexity=min(30.0, len(z) / 4), init="random", random_state=0).fit_transform(z.numpy())
        x, y = places.T.astype(float).round(1).tolist()
        points = {"x": x, "y": y, "label": data.test_labels[:1000].tolist()}
        planes.setdefault(run.stem, []).append({"tau": config.tau, "knn": run.final["knn"], "tsne": points})
    if not planes:
        raise ctl.BadInput(f"{checkpoints} has no checkpoint of contrastive, tau 0.07 or 0.2, seed 0, with a record")
    for stem, found in planes.items():
        ctl.write_whole(Path(f"{stem}-tsne.json"), json.dumps(found).encode())


# ----------------------------------------------------------------------------------------------------------- READMEs

MARKER = re.compile(r"(<!-- report: (compare|costs|(?:table|rows|effects|ladder) \S+ \S+) -->\n)"
                    r".*?(<!-- /report -->)", re.DOTALL)
COSTS = {"step_ms": ("the step, ms", 1), "network_ms": ("network alone", 1), "step_over_network": ("step / network", 3),
         "images_per_second": ("images/s", 0), "peak_memory_mib": ("MiB", 0), "training_hours": ("training, h", 1)}


def costs(folder: Path) -> str:
    """What speed.py measured: a row for each of its files; links are from the folder."""
    lines, parts = [], {}
    for path in sorted((HOME / "profile").glob("*.json")):
        found = parse(path, path.read_text(encoding="utf-8"))
        parts = found["parts_ms"]
        lines.append([link(path.stem, path, folder), found["environment"]["threads"],
                      *(f"{value:.1f}" for value in parts.values()),
                      *(f"{found[key] or math.nan:.{digits}f}" for key, (_, digits) in COSTS.items())])
    return markdown(["", "threads", *parts, *(title for title, _ in COSTS.values())], lines)


def fill_in(path: Path, groups: Groups) -> bytes:
    """A README with its parts between markers made anew."""
    kinds = {"compare": compare, "costs": lambda _: costs(path.parent), "effects": effects, "ladder": ladder,
             "rows": lambda runs: table(runs, path.parent), "table": table}

    def part(found: re.Match) -> str:
        kind, *where = found[2].split()
        these = groups.get((*where, ctl.PROTOCOL_VERSION)) if where else groups
        return f"{found[1]}{kinds[kind](these) if these else 'No records yet.'}\n{found[3]}"
    text = path.read_text(encoding="utf-8")
    filled, count = MARKER.subn(part, text)
    if not text.count("<!-- report") == text.count("<!-- /report") == count:
        raise ctl.BadInput(f"{path} has a `<!-- report: … -->` that is misspelt, or has no `<!-- /report -->`: mend it")
    return filled.encode()


def make_files(groups: Groups) -> dict[Path, bytes]:
    """Each preset's files; tables and verdicts are printed too."""
    files: dict[Path, bytes] = {}
    for (preset, dataset, version), runs in groups.items():
        folder, title = runs[0].stem.parent, f"preset {preset}, dataset {dataset}, protocol version {version}"
        ours, verdicts = table(runs, folder), effects(runs)
        ctl.say(f"\n{title}\n\n{ours}\n\n{verdicts}")
        # A preset's datasets and versions stand one below the other.
        files.setdefault(folder / "TABLE.md", f"# Table 1, preset {preset}: ours beside the paper's\n".encode())
        files.setdefault(folder / "CLAIMS.md", f"# The paper's claims, preset {preset}\n\n{NEEDS}".encode())
        files[folder / "TABLE.md"] += f"\n## {title}\n\n{ours}\n\n{caption(runs)}\n".encode()
        files[folder / "CLAIMS.md"] += f"\n## {title}\n\n{verdicts}\n".encode()
        files |= draw(runs)
    return files


def main(argv: list[str] | None = None) -> None:
    parser = ctl.Parser("report.py", __doc__)
    parser.add_argument("--results", default=HOME, type=Path, help="folder of the records [where this file lies]")
    parser.add_argument("--preset", choices=list(ctl.PRESETS), help="report that preset alone [all that have records]")
    parser.add_argument("--readme", action="store_true", help="fill the generated parts of both READMEs too")
    parser.add_argument("--tsne", metavar="DATASET", help="compute Fig. 2 from the checkpoints of that dataset")
    parser.add_argument("--runs", default=HOME.parent / "runs", type=Path, help="folder of the checkpoints [runs/]")
    given = parser.parse_args(argv)
    results = given.results.expanduser().resolve()
    groups = read_groups(results)
    chosen = {key: runs for key, runs in groups.items() if given.preset in (None, key[0])}
    if not chosen:
        raise ctl.BadInput(f"no records of {given.preset or 'any preset'} in {results}: run some first")
    try:
        if given.tsne:
            current = [run for key, runs in chosen.items() for run in runs if key[2] == ctl.PROTOCOL_VERSION]
            compute_planes(given.tsne, current, given.runs.expanduser())
        files = make_files(chosen)
        for path in (results.parent / "README.md", results / "README.md") if given.readme else ():
            files[path] = fill_in(path, groups)
    except ImportError as error:
        raise ctl.BadInput(f"{error}: verdicts need scipy, figures matplotlib, --tsne scikit-learn")
    for path, content in files.items():
        if not path.exists() or path.read_bytes() != content:
            ctl.write_whole(path, content)


if __name__ == "__main__":
    os.environ.pop("MPLBACKEND", None)  # a notebook's, which the interpreter of .venv may not have
    sys.exit(ctl.one_line("report.py", main))
