"""The referee's side of the process that runs a snapshot: see guest.py, and confine.py.

The snapshot is a stranger's code. It runs where nothing of the project is in reach, and what comes
back is a tensor of the wanted shape or one line that says why not. Processor time is read here,
from the system: no bookkeeping inside the guest escapes it. Not to be edited for a record.
"""

import ctypes
import os
import shutil
import signal
import site
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from data.common import UserError
from data.guest import pack, unpack

SECONDS = 1800  # that one request may take, compilation included
FOREIGN = (ValueError, RecursionError, KeyError, TypeError, SafetensorError)  # no answer of ours
COUNTS = {"velocity": ("flops",), "sample": ("flops", "flops_outside", "rows")}
KEPT = ("PATH", "LD_LIBRARY_PATH", "CC", "CXX", "CUDA_HOME", "CUDA_VISIBLE_DEVICES")  # environment
KEPT += ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "LANG", "TZ")


def environment(home: str) -> dict:
    """What the guest's programs need to be found, and caches that nobody else reads."""
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    user_packages = site.getuserbase()  # beside the real home
    caches = {"TORCHINDUCTOR_CACHE_DIR": f"{home}/inductor", "TRITON_CACHE_DIR": f"{home}/triton"}
    caches["TORCHINDUCTOR_VEC_ISA_OK"] = "1"  # no trials of the C++ compiler
    memory = {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1073741824"}
    return kept | caches | memory | {"HOME": home, "TMPDIR": home, "PYTHONUSERBASE": user_packages}


class Child:
    """A process that has imported one snapshot and answers requests, until it is closed."""

    def __init__(self, source: bytes, device: torch.device, hidden: Sequence[Path]):
        """source: of the snapshot. hidden: folders that are empty there, where possible.

        Raises UserError where the snapshot does not import.
        """
        self.folder = tempfile.TemporaryDirectory(prefix="snapshot_", ignore_cleanup_errors=True)
        home = os.path.realpath(self.folder.name)
        Path(home, "train_speedrun.py").write_bytes(source)
        self.connection, other = socket.socketpair()
        program = Path(__file__).with_name("confine.py")
        command = [sys.executable, "-P", program, str(other.fileno()), home]
        self.process = subprocess.Popen(
            command + [folder.resolve() for folder in hidden if folder.is_dir()],
            cwd=home,
            env=environment(home),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[other.fileno()],
            start_new_session=True,  # Ctrl-C is the referee's
        )
        other.close()
        self.deadline = time.monotonic() + SECONDS
        greeting, _ = self.receive(0)
        self.isolation = greeting["isolation"]
        self.clock = processor_clock(greeting["process"])
        self.handle = os.pidfd_open(greeting["process"])
        request = {"device": str(device), "threads": torch.get_num_threads()}
        try:
            reply = self.ask("open", request)
            self.tracks = {str(name): str(track) for name, track in reply["tracks"].items()}
        except (AttributeError, *FOREIGN):
            self.close()
            raise UserError("the snapshot answered nonsense to open")
        except UserError:
            self.close()
            raise

    def close(self):
        """Ends the process and whatever it started, and deletes its folder."""
        self.connection.close()
        if hasattr(self, "handle"):
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.handle, signal.SIGKILL)
            os.close(self.handle)
            del self.handle
        self.process.kill()
        self.process.wait()
        self.folder.cleanup()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def load(self, path: Path) -> list[str]:
        """Loads a checkpoint; the names of its model's parameters. Raises UserError."""
        home = Path(self.folder.name)
        for old in home.glob("*.safetensors"):
            old.unlink()
        with open(path, "rb") as original, open(home / path.name, "xb") as copy:
            shutil.copyfileobj(original, copy, 2**20)
        names = self.ask("load", {"file": path.name}).get("parameters")
        if not isinstance(names, list):
            raise UserError("the snapshot answered nonsense to load")
        return [str(name) for name in names]

    def tensor(
        self, name: str, request: dict, tensors: dict[str, Tensor], shape: tuple
    ) -> tuple[Tensor, dict]:
        """The answer to "velocity" or "sample": finite, float32, of this shape, and its counts.

        Raises UserError.
        """
        found = self.ask(name, request, tensors, 4 * torch.Size(shape).numel())
        x = found.get("out")
        counts = {key: found.get(key) for key in COUNTS[name]}
        if not isinstance(x, Tensor) or x.dtype != torch.float32:
            raise UserError(f"the snapshot answered nonsense to {name}")
        finite = bool(x.isfinite().all())
        if x.shape != shape or not finite:
            had = f"{tuple(x.shape)}, finite: {finite}"
            raise UserError(f"{name} returned {had}; expected {tuple(shape)}")
        for value in counts.values():
            if type(value) is not int or value < 0:
                raise UserError(f"the snapshot answered nonsense to {name}")
        return x, counts

    def ask(self, name: str, request: dict, tensors: dict | None = None, size: int = 0) -> dict:
        """The answer to a request, its tensors among its values. size: in bytes, of the tensors.

        Raises UserError where there is none, and the process has ended then.
        """
        try:
            self.deadline = time.monotonic() + SECONDS
            self.connection.settimeout(SECONDS)
            self.connection.sendall(pack({"name": name} | request, tensors or {}))
            reply, found = self.receive(size)
        except TimeoutError:
            self.close()
            raise UserError(f"the snapshot did not answer to {name} within {SECONDS} seconds")
        except (OSError, EOFError):
            self.close()
            raise UserError(f"the snapshot ended its process in {name}")
        except FOREIGN:
            self.close()
            raise UserError(f"the snapshot answered nonsense to {name}")
        if "error" in reply:
            reason = " ".join(str(reply["error"]).split())
            raise UserError(f"the snapshot's {name} failed ({reason[:300]})")
        return reply | found

    def receive(self, size: int) -> tuple[dict, dict]:
        """The next message. Raises OSError, EOFError or one of FOREIGN."""
        return unpack(self.read, size + 4096 if size else 0)

    def read(self, count: int) -> bytes:
        """So many bytes, before the deadline."""
        content = bytearray()
        while len(content) < count:
            self.connection.settimeout(max(0.01, self.deadline - time.monotonic()))
            part = self.connection.recv(min(count - len(content), 2**20))
            if not part:
                raise EOFError
            content += part
        return bytes(content)

    def seconds(self) -> tuple[float, float]:
        """Processor seconds that the guest has taken with all its threads, and the time."""
        try:
            return time.clock_gettime(self.clock), time.monotonic()
        except OSError:
            raise UserError("the snapshot ended its process")


def processor_clock(process: int) -> int:
    """The clock of another process's processor time, as clock_gettime wants it."""
    clock = ctypes.c_int()
    ctypes.CDLL(None).clock_getcpuclockid(process, ctypes.byref(clock))
    return clock.value
