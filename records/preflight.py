"""Look at a training step before renting a GPU: compiled for it, counted, its time modelled.

    python records/preflight.py [SCRIPT]                   imagenet256 on one H100
      --against OTHER                                      two scripts side by side
      --config cifar10 --set batch_size=128 --card H200    the same for both
      --processes 8                                        as rank 0 of 8, exchanges modelled
      --kernels                                            what costs most, too

SCRIPT and OTHER are scripts or record folders, as for compare.py; train_speedrun.py if none is
given. Each trains three steps on noise, in a process that null_cuda.cpp is preloaded into: there
PyTorch sees a GPU whose memory is virtual and whose kernels do nothing. Allocator, autocast,
autograd, Inductor, Triton and ptxas for sm_90 are the real ones. Counted in the third step: every
launch, copy and wait of the host, and what the operations behind them read, write and multiply.

What is counted is what a GPU would be given. Milliseconds, images/s and MFU are a model of it, no
measurement: gpu_model.py has what is assumed, and it is printed with them. Numbers in the tensors
mean nothing. cuDNN cannot be rehearsed: flash attention takes the place of cuDNN's. Of a product
that is written in Triton the bytes are counted, not the FLOPs.

Of a script it knows what compare.py knows, with the annotation record_function("step").
"""

import argparse
import ast
import ctypes
import json
import re
import subprocess
import sys
import tempfile
from collections import deque
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data.common import UserError  # noqa: E402
from records.compare import Side, load_script  # noqa: E402
from records.gpu_model import (  # noqa: E402
    CARDS,
    Card,
    Cost,
    exchange_seconds,
    kernel_bytes,
    operation_cost,
    size_of,
)
from records.null_device import build_library, check_installation, environment  # noqa: E402

WATCHED = 3  # the step that is counted, from 1: those before it may compile and allocate

# ---------------------------------------------------------------------------------------------
# What runs in a process of its own, on the null device
# ---------------------------------------------------------------------------------------------


class Finished(BaseException):
    """Ends the script's main() after the step that was counted."""


