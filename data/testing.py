"""What the tests share: a tiny track, a racer's folder, runs in this process and in others.

Loaded by pytest as a plugin (pyproject.toml), so that test_smoke.py and the tests beside the
tools have the same fixtures. A test never replaces text of a script: `racer` adds a track to the
training script as the README says, and `extra` code patches it by its public names.
"""

import ast
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

# Two processes would want two GPUs, and TF32 is further from float32 than the tests allow
if os.environ.get("SPEEDRUN_TEST_GPU") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import train_speedrun as ts
from data import sandbox
from data.common import import_snapshot, read_captions, sha256_of

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 600  # seconds that a process may take on the slowest machine: no test asserts a duration
TRACK = ts.Track("tiny", (3, 8, 8), "uint8", 127.5, 1 / 127.5, 96, 16, 32, 100)
CONFIG = ts.Config(
    track="tiny",
    patch=2,
    width=32,
    depth=3,
    head_dim=16,
    batch_size=16,
    steps=20,
    evals=2,
    save_every=5,
    adamw_lr=3e-3,
    flip=True,
    caption_drop=0.2,
    guidance=2.0,
    sample_steps=10,
    bf16=False,
    compile=False,
)
# Every switch of the objective and of the routing
ALL = replace(
    CONFIG,
    route_keep=0.25,
    route_dense=1,
    path_drop=0.2,
    dense_tail=0.3,
    cfm=0.05,
    reg=0.03,
    repa=0.5,
    repa_layers=(1, 2, 3),
    repa_width=24,
    flip=False,
    t_spread=0.8,
    t_shift=1.4,
    sampler="sde",
    last_step=0.04,
    autoguidance=1.0,
    autoguidance_interval=(0.0, 1.0),
    weak_at=0.5,
)
# Of features: patches of 8 x 8 pixels, and their components
PATCHES, COMPONENTS = 16, 8

ENV = {key: value for key, value in os.environ.items() if key not in ("RESUME", "SEED")}
ENV |= dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="0")


def write_data(folder: Path, captions: int = 1, classes: int = 4) -> Path:
    """Shards of the tiny track in folder/data/tiny, two of train and one of val; that folder."""
    generator = torch.Generator().manual_seed(0)
    home = folder / "data" / "tiny"
    home.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, count in (("train_000", 64), ("train_001", 32), ("val_000", 40)):
        labels = (torch.arange(count) % classes).to(torch.int16)
        ramp = torch.linspace(0, 200, 8).expand(3, 8, 8)
        images = torch.stack([ramp.roll(int(k), 0).rot90(int(k), (1, 2)) for k in labels])
        images = images + 30 * torch.rand(images.shape, generator=generator)
        shape = (count, 1 + PATCHES, COMPONENTS)
        features = torch.randint(-127, 128, shape, generator=generator).to(torch.int8)
        shard = dict(latents=images.to(torch.uint8), labels=labels, features=features)
        path = home / f"{name}.safetensors"
        save_file(shard, path, dict(track="tiny"))
        files[path.name] = dict(sha256=sha256_of(path), bytes=path.stat().st_size, count=count)
    steps = torch.linspace(0.06, 0.02, COMPONENTS).expand(1 + PATCHES, -1)
    save_file(dict(scale=steps.contiguous()), home / "features.safetensors")
    n = classes * captions
    pooled = (1 + 0.3 * torch.randn(n, 16, generator=generator)).half()
    about = dict(
        captions=json.dumps([f"a thing {i}" for i in range(n)]),
        labels=json.dumps([i % classes for i in range(n)]),
    )
    save_file(dict(pooled=pooled), home / "text.safetensors", about)
    (home / "manifest.json").write_text(json.dumps(dict(track="tiny", files=files)))
    return home


def racer(folder: Path, config: ts.Config = CONFIG, extra: str = "", **data) -> Path:
    """A folder as a racer has it: data, and train_speedrun.py with the tiny track and config.

    `extra` is code that runs last at import: it may patch the script's public names.
    """
    write_data(folder, **data)
    lines = (ROOT / "train_speedrun.py").read_text().splitlines(keepends=True)
    row = ", ".join(map(repr, vars(TRACK).values()))
    added = {
        "TRACKS": f'TRACKS["tiny"] = Track({row})\n',
        "CONFIGS": f'CONFIGS["tiny"] = {config!r}\n',
    }
    for node in reversed(ast.parse("".join(lines)).body):  # from below: line numbers stay valid
        if isinstance(node, ast.If):  # where the script starts itself
            lines.insert(node.lineno - 1, f"{extra}\n")
        elif isinstance(node, ast.Assign):
            name = ast.unparse(node.targets[0])
            lines.insert(node.end_lineno, added.get(name, ""))
    (folder / "train_speedrun.py").write_text("".join(lines))
    return folder


def last_run(folder: Path) -> Path:
    return max((folder / "logs").iterdir(), key=lambda path: path.stat().st_mtime)


@contextmanager
def own_signals():
    """What a script's main() does to the signals of this process ends with the block."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def train_here(folder: Path, monkeypatch, **environment) -> Path:
    """Trains the racer's script in this process; the run's folder."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["train_speedrun.py", "tiny"])
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as many as other processes have: see ENV
    try:
        with own_signals():
            assert import_snapshot(folder / "train_speedrun.py").main() == 0
    finally:
        torch.set_num_threads(threads)
    return last_run(folder)


