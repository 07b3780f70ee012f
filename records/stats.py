"""ImageGen Speedrun: verifies records, compares them, and writes the README's tables of them.

    python records/stats.py records/<track>/<date>_<Name> [...]    folders, or single logs
      --against FOLDER      the predecessor, in place of the one that the record's README.md names
      --base BRANCH         the published branch; a referee must be on it (origin/main, else main)
      --plot PATH.png       a curve of all given, over images and over train seconds, of the
      --metric NAME         validation loss, or of a metric of their results.json
      --readme              rewrites the tables of valid records in the project's README.md
    python records/stats.py --new records/<track>/<date>_<Name> logs/<run_id> [...]
                            makes the folder of a series: snapshot, logs, results, samples

A record's folder: README.md, train_speedrun.py (the snapshot), log_seed<k>.txt of seeds 0 .. n - 1,
the referee's results.json and samples.png of one (results_seed<k>.json of more). A README.md with
the line `Predecessor: <folder>` has a section `## paired` on paired/log_seed<k>.txt: the snapshot
with other numbers after `steps=`, for the predecessor's images. log.txt alone is an example.
"note" is for the reviewer's eyes, who has more to do: see records/README.md.
Exit code: 0, 1 if a record is not valid, 2 on bad input.
"""

import argparse
import functools
import re
import sys
from pathlib import Path
from statistics import fmean

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data.common import UserError, write_atomic  # noqa: E402
from records.checks import check_record  # noqa: E402
from records.races import (  # noqa: E402
    RACES,
    TIMING,
    goal_values,
    load,
    load_predecessor,
    reaches_target,
    times_faster,
)
from records.series import Record, parse_log, read, sd  # noqa: E402
from records.snapshots import reaching_lines  # noqa: E402

# ---------------------------------------------------------------------------------------------
# Text, tables, pictures, new folders
# ---------------------------------------------------------------------------------------------


def table(name: str, records: list) -> str:
    """Markdown of a race's valid records, the slowest, or of most images or seconds, first."""
    if not records:
        return "No record yet."
    race = RACES[name]
    by_time = race.cost == TIMING
    goals = [goal for goal in race.goals if not goal.metric.startswith("copies")]
    titles = [f"{goal.metric.replace('_', ' ')} (mean ± sd, n)" for goal in goals]
    titles = ["#", *["times faster"] * by_time, "images", *titles, "what", "date", "seconds", "log"]
    rows = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    if by_time:
        start = next((x for x in records if x.folder.name == race.baseline), None)
        more = ">= " if start and not reaches_target(start) else ""  # it had to train longer
        ordered = sorted(records, key=lambda x: (x.folder.name != race.baseline, times_faster(x)))
    else:
        ordered = sorted(records, key=lambda record: -fmean(record.all(race.cost)))
    for number, record in enumerate(ordered, 1):
        link = f"records/{name}/{record.folder.name}"
        heading = re.search(r"^#+ *(.*\S)", record.readme, re.M)
        what = heading[1].replace("|", "/") if heading else record.folder.name
        log = record.logs[0]
        cells = [str(number)]
        if by_time:
            factor = times_faster(record)
            cells.append("1" if factor == 1 else f"{more}{factor:.2f}")
        cells.append(f"{log['images']:,}")
        for goal in goals:
            values = goal_values(record, goal)
            digits = 1 if fmean(values) > 10 else 3 if by_time else 5
            cells.append(f"{fmean(values):.{digits}f} ± {sd(values):.{digits}f}, {len(values)}")
        cells += [f"[{what}]({link})", record.folder.name[:10]]
        cells.append(f"{fmean(record.all('train_time_s')):,.1f} on {log['hardware']}")
        cells.append(f"[log]({link}/{log['path'].name})")
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def with_table(text: str, name: str, rows: str) -> str:
    """README.md's text with the race's table replaced. Raises UserError without both markers."""
    start = f"<!-- records:{name} -->"
    end = "<!-- /records -->"
    old = re.search(f"{start}((?!<!-- ).)*{end}", text, re.S)
    if not old:
        raise UserError(f"README.md lacks a marker: write the lines {start} and {end}")
    return text.replace(old[0], f"{start}\n{rows}\n{end}")


def write_readme(root: Path, base: str):
    """The tables, of the records that pass every check; the others are named on standard error.

    That of a race with a README.md of its own is there.
    """
    texts = {}  # of each file: all of them are whole before the first is written
    for name in RACES:
        valid = []
        for folder in sorted((root / "records" / name).glob("[0-9]*_*/")):
            try:
                record = load(folder)
                checks = check_record(record, root, load_predecessor(record), base)
                faults = [found for passed, found in checks if not passed]
            except UserError as error:
                faults = [error]
            if faults:
                say(f"stats.py: not in the table: {folder.name}: {faults[0]}", sys.stderr)
            else:
                valid.append(record)
        path = root / "records" / name / "README.md"
        rows = table(name, valid)
        if path.exists():
            rows = rows.replace(f"](records/{name}/", "](")
        else:
            path = root / "README.md"
        text = texts.get(path) or read(path).decode()
        texts[path] = with_table(text, name, rows)
    for path, text in texts.items():
        write_atomic(path, functools.partial(Path.write_bytes, data=text.encode()))


