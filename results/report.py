#!/usr/bin/env python3
"""From the records of runs: tables, verdicts on the paper's claims, figures. It trains nothing.

    python results/report.py               of the published records, which lie beside this file
    python results/report.py --readme      the same, and the generated parts of both READMEs
    python results/report.py --out runs    of a user's own records; their digits are held against the published ones

Each preset's folder gets TABLE.md, CLAIMS.md and the figures. All is made before the first file is written, so a record
that is refused changes nothing. In reading order: records, tables, verdicts, what a run says, figures, READMEs.
"""
import argparse
import io
import json
import math
import os
import re
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import filelock
import torch
from scipy.stats import page_trend_test, t as students_t

HOME = Path(__file__).resolve().parent
sys.path.insert(0, str(HOME.parent))
import ctl

# ----------------------------------------------------------------------------------------------------------- records
TAUS = (0.07, 0.3, 0.7, 1.0)
MATCHED = "contrastive, match_step True"
TABLE_1 = list(ctl.PAPER["cifar10"])  # (loss, tau) of its ten rows
# The rows that a table shows even without a record: all ten, but for presets that run a part of them.
SHOWN = {"quick": [row for row in TABLE_1 if row[1] != 0.07 and row[0] != "hard-simple"], "smoke": []}
UNTRAINED = "untrained", None
TITLE = "preset {}, dataset {}, protocol version {}"  # what differs in one of the three is never averaged


class Run(NamedTuple):
    """A record that is whole and stands where it belongs."""
    path: Path
    record: dict
    config: dict
    departs: dict[str, str]  # the settings that depart from the preset, by the file's name
    row: tuple  # of the table: (loss and what departs, tau)
    final: dict  # the metrics


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
    name = ctl.loss_name(config["loss"], config["tau"]) + "".join(f"_{field}-{departs[field]}" for field in departs)
    if path.parts[-3:] != (config["preset"], config["dataset"], f"{name}_seed{config['seed']}.json"):
        raise ctl.BadInput(f"{path} holds a record of another run, or is a copy: move it away")
    row = ", ".join([config["loss"], *map(" ".join, departs.items())]), config["tau"]
    return Run(path, record, config, departs, row, record["final"])


def check_alike(runs: list[Run]) -> None:
    """Raise BadInput, naming the key, where records of one table differ in more than their names say."""
    seen, fields = {}, {field for run in runs for field in run.config}
    for run in runs:
        images = "data_sha256 (size {size}, subset {subset}, test_subset {test_subset})".format_map(run.config)
        settings = {key: run.config.get(key, "missing") for key in fields - {"loss", "tau", "seed", *run.departs}}
        for key, value in {**settings, images: run.record["data_sha256"]}.items():
            key += f" of {run.config['loss']}" if key == "k" else ""
            usual, path = seen.setdefault(key, (value, run.path))
            if value != usual:
                raise ctl.BadInput(f"{run.path}: {key} is {value}, but {usual} in {path}: records of one table must "
                                   "agree in it; move one of them away")


def read_groups(out: Path) -> dict:
    """What TITLE names -> runs in the order of the table, then the untrained networks. Hidden files, which macOS and
    notebooks leave, are no records."""
    groups = {}
    for run in map(read_run, sorted(out.glob("[!.]*/[!.]*/[!.]*.json"))):
        groups.setdefault((run.config["preset"], run.config["dataset"], run.record["protocol_version"]), []).append(run)
    for runs in groups.values():
        check_alike(runs)
        runs.sort(key=lambda run: (place(run.row), run.config["seed"]))
        untrained = {run.config["seed"]: run._replace(row=UNTRAINED, final=run.final["untrained"])
                     for run in runs if not run.departs}  # the same for all runs of a seed
        runs += untrained.values()
    return groups


def place(row: tuple) -> tuple:
    """As in Table 1, then what departs from the preset, then the untrained networks."""
    loss, _, departs = row[0].partition(", ")
    return row == UNTRAINED, departs, [*dict(TABLE_1), loss].index(loss), loss, row[1] or 0


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


def rows_of(runs: list[Run]) -> set:
    return {run.row for run in runs} | {*SHOWN.get(runs[0].config["preset"], TABLE_1), UNTRAINED}


