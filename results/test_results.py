"""The tests of results/report.py: records in, tables, verdicts and figures out.

Records are made up here, for the numbers to be known: mostly the paper's own Table 1. The statistics are checked
against formulas and against counting. No figure is drawn but where the test is about figures.
"""
import contextlib
import copy
import dataclasses
import io
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image

import report
import ctl

HOME, DRAW = report.HOME, report.draw
TAUS, MATCHED = (0.07, 0.3, 0.7, 1.0), "contrastive, match_step True"
FIGURES = ["cifar10-v1-dilemma", "cifar10-v1-profile", "penalty"]


@pytest.fixture(autouse=True)
def house(tmp_path, monkeypatch):
    """A project of its own for each test, which draws no figures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "HOME", tmp_path / "results")
    monkeypatch.setattr(report, "draw", lambda *_: {})
    return tmp_path


def cli(*argv):
    """report.py's exit status, standard output and standard error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = ctl.one_line("report.py", report.main, ["--results", "results", *map(str, argv)])
    return status, out.getvalue(), err.getvalue()


def refused(*words, argv=()):
    """The report says in one line what is wrong, and writes nothing."""
    before = files()
    status, _, err = cli(*argv)
    assert status == 2 and err.count("\n") == 1 and all(word in err for word in words), err
    assert files() == before
    return True


def files(folder="."):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def text(name, preset="mini"):
    return Path("results", preset, name).read_text(encoding="utf-8")


def cells(seed=0):
    """(name, tau) -> final metrics: Table 1 of CIFAR-10, with what it lacks made up to fit the claims."""
    found = {}
    for place, ((loss, tau), (accuracy, uniform, tolerant)) in enumerate(ctl.PAPER["cifar10"].items()):
        wobble, nearest = 1e-3 * ((seed * 7 + place * 3) % 5), 0.3 - 0.1 / (tau or 9)
        found[loss, tau] = {"accuracy": accuracy + wobble, "accuracy_heldout": accuracy + wobble / 2, "knn": 50.0,
                            "uniformity": uniform + wobble, "tolerance": tolerant + wobble,
                            "profile": [0.8 + 0.1 * (tau or 1)] + [nearest] * 10,
                            "untrained": {"accuracy": 25.0, "knn": 20.0, "uniformity": 2.5, "tolerance": 0.3}}
    found["triplet", None] = {**found["simple", None], "accuracy": 26.0 + seed / 10}
    return found | {(MATCHED, tau): dict(found["contrastive", tau]) for tau in TAUS}