def curves(record: Record, metric: str) -> list:
    """[(images, train seconds, value)] of each run: the logs' loss, or of each refereed run.

    A metric of the last checkpoint alone is one point. Runs that were refereed with --last have a
    shorter curve than others, and are left out then.
    """
    if metric == "val_loss":
        return record.all("points")
    try:
        runs = [points_of(results, metric) for results in record.results.values()]
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(f"{record.folder}: its results have damaged checkpoints ({error!r})")
    longest = max(map(len, runs), default=0)
    if not longest:
        raise UserError(f"{record.folder}: no results have {metric}")
    return [run for run in runs if len(run) == longest]


def points_of(results: dict, metric: str) -> list:
    """[(images, train seconds, value)] of one refereed run."""
    found = [(point, point["metrics"].get(metric)) for point in results["checkpoints"]]
    if found and all(value is None for _, value in found):
        found = [(found[-1][0], results["metrics"].get(metric))]
    points = [(point["images"], point["seconds"], value) for point, value in found]
    return [tuple(map(float, point)) for point in points if point[2] is not None]


def draw_curves(records: list, metric: str, path: Path):
    """A metric over images and over train seconds: the mean of each record, its seeds faint."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for column, label in enumerate(("images seen", "train seconds")):
        for number, record in enumerate(records):
            runs = curves(record, metric)
            if len({tuple(point[0] for point in run) for run in runs}) > 1:
                raise UserError(f"{record.folder}: runs of different lengths have no mean curve")
            seeds = np.array(runs)[..., [column, 2]]  # (n, checkpoints, 2)
            name = f"{record.folder.name}, {len(seeds)}"
            axes[column].plot(*seeds.T, f"C{number}", alpha=0.2, lw=0.8)
            axes[column].plot(*seeds.mean(0).T, f"C{number}.-", label=name)
        axes[column].set(xlabel=label, ylabel=metric.replace("val_loss", "validation loss"))
        axes[column].grid(alpha=0.3)
    axes[1].legend(title="mean of n runs")
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png"))


def new_record(folder: Path, runs: list):
    """A record's folder (or its paired/, then logs alone) of finished runs. Raises UserError.

    The files of the first run that has been refereed are the record's, of others their results.
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
        for run in refereed[1:]:
            seed = parse_log(run / "log.txt")["seed"]
            copies[f"results_seed{seed}.json"] = run / "results.json"
    for name, source in copies.items():
        write_atomic(folder / name, functools.partial(Path.write_bytes, data=read(source)))
    if not paired and not (folder / "README.md").exists():
        lines = (
            "# The idea in a few words",
            "Predecessor: <folder>",
            "What it is, where it is from.",
        )
        (folder / "README.md").write_text("\n\n".join(lines) + "\n")
    print(f"{folder}: {', '.join(sorted(copies))}")


def say(text: str, file=None):
    """Prints a line, without what a stranger's text may do to the terminal that shows it."""
    print("".join(letter if letter.isprintable() else "?" for letter in text[:1000]), file=file)


def print_notes(record: Record, before: Record | None):
    """What only eyes can judge: the snapshot's new lines that reach for something outside it."""
    if not before:
        return say("note no predecessor: read the whole snapshot")
    for line in reaching_lines(record.source, before.source):
        say(f"note not in {before.folder.name}: {line}")


def print_record(record: Record, against: Path | None, base: str) -> bool:
    """Statistics and checks; whether all passed that count for what it is."""
    losses = record.all("val_loss")
    seconds = record.all("train_time_s")
    log = record.logs[0]
    say(f"{record.folder.name}: {record.title}; {log['machine']}; {log['images']:,} images")
    say(
        f"     n {len(losses)}, val_loss: mean {fmean(losses):.5f}, sd {sd(losses):.5f}, "
        f"min {min(losses)}, max {max(losses)}; "
        f"train_time_s: mean {fmean(seconds):.1f}, sd {sd(seconds):.1f}"
    )
    fault = "note" if record.title.startswith("an example") else "FAIL"
    valid = True
    before = load_predecessor(record, against)
    for passed, text in check_record(record, ROOT, before, base):
        say(f"{'ok' if passed else fault:4} {text}")
        valid = valid and bool(passed or fault == "note")
    if record.source:
        print_notes(record, before)
    return valid


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", help="folders, records/<track>/<name>, or logs")
    parser.add_argument("--against", type=Path, help="the folder of the record they improve on")
    parser.add_argument("--base", default="", help="the published branch: origin/main, else main")
    parser.add_argument("--plot", type=Path, help="the picture to write: PATH.png")
    parser.add_argument("--metric", default="val_loss", help="of --plot")
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
        valid = [print_record(record, arguments.against, arguments.base) for record in records]
        if arguments.plot:
            draw_curves(records, arguments.metric, arguments.plot)
        if arguments.readme:
            write_readme(ROOT, arguments.base)
    except UserError as error:
        say(f"stats.py: {error}", sys.stderr)
        return 2
    return 0 if all(valid) else 1


if __name__ == "__main__":
    sys.exit(main())
