"""ImageGen Speedrun: verifies records, compares them, and writes the README's tables of them.

    python records/stats.py records/<track>/<date>_<Name> [...]    folders, or single logs
      --against FOLDER      the predecessor, in place of the one that the record's README.md names
      --plot PATH.png       validation loss of all given, over images and over train seconds
      --readme              rewrites the tables of valid records in the project's README.md

A record's folder: README.md, train_speedrun.py (the snapshot), log_seed<k>.txt of seeds 0 .. n - 1,
the referee's results.json and samples.png of one of them (results_seed<k>.json of more). README.md
starts with a heading. Where it says `Predecessor: <folder>`, it has a section `## paired` on
paired/log_seed<k>.txt: the snapshot with other numbers at `steps=`, for the predecessor's images.
A single log.txt makes an example. Exit code: 0, 1 if a record is not valid, 2 on bad input.
"""
import argparse, hashlib, json, math, re, subprocess, sys  # noqa: E401
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import fmean, stdev

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from eval_speedrun import UserError, key_of, write_atomic  # noqa: E402

TARGET = dict(   # value: at most; floor: of sigma; gflops: of one evaluation of one image, at most
    cifar10=dict(metric="val_loss", value=None, floor=0.0002, gflops=None),
    imagenet256=dict(metric="FID-50k", value=3.49, floor=0.02, gflops=None))
RACE = dict(cifar10="images", imagenet256="train_time_s")        # what a record has less of
SEEDS, Z, LEVEL = 4, 2.326, 0.01     # at least; one-sided 1 %: of the target, of the paired test
MAX_NFE, LOG_BYTES = 100, 65 * 1024
FLAGS = (b"_inductor", b"TORCHINDUCTOR", b"max-autotune", b"coordinate_descent")
REFEREE = ("eval_speedrun.py", "data/networks.py")
KINDS = {name: kind for kind, names in {                         # used of a log's last block
    str: "run_id config track code_sha256 data_sha256", float: "val_loss train_time_s",
    int: "seed resumed world_size steps images parameters sampling_nfe graphs_compiled_on_the_clock"
}.items() for name in names.split()}

# ----- Logs and folders ---------------------------------------------------------------------------

@dataclass
class Log:
    """One finished run."""
    path: Path
    source: bytes         # of the script
    points: list          # (images, train seconds, val_loss) of every validation
    facts: dict           # by KINDS; machine, hyperparameters (JSON), size in bytes, trial

@dataclass
class Record:
    """A folder under records/<track>/, or a single log."""
    folder: Path
    kind: str             # "a record", "an example, no record" or "a log"
    logs: list            # by seed
    paired: list = ()     # the same
    source: bytes = b""   # train_speedrun.py
    results: dict = None  # {file name: what the referee wrote}
    readme: str = ""
    track: str = ""

    def all(self, key: str) -> list:
        """This fact of every log."""
        return [log.facts[key] for log in self.logs]

def read(path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror}): give a log, or a record's folder "
                        "with README.md, train_speedrun.py, log_seed<k>.txt and results.json")

def parse_log(path) -> Log:
    """Reads what train_speedrun.py's `train` writes. Raises UserError where it is not whole."""
    data = read(path)
    parts = re.split(rb"^={100}\n", data, flags=re.M)            # source, run, last block
    try:
        if len(parts) != 3 or not data.endswith(b"\n"):
            raise ValueError("cut off")
        run = parts[1].decode()
        header, machine, config, *_ = run.split("\n")
        facts = dict(line.split(": ", 1) for line in parts[2].decode().splitlines())
        facts = {key: kind(facts[key]) for key, kind in KINDS.items()} | dict(
            machine=machine, hyperparameters=config, size=len(data),
            trial="a trial, no record" in header)
        points = [(int(images), int(ms) / 1000, float(loss)) for images, loss, ms in re.findall(
            r"^step:\d+/\d+ images:(\d+) val_loss:(\S+) train_time:(\d+)ms", run, re.M)]
        if not points or not math.isfinite(facts["val_loss"]) or not json.loads(config):
            raise ValueError(f"{len(points)} validations, the last of {facts['val_loss']}")
        return Log(Path(path), parts[0], points, facts)
    except (ValueError, KeyError) as e:
        raise UserError(f"{path} is not the whole log of a finished run ({e}): finish the run with "
                        "RESUME=logs/<run_id>, or train it again")