def put(name, tau=None, seed=0, final=None, preset="mini", dataset="cifar10", version=1, images="0",
        edit=lambda record: None, **departs):
    """A record as a run would leave it, but for the numbers. edit: changes it before its sum is taken."""
    loss, _, matched = name.partition(", ")
    departs |= {"match_step": True} if matched else {}
    config = ctl.make_config(preset, loss=loss, seed=seed, dataset=dataset, **departs, **({"tau": tau} if tau else {}))
    final = {**cells(seed)[loss, tau if (loss, tau) in cells() else 0.07], **(final or {})}
    record = ctl.plain({"config": config.study(), "protocol_version": version, "history": [], "timing": {},
                        "final": final, "data": {"sha256": images, "train": 5000, "test": 10},
                        "environment": {"torch": "2", "precision": "float32", "device": "cpu"}})
    edit(record)
    path = Path("results", f"{ctl.cell_path(config, dataset)}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**record, "sha256": ctl.record_sha256(record)}))
    return path


def rows(*seeds, name="mini"):
    """Rows without files, from (name, tau) -> final of each seed."""
    found = {}
    for seed, finals in enumerate(seeds):
        for (what, tau), final in finals.items():
            loss, _, departs = what.partition(", ")
            config = {"loss": loss, "tau": tau, "seed": seed, "preset": name, "dataset": "cifar10", "epochs": 60}
            run = report.Run(Path("x"), {"data": {"train": 5000}, "protocol_version": 1}, config,
                             dict(one.split(" ") for one in departs.split(", ") if one), final)
            found.setdefault((what, tau), []).append(run)
            if what == "triplet":
                found.setdefault(("untrained", None), []).append(run._replace(final=final["untrained"]))
    return found


def verdicts(*seeds):
    return {name: finding.verdict for name, finding in report.judge(rows(*seeds)).items()}


# ---------------------------------------------------------------------------------------------------------- verdicts


def test_claims_on_the_papers_own_numbers():
    seeds = [cells(seed) for seed in range(3)]
    for c in seeds:  # a run that departs from the preset decides nothing
        c["contrastive, lr 0.1", 0.3] = {**c["contrastive", 0.3], "uniformity": 0.0, "tolerance": 1.0, "accuracy": 10.0}
    assert verdicts(*seeds) == {name: "confirmed" for name in report.CLAIMS}
    assert list(report.CLAIMS) == [f"C{i}" for i in range(1, 10)] + ["M"]
    one = report.judge(rows(cells()))
    # One seed decides nothing, but its effect stands there.
    assert {found.verdict for found in one.values()} == {"undecided"}
    assert one["C4"].effect == f"{83.27 - 74.83 - 2 + 0.003 - 0.002:.3f}" and one["C4"].seeds == 1


def turned(seed, claim):
    """The paper's numbers with that claim turned round."""
    c = copy.deepcopy(cells(seed))
    o, h = ([c[loss, tau] for tau in TAUS] for loss in ("contrastive", "hard"))
    if claim in ("C1", "C2"):
        key = {"C1": "uniformity", "C2": "tolerance"}[claim]
        for cell, value in zip(o, [cell[key] for cell in o][::-1]):
            cell[key] = value
    if claim == "C6":
        for hard, ordinary in zip(h, o):
            hard["uniformity"] = ordinary["uniformity"] - 0.1 - seed / 100
    if claim == "C7":
        h[2]["uniformity"] -= 1
    if claim == "C8":  # of its two trends one is enough
        for cell, value in zip(o, [cell["profile"][0] for cell in o][::-1]):
            cell["profile"][0] = value
            cell["profile"][1] = value - 0.2 - cell["profile"][1]
    for name, cell, value in (("C3", o[3], 86.0), ("C4", c["simple", None], 82.0), ("C5", c["hard-simple", None], 81.0),
                              ("C9", c["triplet", None], 70.0), ("M", c[MATCHED, 1.0], 86.0)):
        if claim == name:
            cell["accuracy"] = value + seed / 10
    return c


@pytest.mark.parametrize("claim", report.CLAIMS)
def test_a_claim_turned_round_is_refuted(claim):
    found = verdicts(*(turned(seed, claim) for seed in range(3)))
    assert found[claim] == "refuted"
    # Neither of these looks at the other's runs.
    assert claim not in ("C3", "M") or found[{"C3": "M", "M": "C3"}[claim]] == "confirmed"
    assert verdicts(cells(0), turned(1, claim))[claim] == "undecided"


def test_the_best_tau_is_chosen_on_held_out_labels():
    seeds = [cells(seed) for seed in range(3)]
    for c in seeds:
        c["contrastive", 0.07]["accuracy_heldout"] = 99.0  # so the best tau is 0.07, though the test set has 0.3
        c["simple", None]["accuracy"] = 78.5  # 1.25 below 0.07, 4.8 below 0.3
        c["hard", 0.07]["accuracy_heldout"] = 99.5  # and the hard loss's best is no larger
    assert verdicts(*seeds)["C4"] == "refuted" and verdicts(*seeds)["C7"] != "confirmed"
    for c in seeds:  # inside the reverse U too: 0.7 by the held-out labels, though 0.3 is better on test images
        c["contrastive", 0.7] |= {"accuracy": 70.0, "accuracy_heldout": 98.0}
    assert verdicts(*seeds)["C3"] == "refuted"


def test_the_effect_of_each_claim_by_hand():
    c = cells()
    for tau, accuracy, uniform in zip(TAUS, (50, 53, 52, 49), (3.5, 3.1, 2.8, 2.7)):
        c["contrastive", tau] |= {"accuracy": accuracy, "accuracy_heldout": accuracy, "uniformity": uniform}
        c["hard", tau] |= {"uniformity": uniform + 0.1 if tau < 1 else 3.5, "accuracy_heldout": tau}
    for (name, tau), accuracy in {("simple", None): 48, ("hard-simple", None): 52.5, ("triplet", None): 30}.items():
        c[name, tau] |= {"accuracy": accuracy}
    found = report.judge(rows(c))
    assert found["C1"].effect == "τ 0.7 → 1.0: 0.100" and found["C1"].of_each_seed == "0: 0.100"
    wanted = {"C3": 53 - 50, "C4": 53 - 48 - 2, "C5": 52.5 - 53 + 1, "C6": (0.1 + 0.1 + 0.1 + 0.8) / 4,
              "C7": 0.8 / 4 - (3.6 - 2.9), "C9": (53 - 25) / 4 - (30 - 25)}
    assert {name: found[name].effect for name in wanted} == {name: f"{effect:.3f}" for name, effect in wanted.items()}


def test_missing_runs_and_null_metrics_leave_a_claim_undecided():
    spoilt = (("simple", None), ("contrastive", 1.0), (MATCHED, 0.3))
    null = dict.fromkeys(("accuracy", "uniformity", "tolerance", "accuracy_heldout"), None)
    for spoil in (lambda c, key: c.pop(key), lambda c, key: c[key].update(null, profile=[None] * 11)):
        seeds = [cells(seed) for seed in range(3)]
        for c, key in itertools.product(seeds[1:], spoilt):
            spoil(c, key)
        assert "confirmed" not in verdicts(*seeds).values()
    assert set(verdicts({("contrastive", 0.3): cells()["contrastive", 0.3]}).values()) == {"undecided"}


@pytest.mark.parametrize("values", [[1.0, 2.0], [0.1, 0.5, -0.3], [3, 4, 5, 9.5], [-1.0, -1.1, -1.05]])
def test_the_interval_is_students_t(values):
    words, low, high = report.interval(values)
    middle = np.mean(values)
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    assert (low, high) == pytest.approx((middle - half, middle + half))
    assert words == f"{middle:.3f} ({middle - half:.3f} to {middle + half:.3f})"
    wanted = "confirmed" if middle - half > 0 else "refuted" if middle + half < 0 else "undecided"
    assert report.judge_effect(dict(enumerate(values))).verdict == wanted


def test_equal_values_have_an_interval_too():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert report.interval([2.0, 2.0, 2.0], 1) == ("2.0 (2.0 to 2.0)", 2.0, 2.0)
        assert report.interval([0.1 + 0.2, 0.3, 0.3])[1:] == pytest.approx((0.3, 0.3))
        assert report.interval([2.0]) == ("2.000", -math.inf, math.inf)
        assert report.judge_trend({0: [1.0] * 4, 1: [1.0] * 4}).verdict == "undecided"


@pytest.mark.parametrize("values", ["1234 1243", "1234 2134", "1234 4213", "4312 4321", "1234 3124", "1324 2134"])
def test_pages_test_by_counting_all_orders(values):
    """p is the share of the 24² orders of two seeds that are in line with the trend at least as well."""
    values = [list(map(int, row)) for row in values.split()]
    fit = lambda seeds: sum((i + 1) * rank for row in seeds for i, rank in enumerate(row))
    every = [fit(pair) for pair in itertools.product(itertools.permutations((1, 2, 3, 4)), repeat=2)]
    up = np.mean([one >= fit(values) for one in every])
    down = np.mean([one >= fit([row[::-1] for row in values]) for one in every])
    found = report.judge_trend(dict(enumerate([[10.0 * v for v in row] for row in values])))
    assert found.effect.endswith(f"; p = {up:.2g}") and found.seeds == 2
    assert found.verdict.split(",")[0] == ("confirmed" if up <= 0.025 else "refuted" if down <= 0.025 else "undecided")


def test_a_step_against_a_confirmed_trend_is_named():
    steady = {seed: [0.0, 1.0, 2.0, 3.0 + seed / 10] for seed in range(3)}
    assert report.judge_trend(steady).verdict == "confirmed"
    falls = {seed: [0.0, 1.0, 3.0, 2.9 - seed / 100] for seed in range(3)}
    found = report.judge_trend(falls)
    assert found.verdict == "confirmed, except τ 0.7 → 1.0" and found.of_each_seed == "0: -0.100, 1: -0.110, 2: -0.120"
    assert found.effect.startswith("τ 0.7 → 1.0: -0.110 (-0.135 to -0.085); p = ")  # 4.303 · 0.01 / sqrt 3
    unsure = {seed: [0.0, 1.0, 3.0, 2.9 + 0.2 * (seed == 1)] for seed in range(3)}
    assert report.judge_trend(unsure).verdict == "confirmed"  # its interval reaches above 0
    other = {seed: [0.1 + seed / 100, 0.0, 2.0, 3.0] for seed in range(3)}
    both = report.join({"a": found, "b": report.judge_trend(other)})
    assert both.verdict == "confirmed, except τ 0.7 → 1.0, except τ 0.07 → 0.3" and both.effect.startswith("a τ 0.7")
    for verdict in ("undecided", "refuted"):
        three = {"a": found, "b": report.Finding(verdict), "c": report.Finding("undecided")}
        assert report.join(three).verdict == verdict


def test_the_rules_say_what_they_are():
    words = " ".join(report.NEEDS.split())
    for phrase in ("tested without correction for their number", "before the first records of `narrow` and `paper`",
                   "after those of `mini` had been seen", "tends to 1 is shown (figure 8), not tested", "2.5 % each"):
        assert phrase in words
    put("simple")
    assert cli()[0] == 0 and report.NEEDS in text("CLAIMS.md")


# ------------------------------------------------------------------------------------------------------------ tables


def test_report():
    for seed in range(3):
        for (name, tau), final in cells(seed).items():
            if (name, tau) != ("hard", 1.0) and name != MATCHED:
                put(name, tau, seed, {"accuracy": 80.0 + seed})
    put(MATCHED, 0.3, 9, {"accuracy": 12.34})
    put("contrastive", 0.2, 0, {"accuracy": 56.78})
    status, out, err = cli()
    assert status == 0 and err == ""
    lines = [line for line in text("TABLE.md").splitlines() if line.startswith("| ")]
    row = next(line for line in lines if line.startswith("| contrastive | 0.3 |"))
    assert row in out
    assert all(f"| {cell} |" in row for cell in ("81.00 ± 1.00 (3) | 83.27 | 50.00 ± 0.00 (3)", "3.6", "0.178"))
    links = re.findall(r"\]\((\S+)\)", text("TABLE.md"))
    assert len(links) == 10 * 3 + 2 and all(Path("results/mini", target).is_file() for target in links)
    assert "| hard | 1.0 | – | 84.19 | – | – | 3.86 | – | 0.03 | missing |" in lines
    assert any(line.startswith("| contrastive, match_step True | 0.3 | 12.34 (1) | – |") for line in lines)
    between = next(line for line in lines if line.startswith("| contrastive | 0.2 | 56.78 (1) | 83.78 |"))
    assert between.count("| – |") == 2
    # Of each seed once, and of no departing run.
    assert lines[-1] == ("| untrained |  | 25.00 ± 0.00 (3) | – | 20.00 ± 0.00 (3) | 2.500 ± 0.000 (3) | – "
                         "| 0.300 ± 0.000 (3) | – |  |")
    order = [line.split(" | ")[0][2:] for line in lines[2:]]
    assert list(dict.fromkeys(order)) == [*dict(ctl.CELLS), "triplet", MATCHED, "untrained"]
    assert "5,000 training images, 60 epochs, batch 64, ResNet-18 of width 16" in text("TABLE.md")
    assert "with torch 2, float32, cpu." in text("TABLE.md")
    claims = text("CLAIMS.md")
    assert "| **refuted** | -2.000 (-2.000 to -2.000) | 0: -2.000, 1: -2.000, 2: -2.000 |" in claims
    before = {path: path.stat().st_mtime_ns for path in files()}
    assert cli()[0] == 0 and {path: path.stat().st_mtime_ns for path in files()} == before  # what is the same stays


def test_what_differs_in_preset_dataset_or_version_is_never_averaged():
    put("simple", final={"accuracy": 10.0})
    put("simple", seed=1, final={"accuracy": 90.0}, version=2)
    put("simple", seed=2, final={"accuracy": 40.0}, dataset="cifar100")
    put("simple", seed=3, final={"accuracy": 70.0}, preset="narrow")
    assert cli()[0] == 0
    for name, values in (("mini", ("10.00", "90.00", "40.00")), ("narrow", ("70.00",))):
        assert text("TABLE.md", name).count("## preset") == len(values)
        assert all(f"| simple |  | {value} (1) |" in text("TABLE.md", name) for value in values)
    shutil.rmtree("results/mini/cifar100")
    before = text("TABLE.md")
    assert cli("--preset", "narrow")[0] == 0 and text("TABLE.md") == before


def test_settings_in_a_name_are_told_apart():
    put("contrastive", 0.3, probe_lr=3.0, lr=0.5)
    put("contrastive", 0.3, lr=0.5)
    put("contrastive", 0.3, milestones=(3, 5), schedule="step")
    found = [name for name, _ in next(iter(report.read_groups(Path("results")).values()))]
    assert found[10:-1] == [f"contrastive, {departs}" for departs in ("lr 0.5", "lr 0.5, probe_lr 3.0",
                                                                    "schedule step, milestones 3-5")]


# ------------------------------------------------------------------------------------------ records that are refused


@pytest.mark.parametrize("version", [1, 2])
def test_edited_misplaced_and_unreadable_records(version):
    path = put("hard", 0.3, version=version)
    for other in ("backup/hard_tau0.3_seed0", "../quick/cifar10/hard_tau0.3_seed0", "cifar10/hard_tau0.3_seed1",
                  "cifar10/hard_tau0.3_seed0 (copy)", "cifar10/hard_tau0.3_lr-0.5_seed0", "cifar10/hard_tau0.7_seed0",
                  "cifar10/hard-simple_seed0", "cifar10/hard_tau0.3_match_step-True_seed0",
                  "cifar10/hard_tau0.3_x-3_seed0"):
        other = Path(os.path.normpath(f"results/mini/{other}.json"))
        other.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, other)
        assert refused(str(other), "another run, or is a copy")
        other.unlink()
    Path("results/mini/cifar10/simple_seed7.json").mkdir()
    assert refused("cannot read", "simple_seed7.json")
    Path("results/mini/cifar10/simple_seed7.json").rmdir()
    path.write_text(path.read_text().replace('"knn": 50.0', '"knn": 60.0'))
    assert refused("sha256", str(path))
    assert refused("no records of any preset", argv=["--results", "elsewhere"])


