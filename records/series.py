"""A series of runs as it lies in a record's folder, and the statistics of its numbers.

What the folder holds is said in records/stats.py, which checks it.
"""

import json
import math
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.common import UserError  # noqa: E402

# What is used of a log's last block.
TEXTS = ["run_id", "config", "track", "code_sha256", "data_sha256"]
COUNTS = ["seed", "resumed", "world_size", "steps", "images", "parameters", "sampling_nfe"]
COUNTS += ["graphs_compiled_on_the_clock"]
NUMBERS = ["val_loss", "train_time_s"]
VALIDATION = r"^step:\S+ images:([1-9]\d*) val_loss:(\S+) train_time:(\d+)ms"

Z = 2.326  # one-sided 1 %, of a target

# ---------------------------------------------------------------------------------------------
# Logs and folders
# ---------------------------------------------------------------------------------------------


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

    @property
    def track(self) -> str:
        return self.logs[0]["track"]

    def all(self, key: str) -> list:
        """This value of every log."""
        return [log[key] for log in self.logs]


def read(path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        reason = error.strerror
        raise UserError(f"{path} is missing ({reason}): give a record's whole folder, or a log")


def parse_log(path) -> dict:
    """What train_speedrun.py wrote of a whole run. Raises UserError if it is not whole.

    The facts of its last block and: path, source, bytes, machine, hardware, trial, hyperparameters,
    points [(images, train seconds, val_loss)].
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
        points = []
        for images, loss, milliseconds in re.findall(VALIDATION, run, re.M):
            points.append((int(images), int(milliseconds) / 1000, float(loss)))
        if (points[-1][0], points[-1][2]) != (log["images"], log["val_loss"]):
            raise ValueError(f"its last validation is {points[-1]}")
        log |= {"path": Path(path), "source": source, "bytes": len(content), "points": points}
        log |= {"machine": machine, "hardware": machine.partition(", python ")[0]}
        log |= {"trial": "no record" in header, "hyperparameters": json.dumps(json.loads(config))}
    except (ValueError, LookupError) as error:
        raise UserError(
            f"{path} is not a finished run's whole log ({error}): resume it or train again"
        )
    return log


def parse_logs(paths) -> list:
    return sorted([parse_log(path) for path in paths], key=lambda log: log["seed"])


def load_series(path) -> Record:
    """A record's folder, an example's, or a log. Raises UserError."""
    if not Path(path).is_dir():
        return Record(Path(path), "a log", [parse_log(path)])
    folder = Path(path).resolve()  # "." has a name too
    files = list(folder.glob("log_seed*.txt"))
    record = Record(folder, "a record" if files else "an example, no record", [])
    record.logs = parse_logs(files or [folder / "log.txt"])
    record.paired = parse_logs(folder.glob("paired/log_seed*.txt"))
    # What a file lacks has a value here that fails the checks.
    missing = {"val_loss": math.nan, "nfe": math.nan, "gflops": None, "rules": {}, "metrics": {}}
    for file in sorted({folder / "results.json", *folder.glob("results*.json")}):
        try:
            record.results[file.name] = missing | json.loads(read(file))
        except (ValueError, TypeError) as error:
            advice = "run python eval_speedrun.py logs/<run_id>"
            raise UserError(f"{folder}: damaged results ({error}): {advice}")
    record.source = read(folder / "train_speedrun.py")
    record.readme = read(folder / "README.md").decode(errors="replace")
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
