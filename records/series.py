"""A series of runs as it lies in a record's folder, and the statistics of its numbers.

What the folder holds is said in records/stats.py; records/checks.py checks it. A folder is a
stranger's: whatever lies there in place of a file is one line, and no file is read without a limit.
"""

import json
import math
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.common import UserError  # noqa: E402

# What is used of a log's last block.
TEXTS = ["run_id", "config", "track", "code_sha256", "data_sha256"]
COUNTS = ["seed", "resumed", "world_size", "steps", "images", "parameters", "sampling_nfe"]
COUNTS += ["graphs_compiled_on_the_clock"]
NUMBERS = ["val_loss", "train_time_s"]
FIRST_LINE = r"(?:.*/)?(.+): seed (\d+), "  # after the source: the run's folder, its seed
STEP_LINE = r"^step:(\d+)/(\d+) images:(\d+) (\w+):(\S+) train_time:(\d+)ms"
READ_BYTES = 10 * 2**20  # of any file: a log has 61 KB, a picture 300 KB

Z = 2.326  # one-sided 1 %, of a target

# ---------------------------------------------------------------------------------------------
# Logs and folders
# ---------------------------------------------------------------------------------------------


class Line(NamedTuple):
    """A step's line in a log."""

    step: int
    steps: int  # of the whole run
    images: int
    name: str  # "train_loss" or "val_loss"
    loss: float
    milliseconds: int  # on the clock

    @property
    def validates(self) -> bool:
        return self.name == "val_loss" and self.images > 0


@dataclass
class Record:
    """A folder under records/<track>/, or a single log."""

    folder: Path
    title: str  # "a record", "an example, no record" or "a log"
    logs: list  # of parse_log, by seed
    paired: list = field(default_factory=list)  # the same
    source: bytes = b""  # train_speedrun.py
    results: dict = field(default_factory=dict)  # {file name: what the referee wrote}
    readme: str = ""
    timing: dict = field(default_factory=dict)  # what compare.py --race wrote

    @property
    def track(self) -> str:
        return self.logs[0]["track"]

    def all(self, key: str) -> list:
        """This value of every log."""
        return [log[key] for log in self.logs]


def read(path) -> bytes:
    """A plain file's content. Raises UserError for a fifo, a folder, or more than READ_BYTES."""
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise UserError(f"{path} is no plain file: give a record's whole folder, or a log")
        with open(path, "rb") as file:
            content = file.read(READ_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", error)
        raise UserError(f"{path} is missing ({reason}): give a record's whole folder, or a log")
    if len(content) > READ_BYTES:
        raise UserError(f"{path} has more than {READ_BYTES:,} bytes: give what the tools wrote")
    return content


def parse_lines(run: str) -> list[Line]:
    """The step lines of a log. Raises ValueError where a number is none."""
    lines = []
    for step, steps, images, name, loss, milliseconds in re.findall(STEP_LINE, run, re.M):
        line = Line(int(step), int(steps), int(images), name, float(loss), int(milliseconds))
        lines.append(line)
    return lines


def parse_log(path) -> dict:
    """What train_speedrun.py wrote of a whole run. Raises UserError if it is not whole.

    The facts of its last block and: path, source, bytes, machine, hardware, trial, hyperparameters,
    lines, points [(images, train seconds, val_loss)], stated (run id, seed) by the first line.
    """
    content = read(path)
    try:
        source, middle, last_block = re.split(rb"^={100}\n", content, flags=re.M)
        run = middle.decode()
        header, machine, config = run.split("\n")[:3]
        facts = dict(line.split(": ", 1) for line in last_block.decode().split("\n")[:-1])
        log = {key: facts[key] for key in TEXTS}
        log |= {key: int(facts[key]) for key in COUNTS}
        log |= {key: float(facts[key]) for key in NUMBERS}
        lines = parse_lines(run)
        validations = [line for line in lines if line.validates]
        points = [(line.images, line.milliseconds / 1000, line.loss) for line in validations]
        if (points[-1][0], points[-1][2]) != (log["images"], log["val_loss"]):
            raise ValueError(f"its last validation is {points[-1]}")
        log |= {"path": Path(path), "source": source, "bytes": len(content), "points": points}
        log |= {"machine": machine, "hardware": machine.partition(", python ")[0], "lines": lines}
        hyperparameters = json.dumps(dict(json.loads(config)))
        log |= {"trial": "no record" in header, "hyperparameters": hyperparameters}
        stated = re.match(FIRST_LINE, header)
        log["stated"] = (stated[1], int(stated[2])) if stated else None
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} is not a finished run's whole log ({error}): resume it or train again"
        )
    return log


def parse_logs(paths) -> list:
    return sorted([parse_log(path) for path in paths], key=lambda log: log["seed"])


