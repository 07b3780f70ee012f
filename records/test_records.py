"""Tests of the records' tools: what makes a series a record, its statistics, its timing."""

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

import train_speedrun as ts
from data.common import key_of, read_contract, sha256
from data.testing import CONFIG, ENV, ROOT, TRACK, python, racer, refuses
from records import checks, compare, kernels, race, series, snapshots, stats, trace
from records import races as races_of

LOSSES = (0.1890, 0.1894, 0.1887, 0.1891)
PAIRED = (0.1891, 0.1882, 0.1889, 0.1886)  # of the same idea, in as many steps as
BEFORE = (0.1953, 0.1950, 0.1952, 0.1949)  # its predecessor
BETTER = "records/tiny/2026-12-01_Better"
FIRST = "records/tiny/2026-11-01_First"
MACHINE = "1 x NVIDIA H200, python 3.11.7, torch 2.15.0"


@pytest.fixture
def call(capsys):
    """call(tool, *arguments): a tool's main in this process, as a finished process."""

    def run(tool, *arguments):
        capsys.readouterr()
        code = tool.main([*map(str, arguments)])
        return subprocess.CompletedProcess([], code, *capsys.readouterr())

    return run


@pytest.fixture
def faults(call):
    """faults(*arguments): the failing checks of stats.py; its exit code tells if there are any."""

    def run(*arguments) -> list:
        done = call(stats, *arguments)
        found = re.findall("^FAIL (.*)", done.stdout, re.M)
        assert done.returncode == int(bool(found)), done.stderr
        return found

    return run


def edit(path: Path, old: str, new: str):
    """Replaces a regular expression in a file; "gone" removes it."""
    if old == "gone":
        return path.unlink()
    text = path.read_text()
    assert re.search(old, text, re.M), old
    path.write_text(re.sub(old, new, text, flags=re.M))


def write_run(folder: Path, run: Path, seed: int, loss: float, steps: int):
    """The real run's log and snapshot with another seed, loss and number of steps."""
    source, middle, block = (run / "log.txt").read_text().split("=" * 100 + "\n")
    source = source.replace(" steps=20,", f" steps={steps},")
    config = json.loads(middle.splitlines()[2]) | dict(steps=steps)
    facts = dict(line.split(": ", 1) for line in block.splitlines())
    facts |= dict(run_id=folder.name, seed=seed, steps=steps, images=16 * steps, train_time_s=100)
    facts |= dict(val_loss=f"{loss:.5f}", code_sha256=sha256(source.encode()))
    first_line = f"logs/{folder.name}: seed {seed}, 0.03M parameters, 96 training images"
    lines = [source + "=" * 100, first_line, MACHINE, json.dumps(config)]
    for share, value in ((0.5, loss + 0.02), (1, loss)):
        step = int(share * steps)
        counts = f"step:{step}/{steps} images:{16 * step}"
        lines.append(f"{counts} val_loss:{value:.5f} train_time:{100_000 * share:.0f}ms")
    lines += ["=" * 100, *(f"{key}: {value}" for key, value in facts.items())]
    folder.mkdir(parents=True)
    (folder / "log.txt").write_text("\n".join(lines) + "\n")
    (folder / "train_speedrun.py").write_text(source)


def write_results(run: Path, real: Path):
    """What the referee wrote of the real run, as if of this one, and its pictures."""
    results = json.loads((real / "results.json").read_text())
    log = series.parse_log(run / "log.txt")
    results |= {key: log[key] for key in ("run_id", "seed", "images", "code_sha256")}
    results |= dict(val_loss=log["val_loss"] * 1.0001, gflops=1.5)
    del results["val_loss_fresh"]  # of the real run
    results["rules"]["contract"] = "as published"
    results["what a later referee writes"] = {"any": ["thing"]}
    (run / "results.json").write_text(json.dumps(results))
    for name in ("samples.png", "curve.png"):
        shutil.copy(real / name, run / name)


@pytest.fixture(scope="session")
def base(tmp_path_factory, trained) -> Path:
    """A project without git: a record and the predecessor that it names, made by --new of runs."""
    root = tmp_path_factory.mktemp("project")
    parts = ((FIRST, BEFORE, 25), (BETTER, LOSSES, 20), (f"{BETTER}/paired", PAIRED, 25))
    for folder, losses, steps in parts:
        runs = [root / "logs" / f"{folder[-6:]}_tiny_seed{seed}" for seed in range(4)]
        for seed, run in enumerate(runs):
            write_run(run, trained, seed, losses[seed], steps)
        if losses != PAIRED:  # logs alone
            write_results(runs[0], trained)
        assert stats.main(["--new", str(root / folder), *map(str, runs)]) == 0
    (root / FIRST / "README.md").write_text("# First: a | b\n")
    text = "# Better: a | b\n\nPredecessor: 2026-11-01_First\n\n## Paired runs\n"
    (root / BETTER / "README.md").write_text(text)
    for name in checks.REFEREE:
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    return root


@pytest.fixture
def project(base, tmp_path, monkeypatch) -> Path:
    """A copy of it, with a target for tiny, and for imagenet256 as it is."""
    goal = races_of.Goal("val_loss", 0.195, 0.0002)
    races = dict(tiny=races_of.Race("tiny", (goal,), "images", 2.0))
    races["imagenet256"] = checks.RACES["imagenet256"]
    source = (base / BETTER / "train_speedrun.py").read_text()
    contracts = {track: read_contract(source, track).sha256 for track in races}
    for module in (checks, races_of, stats):
        monkeypatch.setattr(module, "RACES", races)
    monkeypatch.setattr(snapshots, "CONTRACTS", contracts)
    monkeypatch.setattr(stats, "ROOT", tmp_path / "project")
    return shutil.copytree(base, tmp_path / "project")


def assert_starts(found: list, wanted: str):
    """These lines and no others: `wanted` is how each starts, with & between."""
    starts = wanted.split(" & ") if wanted else []
    assert len(found) == len(starts), found
    for text, start in zip(found, starts):
        assert text.startswith(start), found


T_TABLE = [(6.3138, 1, 0.05), (2.9200, 2, 0.05), (2.3534, 3, 0.05), (4.5407, 3, 0.01)]
T_TABLE += [(5.8409, 3, 0.005), (3.7469, 4, 0.01), (2.8214, 9, 0.01), (2.3301, 1000, 0.01)]


