"""What runs a snapshot: a process that is handed tensors and returns tensors. See sandbox.py.

    python -P data/guest.py SOCKET        in a folder with the snapshot's train_speedrun.py

A message is two lengths, a JSON header and tensors as safetensors: neither can carry code. Requests
are answered one by one, with {"error": ...} where the snapshot's code raised.
    open      {device, threads} -> {tracks: {config: track}}
    load      {file} -> {parameters: [names]}
    velocity  x, t, text, {rounds} -> out, {flops}
    sample    text, {seeds, shape} -> out, {flops, flops_outside, rows}
{compiled} runs the model's forward as compiled code, otherwise all FLOPs are counted. Nothing that
is said here is believed because it is said here: a snapshot can change anything in its process.
sandbox.py measures from outside. Not to be edited for a record.
"""

import json
import math
import os
import socket
import struct
import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn.attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.flop_counter import flop_registry

# ---------------------------------------------------------------------------------------------
# Messages
# ---------------------------------------------------------------------------------------------

LENGTHS = struct.Struct("<QQ")  # bytes of the header and of the tensors
LONGEST_HEADER = 2**20


def pack(header: dict, tensors: dict[str, Tensor]) -> bytes:
    text = json.dumps(header).encode()
    content = save(tensors) if tensors else b""
    return LENGTHS.pack(len(text), len(content)) + text + content


def unpack(read: Callable[[int], bytes], longest: int) -> tuple[dict, dict[str, Tensor]]:
    """The header and tensors that read(count) gives, of at most `longest` bytes of tensors.

    Raises ValueError, RecursionError or SafetensorError for what is no message.
    """
    header_length, length = LENGTHS.unpack(read(LENGTHS.size))
    if header_length > LONGEST_HEADER or length > longest:
        raise ValueError(f"a message of {header_length} + {length} bytes")
    header = json.loads(read(header_length))
    tensors = load(read(length)) if length else {}
    if not isinstance(header, dict):
        raise ValueError("a header that is no object")
    return header, tensors


# ---------------------------------------------------------------------------------------------
# FLOPs
# ---------------------------------------------------------------------------------------------


def mv_flops(matrix, vector, *_, **options) -> int:
    return 2 * matrix.numel()


def addmv_flops(start, matrix, vector, *_, **options) -> int:
    return 2 * matrix.numel()


def dot_flops(a, b, *_, **options) -> int:
    return 2 * a.numel()


def addbmm_flops(start, a, b, *_, **options) -> int:
    return 2 * a.numel() * b.shape[-1]


ATEN = torch.ops.aten
FORMULAS = dict(flop_registry)
FORMULAS |= {ATEN.mv: mv_flops, ATEN.addmv: addmv_flops, ATEN.addbmm: addbmm_flops}
FORMULAS |= {ATEN.dot: dot_flops, ATEN.vdot: dot_flops}
# PyTorch 2.14 has a formula of its flash attention on GPUs alone
FORMULAS.setdefault(
    ATEN._scaled_dot_product_flash_attention_for_cpu,
    FORMULAS[ATEN._scaled_dot_product_flash_attention],
)

# Operations that cost nothing here: views, and what PyTorch marks as elementwise or as a reduction
FREE_TAGS = {torch.Tag.pointwise, getattr(torch.Tag, "reduction", torch.Tag.pointwise)}
FREE_KINDS = ("profiler",)  # namespaces: annotations alone
FREE = {  # and these, by name, also in place (with _ behind it)
    "new tensors and copies": """
        arange empty empty_like empty_strided eye fill full full_like lift lift_fresh
        lift_fresh_copy linspace new_empty new_empty_strided new_full new_ones new_zeros ones
        ones_like scalar_tensor zero zeros zeros_like _to_copy alias clone copy detach set""",
    "reshapes and indexing": """
        _reshape_alias _reshape_copy _unsafe_index _unsafe_index_put _unsafe_view as_strided cat
        channel_shuffle constant_pad_nd diag_embed embedding flip gather index index_add index_copy
        index_fill index_put index_select masked_scatter masked_select native_channel_shuffle
        nonzero pixel_shuffle pixel_unshuffle reflection_pad1d reflection_pad2d repeat
        repeat_interleave replication_pad1d replication_pad2d resize roll scatter scatter_add
        scatter_reduce slice_scatter select_scatter split_with_sizes_copy stack tril triu unfold
        im2col col2im""",
    "reductions, running ones and orders": """
        all amax amin aminmax any argmax argmin argsort cummax cummin cumprod cumsum kthvalue
        linalg_vector_norm logcumsumexp logsumexp max mean median min nansum norm prod sort std
        std_mean sum topk var var_mean _local_scalar_dense equal""",
    "a few operations a value: softmax, normalisations, gates, pools, resizes": """
        _softmax _safe_softmax _log_softmax _fused_rms_norm native_layer_norm native_group_norm
        native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training
        batch_norm_elemt cudnn_batch_norm _batch_norm_no_update glu _prelu_kernel
        log_sigmoid_forward polar complex avg_pool2d _adaptive_avg_pool2d max_pool2d_with_indices
        upsample_nearest2d _upsample_nearest_exact2d upsample_bilinear2d upsample_bicubic2d
        _upsample_bilinear2d_aa _upsample_bicubic2d_aa""",
    "random numbers": """
        bernoulli exponential multinomial native_dropout normal normal_functional rand rand_like
        randint randint_like randn randn_like randperm uniform""",
}
FREE_NAMES = set(" ".join(FREE.values()).split())


