"""What a machine can check of a record: each check gives (passed, what was found).

A record is a stranger's word. The checks compare its parts with each other, with its predecessor
and with published code; what they cannot tell is the reviewer's, see records/README.md.
"""

import functools
import io
import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.common import UserError, key_of, sha256  # noqa: E402
from data.networks import NETWORKS  # noqa: E402
from eval_speedrun import REFEREE  # noqa: E402
from records.races import (  # noqa: E402
    RACES,
    TIMING,
    check_goal,
    check_timing,
    race_name,
)
from records.series import (  # noqa: E402
    Record,
    paired_test,
    read,
)
from records.snapshots import FLAGS, check_contract, check_hyperparameters  # noqa: E402

SEEDS = 4  # of a series, at least
LEVEL = 0.01  # of the paired test
MAX_NFE = 100
LOG_BYTES = 100 * 1024  # of which the script has 67 KB
# What values a metric can have, by how its name starts; kernel distances are unbiased, so that
# chance takes them a little below 0.
RANGES = {"prompt-accuracy": (0, 1), "precision": (0, 1), "recall": (0, 1), "copies": (0, 1)}
RANGES |= {"IS": (1, math.inf), "": (-1, math.inf)}
NETWORK_OF = {metric: name for name, network in NETWORKS.items() for metric in network.metrics}

# ---------------------------------------------------------------------------------------------
# Folders, published code
# ---------------------------------------------------------------------------------------------


def git(root: Path, *arguments) -> bytes:
    """What git prints; b"" where there is no git, or nothing of that name."""
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True).stdout


def base_commit(root: Path, base: str = "") -> str:
    """The last commit of the published branch; "" where there is no repository.

    base: its name; without one, that of origin/main, else of main. Raises UserError.
    """
    if not (root / ".git").exists():
        return ""
    for name in [base] if base else ["origin/main", "main"]:
        found = git(root, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
        if found:
            return found.decode().strip()
    raise UserError(
        f"git finds no branch {base or 'origin/main or main'} in {root}: name the published one "
        "with --base"
    )


@functools.lru_cache
def referees(root: Path, base: str = "") -> set:
    """referee_sha256 of every commit of the published branch, hashed as eval_speedrun does.

    What only other commits or the working tree hold may be the record's own. Without a repository
    the working tree's is published.
    """
    commit = base_commit(root, base)
    versions = []
    if not commit:
        versions = [[read(root / file) for file in REFEREE if (root / file).is_file()]]
    else:
        for version in git(root, "log", "--format=%H", commit, "--", *REFEREE).decode().split():
            versions.append([git(root, "show", f"{version}:./{file}") for file in REFEREE])
    keys = set()
    for contents in versions:
        keys.add(key_of(*[sha256(content) for content in contents if content]))
    return keys


# ---------------------------------------------------------------------------------------------
# Logs
# ---------------------------------------------------------------------------------------------


def check_same(logs, *keys) -> tuple:
    """Each of these values is the same in all logs."""
    found = {key: sorted({log[key] for log in logs}) for key in keys}
    texts = [f"{key} {' and '.join(map(str, values))}" for key, values in found.items()]
    return all(len(values) == 1 for values in found.values()), ", ".join(texts)


def check_names(logs) -> tuple:
    """First line, last block and file name tell the same run and seed."""
    faults = []
    for log in logs:
        run_id = log["run_id"]
        file = re.fullmatch(r"log_seed(\d+)\.txt", log["path"].name)
        same = log["stated"] == (run_id, log["seed"])
        same = same and (not file or int(file[1]) == log["seed"])
        if not (same and re.search(rf"_{re.escape(log['config'])}_seed{log['seed']}\b", run_id)):
            stated = "{} of seed {}".format(*log["stated"] or ("no run", "?"))
            faults.append(f"{log['path'].name} is of {run_id}, seed {log['seed']}; begins {stated}")
    return not faults, f"names: {'; '.join(faults) or 'each log begins and ends as one run'}"


def check_lines(logs) -> tuple:
    """The step lines go up, count as the hyperparameters say, and end where the last block does."""
    faults = []
    for log in logs:
        lines = log["lines"]
        last = lines[-1]
        hyperparameters = json.loads(log["hyperparameters"])
        batch_size = hyperparameters.get("batch_size")
        totals = {line.steps for line in lines}
        totals |= {last.step, log["steps"], hyperparameters.get("steps", log["steps"])}
        holds = {"steps": len(totals) == 1, "images": last.images == log["images"]}
        if isinstance(batch_size, int):  # a schedule of sizes cannot be counted here
            of_step = all(line.images == line.step * batch_size for line in lines)
            holds["images"] = holds["images"] and of_step
        for earlier, later in itertools.pairwise(lines):
            if (earlier.step, earlier.milliseconds) > (later.step, later.milliseconds):
                holds["order"] = False
            if earlier.milliseconds > later.milliseconds:
                holds["clock"] = False
        holds["train_time_s"] = abs(1000 * log["train_time_s"] - last.milliseconds) <= 1
        wrong = ", ".join(name for name in holds if not holds[name])
        if wrong:
            faults.append(f"{log['path'].name} contradicts itself in {wrong}")
    return not faults, f"step lines: {'; '.join(faults) or 'as the last block and CONFIGS say'}"


def check_distinct(logs) -> tuple:
    """No run stands there under two seeds: of two seeds hardly any two losses are the same."""
    copies = []
    for first, second in itertools.combinations(logs, 2):
        losses = {(line.step, line.name): line.loss for line in first["lines"]}
        pairs = [(line.loss, losses.get((line.step, line.name))) for line in second["lines"]]
        if 2 * sum(a == b for a, b in pairs) > len(pairs):
            copies.append(f"{first['path'].name} and {second['path'].name}")
    return not copies, f"runs: {', '.join(copies) or 'none'} with the same losses"


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
        check_names(logs),
        check_lines(logs),
        check_hyperparameters(logs),
        check_distinct(logs),
    ]


