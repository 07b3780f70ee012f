"""Time two snapshots in turn on one machine: A B A B. The tool with which records are timed.

    python records/compare.py A B                        the default config of this machine
      --config imagenet256 --steps 10 --set batch_size=8 the same changes for both
      --processes 8                                      under torchrun, one process a GPU
      --diff                                             the scripts' difference, whole

A and B are scripts or record folders, each with changes of its own config after a colon:
train_speedrun.py:compile=False,bf16=False. Both train on the same shards: data/<track> where it is
there, else noise of its shape. A run is a process of its own; its time is what its own clock says
between two of its logged steps, so warm-up and compilation are out. Besides steps/s, images/s and
peak memory: FLOPs of forward and backward of one image (counted in eager PyTorch, of matrix
products, convolutions and attention), the share of the peak that they come to (MFU), the machine's
own bf16 matrix product, which is the floor of a step, and the time of each part of a step.
"""
import argparse, ast, difflib, importlib.util, json, os, re, statistics, subprocess  # noqa: E401
import sys, tempfile, time  # noqa: E401
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}      # bf16 FLOP/s, dense, as stated
VALIDATION = 64                                              # images: the copies do not validate

# ---------------------------------------------------------------------------------------------
# What runs in a process of its own
# ---------------------------------------------------------------------------------------------

def first_counted(steps: int) -> int:
    """Steps before this one are not timed; the log has a line of it."""
    return 10 if steps > 10 else 2

def now() -> float:
    """Seconds, once the device has done all it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()

def imported(path):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location("snapshot", path)
    module = sys.modules["snapshot"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def load(path: str, config: str, changes: dict, steps: int):
    """The script as a module, its config and track cut to a timed run."""
    module = imported(path)
    cfg = module.CONFIGS[config]
    track = module.TRACKS[cfg.track]
    count = json.loads(Path("data", track.name, "manifest.json").read_text())["count"]
    module.TRACKS[track.name] = replace(track, train_images=count, val_images=VALIDATION)
    module.CONFIGS[config] = replace(cfg, **changes, steps=steps, evals=1, save_every=10 ** 9)
    return module

def run(path: str, config: str, changes: dict, steps: int):
    """Trains; the log goes to standard output."""
    module = load(path, config, changes, steps)
    sys.argv = [path, config]
    sys.exit(module.main())

class Counted(Exception):
    """Ends a run once its first step is counted."""

def count_flops(path: str, config: str, changes: dict, steps: int):
    """Prints FLOPs of forward and backward of an image: the first step's, of 4 images, eager."""
    from torch.utils.flop_counter import FlopCounterMode
    module = load(path, config, changes | dict(compile=False, batch_size=4, micro_batch=0), steps)
    original = module.train_step

    def counted(*args, **kwargs):
        with FlopCounterMode(display=False) as counter:
            original(*args, **kwargs)
        print("flops:", counter.get_total_flops() / 4)
        raise Counted
    module.train_step = counted
    module.Muon.step = lambda self: None                     # the optimizer's are not the model's
    sys.argv = [path, config]
    try:
        module.main()
    except Counted:
        pass

PARTS = ("loader", "batch", "forward", "backward", "Muon", "AdamW", "EMA")

def break_down(path: str, config: str, changes: dict, steps: int):
    """Prints milliseconds a step of each part, waiting for the device wherever one begins or ends:
    together they take a little longer than a step does. The rest is what is in none of them."""
    module = load(path, config, changes, steps)
    spent, first = dict.fromkeys(PARTS, 0.0), first_counted(steps)

    def timed(part: str, holder, name: str):
        original = getattr(holder, name)

        def wrapper(*args, **kwargs):
            began = now()
            if part == "loader" and args[1] == first:            # all before it was to get warm
                spent.update(dict.fromkeys(PARTS, 0.0), began=began)
            out = original(*args, **kwargs)
            spent[part] += now() - began
            return out
        setattr(holder, name, wrapper)

    state, step = module.State.__init__, module.train_step

    def made(self, *args):
        state(self, *args)
        timed("forward", self, "training_loss")

    def stepped(*args):
        out = step(*args)
        spent["ended"] = now()
        return out
    module.State.__init__, module.train_step = made, stepped
    timed("loader", module.Loader, "__call__")
    timed("batch", module, "make_batch")
    timed("backward", torch.Tensor, "backward")
    timed("Muon", module.Muon, "step")
    timed("AdamW", torch.optim.AdamW, "step")
    timed("EMA", torch, "_foreach_lerp_")
    sys.argv = [path, config]
    if status := module.main():
        sys.exit(status)
    whole = spent.pop("ended") - spent.pop("began")
    spent.update(rest=whole - sum(spent.values()), step=whole)
    if int(os.environ.get("RANK", 0)) == 0:
        print("parts:", json.dumps({k: 1000 * v / (steps - first) for k, v in spent.items()}))