def load_results(path) -> dict:
    """What the referee wrote. Raises UserError."""
    keys = "run_id seed config images parameters code_sha256 referee_sha256".split()
    try:
        r = json.loads(read(path))
        r["rules"].keys(), r["metrics"].keys(), [r[key] for key in keys]
        [float(x) for x in (r["val_loss"], r["nfe"], r.get("gflops") or 0)]
        return r
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{path} is not the referee's ({type(e).__name__}: {e}); run "
                        "python eval_speedrun.py logs/<run_id> and copy its results.json")

def load(path) -> Record:
    """A record's folder, an example's, or a log. Raises UserError."""
    path = Path(path).resolve()                                  # "." has a name too
    if not path.is_dir():
        return Record(path, "a log", [parse_log(path)])
    files = [*path.glob("log_seed*.txt")]
    logs, paired = (sorted(map(parse_log, some), key=lambda log: log.facts["seed"])
                    for some in (files or [path / "log.txt"], path.glob("paired/log_seed*.txt")))
    if (track := logs[0].facts["track"]) not in TARGET:
        raise UserError(f"{path} is of the track {track!r}: there are {', '.join(TARGET)}")
    results = sorted({path / "results.json", *path.glob("results*.json")})
    return Record(path, "a record" if files else "an example, no record", logs, paired,
                  read(path / "train_speedrun.py"), {p.name: load_results(p) for p in results},
                  read(path / "README.md").decode(errors="replace"), track)

# ----- Statistics: functions of numbers -----------------------------------------------------------

def sd(values) -> float:
    """Sample standard deviation (ddof 1); 0 of one value."""
    return stdev(values) if len(values) > 1 else 0.0

def t_tail(t: float, df: float) -> float:
    """P(T > t) of Student's t with df >= 1 degrees of freedom.

    With t = sqrt(df) / tan(phi) the density is proportional to sin(phi)^(df - 1) on [0, pi];
    Gauss-Legendre of its integral is within 1e-10 up to df = 10,000 (tested).
    """
    nodes, weights = np.polynomial.legendre.leggauss(200)
    end = math.atan2(math.sqrt(df), t)                           # t = inf: 0
    constant = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(math.pi)
    return float(constant * end / 2 * weights @ np.sin(end * (nodes + 1) / 2) ** (df - 1))

def t_test(values) -> tuple:
    """(t, one-sided p) of a mean that is above 0 by chance; nan of less than two values."""
    if (n := len(values)) < 2:
        return math.nan, math.nan
    mean, error = fmean(values), sd(values) / math.sqrt(n)
    t = mean / error if error else math.copysign(math.inf, mean) if mean else 0.0
    return t, t_tail(t, n - 1)

def target_test(values, target: float, floor: float) -> tuple:
    """(bound, p, Student's p) of runs against a target; the bound must not be above it.

    bound: mean + Z sigma / sqrt(n), sigma = max(sample sd, floor); p: one-sided, normal, of sigma.
    """
    mean, error = fmean(values), max(sd(values), floor) / math.sqrt(len(values))
    p = math.erfc((target - mean) / error / math.sqrt(2)) / 2
    return mean + Z * error, p, t_test([target - value for value in values])[1]

def paired_test(mine: dict, its: dict) -> tuple:
    """(n, mean, sd, t, p) of mine - its, {seed: loss}, over common seeds; p: lower by chance."""
    d = [mine[seed] - its[seed] for seed in sorted(mine.keys() & its.keys())]
    t, p = t_test([-x for x in d])
    return len(d), fmean(d) if d else math.nan, sd(d), -t, p

# ----- Checks: lists of (passed, what was found) --------------------------------------------------

def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()

def contract_of(source: bytes) -> bytes:
    """The text of the contract's section, as eval_speedrun.load_run finds it; b"" without one."""
    rule = b"# " + b"-" * 93 + b"\n"
    banner = rule + b"# Contract: do not edit for a record\n" + rule
    return source.partition(banner)[2].partition(rule)[0]

@lru_cache
def referees(root: Path) -> set:
    """referee_sha256 of the working tree and of every commit, hashed as eval_speedrun.evaluate."""
    def git(*args):
        return subprocess.run(["git", *args], cwd=root, capture_output=True)
    versions = [[read(root / file) for file in REFEREE]]
    try:
        for commit in git("log", "--format=%H", "--", *REFEREE).stdout.decode().split():
            shown = [git("show", f"{commit}:./{file}") for file in REFEREE]
            if not any(done.returncode for done in shown):       # both files are there
                versions.append([done.stdout for done in shown])
    except OSError:                                              # there is no git
        pass
    return {key_of(*map(sha256, version)) for version in versions}

