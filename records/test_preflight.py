"""Tests of preflight.py: one rehearsal on the null device, the model's arithmetic, refusals."""

import argparse
import re
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import train_speedrun as ts
from data.common import UserError
from data.testing import CONFIG, TRACK, racer, refuses
from records import gpu_model, null_device, preflight

SMALL = replace(CONFIG, depth=2, compile=True, bf16=True, muon_lr=0)
# After the step's parts: one matrix product more, whose sum the host waits for and copies back.
# No warm-up: the first step compiles, and only what training needs.
EXTRA = """
warm_up = lambda *_: None
plain_train_step = train_step


def train_step(state, step, batch):
    means = plain_train_step(state, step, batch)
    weight = state.model.time_out.weight.detach()
    total = (weight @ weight).sum().item()
    torch.full((4,), total).to(weight.device)
    return means
"""


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """(sides, results, options) of the tiny track as rank 0 of 2, compiled, with EXTRA."""
    try:
        null_device.check_installation()
    except UserError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("rehearsed")
    options = argparse.Namespace(config="tiny", set=[], card="H200", processes=2, kernels=True)
    side = preflight.Side(str(racer(folder / "racer", SMALL, EXTRA)), options)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        found = preflight.measure(side, options, null_device.build_library(), folder)
    return [side], [found], options


def of_part(rehearsed, part: str) -> list:
    return [entry for entry in rehearsed[1][0]["entries"] if entry["part"] == part]


def test_a_compiled_step_is_counted_on_a_device_that_is_not_there(rehearsed):
    """Its kernels are Triton's, its forward multiplies what it does on a CPU, it never waits."""
    found = rehearsed[1][0]
    assert (found["graphs"], found["breaks"], found["recompiles"]) == (2, 0, 0)  # loss, AdamW
    for part in ("forward", "backward"):
        entries = of_part(rehearsed, part)
        assert preflight.launches(entries, "triton") > 5 < preflight.launches(entries, "cublas")
        assert all(entry["bytes"] > 0 for entry in entries)
    model = ts.Transformer(SMALL, TRACK)
    half = SMALL.batch_size // 2
    with FlopCounterMode(display=False) as counter:
        ts.velocity(model, torch.zeros(half, 3, 8, 8), torch.zeros(half), torch.zeros(half, 16))
    assert preflight.total(of_part(rehearsed, "forward"), "flops") == counter.get_total_flops()
    for part in {entry["part"] for entry in found["entries"]} - {"rest"}:
        entries = of_part(rehearsed, part)
        assert preflight.total(entries, "waits") == preflight.total(entries, "pageable") == 0
    assert 0 < found["peak_memory"] < 2**27


def test_a_wait_a_pageable_copy_and_one_more_product_are_seen(rehearsed):
    rest = of_part(rehearsed, "rest")
    assert preflight.total(rest, "flops") == 2 * SMALL.width**3
    assert preflight.total(rest, "pageable") == 1
    names = [entry["name"].split()[0] for entry in rest if entry.get("waits")]
    assert names == ["_local_scalar_dense", "_to_copy"]


def test_exchanges_have_the_bytes_of_gradients_and_weights_and_are_waited_for(rehearsed):
    parameters = sum(p.numel() for p in ts.Transformer(SMALL, TRACK).parameters())
    assert preflight.total(of_part(rehearsed, "exchange"), "exchanged") == 4 * parameters
    entries = of_part(rehearsed, "adamw")
    assert preflight.total(entries, "exchanged") == 2 * parameters  # in bf16
    lasts = gpu_model.exchange_seconds(gpu_model.CARDS["H200"], "reduce", 4 * parameters, 2)
    assert preflight.total(entries, "waited") == pytest.approx(lasts, abs=5e-6)  # beside kernels


def test_two_scripts_stand_side_by_side_under_the_assumptions(rehearsed):
    sides, results, options = rehearsed
    text = preflight.report(sides * 2, results * 2, options)
    assert text.startswith("A model of 2 x NVIDIA H200, no measurement: ")
    assert gpu_model.CARDS["H200"].table() in text
    row = re.search(r"^\| launches \| (\d+): .* \| (\d+): .* \|$", text, re.M)
    assert row[1] == row[2] == str(preflight.launches(results[0]["entries"]))
    assert re.search(r"^\| ms of a step, modelled \| (\S+) \| \1 \|$", text, re.M)
    assert re.search(r"^\| adamw \| ", text, re.M) and text.count("What costs most in ") == 2


def test_the_model_is_arithmetic():
    card = gpu_model.Card("a", bandwidth=1e12, bf16=132e12, product=0.5, kernel=0.0, launch=1e-3)
    wave = 2 * 128 * 256 * 1000 / 0.5e12  # one tile on each of 132 processors
    assert gpu_model.product_seconds(card, 1, 128 * 11, 256 * 12, 1000, card.bf16) == wave
    assert gpu_model.product_seconds(card, 1, 128 * 11 + 1, 256 * 12, 1000, card.bf16) > wave
    gathered = gpu_model.exchange_seconds(card, "_allgather_base_", 36e9, 4)
    assert gathered == pytest.approx(0.075)
    assert gpu_model.exchange_seconds(card, "allreduce_", 36e9, 4) == 2 * gathered
    entry = dict(part="forward", name="mm", seconds=0.002, kinds=["cublas"], bytes=1e9, flops=66e9)
    found = dict(images=8, peak_memory=2**30, graphs=1, breaks=0, recompiles=0)
    cells = preflight.summary(found | dict(entries=[entry] * 2), card)
    assert cells["ms of a step, modelled"] == "4.0"
    assert cells["images/s of all processes, modelled"] == "2,000"
    assert cells["MFU of forward and backward, modelled"] == "25.0%"
    assert cells["launches"] == "2: 0 triton, 2 cublas, 0 other"
    entry |= dict(part="rest", seconds=0.0)
    cells = preflight.summary(found | dict(entries=[entry]), card)
    assert cells["MFU of forward and backward, modelled"] == "-"
    assert cells["ms of a step, modelled"] == "1.0"  # the host is the limit


REFUSED = {
    ("platform.machine", "aarch64"): "Linux on x86-64",
    ("torch.version.cuda", None): "built without CUDA",
    ("torch.__version__", "2.99.0"): "2.99.0 was never tried",
    ("shutil.which", None): "no g++",
}


def test_what_cannot_be_rehearsed_is_one_line(tmp_path, monkeypatch, capsys):
    def call(*arguments):
        code = preflight.main([*map(str, arguments)])
        return argparse.Namespace(returncode=code, **capsys.readouterr()._asdict())

    for (name, value), cause in REFUSED.items():
        with monkeypatch.context() as patch:
            patch.setattr(torch.version, "cuda", "13.2")
            patch.setattr(torch, "__version__", "2.15.0")
            result = value if name.startswith("torch") else lambda *_, value=value: value
            patch.setattr(name, result)
            done = call(tmp_path)
        done = argparse.Namespace(stdout=done.out, stderr=done.err, returncode=done.returncode)
        refuses(done, "preflight.py: cannot rehearse here: ", cause)
