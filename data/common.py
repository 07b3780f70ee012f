"""What the tools around a run share: processes, files, the contract, a run's data and snapshot.

`train_speedrun.py` stands alone and has its own world, clock, reader and writer. Everything else,
the referee, the downloader and the records' tools, takes them from here.
Not to be edited for a record.
"""

import ast
import ctypes
import hashlib
import importlib.util
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file


class UserError(Exception):
    """Something the user can mend: printed as one line, exit code 2."""


# ---------------------------------------------------------------------------------------------
# Processes and the machine
# ---------------------------------------------------------------------------------------------


class World:
    """This process among torchrun's. They share the images out and wait for each other's files.

    Raises UserError where the environment is not torchrun's.
    """

    def __init__(self):
        names = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        given = {name: os.environ.get(name, default) for name, default in names.items()}
        numbers = [int(x) if re.fullmatch("[0-9]{1,9}", x) else -1 for x in given.values()]
        self.rank, self.size, local_rank = numbers
        has_launcher = self.size == 1 or "MASTER_PORT" in os.environ
        if min(numbers) < 0 or self.rank >= self.size or not has_launcher:
            raise UserError(f"{given} are not torchrun's: unset them, or start with torchrun")
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", local_rank)
            torch.cuda.set_device(self.device)
        else:
            keep_freed_memory()
        if self.size > 1:
            dist.init_process_group("gloo", timeout=timedelta(days=1))
            self.wait()  # or rank 0, ending early, takes the store that others still join by

    def wait(self):
        """Returns once every process has called it."""
        if self.size > 1:
            dist.barrier()

    def same(self, value):
        """The first process's value, on every one."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def end(self):
        """Waits for all processes and leaves: gloo aborts at exit where the group still stands."""
        self.wait()
        if self.size > 1:
            dist.destroy_process_group()


def keep_freed_memory():
    """Has glibc's allocator give no large blocks back: pages made anew cost more than much work."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX
        ctypes.CDLL(None).mallopt(-1, -1)  # M_TRIM_THRESHOLD


def product_dtype(device: torch.device) -> torch.dtype:
    """bfloat16; float32 on a CPU without instructions for it, where it takes 20 times as long."""
    fast = device.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def now() -> float:
    """Seconds, once the device has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def machine(device: torch.device) -> str:
    """Name of the GPU, or of the CPU and the number of its cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    name = found[1] if found else platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def progress(iterable, desc: str):
    """A bar, drawn by one process and only on a terminal."""
    from tqdm import tqdm

    other_process = int(os.environ.get("RANK", 0)) > 0
    return tqdm(iterable, desc=desc, ascii=True, disable=other_process or None)


# ---------------------------------------------------------------------------------------------
# Files and hashes
# ---------------------------------------------------------------------------------------------


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def sha256_of(path: Path) -> str:
    """Of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def key_of(*content) -> str:
    """16 hex digits that name any JSON content."""
    return sha256(json.dumps(content).encode())[:16]


def write_atomic(path: Path, write: Callable[[Path], object]):
    """write(temporary path), sync, rename: the file is whole or not there. Raises UserError."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({error}); free some disk and run this again")


# ---------------------------------------------------------------------------------------------
# The contract: what makes the runs of a track comparable
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contract:
    """A track's row of TRACKS and the validation draws, as one snapshot has them."""

    track: SimpleNamespace  # the row's fields: see Track in train_speedrun.py
    sha256: str  # of it and of validation_draws: adding a track leaves the others as they are


def read_contract(source: str, track: str) -> Contract:
    """The contract of one track, taken from the text of a training script. Raises UserError.

    Two pieces of the text are read and none is run, whatever else the script does to their names:
    the literals of the one call `Track("<track>", ...)`, and the one function `validation_draws`.
    """
    names, rows, functions = [], [], []
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError) as error:
        raise UserError(f"this is no training script ({error}): start from train_speedrun.py")
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == "Track":
            names = [field.target.id for field in node.body if isinstance(field, ast.AnnAssign)]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Track":
            try:
                values = [ast.literal_eval(value) for value in node.args]
            except ValueError:
                continue  # a call that is no row: its values are no literals
            if values[:1] == [track]:
                rows.append(values)
        elif isinstance(node, ast.FunctionDef) and node.name == "validation_draws":
            functions.append(ast.get_source_segment(source, node))
    if len(rows) != 1 or len(functions) != 1 or len(rows[0]) != len(names):
        raise UserError(
            f"a training script has one Track({track!r}, ...) and one validation_draws; this "
            f"one has {len(rows)} and {len(functions)}: start from train_speedrun.py"
        )
    row = dict(zip(names, rows[0]))
    digest = sha256((json.dumps(row) + functions[0]).encode())
    return Contract(SimpleNamespace(**row), digest)


def import_snapshot(path: Path) -> ModuleType:
    """A training script as a module. Whatever it raises, it raises."""
    spec = importlib.util.spec_from_file_location("snapshot", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["snapshot"] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


# ---------------------------------------------------------------------------------------------
# A track's data
# ---------------------------------------------------------------------------------------------

DAMAGED = (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError)


def read_shards(track: str, split: str, images: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Images (n, C, H, W) as stored and labels (n,) int64 of each shard. Raises UserError.

    The manifest says which shards belong to the data; others in the folder are left alone.
    """
    path = Path("data", track, "manifest.json")
    try:
        names = sorted(json.loads(path.read_text())["files"])
        for name in names:
            if name.startswith(split + "_"):
                path = path.with_name(name)
                tensors = load_file(path)
                yield tensors[images], tensors["labels"].long()
    except DAMAGED as error:
        raise UserError(f"{path} is damaged ({error}); run: python data/download.py {track}")


def read_split(
    track: str, split: str, images: str = "latents"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, C, H, W) as stored and labels (N,) int64 of all shards. Raises UserError.

    images: "latents", what is trained on, or "pixels" of these images where they are kept beside.
    """
    shards = list(read_shards(track, split, images))
    if not shards:
        raise UserError(
            f"data/{track} holds no {split} images; run: python data/download.py {track}"
        )
    latents, labels = zip(*shards, strict=True)
    return torch.cat(latents), torch.cat(labels)


@dataclass
class Captions:
    """A track's caption table, or captions of the user's."""

    captions: list[str]
    labels: list[int]  # of each caption
    pooled: torch.Tensor  # (captions, D): their CLIP embeddings, as CLIP gives them

    def balanced(self, count: int) -> list[int]:
        """Caption rows of images 0 .. count - 1: labels in turn, each label's captions in turn."""
        rows_of = [[] for _ in range(max(self.labels) + 1)]
        for row, label in enumerate(self.labels):
            rows_of[label].append(row)
        turns = (divmod(i, len(rows_of)) for i in range(count))
        return [rows_of[label][turn % len(rows_of[label])] for turn, label in turns]

    def first_of_labels(self) -> list[int]:
        """The row of each label's first caption, with which the validation loss is measured."""
        return self.balanced(max(self.labels) + 1)


def read_captions(track: str) -> Captions:
    """The track's caption table. Raises UserError."""
    path = Path("data", track, "text.safetensors")
    try:
        with safe_open(path, "pt") as file:
            meta = file.metadata()
            pooled = file.get_tensor("pooled").float()
        return Captions(json.loads(meta["captions"]), json.loads(meta["labels"]), pooled)
    except DAMAGED as error:
        raise UserError(
            f"{path} is not a caption table ({error}); run: python data/download.py {track}"
        )
