"""Time two training scripts in turn on one machine: A B A B. Records are timed with this tool.

    python records/compare.py A B                        the default config of this machine
      --config imagenet256 --steps 10 --set batch_size=8 the same changes for both
      --processes 8                                      under torchrun, one process a GPU
      --noise                                            on noise, even where data/<track> is
      --diff                                             the scripts' difference, whole
  --race                                             records' folders: writes B's timing.txt, the
                                                     seconds of whole runs with their own configs

**This runs both scripts**: a stranger's belongs in a container, see records/README.md.
A and B are scripts or record folders, each with changes of its own config after a colon:
train_speedrun.py:compile=False,bf16=False. Both train on the same shards: data/<track> where it is
there, else noise of its shape. A run is a process of its own; its time is what its own clock says
between two of its logged steps, so warm-up and compilation are out.

Of a script it knows TRACKS, CONFIGS, main() and the lines of its log. Parts of a step come from the
script's annotations: torch.profiler.record_function("step") around each step of the timed loop,
and others inside it. With them it also counts the FLOPs of "forward" and "backward" (matrix
products, convolutions and attention, in eager PyTorch), the share of the machine's peak that they
come to (MFU), and the time that they take at the speed of its matrix product (floor).
"""

import argparse
import ast
import difflib
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data.common import (  # noqa: E402
    UserError,
    import_snapshot,
    machine,
    now,
    product_dtype,
    sha256_of,
)
from records.trace import average_parts  # noqa: E402

# bf16 FLOP/s, dense, as stated, by a part of a GPU's name; PCIe cards and NVL pairs before SXM
PEAK = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H200 NVL": 835e12}
PEAK |= {"H100": 989e12, "H200": 989e12, "A100": 312e12}
VALIDATION_IMAGES = 64  # a timed run validates once, after its clock has stopped
FLOPS_BATCH = 4  # images of a step whose FLOPs are counted
FLOPS_STEPS = 20  # steps of that run: enough to see what a schedule changes on the way

# ---------------------------------------------------------------------------------------------
# What runs in a process of its own
# ---------------------------------------------------------------------------------------------


def first_counted(steps: int) -> int:
    """Steps before this one are not timed; the log has a line of it."""
    return 10 if steps > 10 else 2


def write_noise(track, folder: Path, count: int = 2048):
    """A track's data as noise: shards of its shapes, DINOv2's features, and a caption table."""
    torch.manual_seed(0)
    folder.mkdir()
    files = {}
    patches = 256 if track.dtype == "uint8" else math.prod(track.shape[1:])
    steps = torch.full((1 + patches, 64), 4 / 127)
    save_file({"scale": steps}, folder / "features.safetensors")
    for split, rows in (("train", count), ("val", VALIDATION_IMAGES)):
        path = folder / f"{split}_000.safetensors"
        stored = torch.randn(rows, *track.shape) / track.scale + track.shift
        if track.dtype == "uint8":
            stored = stored.clamp(0, 255)
        shard = {"latents": stored.to(getattr(torch, track.dtype))}
        shard["labels"] = torch.arange(rows, dtype=torch.int16) % 10
        shard["features"] = torch.randint(-127, 128, (rows, *steps.shape), dtype=torch.int8)
        save_file(shard, path, {"track": track.name})
        size = path.stat().st_size
        files[path.name] = {"count": rows, "bytes": size, "sha256": sha256_of(path)}
    table = {"pooled": torch.randn(10, track.text_width).half()}
    metadata = {"labels": str(list(range(10))), "captions": json.dumps(["noise"] * 10)}
    save_file(table, folder / "text.safetensors", metadata)
    manifest = {"files": files, "request": {"shards": "noise"}}  # a part of a track: a trial
    (folder / "manifest.json").write_text(json.dumps(manifest))


def place_data(track, data: str):
    """The track's data in the current folder, once: its own by a link to `data`, or noise.

    data: "" for noise, which is also made where that folder has no such track.
    """
    home = Path("data", track.name)
    real = Path(data, track.name)
    if home.exists():
        return
    home.parent.mkdir(exist_ok=True)
    if data and (real / "manifest.json").exists():
        home.symlink_to(real, target_is_directory=True)
    else:
        write_noise(track, home)