def test_t_tail_is_that_of_the_tables_of_closed_forms_and_of_the_normal_limit():
    for t, df, p in T_TABLE:
        assert series.t_tail(t, df) == pytest.approx(p, rel=2e-4)
    for t in (-40, -0.3, 0, 2, 300):
        cauchy = 0.5 - math.atan(t) / math.pi
        assert series.t_tail(t, 1) == pytest.approx(cauchy, abs=1e-12)
        two = 0.5 - t / math.sqrt(2 + t * t) / 2
        assert series.t_tail(t, 2) == pytest.approx(two, abs=1e-12)
        assert series.t_tail(t, 1000) + series.t_tail(-t, 1000) == pytest.approx(1, abs=1e-10)
    assert series.t_tail(math.inf, 3) == 0
    assert series.t_tail(2.326348, 1e4) == pytest.approx(0.01, abs=2e-5)


def test_paired_and_target_tests_by_hand():
    losses = {3: 8, 0: 1, 1: 2, 2: 3, 9: 50}
    previous = {0: 2, 1: 4, 2: 6, 3: 10, 7: 0}
    n, mean, sd, t, p = series.paired_test(losses, previous)  # differences -1, -2, -3, -2
    assert (n, mean, sd) == (4, -2, pytest.approx(math.sqrt(2 / 3)))
    assert (t, p) == (pytest.approx(-2 * math.sqrt(6)), pytest.approx(0.008138, abs=1e-6))
    assert series.paired_test(previous, losses)[4] == pytest.approx(1 - p)  # higher: no success
    assert series.paired_test(losses, losses)[4] == pytest.approx(0.5)
    assert math.isnan(series.paired_test({}, {})[4])
    values = (0.10, 0.12, 0.11, 0.11)
    sd = math.sqrt(2 / 3) / 100
    bound, p, student = series.target_test(values, 0.11 + 2.326348 * sd / 2, 1e-6)
    assert (bound, p) == (pytest.approx(0.11 + 2.326 * sd / 2), pytest.approx(0.01, rel=1e-5))
    assert student == pytest.approx(series.t_tail(2.326348, 3))
    assert series.target_test(values, 0.1, 0.04)[0] == pytest.approx(0.11 + 2.326 * 0.02)
    bound, p, student = series.target_test(values[:1], 0.2, 0.01)  # of one run: the floor
    assert bound == pytest.approx(0.12326) and p < 1e-9 and math.isnan(student)


# Files of the record | the checks that fail, or the line of exit code 2 | edits, one at a time
# A long row goes on after a backslash
EDITS = r"""
log_seed3.txt | source: | ^code_sha256: .* > code_sha256: x
log_seed?.txt | final step: | ^resumed: 0 > resumed: 1; ^(graphs.*: )0 > \g<1>1
log_seed?.txt | final step: | (96 training images)$ > \1 (a part: a trial, no record)
log_seed3.txt | final step: | ^resumed: 0 > resumed: 1
log_seed3.txt | final step: & step lines: log_seed3.txt contradicts | ^steps: 20 > steps: 21
log_seed3.txt | the same config: & hyperparameters: width 33, in the | "width": 32 > "width": 33
log_seed?.txt | hyperparameters: ema_decay 0.9, in the snapshot | \
    "ema_decay": 0.999 > "ema_decay": 0.9
log_seed3.txt | the same & names: & hyperparameters: & paired source: the r | \
    ^config: tiny > config: b
log_seed3.txt | world_size | ^world_size: 1 > world_size: 2; ^(param.*) > \g<1>1; H200 > H100
log_seed3.txt | world_size | ^data_sha256: > data_sha256: d
log_seed3.txt | seeds | gone >
log_seed3.txt | seeds & names: log | ^seed: 3 > seed: 2; ^seed: 3 > seed: 4; ^(run_id.*)3$ > \g<1>2
log_seed3.txt | names: log_seed3.txt is of Better_tiny_seed3 | \
    : seed 3, > : seed 2,; ^logs/.*: > logs/x:
log_seed3.txt | names: log_seed3.txt is of Better_tiny_seed4 | Better_tiny_seed3 > Better_tiny_seed4
log_seed?.txt | runs: log_seed0.txt and log_seed1.txt, log | (val_loss: ?)0\.\d* > \g<1>0.18905
log_seed?.txt | step lines: log_seed0.txt contradicts itself in train | \
    ^train_time_s: 100 > train_time_s: 90
log_seed?.txt | step lines: log_seed0.txt contradicts itself in clock | time:50000ms > time:500000ms
log_seed3.txt | step lines: log_seed3.txt contradicts itself in images | \
    images:160 > images:16; :160 > :170
log_seed3.txt | step lines: log_seed3.txt contradicts itself in images, order | ^step:10/ > step:21/
log_seed3.txt | results.json: 101 network | ^sampling_nfe: .* > sampling_nfe: 101
log_seed3.txt | folder: | ^track: tiny > track: imagenet256
log_seed3.txt | target: | \b0.18910\b > 0.22
log_seed3.txt | 2 log_seed3.txt is not a finished run's whole log | ^={100}$ > =; ^seed: > seed: x
log_seed3.txt | 2 whole log (its last | ^(val_loss: 0.1).* > \g<1>; ^val_loss.* > val_loss: nan
log_seed?.txt | 2 log.txt is missing | gone >
log_seed?.txt | folder: & contract: a training | ^track: tiny > track: mnist
samples.png | samples.png: | gone >
train_speedrun.py | snapshot: & contract: its title & results.json: code | \
    ^import re > # Contract: x\nimport re
train_speedrun.py | snapshot: & results.json: code_sha256 | ^import torch$ > import  torch
train_speedrun.py | snapshot: & contract: edited: & results.json: code | randperm > rand_perm
train_speedrun.py | snapshot: & contract: edited: & results.json: code | \(3, 8, 8\) > (3, 8, 9)
train_speedrun.py | snapshot: & contract: a & results.json: code | def validation_draws > def draws
t*.py | snapshot: & compile flags: _ind & results.json: code | ^import json$ > import _inductor
t*.py | snapshot: & compile flags: TO & results.json: code | ^import json$ > x = 'TORCHINDUCTOR_A'
t*.py | snapshot: & compile flags: m & results.json: code | ^import json$ > x = 'max-autotune'
t*.py | snapshot: & compile flags: c & results.json: code | ^import json$ > coordinate_descent = 1
train_speedrun.py | 2 train_speedrun.py is missing | gone >
results.json | results.json: run x & results.json: val_loss | "run_id": "[^"]* > "run_id": "x
results.json | results.json: run | "seed": 0 > "seed": 1; "config": "tiny > "config": "b
results.json | results.json: run | ("parameters": ) > \g<1>1; "data_sha256": " > "data_sha256": "d
results.json | results.json: val_loss | ("val_loss": )0.189018\d* > \g<1>0.1893; 0.189018\d* > NaN
results.json | results.json: code_sha256 x | "code_sha256": " > "code_sha256": "x
results.json | results.json: contract edited | as published > edited: 1
results.json | results.json: referee x | "referee_sha256": " > "referee_sha256": "x
results.json | results.json: 100.5 network | "nfe": [\d.]* > "nfe": 100.5
results.json | results.json: 2.01 GFLOP | "gflops": 1.5 > "gflops": 2.01
results.json | results.json: None GFLOP | "gflops": 1.5 > "gflops": null
results.json | results.json: values: gflops -1 | "gflops": 1.5 > "gflops": -1
results.json | results.json: values: nfe 0.5 | "nfe": [\d.]* > "nfe": 0.5
results.json | results.json: values: KD-lite-20 -5 | ("KD-lite-20": )[^,}]* > \g<1>-5
results.json | results.json: values: prompt-accuracy-lite-20 1.5 | \
    (racy-lite-20": )[^,}]* > \g<1>1.5
results.json | results.json: values: FID-20 without inception | "FID-20": null > "FID-20": 1.0
results.json | results.json: values: protocol of lite without | "weights": "[^"]* > "weights": "
results.json | results.json: values: val_loss 0.189 | \A\{ > {"val_loss_fresh": 0.21,
results.json | 2 damaged results | \A[^\0]* > [; \A[^\0]* > []; "nfe": [\d.]* > "nfe": "many"
results.json | 2 damaged results | \
    "KD-lite-20": > "KD-lite-20": "", "x":; "metrics": \{ > "metrics": 5, "x": {
results.json | 2 results.json is missing | gone >
README.md | README.md: Predecessor: 2026-11-01_First, and a section | ## Paired > Paired
README.md | 2 README.md is missing | gone >
README.md | 2 '../tiny/2026-11-01_First' is no plain name | : 2026 > : ../tiny/2026
README.md | 2 2026-11-01_Nothing | _First > _Nothing
paired/log_seed0.txt | paired test: 4 | \b0.18910\b > 0.12
paired/log_seed?.txt | paired test: 4 | \b0.18...\b > 0.19500; \b0.18...\b > 0.3
paired/log_seed?.txt | paired step lines: & paired images | ^(images: |.*images:)400 > \g<1>401
paired/log_seed?.txt | paired images | gone >
paired/log_seed?.txt | paired images | ^data_sha256: > data_sha256: d
paired/log_seed?.txt | paired source: code & paired hyperp & paired source: the | \
    sample_steps=10 > sample_steps=11
paired/log_seed?.txt | paired names: & paired hyperp & paired source: the r | \
    ^config: tiny > config: b
paired/log_seed?.txt | paired final step: | ^resumed: 0 > resumed: 1
paired/log_seed2.txt | paired seeds & paired test: 3 seeds | gone >
../2026-11-01_First/log_seed3.txt | paired test: 3 seeds | gone >
"""


