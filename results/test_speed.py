"""The tests of results/speed.py and of reproduce.sh.

speed.py reads a clock that moves only where a part of the step is at work: each figure is then known exactly. Whatever
reproduce.sh only plans meets a Python that notes what it is asked to run; one table is trained in earnest.
"""
import contextlib
import io
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from PIL import Image

import speed
import ctl

HOME = Path(ctl.__file__).parent
PARTS = ["augmentation", "forward", "similarities and loss", "backward", "optimiser", "bank update"]

# ------------------------------------------------------------------------------------------------------- speed.py


def run_speed(*argv):
    """speed.py's exit status, standard output and standard error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = ctl.one_line("speed.py", speed.main, list(argv))
    return status, out.getvalue(), err.getvalue()


def smoke(**given):
    return ctl.make_config("smoke", device="cpu", **given)


def images(n=100):
    return torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Each test has a folder of its own, one thread, little data, and no 20 seconds for speed.py."""
    tiny = ctl.Data("tiny", images(), torch.arange(100) % 10, images(20), torch.arange(20) % 10)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ctl, "load_dataset", lambda name, *more, load=ctl.load_dataset:
                        tiny if name in ("shapes", "a/tiny") else load(name, *more))
    monkeypatch.setattr(speed, "measure", lambda config, measure=speed.measure: measure(config, seconds=0))
    torch.set_num_threads(1)
    return tmp_path


@pytest.fixture
def takes(monkeypatch):
    """takes(owner, name, seconds): by speed.py's clock a call of owner.name takes that long, or an iterator's next."""
    now = [0.0]
    monkeypatch.setattr(speed, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))

    def slow_down(owner, name, seconds):
        original = getattr(owner, name)

        def slow(*arguments, **options):
            now[0] += seconds if isinstance(seconds, (int, float)) else next(seconds)
            return original(*arguments, **options)
        monkeypatch.setattr(owner, name, slow)
    return slow_down


@pytest.mark.parametrize("loss", [{"tau": 0.3}, {"loss": "hard-simple"}, {"loss": "triplet"}])
def test_each_part_of_the_step_has_its_own_time(loss, takes):
    """Each part takes another power of two: what is counted twice, left out or put to a neighbour shows."""
    for power, (owner, name) in enumerate([
            (ctl, "augment"), (ctl.ResNet18, "features"), (ctl, "training_loss"), (torch.autograd, "backward"),
            (torch.optim.SGD, "_init_group"), (ctl.MemoryBank, "update")]):
        takes(owner, name, 2 ** power)
    f = speed.measure_step(smoke(**loss), images(), seconds=0)
    assert f["parts_ms"] == dict(zip(PARTS, (1e3, 2e3, 4e3, 8e3, 16e3, 32e3))) and f["rounds"] == 5
    assert f["step_ms"] == 63e3 and f["network_ms"] == 10e3 and f["step_over_network"] == 6.3
    # 100 images in batches of 16: 7 steps an epoch, 3 epochs.
    assert f["images_per_second"] == pytest.approx(16 / 63) and f["training_hours"] == pytest.approx(63 * 7 * 3 / 3600)
    # By hand, two operations a multiply-add: the stem; four stages of four 3x3 convolutions, from the second on the
    # first from half as many channels, with a 1x1 around it; the head. Backward is twice forward, but for the images.
    stem, head, stages = 3 * 4 * 9 * 32 ** 2, 32 * 16, 4 * 4 * 4 * 9 * 32 ** 2
    stages += sum((3.5 * 9 + 0.5) * c * c * s * s for c, s in ((8, 16), (16, 8), (32, 4)))
    assert f["network_gflop"] == pytest.approx(2 * 16 * (3 * (stem + stages + head) - stem) / 1e9, rel=1e-6)
    assert f["network_gflops"] == pytest.approx(f["network_gflop"] / 10)


