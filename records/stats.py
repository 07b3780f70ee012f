"""ImageGen Speedrun: verifies records, compares them, and writes the README's tables of them.

    python records/stats.py records/<track>/<date>_<Name> [...]    folders, or single logs
      --against FOLDER      the predecessor, in place of the one that the record's README.md names
      --plot PATH.png       validation loss of all given, over images and over train seconds
      --readme              rewrites the tables of valid records in the project's README.md
    python records/stats.py --new records/<track>/<date>_<Name> logs/<run_id> [...]
                            makes the folder of a series: snapshot, logs, results, samples

A record's folder: README.md, train_speedrun.py (the snapshot), log_seed<k>.txt of seeds 0 .. n - 1,
the referee's results.json and samples.png of one (results_seed<k>.json of more). A README.md with
the line `Predecessor: <folder>` has a section `## paired` on paired/log_seed<k>.txt: the snapshot
with other numbers after `steps=`, for the predecessor's images. log.txt alone is an example.
Exit code: 0, 1 if a record is not valid, 2 on bad input.
"""

import argparse
import functools
import math
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data.common import UserError, key_of, read_contract, sha256, write_atomic  # noqa: E402
from eval_speedrun import CONTRACTS, REFEREE  # noqa: E402
from records.series import (  # noqa: E402
    NUMBERS,
    Record,
    Z,
    load_series,
    paired_test,
    parse_log,
    read,
    sd,
    target_test,
)


@dataclass(frozen=True)
class Target:
    """What a record of a track must reach, and in what it must beat its predecessor."""

    metric: str
    value: float | None  # at most; None = not fixed yet
    floor: float  # of sigma, however close the runs are to each other
    race: str  # what a record has less of than its predecessor
    gflops: float | None = None  # of one evaluation of one image, at most
    baseline: str | None = None  # the series whose mean, rounded to four digits, is the value


TARGET = {
    "cifar10": Target("val_loss", 0.2122, 0.0002, "images", 0.244, "2026-11-20_Bare-minimum"),
    "imagenet256": Target("FID-50k", 3.49, 0.02, "train_time_s"),
}
SEEDS = 4  # of a series, at least
LEVEL = 0.01  # of the paired test
MAX_NFE = 100
LOG_BYTES = 100 * 1024  # of which the script has 58 KB
FLAGS = (b"_inductor", b"TORCHINDUCTOR", b"max-autotune", b"coordinate_descent")
# The contract's section of the records of 2026-11-20, which was one text for all tracks.
FIRST_CONTRACT = "ddedf51b4feab0f345213192516f63a448cbac5b055147b2f0a559ed50c91f33"

# ---------------------------------------------------------------------------------------------
# Checks: (passed, what was found)
# ---------------------------------------------------------------------------------------------


def load(path) -> Record:
    """A record's folder, an example's, or a log. Raises UserError, as for a track without a target."""
    record = load_series(path)
    if record.track not in TARGET and record.title != "a log":
        names = ", ".join(TARGET)
        raise UserError(f"{path} is of the track {record.track!r}: there are {names}")
    return record


@functools.lru_cache
def referees(root: Path) -> set:
    """referee_sha256 of the working tree and of every commit, hashed as eval_speedrun does."""

    def git(*arguments) -> bytes:
        """What git prints; b"" where there is no git or no such file."""
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True).stdout

    working_tree = [read(root / file) for file in REFEREE if (root / file).is_file()]
    versions = [working_tree]
    for commit in git("log", "--format=%H", "--", *REFEREE).decode().split():
        versions.append([git("show", f"{commit}:./{file}") for file in REFEREE])
    keys = set()
    for contents in versions:
        keys.add(key_of(*[sha256(content) for content in contents if content]))
    return keys


def check_same(logs, *keys) -> tuple:
    """Each of these values is the same in all logs."""
    found = {key: sorted({log[key] for log in logs}) for key in keys}
    texts = [f"{key} {' and '.join(map(str, values))}" for key, values in found.items()]
    return all(len(values) == 1 for values in found.values()), ", ".join(texts)