WRONG = ["gone", [], "x", -1, {}, math.nan, 1e308, 10 ** 400, [0.5] * 3, ["x"] * 11]
PLACES = """config final data environment protocol_version config.loss config.tau config.preset config.seed config.width
config.milestones config.dataset final.accuracy final.uniformity final.profile final.untrained final.accuracy_heldout
final.untrained.knn data.sha256 data.train environment.torch environment.precision config.lr""".split()


@pytest.mark.parametrize("place", PLACES)
def test_nonsense_is_refused_in_one_line_that_names_file_and_key(place):
    """With a sum that fits, as another program could leave it. What makes sense nonetheless is reported."""
    *way, last = place.split(".")

    def change(record):
        for key in way:
            record = record[key]
        record.pop(last) if value == "gone" else record.update({last: value})
    count = 0
    for value in WRONG:
        path = put("contrastive", 0.07, edit=change)
        status, _, err = cli()
        count += status == 2
        assert status in (0, 2) and err.count("\n") == (status == 2), (place, value, err)
        if status == 2:
            assert str(path) in err
            # A record without these is broken for ctl.py; a value that belongs to another file name says so.
            assert last in err or "sha256 does not fit" in err or "another run" in err, (value, err)
    assert count >= 5, place


def test_records_of_one_table_agree_in_all_settings():
    put("simple", version=2)
    path = put("simple", seed=1, version=2, edit=lambda record: record["config"].update(momentum=0.5))
    assert refused(str(path), "momentum is 0.5, but 0.9")
    path.unlink()
    put("hard", 0.3, version=2)  # loss, tau and k differ from row to row
    put("simple", seed=1, version=2, lr=0.5)  # and what the name says
    assert cli()[0] == 0
    put("simple", seed=2, version=2, lr=0.5, edit=lambda record: record["config"].update(probe_lr=9.0))
    assert refused("probe_lr is 9.0, but 0.3")