def test_medians_of_the_steps_after_the_warm_up_that_fit_into_the_time(takes, monkeypatch):
    """The network alone and that of the step take turns; the first two of each are the warm-up."""
    takes(ctl.ResNet18, "features", iter([50, 1, 50, 1, 1, 1, 5, 1, 2, 1, 4, 1, 3, 1] + [1] * 99))
    takes(ctl, "draw_augmentation", iter([100, 100, 3, 9, 4, 8, 5] + [10] * 99))
    f = speed.measure_step(smoke(), images(), seconds=0)
    assert f["rounds"] == 5 and f["parts_ms"]["augmentation"] == 5e3 and f["step_ms"] == 6e3 and f["network_ms"] == 3e3
    assert speed.measure_step(smoke(), images(), seconds=100)["rounds"] == 9 - 2  # 12 seconds a round


def test_the_network_alone_adds_no_gradients_up():
    model, views = ctl.make_model(smoke(), torch.device("cpu"))[0], torch.randn(4, 3, 32, 32)
    gradients = []
    for _ in range(2):
        speed.network_alone(model, views)
        gradients.append(model.head.weight.grad.clone())
    torch.testing.assert_close(*gradients)


def test_augmentation_beside_torchvisions(takes, monkeypatch):
    """A second for the batch, a quarter of a second for each PIL image: of 16 images 16 and 4 a second."""
    takes(ctl, "augment", iter([9, 1, 1, 1, 2, 2]))  # the first is the warm-up
    takes(speed.transforms.RandomResizedCrop, "forward", iter([2] * 16 + [0.25] * 48 + [0.5] * 32))
    seen = []
    monkeypatch.setattr(speed.transforms.ColorJitter, "forward",
                        lambda self, image: seen.append((image.mode, image.size, torch.get_num_threads())) or image)
    torch.set_num_threads(2)
    f = speed.measure_augmentation(smoke(), images(16), torch.device("cpu"))
    assert f == {"batched_images_per_second": 16, "pil_images_per_second": 4, "pil_over_batched": 4}
    assert seen == [("RGB", (32, 32), 1)] * 6 * 16 and torch.get_num_threads() == 2


def test_evaluation_in_time_and_in_memory(takes, monkeypatch):
    def uniformity(z):
        assert z.shape == (10_000, 16)
        kept = torch.empty(20 * 2 ** 20, dtype=torch.uint8)
        for mib in (20, 40, 30):  # each is free before the next: 60 MiB at most, not 110
            torch.empty(mib * 2 ** 20, dtype=torch.uint8)
        return kept.numel()

    def tolerance(z, labels):
        assert z.shape == (10_000, 16) and labels.bincount().tolist() == [1000] * 10

    def linear_probe(h, y, test_h, test_y, epochs, lr):
        assert h.shape == (2, 100, 32) and y.shape == (100,) and epochs == 1 and lr == 0.3
    for stand_in, seconds in ((uniformity, 2), (tolerance, 1), (linear_probe, 4)):
        monkeypatch.setattr(ctl, stand_in.__name__, stand_in)
        takes(ctl, stand_in.__name__, seconds)
    f = speed.measure_evaluation(smoke(), 100, torch.device("cpu"))
    assert f["uniformity_and_tolerance_of_10000_ms"] == 3000 and f["probe_seconds"] == 400  # of 100 epochs
    assert f["uniformity_and_tolerance_of_10000_mib"] == pytest.approx(60, abs=1)