def check_logs(logs, series: bool = True) -> list:
    """Of the logs of a series, or of one: what each must be, and what they must share."""
    genuine = all(sha256(log["source"]) == log["code_sha256"] for log in logs)
    clean = ("resumed", "graphs_compiled_on_the_clock", "trial")
    faults = [key for key in clean for log in logs if log[key]]
    fixed, text = check_same(logs, "steps", "images", *clean)
    largest = max(log["bytes"] for log in logs)
    size_text = f"size: {largest:,} bytes the largest log, at most {LOG_BYTES:,}"
    seeds = [log["seed"] for log in logs]
    runs = len({log["run_id"] for log in logs})
    seeds_text = f"seeds {seeds} of {runs} runs"
    if series:
        seeds_text += f"; wanted 0 .. n - 1, {SEEDS} or more"
    complete = seeds == list(range(runs)) and runs >= SEEDS
    same_config = check_same(logs, "config", "hyperparameters")[0]
    return [
        (genuine, f"source: {check_same(logs, 'code_sha256')[1]} is of the source in each log"),
        (fixed and not faults, f"final step: {text}"),
        (same_config, f"the same config: {logs[0]['config']}"),
        check_same(logs, "world_size", "parameters", "machine", "data_sha256"),
        (largest <= LOG_BYTES, size_text),
        (complete or not series, seeds_text),
    ]


def check_contract(source: bytes, track: str) -> tuple:
    """The snapshot's contract is its track's published one, or the one of the first records."""
    rule = b"# " + b"-" * 93 + b"\n"
    title = b"# Contract: do not edit for a record\n"
    section = source.partition(rule + title + rule)[2].partition(rule)[0]
    if sha256(section) == FIRST_CONTRACT:
        return True, "contract: the first, of 2026-11-20"
    try:
        found = read_contract(source.decode(errors="replace"), track).sha256
    except UserError as error:
        return False, f"contract: {error}"
    if found == CONTRACTS.get(track):
        return True, "contract: as published"
    return False, f"contract: edited: {found} is not that of {track}"


def check_results(record: Record, root: Path) -> list:
    """The referee's files are of different runs of the series and by published code."""
    logs = {log["run_id"]: log for log in record.logs}
    limit = TARGET[record.track].gflops
    code = sha256(record.source)
    checks = []
    for name, results in record.results.items():
        log = logs.pop(results.get("run_id"), {})
        rules = results["rules"]
        keys = ("seed", "config", "images", "parameters")
        same = log and rules.get("data_sha256") == log["data_sha256"]
        same = same and all(results.get(key) == log[key] for key in keys)
        logged = log.get("val_loss", math.nan)
        close = abs(results["val_loss"] - logged) <= 1e-3 * logged
        found_code = results.get("code_sha256")
        referee = results.get("referee_sha256")
        nfe = max(results["nfe"], *record.all("sampling_nfe"))
        light = limit is None or (results["gflops"] or math.nan) <= limit
        of_run = f"run {results.get('run_id')}, seed {results.get('seed')}"
        limit_text = f"at most {limit or '(not fixed yet)'}"
        found = [
            (same, f"{of_run}, is one of the logs, once"),
            (close, f"val_loss {results['val_loss']:.5f}, in the log {logged:.5f}"),
            (found_code == code, f"code_sha256 {found_code}, snapshot {code}"),
            (rules.get("contract") == "as published", f"contract {rules.get('contract')}"),
            (referee in referees(root), f"referee {referee}, in this repository or its history"),
            (nfe <= MAX_NFE, f"{nfe:g} network evaluations an image, at most {MAX_NFE}"),
            (light, f"{results['gflops']} GFLOP an evaluation, {limit_text}"),
        ]
        checks += [(passed, f"{name}: {text}") for passed, text in found]
    return checks


def target_values(record: Record) -> list:
    """The target's metric of every log, or of every results file; nan where it is missing."""
    metric = TARGET[record.track].metric
    if metric in NUMBERS:
        return record.all(metric)
    return [results["metrics"].get(metric) or math.nan for results in record.results.values()]


def check_target(record: Record) -> tuple:
    target = TARGET[record.track]
    values = target_values(record)
    if target.value is None:
        return True, f"target: no target fixed yet for {target.metric}"
    if record.folder.name == target.baseline:
        same = round(fmean(values), 4) == target.value
        return same, f"target: {target.value}, fixed by this series"
    bound, p, student = target_test(values, target.value, target.floor)
    text = (
        f"target: {target.metric} {fmean(values):.5f}, with {Z} sigma / sqrt(n) {bound:.5f}, "
        f"at most {target.value}; p {p:.2g}, Student's {student:.2g}"
    )
    return bound <= target.value, text