def cases() -> list:
    rows = []
    for line in EDITS.replace("\\\n    ", "").strip().splitlines():
        files, wanted, edits = line.split(" | ")
        for change in edits.split("; "):
            rows.append((files, wanted, *change.split(" >")))
    return rows


@pytest.mark.parametrize("files, wanted, old, new", cases())
def test_a_broken_condition_is_refused_for_its_cause_alone(
    project, call, faults, files, wanted, old, new
):
    folder = project / BETTER
    for path in folder.glob(files):
        edit(path, old, new[1:])
    if wanted[0] == "2":
        refuses(call(stats, folder), "stats.py: ", wanted[2:])
    else:
        assert_starts(faults(folder), wanted)


def test_the_published_folders_verify_under_the_first_contract(tmp_path):
    folders = sorted((ROOT / "records").glob("cifar10*/2026-11-20_*"))
    done = python(tmp_path, ROOT / "records/stats.py", *folders)
    assert len(folders) == 6 and done.stderr == "" and "FAIL" not in done.stdout
    assert done.stdout.count("ok   contract: the first") == 6
    assert "2026-11-20_First-run: an example, no record; 1 x AMD EPYC, 2 threads" in done.stdout
    snapshot = (folders[0] / "train_speedrun.py").read_bytes()
    assert snapshots.check_contract(snapshot, "cifar10")[0]
    assert not snapshots.check_contract(snapshot.replace(b"2025", b"2026"), "cifar10")[0]


def test_a_finished_runs_log_parses_and_one_cut_anywhere_is_one_line(trained, tmp_path, call):
    content = (trained / "log.txt").read_bytes()
    log = series.parse_log(trained / "log.txt")
    assert log["source"] == (trained / "train_speedrun.py").read_bytes()
    assert json.loads(log["hyperparameters"])["width"] == CONFIG.width and not log["trial"]
    assert [point[0] for point in log["points"]] == [160, 320] and log["bytes"] == len(content)
    assert (log["images"], log["points"][-1][2]) == (320, log["val_loss"])
    assert log["machine"].startswith(log["hardware"] + ", python ")
    path = tmp_path / "log.txt"
    for size in [*range(0, 60_000, 9973), *range(60_000, len(content), 97), len(content) - 1]:
        path.write_bytes(content[:size])
        refuses(call(stats, path), "stats.py: ", "log.txt")
    path.write_bytes(b"\xff" * 999)
    refuses(call(stats, path), "log.txt is not a finished run's whole log")