def alike(logs, *keys) -> tuple:
    """(whether each of these facts is the same in all logs, their values as text)."""
    found = {key: sorted({log.facts[key] for log in logs}) for key in keys}
    return (all(len(values) == 1 for values in found.values()),
            ", ".join(f"{key} {' and '.join(map(str, found[key]))}" for key in keys))

def check_logs(logs) -> list:
    """What holds for the logs of one series, whatever their seeds."""
    clean = ("resumed", "graphs_compiled_on_the_clock", "trial")
    fixed, text = alike(logs, "steps", "images", *clean)
    setting, values = alike(logs, "world_size", "parameters", "machine", "data_sha256")
    config, largest = alike(logs, "config", "hyperparameters")[0], max(x.facts["size"] for x in logs)
    ends = all(x.points[-1][::2] == (x.facts["images"], x.facts["val_loss"]) for x in logs)
    return [
        (all(sha256(x.source) == x.facts["code_sha256"] for x in logs),
         f"source: {alike(logs, 'code_sha256')[1]} is of the source in each log"),
        (fixed and not any(x.facts[key] for x in logs for key in clean), f"final step: {text}"),
        (config and ends, f"one config: {config}; each ends with its logged loss: {ends}"),
        (setting, f"one setting: {values}"),
        (largest <= LOG_BYTES, f"size: {largest:,} bytes the largest log, at most {LOG_BYTES:,}")]

def check_seeds(logs) -> list:
    """No seed is left out or there twice."""
    seeds, runs = [x.facts["seed"] for x in logs], {x.facts["run_id"] for x in logs}
    named = all(x.path.name == f"log_seed{x.facts['seed']}.txt" for x in logs)
    good = seeds == [*range(len(logs))] and len(logs) >= SEEDS and len(runs) == len(logs) and named
    return [(good, f"series: seeds {seeds} of {len(runs)} runs, in log_seed<k>.txt: {named}; "
             f"wanted are {SEEDS} or more, from 0 without gaps")]

def check_results(record: Record, root: Path) -> list:
    """The referee's files are of different runs of the series and by published code."""
    runs, checks = {x.facts["run_id"]: x.facts for x in record.logs}, []
    limit, code = TARGET[record.track]["gflops"], sha256(record.source)
    for name, r in record.results.items():
        log, rules, gflops = runs.pop(r["run_id"], {}), r["rules"], r.get("gflops")
        ours = log and rules.get("data_sha256") == log["data_sha256"] and all(
            r[key] == log[key] for key in ("seed", "config", "images", "parameters"))
        loss, nfe = log.get("val_loss", math.nan), max(r["nfe"], *record.all("sampling_nfe"), 0)
        checks += [(good, f"{name}: {text}") for good, text in (
            (ours, f"run {r['run_id']}, seed {r['seed']}, is one of the logs"),
            (abs(r["val_loss"] - loss) <= 1e-3 * loss,
             f"val_loss {r['val_loss']:.5f}, in the log {loss:.5f}"),
            (r["code_sha256"] == code, f"code_sha256 {r['code_sha256']}, the snapshot's {code}"),
            (rules.get("contract") == "as published", f"contract {rules.get('contract')}"),
            (r["referee_sha256"] in referees(root),
             f"referee {r['referee_sha256']} is in this repository or its history"),
            (nfe <= MAX_NFE, f"{nfe:g} network evaluations an image, at most {MAX_NFE}"),
            (limit is None or gflops is not None and gflops <= limit,
             f"{gflops} GFLOP an evaluation, at most {limit or '(not fixed yet)'}"))]
    return checks

def target_values(record: Record) -> list:
    """The target's metric of every log, or of every results file; None where it is missing."""
    metric = TARGET[record.track]["metric"]
    return record.all(metric) if metric in KINDS else [
        r["metrics"].get(metric) for r in record.results.values()]

