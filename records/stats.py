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
import argparse, functools, hashlib, json, math, re, subprocess, sys  # noqa: E401
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from eval_speedrun import UserError, key_of, write_atomic  # noqa: E402

# value: at most; floor: of sigma; gflops: of one evaluation of one image, at most; baseline: the
# series whose mean, rounded to four digits, is the value
TARGET = dict(
    cifar10=dict(metric="val_loss", value=0.2122, floor=0.0002, gflops=0.244,
                 baseline="2026-11-20_Bare-minimum"),
    imagenet256=dict(metric="FID-50k", value=3.49, floor=0.02, gflops=None, baseline=None))
RACE = dict(cifar10="images", imagenet256="train_time_s")        # what a record has less of
SEEDS, Z, LEVEL = 4, 2.326, 0.01     # at least; one-sided 1 %: of the target, of the paired test
MAX_NFE, LOG_BYTES = 100, 100 * 1024      # of a log 58 KB are the script
FLAGS = (b"_inductor", b"TORCHINDUCTOR", b"max-autotune", b"coordinate_descent")
REFEREE = ("eval_speedrun.py", "data/networks.py")
KINDS = dict.fromkeys("run_id config track code_sha256 data_sha256".split(), str) | dict.fromkeys(
    "seed resumed world_size steps images parameters sampling_nfe graphs_compiled_on_the_clock"
    .split(), int) | dict(val_loss=float, train_time_s=float)    # used of a log's last block

# ----- Logs and folders ---------------------------------------------------------------------------

class Record(NamedTuple):
    """A folder under records/<track>/, or a single log."""
    folder: Path
    kind: str             # "a record", "an example, no record" or "a log"
    logs: list            # of parse_log, by seed
    paired: list = ()     # the same
    source: bytes = b""   # train_speedrun.py
    results: dict = None  # {file name: what the referee wrote}
    readme: str = ""

    def all(self, key: str) -> list:
        """This value of every log."""
        return [log[key] for log in self.logs]