def test_runs_on_other_images_are_refused():
    put("simple", dataset="shapes")  # another kind of CPU rounds a pixel of these differently
    put("simple", seed=1, images="1", dataset="shapes")
    put("simple")
    put("simple", images="1", subset=100)  # other images because it says so
    assert cli()[0] == 0
    assert "| loss | τ | accuracy, % | kNN, % | uniformity | tolerance | records |\n" in text("TABLE.md")
    path = put("simple", seed=1, images="2", subset=100)
    assert refused("subset-100", "sha256 of the images")
    path.unlink()
    assert refused(str(put("hard-simple", images="1")), "sha256 of the images")


def test_an_old_record_has_a_share_in_the_place_of_k_and_another_version_may_have_another_loss():
    put("hard", 0.3, edit=lambda record: record["config"].update(alpha=0.0819, k=None))
    put("simple", edit=lambda record: record["config"].update(alpha=None))
    path = put("simple", version=2, edit=lambda record: record["config"].update(loss="focal"))
    shutil.move(path, path.with_name("focal_seed0.json"))
    put("simple")
    assert cli()[0] == 0 and "| hard | 0.3 | 83.63 (1) |" in text("TABLE.md")
    assert "| focal |  | 74.83 (1) | – |" in text("TABLE.md")
    path = put("simple", edit=lambda record: record["config"].update(loss="focal"))
    shutil.move(path, path.with_name("focal_seed0.json"))
    assert refused("focal_seed0.json", "loss")


def test_bad_command_lines():
    put("simple")
    for line in ("--preset tiny", "--colour", "--res x", "x"):
        assert refused(line.split()[0], argv=line.split())
    assert cli("--help")[0] == 0


