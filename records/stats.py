"""ImageGen Speedrun: verifies records, compares them, and writes the README's tables of them.

    python records/stats.py records/<track>/<date>_<Name> [...]    folders, or single logs
      --against FOLDER      the predecessor, in place of the one that the record's README.md names
      --base BRANCH         the published branch; a referee must be on it (origin/main, else main)
      --plot PATH.png       validation loss of all given, over images and over train seconds
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
from records.checks import (  # noqa: E402
    TARGET,
    check_record,
    load,
    load_predecessor,
    target_values,
)
from records.series import Record, parse_log, read, sd  # noqa: E402
from records.snapshots import reaching_lines  # noqa: E402

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


def write_readme(root: Path, base: str):
    """Both tables, of the records that pass every check; the others are named on standard error."""
    text = read(root / "README.md").decode()
    for track in TARGET:
        valid = []
        for folder in sorted((root / "records" / track).glob("[0-9]*_*/")):
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
            draw_curves(records, arguments.plot)
        if arguments.readme:
            write_readme(ROOT, arguments.base)
    except UserError as error:
        say(f"stats.py: {error}", sys.stderr)
        return 2
    return 0 if all(valid) else 1


if __name__ == "__main__":
    sys.exit(main())