def read(path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as e:
        raise UserError(f"{path} is missing ({e.strerror}): give a record's whole folder, or a log")

def parse_log(path) -> dict:
    """What train_speedrun.py's `train` writes: KINDS, source, bytes, machine, hardware, trial, and
    points [(images, train seconds, val_loss)], hyperparameters. Raises UserError if not whole."""
    data = read(path)
    try:
        source, run, last = re.split(rb"^={100}\n", data, flags=re.M)
        header, machine, config, *_ = run.decode().split("\n")
        facts = dict(line.split(": ", 1) for line in last.decode().split("\n")[:-1])
        facts = {key: kind(facts[key]) for key, kind in KINDS.items()}
        points = [(int(images), int(ms) / 1000, float(loss)) for images, loss, ms in re.findall(
            r"^step:\S+ images:([1-9]\d*) val_loss:(\S+) train_time:(\d+)ms", run.decode(), re.M)]
        if points[-1][::2] != (facts["images"], facts["val_loss"]):
            raise ValueError(f"its last validation is {points[-1]}")
        return facts | dict(
            path=path, source=source, bytes=len(data), points=points, trial="no record" in header,
            machine=machine, hardware=machine.partition(", python ")[0],
            hyperparameters=json.dumps(json.loads(config)))
    except (ValueError, LookupError) as e:
        raise UserError(f"{path} is not a finished run's whole log ({e}): resume it or train again")

def load(path) -> Record:
    """A record's folder, an example's, or a log. Raises UserError."""
    if not Path(path).is_dir():
        return Record(Path(path), "a log", [parse_log(path)])
    path = Path(path).resolve()                                  # "." has a name too
    files = [*path.glob("log_seed*.txt")]
    logs, paired = (sorted(map(parse_log, some), key=lambda log: log["seed"])
                    for some in (files or [path / "log.txt"], path.glob("paired/log_seed*.txt")))
    if (track := logs[0]["track"]) not in TARGET:
        raise UserError(f"{path} is of the track {track!r}: there are {', '.join(TARGET)}")
    wanted = dict(val_loss=math.nan, nfe=math.nan, gflops=None, rules={}, metrics={})
    try:                                                         # what is missing fails the checks
        results = {file.name: wanted | json.loads(read(file)) for file in
                   sorted({path / "results.json", *path.glob("results*.json")})}
    except (ValueError, TypeError) as e:
        raise UserError(f"{path}: damaged results ({e}): run python eval_speedrun.py logs/<run_id>")
    return Record(path, "a record" if files else "an example, no record", logs, paired,
                  read(path / "train_speedrun.py"), results,
                  read(path / "README.md").decode(errors="replace"))

# ----- Statistics: functions of numbers -----------------------------------------------------------

def sd(values) -> float:
    """Sample standard deviation (ddof 1); 0 of one value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0

def t_tail(t: float, df: float) -> float:
    """P(T > t) of Student's t, within 1e-10 for 1 to 10,000 degrees of freedom: the integral of its
    density, which is that of sin(phi)^(df - 1) on [0, pi] with t = sqrt(df) / tan(phi)."""
    end = math.atan2(math.sqrt(df), t)                           # t = inf: 0
    y = np.sin(np.linspace(0, end, 20_001)) ** (df - 1)          # Simpson's rule
    total = end / 60_000 * (y[0] + y[-1] + 4 * y[1::2].sum() + 2 * y[2:-1:2].sum())
    return float(total * math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.pi ** 0.5)

def paired_test(mine: dict, its: dict) -> tuple:
    """(n, mean, sd, t, p) of mine - its, {seed: loss}, over the seeds of both. p is one-sided: that
    their mean is below 0 by chance."""
    d = [mine[seed] - its[seed] for seed in mine if seed in its]
    if (n := len(d)) < 2:
        return n, *[math.nan] * 4
    mean, error = fmean(d), sd(d) / math.sqrt(n)
    t = mean / error if error else math.copysign(math.inf, mean) if mean else 0.0
    return n, mean, sd(d), t, t_tail(-t, n - 1)

def target_test(values, target: float, floor: float) -> tuple:
    """(bound, p, Student's p) of runs below a target by chance, one-sided. The first p is normal,
    of sigma = max(sample sd, floor), as is the bound: mean + Z sigma / sqrt(n), <= target."""
    mean, error = fmean(values), max(sd(values), floor) / math.sqrt(len(values))
    p = math.erfc((target - mean) / error / math.sqrt(2)) / 2
    student = paired_test(dict(enumerate(values)), dict.fromkeys(range(len(values)), target))[-1]
    return mean + Z * error, p, student

# ----- Checks: (passed, what was found) -----------------------------------------------------------

def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()

def contract_of(source: bytes) -> bytes:
    """The text of the contract's section, as eval_speedrun.load_run finds it; b"" without one."""
    rule, title = b"# " + b"-" * 93 + b"\n", b"# Contract: do not edit for a record\n"
    return source.partition(rule + title + rule)[2].partition(rule)[0]

@functools.lru_cache
def referees(root: Path) -> set:
    """referee_sha256 of the working tree and of every commit, hashed as eval_speedrun.evaluate."""
    def git(command: str) -> bytes:                              # b"" where there is no git
        return subprocess.run(f"git {command}", shell=True, cwd=root, capture_output=True).stdout
    commits = git(f"log --format=%H -- {' '.join(REFEREE)}").decode().split()
    history = ([git(f"show {commit}:./{file}") for file in REFEREE] for commit in commits)
    return {key_of(*map(sha256, v)) for v in ([read(root / file) for file in REFEREE], *history)}

def alike(logs, *keys) -> tuple:
    """(whether each of these values is the same in all logs, the values as text)."""
    found = {key: sorted({log[key] for log in logs}) for key in keys}
    return (all(len(values) == 1 for values in found.values()),
            ", ".join(f"{key} {' and '.join(map(str, found[key]))}" for key in keys))

def check_logs(logs, series: bool = True) -> list:
    """Of the logs of a series, or of one: what each must be, and what they must share."""
    clean = ("resumed", "graphs_compiled_on_the_clock", "trial")
    fixed, text = alike(logs, "steps", "images", *clean)
    largest, seeds = max(log["bytes"] for log in logs), [log["seed"] for log in logs]
    runs = len({log["run_id"] for log in logs})
    return [
        (all(sha256(log["source"]) == log["code_sha256"] for log in logs),
         f"source: {alike(logs, 'code_sha256')[1]} is of the source in each log"),
        (fixed and not any(log[key] for log in logs for key in clean), f"final step: {text}"),
        (alike(logs, "config", "hyperparameters")[0], f"the same config: {logs[0]['config']}"),
        alike(logs, "world_size", "parameters", "machine", "data_sha256"),
        (largest <= LOG_BYTES, f"size: {largest:,} bytes the largest log, at most {LOG_BYTES:,}"),
        (not series or seeds == [*range(runs)] and runs >= SEEDS,
         f"seeds {seeds} of {runs} runs" + f"; wanted 0 .. n - 1, {SEEDS} or more" * series)]

def check_results(record: Record, root: Path) -> list:
    """The referee's files are of different runs of the series and by published code."""
    runs, checks = {log["run_id"]: log for log in record.logs}, []
    limit, code = TARGET[record.logs[0]["track"]]["gflops"], sha256(record.source)
    for name, r in record.results.items():
        log, rules, referee = runs.pop(r.get("run_id"), {}), r["rules"], r.get("referee_sha256")
        same = log and rules.get("data_sha256") == log["data_sha256"] and all(
            r.get(key) == log[key] for key in ("seed", "config", "images", "parameters"))
        loss, nfe = log.get("val_loss", math.nan), max(r["nfe"], *record.all("sampling_nfe"))
        checks += [(good, f"{name}: {text}") for good, text in (
            (same, f"run {r.get('run_id')}, seed {r.get('seed')}, is one of the logs, once"),
            (abs(r["val_loss"] - loss) <= 1e-3 * loss,
             f"val_loss {r['val_loss']:.5f}, in the log {loss:.5f}"),
            (r.get("code_sha256") == code, f"code_sha256 {r.get('code_sha256')}, snapshot {code}"),
            (rules.get("contract") == "as published", f"contract {rules.get('contract')}"),
            (referee in referees(root), f"referee {referee}, in this repository or its history"),
            (nfe <= MAX_NFE, f"{nfe:g} network evaluations an image, at most {MAX_NFE}"),
            (limit is None or (r["gflops"] or math.nan) <= limit,
             f"{r['gflops']} GFLOP an evaluation, at most {limit or '(not fixed yet)'}"))]
    return checks

def target_values(record: Record) -> list:
    """The target's metric of every log, or of every results file; nan where it is missing."""
    metric = TARGET[record.logs[0]["track"]]["metric"]
    return record.all(metric) if metric in KINDS else [
        r["metrics"].get(metric) or math.nan for r in record.results.values()]

def check_target(record: Record) -> tuple:
    rule, values = TARGET[record.logs[0]["track"]], target_values(record)
    metric, target = rule["metric"], rule["value"]
    if target is None:
        return True, f"target: no target fixed yet for {metric}"
    if record.folder.name == rule["baseline"]:
        return round(fmean(values), 4) == target, f"target: {target}, fixed by this series"
    bound, p, student = target_test(values, target, rule["floor"])
    return bound <= target, (f"target: {metric} {fmean(values):.5f}, with {Z} sigma / sqrt(n) "
                             f"{bound:.5f}, at most {target}; p {p:.2g}, Student's {student:.2g}")

def check_paired(record: Record, before: Record) -> list:
    """Less of what the race counts; a lower loss at equal images, of paired/, else its own logs."""
    logs, race = record.paired or record.logs, RACE[record.logs[0]["track"]]
    ideas = {(re.sub(rb"\bsteps=[\d_]+", b"steps=", log["source"]), log["config"])
             for log in logs + record.logs}                      # all but the number of steps
    n, mean, spread, t, p = paired_test(*(
        {log["seed"]: log["val_loss"] for log in some} for some in (logs, before.logs)))
    mine, its = fmean(record.all(race)), fmean(before.all(race))
    fair = race == "images" or alike(record.logs + before.logs, "hardware")[0]
    return [(good, f"paired {text}") for good, text in check_logs(logs) + [
        (len(ideas) == 1, "source: the record's snapshot but for numbers after steps="),
        alike(logs + before.logs, "images", "track", "data_sha256"),
        (n >= SEEDS and p < LEVEL, f"test: {n} seeds, of {len(record.paired)} logs in paired/: "
         f"mean difference {mean:.5f}, sd {spread:.5f}, t {t:.2f}, p {p:.2g}; wanted p < {LEVEL}"),
        (mine < its and fair, f"race: {mine:,.1f} {race} after {its:,.1f}; comparable: {fair}")]]

def check_record(record: Record, root: Path, against=None) -> list:
    """Everything that a machine can check. against: the predecessor's folder."""
    if record.kind == "a log":
        return check_logs(record.logs, series=False)
    folder, source, contract = record.folder, record.source, contract_of(record.source)
    place = re.fullmatch(r"\d{4}-\d\d-\d\d_.+", folder.name) and (folder / "samples.png").is_file()
    flags = ", ".join(flag.decode() for flag in FLAGS if flag in source)
    named = re.search(r"^Predecessor:(.*)$", record.readme, re.M)
    baseline = TARGET[folder.parent.name]["baseline"] if folder.parent.name in TARGET else None
    needed = not against and baseline not in (None, folder.name)
    before = against or named and folder.parent / named[1].strip(" `\r")
    return check_logs(record.logs) + [
        (place and {*record.all("track")} == {folder.parent.name},
         f"folder: {folder.parent.name}/{folder.name} is <track>/<date>_<Name>, with samples.png"),
        (all(log["source"] == source for log in record.logs), "snapshot: the source in every log"),
        (contract and contract == contract_of(read(root / "train_speedrun.py")),
         "contract: the snapshot's section is that of train_speedrun.py"),
        (not flags, f"compile flags: {flags or 'none'}"),
        *check_results(record, root), check_target(record),
        (re.search(r"(?im)^## paired", record.readme) if named else not needed,
         "README.md: " + (f"{named[0]}, and a section '## paired'" if named else "no predecessor")),
        *(check_paired(record, load(before)) if before else [])]

# ----- Text, table, picture -----------------------------------------------------------------------

def table(track: str, records: list) -> str:
    """Markdown of valid records in the order of their race: most images, or seconds, first."""
    metric = TARGET[track]["metric"].replace("_", " ")
    rows = [f"| # | images | {metric} (mean ± sd, n) | what | date | seconds | log |",
            "|---|---|---|---|---|---|---|"]
    for record in sorted(records, key=lambda record: -fmean(record.all(RACE[track]))):
        values, link = target_values(record), f"records/{track}/{record.folder.name}"
        what = re.search(r"^#+ *(.*\S)", record.readme, re.M) or [0, record.folder.name]
        rows.append(
            f"| {len(rows) - 1} | {record.all('images')[0]:,} | {fmean(values):.5f} ± "
            f"{sd(values):.5f}, {len(values)} | [{what[1].replace('|', '/')}]({link}) | "
            f"{record.folder.name[:10]} | {fmean(record.all('train_time_s')):,.1f} on "
            f"{record.all('hardware')[0]} | [log]({link}/{record.logs[0]['path'].name}) |")
    return "\n".join(rows) if records else "No record yet."

def with_table(text: str, track: str, rows: str) -> str:
    """README.md's text with the track's table replaced. Raises UserError without both markers."""
    start, end = f"<!-- records:{track} -->", "<!-- /records -->"
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
                why = [found for good, found in check_record(record, root) if not good]
                valid += [] if why else [record]
            except UserError as e:
                why = [e]
            if why:
                print(f"stats.py: not in the table: {folder.name}: {why[0]}", file=sys.stderr)
        text = with_table(text, track, table(track, valid))
    write_atomic(root / "README.md", lambda p: p.write_bytes(text.encode()))

def draw_curves(records: list, path: Path):
    """Validation loss over images and over train seconds: the mean of each, its seeds faint."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for column, axis in enumerate(figure.subplots(1, 2, sharey=True)):
        for i, record in enumerate(records):
            if len({tuple(point[0] for point in log["points"]) for log in record.logs}) > 1:
                raise UserError(f"{record.folder}: logs of different lengths have no mean curve")
            seeds = np.array([log["points"] for log in record.logs])[..., [column, 2]]  # (n, V, 2)
            axis.plot(*seeds.T, f"C{i}", alpha=0.2, lw=0.8)
            axis.plot(*seeds.mean(0).T, f"C{i}.-", label=f"{record.folder.name}, {len(seeds)}")
        axis.set(xlabel=("images seen", "train seconds")[column], ylabel="validation loss")
        axis.grid(alpha=0.3)
    axis.legend(title="mean of n runs")
    write_atomic(path, lambda p: figure.savefig(p, format="png"))

def new_record(folder: Path, runs: list):
    """A record's folder (or its paired/, then logs alone) of finished runs, one of them refereed.
    Raises UserError."""
    logs = [parse_log(Path(run, "log.txt")) for run in runs]
    refereed = [Path(run) for run in runs if Path(run, "results.json").is_file()]
    paired = folder.name == "paired"
    if len({log["source"] for log in logs}) > 1 or not (refereed or paired):
        raise UserError("these runs are not one series with results: the same script for all, and "
                        "python eval_speedrun.py on one of them")
    copies = {f"log_seed{log['seed']}.txt": log["path"] for log in logs}
    if not paired:
        copies |= {name: refereed[0] / name for name in (
            "train_speedrun.py", "results.json", "samples.png", "curve.png")}
    for name, source in copies.items():
        content = read(source)
        write_atomic(folder / name, lambda path: path.write_bytes(content))
    if not paired and not (folder / "README.md").exists():
        (folder / "README.md").write_text("# The idea in a few words\n\nPredecessor: <folder>\n\n"
                                          "What it is, where it is from.\n\n## paired\n")
    print(f"{folder}: {', '.join(sorted(copies))}")

# ----- Main ---------------------------------------------------------------------------------------

def main(argv=None) -> int:
    parser, failed = argparse.ArgumentParser(description=__doc__.splitlines()[0]), False
    parser.add_argument("paths", nargs="*", help="folders, records/<track>/<name>, or logs")
    parser.add_argument("--against", type=Path, help="the folder of the record they improve on")
    parser.add_argument("--plot", type=Path, help="the picture to write: PATH.png")
    parser.add_argument("--readme", action="store_true", help="rewrite the tables in README.md")
    parser.add_argument("--new", type=Path, help="the record's folder to make of runs, logs/<id>")
    args = parser.parse_args(argv)
    try:
        if not args.paths and not args.readme:
            raise UserError("give the folder of a record, records/<track>/<name>, or a log")
        if args.new:
            new_record(args.new, args.paths)
            return 0
        for record in (records := [load(path) for path in args.paths]):
            loss, seconds = record.all("val_loss"), record.all("train_time_s")
            print(f"{record.folder.name}: {record.kind}; {record.logs[0]['machine']}; "
                  f"{record.logs[0]['images']:,} images\n     n {len(loss)}, val_loss: mean "
                  f"{fmean(loss):.5f}, sd {sd(loss):.5f}, min {min(loss)}, max {max(loss)}; "
                  f"train_time_s: mean {fmean(seconds):.1f}, sd {sd(seconds):.1f}")
            fail = "note" if record.kind.startswith("an example") else "FAIL"
            for good, text in check_record(record, ROOT, args.against):
                print(f"{'ok' if good else fail:4} {text}")
                failed |= not good and fail == "FAIL"
        if args.plot:
            draw_curves(records, args.plot)
        if args.readme:
            write_readme(ROOT)
    except UserError as e:
        print(f"stats.py: {e}", file=sys.stderr)
        return 2
    return int(failed)

if __name__ == "__main__":
    sys.exit(main())