def table(runs: list[Run], rows, folder: Path | None = None) -> str:
    """Ours beside the paper's. With a folder: and links from there to the records."""
    dataset, head, lines = runs[0].config["dataset"], ["loss", "τ"], []
    beside = ctl.TABULATED if dataset.split("-")[0] in ctl.PAPER else ()
    for key, (title, _) in COLUMNS.items():
        head += [title, "paper"] if key in beside else [title]
    for name, tau in sorted(rows, key=place):
        line, paper = [name, tau or ""], ctl.paper_values(dataset, name, tau)
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
    return f"{run.record['images']['train']:,} training images, {run.config['epochs']} epochs"


def caption(runs: list[Run]) -> str:
    machines = sorted({"torch {torch}, {precision}, {device}".format_map(run.record["environment"]) for run in runs})
    return (f"{about(runs[0])}. Mean ± standard deviation over seeds (number). A row that names a setting departs "
            "in it from the preset. Accuracy is the linear probe's after its last epoch; the last row is the network "
            f"before training. Run with {'; '.join(machines)}.")


# ---------------------------------------------------------------------------------------------------------- verdicts
HOLDS, FAILS, NOT_RUN = "holds in the one seed", "fails in the one seed", "not run"
RULES = "In brackets: 95 % intervals of the distance from the bar. How a verdict is found: results/README.md.\n"


class Cells(dict):
    """One seed's runs, (name, tau) -> metrics, and the tau that count."""
    taus = TAUS

    def over_tau(self, key: str, loss: str = "contrastive") -> list:
        return [self[loss, tau][key] for tau in self.taus]

    def best(self, loss: str = "contrastive", taus: tuple = ()) -> float:
        return max(taus or self.taus, key=lambda tau: self[loss, tau]["accuracy_heldout"])

    def accuracy(self, loss: str = "contrastive") -> float:
        return self[loss, self.best() if loss == "contrastive" else None]["accuracy"]

    def lead(self, loss: str = "contrastive") -> float:
        """Of the middle tau, chosen by the held-out labels, over the better end."""
        middle = self[loss, self.best(loss, self.taus[1:-1])]["accuracy"]
        return middle - max(self[loss, tau]["accuracy"] for tau in (self.taus[0], self.taus[-1]))

    def range(self, loss: str = "contrastive") -> float:
        return max(self.over_tau("uniformity", loss)) - min(self.over_tau("uniformity", loss))

    def lacks(self, losses: list[str]) -> str:
        """The runs of these losses that are not there."""
        taus = {loss: self.taus if loss.split(",")[0] in ("contrastive", "hard") else [None] for loss in losses}
        absent = {loss: [str(tau or "") for tau in taus[loss] if (loss, tau) not in self] for loss in losses}
        return ", ".join(f"{loss} {' '.join(words)}".strip() for loss, words in absent.items() if words)


# A claim, the losses whose runs it needs, its measures: 1 where above the bar, or growing with tau, speaks for it, -1
# where below it, or falling; words; digits; a quantity and its bar, or a quantity at each tau, which is a trend.
CLAIMS = {
    "C1": ("ordinary loss: uniformity falls as τ grows", ["contrastive"],
           [(-1, "uniformity", 3, lambda c: c.over_tau("uniformity"))]),
    "C2": ("ordinary loss: tolerance grows with τ", ["contrastive"],
           [(+1, "tolerance", 3, lambda c: c.over_tau("tolerance"))]),
    "C3": ("ordinary loss: accuracy against τ is a reverse U", ["contrastive"],
           [(+1, "points by which the middle τ leads the better end:", 2, lambda c: (c.lead(), 0))]),
    "C4": ("the simple loss is much worse than the ordinary loss at its best τ", ["contrastive", "simple"],
           [(+1, "points lost:", 2, lambda c: (c.accuracy() - c.accuracy("simple"), 2))]),
    "C5": ("hard simple is competitive with the ordinary loss at its best τ", ["contrastive", "hard-simple"],
           [(+1, "points gained:", 2, lambda c: (c.accuracy("hard-simple") - c.accuracy(), -1))]),
    "C6": ("hard loss: more uniform than the ordinary loss at the same τ", ["contrastive", "hard"],
           [(+1, "uniformity gained, mean over τ:", 3,
             lambda c: (mean(c.over_tau("uniformity", "hard")) - mean(c.over_tau("uniformity")), 0))]),
    "C7": ("hard loss: uniformity almost flat in τ, best τ larger than the ordinary loss's", ["contrastive", "hard"],
           [(-1, "range of uniformity over τ:", 3, lambda c: (c.range("hard"), c.range() / 4)),
            (+1, "best τ:", 2, lambda c: (c.best("hard"), c.best()))]),
    "C8": ("as τ falls, the gap from the positive to the nearest negative widens; as τ grows, the positive's "
           "similarity grows", ["contrastive"],
           [(-1, "gap", 3, lambda c: [profile[0] - profile[1] for profile in c.over_tau("profile")]),
            (+1, "positive", 3, lambda c: [profile[0] for profile in c.over_tau("profile")])]),
    "C9": ("the τ→0 loss learns nothing useful", ["contrastive", "triplet"],
           [(-1, "points over the untrained network:", 2, lambda c: (
               c.accuracy("triplet") - c.accuracy("untrained"), (c.accuracy() - c.accuracy("untrained")) / 4))]),
    "M": ("ours, not the paper's: C3 holds also where the step does not grow as 1/τ (`--match-step`)", [MATCHED],
          [(+1, "points by which the middle τ leads the better end:", 2, lambda c: (c.lead(MATCHED), 0))]),
}