def load_script(path: str, config: str, changes: dict, steps: int, data: str):
    """The script as a module, whose config and track are cut to a timed run. Raises UserError."""
    try:
        module = import_snapshot(Path(path))
        base = module.CONFIGS[config]
        cut = replace(base, **changes, steps=steps, evals=1, save_every=10**9)
        track = module.TRACKS[base.track]
    except (Exception, SystemExit) as error:  # a script may fail in any way
        raise UserError(f"{path}, {config}: {type(error).__name__}: {error}")
    place_data(track, data)
    files = json.loads(Path("data", track.name, "manifest.json").read_text())["files"]
    images = sum(files[name]["count"] for name in files if name.startswith("train_"))
    validated = min(track.val_images, VALIDATION_IMAGES)
    module.TRACKS[track.name] = replace(track, train_images=images, val_images=validated)
    module.CONFIGS[config] = cut
    sys.argv = [path, config]
    return module


def train(path: str, config: str, changes: dict, steps: int, data: str) -> int:
    """Trains; the log goes to standard output."""
    return load_script(path, config, changes, steps, data).main()


class ModelFlops(TorchDispatchMode):
    """Counts the FLOPs that run while "forward" or "backward" is open inside a "step".

    A dispatch mode sees annotations open and close as operations. What is open is kept here and
    not by thread, because on a GPU autograd runs backward in a thread of its own.
    """

    def __init__(self):
        super().__init__()
        self.open = []
        self.total = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = operation(*args, **kwargs)
        if operation is torch.ops.profiler._record_function_enter_new.default:
            self.open.append(args[0])
        elif operation is torch.ops.profiler._record_function_exit._RecordFunction:
            self.open.pop()
        elif "step" in self.open and ("forward" in self.open or "backward" in self.open):
            formula = flop_registry.get(operation._overloadpacket)
            if formula:
                self.total += formula(*args, **kwargs, out_val=result)
        return result


def count_flops(path: str, config: str, changes: dict, steps: int, data: str) -> int:
    """Prints the track, and FLOPs of forward and backward of an image: 0 without annotations."""
    torch.compiler.set_stance("force_eager")  # so that each operation passes the dispatch mode
    module = load_script(path, config, changes | {"batch_size": FLOPS_BATCH}, FLOPS_STEPS, data)
    with ModelFlops() as counter:
        status = module.main()
    print("track:", json.dumps(module.CONFIGS[config].track))
    print("flops:", counter.total / (FLOPS_BATCH * FLOPS_STEPS))
    return status


