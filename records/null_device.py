"""The null CUDA device of null_cuda.cpp: built once, and preloaded into a process.

It stands in front of the CUDA runtime, the driver and cuBLAS. Functions that give something back
are written in null_cuda.cpp; for every other one that PyTorch's libraries ask for, a function that
returns success is generated here.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.common import UserError, key_of, sha256_of  # noqa: E402
from records.gpu_model import Card  # noqa: E402

TRIED = ("2.14", "2.15")  # versions of torch whose CUDA calls null_cuda.cpp answers
SOURCE = Path(__file__).with_name("null_cuda.cpp")
LIBRARIES = ("c10_cuda", "torch_cuda", "torch_python", "torch_cpu", "caffe2_nvrtc")
LIBRARIES += ("torch_cuda_linalg",)
# What Triton looks up in the driver by name, so that no library's table shows it
DRIVER = """cuCtxGetLimit cuCtxSetCurrent cuCtxSetLimit cuFuncSetAttribute cuFuncSetCacheConfig
cuGetErrorName cuInit cuLaunchCooperativeKernel cuMemAlloc_v2 cuMemcpyHtoDAsync_v2 cuMemsetD32_v2
cuMemsetD8_v2 cuModuleUnload cuStreamSynchronize cuTensorMapEncodeIm2col cuTensorMapEncodeTiled"""
CALL = r"(?:__)?cuda\w+|cublas\w+|cu[A-Z]\w*"  # a function of CUDA's, by its name
PRODUCT = r"cublas\w*[Gg]emm\w*|cublasLtMatmul"
REAL = {"cublasLtGetVersion", "cublasLtMatmulAlgoConfigGetAttribute"}  # they need no device


def check_installation():
    """Raises UserError where the installed torch cannot be rehearsed."""
    version = torch.__version__
    problem = None
    if sys.platform != "linux" or platform.machine() != "x86_64":
        problem = "a library is preloaded, which needs Linux on x86-64"
    elif not torch.version.cuda:
        problem = f"torch {version} is built without CUDA: install the wheel of PyPI"
    elif not version.startswith(tuple(f"{known}." for known in TRIED)):
        problem = f"torch {version} was never tried, only {', '.join(TRIED)}: extend TRIED"
    else:
        missing = [tool for tool in ("g++", "nm") if not shutil.which(tool)]
        if missing:
            problem = f"no {' and no '.join(missing)}: on Debian, apt install g++"
    if problem:
        raise UserError(f"cannot rehearse here: {problem}")


def output_of(*command) -> str:
    """Standard output of a compiler or its tools. Raises UserError."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"cannot build the null device: {command[0]}: {reason}")
    return done.stdout


def symbols(path: Path, *options) -> set:
    return {line.split()[-1].split("@")[0] for line in output_of("nm", *options, path).splitlines()}


def cache_folder() -> Path:
    """Of this source and this torch: the library, and all that was compiled for the null device.

    A folder of its own, so that a real GPU never gets a choice that was made on this one.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "imagegen-speedrun-preflight" / key_of(torch.__version__, sha256_of(SOURCE))


def build_library() -> Path:
    """The library to preload, compiled where it is not there yet. Raises UserError."""
    library = cache_folder() / "libcuda.so.1"
    if library.exists():
        return library
    site = Path(torch.__file__).parent.parent
    headers = [*site.glob("nvidia/cu*/include"), site / "triton/backends/nvidia/include"]
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as temporary:
        folder = Path(temporary)
        written = folder / "null_cuda.o"
        include = [f"-I{path}" for path in headers]
        output_of("g++", "-O1", "-fPIC", "-w", "-c", *include, SOURCE, "-o", written)
        wanted = set(DRIVER.split())
        for name in LIBRARIES:
            path = site / "torch" / "lib" / f"lib{name}.so"
            wanted |= symbols(path, "-D", "--undefined-only") if path.exists() else set()
        lines = ['extern "C" {', "void null_kernel(const char*);"]
        for name in sorted(wanted - symbols(written) - REAL):
            if re.fullmatch(CALL, name):
                body = 'null_kernel("cublas"); ' * bool(re.fullmatch(PRODUCT, name))
                lines.append(f"int {name}() {{ {body}return 0; }}")
        rest = folder / "rest.cpp"
        rest.write_text("\n".join([*lines, "}\n"]))
        made = folder / library.name
        options = ("-shared", "-fPIC", "-w", f"-Wl,-soname,{library.name}", "-ldl")
        output_of("g++", written, rest, "-o", made, *options)
        made.replace(library)
    return library


def environment(library: Path, card: Card, processes: int) -> dict:
    """Of a process that sees the null device, and that is rank 0 of so many."""
    inherited = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "CUDA_VISIBLE_DEVICES", "RESUME", "SEED")
    found = {name: value for name, value in os.environ.items() if name not in inherited}
    found |= dict(LD_PRELOAD=str(library), LD_LIBRARY_PATH=str(library.parent))
    found |= dict(NULL_CUDA_NAME=f"{card.name} (null)", NULL_CUDA_MEMORY=str(card.memory))
    found |= dict(TRITON_LIBCUDA_PATH=str(library.parent))
    found |= dict(TRITON_CACHE_DIR=str(library.with_name("triton")))
    found |= dict(TORCHINDUCTOR_CACHE_DIR=str(library.with_name("inductor")))
    found |= dict(TORCHINDUCTOR_BENCHMARK_KERNEL="1")  # notes each kernel's bytes ...
    found |= dict(TORCHINDUCTOR_FX_GRAPH_CACHE="0")  # ... when a graph is compiled, so always
    found |= dict(TORCHINDUCTOR_AUTOGRAD_CACHE="0")
    if processes > 1:
        found |= dict(RANK="0", WORLD_SIZE=str(processes), LOCAL_RANK="0")
        found |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")  # nobody listens there
    return found
