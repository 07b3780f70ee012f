"""What preflight.py assumes of a GPU, and what an operation costs there by it.

All of it is a model: nothing here was measured. Card holds every number that an estimate rests on.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry


def assumed(value: float, unit: str, meaning: str):
    """One number of the table, with what it is for."""
    return field(default=value, metadata=dict(unit=unit, meaning=meaning))


@dataclass(frozen=True)
class Card:
    """A GPU as it is modelled. Every estimate is printed under this table."""

    name: str
    memory: float = assumed(85_520_809_984, "bytes", "device memory")
    bandwidth: float = assumed(3.35e12, "bytes/s", "of the device memory, as stated")
    streaming: float = assumed(0.85, "of it", "reached by a kernel that is not a product")
    bf16: float = assumed(989e12, "FLOP/s", "dense bf16 and fp16 products, as stated; MFU's peak")
    tf32: float = assumed(494.5e12, "FLOP/s", "fp32 products, where TF32 is allowed")
    fp32: float = assumed(67e12, "FLOP/s", "fp32 products, where it is not")
    product: float = assumed(0.72, "of it", "reached by full waves of 128 x 256 tiles")
    attention: float = assumed(0.40, "of bf16", "reached by flash attention on whole tiles of 128")
    processors: float = assumed(132, "", "multiprocessors; a wave is a tile on each")
    kernel: float = assumed(2.5e-6, "s", "the least that a kernel takes, with the gap after it")
    launch: float = assumed(5e-6, "s", "of the host a launch; a step is no shorter than they are")
    pinned: float = assumed(55e9, "bytes/s", "between device and pinned host memory")
    exchange: float = assumed(360e9, "bytes/s", "that a process sends over NVLink in a ring")
    start: float = assumed(30e-6, "s", "the least that an exchange takes")

    def table(self) -> str:
        """Every number with its unit and its meaning, as Markdown."""
        lines = ["| assumed | | of |", "|---|---|---|"]
        for row in fields(self)[1:]:
            amount = f"{getattr(self, row.name):.4g} {row.metadata['unit']}"
            lines.append(f"| {row.name} | {amount.strip()} | {row.metadata['meaning']} |")
        return "\n".join(lines)


CARDS = {
    "H100": Card("NVIDIA H100 80GB HBM3"),
    "H200": Card("NVIDIA H200", memory=150_754_820_096, bandwidth=4.8e12),
}


class Cost(NamedTuple):
    """Of one operation on the device."""

    bytes: float = 0.0  # read and written
    flops: float = 0.0  # of matrix products, convolutions and attention
    seconds: float = 0.0  # 0 where it launches nothing

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*map(sum, zip(self, other)))


# ---------------------------------------------------------------------------------------------
# Bytes
# ---------------------------------------------------------------------------------------------

LOOKUPS = ("index", "gather", "index_select", "embedding")  # read as much as they write


def tensors_of(value) -> Iterator[Tensor]:
    """The tensors on the device in a value: itself, or what its lists and dicts hold."""
    if isinstance(value, Tensor):
        if value.is_cuda:
            yield value
    elif isinstance(value, dict):
        yield from tensors_of(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_of(item)


def size_of(value) -> int:
    """Bytes of the tensors in a value. One that repeats a smaller storage counts as that."""
    sizes = [
        (x.numel() * x.element_size(), x.untyped_storage().nbytes()) for x in tensors_of(value)
    ]
    return sum(map(min, sizes))


def bytes_moved(operation, args: tuple, kwargs: dict, result) -> int:
    """What an operation reads and writes once, in bytes. Caches are not modelled."""
    names = [argument.name for argument in operation._schema.arguments]
    given = dict(zip(names, args)) | kwargs
    written = size_of(result)
    if not written:  # in place, on lists: fused AdamW's gradients are marked so, but only read
        for argument in operation._schema.arguments:
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            if is_written and argument.name != "grads":
                written += size_of(given.get(argument.name))
    if operation._overloadpacket.__name__ in LOOKUPS:
        return 2 * written
    return written + sum(size_of(given[name]) for name in given if name != "out")


def kernel_bytes(kernel) -> int:
    """What a kernel of Inductor's reads and writes: each part of a buffer once, in bytes.

    It stands for SIMDKernel.estimate_kernel_num_bytes, which counts several parts of a buffer, each
    as large as the kernel's output, as more than the buffer.
    """
    from torch._inductor.dependencies import MemoryDep  # slow to import: only on the null device
    from torch._inductor.virtualized import V

    hint = V.graph.sizevars.optimization_hint
    accesses = kernel.features.buf_accesses()
    in_place = {id(buffer) for buffer in kernel.args.inplace_buffers.values()}
    total = 0
    for place, name in enumerate(kernel.args.python_argdefs()[1]):  # those in place come first
        if name not in accesses:
            continue
        whole = hint(V.graph.get_numel(name))
        parts = {}
        for access in accesses[name]:
            if isinstance(access, MemoryDep):
                access = access.normalize()
                parts[access.index, access.size] = hint(access.get_numel())
            else:
                parts["whole"] = whole
        passes = 2 if place < len(in_place) else 1
        total += passes * min(whole, sum(parts.values())) * V.graph.get_dtype(name).itemsize
    return total


# ---------------------------------------------------------------------------------------------
# Seconds
# ---------------------------------------------------------------------------------------------

# Matrix products by name, with the place of their left matrix among their arguments
PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}
TILES = ((128, 256, 1.0), (128, 128, 0.85), (64, 128, 0.7), (64, 64, 0.5))  # and their speed
SPLITS = (1, 2, 4, 8, 16)  # parts of the inner dimension, at least 512 long each


def product_peak(card: Card, dtype: torch.dtype) -> float:
    """FLOP/s of a matrix product of this type, under this process's setting of TF32."""
    if dtype != torch.float32:
        return card.bf16
    return card.fp32 if torch.get_float32_matmul_precision() == "highest" else card.tf32