def profile_parts(path: str, config: str, changes: dict, steps: int, data: str) -> int:
    """Trains under torch.profiler and prints the parts of a step as JSON, from one process."""
    module = load_script(path, config, changes, steps, data)
    with torch.profiler.profile() as profiler:
        status = module.main()
    if int(os.environ.get("RANK", 0)) == 0:
        trace = Path("trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_bytes())["traceEvents"]
        print("parts:", json.dumps(average_parts(events, first_counted(steps))))
    return status


CHILDREN = {"train": train, "flops": count_flops, "parts": profile_parts}

# ---------------------------------------------------------------------------------------------
# The comparison
# ---------------------------------------------------------------------------------------------


def parse_changes(pairs: list) -> dict:
    """["batch_size=8", "bf16=False"] -> {"batch_size": 8, "bf16": False}. Raises UserError."""
    changes = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        try:
            changes[name] = ast.literal_eval(value)
            if name == "batch_size" and not (isinstance(changes[name], int) and changes[name] > 0):
                raise ValueError("no number of images")
        except (ValueError, SyntaxError):
            raise UserError(f"{pair!r} is no change of a config: write name=value, text in quotes")
    return changes


class Side:
    """One of the two: script, changes of its config, what was measured. Raises UserError."""

    def __init__(self, argument: str, options: argparse.Namespace):
        path, _, changes = argument.partition(":")
        self.name = argument
        self.options = options
        self.path = Path(path)
        if self.path.is_dir():
            self.path = self.path / "train_speedrun.py"
        self.changes = parse_changes(options.set + (changes.split(",") if changes else []))
        try:
            self.source = self.path.read_text()
        except (OSError, ValueError) as error:
            raise UserError(f"{argument}: {type(error).__name__}: {error}")
        self.seconds = []  # per step, of each round; images per step and peak MiB with them
        self.fixed = []  # seconds on the clock beside the steps: of each round
        self.flops = 0.0  # of an image; 0 where the script annotates no parts
        self.parts = {}  # milliseconds; empty where the script annotates no steps

    def output(self, task: str, folder: Path, processes: int = 1) -> str:
        """Standard output of a run with the data in `folder`. Raises UserError."""
        launcher = f"-m torch.distributed.run --standalone --nproc_per_node={processes}"
        command = [sys.executable, *(launcher.split() if processes > 1 else [])]
        command += [__file__, "--child", task, str(self.path.resolve()), self.options.config]
        data = "" if self.options.noise else str(ROOT / "data")
        command += [repr(self.changes), str(self.options.steps), data]
        done = subprocess.run(command, cwd=folder, text=True, capture_output=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            own_lines = [line for line in lines if re.match(r"\w+\.py: ", line)]
            raise UserError(f"{self.name} failed: {(own_lines or lines)[-1]}")
        return done.stdout

    def value(self, key: str, output: str):
        """The JSON that a run printed after `key: `. Raises UserError where there is none."""
        found = re.findall(rf"^{key}: (.*)", output, re.M)
        try:
            return json.loads(found[-1])  # the log's last block may have such a key, too
        except (IndexError, ValueError):
            raise UserError(f"{self.name} failed: it ended without a word of its {key}")

    def measure_round(self, folder: Path):
        """One run: adds its seconds per step. Raises UserError."""
        log = self.output("train", folder, self.options.processes)
        pattern = r"^step:(\d+)/\d+ images:(\d+) train_loss:\S+ train_time:(\d+)ms"
        lines = {int(line[1]): line for line in re.finditer(pattern, log, re.M)}
        first = first_counted(self.options.steps)
        last = self.options.steps
        memory = re.search(r"^peak_memory_mib: (\d+)", log, re.M)
        if first not in lines or last not in lines or not memory:
            raise UserError(f"{self.name}: its log lacks step {first}, {last} or its last block")
        self.images = (int(lines[last][2]) - int(lines[first][2])) // (last - first)
        milliseconds = int(lines[last][3]) - int(lines[first][3])
        if self.images < 1 or milliseconds < 1:
            raise UserError(f"{self.name}: its log counts no images, or no time, for a step")
        self.seconds.append(milliseconds / 1000 / (last - first))
        self.fixed.append(int(lines[first][3]) / 1000 - first * self.seconds[-1])
        self.memory = int(memory[1])


def compare(options: argparse.Namespace) -> list:
    """Both sides, measured in turn. Raises UserError."""
    sides = [Side(options.a, options), Side(options.b, options)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for side in sides:
            output = side.output("flops", folder)
            side.flops = side.value("flops", output)
            side.track = side.value("track", output)
        if sides[0].track != sides[1].track:
            raise UserError(f"{sides[0].track} and {sides[1].track}: the tracks differ")
        for turn in range(options.rounds):
            for side in sides:
                side.measure_round(folder)
                milliseconds = 1000 * side.seconds[-1]
                print(f"round {turn + 1}: {side.name}: {milliseconds:.2f} ms/step", flush=True)
        for side in sides:
            output = side.output("parts", folder, options.processes)
            side.parts = side.value("parts", output)
    return sides


def matmul_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a matrix product on this machine's device, best of 5."""
    size, device = (16_384, "cuda") if torch.cuda.is_available() else (4096, "cpu")
    left, right = torch.randn(2, size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(5):
        began = now()
        left @ right
        best = min(best, now() - began)
    return 2 * size**3 / best


def stated_peak(name: str) -> float:
    """FLOP/s of the GPU of this name by its maker's word; not a number where none is known."""
    return next((PEAK[model] for model in PEAK if model in name), float("nan"))


def speed_row(tag: str, side: Side, rate: float, peak: float) -> str:
    """A side's row of the table of speed. rate, peak: FLOP/s of one device."""
    mean = statistics.mean(side.seconds)
    spread = f"{1000 * min(side.seconds):.2f} - {1000 * max(side.seconds):.2f}"
    flops, floor, mfu = "-", "-", "-"
    if side.flops:
        of_step = side.flops * side.images / side.options.processes
        flops = f"{side.flops / 1e9:.4g}"
        floor = f"{1000 * of_step / rate:.4g}"
        mfu = f"{of_step / mean / peak:.1%}"
    return (
        f"| {tag}: {side.name} | {1000 * mean:.2f} ({spread}) | {1 / mean:.3f} | "
        f"{side.images / mean:.1f} | {flops} | {floor} | {mfu} | {side.memory} |"
    )


def parts_table(sides: list) -> list:
    """Lines: milliseconds of each part of a step, and whose steps have no parts."""
    names = dict.fromkeys([*sides[0].parts, *sides[1].parts])  # each once, in this order
    names = [name for name in names if name not in ("rest", "step")] + ["rest", "step"]
    lines = ["\nParts of a step, in ms, of one more run, under torch.profiler\n"]
    lines += [f"| | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    notes = []
    for tag, side in zip("AB", sides, strict=True):
        cells = [f"{side.parts[name]:.2f}" if name in side.parts else "-" for name in names]
        lines.append(f"| {tag} | {' | '.join(cells)} |")
        if not side.parts:
            notes.append(f"\n{tag} has no parts: its steps are not annotated")
    return lines + notes


def report(sides: list, options: argparse.Namespace) -> str:
    """The tables, the ratio with its spread, what differs."""
    a, b = sides
    name = f"{machine(torch.device('cpu'))}, {torch.get_num_threads()} threads"
    dtype = product_dtype(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    rate = matmul_rate(dtype)
    peak = rate
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        peak = stated_peak(name)
    names = (
        "ms/step (min - max) | steps/s | images/s | GFLOP/image | floor, ms/step | MFU | peak MiB"
    )
    lines = [
        f"{options.processes} x {name}, torch {torch.__version__}, {options.config}, "
        f"{options.rounds} rounds of {options.steps} steps; matrix product: "
        f"{rate / 1e12:.3f} TFLOP/s measured in {dtype}, {matmul_rate(torch.float32) / 1e12:.3f} "
        f"in fp32, {peak / 1e12:.3f} taken as the peak of MFU",
        f"\n| | {names} |\n|---|---|---|---|---|---|---|---|",
        speed_row("A", a, rate, peak),
        speed_row("B", b, rate, peak),
    ]
    ratios = []
    for seconds_a, seconds_b in zip(a.seconds, b.seconds, strict=True):
        ratios.append((b.images / seconds_b) / (a.images / seconds_a))
    ratio = f"{statistics.mean(ratios):.3f} times as many images a second as A"
    lines.append(f"\nB trains {ratio} (rounds: {min(ratios):.3f} - {max(ratios):.3f})")
    lines += parts_table(sides)
    sources = [side.source.splitlines() for side in sides]
    diff = list(difflib.unified_diff(*sources, "A", "B", n=0, lineterm=""))
    added = sum(line.startswith("+") for line in diff[2:])
    gone = sum(line.startswith("-") for line in diff[2:])
    lines.append(f"\nscripts: {added} lines only in B, {gone} only in A")
    if options.diff:
        lines += diff
    return "\n".join(lines)


def parse_options(arguments: list) -> argparse.Namespace:
    """The command line. Raises UserError."""
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("a")
    parser.add_argument("b")
    parser.add_argument("--config", default="cifar10" + "-cpu" * (not torch.cuda.is_available()))
    parser.add_argument("--race", action="store_true")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--set", nargs="*", default=[])
    parser.add_argument("--noise", action="store_true")
    parser.add_argument("--diff", action="store_true")
    options = parser.parse_args(arguments)
    if options.steps is None:
        options.steps = 300 if options.race else 100
    if not (3 <= options.steps <= 10 or options.steps % 50 == 0 < options.steps):
        raise UserError("--steps must be 3 .. 10 or a multiple of 50: those are logged")
    if min(options.rounds, options.processes) < 1:
        raise UserError("--rounds and --processes must be 1 or more")
    return options


def main(arguments: list) -> int:
    try:
        if arguments[:1] == ["--child"]:
            task, path, config, changes, steps, data = arguments[1:]
            return CHILDREN[task](path, config, ast.literal_eval(changes), int(steps), data)
        options = parse_options(arguments)
        if options.race:
            from records.race import race  # which takes its sides from here

            print(race(options))
        else:
            print(report(compare(options), options))
    except (UserError, OSError) as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
