"""The minute's test: one run end to end, and the properties that a change is most likely to break.

    ./run.sh test smoke

Each test states a property of the race and fails where it is broken. The deeper ones are in
records/test_*.py and data/test_*.py; what they share is in data/testing.py.
"""

import ast
import copy
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn.functional import cosine_similarity
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import eval_speedrun
import train_speedrun as ts
from data.common import read_contract
from data.testing import ALL, CONFIG, ROOT, TRACK, distance, last_run, python, racer, train_here

CAPS = {  # lines of a file, as ruff formats it
    "train_speedrun.py": 1150,
    "eval_speedrun.py": 800,
    "test_smoke.py": 350,
    "data": 600,
    "records": 420,
}
ALL_TESTS = 1800  # lines of all tests together, with what they share
IMAGE = slice(0, 3 * 8 * 8)  # of a row (B, M), before REG's class token

# Runs last in a racer's script: keeps the last state, and dies before the step in DIE_AT
WATCHED = """
plain_train, plain_step = train, train_step


def train(run, world):
    plain_train(run, world)
    whole = run.state.state_dict()
    if world.rank == 0:
        torch.save(dict(meta=run.meta, **whole), run.folder / "final.pt")


def train_step(state, step, batch):
    if str(step) == os.environ.get("DIE_AT"):
        raise KeyboardInterrupt
    return plain_step(state, step, batch)
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As many threads as the processes that a test starts."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def everything_on(tmp_path_factory, lite_weights):
    """A refereed run of one process with routing, REG, REPA and contrast: its folder."""
    folder = racer(tmp_path_factory.mktemp("all"), ALL, WATCHED, captions=3)
    with pytest.MonkeyPatch.context() as monkeypatch:
        run = train_here(folder, monkeypatch)
        assert eval_speedrun.main([str(run), "--images", "20"]) == 0
    return run


@pytest.fixture
def setup(tiny):
    """A world and what the tiny track's files hold."""
    data, val = ts.open_data(ALL, TRACK)
    captions = ts.load_captions(TRACK, "cpu")
    return SimpleNamespace(world=ts.World(), data=data, val=val, captions=captions)


@pytest.fixture
def drawn(setup):
    """A model with every switch on and no weight zero, and the first 16 images as its batch."""
    generator = torch.Generator().manual_seed(0)
    model = ts.Transformer(ALL, TRACK).requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.set_text(setup.captions.flatten(0, 1))
    rows = setup.data.gather(np.arange(16), setup.world.device)
    batch = ts.make_batch(model, setup.captions, rows, 0, 0, setup.world)
    return SimpleNamespace(model=model, rows=rows, batch=batch)


def forward(drawn, *routing, **more):
    batch = drawn.batch
    return drawn.model(batch.x, batch.t, batch.text, *routing, **more)[0]


# ---------------------------------------------------------------------------------------------
# The files
# ---------------------------------------------------------------------------------------------


