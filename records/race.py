"""compare.py --race: the seconds of two records' whole runs, measured in turn on one machine."""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.common import UserError, machine, product_dtype, write_atomic  # noqa: E402
from records.compare import ROOT, Side  # noqa: E402
from records.series import load_series  # noqa: E402


def race(options: argparse.Namespace) -> str:
    """timing.txt of the record B beside its predecessor A: whole-run seconds. Raises UserError.

    Both train their own configs in turn, cut to a number of steps over which their schedules are
    stretched, with the same changes: --set, and no bf16 where the machine has none. The whole run
    is so many more steps, and what the clock had beside them once.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if product_dtype(device) == torch.float32:  # records of before would emulate bf16 here
        options.set = [*options.set, "bf16=False"]
    sides = []
    for folder in (options.a, options.b):
        record = load_series(folder)
        log = record.logs[0]
        if not (ROOT / "data" / log["track"] / "manifest.json").exists():
            raise UserError(f"a race is timed on its data: python data/download.py {log['track']}")
        side = Side(folder, argparse.Namespace(**vars(options) | {"config": log["config"]}))
        side.log = log
        side.name = record.folder.name
        sides.append(side)
    tracks = {side.log["track"].removesuffix("-external") for side in sides}
    if len(tracks) > 1:  # with another network's features it is still the same pictures' race
        raise UserError("the two are of different tracks")
    whole = {"predecessor": [], "record": []}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(options.rounds):
            for seconds, side in zip(whole.values(), sides, strict=True):
                side.measure_round(Path(folder))
                seconds.append(side.fixed[-1] + side.log["steps"] * side.seconds[-1])
                print(f"round {turn + 1}: {side.name}: {seconds[-1]:.1f} s", flush=True)
    lines = [
        "Seconds of whole runs, from compare.py --race: both in turn, of each round one.",
        f"machine: {options.processes} x {machine(device)}, torch {torch.__version__}",
        f"set: {' '.join(options.set)}",
        f"measured_steps: {options.steps}",
    ]
    for (key, seconds), side in zip(whole.items(), sides, strict=True):
        lines.append(f"{key}: {side.name}")
        lines.append(f"{key}_sha256: {side.log['code_sha256']}")
        lines.append(f"{key}_config: {side.log['config']}")
        lines.append(f"{key}_steps: {side.log['steps']}")
        lines.append(f"{key}_ms_per_step: {' '.join(f'{1000 * s:.2f}' for s in side.seconds)}")
        lines.append(f"{key}_seconds: {' '.join(f'{s:.3f}' for s in seconds)}")
    text = "\n".join(lines) + "\n"
    write_atomic(Path(options.b, "timing.txt"), lambda path: path.write_text(text))
    return text