# What the records say of a claim.
Finding = NamedTuple("Finding", [("verdict", str), ("effect", str), ("of_each_seed", str), ("seeds", int)])


def judge_bar(found: dict[int, tuple], sign: int, words: str, digits: int) -> Finding:
    """found: seed -> the quantity and its bar. The 95 % interval of their distance (Student's t) decides."""
    values, bars = zip(*found.values())
    margins, count = [sign * (value - bar) for value, bar in found.values()], len(found)
    middle, margin, interval = mean(values), mean(margins), ""
    if count == 1:
        verdict = HOLDS if margin > 0 else FAILS
    else:
        half = students_t.ppf(0.975, count - 1) * stdev(margins) / math.sqrt(count)
        verdict = "confirmed" if margin > half else "refuted" if margin < -half else "undecided"
        interval = f" ({middle - half:.{digits}f} to {middle + half:.{digits}f})"
    effect = f"{words} {middle:.{digits}f}{interval}; the bar is {round(mean(bars), digits):g}"
    each = [f"{seed}: {value:.{digits}f}" + f" against {bar:.{digits}f}" * (len(set(bars)) > 1)
            for seed, (value, bar) in found.items()]
    return Finding(verdict, effect, ", ".join(each), count)


def judge_trend(found: dict[int, list], taus: tuple, sign: int, words: str, digits: int) -> Finding:
    """found: seed -> the quantity at each tau. Page's test decides, one-sided, 2.5 % each way. It rejects equality, not
    a step in the wrong place: where the smallest step is refuted, the verdict names it. In one seed all steps count."""
    rows = list(found.values())
    steps = [[sign * (row[i + 1] - row[i]) for row in rows] for i in range(len(taus) - 1)]
    least = min(steps, key=mean)
    at = "τ {} to {}".format(*taus[steps.index(least):][:2])
    words += f" {', '.join(f'{mean(column):.{digits}f}' for column in zip(*rows))}; smallest step, {at}:"
    finding = judge_bar({seed: (step, 0) for seed, step in zip(found, least)}, 1, words, digits)
    if len(rows) == 1:
        return finding
    claimed, reverse = (page_trend_test([row[::way] for row in rows]).pvalue for way in (sign, -sign))
    exception = f", except {at}" if finding.verdict == "refuted" else ""
    verdict = f"confirmed{exception}" if claimed <= 0.025 else "refuted" if reverse <= 0.025 else "undecided"
    return finding._replace(verdict=verdict, effect=f"{finding.effect}; p = {claimed:.2g}")