def test_single_logs_and_examples_have_checks_of_their_own(project, call, faults):
    example = project / FIRST
    (example / "log_seed0.txt").rename(example / "log.txt")
    assert faults(example / "log.txt") == []
    edit(example / "log.txt", "^resumed: 0", "resumed: 1")
    assert_starts(faults(example / "log.txt"), "final step:")
    for seed in (1, 2, 3):
        (example / f"log_seed{seed}.txt").unlink()
    done = call(stats, example)
    assert done.returncode == 0 and "FAIL" not in done.stdout and "an example" in done.stdout
    assert "\nnote seeds [0]" in done.stdout and "\nnote final step: " in done.stdout
    refuses(call(stats), "give the folder of a record")


def test_a_record_passes_with_its_statistics(project, call, faults, monkeypatch):
    done = call(stats, project / BETTER)
    assert done.returncode == 0 and done.stdout.count("\nok   ") == 39
    numbers = "n 4, val_loss: mean 0.18905, sd 0.00029, min 0.1887, max 0.1894"
    assert f"{numbers}; train_time_s: mean 100.0, sd 0.0\n" in done.stdout
    assert "ok   contract: as published" in done.stdout
    assert "ok   paired race: 320.0 images after 400.0;" in done.stdout
    test = r"\nok   paired test: 4 seeds, of 4 logs .* -0\.00640, sd 0\.00027, t -47\.\d\d, p"
    assert re.search(test, done.stdout)
    itself = faults(project / BETTER, "--against", project / BETTER)
    assert_starts(itself, "paired images & paired test: & paired race:")
    size = (project / BETTER / "log_seed0.txt").stat().st_size
    for limit, wanted in ((size, ""), (size - 1, "size: & paired size:")):
        monkeypatch.setattr(checks, "LOG_BYTES", limit)
        assert_starts(faults(project / BETTER), wanted)


def test_target_floor_fid_and_the_series_that_fixes_the_target(project, monkeypatch, faults):
    def race_to(*goal, **options):
        race = races_of.Race("tiny", (races_of.Goal(*goal),), "images", **options)
        monkeypatch.setitem(checks.RACES, "tiny", race)

    for value, wanted in ((0.19022, ""), (0.19021, "target:"), (None, "")):  # floor 0.002326 / 2
        race_to("val_loss", value, 0.001)
        assert_starts(faults(project / BETTER), wanted)
    for value, wanted in ((0.1878, ""), (0.1879, "target:")):  # the other way round
        race_to("val_loss", value, 0.001, True)
        assert_starts(faults(project / BETTER), wanted)
    other = "target: & README.md: no predecessor"
    for name, wanted in ((Path(FIRST).name, ""), ("", other)):
        race_to("val_loss", 0.1951, 0.001, baseline=name)
        assert_starts(faults(project / FIRST), wanted)
        assert not races_of.reaches_target(races_of.load(project / FIRST))
    race_to("FID-50k", 3.49, 0.02)
    for seed in (1, 2, 3):  # each run is refereed
        log = series.parse_log(project / BETTER / f"log_seed{seed}.txt")
        results = json.loads((project / BETTER / "results.json").read_text())
        results |= dict(run_id=log["run_id"], seed=seed, val_loss=log["val_loss"])
        (project / BETTER / f"results_seed{seed}.json").write_text(json.dumps(results))
    for path in (project / BETTER).glob("results_seed*"):
        edit(path, '"metrics": {', '"metrics": {"FID-50k": 3.46, ')
        edit(path, r'"protocol": \{', '"protocol": {"inception": {"weights": "0123456789abcdef"}, ')
    path = project / BETTER / "results.json"
    edit(path, r'"protocol": \{', '"protocol": {"inception": {"weights": "0123456789abcdef"}, ')
    for fid, wanted in (("3.48", ""), ("3.49", "target: FID-50k"), ("null", "target: FID-50k")):
        edit(path, '"metrics": {("FID-50k": [^,]*, )?', f'"metrics": {{"FID-50k": {fid}, ')
        assert_starts(faults(project / BETTER), wanted)
    edit(path, '"FID-50k": null', '"FID-50k": 3.46')
    assert faults(project / BETTER) == []
    path.with_name("results_seed3.json").rename(path.with_name("results_seed0.json"))
    edit(path.with_name("results_seed0.json"), '"seed": 3', '"seed": 0')
    assert_starts(faults(project / BETTER), "results_seed0.json: run")
    path.with_name("results_seed0.json").unlink()
    assert_starts(faults(project / BETTER), "target: FID-50k 3.46000 of 3,")


def test_the_race_by_seconds_needs_one_machine_and_orders_the_table(project, monkeypatch, faults):
    rule = replace(checks.RACES["tiny"], cost="train_time_s")
    monkeypatch.setitem(checks.RACES, "tiny", rule)
    folder = project / BETTER
    assert_starts(faults(folder), "paired race:")
    for old, new, wanted in (("100", "90", ""), ("H200", "H100", "paired race:")):
        for path in folder.glob("log_seed*"):
            edit(path, rf"(^train_time_s: |train_time:|NVIDIA ){old}", rf"\g<1>{new}")
        assert_starts(faults(folder), wanted)
    records = [races_of.load(project / name) for name in (BETTER, FIRST)]
    for cost, wanted in (
        ("train_time_s", ["First", "Better"]),
        ("parameters", ["Better", "First"]),
    ):
        monkeypatch.setitem(checks.RACES, "tiny", replace(rule, cost=cost))
        rows = stats.table("tiny", records)
        assert re.findall(r"^\| \d .*\[(\w+): a / b\]", rows, re.M) == wanted