def test_the_json_is_what_the_report_reads_and_the_table_has_every_figure(monkeypatch, folder, capfd):
    given = dict(tau=0.3, subset=50, batch_size=20, precision="float32", dataset="a/tiny")
    flags = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    torch.set_num_threads(2)
    augmented = []
    monkeypatch.setattr(speed, "measure_augmentation", lambda config, host, device, measure=speed.measure_augmentation:
                        augmented.append(len(host)) or measure(config, host, device))
    status, out, err = run_speed("--preset", "smoke", "--device", "cpu", "--threads", "1", "--json", *flags)
    assert status == 0 and err == capfd.readouterr().err == "" and not list(folder.iterdir())
    f, old = json.loads(out), json.loads((HOME / "results/profile/mini.json").read_text())
    assert set(f) == set(old) | {"uniformity_and_tolerance_of_10000_mib"}
    assert list(f["parts_ms"]) == list(old["parts_ms"]) == PARTS and min(f["parts_ms"].values()) > 0
    assert f["config"] == ctl.plain(smoke(**{**given, "dataset": "tiny"}).study()) and f["train_images"] == 50
    assert f["environment"]["threads"] == 1 and augmented == [20] and f["images_per_second"] == 20_000 / f["step_ms"]
    assert f["step_ms"] == pytest.approx(sum(f["parts_ms"].values()), rel=0.5)
    assert 100 < f["peak_memory_mib"] < 24_000 and f["matrix_product_gflops"] > f["network_gflops"] / 100
    assert 256 * 10_000 * 4 / 2 ** 20 < f["uniformity_and_tolerance_of_10000_mib"] < 150

    monkeypatch.setattr(speed, "measure", lambda config: f)
    status, out, err = run_speed("--preset", "smoke")
    assert status == 0 and err == "" and "smoke" in out and "tiny" in out
    for name, value in {**f["parts_ms"], **f}.items():
        assert not isinstance(value, (int, float)) or re.search(rf"{name.replace('_', ' ')} +{value:.2f}", out), name
    monkeypatch.setattr(speed, "measure", lambda config: {"preset": config.preset})
    status, out, err = run_speed("--json", "--device", "cpu")
    assert status == 0 and json.loads(out) == {"preset": "mini"} and "no preset given" in err


@pytest.mark.parametrize("line,word", [
    (["--force"], "--force"), (["--no-force"], "--force"), (["--eval-every", "3"], "--eval-every"),
    (["--results", "x"], "--results"), (["--runs", "x"], "--runs"), (["--report"], "--report"), (["--js"], "--js"),
    (["--tau", "0"], "tau"), (["--loss", "simple", "--tau", "1"], "tau"), (["--dataset", "nowhere"], "nowhere"),
    (["--lr", "1e30"], "finite")])
def test_bad_use_of_speed_is_one_line(line, word, folder):
    status, out, err = run_speed("--preset", "smoke", "--device", "cpu", *line)
    assert status == (1 if word == "finite" else 2) and out == "" and not list(folder.iterdir())
    assert err.startswith("speed.py: ") and err.count("\n") == 1 and word in err