# ---------------------------------------------------------------------------------------------
# Data, commands, logs
# ---------------------------------------------------------------------------------------------

def write_noise(track, folder: Path, tokens: int, count: int = 2048):
    """Shards and a caption table of the track's shapes, with DINOv2's features, all noise."""
    g, home, files = torch.Generator().manual_seed(0), folder / "data" / track.name, {}
    home.mkdir(parents=True)
    for name, n in (("train_000", count), ("val_000", VALIDATION)):
        x = torch.randn(n, *track.shape, generator=g) / track.scale + track.shift
        rows = dict(latents=x.clamp(0, 255).to(torch.uint8) if track.dtype == "uint8" else x.half(),
                    labels=torch.arange(n).remainder(10).to(torch.int16),
                    features=torch.randint(-127, 128, (n, 257, 64), generator=g).to(torch.int8))
        save_file(rows, path := home / f"{name}.safetensors", dict(track=track.name))
        files[path.name] = dict(count=n, bytes=path.stat().st_size)
    table = dict(pooled=torch.randn(10, track.text_width, generator=g).half(),
                 tokens=torch.randn(10, max(tokens, 1), track.text_width, generator=g).half())
    save_file(table, home / "text.safetensors", dict(labels=json.dumps(list(range(10)))))
    (home / "manifest.json").write_text(json.dumps(dict(count=count, files=files)))

def borrow(real: Path, folder: Path):
    """The track's own shards, by links, under a manifest that counts them."""
    manifest = json.loads((real / "manifest.json").read_text())
    home = folder / "data" / real.name
    home.mkdir(parents=True)
    for file in real.iterdir():
        (home / file.name).symlink_to(file.resolve())
    manifest["count"] = sum(e["count"] for name, e in manifest["files"].items()
                            if name.startswith("train_"))
    (home / "manifest.json").unlink()
    (home / "manifest.json").write_text(json.dumps(manifest))