class Rehearsal(TorchDispatchMode):
    """Notes what each operation of the counted step launches, and when it would be done.

    Kernels run one after another, exchanges one after another beside them, and a wait is for the
    oldest exchange that nobody has waited for.
    """

    def __init__(self, card: Card, processes: int):
        super().__init__()
        self.card = card
        self.processes = processes
        self.device = ctypes.CDLL(None)
        self.device.null_take.restype = ctypes.c_char_p
        self.open = []  # annotations
        self.steps = 0
        self.entries = []  # a dict of each operation or kernel that reached the device
        self.seconds = 0.0  # of the kernels' stream, since the counted step began
        self.exchanges = deque()  # when those will end that nobody has waited for
        self.exchange_end = 0.0
        self.peak_memory = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """What is compiled stays compiled, and its own operations arrive here when they run."""
        return True

    def is_watching(self) -> bool:
        return self.steps == WATCHED and "step" in self.open

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.note("(no operation)", Cost)  # what was launched since the last one
        if operation is torch.ops.profiler._record_function_enter_new.default:
            self.enter(args[0])
        elif operation is torch.ops.profiler._record_function_exit._RecordFunction:
            self.leave()
        result = operation(*args, **kwargs)
        if operation.namespace == "c10d":
            self.exchange(operation, args, result)
        else:
            shapes = [list(x.shape) for x in args[:3] if isinstance(x, torch.Tensor)]
            name = " ".join(map(str, [operation._overloadpacket.__name__, *shapes]))
            self.note(name, lambda: operation_cost(self.card, operation, args, kwargs, result))
            self.answer(operation, args, kwargs, result)
        return result

    def answer(self, operation, args: tuple, kwargs: dict, result):
        """Computes small yes-or-no results on the host: a script may check its losses."""
        is_question = isinstance(result, torch.Tensor) and result.dtype == torch.bool
        if is_question and result.is_cuda and result.numel() < 2**16 and not self.is_watching():
            on_host = tree_map_only(torch.Tensor, torch.Tensor.cpu, (args, kwargs))
            result.copy_(operation(*on_host[0], **on_host[1]))

    def enter(self, name: str):
        self.open.append(name)
        if name == "step":
            self.steps += 1
            if self.is_watching():
                torch.cuda.reset_peak_memory_stats()
                self.device.null_log(1)

    def leave(self):
        if self.is_watching() and self.open[-1] == "step":
            self.device.null_log(0)
            self.peak_memory = torch.cuda.max_memory_allocated()
            raise Finished
        self.open.pop()

    def note(self, name: str, cost):
        """Adds what the device was given since the last call, if anything. cost(): its Cost."""
        lines = self.device.null_take().decode().splitlines()
        if not self.is_watching() or not lines:
            return
        events = [line.split() for line in lines]
        kinds = [event[1] for event in events if event[0] == "kernel"]
        copies = [event for event in events if event[0] == "copy"]
        kinds += ["other" for event in copies if event[1] == "DtoD"]
        sent = sum(int(event[3]) for event in copies if event[1] != "DtoD")
        moved, flops, seconds = cost() if kinds else Cost()
        seconds = max(seconds, self.card.kernel * len(kinds)) + sent / self.card.pinned
        waits = [event[1] for event in events if event[0] == "sync"]
        pageable = sum(event[2] == "PAGEABLE" for event in copies)
        counts = dict(waits=len(waits), pageable=pageable, sent=sent)
        self.add(name, seconds, kinds=kinds, bytes=moved, flops=flops, **counts)

    def add(self, name: str, seconds: float, **counts):
        inside = self.open[self.open.index("step") + 1 :]
        part = inside[0] if inside else "rest"
        self.seconds += seconds
        self.entries.append(dict(part=part, name=name, seconds=seconds) | counts)

    def exchange(self, operation, args: tuple, result):
        if self.is_watching():
            size = max(map(size_of, [*args, result]))
            name = operation._overloadpacket.__name__
            lasts = exchange_seconds(self.card, name, size, self.processes)
            self.exchange_end = max(self.exchange_end, self.seconds) + lasts
            self.exchanges.append(self.exchange_end)
            self.add(f"{name} {size} bytes", 0.0, exchanged=size)

    def wait(self):
        if self.exchanges:
            left = self.exchanges.popleft() - self.seconds
            self.add("(waits for an exchange)", max(0.0, left), waited=max(0.0, left))


def watch_triton(rehearsal: Rehearsal):
    """Each launch of a kernel that Inductor made is noted, with the bytes that it says it moves."""
    from torch._inductor.codegen.simd import SIMDKernel
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    SIMDKernel.estimate_kernel_num_bytes = kernel_bytes
    launch = CachingAutotuner.run

    def run(kernel, *args, **kwargs):
        result = launch(kernel, *args, **kwargs)
        moved = 1e9 * kernel.inductor_meta.get("kernel_num_gb", 0.0)
        seconds = moved / (rehearsal.card.bandwidth * rehearsal.card.streaming)
        rehearsal.note(kernel.fn.__name__, lambda: Cost(moved, 0.0, seconds))
        return result

    CachingAutotuner.run = run


def play_one_rank(rehearsal: Rehearsal):
    """Process groups exchange nothing and return at once; their waits are noted."""
    from torch._C._distributed_c10d import FakeWork
    from torch.testing._internal.distributed.fake_pg import FakeStore

    start = dist.init_process_group
    size = dict(rank=0, world_size=rehearsal.processes)

    def init_process_group(*args, **kwargs):
        start("fake", store=FakeStore(), **size)

    dist.init_process_group = init_process_group
    wait = FakeWork.wait

    def wait_and_note(work, *args):
        rehearsal.wait()
        return wait(work, *args)

    FakeWork.wait = wait_and_note