def check_target(record: Record) -> list:
    metric, target, floor, _ = TARGET[record.track].values()
    values = target_values(record)
    if None in values:
        return [(False, f"target: {metric} is missing in results, evaluate anew")]
    if target is None:
        return [(True, f"target: no target fixed yet for {metric}")]
    bound, p, student = target_test(values, target, floor)
    return [(bound <= target, f"target: {metric} {fmean(values):.5f} (n {len(values)}), with {Z} "
             f"sigma / sqrt(n) {bound:.5f}, at most {target}; p {p:.2g} (normal), {student:.2g} (t)")]

def check_paired(record: Record, before: Record) -> list:
    """Better than its predecessor at equal images, and less of what the race counts.

    By the logs in paired/, or the record's own where their images are the same.
    """
    wanted, race, name = before.all("images")[0], RACE[record.track], before.folder.name
    mine, its = fmean(record.all(race)), fmean(before.all(race))
    fair = race == "images" or hardware(record) == hardware(before)      # seconds are a machine's
    checks = [(mine < its and fair, f"fewer {race}: {mine:,g}, {name} {its:,g}, fair: {fair}")]
    own = not record.paired and record.all("images")[0] == wanted
    if not (logs := record.logs if own else record.paired):
        return checks + [(False, f"paired test: no paired/log_seed<k>.txt of {wanted:,} images")]

    def idea(log: Log) -> tuple:                                 # all but the number of steps
        return (re.sub(rb"\bsteps=[\d_]+", b"steps=", log.source), log.facts["config"],
                json.loads(log.facts["hyperparameters"]) | dict(steps=0))
    n, mean, spread, t, p = paired_test(*(
        {x.facts["seed"]: x.facts["val_loss"] for x in some} for some in (logs, before.logs)))
    equal, text = alike([*logs, *before.logs], "images", "track", "data_sha256")
    return checks + [(good, f"paired {text}") for good, text in check_logs(logs) + check_seeds(logs)
                     + [(all(idea(log) == idea(record.logs[0]) for log in logs),
                         "snapshot: the record's but for numbers after steps="),
                        (equal, f"with {name}: {text}"),
                        (n >= SEEDS and p < LEVEL,
                         f"test: {n} seeds, mean difference {mean:.5f}, sd {spread:.5f}, "
                         f"t {t:.2f}, p {p:.2g}; {SEEDS} seeds and p < {LEVEL} are needed")]]

def check_record(record: Record, root: Path, against=None) -> list:
    """Everything that a machine can check. against: the predecessor's folder."""
    if record.kind == "a log":
        return check_logs(record.logs)
    folder, source, contract = record.folder, record.source, contract_of(record.source)
    place = re.fullmatch(r"\d{4}-\d\d-\d\d_.+", folder.name) and (folder / "samples.png").is_file()
    flags = ", ".join(flag.decode() for flag in FLAGS if flag in source)
    named = re.search(r"^Predecessor:(.*)$", record.readme, re.M)
    before = against or named and folder.parent / named[1].strip(" `\r")
    checks = check_logs(record.logs) + check_seeds(record.logs) + [
        (place and {*record.all("track")} == {folder.parent.name},
         f"folder: {folder.parent.name}/{folder.name} is <track>/<YYYY-MM-DD>_<Name>, samples.png"),
        (all(x.source == source for x in record.logs), "snapshot: the source in every log"),
        (contract and contract == contract_of(read(root / "train_speedrun.py")),
         "contract: the snapshot's section is that of train_speedrun.py"),
        (not flags, f"compile flags: {flags or 'none'}")]
    checks += check_results(record, root) + check_target(record)
    if named:
        checks.append((re.search(r"(?im)^## paired", record.readme), "README.md has '## paired'"))
    return checks + (check_paired(record, load(before)) if before else [])

# ----- Text, table, picture -----------------------------------------------------------------------

def hardware(record: Record) -> str:
    """The machine without the versions of its software."""
    return record.logs[0].facts["machine"].partition(", python ")[0]

def describe(record: Record) -> str:
    loss, seconds = record.all("val_loss"), record.all("train_time_s")
    return (f"{record.folder.name}: {record.kind}\n     val_loss: n {len(loss)}, mean "
            f"{fmean(loss):.5f}, sd {sd(loss):.5f}, min {min(loss):.5f}, max {max(loss):.5f}\n"
            f"     {record.all('images')[0]:,} images; train_time_s: mean {fmean(seconds):.1f}, "
            f"sd {sd(seconds):.1f}; {record.logs[0].facts['machine']}")

