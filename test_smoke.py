"""./run.sh test smoke: one run end to end, and what a change is most likely to break."""

import copy
import json
import re
from dataclasses import replace
from functools import partial
from operator import attrgetter
from types import SimpleNamespace
from unittest.mock import Mock

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
from data import testing
from data.common import read_contract
from data.testing import ALL, CONFIG, ROOT, TRACK, distance, last_run, python, racer, train_here
from records.series import parse_log

# Formatted lines of these files, of any other one in a folder, and of all tests together
CAPS = {"train_speedrun.py": 1495, "eval_speedrun.py": 800, "test_smoke.py": 360}
CAPS |= {"data": 600, "records": 420, "tests": 4300}

# The end of a racer's script: each process keeps its state at every validation, or dies before it
WATCHED = """
plain = validate
def validate(state, *data):
    if os.environ.get("DIE"):
        raise KeyboardInterrupt
    loss = plain(state, *data)
    state_dict = dict(state.state_dict(), loss=torch.tensor(loss))
    torch.save(state_dict, f"rank_{state.world.rank}.pt")
    return loss
"""


@pytest.fixture(scope="session")
def everything_on(tmp_path_factory, lite_weights):
    """A refereed run of one process with routing, contrast, REG and REPA: its folder."""
    folder = racer(tmp_path_factory.mktemp("all"), ALL, WATCHED, captions=3)
    with pytest.MonkeyPatch.context() as monkeypatch:
        run = train_here(folder, monkeypatch)
        assert eval_speedrun.main([str(run), "--images", "20"]) == 0
    return run


@pytest.fixture
def drawn(tiny):
    """The tiny track's data, and a batch of it for a model with all switches and no zero weight."""
    world = ts.World()
    data = ts.open_data(ALL, TRACK, world)
    captions = ts.load_captions(TRACK, world.device)
    model = ts.Transformer(ALL, TRACK, testing.COMPONENTS).requires_grad_(False)
    torch.manual_seed(0)
    for weights in model.parameters():
        weights.copy_(0.2 * torch.randn(weights.shape))
    rows = ts.Loader(data[0], ALL, 0, world)(0)
    batch = ts.make_batch(model, captions, rows, 0, 0, world)
    forward = partial(model, batch.x, batch.t, batch.text)
    return SimpleNamespace(model=model, batch=batch, forward=forward, data=data, captions=captions)


def test_files_are_short_and_formatted():
    tests = 0
    for folder in (ROOT, ROOT / "data", ROOT / "records"):
        for path in folder.glob("*.py"):
            lines = path.read_text().splitlines()
            if path.name in CAPS or not path.name.startswith("test"):
                assert len(lines) <= (CAPS.get(path.name) or CAPS[folder.name]), path
            if path.name.startswith("test"):
                tests += len(lines)
    assert tests <= CAPS["tests"]
    pytest.importorskip("ruff")
    for order in (["format", "--check"], ["check"]):
        done = python(ROOT, "-m", "ruff", *order, "--no-cache", check=False)
        assert done.returncode == 0, done.stdout


def test_import_starts_nothing(tmp_path):
    code = """import train_speedrun, eval_speedrun, sys, threading, torch
assert threading.active_count() == 1 and not torch.distributed.is_initialized()
print([name for name in ("torchvision", "timm", "open_clip", "PIL") if name in sys.modules])"""
    found = python(tmp_path, "-c", code, PYTHONDONTWRITEBYTECODE="1").stdout
    assert found.strip() == "[]" and not list(tmp_path.iterdir())


def test_contracts_are_the_published_ones_also_beside_a_new_track(trained):
    for folder in (ROOT, trained):
        source = (folder / "train_speedrun.py").read_text()
        for name, published in eval_speedrun.CONTRACTS.items():
            assert read_contract(source, name).sha256 == published


def test_run_leaves_everything(trained):
    found = {path.name for path in trained.iterdir()}
    assert found > {"log.txt", "results.json", "train_speedrun.py", "curve.png", "samples.png"}
    assert found > {"step_000010.safetensors", "step_000020.safetensors"} and len(found) == 7
    for name in ("curve.png", "samples.png"):
        assert np.asarray(Image.open(trained / name).convert("L")).std() > 1
    flops = json.loads((trained / "results.json").read_text())["nfe_by_flops"]
    assert flops == pytest.approx(20, rel=0.01)  # 10 guided steps, without routing