def product_seconds(card: Card, batch: int, m: int, n: int, k: int, peak: float) -> float:
    """Of `batch` products (m, k) @ (k, n), by the best of a few tilings in whole waves."""
    best = math.inf
    for rows, columns, speed in TILES:
        of_processor = peak / card.processors * card.product * speed
        for parts in SPLITS:
            if parts > 1 and k // parts < 512:
                continue
            tiles = math.ceil(m / rows) * math.ceil(n / columns) * batch * parts
            waves = math.ceil(tiles / card.processors)
            seconds = waves * 2 * rows * columns * k / parts / of_processor
            best = min(best, seconds + card.kernel * (parts > 1))  # parts are added up
    return best


def attention_seconds(card: Card, flops: float, query: Tensor, key: Tensor) -> float:
    """Of fused attention, forward or backward. query, key: (B, heads, N, head_dim)."""
    for x in (query, key):
        flops *= 128 * math.ceil(x.shape[-2] / 128) / x.shape[-2]
    return flops / (card.bf16 * card.attention)


def operation_cost(card: Card, operation, args: tuple, kwargs: dict, result) -> Cost:
    """Of an operation that PyTorch dispatched and that launched something."""
    name = operation._overloadpacket.__name__
    formula = flop_registry.get(operation._overloadpacket)
    flops = formula(*args, **kwargs, out_val=result) if formula else 0
    moved = bytes_moved(operation, args, kwargs, result)
    seconds = moved / (card.bandwidth * card.streaming)
    given = list(tensors_of(args))
    if name in PRODUCTS:
        left, right = args[PRODUCTS[name] : PRODUCTS[name] + 2]
        *batch, m, k = left.shape
        peak = product_peak(card, left.dtype)
        needed = product_seconds(card, math.prod(batch), m, right.shape[-1], k, peak)
        seconds = max(seconds, needed)
    elif flops and "attention" in name:
        first = int("backward" in name)  # after the gradient of the result
        seconds = max(seconds, attention_seconds(card, flops, *given[first : first + 2]))
    elif flops:
        seconds = max(seconds, flops / (product_peak(card, given[0].dtype) * card.product))
    return Cost(moved, flops, seconds)


def exchange_seconds(card: Card, name: str, size: float, processes: int) -> float:
    """Of a collective of the c10d library in a ring; size: bytes of the whole tensor."""
    rounds = 2 if "allreduce" in name else 1  # of the reductions and the copies
    sent = rounds * size * (processes - 1) / processes
    return max(card.start, sent / card.exchange)
