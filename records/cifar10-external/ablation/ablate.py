"""One training of a variant of `cifar10-external`, scored by the referee's judge and by the guard.

    python records/cifar10-external/ablation/ablate.py REPA 0          a variant of VARIANTS and a seed
    python records/cifar10-external/ablation/ablate.py --table         the table of all that were run

Every variant is the config of the script beside this file with some fields changed. A line of what
was found goes to ablation.jsonl, from which the table is made.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

import guard
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from data.common import import_snapshot, machine, sha256_of  # noqa: E402
from eval_speedrun import to_uint8  # noqa: E402
from records.looks import Judge, load  # noqa: E402
from records.series import parse_log  # noqa: E402

script = import_snapshot(Path(__file__).with_name("train_speedrun.py"))
CONFIG = "cifar10-external"
FOUND = Path(__file__).with_name("ablation.jsonl")
SAMPLES = 1000
STEPS = 1200  # of 32 images: 38,400

BASE = dict(steps=STEPS, depth=4)  # of 4 blocks two can be routed
REPA = dict(repa=0.5, repa_layers=(2,), repa_width=256)
REG = dict(reg=0.03)
ROUTED = dict(route_keep=0.5, route_dense=1, dense_tail=0.05)
CFM = dict(cfm=0.05)
SHIFT = dict(t_shift=1.5)
VARIANTS = {
    "none": {},
    "REPA": REPA,
    "REG": REG,
    "REPA, REG": REPA | REG,
    "routing": ROUTED,
    "contrastive": CFM,
    "time shift": SHIFT,
    "all": REPA | REG | ROUTED | CFM | SHIFT,
}


def train(variant: str, seed: int) -> Path:
    """The folder of the run."""
    cfg = replace(script.CONFIGS[CONFIG], **BASE, **VARIANTS[variant])
    script.CONFIGS[CONFIG] = cfg
    world = script.World()
    run = script.Run(CONFIG, seed, None, world)
    script.train(run, world)
    return run.folder


@torch.no_grad()
def score(folder: Path) -> dict:
    """The referee's two goals, and the guard's like them."""
    model = load(script, folder)
    judge = Judge(model.track)
    rows = judge.captions.balanced(SAMPLES)
    batches = judge.batches(rows)
    images = [to_uint8(script.sample(model, draws(), text, draws)) for text, draws in batches]
    images = torch.cat(images)
    fake = judge.features(images, rows)
    distance, accuracy = judge.score(fake)
    guard_accuracy, guard_distance = guard.scores(guard.load(), images, fake["label"])
    return {
        "KD-lite": distance,
        "accuracy": accuracy,
        "guard's accuracy": guard_accuracy,
        "guard's KD": guard_distance,
    }


def table() -> str:
    """Markdown: a row of each variant, mean and standard deviation of its seeds."""
    found = [json.loads(line) for line in FOUND.read_text().splitlines()]
    names = list(found[0]["numbers"])
    lines = [f"| variant | seeds | {' | '.join(names)} |", "|---" * (2 + len(names)) + "|"]
    for variant in VARIANTS:
        runs = [entry for entry in found if entry["variant"] == variant]
        if not runs:
            continue
        cells = []
        for name in names:
            values = [entry["numbers"][name] for entry in runs]
            digits = 1 if "KD" in name or name.endswith("_s") else 4 if "loss" in name else 3
            spread = f" \u00b1 {stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{fmean(values):.{digits}f}{spread}")
        lines.append(f"| {variant} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variant", nargs="?", choices=VARIANTS)
    parser.add_argument("seed", nargs="?", type=int, default=0)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.table:
        print(table())
        return
    folder = train(args.variant, args.seed)
    log = parse_log(folder / "log.txt")
    entry = {
        "variant": args.variant,
        "seed": args.seed,
        "steps": STEPS,
        "changed": VARIANTS[args.variant],
        "numbers": {name: log[name] for name in ("val_loss", "train_time_s")} | score(folder),
        "machine": machine(torch.device("cpu")),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "code_sha256": sha256_of(folder / "train_speedrun.py"),
    }
    with open(FOUND, "a") as file:
        file.write(json.dumps(entry) + "\n")
    print(entry)


if __name__ == "__main__":
    main()