def test_speed_runs_from_any_folder():
    done = subprocess.run([sys.executable, HOME / "results/speed.py", "--runs", "x"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and re.fullmatch(r"speed\.py: .*--runs.*\n", done.stderr)


# --------------------------------------------------------------------------------------------------- reproduce.sh

STUB = """#!/bin/sh
words=$(printf '%s|' "$@")
case "$1${MALLOC_TRIM_THRESHOLD_:-}" in ctl.py) words="without glibc's settings|$words" ;; esac
case "$*" in
    "-m pip --version") ;;
    "-m pip install"*) echo begin >> installs; sleep 0.2; echo end >> installs ;;
    *device_count*) echo "${GPUS:-0}" ;;
    *load_dataset*)
        if [ "${HAVE:-}" = "to wait" ]; then
            trap "exit 130" INT; echo "$words" >> asked; while :; do sleep 0.1; done
        fi
        case " ${HAVE:-} " in *" $3 "*) ;; *) echo "left out: cannot download $3 into $4" >&2; exit 2 ;; esac ;;
    *)
        echo "$words" >> asked
        case "$*" in *"${SLOW:-no cell}"*) sleep 1 ;; esac
        case "$*" in
            *"${FAIL:-no cell}"*) printf '%s\\n' one two three four five six; exit 1 ;;
            *"${BUSY:-no cell}"*) exit 3 ;;
            *"${THERE:-no cell}"*) echo "x.json is there already" ;;
        esac ;;
esac
"""
SHAPES = ("--preset", "smoke", "--seeds", "1")
TWO = (*SHAPES, "--losses", "simple contrastive", "--taus", "0.3")
CELLS = ["--loss simple --seed 0 --dataset shapes", "--loss contrastive --tau 0.3 --seed 0 --dataset shapes"]


@pytest.fixture
def house(folder, monkeypatch):
    """A folder with reproduce.sh and a .venv whose Python notes in `asked` what it is asked to run."""
    for name in ("reproduce.sh", "requirements.txt"):
        shutil.copy(HOME / name, name)
    Path("ctl.py").touch()
    Path(".venv/bin").mkdir(parents=True)
    Path(".venv/bin/python").write_text(STUB)
    Path(".venv/bin/python").chmod(0o755)
    shutil.copy("requirements.txt", ".venv/installed.txt")
    for name in ("SEEDS", "JOBS", "PYTHON", "OMP_NUM_THREADS", *(name for name in os.environ if "SLURM" in name)):
        monkeypatch.delenv(name, raising=False)
    return folder


def start(*line, cwd=None, **env):
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                            env={**os.environ, **env}, cwd=cwd)


def end(process):
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def reproduce(*options, **env):
    return end(start("bash", "reproduce.sh", *options, **env))


def plan(*options, **env):
    """The commands of a dry run, word by word."""
    _, out, _ = reproduce(*options, **env) if "--" in options else reproduce(*options, "--dry-run", **env)
    return [shlex.split(line)[1:] for line in out.splitlines() if line.startswith(".venv/bin/python ctl.py")]


def asked(what=""):
    """The commands that the stub noted, word by word."""
    lines = Path("asked").read_text().splitlines() if Path("asked").exists() else []
    return [line.split("|")[:-1] for line in lines if line.startswith(what)]


def of(word, commands):
    return [words[words.index(word) + 1] for words in commands]


def test_the_plan_without_a_gpu(house):
    status, out, err = reproduce("--dry-run")
    assert status == 0 and err == "" and not asked() and not Path("results").exists()
    assert "90 cells of preset mini on cifar10 cifar100 svhn, 3 seed(s)" in out and "0 GPU(s)" in out
    whole = [" ".join(words) for words in plan()]
    assert len(set(whole)) == 90 and all("--seed 0 " in line for line in whole[:30])  # one seed of everything first
    assert all(line.endswith("--device cpu --threads 1") for line in whole)
    for loss, tau in ctl.PAPER["cifar10"]:
        for name in ("cifar10", "cifar100", "svhn"):
            cell = f" --loss {loss} {f'--tau {tau} ' if tau else ''}--seed 2 --dataset {name} "
            assert sum(cell in line for line in whole) == 1, cell
    assert of("--dataset", plan("quick")) == ["shapes"] * 7 and len(plan("quick", SEEDS="2")) == 14
    narrow = plan("--preset", "narrow", "--losses", "simple", "--dry-run", "--", SEEDS="1")
    assert of("--preset", narrow) == ["narrow"] * 3 and narrow[0][-1] == "1"
    assert "not the paper" in out and "not the paper" not in reproduce("--dry-run", "--preset", "paper")[1]
    text = reproduce("--help")[1]
    assert text.startswith("Sets up") and text.endswith("3.10 or later).\n") and "#" not in text


def test_gpus_are_shared_out(house):
    line = ("--datasets", "svhn", "--seeds", "1")
    status, out, err = reproduce(*line, GPUS="2")
    assert status == 0 and "10 cells of preset paper on svhn, 1 seed(s), 6 at once, 2 GPU(s)" in out
    assert of("--device", plan(*line, GPUS="2")) == ["cuda:0", "cuda:1"] * 5
    assert sorted(asked("ctl.py")) == sorted(plan(*line, GPUS="2")) and "--threads" not in str(asked())


# The indices of `--array=…`. As STEP Slurm sets what stands behind the first colon, and 1 where there is none.
ARRAYS = {"0-2": [0, 1, 2], "3-6": [3, 4, 5, 6], "5": [5], "7,8": [7, 8], "0-1%1": [0, 1], "1-3:1": [1, 2, 3],
          "2-4,5": [2, 3, 4, 5], "0-11": list(range(12))}
GAPS = {"1,3": [1, 3], "0-4:2": [0, 2, 4], "1-3,5": [1, 2, 3, 5], "0-2:2,3,6": [0, 2, 3, 6], "0,1,4": [0, 1, 4]}


@pytest.mark.parametrize("array,indices", [*ARRAYS.items(), *GAPS.items()])
def test_slurm_arrays_have_disjoint_shares_that_cover_all_cells_or_each_task_refuses(array, indices, house):
    told = dict(COUNT=len(indices), MIN=indices[0], MAX=indices[-1], STEP=(re.findall(r":(\d+)", array) or [1])[0])
    tasks = [{f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in (*told.items(), ("ID", i))} for i in indices]
    for task in (*tasks, {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_MAX": "1"}) if array in GAPS else ():
        status, out, err = reproduce("quick", **task)
        assert status == 2 and out == "" and err.count("\n") == 1 and "--array=0-7" in err and not asked()
    if array in ARRAYS:
        shares = [plan("quick", **task) for task in tasks]
        assert sorted(sum(shares, [])) == sorted(plan("quick")) and max(map(len, shares)) - min(map(len, shares)) <= 1
    if array == "0-11":
        assert reproduce("quick", **tasks[0])[0] == 0 and not asked()  # of seven cells no share, and no report


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs affinity")
def test_the_cores_that_this_job_may_use(house):
    def at_once(**env):
        return int(re.search(r"(\d+) at once", reproduce("--dry-run", **env)[1])[1])
    cores = sorted(os.sched_getaffinity(0))
    assert at_once() == at_once(OMP_NUM_THREADS="77") == len(cores)
    assert at_once(SLURM_CPUS_PER_TASK="5") == 5 and at_once(JOBS="4") == 4
    os.sched_setaffinity(0, cores[:1])
    try:
        assert at_once() == 1 and reproduce("test", "-k", "a b")[0] == 0
    finally:
        os.sched_setaffinity(0, cores)
    assert asked() == [["-m", "pytest", "-q", "-n", "1", "-k", "a b", "test_ctl.py", "results"]]


def test_words_with_spaces_stay_whole(house):
    Path("My Drive/imgs").mkdir(parents=True)
    line = (*SHAPES, "--losses", "simple", "--datasets", "My Drive/imgs", "--results", "my res", "--data", "my data")
    more = ("--", "--runs", "x $y'z", "--lr", "1")
    status, out, err = reproduce(*line, *more)
    assert status == 0 and err == "" and asked() == [
        ["ctl.py", "--preset", "smoke", "--data", "my data", "--results", "my res", "--loss", "simple", "--seed", "0",
         "--dataset", "My Drive/imgs", "--device", "cpu", "--threads", "1", *more[1:]],
        ["results/report.py", "--results", "my res", "--preset", "smoke"]]
    assert plan(*line, "--dry-run", *more) == asked("ctl.py")
    assert f"{house}/My Drive/imgs" in plan("--datasets", "~/imgs", HOME=f"{house}/My Drive")[0]


@pytest.mark.parametrize("shell", [["sh"], ["bash", "--posix"], ["env", "POSIXLY_CORRECT=1", "bash"]])
def test_any_shell_goes_on_in_bash(shell, house):
    status, out, err = end(start(*shell, "reproduce.sh", *TWO))
    assert status == 0 and err == "" and len(asked("ctl.py")) == 2


def test_links_and_other_folders_lead_home(house, tmp_path_factory, monkeypatch):
    away = tmp_path_factory.mktemp("away")
    (away / "link").symlink_to(house / "reproduce.sh")
    shutil.copy(house / "reproduce.sh", away / "slurm_script")  # Slurm runs a copy
    monkeypatch.setenv("CDPATH", str(away))
    for line, env in ((["bash", "link"], {}), (["sh", f"{house}/reproduce.sh"], {}),
                      (["bash", "slurm_script"], {"SLURM_SUBMIT_DIR": str(house)})):
        status, out, err = end(start(*line, "--dry-run", *SHAPES, cwd=away, **env))
        assert status == 0 and out.count("ctl.py") == 10, err
    status, out, err = end(start("bash", "slurm_script", cwd=away))
    assert status == 2 and err.count("\n") == 1 and "ctl.py" in err and len(list(away.iterdir())) == 2


def test_the_interpreter(house):
    Path(".venv/bin/python").write_text('#!/bin/sh\n[ "$2" != pip ]\n')  # of a .venv that broke off
    Path("python").write_text('#!/bin/sh\ncase "$*" in -c*) exit "$OLD" ;; *) echo "$*"; exit 7 ;; esac\n')
    Path("python").chmod(0o755)
    for python, old, word in (("/none", "0", "no such interpreter: /none"), ("./python", "1", "3.10")):
        status, out, err = reproduce("test", PYTHON=python, OLD=old)
        assert status == 2 and out == "" and err.count("\n") == 1 and word in err
    assert reproduce("test", PYTHON="./python", OLD="0") == (7, "-m venv --clear .venv\n", "")


def test_two_that_set_up_at_once_do_so_one_after_the_other(house):
    Path(".venv/installed.txt").write_text("of another commit")
    ends = [end(process) for process in [start("bash", "reproduce.sh", "--dry-run") for _ in range(2)]]
    assert [status for status, _, _ in ends] == [0, 0] and Path("installs").read_text().split() == ["begin", "end"]
    assert Path(".venv/installed.txt").read_text() == Path("requirements.txt").read_text()


def test_each_cell_is_announced_and_the_logs_are_named(house):
    status, out, err = reproduce(*TWO, "--jobs", "1", THERE="contrastive")
    first, *lines = out.splitlines()
    assert status == 0 and err == "" and first.startswith("plan: 2 cells") and "in runs/logs/smoke-results" in first
    assert lines == [f"start   {CELLS[0]}", f"done    {CELLS[0]} (0 min)",
                     f"start   {CELLS[1]}", f"done    {CELLS[1]} (is there already)"]
    assert sorted(path.name for path in Path("runs/logs/smoke-results").iterdir()) == [
        "loss_contrastive_tau_0.3_seed_0_dataset_shapes.log", "loss_simple_seed_0_dataset_shapes.log"]


def test_a_failing_cell_is_reported_and_stops_no_other(house):
    status, out, err = reproduce(*TWO, "--jobs", "1", FAIL="simple")
    log = "runs/logs/smoke-results/loss_simple_seed_0_dataset_shapes.log"
    assert status == 1 and "done    --loss contrastive" in out and len(asked("results/report.py")) == 1
    assert err == f"FAILED  {CELLS[0]} (status 1), the end of {log}:\ntwo\nthree\nfour\nfive\nsix\n"
    status, out, err = reproduce(*TWO, BUSY="simple")  # goes on where that broke off, and keeps its log
    assert status == 0 and err == "" and "busy    --loss simple" in out and "six" in Path(log).read_text()
    assert reproduce(*TWO, FAIL="report.py")[0] == 1


def test_two_tables_at_once_do_not_mix(house):
    tables = [start("bash", "reproduce.sh", *TWO, "--results", "out/a", SLOW="simple"),
              start("bash", "reproduce.sh", *TWO, "--results", "out_a", SLOW="simple", FAIL="simple"),
              start("bash", "reproduce.sh", "--preset", "mini", "--datasets", "shapes", *TWO[2:], "--results", "out/a")]
    ends = [end(table) for table in tables]
    assert [(status, err.count("FAILED")) for status, _, err in ends] == [(0, 0), (1, 1), (0, 0)]
    logs = [[path.read_text() for path in Path(re.search(r"logs in (\S+)", out)[1]).iterdir()] for _, out, _ in ends]
    assert [sorted(map(len, texts)) for texts in logs] == [[0, 0], [0, 28], [0, 0]]


def test_data_sets_that_cannot_be_had(house):
    status, out, err = reproduce("--losses", "simple", "--seeds", "1", "--data", "d", HAVE="cifar100")
    assert status == 0 and err == "left out: cannot download cifar10 into d\nleft out: cannot download svhn into d\n"
    assert of("--dataset", asked("ctl.py")) == ["cifar100"] and of("--data", asked("ctl.py")) == ["d"]
    Path("asked").unlink()
    status, out, err = reproduce()
    assert status == 2 and "plan" not in out and err.count("\n") == 4 and not asked()
    assert "--datasets FOLDER" in err.splitlines()[-1] and "--datasets shapes" in err.splitlines()[-1]
    table = start("bash", "reproduce.sh", HAVE="to wait")  # interrupted while it downloads
    while not asked():
        time.sleep(0.01)
    os.killpg(table.pid, signal.SIGINT)
    assert end(table)[0] == 130 and len(asked()) == 1


@pytest.mark.parametrize("options", [
    ["--seeds", "0"], ["--seeds"], ["--seeds", "x"], ["--jobs", "-1"], ["--jobs", ""], ["--preset", "tiny"], ["--foo"],
    ["all"], ["--losses", "triple"], ["--losses", " "], ["--datasets", ""], ["--datasets", "a b"],
    ["--taus", "0.1 $(touch x)"]])
def test_bad_options_of_reproduce(options, house):
    status, out, err = reproduce(*options)
    assert status == 2 and err.count("\n") == 1 and out == "" and not asked() and not Path("x").exists()


def test_a_table_that_is_killed_goes_on_to_the_same_records(house):
    """In earnest: two cells at once, all processes killed soon after the first checkpoint, wherever they are."""
    shutil.copy(HOME / "ctl.py", "ctl.py")
    for i, image in enumerate(images(140)):
        path = Path("my images", "train" if i < 100 else "test", f"class {i % 2}", f"{i}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    Path("driver.py").write_text("import sys, ctl\nctl.CHECKPOINT_SECONDS = 0\nsys.exit(ctl.main())\n")
    Path(".venv/bin/python").write_text(f"""#!/bin/sh
        case "$*" in *device_count*) echo 0 ;; ctl.py*) shift; exec "{sys.executable}" driver.py "$@" ;; esac""")
    line = ["bash", "reproduce.sh", *TWO, "--datasets", "my images", "--jobs", "2", "--", "--epochs", "4"]
    table = start(*line)
    while table.poll() is None and not list(Path("runs/smoke").rglob("*.pt")):
        time.sleep(0.005)
    time.sleep(random.Random(time.time()).uniform(0, 0.3))
    assert table.poll() is None
    os.killpg(table.pid, signal.SIGKILL)
    table.communicate()
    status, out, err = end(start(*line))
    assert status == 0 and err == "", err
    assert any("going on from" in log.read_text() for log in Path("runs/logs").rglob("*.log"))
    for loss in ({"loss": "simple"}, {"loss": "contrastive", "tau": 0.3}):
        config = smoke(**loss, epochs=4, threads=1, dataset="my images", results="whole", runs="whole")
        with contextlib.redirect_stdout(io.StringIO()):
            whole = ctl.train(config)
        record = ctl.read_record(Path("results", f"{ctl.cell_path(config, 'my images')}.json"))
        assert {**record, "timing": 0, "environment": 0} == {**whole, "timing": 0, "environment": 0}
    assert not [path for path in Path().rglob("*") if path.name.endswith(".tmp")]