def test_files_are_short_and_formatted():
    """Lines are capped after formatting, so that packing them helps nobody."""
    tests = 0
    for path in [*ROOT.glob("*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("records/*.py")]:
        lines = path.read_text().splitlines()
        cap = CAPS.get(path.name) or CAPS[path.parent.name]
        assert len(lines) <= cap, f"{path} has {len(lines)} lines, of {cap}"
        long = [number for number, line in enumerate(lines, 1) if len(line) > 100]
        assert not long, f"{path}: lines {long} are over 100 columns"
        tests += len(lines) if path.name.startswith("test") else 0
    assert tests <= ALL_TESTS
    if not importlib.util.find_spec("ruff"):
        pytest.skip("ruff is not installed")
    for arguments in (["format", "--check"], ["check"]):
        command = [sys.executable, "-m", "ruff", *arguments, "--no-cache", "."]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_import_starts_nothing(tmp_path):
    """No thread, process group, file or heavy package, whichever module is imported."""
    modules = [*ROOT.glob("*_speedrun.py"), *ROOT.glob("records/[!t]*.py")]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in modules]
    code = f"""
import {", ".join(names)}
import sys, threading, torch
assert threading.active_count() == 1 and not torch.distributed.is_initialized()
print([name for name in ("torchvision", "timm", "open_clip", "PIL") if name in sys.modules])
"""
    found = python(tmp_path, "-c", code, PYTHONDONTWRITEBYTECODE="1").stdout
    assert found.strip() == "[]"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("track", ts.TRACKS)
def test_contract_is_the_published_one(track, trained):
    """In the script, and in a snapshot to which another track was added."""
    for folder in (ROOT, trained):
        source = (folder / "train_speedrun.py").read_text()
        assert read_contract(source, track).sha256 == eval_speedrun.CONTRACTS[track]


# ---------------------------------------------------------------------------------------------
# A run, end to end
# ---------------------------------------------------------------------------------------------


def test_run_leaves_everything(trained):
    found = sorted(path.name for path in trained.iterdir())
    checkpoints = ["step_000010.safetensors", "step_000020.safetensors"]
    results = ["curve.png", "log.txt", "results.json", "samples.png"]
    assert found == [*results, *checkpoints, "train_speedrun.py"]
    for name in ("curve.png", "samples.png"):
        picture = np.asarray(Image.open(trained / name).convert("RGB"))
        assert min(picture.shape[:2]) >= 8 and picture.std() > 1


def parse_log(run) -> tuple[list[tuple], dict]:
    """Step lines, (step, images, kind, loss, ms, average, terms) each, and the last block."""
    source = (run / "train_speedrun.py").read_text()
    log = (run / "log.txt").read_text()
    rule = "=" * 100 + "\n"
    assert log.startswith(source + rule)
    header, block = log[len(source) + len(rule) :].split(rule)
    _, machine, config, *lines = header.splitlines()
    assert machine.startswith("1 x ") and json.loads(config)["track"] == "tiny"
    form = (
        r"step:(\d+)/20 images:(\d+) (train|val)_loss:(\d+\.\d{5}) train_time:(\d+)ms "
        r"step_avg:(\d+\.\d\d)ms((?: [a-z]+:-?\d+\.\d{5})*)"
    )
    steps = [re.fullmatch(form, line).groups() for line in lines]
    return steps, dict(line.split(": ", 1) for line in block.splitlines())


def test_log_starts_with_the_source_and_parses(trained):
    steps, last = parse_log(trained)
    assert [int(step) for step, _, kind, *_ in steps if kind == "val"] == [10, 20]
    assert [int(step) for step, _, kind, *_ in steps if kind == "train"] == list(range(1, 11))
    assert all(int(images) == 16 * int(step) for step, images, *_ in steps)
    assert not any(terms for *_, terms in steps)  # there is one: it is the loss
    code = (trained / "train_speedrun.py").read_bytes()
    assert last["code_sha256"] == hashlib.sha256(code).hexdigest()
    assert last["val_loss"] == steps[-1][3] and last["resumed"] == "0"
    assert float(last["train_time_s"]) == pytest.approx(int(steps[-1][4]) / 1000, abs=1e-3)


def test_terms_of_the_loss_are_logged_by_name(everything_on):
    steps, _ = parse_log(everything_on)
    for _, _, kind, loss, _, _, printed in steps:
        terms = dict(term.split(":") for term in printed.split())
        assert list(terms) == (["flow", "cfm", "reg", "repa"] if kind == "train" else [])
        if terms:
            assert float(loss) == pytest.approx(sum(map(float, terms.values())), abs=4e-5)


@pytest.mark.parametrize("name", ["trained", "everything_on"])
def test_referee_agrees_with_the_log(name, request):
    run = request.getfixturevalue(name)
    results = json.loads((run / "results.json").read_text())
    assert [point["step"] for point in results["checkpoints"]] == [10, 20]
    for point in results["checkpoints"]:
        assert point["val_loss"] == pytest.approx(point["val_loss_logged"], rel=1e-5)
    assert f"{results['checkpoints'][-1]['val_loss_logged']:.5f}" == parse_log(run)[1]["val_loss"]
    assert results["nfe"] == 20 == ts.sampling_nfe(CONFIG)  # 10 steps, all of them guided
    if name == "trained":  # without routing, the null half costs as much
        assert results["nfe_by_flops"] == pytest.approx(20, rel=0.01)
    assert results["rules"]["contract"].startswith("edited: ")  # of a track that none published


# ---------------------------------------------------------------------------------------------
# Optimizers and schedules
# ---------------------------------------------------------------------------------------------


def test_every_parameter_is_trained_exactly_once():
    """Banks by Muon, unless its learning rate is 0; a name without initialisation raises."""
    model = ts.Transformer(ALL, TRACK)
    banks = {name for name, parameter in model.named_parameters() if parameter.dim() == 3}
    assert banks == {"qkv", "proj", "up", "down", "fuse"}
    for muon_lr in (0.02, 0.0):
        optimizers = ts.make_optimizers(model, replace(ALL, muon_lr=muon_lr), ts.World())
        trained = {}
        for name, optimizer in optimizers.items():
            trained[name] = [id(p) for group in optimizer.param_groups for p in group["params"]]
        assert sorted(sum(trained.values(), [])) == sorted(map(id, model.parameters()))
        assert len(trained.get("muon", [])) == (len(banks) if muon_lr else 0)
    model.surprise = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="surprise"):
        model.init_weights(0)


def test_orthogonalized_matrices_are_the_nearest_orthogonal_ones():
    gradients = torch.randn(5, 96, 48, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(gradients, full_matrices=False)
    for dtype in (torch.float32, torch.bfloat16):
        found = ts.orthogonalize(gradients, dtype).float()
        singular = torch.linalg.svdvals(found)
        assert 0.8 < singular.min() and singular.max() < 1.2
        assert cosine_similarity(found.flatten(1), (u @ v).flatten(1)).min() > 0.99


def test_muon_equals_the_plain_rule():
    """Banks change nothing: momentum, polar factor and scale of one matrix at a time."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(6, 32, 32), (2, 128, 32), (2, 32, 128)]
    banks = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
    wanted = [bank.detach().clone() for bank in banks]
    momenta = [torch.zeros_like(bank) for bank in wanted]
    muon = ts.Muon(banks, lr=0.1, momentum=0.9, dtype=torch.float32, world=ts.World())
    for _ in range(3):
        for bank, weights, momentum in zip(banks, wanted, momenta):
            bank.grad = torch.randn(bank.shape, generator=generator)
            for i, grad in enumerate(bank.grad):
                momentum[i] = 0.9 * momentum[i] + 0.1 * grad
                x = 0.1 * grad + 0.9 * momentum[i]
                x = x / (x.norm() * 1.02 + 1e-6)
                for a, b, c in ts.POLAR_EXPRESS:
                    gram = x @ x.T
                    x = a * x + b * gram @ x + c * gram @ gram @ x
                weights[i] -= 0.1 * max(1, grad.shape[0] / grad.shape[1]) ** 0.5 * x
        muon.step()
    for bank, weights in zip(banks, wanted):
        assert_close(bank.detach(), weights, rtol=1e-4, atol=1e-4)


def test_schedules_move_from_the_first_step_to_the_last(setup):
    """Linear up, flat, linear down, never 0; the EMA forgets the first weights; a step obeys."""
    cfg = replace(ALL, steps=100, warmup=0.1, cooldown=0.5, ema_decay=0.9)
    rates = [ts.lr_schedule(step, cfg) for step in (0, 4, 9, 30, 50, 75, 99)]
    assert rates == pytest.approx([0.1, 0.5, 1, 1, 1, 0.5, 0.02])
    assert [ts.ema_decay(step, cfg) for step in (0, 8, 99)] == pytest.approx([0.1, 0.5, 0.9])
    state = ts.State(cfg, 0, setup.world)
    first = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    rows = setup.data.gather(np.arange(16), setup.world.device)
    batch = ts.make_batch(state.model, setup.captions, rows, 0, 4, setup.world)
    ts.train_step(state, 4, batch)
    for name, optimizer in state.optimizers.items():
        peak = dict(muon=cfg.muon_lr, adamw=cfg.adamw_lr)[name]
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * peak)
    assert not state.model.head.weight.equal(first["head.weight"])  # zero before, and it moved
    for name, average in state.ema.named_parameters():
        weights = state.model.get_parameter(name).detach()
        assert_close(average, first[name].lerp(weights, 1 - 5 / 14))


# ---------------------------------------------------------------------------------------------
# Objective and sampler
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.0, 0.5])
def test_first_val_loss_has_its_analytic_value(sigma, setup, trained):
    """Zero-initialised, the model predicts 0 or the best linear guess from x_t, E[v | x_t]."""
    state = ts.State(replace(CONFIG, sigma_data=sigma), 0, setup.world)
    found = ts.validate(state, setup.val, setup.captions)
    noise, t = (draw.double() for draw in ts.validation_draws(TRACK, 32))
    x = load_file("data/tiny/val_000.safetensors")["latents"][:32].double() / 127.5 - 1
    assert_close(t.sort().values, (torch.arange(32).double() + 0.5) / 32)
    t = t.view(-1, 1, 1, 1)
    # For x ~ N(0, sigma^2): the covariance of velocity and x_t, over the variance of x_t
    gain = (t - (1 - t) * sigma**2) / ((1 - t) ** 2 * sigma**2 + t**2) * (sigma > 0)
    guess = gain * ((1 - t) * x + t * noise)
    assert found == pytest.approx((noise - x - guess).square().mean().item(), rel=1e-5)
    assert float(parse_log(trained)[1]["val_loss"]) < 0.75 * found  # training learns more


def test_batch_is_drawn_from_the_images(drawn):
    """Mirrored or not, captioned or not, at evenly spread times, with DINOv2's class token."""
    batch, rows = drawn.batch, drawn.rows
    image = rows["latents"].float() / 127.5 - 1
    as_stored = torch.isclose(batch.x[:, IMAGE], image.flatten(1), atol=1e-6).all(1)
    mirrored = torch.isclose(batch.x[:, IMAGE], image.flip(-1).flatten(1), atol=1e-6).all(1)
    assert (as_stored ^ mirrored).all() and as_stored.any() and mirrored.any()
    assert_close(batch.features, rows["features"] * 4 / 127)
    assert batch.x[:, IMAGE.stop :].equal(batch.features[:, 0])
    even = batch.t / (1.4 - 0.4 * batch.t)  # before the time shift
    assert_close(even.sort().values.diff(), torch.full((15,), 1 / 16), rtol=0, atol=1e-5)
    captioned = ~batch.text.eq(drawn.model.null_text(16)).all(1)
    table = load_file("data/tiny/text.safetensors")["pooled"].float()
    assert 8 < captioned.sum() < 16
    assert batch.text[captioned].equal(table[rows["labels"].long()][captioned])


def test_routing_is_a_gather_and_a_scatter(drawn, setup):
    """All tokens in any order are no routing; skipped images do not see the middle block."""
    batch, cfg = drawn.batch, drawn.model.cfg
    assert batch.keep.shape == (16, 1 + 4) and not batch.keep[:, 0].any()  # the class token stays
    assert all(len(set(row)) == 5 and max(row) < 17 for row in batch.keep.tolist())
    assert batch.skip.dtype == torch.bool
    generator = torch.Generator().manual_seed(0)
    mixed = torch.rand(16, 17, generator=generator).argsort(dim=1)
    whole = forward(drawn)
    assert_close(forward(drawn, mixed), whole)
    routed = forward(drawn, batch.keep)
    assert not torch.allclose(routed, whole, atol=1e-3)
    skip = torch.arange(16) < 8
    both = forward(drawn, batch.keep, skip)
    assert_close(both[8:], routed[8:])
    drawn.model.up[1].zero_()
    again = forward(drawn, batch.keep, skip)
    assert again[:8].equal(both[:8]) and not torch.allclose(again[8:], both[8:], atol=1e-3)
    rest = (setup.captions, drawn.rows, 0)
    tail = [ts.make_batch(drawn.model, *rest, step, setup.world).keep for step in (13, 14)]
    assert tail[0] is not None and tail[1] is None  # the last 30 % of the 20 steps: cfg.dense_tail
    assert cfg.dense_tail == 0.3


def test_loss_is_the_sum_of_its_terms(drawn):
    """By hand, image by image: flow matching, the neighbour's velocity, class token, alignment."""
    model, b = drawn.model, drawn.batch
    terms = ts.loss_terms(model, b)
    t = b.t[:, None]
    v, states = model((1 - t) * b.x + t * b.noise, b.t, b.text, b.keep, b.skip)
    for i in range(16):
        error = v[i] - (b.noise[i] - b.x[i])
        contrast = v[i] - (b.noise[i ^ 1] - b.x[i ^ 1])
        apart = 0.0
        for state, project, is_routed in zip(states, model.projectors, (False, True, False)):
            tokens = b.keep[i].tolist() if is_routed else range(17)  # class, then 16 patches
            aims = b.features[i, list(tokens)]
            apart += 1 - cosine_similarity(project(state[i]), aims, dim=1).mean()
        wanted = dict(
            flow=error[IMAGE].square().mean(),
            cfm=-0.05 * contrast[IMAGE].square().mean(),
            reg=0.03 * error[IMAGE.stop :].square().mean(),
            repa=0.5 / 3 * apart,
        )
        assert list(terms) == list(wanted)
        for name, value in wanted.items():
            assert_close(terms[name][i], value, rtol=1e-4, atol=1e-5)
    assert list(ts.loss_terms(model.eval(), b._replace(keep=None))) == ["flow"]


def sample_exactly(cfg, mu: float, forward, monkeypatch) -> torch.Tensor:
    """1,000 samples (1, 4, 4) under the caption `mu` from a model whose forward is given."""
    track = replace(TRACK, shape=(1, 4, 4), text_width=1)
    monkeypatch.setattr(ts, "PCA", 16)
    model = ts.Transformer(cfg, track)  # its null caption is 0
    monkeypatch.setattr(model, "forward", forward)
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(1000, 1, 4, 4, generator=generator)]
    text = torch.full((1000, 1), mu)
    return ts.sample(model, *noise, text, lambda: torch.randn(1000, 1, 4, 4, generator=generator))


def gain(t, spread: float):
    """The velocity of N(0, spread^2) at x_t, over x_t."""
    return (t - (1 - t) * spread**2) / (t**2 + (1 - t) ** 2 * spread**2)


@pytest.mark.parametrize(
    "sampler, last_step, guidance",
    [("euler", 0.0, 1.0), ("sde", 0.0, 1.0), ("sde", 0.04, 1.0), ("euler", 0.0, 3.0)],
)
def test_sampler_recovers_a_gaussian(sampler, last_step, guidance, monkeypatch):
    """From the exact velocity of N(caption, .5^2). Guidance moves the mean, not the spread."""
    step = dict(sampler=sampler, last_step=last_step, sample_steps=400)

    def exact(x, t, text, **_):
        t = t.view(-1, 1)
        return gain(t, 0.5) * (x - (1 - t) * text) - text, []

    x = sample_exactly(replace(CONFIG, guidance=guidance, **step), 0.7, exact, monkeypatch)
    assert x.mean().item() == pytest.approx(guidance * 0.7, abs=0.03)
    assert x.std().item() == pytest.approx(0.5, rel=0.05)


def test_class_token_is_drawn_with_the_image(monkeypatch):
    """Of pairs (x, c) with x + c wide and x - c narrow, x has the spread of both.

    It would not if c did not move, or had no noise of its own.
    """
    wide, narrow = 0.9, 0.1
    cfg = replace(CONFIG, sampler="sde", reg=0.1, guidance=1.0, sample_steps=400)

    def exact(z, t, text, **_):
        t = t.view(-1, 1)
        x, c = z.split(16, dim=1)
        total = gain(t, wide) * (x + c)
        apart = gain(t, narrow) * (x - c)
        return torch.cat([total + apart, total - apart], dim=1) / 2, []

    x = sample_exactly(cfg, 1.0, exact, monkeypatch)
    assert x.std().item() == pytest.approx(((wide**2 + narrow**2) / 2) ** 0.5, rel=0.05)
