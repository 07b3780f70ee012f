"""The races: what a series must reach, by how much each record is faster, where they begin.

A goal's floor of sigma is what another noise for the samples changes alone, see records/noise.py.
"""

import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.common import UserError, sha256  # noqa: E402
from records.series import (  # noqa: E402
    NUMBERS,
    Record,
    Z,
    load_series,
    target_test,
)


@dataclass(frozen=True)
class Goal:
    """A number that the runs of a series must reach beyond doubt."""

    metric: str  # of the logs, or of the referee's files
    value: float | None  # None: not fixed yet
    floor: float  # of sigma, however close the runs are to each other
    at_least: bool = False  # or at most


@dataclass(frozen=True)
class Race:
    """The records of one folder: what they must reach, in what each must beat its predecessor."""

    track: str
    goals: tuple[Goal, ...]  # all of them, by the same samples
    cost: str  # a number of the logs, or TIMING: whole-run seconds of both on one machine
    gflops: float | None = None  # of one evaluation of one image, at most
    baseline: str | None = None  # the series that the race starts from: it need not reach anything


TIMING = "timing.txt"
PICTURES = (
    Goal("KD-lite-2k", 145.0, 2.5),
    Goal("prompt-accuracy-lite-2k", 0.58, 0.01, at_least=True),
    Goal("copies-lite-2k", 0.03, 0.002),
    Goal("copies-thumbnail-2k", 0.03, 0.002),
)
RACES = {
    "cifar10": Race("cifar10", PICTURES, TIMING, baseline="2026-11-21_Baseline"),
    "cifar10-external": Race("cifar10-external", PICTURES, TIMING),  # other networks' features
    "cifar10-loss": Race(  # of 2026-11-20, closed
        track="cifar10",
        goals=(Goal("val_loss", 0.2122, 0.0002),),
        cost="images",
        gflops=0.244,
        baseline="2026-11-20_Bare-minimum",
    ),
    "imagenet256": Race("imagenet256", (Goal("FID-50k", 3.49, 0.02),), "train_time_s"),
    "imagenet512": Race("imagenet512", (Goal("FID-50k", 4.23, 0.02),), "train_time_s"),
}
# ---------------------------------------------------------------------------------------------
# A record, its race, its predecessor
# ---------------------------------------------------------------------------------------------


def load(path) -> Record:
    """A record's folder, an example's, or a log. Raises UserError: also where no race is its."""
    record = load_series(path)
    if race_name(record) not in RACES and record.title != "a log":
        raise UserError(
            f"{path} is of the race {race_name(record)!r}: there are {', '.join(RACES)}"
        )
    return record


def race_name(record: Record) -> str:
    """That of its folder's folder, else that of its track."""
    name = record.folder.parent.name
    return name if name in RACES else record.track


def load_predecessor(record: Record, against: Path | None = None) -> Record | None:
    """The record of `against`, else of the folder that README.md names. Raises UserError."""
    named = re.search(r"^Predecessor:(.*)$", record.readme, re.M)
    if named and not against:
        name = named[1].strip(" `\r")
        if Path(name).name != name:
            raise UserError(f"{record.folder}: Predecessor: {name!r} is no plain name of a folder")
        against = record.folder.parent / name
    return load(against) if against else None


# ---------------------------------------------------------------------------------------------
# The target
# ---------------------------------------------------------------------------------------------


def goal_values(record: Record, goal: Goal) -> list:
    """The goal's metric of every log, or of every results file; nan where it is missing."""
    if goal.metric in NUMBERS:
        return record.all(goal.metric)
    return [results["metrics"].get(goal.metric, math.nan) for results in record.results.values()]


def goal_reached(record: Record, goal: Goal) -> tuple[bool, str]:
    """Whether the runs, all of them, reach a goal with what chance may do; how that was found."""
    values = [math.nan if value is None else value for value in goal_values(record, goal)]
    if goal.value is None:
        return True, f"target: no target fixed yet for {goal.metric}"
    sign = -1 if goal.at_least else 1
    bound, p, student = target_test([sign * x for x in values], sign * goal.value, goal.floor)
    reached = bound <= sign * goal.value and len(values) == len(record.logs)
    limit = f"{'at least' if goal.at_least else 'at most'} {goal.value}"
    text = (
        f"target: {goal.metric} {fmean(values):.5f} of {len(values)}, with {Z} sigma / sqrt(n) "
        f"{sign * bound:.5f}, {limit}; p {p:.2g}, Student's {student:.2g}"
    )
    return reached, text


def check_goal(record: Record, goal: Goal) -> tuple:
    """A goal is reached; of a baseline it is only said."""
    reached, text = goal_reached(record, goal)
    if goal.value is not None and record.folder.name == RACES[race_name(record)].baseline:
        return True, f"{text} (the baseline: {'' if reached else 'not '}reached)"
    return reached, text


def reaches_target(record: Record) -> bool:
    """Whether all goals of its race are reached, of a baseline, too."""
    return all(goal_reached(record, goal)[0] for goal in RACES[race_name(record)].goals)


# ---------------------------------------------------------------------------------------------
# Timings
# ---------------------------------------------------------------------------------------------


def check_timing(record: Record, before: Record) -> list:
    """timing.txt is of these two series, and in its slowest pair of runs the record is faster.

    That is not asked where it reaches what its predecessor, then the baseline, has not reached.
    """
    timing = record.timing
    if not timing:
        command = f"python records/compare.py --race {before.folder.name} {record.folder.name}"
        return [(False, f"{TIMING}: missing; run {command}")]
    sides = (("predecessor", before), ("record", record))
    faults = []
    for side, series in sides:
        log = series.logs[0]
        stated = (timing[f"{side}_sha256"], timing[f"{side}_config"], timing[f"{side}_steps"])
        if stated != (sha256(series.source), log["config"], log["steps"]):
            faults.append(f"{side} is not {series.folder.name} as its logs have it")
    bound = max(timing["record_seconds"]) / min(timing["predecessor_seconds"])
    rounds = len(timing["record_seconds"])
    text = f"{bound:.3f} of {before.folder.name}'s seconds at most, in {rounds} rounds; wanted < 1"
    if not reaches_target(before):
        bound = 0.0
        text += " of one that reaches the target"
    return [
        (not faults, f"{TIMING}: {'; '.join(faults) or 'of these two scripts and lengths'}"),
        (bound < 1 and rounds >= 2, f"{TIMING}: {text}, 2 rounds or more"),
    ]


def times_faster(record: Record) -> float:
    """Than the baseline of its race: the product of the timings along the chain. UserError."""
    before = load_predecessor(record)
    if not before:
        return 1.0
    ratio = fmean(record.timing["predecessor_seconds"]) / fmean(record.timing["record_seconds"])
    return times_faster(before) * ratio