# ----------------------------------------------------------------------------------------------------------- READMEs

KINDS = ["table mini cifar10", "rows mini cifar10", "effects mini cifar10", "compare",
         "ladder mini cifar10", "costs", "table narrow cifar10", "ladder paper svhn"]
MARKED = "a\n" + "".join(f"<!-- report: {kind} -->\nstale\n<!-- /report -->\nb\n" for kind in KINDS)


def filled(kind):
    """The lines that the report put behind the marker, in README.md."""
    part = re.search(rf"<!-- report: {kind} -->\n(.*?)\n<!-- /report -->", Path("README.md").read_text(), re.DOTALL)
    return part[1].splitlines()


def test_the_readmes_are_filled():
    for seed in (0, 1):
        for (name, tau), final in cells(seed).items():
            put(name, tau, seed)
    put("contrastive", 0.3, 0, {"accuracy": 1.0}, lr=0.5)
    for path in ("README.md", "results/README.md"):
        Path(path).write_text(MARKED)
    assert cli()[0] == 0 and Path("README.md").read_text() == MARKED == Path("results/README.md").read_text()
    assert cli("--readme", "--preset", "mini")[0] == 0
    for path in ("README.md", "results/README.md"):
        made = Path(path).read_text()
        assert "stale" not in made and made.startswith("a\n") and made.count("\nb\n") == len(KINDS)
        links = re.findall(r"\]\((\S+)\)", made)
        assert len(links) == 2 * 15 + 1 and all(Path(path).parent.joinpath(link).is_file() for link in links)
    table, whole = filled("table mini cifar10"), filled("rows mini cifar10")
    assert len(table) == 2 + 10 + 1 and "](" not in "".join(table) and table[-1].startswith("| untrained |")
    assert "| contrastive | 0.3 | 83.27 ± 0.00 (2) | 83.27 |" in table[3] and "triplet" not in "".join(table)
    assert len(whole) == 2 + 10 + 1 + 5 + 1 and any("contrastive, lr 0.5" in line for line in whole)
    claims = filled("effects mini cifar10")
    assert len(claims) == 2 + 10 and "0: " in claims[4] and "held-out labels" in claims[4]
    assert filled("table narrow cifar10") == filled("ladder paper svhn") == ["No records yet."]
    before = files()
    assert cli("--readme")[0] == 0 and files() == before


@pytest.mark.parametrize("preset,missing", [("mini", 9), ("narrow", 9), ("paper", 9), ("quick", 0), ("smoke", 0)])
def test_a_preset_that_shows_a_few_rows_misses_none(preset, missing):
    put("simple", preset=preset)
    assert cli()[0] == 0
    assert text("TABLE.md", preset).count("missing") == missing and "| simple |" in text("TABLE.md", preset)


def test_compare_puts_the_presets_side_by_side():
    mini, narrow, shapes = rows(cells(0), cells(1)), rows(cells(0)), rows(cells(0))
    groups = {("mini", "cifar10", 1): mini, ("mini", "cifar10", 0): narrow, ("mini", "shapes", 1): shapes}
    lines = [line.split(" | ") for line in report.compare(groups).splitlines()]
    assert lines[0][2:] == ["mini, cifar10 |"] and len(lines) == 2 + 9
    assert lines[5][2].startswith("**confirmed**: 6.43") and lines[5][2].endswith("; 2 seeds |")
    groups["narrow", "cifar10-jpeg", 1] = narrow
    groups["paper", "cifar10", 1] = rows({("simple", None): cells()["simple", None]})
    lines = [line.split(" | ") for line in report.compare(groups).splitlines()]
    assert lines[0][2:] == ["mini, cifar10", "narrow, cifar10-jpeg", "paper, cifar10 |"]
    assert lines[5][3].startswith("**undecided**: 6.4") and lines[5][3].endswith("; one seed")
    assert lines[5][4] == "runs are missing |"


def test_the_ladder_of_epochs_and_widths():
    for seed, (small, large) in enumerate(((40.0, 41.0), (42.0, 44.0))):
        put("contrastive", 0.07, seed, {"accuracy": small, "knn": 30.0})
        put("contrastive", 0.3, seed, {"accuracy": large, "knn": 29.5})
    for departs, gain in (({"epochs": 120}, 3.0), ({"width": 32}, -2.0), ({"lr": 0.5}, 9.0)):
        put("contrastive", 0.07, 0, {"accuracy": 50.0, "knn": None}, **departs)
        put("contrastive", 0.3, 0, {"accuracy": 50.0 + gain}, **departs)
    put("contrastive", 0.3, 1, epochs=90)  # without its pair
    lines = report.ladder(report.read_groups(Path("results"))["mini", "cifar10", 1]).splitlines()
    assert lines[2:] == ["| 60 | 16 | 2 | 1.50 (-4.85 to 7.85) | -0.50 (-0.50 to -0.50) |",  # 12.706 · 0.7071 / sqrt 2
                         "| 60 | 32 | 1 | -2.00 | – |", "| 120 | 16 | 1 | 3.00 | – |"]


def test_costs():
    parts = {part: 1.25 * i for i, part in enumerate(report.PARTS)}
    figures = {"parts_ms": parts, "step_ms": 92.3, "network_ms": 83.3, "step_over_network": 1.1077, "more": "x",
               "images_per_second": 693.4, "training_hours": 0.12, "peak_memory_mib": None,
               "environment": {"threads": 2}}
    path = Path("results/profile/tiny.json")
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(figures))
    lines, row = report.costs(report.HOME.parent).splitlines(), "0.0 1.2 2.5 3.8 5.0 6.2 92.3 83.3 1.108 693 – 0.1"
    assert lines[2:] == [f"| [tiny](results/profile/tiny.json) | 2 | {' | '.join(row.split())} |"]
    assert len({line.count("|") for line in lines}) == 1
    put("simple")
    Path("README.md").write_text("<!-- report: costs -->\n<!-- /report -->\n")
    wrong = [json.dumps(figures | one) for one in ({"parts_ms": 3}, {"step_ms": "x"})]
    for broken in ("", "[" * 10_000, "3", *wrong):
        path.write_text(broken)
        assert refused("tiny.json", argv=["--readme"])