def cells_of(runs: list[Run]) -> dict[int, Cells]:
    """seed -> its runs, but for those with a metric that is null; over those tau of Table 1 that the table has."""
    taus, seeds = tuple(tau for tau in TAUS if ("contrastive", tau) in rows_of(runs)), {}
    for run in sorted(runs, key=lambda run: run.config["seed"]):
        cells = seeds.setdefault(run.config["seed"], Cells())
        cells.taus = taus if len(taus) > 2 else TAUS
        metrics = [run.final[key] for key in ("accuracy", "accuracy_heldout", "uniformity", "tolerance")]
        if None not in metrics + run.final["profile"]:
            cells[run.row] = run.final
    return seeds


def judge(runs: list[Run]) -> dict[str, Finding]:
    """Each claim, over the seeds that have all runs it needs; what the others lack is named. Of several measures one
    that is refuted refutes the claim; all must be confirmed."""
    judged, seeds = {}, cells_of(runs)
    for claim, (_, losses, measures) in CLAIMS.items():
        lacking = [f"seed {seed} lacks {words}" for seed, cells in seeds.items() if (words := cells.lacks(losses))]
        whole, parts = {seed: cells for seed, cells in seeds.items() if not cells.lacks(losses)}, []
        for *how, of in measures if whole else ():
            found = {seed: of(cells) for seed, cells in whole.items()}
            (cells, *_), (value, *_) = whole.values(), found.values()
            parts.append(judge_trend(found, cells.taus, *how) if isinstance(value, list) else judge_bar(found, *how))
        verdicts = list(dict.fromkeys(part.verdict for part in parts))
        confirmed = "confirmed" + "".join(verdict.removeprefix("confirmed") for verdict in verdicts)
        verdict = next((word for word in ("refuted", FAILS, "undecided", HOLDS) if word in verdicts), confirmed)
        effect, each = ("; ".join(getattr(part, field) for part in parts) for field in ("effect", "of_each_seed"))
        judged[claim] = (Finding(verdict, effect, "; ".join([each, *lacking]), len(whole)) if whole else
                         Finding(NOT_RUN, "; ".join(lacking), "", 0))
    return judged


def effects(runs: list[Run]) -> str:
    lines = [[name, CLAIMS[name][0], f"**{found.verdict}**", found.effect, found.of_each_seed]
             for name, found in judge(runs).items()]
    return markdown(["", "claim", "verdict", "measured (95 % interval)", "of each seed"], lines)


# ------------------------------------------------------------------------------------------------- what a report says
def promised(runs: list[Run]) -> str:
    """What `quick` is there to show: rows of numbers that grow (1) or fall (-1) in each step."""
    lines = []
    for seed, cells in cells_of(runs).items():
        lacks = cells.lacks(["contrastive", "hard"])
        lines.append(f"seed {seed}, τ = {', '.join(map(str, cells.taus))}" + f": lacks {lacks}" * bool(lacks))
        if lacks:
            continue
        uniform, tolerant = cells.over_tau("uniformity"), cells.over_tau("tolerance")
        hard = cells.over_tau("uniformity", "hard")
        for words, sign, rows in (
                ("uniformity falls as τ grows", -1, [uniform]), ("tolerance grows with τ", 1, [tolerant]),
                ("hard loss more uniform than ordinary, at each τ", 1, list(zip(uniform, hard)))):
            shows = all(sign * (b - a) > 0 for row in rows for a, b in zip(row, row[1:]))
            numbers = ", ".join(" → ".join(f"{value:.2f}" for value in row) for row in rows)
            lines.append(f"  {'shows' if shows else 'does not show':15}{words}: {numbers}")
    return "\n".join(lines)