def is_free(operation) -> bool:
    name = operation._opname
    if operation.namespace == "aten":
        listed = name in FREE_NAMES or name.removesuffix("_") in FREE_NAMES
        return listed or operation.is_view or bool(FREE_TAGS.intersection(operation.tags))
    return operation.namespace in FREE_KINDS


class NotCounted(Exception):
    """An operation that could hide FLOPs. The message names it."""


class Flops(TorchDispatchMode):
    """Counts FLOPs by formulas inside it, whoever calls.

    An operation without a formula is refused unless it is free; of a composite one the parts are
    counted: linear is addmm. A tensor of a class of its own could compute behind the count.
    """

    supports_higher_order_operators = True  # flex_attention
    counting = None  # the one to which threads add what they compute

    def __init__(self, whole: "Flops | None" = None):
        super().__init__()
        self.whole = whole or self
        self.total = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for kind in types:
            if kind not in (Tensor, nn.Parameter):
                raise NotCounted(f"tensors of the class {kind.__name__} are not plain tensors")
        formula = FORMULAS.get(getattr(operation, "_overloadpacket", operation))
        if not formula and not is_free(operation):
            with self:
                out = operation.decompose(*args, **kwargs)
            if out is NotImplemented:
                raise NotCounted(f"the FLOPs of {operation} cannot be counted: write it otherwise")
            return out
        out = operation(*args, **kwargs)
        if formula:
            self.whole.total += formula(*args, **kwargs, out_val=out)
        return out


def turn_fast_paths_off():
    """Those that have no formula: of attention modules in evaluation mode, of flex_attention."""
    torch.backends.mha.set_fastpath_enabled(False)
    flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True  # else it compiles itself


@contextmanager
def flops_counted():
    """A Flops that also counts in the threads that are started inside it."""
    Flops.counting = Flops()
    try:
        with Flops.counting as flops:
            yield flops
    finally:
        Flops.counting = None


def run_counted(thread, run=threading.Thread.run):
    """What a thread does, with what it computes counted where the thread that started it is."""
    with Flops(Flops.counting) if Flops.counting else nullcontext():
        run(thread)


# ---------------------------------------------------------------------------------------------
# The guest
# ---------------------------------------------------------------------------------------------


MOST_AHEAD = 16  # draws of noise that are made at once