@pytest.mark.parametrize("old,new", [
    ("<!-- /report -->\nb", "b"), ("<!-- /report -->\nb", "<!-- / report -->\nb"), ("report: compare", "report: comp"),
    ("report: table mini cifar10", "report: table mini"), ("report: table mini", "report: table tiny"),
    ("<!-- report: costs", "<!--report: costs"), ("report: rows mini cifar10", "report: mini cifar10 rows"),
    ("<!-- report: costs -->\n", "<!-- report: costs --> ")])
def test_a_broken_marker_costs_no_text(old, new):
    put("simple")
    Path("README.md").write_text("fine\n")
    Path("results/README.md").write_text(MARKED.replace(old, new, 1))
    assert refused("results/README.md", argv=["--readme"])


def test_readmes_are_filled_from_the_projects_own_records_alone(monkeypatch):
    put("simple")
    Path("README.md").write_text("<!-- report: table mini cifar10 -->\n<!-- /report -->\n")
    shutil.copytree("results", "others")
    assert refused("--readme", argv=["--results", "others", "--readme"])
    monkeypatch.setenv("HOME", str(Path().resolve()))
    assert cli("--results", "~/results", "--readme")[0] == 0 and "74.83" in Path("README.md").read_text()


def test_the_committed_files_are_what_the_records_give(monkeypatch):
    """Generated parts that are stale fail here: python results/report.py --readme."""
    monkeypatch.setattr(report, "HOME", HOME)
    groups = report.read_groups(HOME)
    assert len(report.runs_of(groups["mini", "cifar10-jpeg", 1])) == 79 + 3  # of three seeds the untrained network
    with contextlib.redirect_stdout(io.StringIO()):
        made = report.make_files(HOME, groups)
    readmes = HOME.parent / "README.md", HOME / "README.md"
    made |= {path: report.fill_in(path, groups) for path in readmes if path.exists()}
    assert len(made) >= 6 and [path for path, content in made.items() if path.read_bytes() != content] == []


# ----------------------------------------------------------------------------------------------------------- figures


@pytest.fixture
def drawn(monkeypatch):
    """What is drawn: a method's name -> (axes, arguments, options) of each call; and the figures that are saved."""
    import matplotlib.axes
    import matplotlib.figure
    seen = {"figures": []}
    for name in ("errorbar", "bar", "plot", "scatter", "axhline"):
        def keep(self, *args, name=name, do=getattr(matplotlib.axes.Axes, name), **options):
            seen.setdefault(name, []).append((self, args, options))
            return do(self, *args, **options)
        monkeypatch.setattr(matplotlib.axes.Axes, name, keep)
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda self, buffer, format, **options:
                        seen["figures"].append(self) if format == "png" else None)
    monkeypatch.setattr(report, "draw", DRAW)
    return seen


def test_the_dilemma_shows_the_records(drawn):
    for loss, tau, seed in itertools.product(("contrastive", "hard"), TAUS, (0, 1)):
        put(loss, tau, seed, {"uniformity": tau + seed, "tolerance": 2 * tau + seed, "accuracy": 3 * tau + seed})
    put(MATCHED, 0.3, 0, {"uniformity": 9.0})
    put("contrastive", 0.02, 0, {"uniformity": None})
    put("simple", final={"uniformity": 1.5, "tolerance": 0.6, "accuracy": 2.0})
    assert cli()[0] == 0
    figure = drawn["figures"][0]
    axes = figure.axes
    assert [axis.get_title() for axis in axes] == [
        "uniformity (larger = more uniform)", "tolerance", "linear accuracy, %, ours (untrained: 25.0)",
        "linear accuracy, %, the paper's"]
    assert figure.get_suptitle() == ("preset mini: cifar10, 5,000 training images, 60 epochs\n"
                                     "mean ± standard deviation over 1 to 2 seeds")
    curve = {(axes.index(axis), options["label"]): (args, options) for axis, args, options in drawn["errorbar"]}
    for panel, (key, factor) in enumerate((("uniformity", 1), ("tolerance", 2), ("accuracy", 3))):
        taus, means, spread = curve[panel, "hard, ours"][0]
        assert taus == list(TAUS) and means == pytest.approx([factor * tau + 0.5 for tau in TAUS])
        assert spread == pytest.approx([0.5 ** 0.5] * 4) and curve[panel, "hard, ours"][1]["linestyle"] == "-"
        place = panel if key != "accuracy" else 3
        (taus, means, _), options = curve[place, "hard, the paper's"]
        assert means == [ctl.paper_values("cifar10", "hard", tau)[key] for tau in TAUS] and options["linestyle"] == "--"
    assert curve[0, "contrastive, ours"][0][0] == list(TAUS) and curve[1, "contrastive, ours"][0][0] == [0.02, *TAUS]
    assert curve[0, "contrastive, loss times τ, ours"][0][1] == [9.0]
    # Of these the authors published more than Table 1.
    assert curve[3, "contrastive, the paper's"][0][1] == [76.1, 79.75, 81.82, 83.78, 83.27, 83.22, 82.54, 82.97, 82.69,
                                                          82.67, 81.97, 82.21]
    level = {(axes.index(axis), options["label"]): args[0] for axis, args, options in drawn["axhline"]}
    assert level == {(0, "simple, ours"): 1.5, (1, "simple, ours"): 0.6, (2, "simple, ours"): 2.0,
                     (0, "untrained, ours"): 2.5, (1, "untrained, ours"): 0.3, (0, "simple, the paper's"): 1.68,
                     (1, "simple, the paper's"): 0.61, (3, "simple, the paper's"): 74.83}
    for axis in axes:
        assert axis.get_xscale() == "log" and list(axis.get_xticks()) == [0.02, *TAUS] and axis.get_visible()
    spans = [np.ptp(axis.get_ylim()) for axis in axes[2:]]
    assert spans[0] == pytest.approx(spans[1]) and axes[2].get_ylim()[0] < 0.2 and axes[2].get_ylim()[1] > 4
    labels = [one.get_text() for one in figure.legends[0].get_texts()]
    assert len(labels) == len(set(labels)) == 8 and {"untrained, ours", "simple, the paper's"} <= set(labels)


