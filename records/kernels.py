"""What a GPU does in a step: its parts beside their model, and the kernels that take longest.

    python records/kernels.py SCRIPT                          imagenet256, on noise
      --config cifar10 --set batch_size=128                   as for compare.py
      --model records/timing/preflight/<name>.txt             what preflight.py said of that step

Trains some steps under torch.profiler. A part's milliseconds are those of the kernels and copies
that were launched in it, as in compare.py: see trace.py. Needs a GPU; preflight.py needs none.
"""

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.common import UserError  # noqa: E402
from records.compare import Side, first_counted  # noqa: E402
from records.preflight import table  # noqa: E402
from records.trace import annotated_spans, device_events  # noqa: E402

STEPS = 30  # profiled; the first ten are not counted
SHOWN = 30  # kernels
LONGEST = 100  # characters of a kernel's name


def kernel_rows(events: list, first: int) -> list:
    """(ms a step, times a step, name) of what the GPU did in all steps but `first`, by time."""
    steps = annotated_spans(events)[0][first:]
    durations = {}
    for _, event in device_events(events, steps):
        durations.setdefault(event["name"], []).append(event["dur"] / 1000)
    rows = []
    for name, spent in durations.items():
        rows.append((sum(spent) / len(steps), len(spent) / len(steps), name[:LONGEST]))
    return sorted(rows, reverse=True)


def modelled_parts(text: str) -> dict:
    """{part: ms} of the first script in an output of preflight.py, and of the whole "step"."""
    _, _, parts = text.partition("| part, modelled ")
    found = {name: float(ms) for name, ms in re.findall(r"^\| (\w+) \| ([\d.]+) \|", parts, re.M)}
    step = re.search(r"^\| ms of a step, modelled \| ([\d.]+) \|", text, re.M)
    if not found or not step:
        raise UserError("--model holds no tables of parts: give an output of preflight.py")
    return found | dict(step=float(step[1]))


def parts_beside(measured: dict, modelled: dict) -> str:
    """A table of milliseconds: each part of a step as it was, and as preflight.py had it."""
    rows = []
    for name in dict.fromkeys([*modelled, *measured]):  # each once, in this order
        cells = [f"{found[name]:.2f}" if name in found else "-" for found in (measured, modelled)]
        rows.append([name, *cells])
    return table(["part of a step", "ms, measured", "ms, modelled"], rows)


def report(options: argparse.Namespace) -> str:
    """Both tables of a script, profiled here. Raises UserError."""
    modelled = {}
    if options.model:
        modelled = modelled_parts(Path(options.model).read_text(errors="replace"))
    if not torch.cuda.is_available():
        raise UserError("no GPU is seen, whose kernels this is about: preflight.py needs none")
    side = Side(options.script, options)
    with tempfile.TemporaryDirectory() as folder:
        output = side.output("parts", Path(folder))
        events = json.loads(Path(folder, "trace.json").read_bytes())["traceEvents"]
    rows = kernel_rows(events, first_counted(options.steps))
    spent, times = (sum(row[column] for row in rows) for column in (0, 1))
    shown = [(f"{ms:.3f}", f"{count:.1f}", f"`{name}`") for ms, count, name in rows[:SHOWN]]
    changes = " ".join(options.set)
    return "\n\n".join(
        [
            f"{torch.cuda.get_device_name()}, torch {torch.__version__}: {options.script}, "
            f"{options.config} {changes}, under torch.profiler",
            parts_beside(side.value("parts", output), modelled),
            f"{times:.0f} kernels and copies a step, {spent:.2f} ms; those that take longest:",
            table(["ms a step", "times", "kernel"], shown),
        ]
    )


def main(arguments: list) -> int:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("script")
    parser.add_argument("--config", default="imagenet256")
    parser.add_argument("--set", nargs="*", default=[])
    parser.add_argument("--model", metavar="FILE")
    parser.set_defaults(noise=True, steps=STEPS)
    try:
        print(report(parser.parse_args(arguments)))
    except (UserError, OSError) as error:
        print(f"kernels.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