def against_published(runs: list[Run], out: Path) -> str:
    """Are a user's records, digit for digit, the published ones? If not: what differs, and why it may."""
    places = [(run.record, HOME / run.path.relative_to(out)) for run in runs if run.row != UNTRAINED and out != HOME]
    pairs = [(ours, read_run(path).record) for ours, path in places if path.exists()]
    others = [(ours, theirs) for ours, theirs in pairs if ours["sha256"] != theirs["sha256"]]
    if not others:
        return f"check: all {len(pairs)} records equal the published ones" if pairs else ""
    most, numbers = {}, lambda value: value if isinstance(value, list) else [value]
    for key in sorted(others[0][0]["final"].keys() - {"untrained"}):
        most[key] = max(abs((a or 0.0) - (b or 0.0)) for ours, theirs in others  # null counts as 0
                        for a, b in zip(numbers(ours["final"][key]), numbers(theirs["final"][key])))
    metrics = ", ".join(f"{key} by {far:.2g}" for key, far in most.items() if far) or "no metric"
    machine = ("cpu", "device", "ONEDNN_MAX_CPU_ISA", "threads", "torch")  # where these agree, digits do
    here, there = ("; ".join(sorted({", ".join(f"{key} {pair[side]['environment'].get(key, '?')}" for key in machine)
                                     for pair in others})) for side in (0, 1))
    same = all(a[key] == b[key] for a, b in others for key in ("config", "data_sha256", "protocol_version"))
    reason = "another kind of CPU, or another torch, rounds otherwise, and training amplifies that"
    return (f"check: {len(others)} of {len(pairs)} records differ from the published ones; at most: {metrics}\n"
            f"  here:      {here}\n  published: {there}\n  {reason if same else 'their settings or images differ too'}")


# ----------------------------------------------------------------------------------------------------------- figures
COLOURS = {"contrastive": "#0072b2", "hard": "#d55e00", "simple": "#cc79a7"}  # told apart by all readers
STYLE = {"svg.hashsalt": "ctl", "font.size": 11, "axes.titlesize": 11, "figure.titlesize": 15,
         "axes.spines.top": False, "axes.spines.right": False}
METADATA = {"svg": {"Date": None, "Creator": None}, "png": {"Software": None}}  # the same file on any day


def draw(runs: list[Run]) -> dict[Path, bytes]:
    """The paper's Figs. 3 to 9 as SVG and PNG. Without pyplot a caller's own settings and figures stay as they are."""
    import matplotlib.style
    from matplotlib.figure import Figure
    files, folder = {}, runs[0].path.parents[1]
    stem = folder / f"{runs[0].config['dataset']}-v{runs[0].record['protocol_version']}"
    borne = {claim for claim, found in judge(runs).items() if found.verdict in ("confirmed", HOLDS)}
    with matplotlib.style.context(["default", STYLE]):
        for name, fill in ((f"{stem}-dilemma", draw_dilemma), (f"{stem}-profile", draw_profile),
                           (folder / "penalty", draw_penalty)):
            figure = Figure(figsize=(8.5, 4.3), layout="constrained")
            fill(figure, runs, borne)
            for kind, metadata in METADATA.items() if figure.axes else ():
                buffer = io.BytesIO()
                figure.savefig(buffer, format=kind, dpi=150, metadata=metadata)
                files[Path(f"{name}.{kind}")] = buffer.getvalue()
    return files


def draw_panels(figure, runs: list[Run], panels: dict, title: str, note: str) -> None:
    """panels: heading -> [(name, colour, ours, the paper's)], each tau -> values, or None -> those of a level. A point
    of one seed is hollow; a curve has its name where it ends; the protocol is a small line at the foot."""
    taus = sorted({tau for curves in panels.values() for *_, ours, _ in curves for tau in ours if tau})
    ticks = [tau for tau in taus if tau in (*TAUS, taus[0]) and (tau != 0.7 or taus[0] >= 0.07)]  # 0.7 is near 1
    for axis, (heading, curves) in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels.items()):
        for _, colour, ours, paper in curves:
            within = {tau: values for tau, values in paper.items() if taus[0] <= (tau or taus[0]) <= taus[-1]}
            for values, style in (within, {"linestyle": "--", "alpha": 0.6}), (ours, {}):
                if None in values:  # a level
                    axis.axhline(mean(values[None]), color=colour, **style)
                else:
                    axis.plot(list(values), list(map(mean, values.values())), color=colour, **style)
            for tau, some in ours.items() if None not in ours else ():
                spread, fill = (stdev(some), colour) if len(some) > 1 else (None, "white")
                axis.errorbar(tau, mean(some), spread, marker="o", color=colour, markerfacecolor=fill, capsize=3)
        axis.set(title=heading, xscale="log", xlim=(taus[0] / 1.12, taus[-1] * 1.12), xlabel="temperature τ")
        axis.set_xticks(ticks, [f"{tau:g}" for tau in ticks], fontsize=9)
        axis.minorticks_off()
        (low, high), place = axis.get_ylim(), -math.inf
        for value, name, colour in sorted((mean([*ours.values()][-1]), *label) for *label, ours, _ in curves if ours):
            place = max(value, place + (high - low) / 14)  # above the name below
            axis.text(1.02, place, name, color=colour, va="center", transform=axis.get_yaxis_transform())
    figure.suptitle(title)
    protocol = f"preset {runs[0].config['preset']}: {runs[0].config['dataset']}, {about(runs[0])}"
    figure.supxlabel(f"{note}\n{protocol}", fontsize=9.5)