def test_one_seed_has_no_spread_and_other_images_no_paper(drawn):
    put("contrastive", 0.3, dataset="shapes")
    assert cli()[0] == 0
    figure = drawn["figures"][0]
    assert figure.get_suptitle().endswith("60 epochs\none seed") and not figure.axes[3].get_visible()
    assert all(options["label"].endswith("ours") for _, _, options in drawn["errorbar"])
    put("simple", dataset="svhn")  # without an ordinary loss there is no Fig. 8
    assert cli()[0] == 0 and not Path("results/mini/svhn-v1-profile.svg").exists()


def test_figures_8_and_3(drawn):
    for tau, seed in itertools.product((0.07, 0.2, 0.3, 0.7), (0, 1)):
        put("contrastive", tau, seed, {"profile": [tau / 2 + seed / 5] + [n / 100 for n in range(10)]})
    put("contrastive", 0.3, 2, {"profile": [None] * 11})
    assert cli()[0] == 0
    _, profile, penalty = drawn["figures"]
    assert [axis.get_title() for axis in profile.axes] == ["τ = 0.07", "τ = 0.3", "τ = 0.7", "τ = 1.0: no records yet"]
    assert [args[1][0] for _, args, _ in drawn["bar"]] == pytest.approx([0.135, 0.25, 0.45, 0])
    names, heights = drawn["bar"][0][1]
    assert names == ["pos", *(f"n{place}" for place in range(1, 11))] and heights[10] == pytest.approx(0.09)
    assert "2 seeds\npos: an image and a view of itself; n1 to n10:" in profile.get_suptitle()
    assert "Eq. 5" in penalty.axes[0].get_title() and len(drawn["plot"]) == 4
    for (_, (s, r, _), _), tau in zip(drawn["plot"], TAUS):
        assert r == pytest.approx(torch.softmax(torch.tensor(s) / tau, 0).tolist())
        assert -1 <= min(s) < -0.9 < 0.9 < max(s) <= 1


def test_a_caller_keeps_his_figures_and_settings(monkeypatch):
    monkeypatch.setattr(report, "draw", DRAW)
    import matplotlib
    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)  # a user's own; there need be no TeX
    monkeypatch.setitem(matplotlib.rcParams, "figure.facecolor", "black")
    before, loaded = dict.copy(matplotlib.rcParams), "matplotlib.pyplot" in sys.modules
    for tau in TAUS:
        put("contrastive", tau)
    assert cli()[0] == 0 and dict.copy(matplotlib.rcParams) == before and ("matplotlib.pyplot" in sys.modules) == loaded
    first = files("results")
    figures = sorted(path for path in first if path.suffix in (".png", ".svg"))
    assert [path.name for path in figures] == [f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg")]
    for path in figures[::2]:
        with Image.open(path) as image:
            assert image.width == 1275 and image.convert("RGB").getpixel((2, 2)) == (255, 255, 255)
            assert len(image.convert("L").getcolors()) > 10
    for path in figures:
        path.unlink()
    assert cli()[0] == 0 and files("results") == first


def test_without_matplotlib_or_scipy(monkeypatch):
    for tau in TAUS:
        put("contrastive", tau)
    with monkeypatch.context() as patch:
        for name in [name for name in sys.modules if name.split(".")[0] == "scipy"] + ["scipy", "scipy.stats"]:
            patch.setitem(sys.modules, name, None)
        assert refused("scipy")
    monkeypatch.setattr(report, "draw", DRAW)
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    status, out, err = cli()
    assert status == 0 and err == "" and out.count("figures are left out") == 1 and "83.27" in text("TABLE.md")


def test_a_strange_environment():
    """A notebook's backend, a user's matplotlibrc, a terminal without τ, no docstrings; started from another folder."""
    put("simple")
    Path("matplotlibrc").write_text("text.usetex: True\n")
    env = {**os.environ, "MPLBACKEND": "module://not_installed.backend_inline", "PYTHONIOENCODING": "ascii",
           "PYTHONOPTIMIZE": "2"}
    command = [sys.executable, HOME / "report.py", "--results", "results"]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0 and done.stderr == "" and "| simple |" in done.stdout
    assert Path("results/mini/penalty.svg").stat().st_size > 1000 and text("TABLE.md")


# ------------------------------------------------------------------------------------------------------------- Fig. 2


class Plane:
    """In the place of scikit-learn's TSNE."""

    def __init__(self, perplexity, init, random_state):
        assert (perplexity, init, random_state) == (10.0, "random", 0)  # a quarter of 40 images

    def fit_transform(self, z):
        assert Plane.threads == 1 and np.allclose(np.linalg.norm(z, axis=1), 1, atol=1e-5) and z.shape == (40, 16)
        return 100 * z[:, :2].astype(np.float64)


@pytest.fixture
def checkpoint(monkeypatch):
    """checkpoint(tau): what a run of a small dataset leaves, in runs/; its record is put too."""
    images = lambda n: torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=ctl.generator(n))
    data = ctl.Data("tiny", images(100), torch.arange(100) % 10, images(40), torch.arange(40) % 10)
    monkeypatch.setattr(ctl, "load_dataset", lambda name, root, size: data if (name, size) == ("a/tiny", 32) else 1 / 0)

    @contextlib.contextmanager
    def limits(threads):
        Plane.threads = threads
        yield
        Plane.threads = None
    monkeypatch.setitem(sys.modules, "sklearn", types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "sklearn.manifold", types.SimpleNamespace(TSNE=Plane))
    monkeypatch.setitem(sys.modules, "threadpoolctl", types.SimpleNamespace(threadpool_limits=limits))

    def leave(tau, knn, **departs):
        config = ctl.make_config("smoke", tau=tau, dataset="tiny", **departs)
        subset = ctl.take_subset(data, config)
        put("contrastive", tau, final={"knn": knn}, preset="smoke", dataset="tiny", images=subset.sha256(), **departs)
        model, _ = ctl.make_model(config, torch.device("cpu"))
        state = dict.fromkeys(field.name for field in dataclasses.fields(ctl.Run))  # the report reads four of its keys
        state |= {"config": ctl.plain(config.study()), "protocol_version": 1, "data": subset.sha256(),
                  "model": model.state_dict()}
        path = Path("runs", f"{ctl.cell_path(config, 'tiny')}.pt")
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, path)
        return path, state, ctl.embed(model, subset.test_images)[1], subset
    return leave