# ---------------------------------------------------------------------------------------------
# Results and pictures
# ---------------------------------------------------------------------------------------------


def check_values(results: dict) -> tuple:
    """Nothing in a referee's file that no referee writes. Unknown fields may be there."""
    faults = []
    if not results["nfe"] >= 1:
        faults.append(f"nfe {results['nfe']}")
    if results["gflops"] is not None and not results["gflops"] > 0:
        faults.append(f"gflops {results['gflops']}")
    fresh = results.get("val_loss_fresh", 0.0)
    if fresh and not abs(results["val_loss"] / fresh - 1) <= 0.05:
        faults.append(f"val_loss {results['val_loss']}, with fresh draws {fresh}")
    protocol = results["protocol"]
    for metric, value in results["metrics"].items():
        name = metric.rpartition("-")[0]  # without the count of images
        low, high = next(RANGES[start] for start in RANGES if name.startswith(start))
        if value is not None and not low <= value <= high:
            faults.append(f"{metric} {value}")
        network = NETWORK_OF.get(name)
        if value is not None and network and network not in protocol:
            faults.append(f"{metric} without {network} in the protocol")
    for network, entry in protocol.items():
        weights = entry.get("weights") if isinstance(entry, dict) else None
        if not re.fullmatch("[0-9a-f]{16,64}", str(weights)):
            faults.append(f"protocol of {network} without its weights' hash")
        if results["rules"].get(network, entry) != entry:
            faults.append(f"protocol of {network} is not that of the rules")
    return not faults, f"values: {', '.join(faults) or 'all of them possible'}"


