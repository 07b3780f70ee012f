"""The referee: what runs beside it, its budget, its validation, an evaluation, its error lines.

Attacks are code that a racer could add to a snapshot, each with the line that refuses it.
"""

import hashlib
import json
import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import eval_speedrun as ev
import train_speedrun as ts
from data import guest, metrics, networks, sandbox, validation
from data.common import UserError, World, read_captions, read_contract
from data.testing import add_code, copy_run, python, sampler_of

CPU = torch.device("cpu")


@pytest.fixture
def refused(capsys):
    """Calls the referee: one line on standard error with these words, exit code 2."""

    def check(*arguments, words: tuple):
        assert ev.main([*map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and all(word in error for word in words), error

    return check


# ---------------------------------------------------------------------------------------------
# The budget
# ---------------------------------------------------------------------------------------------

# A sampler that also does what the file `cheat` says, and a compiler that takes no time
ROGUE = """
import functools
torch.compile = functools.partial(torch.compile, backend="eager")
def another(model):
    other = type(model)(model.cfg, model.track)
    other.load_state_dict(model.state_dict())
    return other
def sample(model, noise, text, fresh=None, original=sample):
    scope = globals() | dict(model=model, noise=noise, text=text)
    scope["x"] = original(model, noise, text, fresh)
    exec(Path("cheat").read_text(), scope)
    return scope["x"]
"""


@pytest.fixture(scope="module")
def rogue(trained, tmp_path_factory):
    """rogue(cheat, count): the sampler of a run whose `sample` cheats. They share a process."""
    folder = tmp_path_factory.mktemp("rogue")
    run = add_code(copy_run(trained, folder), ROGUE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        sampler = sampler_of(run)

    def cheating(cheat: str = "", count: int = 0) -> ev.Sampler:
        Path(sampler.run.child.folder.name, "cheat").write_text(cheat)
        sampler.model.compiled = count >= 500
        return ev.Sampler(sampler.run, sampler.model, sampler.captions, CPU)

    return cheating


NINETY_MORE = "\nfor _ in range(90): network(noise.flatten(1), noise.new_ones(len(noise)), text)"
WAYS = {
    "a call": "network = model",
    "a bare forward": "network = model.forward",
    "its class's forward": "network = functools.partial(type(model).forward, model)",
    "a new model": "network = another(model)",
    "a copy": "network = copy.deepcopy(model)",
    "a compiled model": "network = torch.compile(another(model))",
    "a thread": """
def network(*inputs):
    import threading
    thread = threading.Thread(target=another(model), args=inputs)
    thread.start()
    thread.join()
""",
}
BEYOND = "sample computes 110.0 network evaluations' worth.*allows 100"


@pytest.mark.parametrize("count", [0, 500], ids=["plain", "compiled"])
@pytest.mark.parametrize("way", WAYS)
def test_hidden_evaluations_are_refused(way, count, rogue):
    """Ninety more than the honest twenty."""
    with pytest.raises(UserError, match=BEYOND):
        rogue(WAYS[way] + NINETY_MORE, count)([0, 1, 2])


SPOILED = {
    "x = x[0]": r"sample returned \(3, 8, 8\).*expected \(3, 3, 8, 8\)",
    "x = torch.full_like(x, math.nan)": "sample returned .*finite: False",
    "x = nn.Parameter(x)": "a Parameter was returned, not a plain tensor",
    "x = x.tolist()": "a list was returned, not a plain tensor",
    "raise SystemExit(0)": r"sample failed \(SystemExit: 0\)",
    "x = torch.fft.fft(x).real": "FLOPs of aten._fft.* cannot be counted",
}


@pytest.mark.parametrize("cheat", SPOILED)
def test_samples_that_are_no_images_or_cannot_be_counted_are_refused(cheat, rogue):
    with pytest.raises(UserError, match=SPOILED[cheat]):
        rogue(cheat)([0, 1, 2])


def test_rows_are_counted_in_compiled_code_too(rogue):
    for count in (0, 500):
        sampler = rogue("velocity(model, noise[:1], noise.new_ones(1), text[:1])", count)
        sampler([0, 1, 2, 3])
        assert sampler.nfe == pytest.approx(20.25)
    assert sampler.nfe_by_flops == 0  # of compiled code they are not known
    sampler.draw([0, 1, 2, 3], 0, False)  # an audit
    assert sampler.nfe_by_flops == pytest.approx(20.25)


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 3, 3)], ids=["sixteens", "others"])
def test_noise_made_ahead_is_that_of_one_draw_after_another(shape):
    """To the bit, over more draws than are made at once; nobody's change of one is in the next."""
    draw = guest.unit_noise([7, 8], shape, CPU)
    drawn = [draw().clone() if i % 2 else draw().zero_() for i in range(40)]
    for place, seed in enumerate((7, 8)):
        generator = torch.Generator().manual_seed(seed)
        for i, noise in enumerate(drawn):
            assert noise[place].equal((i % 2) * torch.randn(shape, generator=generator))