def draw_dilemma(figure, runs: list[Run], borne: set) -> None:
    """Figs. 4 and 6, 5 and 7, 9: uniformity, tolerance and accuracy against tau."""
    dataset = runs[0].config["dataset"]
    taus = [tau for loss in ("contrastive", "hard") for tau in measured(runs, loss, "accuracy")]
    if not taus:
        return
    headings = {"uniformity": "\nuniformity", "tolerance": "tolerance (mean similarity\nwithin a class)",
                "accuracy": "\nlinear accuracy, %"}
    # Accuracies so far apart share a scale where each is held against its own simple loss.
    simple, zeros = measured(runs, "simple", "accuracy").get(None), {"uniformity": (0.0, 0.0), "tolerance": (0.0, 0.0)}
    paper_simple = ctl.paper_values(dataset, "simple", None)["accuracy"]
    if simple and paper_simple:
        zeros["accuracy"] = mean(simple), paper_simple
        headings["accuracy"] = ("linear accuracy, points above\nthe simple loss ({:.0f} %; paper {:.0f} %)"
                                .format(*zeros["accuracy"]))
    panels, paper_taus = {}, (None, *sorted({*TAUS, *ctl.PAPER_ACCURACY["cifar10"]}))
    for key, heading in headings.items():
        less, paper_less = zeros.get(key, (0.0, 0.0))
        for name, colour in COLOURS.items():
            ours = {tau: [value - less for value in some] for tau, some in measured(runs, name, key).items()}
            paper = {tau: ctl.paper_values(dataset, name, tau)[key] for tau in paper_taus if key in zeros}
            paper = {tau: [value - paper_less] for tau, value in paper.items() if value is not None}
            panels.setdefault(heading, []).append((name.replace("contrastive", "ordinary"), colour, ours, paper))
    first, *_, last = next(iter(cells_of(runs).values())).taus
    lead = "Larger τ" if first <= min(taus) and max(taus) <= last else f"From τ = {first:g} to {last:g}"
    words = ", ".join(words for claim, words in (("C1", "less uniform"), ("C2", "more tolerant")) if claim in borne)
    title = f"{lead}: {words}" if words else "Uniformity, tolerance and accuracy against τ"
    papers = "; dashed: the paper's" if paper_simple else ""
    draw_panels(figure, runs, panels, title, f"solid: ours (hollow points: one seed; bars: standard deviation){papers}")


def draw_profile(figure, runs: list[Run], borne: set) -> None:
    """Fig. 8 in short: the mean similarity of the positive, and of the nearest negative, at the tau of Table 1."""
    found = {tau: [cells["contrastive", tau]["profile"] for cells in cells_of(runs).values()
                   if ("contrastive", tau) in cells] for tau in TAUS}
    positive, nearest = ({tau: [profile[place] for profile in some] for tau, some in found.items() if some}
                         for place in (0, 1))
    if not positive:
        return
    curves = [("positive", "#d55e00", positive, {}), ("nearest negative", "#0072b2", nearest, {})]
    ahead = "C8" in borne and mean(positive[min(positive)]) > mean(nearest[min(nearest)])
    title = "Small τ sets the positive apart" if ahead else "The positive and the nearest negative"
    draw_panels(figure, runs, {"mean similarity to the anchor": curves}, title,
                "the paper: as τ falls the gap widens, as τ grows the positive tends to 1")