def test_log_parses_and_the_referee_agrees(everything_on):
    log = parse_log(everything_on / "log.txt")
    assert log["source"] == (everything_on / "train_speedrun.py").read_bytes()
    number = r"(-?\d+\.\d{5})"
    form = rf"step:(\d+)/20 images:(\d+) train_loss:{number} train_time:\d+ms step_avg:\d+\.\d\dms"
    for term in ("flow", "cfm", "reg", "repa"):
        form += f" {term}:{number}"
    lines = re.findall(f"^{form}$", (everything_on / "log.txt").read_text(), re.M)
    for i, line in enumerate(lines, 1):
        step, images, loss, *terms = map(float, line)
        assert (step, images) == (i, 16 * i)
        assert loss == pytest.approx(sum(terms), abs=4e-5)
    assert len(lines) == 10
    results = json.loads((everything_on / "results.json").read_text())
    for point, (_, _, loss) in zip(results["checkpoints"], log["points"], strict=True):
        assert point["val_loss_logged"] == pytest.approx(loss, abs=1e-5)
    assert results["val_loss"] == pytest.approx(point["val_loss_logged"], rel=1e-5)
    assert results["nfe"] == log["sampling_nfe"] == 30  # 10 steps, all of them guided twice


def test_every_parameter_is_trained_exactly_once_and_has_an_initialisation(tiny):
    for muon_lr, names in ((0.02, {"adamw", "muon"}), (0.0, {"adamw"})):
        state = ts.State(replace(ALL, muon_lr=muon_lr), 0, ts.World(), testing.COMPONENTS)
        assert {share.rule.__name__ for share in state.shares} == names
        trained = [id(p) for share in state.shares for p in share.params]
        assert sorted(trained) == sorted(map(id, state.model.parameters()))
    state.model.surprise = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="surprise"):
        state.model.init_weights(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonalized_matrices_are_near_orthogonal(dtype):
    torch.manual_seed(0)
    tall = torch.randn(5, 96, 48)
    both = [ts.orthogonalize(matrices, dtype).float() for matrices in (tall, tall.mT)]
    singular = torch.linalg.svdvals(torch.cat([both[0], both[1].mT]))
    assert singular.min() > 0.8 and singular.max() < 1.2


@pytest.mark.parametrize("shape", [(6, 32, 32), (2, 128, 32), (2, 32, 128)])
def test_muon_equals_the_plain_rule_matrix_by_matrix(shape):
    torch.manual_seed(1)
    bank = torch.randn(shape)
    wanted = bank.clone()
    momentum = 0.0
    rows = dict(weights=bank, momentum=torch.zeros(shape))
    for moves in (True, False, True):
        gradient = torch.randn(shape)
        momentum = 0.9 * momentum + 0.1 * gradient
        for i, x in enumerate(0.1 * gradient + 0.9 * momentum):
            x = x / (x.norm() * 1.02 + 1e-6)
            for a, b, c in ts.POLAR_EXPRESS:
                gram = x @ x.T
                x = a * x + b * gram @ x + c * gram @ gram @ x
            wanted[i] -= moves * 0.1 * max(1, shape[1] / shape[2]) ** 0.5 * x
        now = dict(lr=1.0, moves_banks=moves)
        ts.muon(rows, gradient, now, replace(CONFIG, muon_lr=0.1, muon_momentum=0.9))
    assert_close(bank, wanted, rtol=1e-4, atol=1e-4)


def test_schedules():
    """Linear up, flat, linear down, never 0; the EMA forgets; SR-DiT's sampling grid, shifted."""
    cfg = replace(CONFIG, steps=100, warmup=0.1, cooldown=0.5, ema_decay=0.9)
    rates = [ts.lr_schedule(step, cfg) for step in (0, 4, 9, 30, 50, 75, 99)]
    assert rates == pytest.approx([0.1, 0.5, 1, 1, 1, 0.5, 0.02])
    assert [ts.ema_decay(step, cfg) for step in (0, 8, 99)] == pytest.approx([0.1, 0.5, 0.9])
    times = ts.sampling_times(replace(cfg, sample_steps=250, last_step=0.04, sample_shift=2**0.5))
    assert times[::83] == pytest.approx([1, 0.750325, 0.443051, 0.055647], abs=1e-6)


@pytest.mark.parametrize("floor", [0.0, 0.2])
def test_first_val_loss_has_its_analytic_value(floor, drawn, trained):
    """The zero-initialised model predicts the best linear guess E[velocity | x_t], or x = 0."""
    state = ts.State(replace(CONFIG, sigma_data=0.5, x_floor=floor), 0, ts.World())
    found = ts.validate(state, drawn.data[1], drawn.captions)
    noise, t = ts.validation_draws(TRACK, 32)
    x = load_file("data/tiny/val_000.safetensors")["latents"][:32].double() / 127.5 - 1
    t = t.double().view(-1, 1, 1, 1)
    variance = (1 - t) ** 2 * 0.25 + t**2  # of x_t, where x ~ N(0, .25)
    gain = 1 / t.clamp(min=0.05) if floor else (t - (1 - t) * 0.25) / variance
    error = noise - x - gain * ((1 - t) * x + t * noise)
    assert found == pytest.approx(error.square().mean().item(), rel=1e-5)
    assert parse_log(trained / "log.txt")["val_loss"] < 0.75 * found  # training learns more


def test_routing_is_a_gather_and_a_scatter(drawn):
    """All tokens in any order are no routing; skipped images do not see the middle block."""
    keep = drawn.batch.keep
    assert keep.shape == (16, 5) and keep.max() < 17
    assert not keep[:, 0].any() and keep.sort().values.diff().all()  # the class token stays
    u = torch.rand(16, 17)
    assert ts.draw_routing(drawn.model, 13, u)[0] is not None
    assert ts.draw_routing(drawn.model, 14, u)[0] is None  # the dense tail, 30 % of 20 steps
    whole = drawn.forward()[0]
    assert_close(drawn.forward(u.argsort())[0], whole)
    routed = drawn.forward(keep)[0]
    assert not torch.allclose(routed, whole, atol=1e-3)
    skip = torch.arange(16) < 8
    before = drawn.forward(keep, skip)[0]
    assert_close(before[8:], routed[8:])
    drawn.model.up[1].zero_()
    after = drawn.forward(keep, skip)[0]
    assert after[:8].equal(before[:8]) and not torch.allclose(after[8:], before[8:], atol=1e-3)


def test_null_half_of_guidance_leaves_out_routed_blocks_and_their_cost(drawn, monkeypatch):
    with FlopCounterMode(display=False) as whole:
        skipped = drawn.forward(None, torch.ones(16, dtype=torch.bool))[0]
    with FlopCounterMode(display=False) as dropped:
        assert_close(drawn.forward(drop_middle=True)[0], skipped)
    assert dropped.get_total_flops() < 0.8 * whole.get_total_flops()
    model = drawn.model
    spy = Mock(wraps=model.forward)
    monkeypatch.setattr(model, "forward", spy)
    model.cfg = replace(ALL, guidance=2.0, guidance_interval=(0.5, 1.0), autoguidance=0.0)
    fresh = Mock(return_value=torch.zeros(16, *TRACK.shape))
    ts.sample(model, fresh(), drawn.batch.text, fresh)
    drops = [call.kwargs.get("drop_middle") for call in spy.call_args_list]
    assert drops == [None, True] * 5 + [None] * 5
    assert ts.sampling_nfe(model.cfg) == 15
    assert fresh.call_count == 2 + 2 * 9  # the last step of the sde adds none


def test_autoguidance_leads_away_from_the_ema_that_was_kept(everything_on, tiny, monkeypatch):
    paths = sorted(everything_on.glob("step_*.safetensors"))
    half, whole = (load_file(path) for path in paths)  # of steps 10 and 20
    assert half["weak.up"].equal(half["up"]) and whole["weak.up"].equal(half["up"])
    assert not whole["weak.up"].equal(whole["up"])
    cfg = replace(ALL, sampler="euler", last_step=0, sample_steps=1, guidance=1.0, autoguidance=2.0)
    for share, way in ((1.0, 2.0), (0.5, 0.0)):
        cfg = replace(cfg, autoguidance_interval=(0.0, share))
        monkeypatch.setitem(ts.CONFIGS, "tiny", cfg)
        model, _ = ts.load_checkpoint(paths[1])
        text = torch.randn(4, TRACK.text_width)
        inputs = (torch.cat([noise := torch.randn(4, 192), torch.zeros(4, 8)], 1), torch.ones(4))
        with torch.no_grad():
            v, v_weak = (network(*inputs, text)[0][:, :192] for network in (model, model.weak))
        assert ts.sampling_nfe(cfg) == 1 + (way > 0) and not torch.allclose(v, v_weak, atol=1e-3)
        images = noise.view(4, *TRACK.shape)
        found = ts.sample(model, images, text, partial(torch.zeros, images.shape))
        assert_close(found.flatten(1), noise - v - way * (v - v_weak))


@pytest.mark.parametrize("floor, share", [(0.0, 1.0), (0.5, 0.2)])
def test_loss_is_the_sum_of_its_terms(floor, share, drawn):
    model, b = drawn.model, drawn.batch
    model.cfg = replace(model.cfg, x_floor=floor, mean_weight=share)
    t = b.t[:, None]
    v, states = model((1 - t) * b.x + t * b.noise, b.t, b.text, b.keep, b.skip)
    target = b.noise - b.x
    error = (v - target) * t / t.clamp(min=floor)
    contrast = (v - target[torch.arange(16) ^ 1]) * t / t.clamp(min=floor)  # the other of a pair
    aims = [b.features, b.features.take_along_dim(b.keep[..., None], 1), b.features]
    cosines = [cosine_similarity(f(h), a, 2) for f, h, a in zip(model.projectors, states, aims)]
    pixels = model.image_values  # then comes the class token
    means = error[:, :pixels].view(16, 3, 4, 2, 4, 2).mean((3, 5))  # of each patch
    flow = error[:, :pixels].square().mean(1) - (1 - share) * means.square().mean((1, 2, 3))
    wanted = {"flow": flow, "cfm": -0.05 * contrast[:, :pixels].square().mean(1)}
    wanted["reg"] = 0.03 * error[:, pixels:].square().mean(1)
    wanted["repa"] = 0.5 / 3 * sum(1 - cosine.mean(1) for cosine in cosines)
    assert_close(ts.loss_terms(model, b), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "sampler, last_step, guidance, reg",
    [("euler", 0, 1, 0), ("sde", 0.04, 1, 0), ("euler", 0, 3, 0), ("sde", 0, 1, 1)],
)
def test_sampler_recovers_a_gaussian(sampler, last_step, guidance, reg, monkeypatch):
    """From its exact velocity; with REG, one in which images go with their class tokens."""
    switches = dict(guidance=guidance, reg=reg, sampler=sampler, last_step=last_step)
    cfg = replace(CONFIG, sample_steps=400, **switches)
    model = ts.Transformer(cfg, replace(TRACK, shape=(1, 4, 4), text_width=1), 16)
    pair = torch.tensor([[0.41, 0.40], [0.40, 0.41]] if reg else [[0.25]])
    covariance = pair.kron(torch.eye(16))
    unit = torch.eye(len(covariance))

    def exact(x, t, text, **_):
        t = t[0]
        variance = (1 - t) ** 2 * covariance + t**2 * unit  # of x_t
        gain = (t * unit - (1 - t) * covariance) @ variance.inverse()
        return (x - (1 - t) * text) @ gain - text, []

    monkeypatch.setattr(model, "forward", exact)
    torch.manual_seed(0)
    fresh = partial(torch.randn, 1000, 1, 4, 4)
    x = ts.sample(model, fresh(), torch.full((1000, 1), 0.7), fresh)
    assert x.mean().item() == pytest.approx(guidance * 0.7, abs=0.03)  # the null caption's is 0
    assert x.std().item() == pytest.approx(0.64 if reg else 0.5, rel=0.05)


def test_two_processes_train_the_same_model(everything_on, tmp_path):
    folder = racer(tmp_path, ALL, WATCHED, captions=3)
    python(folder, "train_speedrun.py", "tiny", processes=2)
    wanted = torch.load(everything_on.parent.parent / "rank_0.pt")
    assert distance(torch.load(folder / "rank_0.pt"), wanted) < 1e-5
    assert distance(torch.load(folder / "rank_1.pt"), wanted) < 1e-5


def test_killed_run_resumes_to_the_bit(everything_on, tmp_path, monkeypatch):
    folder = racer(tmp_path, ALL, WATCHED, captions=3)
    with pytest.raises(KeyboardInterrupt):
        train_here(folder, monkeypatch, DIE="1")
    run = train_here(folder, monkeypatch, DIE="", RESUME=str(last_run(folder)))
    wanted = torch.load(everything_on.parent.parent / "rank_0.pt")
    assert distance(torch.load(folder / "rank_0.pt"), wanted) == 0
    assert "\nresumed from step 5 at " in (run / "log.txt").read_text()


def test_warm_up_leaves_no_trace(drawn):
    state = ts.State(ALL, 3, ts.World(), testing.COMPONENTS)
    for step in (4, 5):
        before, random = copy.deepcopy(state.state_dict()), torch.get_rng_state()
        ts.warm_up(state, drawn.data[0].shapes, drawn.captions)
        assert distance(state.state_dict(), before) == 0
        assert torch.equal(random, torch.get_rng_state())
        assert all(parameter.grad is None for parameter in state.model.parameters())
        ts.train_step(state, step, drawn.batch)


def test_clock_counts_what_the_contract_lists(tiny, monkeypatch):
    """Time moves in stubs alone, by an amount of its own in each."""
    now = [0]
    monkeypatch.setattr(ts, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    counted = ["train_step", "Loader.__call__", "make_batch", "Run.log_step"]
    counted += ["Transformer.set_text", "load_captions"]
    free = ["warm_up", "validate", "write_atomic", "check_config"]
    free += ["Shards.__init__", "State.__init__"]
    for power, name in enumerate(counted + free):
        plain = attrgetter(name)(ts)

        def slow(*arguments, plain=plain, seconds=100**power, **more):
            now[0] += seconds
            return plain(*arguments, **more)

        monkeypatch.setattr(f"train_speedrun.{name}", slow)
    monkeypatch.setattr("sys.argv", ["train_speedrun.py", "tiny"])
    assert ts.main() == 0
    # Of 20 steps 10 have lines; the table is for model and EMA; warm-up's steps are free
    assert parse_log(last_run(tiny) / "log.txt")["train_time_s"] == 1_02_10_20_20_20