class Side:
    """One of the two: its script, the changes of its config, what was measured."""

    def __init__(self, given: str, common: dict, args):
        path, _, own = given.partition(":")
        self.path = Path(path, "train_speedrun.py") if Path(path).is_dir() else Path(path)
        self.source, self.args = self.path.read_text(), args
        self.name, self.changes = given, common | parse(own.split(",") if own else [])
        self.seconds, self.memory, self.images = [], 0, 0
        self.module = imported(self.path)
        self.cfg = replace(self.module.CONFIGS[args.config], **self.changes)

    def command(self, what: str, processes: int = 1) -> list:
        call = [__file__, "--child", what, str(self.path.resolve()), self.args.config,
                json.dumps(self.changes), str(self.args.steps)]
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        return [sys.executable, *(launcher if processes > 1 else []), *map(str, call)]

    def output(self, what: str, folder: Path, processes: int = 1) -> str:
        done = subprocess.run(self.command(what, processes), cwd=folder, text=True,
                              capture_output=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            sys.exit(f"compare.py: {self.name} failed: {lines[-1]}")
        return done.stdout

    def measure(self, folder: Path):
        """One run: adds its seconds per step."""
        log = self.output("run", folder, self.args.processes)
        lines = {int(step): (int(images), float(ms)) for step, images, ms in re.findall(
            r"^step:(\d+)/\d+ images:(\d+) train_loss:\S+ train_time:(\d+)ms", log, re.M)}
        first, last = first_counted(self.args.steps), self.args.steps
        (before, t0), (after, t1) = lines[first], lines[last]
        self.seconds.append((t1 - t0) / 1000 / (last - first))
        self.images = (after - before) // (last - first)
        self.memory = int(re.search(r"^peak_memory_mib: (\d+)", log, re.M)[1])

def parse(pairs: list) -> dict:
    """["batch_size=8", "bf16=False"] -> {"batch_size": 8, "bf16": False}"""
    return {key: ast.literal_eval(value) for key, value in (p.split("=", 1) for p in pairs)}

def matmul_rate(dtype) -> float:
    """FLOP/s of a matrix product on this machine's device, best of 5."""
    n, device = (16_384, "cuda") if torch.cuda.is_available() else (4096, "cpu")
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    best = float("inf")
    for _ in range(5):
        began = now()
        a @ b
        best = min(best, now() - began)
    return 2 * n ** 3 / best

# ---------------------------------------------------------------------------------------------
# The comparison
# ---------------------------------------------------------------------------------------------

def compare(args) -> list:
    """Measures both sides in turn; returns them, with seconds per step of each round."""
    sides = [Side(given, parse(args.set), args) for given in (args.a, args.b)]
    cfg, track = sides[0].cfg, sides[0].module.TRACKS[sides[0].cfg.track]
    real = ROOT / "data" / track.name
    features = any(getattr(s.cfg, "reg", 0) or getattr(s.cfg, "repa_layers", ()) for s in sides)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if (real / "manifest.json").exists() and (
                not features or (real / "features.safetensors").exists()):
            borrow(real, folder)
        else:
            write_noise(track, folder, cfg.text_tokens)
        for side in sides:
            out = side.output("flops", folder)
            side.flops = float(re.search(r"^flops: (\S+)", out, re.M)[1])
        for turn in range(args.rounds):
            for side in sides:
                side.measure(folder)
                print(f"round {turn + 1}: {side.name}: {1000 * side.seconds[-1]:.2f} ms/step",
                      flush=True)
        for side in sides:
            out = side.output("parts", folder, args.processes)
            side.parts = json.loads(re.search(r"^parts: (.*)", out, re.M)[1])
    return sides

def report(sides: list, args) -> str:
    """The table, the ratio with its spread, what differs."""
    gpu = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    rate, rate32 = matmul_rate(torch.bfloat16), matmul_rate(torch.float32)
    peak = next((v for k, v in PEAK.items() if k in name), rate if not gpu else float("nan"))
    text = (f"{args.processes} x {name}, torch {torch.__version__}, {args.config}, "
            f"{args.rounds} rounds of {args.steps} steps; bf16 matrix product: {rate / 1e12:.3f} "
            f"TFLOP/s measured (fp32: {rate32 / 1e12:.3f}), {peak / 1e12:.3f} taken as the peak "
            "of MFU\n\n"
            "| | ms/step (min - max) | steps/s | images/s | GFLOP/image | floor, ms/step | MFU "
            "| peak MiB |\n|---|---|---|---|---|---|---|---|\n")
    for tag, s in zip("AB", sides):
        mean = statistics.mean(s.seconds)
        floor = s.flops * s.images / args.processes / rate
        text += (f"| {tag}: {s.name} | {1000 * mean:.2f} ({1000 * min(s.seconds):.2f} - "
                 f"{1000 * max(s.seconds):.2f}) | {1 / mean:.3f} | {s.images / mean:.1f} | "
                 f"{s.flops / 1e9:.4g} | {1000 * floor:.4g} | "
                 f"{s.flops * s.images / mean / args.processes / peak:.1%} | {s.memory} |\n")
    ratios = [a / b * sides[1].images / sides[0].images
              for a, b in zip(sides[0].seconds, sides[1].seconds)]
    text += (f"\nB trains {statistics.mean(ratios):.3f} times as many images a second as A "
             f"(rounds: {min(ratios):.3f} - {max(ratios):.3f})\n")
    text += ("\nParts of a step, in ms, of one more run that waits for the device between them\n\n"
             f"| | {' | '.join(sides[0].parts)} |\n|---|{'---|' * len(sides[0].parts)}\n")
    for tag, s in zip("AB", sides):
        text += f"| {tag} | {' | '.join(f'{ms:.2f}' for ms in s.parts.values())} |\n"
    diff = list(difflib.unified_diff(*(s.source.splitlines() for s in sides), "A", "B", "", "", 0,
                                     ""))
    added, gone = (sum(line.startswith(c) and not line.startswith(3 * c) for line in diff)
                   for c in "+-")
    text += f"\nscripts: {added} lines only in B, {gone} only in A\n"
    return text + ("\n".join(diff) + "\n") * args.diff

def main(argv: list) -> int:
    if argv[:1] == ["--child"]:
        what, path, config, changes, steps = argv[1:]
        child = dict(run=run, flops=count_flops, parts=break_down)[what]
        child(path, config, json.loads(changes), int(steps))
        return 0
    parser = argparse.ArgumentParser(usage=__doc__)
    add = parser.add_argument
    add("a")
    add("b")
    add("--config", default="cifar10" if torch.cuda.is_available() else "cifar10-cpu")
    add("--steps", type=int, default=100)
    add("--rounds", type=int, default=2)
    add("--processes", type=int, default=1)
    add("--set", nargs="*", default=[])
    add("--diff", action="store_true")
    args = parser.parse_args(argv)
    try:
        if not (3 <= args.steps <= 10 or args.steps % 50 == 0 < args.steps):
            raise ValueError("--steps must be 3 .. 10 or a multiple of 50: those are logged")
        print(report(compare(args), args), end="")
    except (OSError, ValueError, KeyError, TypeError, SyntaxError) as e:
        print(f"compare.py: {type(e).__name__}: {e}", file=sys.stderr)
        return 2
    return 0

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