def test_samples_depend_on_the_index_alone(rogue):
    """Not on the batch, nor on the number of images, of which many are drawn by compiled code."""
    plain = rogue(count=499)
    rows = plain.captions.balanced(12)
    whole = plain(rows).int()
    assert len({bytes(image.numpy()) for image in whole}) == 12
    compiled = rogue("", count=500)
    for start in (0, 5, 10):
        part = slice(start, start + 5)
        assert (compiled(rows[part], start).int() - whole[part]).abs().max() <= 1  # a rounding
    assert (compiled.compiled, plain.compiled) == (True, False)
    assert compiled.nfe == plain.nfe == 20


class Behind(torch.Tensor):
    """A tensor of a class of its own, in whose operations others could hide."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        raise AssertionError("the count comes first")


def flex_attention(x):
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(*[x.view(1, 1, 8, 16)] * 3)


ATTENTION = nn.MultiheadAttention(16, 2, batch_first=True).eval()
ENCODER = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
COUNTED = {  # of x (8, 16): FLOPs, or the operation that is refused
    lambda x: x @ x.T: 2 * 8 * 8 * 16,
    lambda x: x @ x[0]: 2 * 8 * 16,
    lambda x: torch.addmv(x[:, 0], x, x[0]): 2 * 8 * 16,
    lambda x: x[0] @ x[0]: 2 * 16,
    lambda x: torch.addbmm(x[:, :8], x[None], x.T[None]): 2 * 8 * 8 * 16,
    lambda x: torch.einsum("ik,jk->ij", x, x): 2 * 8 * 8 * 16,
    lambda x: F.linear(x, x): 2 * 8 * 8 * 16,
    lambda x: F.scaled_dot_product_attention(*[x[None, None]] * 3): 4 * 8 * 8 * 16,
    flex_attention: 4 * 8 * 8 * 16,
    lambda x: ATTENTION(*[x[None]] * 3)[0]: 2 * 8 * 16 * 64 + 4 * 8 * 8 * 16,
    lambda x: ENCODER(x[None]): 2 * 8 * 16 * 128 + 4 * 8 * 8 * 16,
    lambda x: F.rms_norm(x.relu()[[1, 0]].softmax(1), (16,)).cumsum(1).amax(): 0,
    lambda x: F.bilinear(x, x, x.view(8, 16, 1).expand(8, 16, 16)): "aten._trilinear",
    lambda x: torch.fft.fft(x): "aten._fft",
    lambda x: torch.cdist(x, x): "aten._euclidean_dist|aten._cdist",
    lambda x: torch.sparse.mm(x.to_sparse(), x.T): "aten._.*sparse",
    lambda x: torch.linalg.solve(x[:, :8], x): "aten._linalg_solve",
    lambda x: x.as_subclass(Behind) + 1: "class Behind are not plain tensors",
}


@pytest.mark.parametrize("function", COUNTED)
def test_flops_are_counted_in_full_or_the_operation_is_refused_by_name(function, monkeypatch):
    """Also in honest code whose fast path has no formula: it is off."""
    guest.turn_fast_paths_off()
    x = torch.randn(8, 16)
    wanted = COUNTED[function]
    with torch.no_grad():
        if isinstance(wanted, str):
            with pytest.raises(guest.NotCounted, match=wanted), guest.flops_counted():
                function(x)
        else:
            with guest.flops_counted() as flops:
                function(x)
            assert flops.total == wanted
    torch.backends.mha.set_fastpath_enabled(True)


# ---------------------------------------------------------------------------------------------
# The process that runs a snapshot
# ---------------------------------------------------------------------------------------------

OWN_RESULTS = 'Path("{run}", "results.json").write_text("forged")'
# The count is the guest's own; it says that nothing but twenty evaluations was there
LYING = """
import __main__
def lying(guest, request, tensors, original=__main__.Guest.sample):
    found, out = original(guest, request, tensors)
    flops = 20 * 1362944 * len(request["seeds"])
    return dict(flops=flops, flops_outside=0, rows=20 * len(request["seeds"])), out