def draw_penalty(figure, runs: list[Run], borne: set) -> None:
    """Fig. 3: Eq. 5 for negatives drawn evenly from [-1, 1]."""
    axis = figure.subplots()
    s = torch.rand(1, 200, generator=ctl.generator("figure 3"), dtype=torch.float64).sort(dim=1).values * 2 - 1
    for tau, line, colour in zip(TAUS, ("-", "--", "-.", ":"), ("#0072b2", "#d55e00", "#009e73", "#cc79a7")):
        r = ctl.relative_penalty(s, torch.tensor([0]), tau)  # the first is the positive
        axis.plot(s[0, 1:].tolist(), r[0, 1:].tolist(), line, color=colour, label=f"τ = {tau}")
    axis.set(xlabel="similarity of the negative", ylabel="relative penalty r", yscale="log", ylim=(1e-6, 1),
             title="Eq. 5: how the push is shared among 199 negatives")
    axis.legend()


# ----------------------------------------------------------------------------------------------------------- READMEs
MARKER = re.compile(r"(<!-- report: (costs|findings|(?:rows|effects) \S+ \S+) -->\n)"
                    r".*?(<!-- /report -->)", re.DOTALL)
COSTS = {"step_ms": ("the step, ms", 1), "network_ms": ("network alone", 1), "step_over_network": ("step / network", 3),
         "images_per_second": ("images/s", 0), "peak_memory_mib": ("MiB", 0), "training_hours": ("training, h", 1)}
# A claim in plain words, the claims that it stands for, and what to say of their quantities.
FINDINGS = (
    ("As τ grows from 0.07 to 1, features become less uniform and more tolerant: the dilemma",
     {"C1": "uniformity", "C2": "tolerance"},
     "uniformity {C1[0]:.2f} → {C1[3]:.2f}, tolerance {C2[0]:.2f} → {C2[3]:.2f}"),
    ("Accuracy is best at a middle τ: the better of 0.3 and 0.7 leads the better of 0.07 and 1", {"C3": ""},
     "{C3[0]:+.1f} points"),
    ("Hard negatives matter: pushing all negatives alike (simple) costs much accuracy, pushing the nearest alike "
     "(hard-simple) does not", {"C4": "simple", "C5": "hard-simple"},
     "simple loses {C4[0]:.1f} points; hard-simple: {C5[0]:+.1f}"),
    ("With the nearest negatives only (hard), features are more uniform, hardly change with τ, and a larger τ is "
     "best", {"C6": "more uniform", "C7": "both flat and best at a larger τ"},
     "uniformity {C6[0]:+.2f} on average, range over τ {C7[0]:.2f}; mean best τ {C7[2]:.2g}, ordinary "
     "{C7[3]:.2g}"),
    ("The hardest negative alone (the limit τ → 0) teaches nothing useful", {"C9": ""},
     "{C9[0]:+.1f} points over the untrained network"),
)


def numbers(seeds: list[Cells], claims: dict, words: str) -> str:
    """The words, filled in with the means of all that decides the claims, over the seeds that have the runs."""
    whole = [cells for cells in seeds if not cells.lacks([loss for claim in claims for loss in CLAIMS[claim][1]])]
    means = {}
    for claim in claims:
        values = [[value for *_, of in CLAIMS[claim][2] for value in of(cells)] for cells in whole]
        means[claim] = list(map(mean, zip(*values)))
    return re.sub(r"-(?=\d)", "−", words.format(**means)) if whole else ""


def findings(groups: dict) -> str:
    """What the presets say of the paper's claims on CIFAR-10, in plain words: `paper` first, as far as it is run."""
    tables = {f"`{preset}`": runs for wanted in ("paper", "narrow", "mini")
              for (preset, dataset, version), runs in groups.items()
              if (preset, dataset.split("-")[0], version) == (wanted, "cifar10", ctl.PROTOCOL_VERSION)}
    paper = Cells({row: dict(zip(("accuracy_heldout", *ctl.TABULATED), (values[0], *values)))
                   for row, values in ctl.PAPER["cifar10"].items()})
    lines = []
    for words, claims, form in FINDINGS:
        ours, sure = [], []
        for label, runs in tables.items():
            found = {name: judge(runs)[claim] for claim, name in claims.items()}
            said = {name: of.verdict + f", {of.seeds} seeds" * (of.seeds > 1) for name, of in found.items()}
            one, *others = dict.fromkeys(said.values())
            sure.append(f"{label}: {'; '.join(map(': '.join, said.items())) if others else one}")
            ours.append(f"{label}: {numbers([*cells_of(runs).values()], claims, form) or NOT_RUN}")
        papers = numbers([paper], claims, form) or "no number"
        lines.append([words, papers, "<br>".join(ours), "<br>".join(sure)])
    parts = [table(runs, {run.row for run in runs} & set(TABLE_1)) for runs in [tables.get("`paper`")] if runs]
    return "\n\n".join([*parts, markdown(["the paper's claim", "the paper", "ours", "how sure"], lines)])


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