def check_picture(path: Path) -> tuple:
    """A PNG that is whole, of the reader's size."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(read(path)), formats=["PNG"]) as picture:
            text = "{} x {}".format(*picture.size)
            picture.verify()
    except Exception as error:  # what is no picture may break the reader in any way
        return False, f"{path.name}: {error}"
    return True, f"{path.name}: a picture, {text}"


def check_results(record: Record, known: set) -> list:
    """The referee's files are of different runs of the series and by published code."""
    logs = {log["run_id"]: log for log in record.logs}
    limit = RACES[race_name(record)].gflops
    code = sha256(record.source)
    checks = []
    for name, results in record.results.items():
        log = logs.pop(str(results.get("run_id")), {})
        rules = results["rules"]
        keys = ("seed", "config", "images", "parameters")
        same = log and rules.get("data_sha256") == log["data_sha256"]
        same = same and all(results.get(key) == log[key] for key in keys)
        logged = log.get("val_loss", math.nan)
        close = abs(results["val_loss"] - logged) <= 1e-3 * logged
        found_code = results.get("code_sha256")
        referee = str(results.get("referee_sha256"))
        nfe = max(results["nfe"], *record.all("sampling_nfe"))
        light = limit is None or (results["gflops"] or math.nan) <= limit
        of_run = f"run {results.get('run_id')}, seed {results.get('seed')}"
        limit_text = f"at most {limit}" if limit else "of any size"
        found = [
            (same, f"{of_run}, is one of the logs, once"),
            (close, f"val_loss {results['val_loss']:.5f}, in the log {logged:.5f}"),
            (found_code == code, f"code_sha256 {found_code}, snapshot {code}"),
            (rules.get("contract") == "as published", f"contract {rules.get('contract')}"),
            (referee in known, f"referee {referee}, in the published branch or its history"),
            (nfe <= MAX_NFE, f"{nfe:g} network evaluations an image, at most {MAX_NFE}"),
            check_values(results),
            (light, f"{results['gflops']} GFLOP an evaluation, {limit_text}"),
        ]
        checks += [(passed, f"{name}: {text}") for passed, text in found]
    return checks


# ---------------------------------------------------------------------------------------------
# The predecessor; everything
# ---------------------------------------------------------------------------------------------


def check_paired(record: Record, before: Record) -> list:
    """Less of what the race counts; a lower loss at equal images, of paired/, else its own logs."""
    logs = record.paired or record.logs
    race = RACES[race_name(record)].cost
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


def check_record(record: Record, root: Path, before: Record | None = None, base: str = "") -> list:
    """Everything. root: the project; before: the predecessor; base: the published branch's name."""
    if record.title == "a log":
        return check_logs(record.logs, series=False)
    folder = record.folder
    race = RACES[race_name(record)]
    dated = re.fullmatch(r"\d{4}-\d\d-\d\d_.+", folder.name)
    placed = dated and folder.parent.name in RACES and set(record.all("track")) == {race.track}
    original = all(log["source"] == record.source for log in record.logs)
    flags = ", ".join(flag.decode() for flag in FLAGS if flag in record.source)
    checks = check_logs(record.logs) + [
        (placed, f"folder: {folder.parent.name}/{folder.name} is <race>/<date>_<Name>"),
        check_picture(folder / "samples.png"),
        (original, "snapshot: the source in every log"),
        check_contract(record.source, record.track, folder.name[:10]),
        (not flags, f"compile flags: {flags or 'none'}"),
        *check_results(record, referees(root, base)),
        *[check_goal(record, goal) for goal in race.goals],
    ]
    predecessor = re.search(r"^Predecessor:(.*)$", record.readme, re.M)
    if not predecessor:
        first = before or race.baseline in (None, folder.name)
        checks.append((first, "README.md: no predecessor"))
    elif race.cost != TIMING:
        section = re.search(r"(?im)^## paired", record.readme)
        checks.append((section, f"README.md: {predecessor[0]}, and a section '## paired'"))
    if not before:
        return checks
    return checks + (check_timing if race.cost == TIMING else check_paired)(record, before)