__main__.Guest.sample = lying
def sample(model, noise, text, fresh=None, original=sample):
    for _ in range(15):
        x = original(model, noise, text, fresh)
    return x
"""
# The contract's noise and times are known, and x_t = (1 - t) x + t noise
LOOKED_UP = """
def velocity(model, x, t, text, original=velocity):
    noise, times = validation_draws(model.track, 32)
    place = (times[None] - t[:, None]).abs().argmin(1)
    known = (times[place] == t)[:, None, None, None]
    image = (x - t.view(-1, 1, 1, 1) * noise[place]) / (1 - t.view(-1, 1, 1, 1))
    return torch.where(known, noise[place] - image, original(model, x, t, text))
"""
HIDDEN = """
def load_checkpoint(path, device="cpu"):
    cfg = CONFIGS["tiny"]
    model = Transformer(cfg, TRACKS[cfg.track])
    with safe_open(path, "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}
    model.register_buffer("images", weights["images"])
    model.load_state_dict(weights)
    return model.eval(), {}
"""
NOTHING = "def velocity(model, x, t, text): return -x"
NO_NETWORK = "def sample(model, noise, text, fresh=None): return noise"
ATTACKS = {
    "its own json": ("json.dumps = lambda *_, **__: '{\"val_loss\": 0}'", "nonsense to open"),
    "its own results": (OWN_RESULTS + "; os._exit(0)", "snapshot ended its process in open|Read-"),
    "a patched referee": ("import __main__; __main__.Sampler.refuse = None", "Sampler"),
    "a patched count": (LYING, "a sample takes .* times the time of 100 evaluations"),
    "times looked up": (LOOKED_UP, "drawn anew, 0.00001 in the log: more than .* is not chance"),
    "images in a checkpoint": (HIDDEN, "does not load: it has .* more than two sets of weights"),
    "no network in velocity": (NOTHING, "no FLOPs that are counted: it runs no network"),
    "no network in sample": (NO_NETWORK, "computes 0.0 network evaluations.* and 1 at least"),
    "an import that exits": ("raise SystemExit(0)", r"open failed \(SystemExit: 0"),
    "another track": ("CONFIGS['tiny'].track = '../tiny'", "is of no config of"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_attack_is_one_line_and_leaves_no_results(attack, place, monkeypatch, capfd):
    code, line = ATTACKS[attack]
    monkeypatch.setattr(ev, "Child", sandbox.Child)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # tiny tensors want no more
    tensors = {}
    if attack == "images in a checkpoint":
        tensors = {"images": torch.zeros(500, 3, 32, 32, dtype=torch.uint8)}
    logged = "0.00001" if attack == "times looked up" else ""
    add_code(place, code.replace("{run}", str(place)), logged, **tensors)
    (place / "results.json").write_text("of an earlier evaluation")
    assert ev.main([str(place), "--images", "10"]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1, error
    with pytest.raises(UserError, match=line):
        raise UserError(error)
    assert not (place / "results.json").exists()


# What a snapshot finds where it runs
LOOK_AROUND = """
import socket
found = dict(
    data=os.listdir("{data}"), run=os.listdir("{run}"), here=os.listdir("."),
    names=[name for name in os.environ if name.startswith(("SPEEDRUN", "PYTHONPATH", "RANK"))],
    network=[name for _, name in socket.if_nameindex()], process=os.getpid(), path=sys.path[:2],
)
try:
    Path("{data}").with_name("written").touch()
except OSError as error:
    found["written"] = error.strerror
print("garbage" * 1000, file=sys.__stdout__, flush=True)
raise ValueError(json.dumps(found))
"""


def test_a_snapshot_finds_neither_data_nor_network_and_writes_nowhere(place, monkeypatch, capfd):
    """Where the system allows namespaces; elsewhere it has a folder and an environment alone."""
    if subprocess.run(["unshare", "-Urmnp", "true"], capture_output=True).returncode:
        pytest.skip("this system allows no namespaces")
    data = Path("data/tiny").resolve()
    add_code(place, LOOK_AROUND.replace("{data}", str(data)).replace("{run}", str(place)))
    monkeypatch.setattr(ev, "Child", sandbox.Child)
    with pytest.raises(UserError) as caught:
        ev.load_run(place, CPU)
    text = str(caught.value)
    found = json.loads(text[text.index("{") : text.rindex("}") + 1])
    assert found["data"] == found["run"] == found["names"] == []
    assert "train_speedrun.py" in found["here"] and found["network"] == ["lo"]
    assert found["process"] == 1 and str(place) not in "".join(found["path"])
    assert found["written"] == "Read-only file system"
    assert "garbage" not in "".join(capfd.readouterr())


def test_a_sampler_that_hangs_or_dies_is_one_line_and_gone(place, monkeypatch):
    """With the process that it started, which would else write results afterwards."""
    code = """
CHILD = os.fork()
if CHILD == 0:
    time.sleep(10_000)
def sample(model, noise, text, fresh=None):
    time.sleep(10_000)
"""
    add_code(place, code)
    monkeypatch.setattr(ev, "Child", sandbox.Child)
    sampler = sampler_of(place)
    child = sampler.run.child
    home = child.folder.name
    monkeypatch.setattr(sandbox, "SECONDS", 0.5)
    with pytest.raises(UserError, match="did not answer to sample within 0.5 seconds"):
        sampler([0])
    assert child.process.poll() is not None and not Path(home).exists()
    if child.isolation == "namespaces":
        links = [os.readlink(path) for path in Path("/proc").glob("[0-9]*/cwd") if path.exists()]
        assert not [link for link in links if link.startswith(home)]


def test_an_honest_run_is_isolated_and_its_cost_is_reported(trained):
    results = json.loads((trained / "results.json").read_text())
    assert results["isolation"] == "namespaces" or "working directory" in results["isolation"]
    assert results["nfe"] == results["nfe_by_flops"] == 20
    assert 0.05 < results["time_ratio"] < ev.SLOWER
    weights = load_file(trained / "step_000020.safetensors")
    assert results["buffers"] == 17  # text_mean and text_std
    assert results["parameters"] + 17 == sum(x.numel() for x in weights.values())
    assert results["val_loss_fresh"] == pytest.approx(results["val_loss"], rel=0.2)
    assert results["val_loss_fresh"] != results["val_loss"] and results["val_draws_seed"] > 0


# ---------------------------------------------------------------------------------------------
# Validation
# ---------------------------------------------------------------------------------------------


def test_draws_are_the_contracts_or_stratified_ones_that_nobody_knows():
    track = ts.TRACKS["cifar10"]
    for ours, theirs in zip(
        validation.validation_draws(track.shape, 64, validation.DRAWS_SEED),
        ts.validation_draws(track, 64),
        strict=True,
    ):
        assert ours.equal(theirs)
    noise, t = validation.validation_draws(track.shape, 64, 7)
    assert (t * 64).floor().sort().values.equal(torch.arange(64.0))  # one in each part
    assert ((t * 64) % 1).std() > 0.2


def test_a_loss_is_chance_within_five_standard_errors():
    """Of losses steep in t; wild images, which a run could add, do not widen the error."""
    generator = torch.Generator().manual_seed(0)
    losses, errors = [], []
    for _ in range(200):
        seed = torch.randint(9**9, (1,), generator=generator).item()
        _, t = validation.validation_draws((1,), 1024, seed)
        noise = torch.rand(1024, generator=generator)
        steep = t.double().clamp(min=0.05) ** -2 * (1 + 0.2 * noise)  # as that of the image is
        found = validation.Validation(0, steep, t, ())
        losses.append(found.errors.mean().item())
        errors.append(found.standard_error())
    assert np.mean(errors) == pytest.approx(np.std(losses), rel=0.25)
    found.errors[:20] += 100
    assert found.standard_error() < 2 * errors[-1]
    found.errors[t.argsort()[500:530:2]] += 1e5  # the loss rises by more than passes for chance
    assert 5 * 2**0.5 * found.standard_error() < 15 * 1e5 / 1024
    found.loss = 0.55
    validation.refuse_looked_up(0.55 - 4 * 2**0.5 * found.standard_error(), found)
    with pytest.raises(UserError, match="drawn anew"):
        validation.refuse_looked_up(0.55 - 6 * 2**0.5 * found.standard_error(), found)
    found.loss = float("nan")
    with pytest.raises(UserError, match="drawn anew"):
        validation.refuse_looked_up(0.55, found)


# ---------------------------------------------------------------------------------------------
# An evaluation
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(trained, tmp_path_factory):
    """What one process finds, in small batches."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(ev, "BATCH", 8)
        patch.setattr(metrics, "BATCH", 8)
        return ev.evaluate(copy_run(trained, folder), World(), 20)


def test_killed_evaluation_continues_to_the_same_numbers(alone, place, monkeypatch):
    """Nothing that is scored is sampled again."""
    honest = ev.Sampler.__call__
    sampled = []

    def killed(sampler, rows, first=0):
        if len(sampled) in (2, 5):
            sampled.append("killed")
            raise KeyboardInterrupt
        sampled.append(first)
        return honest(sampler, rows, first)

    monkeypatch.setattr(ev, "BATCH", 8)
    monkeypatch.setattr(metrics, "BATCH", 8)
    monkeypatch.setattr(ev.Sampler, "__call__", killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            ev.evaluate(place, World(), 20)
    found = ev.evaluate(place, World(), 20)
    assert sampled == [0, 8, "killed", 16, 0, "killed", 8, 16, 0]
    for key in ("metrics", "real", "checkpoints"):
        assert found[key] == alone[key]


def test_two_processes_give_the_same_numbers(alone, place, tmp_path):
    lines = (
        "import eval_speedrun as ev",
        "from data import metrics",
        "ev.BATCH = metrics.BATCH = 8",
    )
    Path("referee.py").write_text("\n".join([*lines, "raise SystemExit(ev.main())"]))
    done = python(tmp_path, "referee.py", place, "--images", 20, processes=2)
    assert done.stdout.count("| val loss |") == 1
    two = json.loads((place / "results.json").read_text())
    assert (two["processes"], alone["processes"]) == (2, 1) and len(two["real"]) == 4
    assert two["real"] == pytest.approx(alone["real"], rel=1e-6)
    for a, b in zip(alone["checkpoints"], two["checkpoints"], strict=True):
        assert b["metrics"] == pytest.approx(a["metrics"], rel=1e-6)
    assert two["val_loss"] == pytest.approx(alone["val_loss"], rel=1e-6)


def test_network_that_cannot_be_had_is_null_with_the_reason(trained, place, monkeypatch):
    results = json.loads((trained / "results.json").read_text())
    assert results["metrics"]["FID-20"] is None and results["metrics"]["KD-lite-20"] > 0
    assert results["why_null"]["FID-20"] == "not asked for: --metrics FID"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(place))
    monkeypatch.setattr(networks, "KEPT", place)
    run = ev.load_run(place, CPU)
    panel = ev.Panel(["lite", "judge"], run, read_captions("tiny"), 20, World())
    assert list(panel.networks) == ["lite"]
    assert "SPEEDRUN_WEIGHTS" in panel.why_null["prompt-accuracy-20"]


def test_a_run_stands_beside_the_tracks_last_record_and_the_real_images(
    trained, tmp_path, monkeypatch
):
    results = json.loads((trained / "results.json").read_text())
    results |= dict(samples=2000, real={"KD-lite-2k": 0.2})
    results["metrics"] = {"KD-lite-250": 7, "KD-lite-2k": 131.46, "FID-2k": None}
    monkeypatch.setattr(ev, "__file__", str(tmp_path / "eval_speedrun.py"))
    assert ev.beside_record(results) == "KD-lite-2k 131 (real images 0.2)"
    for name, text, value in (("1_Old", "Predecessor: x", 9), ("2_Base", "", 3), ("2_None", "", 0)):
        folder = tmp_path / "records/tiny" / f"202{name}"
        folder.mkdir(parents=True)
        if value:
            (folder / "README.md").write_text(f"# A\n\n{text}\n")
            (folder / "results.json").write_text(json.dumps({"metrics": {"KD-lite-2k": value}}))
    assert ev.beside_record(results) == "KD-lite-2k 131 (the record 9, real images 0.2)"
    assert "| KD-lite-2k |" in ev.markdown_row(results) and "250" not in ev.markdown_row(results)


def test_curve_is_of_one_protocol(trained, tmp_path):
    results = json.loads((trained / "results.json").read_text())
    other = results | {"run_id": "another"}
    ev.draw_curve([results, other], tmp_path / "curve.png")
    assert np.asarray(Image.open(tmp_path / "curve.png")).std() > 1
    for key in ("images", "lite", "contract", "noise_seed", "dinov2"):
        mixed = other | {"rules": other["rules"] | {key: 0}}
        with pytest.raises(UserError, match=f"another cannot share a curve: {key} is"):
            ev.draw_curve([results, mixed], tmp_path / "mixed.png")
    assert not (tmp_path / "mixed.png").exists()


# ---------------------------------------------------------------------------------------------
# Prompts and official tools, contract, error lines
# ---------------------------------------------------------------------------------------------

ENTRIES = [{"prompt": "a thing 1", "include": [{"count": 2}]}, {"prompt": "a thing 3", "tag": "x"}]
LINES = "\n".join(map(json.dumps, ENTRIES))
TOOLS = {
    "geneval": (LINES, [1] * 4 + [3] * 4),
    "geneval2": (LINES, [1, 3]),
    "hpsv3": ('[{"caption": "a thing 1", "image_file": null}, {"caption": "a thing 3"}]', [1, 3]),
}


@pytest.mark.parametrize("tool", TOOLS)
def test_export_is_what_the_official_tool_reads(tool, place, refused, capsys):
    """Read as geneval's evaluate_images.py, GenEval 2's evaluation.py, HPSv3's benchmark.py do."""
    out = place / tool
    text, rows = TOOLS[tool]
    Path("prompts").write_text(text)
    command = [str(place), "--export", tool, "--prompts", "prompts"]
    assert ev.main(command) == 0 and capsys.readouterr().out.split()[-1] == str(out)
    files = sorted(out.rglob("*.png"))
    if tool == "geneval":
        assert [
            json.loads((out / f"0000{i}/metadata.jsonl").read_text()) for i in (0, 1)
        ] == ENTRIES
        names = [f"{i:05}/samples/{j:05}.png" for i in (0, 1) for j in range(4)]
        assert files == [out / name for name in names]
    elif tool == "geneval2":
        paths = json.loads((out / "image_filepaths.json").read_text())
        assert paths == {"a thing 1": str(files[0]), "a thing 3": str(files[1])}
    else:
        texts = [path.with_suffix(".txt").read_text() for path in files]
        assert texts == ["a thing 1", "a thing 3"]
    for path, image in zip(files, sampler_of(place)(rows), strict=True):
        pixels = np.asarray(Image.open(path)).astype(int)
        assert np.abs(pixels - image.permute(1, 2, 0).numpy()).max() <= 1
    content = files[0].read_bytes()
    files[0].unlink()  # as a killed export leaves it
    assert ev.main(command) == 0 and files[0].read_bytes() == content
    shutil.rmtree(out)
    Path("prompts").write_text('{"text": 1}')
    refused(*command, words=("prompts is not a prompt file", f"give {tool}'s"))
    assert not out.exists()


def test_adms_npz_holds_the_samples_that_were_scored(trained, place, refused):
    """Read as ADM's evaluator does: the header, then rows. results.json has their hash."""
    command = [str(place), "--export", "adm"]
    refused(*command, "--prompts", "x", words=("adm has none",))
    assert ev.main([*command, "--images", "20"]) == 0
    with zipfile.ZipFile(place / "adm/samples.npz") as archive, archive.open("arr_0.npy") as file:
        assert np.lib.format.read_magic(file) == (1, 0)
        header = np.lib.format.read_array_header_1_0(file)
        assert header == ((20, 8, 8, 3), False, np.dtype("uint8"))
        images = np.frombuffer(file.read(), "uint8").reshape(header[0])
    assert (np.load(place / "adm/samples.npz")["arr_0"] == images).all()
    for i, image in enumerate(images):
        assert (np.asarray(Image.open(place / f"adm/{i:06d}.png")) == image).all()
    of_each = [hashlib.sha256(image.transpose(2, 0, 1).tobytes()).digest() for image in images]
    results = json.loads((trained / "results.json").read_text())
    assert results["samples_sha256"] == hashlib.sha256(b"".join(of_each)).hexdigest()


SCRIPT = """
class Track:
    name: str
    seed: int
TRACKS = [Track("a", 1), Track("b", 2)]
def validation_draws(track, count):
    return track.seed, count
"""


def test_contract_is_a_tracks_row_and_the_draws(place, monkeypatch):
    """Whatever else is edited. A run says whether its contract is the published one."""
    contract = read_contract(SCRIPT, "a")
    other_track = SCRIPT.replace("2", "3")
    rebound = SCRIPT + "TRACKS[0].seed = 9\nvalidation_draws = Track = None\nTrack(*TRACKS)\n"
    for source in (other_track, rebound):
        same = read_contract(source, "a")
        assert same.sha256 == contract.sha256 and same.track.seed == 1
    for old, new in (("1", "7"), ("track.seed", "7"), ("seed:", "key:")):
        assert read_contract(SCRIPT.replace(old, new), "a").sha256 != contract.sha256
    twice = SCRIPT.replace('"b"', '"a"')
    for source in (twice, SCRIPT.replace("_draws", ""), SCRIPT.replace(", 1", ""), "def"):
        with pytest.raises(UserError, match="start from train_speedrun.py"):
            read_contract(source, "a")
    verdict = ev.load_run(place, CPU).contract
    assert verdict.startswith("edited: ")
    monkeypatch.setitem(ev.CONTRACTS, "tiny", verdict.split()[1])
    assert ev.load_run(place, CPU).contract == "as published"


def shorten(name: str):
    tensors = load_file(name)
    save_file({key: x[:30] for key, x in tensors.items()}, name)


SNAPSHOT = "run/train_speedrun.py"
LAST = "run/step_000020.safetensors"
VAL = "data/tiny/val_000.safetensors"
DAMAGES = {
    "import": (lambda: add_code(Path("run"), "import not_there"), "not import", "not_there"),
    "names": (lambda: add_code(Path("run"), "del sample"), "not import", "sample"),
    "row": (lambda: add_code(Path("run"), 'lambda: Track("tiny", 1)'), "has 2 and 1"),
    "code": (lambda: Path(SNAPSHOT).write_text("# changed"), "other code", "train again"),
    "cut": (lambda: os.truncate(LAST, 999), LAST, "RESUME=run"),
    "checkpoints": (lambda: [os.remove(path) for path in Path("run").glob("*00*")], "RESUME=run"),
    "captions": (lambda: os.remove("data/tiny/text.safetensors"), "data/download.py tiny"),
    "shard": (lambda: os.truncate(VAL, 900), "data/download.py tiny"),
    "images": (lambda: shorten(VAL), "30 validation images (3, 8, 8), not 32"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_run_or_data_is_one_line(name, place, refused):
    damage, *words = DAMAGES[name]
    place.rename("run")
    damage()
    refused("run", "--images", "10", words=words)
    assert not Path("run/results.json").exists()


REQUESTS = {
    "--images|0": ("10 or more --images",),
    "--images|3": ("10 or more --images",),
    "--images|1000000000": ("at most 1,000,000",),
    "--images|0|--prompt|": ("10 or more --images",),
    "--prompt|": ("--prompt is empty",),
    "--prompt|a thing 1|--export|geneval|--prompts|x": ("--prompt and --export are different",),
    "--export|geneval": ("--prompts",),
    "--export|geneval|--prompts|empty": ("empty is not a prompt file",),
    "--export|geneval|--prompts|blank": ("blank is not a prompt file",),
    "--export|geneval|--prompts|number": ("number is not a prompt file",),
}


def test_unknown_requests_are_one_line(place, refused, capsys, monkeypatch):
    for name, text in {"empty": "", "blank": '[{"prompt": " "}]', "number": "[1]"}.items():
        Path(name).write_text(text)
    refused("nowhere", words=("logs/<run_id>",))
    refused(place, "--prompt", "a purple frog", words=("use a caption of the track's table",))
    assert ev.main([str(place), "--prompt", "a thing 2"]) == 0
    assert capsys.readouterr().out.split()[-1] == str(place / "prompt.png")
    assert np.asarray(Image.open(place / "prompt.png")).shape[1] == 8 * 100
    for arguments, words in REQUESTS.items():
        refused(place, *arguments.split("|"), words=words)
    for variable in ("WORLD_SIZE=abc", "WORLD_SIZE=0", "WORLD_SIZE=2", "WORLD_SIZE=²", "RANK=5"):
        with monkeypatch.context() as patch:
            patch.setenv(*variable.split("="))
            refused(place, words=("are not torchrun's",))
    assert not (place / "results.json").exists()