def test_a_race_is_timed_by_whole_runs_and_its_factors_stand_in_the_table(
    project, tmp_path, monkeypatch, call, faults
):
    """The whole run is so many more steps, and what was on the clock beside them once."""
    first = Path(FIRST).name
    rule = replace(checks.RACES["tiny"], cost=races_of.TIMING, baseline=first)
    easy = replace(rule, goals=(races_of.Goal("val_loss", 0.197, 0.0002),))
    monkeypatch.setitem(checks.RACES, "tiny", easy)
    record, path = project / BETTER, project / BETTER / "timing.txt"
    assert_starts(faults(record), "timing.txt: missing")
    sides = ["--race", project / FIRST, record, "--steps", "3", "--rounds", "1"]
    monkeypatch.setattr(race, "ROOT", tmp_path)
    refuses(call(compare, *sides), "data/download.py tiny")
    monkeypatch.setattr(race, "ROOT", racer(tmp_path / "racer"))
    turns = []

    def output(side, task, folder, processes):
        turns.append((side.name, side.options.config, side.options.steps, task, processes))
        step = "step:{0}/3 images:{0} train_loss:1 train_time:{1}ms\n"
        late = 1000 * ("Better" not in side.name)  # half a second of 2.5 are beside the steps
        return step.format(2, 2500) + step.format(3, 3500 + late) + "peak_memory_mib: 7\n"

    monkeypatch.setattr("records.compare.Side.output", output)
    done = call(compare, *sides)
    assert done.returncode == 0, done.stderr
    names = (first, Path(BETTER).name)
    assert turns == [(name, "tiny", 3, "train", 1) for name in names]
    text = path.read_text()
    assert text in done.stdout and f"predecessor: {first}\n" in text
    assert "predecessor_steps: 25\npredecessor_ms_per_step: 2000.00\n" in text
    assert "predecessor_seconds: 48.500\n" in text and "record_seconds: 20.500\n" in text
    assert len(faults(record)) == 1  # one round
    for side, seconds in (("predecessor", "10 12"), ("record", "4.2 4.8")):
        edit(path, f"^{side}_seconds: .*", f"{side}_seconds: {seconds}")
    assert faults(record) == []
    for old, new, wanted in (
        (r" 4\.8", " 10.1", "timing.txt: 1.010 of 2026-11-01_First's seconds at most, in 2 rounds"),
        ("predecessor_steps: 25", "predecessor_steps: 26", "timing.txt: predecessor is not 2026"),
        ("record_sha256: ", "record_sha256: 0", "timing.txt: record is not 2026-12-01_Better"),
    ):
        kept = path.read_text()
        edit(path, old, new)
        assert_starts(faults(record), wanted)
        path.write_text(kept)
    records = [races_of.load(folder) for folder in (record, project / FIRST)]
    for goals, factor in ((easy, "2.44"), (rule, ">= 2.44")):  # the baseline has reached it or not
        monkeypatch.setitem(checks.RACES, "tiny", goals)
        rows = stats.table("tiny", records)
        cells = [row.split(" | ")[1:3] for row in rows.splitlines()[2:]]
        assert cells == [["1", "400"], [factor, "320"]]
    kept = path.read_text()
    edit(path, "4.2 4.8", "4.2 10.1")
    assert faults(record) == []
    path.write_text(kept)
    edit(path, "4.2 4.8", "4.2 x")
    refuses(call(stats, record), "timing.txt: damaged timing")


def test_a_published_referee_is_accepted_and_no_other(project, call, faults):
    def git(*arguments):
        author = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        subprocess.run(["git", *author, *arguments], cwd=project, check=True, capture_output=True)

    def key() -> str:
        return key_of(*[sha256((project / name).read_bytes()) for name in checks.REFEREE])

    def referees(*base) -> set:
        checks.referees.cache_clear()
        return checks.referees(project, *base)

    assert referees() == {key()}  # no repository: the working tree
    git("init", "-q", "-b", "main")
    published = set()
    for text in ("second", "third", "the racer's"):
        published.add(key())
        git("add", *checks.REFEREE)
        git("commit", "-q", "-m", text)
        (project / checks.REFEREE[-1]).write_text(text)
    git("switch", "-q", "-c", "idea")
    git("commit", "-q", "-a", "-m", "a record and its own referee")
    assert referees() == published and key() not in published and len(published) == 3
    assert faults(project / BETTER) == []  # it was refereed by the first
    edit(project / BETTER / "results.json", '("referee_sha256": ")[^"]*', rf"\g<1>{key()}")
    assert_starts(faults(project / BETTER), "results.json: referee")
    assert faults(project / BETTER, "--base", "idea") == []
    refuses(call(stats, project / BETTER, "--base", "other"), "no branch other", "--base")
    git("update-ref", "refs/remotes/origin/main", "idea")
    assert referees() == published | {key()}


def big(path: Path):
    path.touch()
    os.truncate(path, 600 * 2**20)


@pytest.mark.parametrize("kind", [os.mkfifo, os.mkdir, big])
def test_what_is_no_file_or_too_large_is_one_line(kind, project, call, faults):
    record = project / BETTER
    cause = "has more than 10,485,760 bytes" if kind is big else "is no plain file"
    for name in ("log_seed2.txt", "paired/log_seed2.txt", "results.json", "README.md"):
        (record / name).rename(project / "kept")
        kind(record / name)
        refuses(call(stats, record), name, cause)
        if kind is os.mkdir:
            (record / name).rmdir()
        (project / "kept").rename(record / name)
    (record / "samples.png").unlink()
    kind(record / "samples.png")
    assert_starts(faults(record), "samples.png:")


def test_a_picture_is_one_and_text_that_breaks_a_parser_is_one_line(project, faults, call):
    record = project / BETTER
    picture = (record / "samples.png").read_bytes()
    for content in (b"", b"no picture", picture[:-20], picture[:900] + b"!!" + picture[902:]):
        (record / "samples.png").write_bytes(content)
        assert_starts(faults(record), "samples.png:")
    edit(record / "results.json", '("protocol": )', r"\1" + "[" * 100_000)
    refuses(call(stats, record), "results.json: damaged results")
    edit(record / "log_seed1.txt", r"^\{.*", "[" * 100_000)
    refuses(call(stats, record), "log_seed1.txt is not a finished run's whole log")


def test_a_contract_for_show_is_refused_and_no_snapshot_is_run(project, monkeypatch):
    first = (ROOT / "records/cifar10-loss/2026-11-20_Muon/train_speedrun.py").read_bytes()
    source = (project / BETTER / "train_speedrun.py").read_bytes()
    in_a_string = b"TEXT = r'''\n" + first.replace(b"'''", b"") + b"'''\n"
    cases = [(in_a_string, "2026-11-20", "the first, of 2026-11-20, in a string")]
    cases += [(first, "2026-11-21", "one Track('cifar10', ...)")]
    for head in (b'count: int = open("ran", "w")', b'count: open("ran", "w")'):
        attack = source.replace(b"Track, count: int", b"Track, " + head)
        cases += [(attack, "2026-12-01", "contract: edited: ")]
    monkeypatch.chdir(project)
    for snapshot, date, line in cases:
        passed, found = snapshots.check_contract(snapshot, "cifar10", date)
        assert not passed and line in found
    assert not Path("ran").exists()