def test_fig_2_from_checkpoints(checkpoint, drawn):
    _, _, z, data = checkpoint(0.07, 45.42)
    _, _, other, _ = checkpoint(0.2, None)
    checkpoint(0.2, 1.0, seed=1)
    checkpoint(0.2, 1.0, lr=0.5)
    assert cli()[0] == 0 and "scatter" not in drawn  # nothing is computed unasked
    assert cli("--tsne", "a/tiny", "--runs", "runs")[0] == 0
    kept = json.loads(text("tiny-tsne.json", "smoke"))
    assert kept["protocol_version"] == 1
    assert [(plane["tau"], plane["knn"]) for plane in kept["planes"]] == [(0.07, 45.42), (0.2, None)]
    for plane, embeddings in zip(kept["planes"], (z, other)):
        assert plane["tsne"]["label"] == data.test_labels.tolist()
        for key, i in (("x", 0), ("y", 1)):
            assert plane["tsne"][key] == pytest.approx((100 * embeddings[:, i]).tolist(), abs=0.06)
            assert all(value == round(value, 1) for value in plane["tsne"][key])
    seen, points = drawn.pop("scatter"), kept["planes"][0]["tsne"]
    assert len(seen) == 20
    assert seen[3][1] == tuple([v for v, label in zip(points[key], points["label"]) if label == 3] for key in "xy")
    assert [options["label"] for _, _, options in seen[:10]] == [f"class {label}" for label in range(10)]
    figure = seen[0][0].figure
    assert figure.axes[0].get_title() == "τ = 0.07: kNN accuracy 45.42 %" and len(figure.legends[0].get_texts()) == 10
    assert cli()[0] == 0 and len(drawn["scatter"]) == 20  # from the file alone
    Path("results/smoke/tiny-tsne.json").write_text(json.dumps({**kept, "protocol_version": 2}))
    assert cli()[0] == 0 and len(drawn["scatter"]) == 20  # points of another version are not this table's
    for broken in ("[", "{}", json.dumps({**kept, "planes": [{"tau": 0.07}]}), json.dumps({**kept, "planes": 3})):
        Path("results/smoke/tiny-tsne.json").write_text(broken)
        assert refused("tiny-tsne.json")


def test_checkpoints_that_do_not_fit(checkpoint, monkeypatch):
    tsne = ["--tsne", "a/tiny", "--runs", "runs"]
    put("simple")
    assert refused("no checkpoint", argv=tsne)
    path, state, _, _ = checkpoint(0.2, 1.0)
    for key, wrong in (("config", {**state["config"], "lr": 9.0}), ("data", "0")):
        torch.save({**state, key: wrong}, path)
        assert refused(str(path), "another run", argv=tsne)
    path.write_bytes(b"x")
    assert refused("no checkpoint", argv=tsne)
    torch.save(state, path)
    Path("results/smoke/tiny/contrastive_tau0.2_seed0.json").unlink()
    put("simple", preset="smoke", dataset="tiny")
    assert refused("no checkpoint", argv=tsne)
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    assert refused("scikit-learn", argv=tsne)


def test_the_points_that_old_records_hold(drawn):
    points = {"x": [1.5, 2.5], "y": [3.0, 4.0], "label": [3, 9]}
    put("contrastive", 0.2, edit=lambda record: record.update(tsne=None))
    put("contrastive", 0.2, 1, {"knn": 43.2}, edit=lambda record: record.update(tsne=points))
    assert cli()[0] == 0 and [(args, options["label"]) for _, args, options in drawn["scatter"]] == [
        (([1.5], [3.0]), "cat"), (([2.5], [4.0]), "truck")]
    assert drawn["scatter"][0][0].get_title() == "τ = 0.2: kNN accuracy 43.2 %"
    put("contrastive", 0.2, edit=lambda record: record.update(tsne={**points, "x": 3}))
    assert refused("contrastive_tau0.2_seed0.json", "tsne: x")