def command(*args, processes: int = 0) -> list[str]:
    """The command of a python, or of several under torchrun where `processes` says how many."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [sys.executable, *(launcher if processes else []), *map(str, args)]


def python(folder: Path, *args, processes: int = 0, check: bool = True, **environment):
    """Runs python, or torchrun, in a folder; its CompletedProcess, with output as text."""
    done = subprocess.run(
        command(*args, processes=processes),
        cwd=folder,
        env=ENV | environment,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def refuses(done, *words):
    """One line on standard error that names the cause, exit code 2, no traceback."""
    assert done.returncode == 2, (done.returncode, done.stdout[-500:], done.stderr[-2000:])
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    for word in words:
        assert word in lines[0], (word, lines[0])


def distance(a, b) -> float:
    """Largest relative difference of two states: over all tensors, |a - b| / |b|."""
    if isinstance(b, torch.Tensor):
        a, b = a.double(), b.double()
        return ((a - b).norm() / b.norm().clamp(min=1e-12)).item()
    if not isinstance(b, (dict, list, tuple)):
        return 0.0
    keys = range(len(b)) if isinstance(b, (list, tuple)) else b.keys() - {"meta", "param_groups"}
    assert len(a) == len(b)
    return max((distance(a[key], b[key]) for key in keys), default=0.0)


@pytest.fixture(scope="session")
def lite_weights(tmp_path_factory) -> Path:
    """A folder for SPEEDRUN_WEIGHTS: random EfficientNet-lite0 weights under timm's names."""
    timm = importlib.import_module("timm")
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    net = timm.create_model("tf_efficientnet_lite0")
    save_file(net.state_dict(), folder / "tf_efficientnet_lite0.in1k.safetensors")
    ENV["SPEEDRUN_WEIGHTS"] = os.environ["SPEEDRUN_WEIGHTS"] = str(folder)
    return folder


class KeptChild(sandbox.Child):
    """A child that is not closed after its evaluation: to start one takes seconds."""

    kept = {}  # by the snapshot's text

    def __new__(cls, source: bytes, *arguments):
        return cls.kept.get(source) or super().__new__(cls)

    def __init__(self, source: bytes, *arguments):
        if source not in self.kept:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # the child takes as many; tiny tensors want no more
            try:
                super().__init__(source, *arguments)
            finally:
                torch.set_num_threads(threads)
            self.kept[source] = self

    def close(self):
        if self.process.poll() is not None:
            super().close()


@pytest.fixture(scope="session")
def one_child():
    """All evaluations of one snapshot share a child, until the session's end."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(importlib.import_module("eval_speedrun"), "Child", KeptChild)
        yield
    for child in KeptChild.kept.values():
        sandbox.Child.close(child)


@pytest.fixture(scope="session")
def trained(tmp_path_factory, lite_weights, one_child) -> Path:
    """A finished run of the tiny track, refereed: its folder. Copy it before changing it."""
    evaluate = importlib.import_module("eval_speedrun").main
    with pytest.MonkeyPatch.context() as monkeypatch:
        run = train_here(racer(tmp_path_factory.mktemp("trained")), monkeypatch)
        assert evaluate([str(run), "--images", "20"]) == 0
    return run


def copy_run(trained: Path, folder: Path) -> Path:
    """A copy of the finished run, not yet refereed, with its data in `folder`: the run's folder."""
    write_data(folder)
    results = shutil.ignore_patterns("results.json", "*.png")
    return shutil.copytree(trained, folder / "logs" / trained.name, ignore=results)


def add_code(run: Path, code: str, val_loss: str = "", **tensors) -> Path:
    """Gives the run another snapshot, by code that runs last at import, and other checkpoints."""
    script = run / "train_speedrun.py"
    start, end = script.read_text().split('\nif __name__ == "__main__":')
    script.write_text(f'{start}\n{code}\n\nif __name__ == "__main__":{end}')
    for path in run.glob("step_*.safetensors"):
        with safe_open(path, "pt") as file:
            meta = file.metadata() | {"code_sha256": sha256_of(script)}
        meta["val_loss"] = val_loss or meta["val_loss"]
        save_file(load_file(path) | tensors, path, meta)
    return run


def sampler_of(folder: Path, count: int = 0):
    """The referee's sampler of a run's last checkpoint."""
    referee = importlib.import_module("eval_speedrun")
    device = torch.device("cpu")
    run = referee.load_run(folder, device)
    model = referee.Model(run, run.checkpoints[-1][0], count)
    return referee.Sampler(run, model, read_captions("tiny"), device)


@pytest.fixture
def place(trained, tmp_path, monkeypatch) -> Path:
    """A copy of the finished run; its data is in the current folder."""
    monkeypatch.chdir(tmp_path)
    return copy_run(trained, tmp_path)


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> Path:
    """The tiny track inside this process, with its data in the current folder: that folder."""
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(ts.TRACKS, "tiny", TRACK)
    monkeypatch.setitem(ts.CONFIGS, "tiny", CONFIG)
    return tmp_path