# Lines that a snapshot has and its predecessor lacks: shown to the reviewer, or not
REACHING = """
data = open("data/cifar10/val_000.safetensors")
with safe_open(DATA, "pt") as file:
if os.environ.get("CHEAT"):
return getattr(model, name)
from socket import create_connection
exec(code)
ｅｘｅｃ(code)
run = eval(text)
return ().__class__
"""
HARMLESS = """
important = opened + evaluate(executive)
x = model.forward(x)
"""


def test_lines_that_reach_outside_are_shown_to_the_reviewer(project, call):
    before = (project / FIRST / "train_speedrun.py").read_bytes()
    found = snapshots.reaching_lines(before + (HARMLESS + REACHING).encode(), before)
    wanted = unicodedata.normalize("NFKC", REACHING).strip().splitlines()
    assert [line.partition(": ")[2] for line in found] == wanted
    path = project / BETTER / "train_speedrun.py"
    path.write_bytes(path.read_bytes() + b"import socket  # \x1b[2J\n")
    out = call(stats, project / BETTER).stdout
    shown = r"^note not in 2026-11-01_First: line \d+: import socket  # \?\[2J$"
    assert re.search(shown, out, re.M) and "\x1b" not in out


def test_readme_gets_the_tables_of_valid_records_and_keeps_the_rest(project, call, monkeypatch):
    path, end = project / "README.md", b"<!-- /records -->"
    tables = [b"<!-- records:tiny -->", end, b"<!-- records:imagenet256 -->", end]
    text = b"# P\r\n%s\nold%s\n\n%s%s\n\xc2\xa0end" % tuple(tables)
    with monkeypatch.context() as patch:
        patch.setattr(stats, "load", lambda folder: series.parse_log("nothing"))
        for marker in tables:
            path.write_bytes(text.replace(marker, b"", 1))
            assert "README.md lacks a marker" in call(stats, "--readme").stderr
            assert path.read_bytes() == text.replace(marker, b"", 1)
    path.write_bytes(text)
    (project / "records/tiny/2026-12-04_Empty").mkdir()
    head = f"| # | images | val loss (mean ± sd, n) | what | date | seconds | log |\n{'|---' * 7}|"
    row = f"| 1 | 320 | 0.18905 ± 0.00029, 4 | [Better: a / b]({BETTER}) | 2026-12-01 | "
    row = f"\n{head}\n{row}100.0 on 1 x NVIDIA H200 | [log]({BETTER}/log_seed0.txt) |\n"
    wanted = text.replace(b"\nold", row.encode()).replace(b"256 -->", b"256 -->\nNo record yet.\n")
    for _ in range(2):  # again: the same
        done = call(stats, "--readme")
        assert done.returncode == 0 and path.read_bytes() == wanted
        skipped = re.findall(r"^stats.py: not in the table: \S+_(\w+): (.*)", done.stderr, re.M)
        assert [name for name, _ in skipped] == ["First", "Empty"] and "target" in skipped[0][1]
    monkeypatch.setattr("os.replace", lambda *_: project.read_bytes())
    done = call(stats, "--readme")
    assert done.returncode == 2 and "cannot write" in done.stderr
    assert path.read_bytes() == wanted and not [*project.glob("*.tmp")]