def check_paired(record: Record, before: Record) -> list:
    """Less of what the race counts; a lower loss at equal images, of paired/, else its own logs."""
    logs = record.paired or record.logs
    race = TARGET[record.track].race
    ideas = set()  # scripts but for the number of steps
    for log in logs + record.logs:
        ideas.add((re.sub(rb"\bsteps=[\d_]+", b"steps=", log["source"]), log["config"]))
    losses = {log["seed"]: log["val_loss"] for log in logs}
    previous = {log["seed"]: log["val_loss"] for log in before.logs}
    n, mean, spread, t, p = paired_test(losses, previous)
    test_text = (
        f"test: {n} seeds, of {len(record.paired)} logs in paired/: mean difference {mean:.5f}, "
        f"sd {spread:.5f}, t {t:.2f}, p {p:.2g}; wanted p < {LEVEL}"
    )
    cost = fmean(record.all(race))
    cost_before = fmean(before.all(race))
    fair = race == "images" or check_same(record.logs + before.logs, "hardware")[0]
    race_text = f"race: {cost:,.1f} {race} after {cost_before:,.1f}; comparable: {fair}"
    checks = check_logs(logs) + [
        (len(ideas) == 1, "source: the record's snapshot but for numbers after steps="),
        check_same(logs + before.logs, "images", "track", "data_sha256"),
        (n >= SEEDS and p < LEVEL, test_text),
        (cost < cost_before and fair, race_text),
    ]
    return [(passed, f"paired {text}") for passed, text in checks]


def check_record(record: Record, root: Path, against=None) -> list:
    """Everything that a machine can check. against: the predecessor's folder."""
    if record.title == "a log":
        return check_logs(record.logs, series=False)
    folder = record.folder
    track = folder.parent.name
    dated = re.fullmatch(r"\d{4}-\d\d-\d\d_.+", folder.name)
    placed = dated and (folder / "samples.png").is_file() and set(record.all("track")) == {track}
    original = all(log["source"] == record.source for log in record.logs)
    flags = ", ".join(flag.decode() for flag in FLAGS if flag in record.source)
    checks = check_logs(record.logs) + [
        (placed, f"folder: {track}/{folder.name} is <track>/<date>_<Name>, with samples.png"),
        (original, "snapshot: the source in every log"),
        check_contract(record.source, record.track),
        (not flags, f"compile flags: {flags or 'none'}"),
        *check_results(record, root),
        check_target(record),
    ]
    predecessor = re.search(r"^Predecessor:(.*)$", record.readme, re.M)
    if predecessor:
        section = re.search(r"(?im)^## paired", record.readme)
        checks.append((section, f"README.md: {predecessor[0]}, and a section '## paired'"))
        against = against or folder.parent / predecessor[1].strip(" `\r")
    else:
        baseline = TARGET[track].baseline if track in TARGET else None
        first = against or baseline in (None, folder.name)
        checks.append((first, "README.md: no predecessor"))
    return checks + (check_paired(record, load(against)) if against else [])


# ---------------------------------------------------------------------------------------------
# Text, tables, pictures, new folders
# ---------------------------------------------------------------------------------------------


def table(track: str, records: list) -> str:
    """Markdown of valid records in the order of their race: most images, or seconds, first."""
    if not records:
        return "No record yet."
    target = TARGET[track]
    metric = target.metric.replace("_", " ")
    rows = [f"| # | images | {metric} (mean ± sd, n) | what | date | seconds | log |"]
    rows.append("|---|---|---|---|---|---|---|")
    ordered = sorted(records, key=lambda record: -fmean(record.all(target.race)))
    for number, record in enumerate(ordered, 1):
        values = target_values(record)
        link = f"records/{track}/{record.folder.name}"
        heading = re.search(r"^#+ *(.*\S)", record.readme, re.M)
        what = heading[1].replace("|", "/") if heading else record.folder.name
        seconds = fmean(record.all("train_time_s"))
        log = record.logs[0]
        rows.append(
            f"| {number} | {log['images']:,} | {fmean(values):.5f} ± {sd(values):.5f}, "
            f"{len(values)} | [{what}]({link}) | {record.folder.name[:10]} | {seconds:,.1f} on "
            f"{log['hardware']} | [log]({link}/{log['path'].name}) |"
        )
    return "\n".join(rows)


def with_table(text: str, track: str, rows: str) -> str:
    """README.md's text with the track's table replaced. Raises UserError without both markers."""
    start = f"<!-- records:{track} -->"
    end = "<!-- /records -->"
    old = re.search(f"{start}((?!<!-- ).)*{end}", text, re.S)
    if not old:
        raise UserError(f"README.md lacks a marker: write the lines {start} and {end}")
    return text.replace(old[0], f"{start}\n{rows}\n{end}")