def unit_noise(seeds: list[int], shape: tuple, device: torch.device) -> Callable[[], Tensor]:
    """A function that gives unit noise (len(seeds), *shape), other noise each time.

    Each image has a CPU generator of its own: its noise depends on no other image. After the first
    draw, twice as many as last time are made at once, with one call for an image and one copy for
    all; the copy does not wait, so that the host draws while the device computes. A generator fills
    whole sixteens of values one after another: they are the same as if drawn one by one.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    most = 1 if math.prod(shape) % 16 else MOST_AHEAD
    pin = device.type == "cuda"

    def draws():
        count = 1
        while True:
            ahead = torch.empty(len(seeds), count, *shape, pin_memory=pin)
            for of_image, generator in zip(ahead, generators, strict=True):
                torch.randn(of_image.shape, generator=generator, out=of_image)
            for noise in ahead.to(device, non_blocking=True).unbind(1):  # (B, *shape) each
                yield noise.contiguous()
            count = min(2 * count, most)

    return draws().__next__


class Guest:
    """A snapshot and the checkpoint that it has loaded."""

    def open(self, request: dict, tensors: dict) -> tuple:
        """Imports the snapshot."""
        self.device = torch.device(request["device"])
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        torch.set_num_threads(request["threads"])
        turn_fast_paths_off()
        threading.Thread.run = run_counted
        sys.path.insert(0, os.getcwd())
        import train_speedrun

        for name in ("load_checkpoint", "velocity", "sample"):
            getattr(train_speedrun, name)
        self.snapshot = train_speedrun
        return {"tracks": {name: cfg.track for name, cfg in train_speedrun.CONFIGS.items()}}, {}

    def load(self, request: dict, tensors: dict) -> tuple:
        """Loads a checkpoint. Each forward of it counts the rows and FLOPs that enter it."""
        self.model, _ = self.snapshot.load_checkpoint(Path(request["file"]), self.device)
        trained = [name for name, p in self.model.named_parameters() if p.requires_grad]
        self.model.requires_grad_(False)
        self.rows = 0
        self.flops_inside = 0
        for module in list(self.model.modules()):
            if type(module) is type(self.model):  # an earlier one, for guidance, may be part of it
                self.count_in(module)
        return {"parameters": trained}, {}

    def count_in(self, model: nn.Module):
        """Puts before the model's forward what counts, and compiled code in its place."""
        plain = model.forward
        compiled = torch.compile(plain, dynamic=False)

        def forward(*args, **kwargs):
            self.rows += len([*args, *kwargs.values()][0])
            if self.is_compiled:
                with _disable_current_modes():  # one layout of inputs, so that one graph serves all
                    args = [x.contiguous() if isinstance(x, Tensor) else x for x in args]
                    return compiled(*args, **kwargs)
            before = Flops.counting.total
            out = plain(*args, **kwargs)
            self.flops_inside += Flops.counting.total - before
            return out

        model.forward = forward

    def velocity(self, request: dict, tensors: dict) -> tuple:
        """The velocity of x at t under text, computed `rounds` times, with a draw of noise each."""
        self.is_compiled = request["compiled"]
        inputs = [tensors[name].to(self.device) for name in ("x", "t", "text")]
        draw = unit_noise(range(len(inputs[0])), inputs[0].shape[1:], self.device)
        with flops_counted() as flops:
            for _ in range(request["rounds"]):
                out = self.snapshot.velocity(self.model, *inputs)
                if request["rounds"] > 1:
                    draw()
        return {"flops": flops.total}, {"out": plain_tensor(out)}

    def sample(self, request: dict, tensors: dict) -> tuple:
        """Images of the noise of these seeds. What runs outside of forward is always counted."""
        self.is_compiled = request["compiled"]
        self.rows = 0
        self.flops_inside = 0
        text = tensors["text"].to(self.device)
        fresh = unit_noise(request["seeds"], request["shape"], self.device)
        noise = fresh()
        with flops_counted() as flops:  # in it, the sampler's own compiled code runs eagerly
            out = self.snapshot.sample(self.model, noise, text, fresh)
        found = {"flops": flops.total, "flops_outside": flops.total - self.flops_inside}
        return found | {"rows": self.rows}, {"out": plain_tensor(out)}


def plain_tensor(x: Tensor) -> Tensor:
    """On the CPU, float32. Raises NotCounted for what is no tensor of PyTorch's own class."""
    if type(x) is not Tensor:
        raise NotCounted(f"a {type(x).__name__} was returned, not a plain tensor")
    return x.detach().float().cpu().contiguous()


@torch.no_grad()
def main(number: str):
    """Answers until the socket closes."""
    guest = Guest()
    with socket.socket(fileno=int(number)) as connection, connection.makefile("rb") as requests:
        while requests.peek(1):
            request, tensors = unpack(requests.read, 2**40)
            try:
                reply, found = getattr(guest, request["name"])(request, tensors)
            except BaseException as error:  # a snapshot may exit, too
                reply, found = {"error": f"{type(error).__name__}: {error}"}, {}
            connection.sendall(pack(reply, found))


if __name__ == "__main__":
    main(sys.argv[1])