def table(track: str, records: list) -> str:
    """Markdown of valid records in the order of their race: most images, or seconds, first."""
    metric, lines = TARGET[track]["metric"].replace("_", " "), []
    for record in sorted(records, key=lambda record: -fmean(record.all(RACE[track]))):
        values, link = target_values(record), f"records/{track}/{record.folder.name}"
        what = re.search(r"^#+ *(.*\S)", record.readme, re.M)
        what = what[1].replace("|", "\\|") if what else record.folder.name
        lines.append(
            f"| {len(lines) + 1} | {record.all('images')[0]:,} | {fmean(values):.5f} ± "
            f"{sd(values):.5f}, {len(values)} | [{what}]({link}) | {record.folder.name[:10]} | "
            f"{fmean(record.all('train_time_s')):,.1f} on {hardware(record)} | "
            f"[log]({link}/{record.logs[0].path.name}) |")
    return "\n".join([f"| # | images | {metric} (mean ± sd, n) | what | date | seconds | log |",
                      "|---|---|---|---|---|---|---|", *lines] if lines else ["No record yet."])

def with_table(text: str, track: str, rows: str) -> str:
    """README.md's text with the track's table replaced. Raises UserError without both markers."""
    start, end = f"<!-- records:{track} -->", "<!-- /records -->"
    head, _, rest = text.partition(start)
    inside, found, tail = rest.partition(end)
    if not found or "<!-- records:" in inside:
        raise UserError(f"README.md lacks a marker: write the lines {start} and {end}")
    return f"{head}{start}\n{rows}\n{end}{tail}"

def valid_records(root: Path, track: str) -> list:
    """The records of a track that pass every check. Others are named on standard error."""
    records = []
    for folder in sorted((root / "records" / track).glob("*/")):
        try:
            record = load(folder)
            wrong = [text for good, text in check_record(record, root) if not good]
            why = wrong[0] if record.kind == "a record" and wrong else record.kind
        except UserError as e:
            why = e
        if why == "a record":
            records.append(record)
        else:
            print(f"stats.py: left out of the table: {folder.name}: {why}", file=sys.stderr)
    return records

def write_readme(root: Path):
    """Both tables, at once or not at all. Raises UserError."""
    text = read(root / "README.md").decode()
    for track in TARGET:
        text = with_table(text, track, table(track, valid_records(root, track)))
    write_atomic(root / "README.md", lambda p: p.write_bytes(text.encode()))

def draw_curves(records: list, path: Path):
    """Validation loss over images and over train seconds: the mean of each, its seeds faint."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for i, record in enumerate(records):
        seeds = np.array([log.points for log in record.logs])    # (n, validations, 3)
        for points, style in [(seeds.mean(0), dict(
                label=f"{record.folder.name}, n = {len(seeds)}", marker="o", ms=3)),
                *((points, dict(alpha=0.2, lw=0.8)) for points in seeds)]:
            for axis, x in zip(axes, points.T):
                axis.plot(x, points[:, 2], c=f"C{i}", **style)
    for axis, label in zip(axes, ("images seen", "train seconds")):
        axis.set(xlabel=label, ylabel="validation loss")
        axis.label_outer()
        axis.grid(alpha=0.3)
    axes[1].legend()
    write_atomic(path, lambda p: figure.savefig(p, format="png"))
    plt.close(figure)

# ----- Main ---------------------------------------------------------------------------------------

def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add, status = parser.add_argument, 0
    add("paths", nargs="*", help="folders of records, records/<track>/<name>, or logs")
    add("--against", type=Path, help="the folder of the record that they improve on")
    add("--plot", type=Path, help="the picture to write: PATH.png")
    add("--readme", action="store_true", help="rewrite the tables in README.md")
    args = parser.parse_args(argv)
    try:
        if not args.paths and (args.plot or args.against or not args.readme):
            raise UserError("give the folder of a record, records/<track>/<name>, or a log")
        records = [load(path) for path in args.paths]
        for record in records:
            print(describe(record))
            fail = "note" if record.kind.startswith("an example") else "FAIL"
            for good, text in check_record(record, ROOT, args.against):
                print(f"{'ok' if good else fail:4} {text}")
                status = 1 if not good and fail == "FAIL" else status
        if args.plot:
            draw_curves(records, args.plot)
        if args.readme:
            write_readme(ROOT)
    except UserError as e:
        print(f"stats.py: {e}", file=sys.stderr)
        return 2
    return status

if __name__ == "__main__":
    sys.exit(main())