def write_readme(root: Path):
    """Both tables, of the records that pass every check; the others are named on standard error."""
    text = read(root / "README.md").decode()
    for track in TARGET:
        valid = []
        for folder in sorted((root / "records" / track).glob("[0-9]*_*/")):
            try:
                record = load(folder)
                faults = [found for passed, found in check_record(record, root) if not passed]
            except UserError as error:
                faults = [error]
            if faults:
                print(f"stats.py: not in the table: {folder.name}: {faults[0]}", file=sys.stderr)
            else:
                valid.append(record)
        text = with_table(text, track, table(track, valid))
    write_atomic(root / "README.md", lambda path: path.write_bytes(text.encode()))


def draw_curves(records: list, path: Path):
    """Validation loss over images and over train seconds: the mean of each, its seeds faint."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for column, label in enumerate(("images seen", "train seconds")):
        for number, record in enumerate(records):
            images = {tuple(point[0] for point in log["points"]) for log in record.logs}
            if len(images) > 1:
                raise UserError(f"{record.folder}: logs of different lengths have no mean curve")
            seeds = np.array(record.all("points"))[..., [column, 2]]  # (n, validations, 2)
            name = f"{record.folder.name}, {len(seeds)}"
            axes[column].plot(*seeds.T, f"C{number}", alpha=0.2, lw=0.8)
            axes[column].plot(*seeds.mean(0).T, f"C{number}.-", label=name)
        axes[column].set(xlabel=label, ylabel="validation loss")
        axes[column].grid(alpha=0.3)
    axes[1].legend(title="mean of n runs")
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png"))


def new_record(folder: Path, runs: list):
    """A record's folder (or its paired/, then logs alone) of finished runs. Raises UserError.

    One of the runs has been refereed: its files are the record's.
    """
    logs = [parse_log(Path(run, "log.txt")) for run in runs]
    refereed = [Path(run) for run in runs if Path(run, "results.json").is_file()]
    paired = folder.name == "paired"
    if len({log["source"] for log in logs}) > 1 or not (refereed or paired):
        raise UserError(
            "these runs are not one series with results: the same script for all, and "
            "python eval_speedrun.py on one of them"
        )
    copies = {f"log_seed{log['seed']}.txt": log["path"] for log in logs}
    if not paired:
        for name in ("train_speedrun.py", "results.json", "samples.png", "curve.png"):
            copies[name] = refereed[0] / name
    for name, source in copies.items():
        write_atomic(folder / name, functools.partial(Path.write_bytes, data=read(source)))
    if not paired and not (folder / "README.md").exists():
        lines = (
            "# The idea in a few words",
            "Predecessor: <folder>",
            "What it is, where it is from.",
        )
        (folder / "README.md").write_text("\n\n".join([*lines, "## paired\n"]))
    print(f"{folder}: {', '.join(sorted(copies))}")


def print_record(record: Record, against) -> bool:
    """Statistics and checks; whether all passed that count for what it is."""
    losses = record.all("val_loss")
    seconds = record.all("train_time_s")
    log = record.logs[0]
    print(f"{record.folder.name}: {record.title}; {log['machine']}; {log['images']:,} images")
    print(
        f"     n {len(losses)}, val_loss: mean {fmean(losses):.5f}, sd {sd(losses):.5f}, "
        f"min {min(losses)}, max {max(losses)}; "
        f"train_time_s: mean {fmean(seconds):.1f}, sd {sd(seconds):.1f}"
    )
    fault = "note" if record.title.startswith("an example") else "FAIL"
    valid = True
    for passed, text in check_record(record, ROOT, against):
        print(f"{'ok' if passed else fault:4} {text}")
        valid = valid and bool(passed or fault == "note")
    return valid


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", help="folders, records/<track>/<name>, or logs")
    parser.add_argument("--against", type=Path, help="the folder of the record they improve on")
    parser.add_argument("--plot", type=Path, help="the picture to write: PATH.png")
    parser.add_argument("--readme", action="store_true", help="rewrite the tables in README.md")
    parser.add_argument("--new", type=Path, help="the record's folder to make of runs, logs/<id>")
    arguments = parser.parse_args(argv)
    try:
        if not arguments.paths and not arguments.readme:
            raise UserError("give the folder of a record, records/<track>/<name>, or a log")
        if arguments.new:
            new_record(arguments.new, arguments.paths)
            return 0
        records = [load(path) for path in arguments.paths]
        valid = [print_record(record, arguments.against) for record in records]
        if arguments.plot:
            draw_curves(records, arguments.plot)
        if arguments.readme:
            write_readme(ROOT)
    except UserError as error:
        print(f"stats.py: {error}", file=sys.stderr)
        return 2
    return 0 if all(valid) else 1


if __name__ == "__main__":
    sys.exit(main())