def test_the_curve_is_the_mean_of_the_seeds(project, call, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    figures = []
    save = figure.Figure.savefig

    def keep(self, *arguments, **options):
        figures.append(self)
        save(self, *arguments, **options)

    monkeypatch.setattr(figure.Figure, "savefig", keep)
    folder, picture = project / BETTER, project / "new/curve.png"
    edit(folder / "log_seed3.txt", "(train_time:|^train_time_s: )100", r"\g<1>140")
    assert call(stats, folder, folder / "log_seed3.txt", "--plot", picture).returncode == 0
    assert picture.read_bytes()[:4] == b"\x89PNG"
    for axis, x in zip(figures[0].axes, ((160, 320), (50, 110))):
        mean = next(line for line in axis.lines if line.get_label() == "2026-12-01_Better, 4")
        assert (*mean.get_xdata(), *mean.get_ydata()) == pytest.approx((*x, 0.20905, 0.18905))
        assert len(axis.lines) == 4 + 1 + 1 + 1 and mean.get_alpha() is None
        assert sum((line.get_alpha() or 1) < 0.5 for line in axis.lines) == 5
    edit(folder / "log_seed3.txt", "^(.*images:)160 val", r"\g<1>176 val")
    refuses(call(stats, folder, "--plot", picture), "no mean curve")
    results = json.loads((folder / "results.json").read_text())
    first, last = results["checkpoints"]
    results["metrics"]["KD-lite-2k"] = 9  # of the last checkpoint alone
    alone = results | {"checkpoints": [last]}  # refereed with --last: no curve
    for name, value in (("results.json", results), ("results_seed1.json", alone)):
        (folder / name).write_text(json.dumps(value))
    record = races_of.load(folder)
    wanted = [(point["images"], point["metrics"]["KD-lite-20"]) for point in (first, last)]
    assert [point[::2] for [*run] in stats.curves(record, "KD-lite-20") for point in run] == wanted
    assert [[x[::2] for x in run] for run in stats.curves(record, "KD-lite-2k")] == [[(320, 9)]] * 2
    command = [folder, "--plot", picture, "--metric"]
    refuses(call(stats, *command, "KD-lite-3k"), "no results have KD-lite-3k")
    (folder / "results.json").write_text(json.dumps(results | {"checkpoints": [{}]}))
    refuses(call(stats, *command, "KD-lite-20"), "damaged checkpoints")


def test_new_makes_a_folder_of_runs_that_are_one_series(base, project, call):
    """The base's record was made by it, and the checks accept that."""
    runs = [project / "logs" / f"Better_tiny_seed{seed}" for seed in range(4)]
    folder = project / "records/tiny/2026-12-02_New"
    for count in (3, 4):  # again, with one run more: what the racer wrote stays
        assert call(stats, "--new", folder, *runs[:count]).returncode == 0
        text = (folder / "README.md").read_text()
        (folder / "README.md").write_text("# New\n")
    logs = [f"log_seed{seed}.txt" for seed in range(4)]
    files = ["README.md", "curve.png", *logs, "results.json", "samples.png", "train_speedrun.py"]
    assert sorted(path.name for path in folder.iterdir()) == files and text == "# New\n"
    assert (folder / logs[3]).read_bytes() == (runs[3] / "log.txt").read_bytes()
    assert sorted(path.name for path in (base / BETTER / "paired").iterdir()) == logs
    refuses(call(stats, "--new", project / "x", *runs[1:]), "not one series with results")
    edit(runs[3] / "log.txt", "^import torch$", "import  torch")
    refuses(call(stats, "--new", project / "x/paired", *runs), "not one series")
    assert not (project / "x").exists()


# ---------------------------------------------------------------------------------------------
# compare.py
# ---------------------------------------------------------------------------------------------

CLOCK = "Clock.read = lambda self: {} * self.world.step\n"  # seconds: the same on every machine
SHAMPOO = """
def shampoo(rows, gradient, now, cfg):
    rows["weights"].sub_(1e-3 * gradient)
muon = adamw = shampoo
"""
BARE = "import contextlib\nrecord_function = contextlib.nullcontext\n"  # no annotations


def test_two_scripts_are_timed_in_turn_on_the_racers_data(tmp_path, monkeypatch, call):
    """Whatever their optimizers are called, and whether their steps are annotated or not."""
    a = racer(tmp_path / "a", extra=SHAMPOO + CLOCK.format(0.05))
    b = racer(tmp_path / "b", extra=BARE + CLOCK.format(0.1))
    for name in ("OMP_NUM_THREADS", "PYTHONPATH"):
        monkeypatch.setenv(name, ENV[name])
    monkeypatch.setattr(compare, "ROOT", a)
    monkeypatch.setattr(compare, "matmul_rate", lambda dtype: 1e12)
    options = ["--config", "tiny", "--rounds", "1", "--steps", "3", "--diff"]
    done = call(compare, a, f"{b / 'train_speedrun.py'}:batch_size=8", *options)
    assert done.returncode == 0, done.stderr
    out = done.stdout
    rounds = re.findall(r"^round 1: .*/([ab])\S*: (\S+) ms/step", out, re.M)
    assert rounds == [("a", "50.00"), ("b", "100.00")]
    assert "B trains 0.250 times as many images a second as A (rounds: 0.250 - 0.250)" in out
    speed_a, speed_b = re.findall(r"^\| [AB]: \S+ \| (.*) \|$", out, re.M)
    assert speed_a.startswith("50.00 (50.00 - 50.00) | 20.000 | 320.0 | ")
    assert speed_b.startswith("100.00 (100.00 - 100.00) | 10.000 | 80.0 | - | - | - | ")
    model = ts.Transformer(CONFIG, TRACK)
    with FlopCounterMode(display=False) as counter:
        ts.velocity(model, torch.zeros(4, 3, 8, 8), torch.zeros(4), torch.zeros(4, 16))
    gflops = float(speed_a.split(" | ")[3])  # of three forwards: nothing goes to the input
    assert gflops == pytest.approx(3 * counter.get_total_flops() / 4e9, rel=0.05)
    table = out.partition("Parts of a step")[2].splitlines()[2:6]
    names, _, parts_a, parts_b = ([cell.strip() for cell in row.split("|")[2:-1]] for row in table)
    assert " ".join(names) == "loader batch forward backward exchange shampoo rest step"
    times = [float(cell) for cell in parts_a]
    assert min(times) >= 0 and sum(times[:-1]) == pytest.approx(times[-1], abs=0.1)
    assert set(parts_b) == {"-"} and "\nB has no parts: its steps are not annotated" in out
    assert "+record_function = contextlib.nullcontext" in out
    assert "scripts: 3 lines only in B, 5 only in A" in out


def test_noise_has_the_tracks_form_and_trains(tmp_path, monkeypatch, capsys):
    """Where it is asked for, and where there is no data."""
    script = str(racer(tmp_path / "racer") / "train_speedrun.py")
    given = str(tmp_path / "racer" / "data")
    for name, track, data in (("b", ts.TRACKS["cifar10"], given), ("a", TRACK, "")):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        compare.place_data(track, data)
        assert Path("data", track.name).is_dir() and not Path("data", track.name).is_symlink()
    noise = load_file("data/tiny/train_000.safetensors")["latents"]
    assert (noise == 255).double().mean() > 0.1  # not wrapped around
    monkeypatch.setattr("sys.argv", [])
    assert compare.main(["--child", "parts", script, "tiny", "{'width': 16}", "4", ""]) == 0
    out = capsys.readouterr().out
    assert '"muon": ' in out.partition("\nparts: ")[2] and "2048 training images" in out


def annotation(name, start, length, thread=1) -> dict:
    return dict(cat="user_annotation", name=name, ts=start, dur=length, tid=thread)


def kernel(number, launched, start, length, thread=1) -> list:
    about = dict(tid=thread, args=dict(correlation=number))
    launch = dict(cat="cuda_runtime", name="launch", ts=launched, dur=1)
    return [launch | about, dict(cat="kernel", name="k", ts=start, dur=length) | about]


def test_parts_of_a_trace_are_the_hosts_or_what_the_device_did_for_them():
    events, device = [dict(ph="M", name="meta"), annotation("early", 1, 2)], []
    for start in (1000, 2000, 3000, 4000):
        events += [annotation("backward", start + 100, 200), annotation("forward", start, 100)]
        events += [annotation("inner", start + 5, 10), annotation("thread", start + 120, 5, 2)]
        events += [annotation("muon", start + 300, 100), annotation("step", start, 500)]
        device += kernel(start, start + 10, start + 500, 300)
        device += kernel(start + 1, start + 150, start + 800, 400, thread=9)  # autograd's
        device += kernel(start + 2, start + 350, start + 1200, 50)
        device += kernel(start + 3, start + 450, start + 1250, 7)  # in no part
    host = trace.average_parts(events, 2)
    assert host == dict(forward=0.1, backward=0.2, muon=0.1, rest=0.35, step=0.75)
    on_device = trace.average_parts(events + device, 2)
    wanted = dict(forward=0.3, backward=0.4, muon=0.05, rest=0.125, step=0.875)
    assert on_device == pytest.approx(wanted)
    assert kernels.kernel_rows(events + device, 2) == [pytest.approx((0.757, 4.0, "k"))]
    without = [event for event in events if event["name"] != "step"]
    assert trace.average_parts(without, 2) == trace.average_parts(events, 4) == {}


def test_the_report_is_arithmetic_of_what_was_measured(monkeypatch):
    options = argparse.Namespace(processes=2, config="tiny", rounds=2, steps=4, diff=False)
    parts = dict(forward=1.0, rest=0.5, step=1.5)
    both = dict(options=options, source="x\n")
    a = dict(name="a", seconds=[0.1, 0.2], images=16, flops=1e9, parts=parts, memory=7)
    b = dict(name="b", seconds=[0.05, 0.05], images=8, flops=0.0, parts={}, memory=8)
    ticks = iter(range(100))
    with monkeypatch.context() as patch:  # a product takes "one second"
        patch.setattr(compare, "now", lambda: next(ticks))
        patch.setattr(compare.torch, "randn", lambda *sizes, device: torch.zeros(2, 2))
        assert compare.matmul_rate(torch.float32) == 2 * 4096**3
    monkeypatch.setattr(compare, "matmul_rate", lambda dtype: 1e12)
    monkeypatch.setattr(compare, "machine", lambda device: "the CPU")
    text = compare.report([argparse.Namespace(**both, **side) for side in (a, b)], options)
    row_a = "| A: a | 150.00 (100.00 - 200.00) | 6.667 | 106.7 | 1 | 8 | 5.3% | 7 |\n"
    assert row_a + "| B: b | 50.00 (50.00 - 50.00) | 20.000 | 160.0 | - | - | - | 8 |\n" in text
    assert "B trains 1.500 times as many images a second as A (rounds: 1.000 - 2.000)" in text
    assert "| A | 1.00 | 0.50 | 1.50 |\n| B | - | - | - |\n" in text
    forms = ("H100 80GB HBM3", "H200 NVL", "H100 PCIe")
    assert [compare.stated_peak(f"NVIDIA {form}") for form in forms] == [989e12, 835e12, 756e12]
    assert text.startswith("2 x the CPU, ") and "scripts: 0 lines only in B, 0 only in A" in text


def test_what_a_gpu_did_stands_beside_the_model(tmp_path, capsys):
    text = Path(ROOT, "records/timing/preflight/cifar10_1x256_H100.txt").read_text()
    modelled = kernels.modelled_parts(text)
    assert modelled["step"] == pytest.approx(sum(modelled.values()) - modelled["step"], abs=0.1)
    lines = kernels.parts_beside(dict(forward=1.0, rest=2.0, odd=3.0), modelled).splitlines()
    assert f"| forward | 1.00 | {modelled['forward']:.2f} |" in lines
    assert "| muon | - | " in "".join(lines) and lines[-1] == "| odd | 3.00 | - |"
    for words in (["x", "--model", __file__], ["x", "--model", "none"], ["x"]):
        assert kernels.main(words) == 2
    assert re.fullmatch(
        "kernels.py: --model .*\n.* No such .*\n.* no GPU .*\n", capsys.readouterr().err
    )


BAD_ARGUMENTS = {
    "--steps 11": "--steps must be",
    "--steps 2": "--steps must be",
    "--steps 0": "--steps must be",
    "--rounds 0": "--rounds and --processes must be 1 or more",
    "--processes 0": "--rounds and --processes must be 1 or more",
    "--set width=x(": "'width=x(' is no change of a config",
    "--set batch_size=0": "'batch_size=0' is no change of a config",
    "--set batch_size=-8": "'batch_size=-8' is no change of a config",
}
# A script's last lines, and what is said of it
BAD_SCRIPTS = {
    "raise ValueError('no import')": "tiny: ValueError: no import",
    "sys.exit('I am gone')": "tiny: SystemExit: I am gone",
    "del CONFIGS": "tiny: AttributeError: module 'snapshot' has no attribute 'CONFIGS'",
    "CONFIGS.clear()": "tiny: KeyError: 'tiny'",
    "TRACKS.clear()": "tiny: KeyError: 'tiny'",
    "x = )": "tiny: SyntaxError",
}


def test_bad_arguments_are_one_line(tmp_path, monkeypatch, call):
    folder = racer(tmp_path)
    for words, cause in BAD_ARGUMENTS.items():
        done = call(compare, folder, folder, "--config", "tiny", *words.split())
        refuses(done, "compare.py: ", cause)
    refuses(call(compare, tmp_path / "none.py", folder), "none.py", "FileNotFoundError")
    commands = []

    def run(command, **_):
        commands.append(" ".join(command))
        if "flops" in command:
            return subprocess.CompletedProcess(command, 0, 'track: "tiny"\nflops: 1.0\n', "")
        error = "Traceback\ntrain_speedrun.py: the disk is full\nW1121 torchrun: noise\n"
        return subprocess.CompletedProcess(command, 2, "", error)

    monkeypatch.setattr(compare.subprocess, "run", run)
    options = ["--config", "tiny", "--processes", "2", "--set", "width=16"]
    refuses(call(compare, folder, folder, *options), "failed: train_speedrun.py: the disk is full")
    assert "distributed" not in commands[0] and "{'width': 16} 100" in commands[0]
    assert "-m torch.distributed.run --standalone --nproc_per_node=2" in commands[2]


def test_a_script_that_cannot_be_timed_is_one_line(tmp_path, monkeypatch, call):
    """Its process says what it can, and the comparison what became of that process."""
    folder = racer(tmp_path, extra="os._exit(0)")
    done = call(compare, folder, folder, "--config", "tiny")
    refuses(done, f"{folder} failed: it ended without a word of its flops")
    child = ["--child", "flops", folder / "train_speedrun.py", "tiny"]
    for extra, cause in BAD_SCRIPTS.items():
        racer(tmp_path, extra=extra)
        refuses(call(compare, *child, {}, 100, ""), "compare.py: ", cause)
    racer(tmp_path)
    refuses(call(compare, *child, {"nothing": 1}, 100, ""), "compare.py: ", "nothing")
    refuses(call(compare, *child[:3], "none", {}, 100, ""), "compare.py: ", "none: KeyError")