def read_results(path: Path) -> dict:
    """What the referee wrote, its numbers as such. Raises UserError.

    What a file lacks, as older referees wrote less, has a value here that fails the checks.
    """
    missing = {"val_loss": math.nan, "nfe": math.nan, "gflops": None}
    missing |= {"rules": {}, "metrics": {}, "protocol": {}, "checkpoints": []}
    try:
        results = missing | json.loads(read(path))
        for part in ("rules", "metrics", "protocol"):
            results[part] = dict(results[part])
        for name in {"val_loss", "nfe", "val_loss_fresh"} & results.keys():
            results[name] = float(results[name])
        numbers = [results["gflops"], *results["metrics"].values()]
        if not all(isinstance(number, (int, float, type(None))) for number in numbers):
            raise ValueError("a value is no number")
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        advice = "run python eval_speedrun.py logs/<run_id>"
        raise UserError(f"{path}: damaged results ({error}): {advice}")
    return results


def read_timing(path: Path) -> dict:
    """What compare.py --race wrote: its `key: value` lines, the numbers as such. UserError."""
    try:
        found = dict(re.findall(r"^(\w+): (.*)$", read(path).decode(), re.M))
        for side in ("predecessor", "record"):
            found[f"{side}_steps"] = int(found[f"{side}_steps"])
            seconds = [float(text) for text in found[f"{side}_seconds"].split()]
            if not seconds or not all(0 < value < math.inf for value in seconds):
                raise ValueError(f"{side}_seconds")
            found[f"{side}_seconds"] = seconds
            found[f"{side}_sha256"], found[f"{side}_config"]
    except (ValueError, LookupError) as error:
        raise UserError(f"{path}: damaged timing ({error}): run python records/compare.py --race")
    return found


def load_series(path) -> Record:
    """A record's folder, an example's, or a log. Raises UserError."""
    if not Path(path).is_dir():
        return Record(Path(path), "a log", [parse_log(path)])
    folder = Path(path).resolve()  # "." has a name too
    files = list(folder.glob("log_seed*.txt"))
    record = Record(folder, "a record" if files else "an example, no record", [])
    record.logs = parse_logs(files or [folder / "log.txt"])
    record.paired = parse_logs(folder.glob("paired/log_seed*.txt"))
    for file in sorted({folder / "results.json", *folder.glob("results*.json")}):
        record.results[file.name] = read_results(file)
    record.source = read(folder / "train_speedrun.py")
    record.readme = read(folder / "README.md").decode(errors="replace")
    if (folder / "timing.txt").exists():
        record.timing = read_timing(folder / "timing.txt")
    return record


# ---------------------------------------------------------------------------------------------
# Statistics: functions of numbers
# ---------------------------------------------------------------------------------------------


def sd(values) -> float:
    """Sample standard deviation (ddof 1); 0 of one value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def t_tail(t: float, df: float) -> float:
    """P(T > t) of Student's t, within 1e-10 for 1 to 10,000 degrees of freedom.

    The integral of its density, which is that of sin(phi)^(df - 1) on [0, pi] with
    t = sqrt(df) / tan(phi), by Simpson's rule.
    """
    end = math.atan2(math.sqrt(df), t)  # 0 where t is infinite
    y = np.sin(np.linspace(0, end, 20_001)) ** (df - 1)
    integral = end / 60_000 * (y[0] + y[-1] + 4 * y[1::2].sum() + 2 * y[2:-1:2].sum())
    density = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.pi**0.5
    return float(integral * density)


def paired_test(losses: dict, previous: dict) -> tuple:
    """(n, mean, sd, t, p) of the differences losses - previous, {seed: loss}, over common seeds.

    p is one-sided: that the mean of the differences is below 0 by chance.
    """
    differences = [losses[seed] - previous[seed] for seed in losses if seed in previous]
    n = len(differences)
    if n < 2:
        return n, math.nan, math.nan, math.nan, math.nan
    mean = fmean(differences)
    error = sd(differences) / math.sqrt(n)
    t = math.copysign(math.inf, mean) if mean else 0.0
    if error:
        t = mean / error
    return n, mean, sd(differences), t, t_tail(-t, n - 1)


def target_test(values, target: float, floor: float) -> tuple:
    """(bound, p, Student's p) of runs below a target by chance, one-sided.

    The bound, mean + Z sigma / sqrt(n), must be at most the target. It and the first p are of a
    normal distribution with sigma = max(sample sd, floor).
    """
    mean = fmean(values)
    error = max(sd(values), floor) / math.sqrt(len(values))
    p = math.erfc((target - mean) / error / math.sqrt(2)) / 2
    by_index = dict(enumerate(values))
    student = paired_test(by_index, dict.fromkeys(by_index, target))[-1]
    return mean + Z * error, p, student