def rehearse(path: str, config: str, changes: dict, card: Card, processes: int) -> int:
    """Trains three steps in the current folder and prints what the last one was, as JSON."""
    torch.backends.cuda.enable_cudnn_sdp(False)
    module = load_script(path, config, changes, WATCHED + 1, data="")
    rehearsal = Rehearsal(card, processes)
    watch_triton(rehearsal)
    if processes > 1:
        play_one_rank(rehearsal)
    status = 0
    try:
        with rehearsal:
            status = module.main()
    except Finished:
        counters = torch._dynamo.utils.counters
        found = dict(entries=rehearsal.entries, peak_memory=rehearsal.peak_memory)
        found |= dict(graphs=counters["stats"]["unique_graphs"])
        found |= dict(breaks=sum(counters["graph_break"].values()))
        found |= dict(recompiles=sum(counters["recompiles"].values()))
        found |= dict(images=module.CONFIGS[config].batch_size)
        print("preflight:", json.dumps(found))
    return status


def measure(side: Side, options: argparse.Namespace, library: Path, folder: Path) -> dict:
    """What `rehearse` found of this script, trained on noise in `folder`. Raises UserError."""
    command = [sys.executable, __file__, "--child", side.path.resolve(), options.config]
    command += [repr(side.changes), options.card, options.processes]
    done = subprocess.run(
        [*map(str, command)],
        cwd=folder,
        env=environment(library, CARDS[options.card], options.processes),
        capture_output=True,
        text=True,
    )
    found = re.search(r"^preflight: (.*)", done.stdout, re.M)
    if found:
        return json.loads(found[1])
    if done.returncode == 0:
        raise UserError(f"{side.name}: no {WATCHED} of its steps are annotated as record_function")
    lines = done.stderr.strip().splitlines() or [f"ended with {done.returncode}, no message"]
    own_lines = [line for line in lines if re.match(r"\w+\.py: |torch\.\w*Error: ", line)]
    raise UserError(f"{side.name} failed: {(own_lines or lines)[-1]}")


# ---------------------------------------------------------------------------------------------
# The report
# ---------------------------------------------------------------------------------------------


def total(entries: list, key: str) -> float:
    return sum(entry.get(key, 0) for entry in entries)


def launches(entries: list, kind: str = "") -> int:
    """How many kernels were launched: all, or those of "triton", "cublas" or "other"."""
    kinds = [found for entry in entries for found in entry.get("kinds", ())]
    return kinds.count(kind) if kind else len(kinds)


def identity(entry: dict) -> tuple:
    """Equal for launches of the same kernel. Inductor gives a name once in each of its graphs."""
    return entry["part"], entry["name"], entry.get("bytes", 0)


def summary(found: dict, card: Card) -> dict:
    """The step as a whole: {quantity: text}."""
    entries = found["entries"]
    host = card.launch * launches(entries)
    step = max(total(entries, "seconds"), host)
    model = [entry for entry in entries if entry["part"] in ("forward", "backward")]
    mfu = f"{total(model, 'flops') / step / card.bf16:.1%}" if model else "-"  # not annotated
    kinds = ", ".join(f"{launches(entries, kind)} {kind}" for kind in ("triton", "cublas", "other"))
    compiled = {identity(entry) for entry in entries if "triton" in entry.get("kinds", ())}
    return {
        "ms of a step, modelled": f"{1000 * step:.1f}",
        "images/s of all processes, modelled": f"{found['images'] / step:,.0f}",
        "MFU of forward and backward, modelled": mfu,
        "ms of the host's launches, modelled": f"{1000 * host:.1f}",
        "launches": f"{launches(entries)}: {kinds}",
        "different Triton kernels": str(len(compiled)),
        "GB read and written": f"{total(entries, 'bytes') / 1e9:.2f}",
        "TFLOP": f"{total(entries, 'flops') / 1e12:.4f}",
        "waits of the host": f"{total(entries, 'waits')}",
        "pageable copies": f"{total(entries, 'pageable')}",
        "MB copied to or from the host": f"{total(entries, 'sent') / 1e6:.2f}",
        "MB exchanged": f"{total(entries, 'exchanged') / 1e6:.1f}",
        "peak GiB of the allocator, in the step": f"{found['peak_memory'] / 2**30:.2f}",
        "graphs, their breaks, recompilations": f"{found['graphs']}, {found['breaks']}, "
        f"{found['recompiles']}",
    }