def fill_in(path: Path, groups: dict) -> bytes:
    """A README with its parts between markers made anew."""
    kinds = {"costs": lambda _: costs(path.parent), "effects": effects, "findings": findings,
             "rows": lambda runs: table(runs, rows_of(runs), path.parent)}

    def part(found: re.Match) -> str:
        kind, *where = found[2].split()
        these = groups.get((*where, ctl.PROTOCOL_VERSION)) if where else groups
        return f"{found[1]}{kinds[kind](these) if these else 'No records yet.'}\n{found[3]}"

    text = path.read_text(encoding="utf-8")
    filled, count = MARKER.subn(part, text)
    if not text.count("<!-- report") == text.count("<!-- /report") == count:
        raise ctl.BadInput(f"{path} has a `<!-- report: … -->` that is misspelt or has no `<!-- /report -->`")
    return filled.encode()


def make_files(groups: dict) -> dict[Path, bytes]:
    """Each preset's files; its datasets and versions stand one below the other."""
    files: dict[Path, bytes] = {}
    for key, runs in groups.items():
        preset, title, folder = key[0], f"\n## {TITLE.format(*key)}\n\n", runs[0].path.parents[1]
        files.setdefault(folder / "TABLE.md", f"# Table 1, preset {preset}: ours beside the paper's\n".encode())
        files.setdefault(folder / "CLAIMS.md", f"# The paper's claims, preset {preset}\n\n{RULES}".encode())
        ours = table(runs, rows_of(runs), folder)
        files[folder / "TABLE.md"] += f"{title}{ours}\n\n{caption(runs)}\n".encode()
        files[folder / "CLAIMS.md"] += f"{title}{effects(runs)}\n".encode()
        files |= draw(runs)
    return files


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("report.py", argparse.SUPPRESS, __doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=HOME, type=Path, help="folder of the records [where this file lies]")
    parser.add_argument("--preset", choices=list(ctl.PRESETS), help="report that preset alone [all that have records]")
    parser.add_argument("--readme", action="store_true", help="fill the generated parts of both READMEs too")
    given = parser.parse_args(argv)
    out = given.out.expanduser().resolve()
    if given.readme and out != HOME:
        raise ctl.BadInput(f"--readme is for the published records, {HOME}: leave --out away")
    if not out.is_dir():
        raise ctl.BadInput(f"there is no folder {out}: run something first")
    # Tasks that end together report one after the other, and the last sees all records.
    try:
        lock = ctl.hold_lock(out / ".report.lock")
    except filelock.Timeout as busy:
        lock = filelock.FileLock(busy.lock_file).acquire()
    with lock:
        groups = read_groups(out)
        chosen = {key: runs for key, runs in groups.items() if given.preset in (None, key[0])}
        if not chosen:
            raise ctl.BadInput(f"no records of {given.preset or 'any preset'} in {out}: run some first")
        files = make_files(chosen)
        for path in (out.parent / "README.md", out / "README.md") if given.readme else ():
            files[path] = fill_in(path, groups)
        words = []
        for (preset, dataset, version), runs in chosen.items():
            words += [TITLE.format(preset, dataset, version), table(runs, rows_of(runs)),
                      promised(runs) if preset == "quick" else effects(runs), against_published(runs, out)]
            picture = out / preset / f"{dataset}-v{version}-dilemma.png"
            words += [f"picture to open: {os.path.relpath(picture)}"] if picture in files else []
        for path, content in files.items():
            if not path.exists() or path.read_bytes() != content:
                ctl.write_whole(path, content)
    ctl.say("\n\n".join(filter(None, words)))


if __name__ == "__main__":
    os.environ.pop("MPLBACKEND", None)  # a notebook's, which the interpreter of .venv may not have
    sys.stdout.reconfigure(errors="replace")  # of a terminal without "τ"
    sys.exit(ctl.exit_status("report.py", main))