def part_cells(entries: list) -> dict:
    """One part of a step: {quantity: text}."""
    return {
        "ms": f"{1000 * total(entries, 'seconds'):.2f}",
        "of them for exchanges": f"{1000 * total(entries, 'waited'):.2f}",
        "launches": str(launches(entries)),
        "waits of the host": str(total(entries, "waits")),
        "GB": f"{total(entries, 'bytes') / 1e9:.2f}",
        "TFLOP": f"{total(entries, 'flops') / 1e12:.3f}",
        "MB exchanged": f"{total(entries, 'exchanged') / 1e6:.1f}",
    }


def table(head: list, rows: list) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def costliest(entries: list, count: int = 30) -> str:
    """What takes longest, launches of the same kernel together."""
    groups = {}
    for entry in entries:
        groups.setdefault(identity(entry), []).append(entry)
    rows = []
    for group in sorted(groups.values(), key=lambda group: -total(group, "seconds"))[:count]:
        seconds = total(group, "seconds")
        megabytes = f"{total(group, 'bytes') / len(group) / 1e6:.1f}"
        rate = f"{total(group, 'flops') / max(seconds, 1e-9) / 1e12:.0f}"
        first = group[0]
        rows.append(
            [f"{1000 * seconds:.2f}", len(group), megabytes, rate, first["part"], first["name"]]
        )
    return table(["ms", "times", "MB each", "TFLOP/s", "part", "operation or kernel"], rows)


def report(sides: list, results: list, options: argparse.Namespace) -> str:
    """The assumptions, the tables of one script or of two side by side."""
    card = CARDS[options.card]
    names = [f"{tag}: {side.name}" for tag, side in zip("AB", sides)]
    lines = [
        f"A model of {options.processes} x {card.name}, no measurement: on a null device no kernel "
        f"ran. {options.config}, torch {torch.__version__}.\n",
        card.table() + "\n",
    ]
    summaries = [summary(found, card) for found in results]
    rows = [[name, *(cells[name] for cells in summaries)] for name in summaries[0]]
    lines.append(table(["one step of one process", *names], rows) + "\n")
    split = []  # of each script: {part: its entries}
    for found in results:
        parts = {}
        for entry in found["entries"]:
            parts.setdefault(entry["part"], []).append(entry)
        split.append(parts)
    head = part_cells([])
    tags = [f"{name}, {tag}" for name in head for tag in "AB"[: len(sides)]]
    rows = []
    for part in dict.fromkeys(part for parts in split for part in parts):
        cells = [part_cells(parts.get(part, [])) for parts in split]
        rows.append([part, *(cell[name] for name in head for cell in cells)])
    lines.append(table(["part, modelled", *tags], rows))
    for tag, found in zip("AB", results * options.kernels):
        lines.append(f"\nWhat costs most in {tag}, modelled\n\n{costliest(found['entries'])}")
    return "\n".join(lines)


def main(arguments: list) -> int:
    if arguments[:1] == ["--child"]:
        _, path, config, changes, card, processes = arguments
        return rehearse(path, config, ast.literal_eval(changes), CARDS[card], int(processes))
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("script", nargs="?", default="train_speedrun.py")
    parser.add_argument("--against", metavar="OTHER")
    parser.add_argument("--config", default="imagenet256")
    parser.add_argument("--card", choices=CARDS, default="H100")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--set", nargs="*", default=[])
    parser.add_argument("--kernels", action="store_true")
    options = parser.parse_args(arguments)
    try:
        if options.processes < 1:
            raise UserError("--processes is at least 1")
        check_installation()
        library = build_library()
        sides = [Side(options.script, options)]
        sides += [Side(options.against, options)] if options.against else []
        with tempfile.TemporaryDirectory() as temporary:
            results = [measure(side, options, library, Path(temporary)) for side in sides]
        print(report(sides, results, options))
    except (UserError, OSError) as error:
        print(f"preflight.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
