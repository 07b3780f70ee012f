"""Guarantees of training: any number of processes, kills, failures, the compiler, the loader.

Code given to `racer` as `extra` patches the racer's script.
"""

import json
import multiprocessing
import os
import platform
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

import train_speedrun as ts
from data import testing
from data.common import import_snapshot, read_split, sha256_of
from data.testing import ALL, CONFIG, ROOT, TRACK, distance, last_run, racer, train_here

# A finished run keeps no state: this one has it in final/
KEEP_STATE = """
def log_summary(self, graphs, original=Run.log_summary):
    original(self, graphs)
    save_state(Path("final"), self.state, self.meta)
Run.log_summary = log_summary
"""
# kill -9 when half of the file named in KILL is written
KILLED_IN_A_WRITE = """
def write_atomic(path, write, original=write_atomic):
    def write_half(temporary):
        write(temporary)
        if os.environ.get("KILL") == path.name:
            os.truncate(temporary, temporary.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
    original(path, write_half)
"""
AT_STEP = """
def train_step(state, step, batch, original=train_step):
    if step == {step} and state.world.rank == {rank}:
        {code}
    return original(state, step, batch)
"""
NOISE_BY_RANK = AT_STEP.format(
    step="step", rank=1, code="batch = batch._replace(noise=torch.randn_like(batch.noise))"
)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """In this process as in those that it starts: more threads sum in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


def work(folder: Path, rank: int, environment: dict):
    """One process of a run, as torchrun starts it. Its output goes to a file."""
    os.chdir(folder)
    os.environ.update(environment, RANK=str(rank))
    output = os.open(f"output_{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    sys.argv = ["train_speedrun.py", "tiny"]
    sys.exit(import_snapshot(folder / "train_speedrun.py").main())


def train_on(size: int, folder: Path, **environment) -> tuple[list[int], list[str]]:
    """Exit code and output of each of `size` processes, forked where torch is imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch._dynamo"])
    environment |= dict(WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    workers = [context.Process(target=work, args=(folder, i, environment)) for i in range(size)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(testing.LIMIT)
        worker.kill()  # what hangs is still there
    outputs = [(folder / f"output_{rank}").read_text() for rank in range(size)]
    return [worker.exitcode for worker in workers], outputs


def world_of(rank: int, size: int) -> ts.World:
    """A world that knows its part of a batch, without the others."""
    world = ts.World()
    world.rank = rank
    world.size = size
    return world


@pytest.fixture
def refused(monkeypatch, capsys):
    """Calls the script's main: one line on standard error with these words, exit code 2."""

    def check(main, *words, track="tiny", **environment):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["train_speedrun.py", track])
            for name, value in environment.items():
                patch.setenv(name, value)
            with testing.own_signals():
                assert main() == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and all(word in error for word in words), error

    return check


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict:
    """The final state of one process with every switch on. Its banks of 3 blocks 4 must pad."""
    folder = racer(tmp_path_factory.mktemp("alone"), ALL, KEEP_STATE, captions=3)
    with pytest.MonkeyPatch.context() as monkeypatch:
        train_here(folder, monkeypatch)
    state = torch.load(folder / "final/state.pt")
    assert min(state["model"][name].abs().sum() for name in ("fuse", "mask_token")) > 0
    return state


def on_two_nodes(folder: Path):
    """torchrun with one process on each of two nodes, which meet on the loopback."""
    launch = f"-m torch.distributed.run --nnodes=2 --master_port={free_port()}".split()
    commands = [[*launch, f"--node_rank={i}", "train_speedrun.py", "tiny"] for i in range(2)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda command: testing.python(folder, *command), commands))


@pytest.mark.parametrize("how", ["4 processes", "2 nodes", "4 micro-batches", "noise by rank"])
def test_any_number_of_processes_trains_the_same_model(how, alone, tmp_path, monkeypatch):
    """Weights, EMA, momenta, moments and validation loss agree to 1e-5 after 20 fp32 steps."""
    config = replace(ALL, micro_batch=4 if how == "4 micro-batches" else 0)
    extra = KEEP_STATE + (NOISE_BY_RANK if how == "noise by rank" else "")
    folder = racer(tmp_path, config, extra, captions=3)
    if how == "2 nodes":
        on_two_nodes(folder)
    elif how == "4 micro-batches":
        train_here(folder, monkeypatch)
    else:
        codes, outputs = train_on(4 if how == "4 processes" else 2, folder)
        assert set(codes) == {0}, outputs
    state = torch.load(folder / "final/state.pt")
    if how == "noise by rank":  # the control: a difference would be seen
        assert distance(state, alone) > 1e-2
    else:
        assert distance(state, alone) < 1e-5
        assert state["meta"]["val_loss"] == pytest.approx(alone["meta"]["val_loss"], rel=1e-5)


def test_a_run_killed_four_times_ends_as_if_it_never_was(alone, tmp_path, monkeypatch):
    """kill -9 in a step and in half of three writes: the same final state to the bit."""
    in_a_step = AT_STEP.format(
        step=7, rank=0, code='os.environ.get("KILL") == "step" and os.kill(os.getpid(), 9)'
    )
    folder = racer(tmp_path, ALL, KEEP_STATE + KILLED_IN_A_WRITE + in_a_step, captions=3)
    resume = {}
    for moment in ("step", "step_000010.safetensors", "state.pt", "step_000020.safetensors"):
        assert train_on(1, folder, KILL=moment, **resume)[0] == [-9], moment
        run = last_run(folder)
        assert (run / f"{moment}.tmp").exists() == (moment != "step")
        resume = dict(RESUME=str(run))
    train_here(folder, monkeypatch, **resume)
    state = torch.load(folder / "final/state.pt")
    assert distance(state, alone) == 0 and not list(run.glob("*.tmp"))
    log = (run / "log.txt").read_text()
    starts = re.findall(r"^resumed from step (\d+) at ([\d.]+)s", log, re.M)
    assert [step for step, _ in starts] == ["5", "5", "5", "15"] and "\nresumed: 1\n" in log
    assert state["meta"]["seconds"] > float(starts[3][1]) > float(starts[0][1]) > 0


NOT_FINITE = "step 16: the loss of step 13 is not finite"
TERMINATED = r"rank 0, step 13: ended by SIGTERM .*RESUME=logs/\d{8}-\d{6}_tiny_seed0$"
DIED = r"step 1\d: .*another process died"
FULL = r"step 16: cannot write .*state.pt.*free some disk"


@pytest.mark.parametrize(
    "rank, code, codes, lines",
    [
        (1, 'batch.x.fill_(float("nan"))', [2, 2], [NOT_FINITE, NOT_FINITE]),
        (1, "os.kill(os.getpid(), signal.SIGKILL)", [1, -9], [DIED, ""]),
        (1, "os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)", [1, 2], [DIED, ""]),
        (0, "os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)", [2, 1], [TERMINATED, DIED]),
        (0, "resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, 9_000))", [2, 1], [FULL, DIED]),
    ],
    ids=["not finite", "killed", "terminated", "the first terminated", "full disk"],
)
def test_a_run_that_fails_on_one_process_says_so_on_each(rank, code, codes, lines, tmp_path):
    """None of them hangs, and what was saved is whole."""
    extra = AT_STEP.format(step=12, rank=rank, code=code)
    found, outputs = train_on(2, racer(tmp_path, extra=extra))
    assert found == codes, outputs
    for output, line in zip(outputs, lines):
        said = [text for text in output.splitlines() if text.startswith("train_speedrun.py: ")]
        assert len(said) == (line != "") and re.search(line, "".join(said)), output
        assert "Traceback" not in output
    run = last_run(tmp_path)
    assert torch.load(run / "state.pt")["meta"]["step"] in (10, 15)
    assert len(load_file(run / "step_000010.safetensors")) > 0 and not list(run.glob("*.tmp"))


@pytest.mark.parametrize(
    "size, extra, line",
    [
        (3, "", "world size 3 does not divide batch_size 16"),
        (1, "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000,) * 2)", "state.pt.*free some"),
    ],
    ids=["world size", "full disk"],
)
def test_a_run_that_cannot_start_leaves_nothing_half_written(size, extra, line, tmp_path):
    codes, outputs = train_on(size, racer(tmp_path, extra=extra))
    assert codes == [2] * size
    assert all(len(re.findall(line, output)) == 1 for output in outputs), outputs
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob("state.pt"))
    assert (tmp_path / "logs").exists() == (size == 1)


def test_only_a_whole_state_of_the_same_script_is_resumed(tmp_path, monkeypatch, refused):
    racer(tmp_path, extra=AT_STEP.format(step=12, rank=0, code='batch.x.fill_(float("nan"))'))
    monkeypatch.chdir(tmp_path)
    main = import_snapshot(tmp_path / "train_speedrun.py").main
    refused(main, "step 16: the loss of step 13 is not finite")
    run = last_run(Path())
    saved = torch.load(run / "state.pt")
    log = (run / "log.txt").read_bytes()
    with open("train_speedrun.py", "a") as file:
        file.write("# another idea\n")
    refused(main, f"another train_speedrun.py: cp {run}/train_speedrun.py .", RESUME=str(run))
    shutil.copy(run / "train_speedrun.py", ".")
    os.truncate(run / "state.pt", 5000)
    refused(main, f"{run}/state.pt is damaged", RESUME=str(run))
    for content in ({}, dict(meta=[]), dict(meta=dict(step=5)), dict(saved, ema={})):
        torch.save(content, run / "state.pt")
        refused(main, f"{run}/state.pt is", "start", RESUME=str(run))
    saved["meta"]["config"] = "mnist"
    torch.save(saved, run / "state.pt")
    refused(main, f"cp {run}/train_speedrun.py .", RESUME=str(run))
    with ts.open_log(run):
        refused(main, f"{run} is being written by another process", RESUME=str(run))
    (run / "state.pt").unlink()
    refused(main, f"{run} has no state to resume from: it is finished", RESUME=str(run))
    refused(main, "nowhere is no run's folder", RESUME="nowhere")
    assert (run / "log.txt").read_bytes() == log


def test_whoever_can_resume_has_the_snapshot_and_the_source(tiny, monkeypatch, refused):
    def fails(folder, *_):
        raise ts.UserError("no state was written")

    monkeypatch.setattr(ts, "save_state", fails)
    refused(ts.main, "no state was written")
    source = Path(ts.__file__).read_text()
    assert (last_run(tiny) / "train_speedrun.py").read_text() == source
    assert (last_run(tiny) / "log.txt").read_text().startswith(source)


def test_runs_of_one_second_have_folders_of_their_own(tiny):
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: ts.make_folder(Path("logs/run"), "source\n"), range(8)))
    assert sorted(map(str, folders)) == ["logs/run", *(f"logs/run_{k}" for k in range(2, 9))]


# At step 3 a process says its number, then waits as in a collective that nobody else joins
BLOCKED = """
def train_step(state, step, batch, original=train_step):
    if step == 3:
        Path(f"process_{state.world.rank}").write_text(str(os.getpid()))
        mutex = ctypes.create_string_buffer(64)
        for _ in range(2):
            ctypes.CDLL(None).pthread_mutex_lock(mutex)
    return original(state, step, batch)
"""


@pytest.mark.parametrize("processes", [0, 2], ids=["Ctrl-C", "torchrun is killed"])
def test_a_process_that_is_blocked_ends(processes, tmp_path):
    """By Ctrl-C with one line, or with its launcher."""
    folder = racer(tmp_path, extra=BLOCKED)
    order = testing.command("train_speedrun.py", "tiny", processes=processes)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(order, cwd=folder, env=testing.ENV, **pipes) as process:
        said = [folder / f"process_{rank}" for rank in range(max(processes, 1))]
        wait_for(lambda: all(path.exists() and path.read_text() for path in said))
        process.send_signal(signal.SIGKILL if processes else signal.SIGINT)
        wait_for(lambda: all(has_ended(path.read_text()) for path in said))
        error = process.communicate()[1]
    if not processes:
        cause = "train_speedrun.py: rank 0, step 4: ended by SIGINT (or another process died)"
        assert error == f"{cause}; continue with RESUME=logs/{last_run(folder).name}\n"
        assert process.returncode == 2


def wait_for(condition):
    for _ in range(10 * testing.LIMIT):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("it never came")


def has_ended(number: str) -> bool:
    """Nothing is left of the process but, at most, its exit code."""
    path = Path("/proc", number, "stat")
    return not path.exists() or path.read_text().rpartition(")")[2].split()[0] == "Z"


def some_rows() -> dict:
    """16 images, as a step has them."""
    shapes = dict(latents=TRACK.shape, labels=(), features=None)
    return ts.Loader(ts.Shards(TRACK, "train", shapes), CONFIG, 0, world_of(0, 1))(0)


@pytest.mark.parametrize("step", [0, 14, "generated code"])
def test_the_compiled_step_is_one_graph_with_eagers_loss_and_gradients(step, tiny):
    """Routed and in the dense tail with every switch on; the smallest model as generated code."""
    is_generated = step == "generated code"
    cfg = replace(CONFIG, depth=1, width=16) if is_generated else ALL
    model = ts.Transformer(cfg, TRACK, testing.COMPONENTS)
    torch.manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    captions = ts.load_captions(TRACK, "cpu")
    batch = ts.make_batch(model, captions, some_rows(), 0, 14 if step else 0, world_of(0, 1))
    assert (batch.keep is None) == (step != 0)
    backend = "inductor" if is_generated else "aot_eager"
    compiled = torch.compile(ts.loss_terms, dynamic=False, fullgraph=True, backend=backend)
    losses = []
    gradients = []
    for loss_terms in (compiled, ts.loss_terms):
        losses.append(loss_terms(model, batch))
        sum(term.sum() for term in losses[-1].values()).backward()
        gradients.append([p.grad for p in model.parameters()])
        model.zero_grad(set_to_none=True)
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


def test_training_times_are_a_grid_of_their_quantiles(tiny):
    """Logit-normal, then shifted."""
    model = ts.Transformer(ALL, TRACK, testing.COMPONENTS)
    captions = ts.load_captions(TRACK, "cpu")
    batch = ts.make_batch(model, captions, some_rows(), 0, 0, world_of(0, 1))
    logits = ts.shift_time(batch.t, 1 / ALL.t_shift).logit()
    quantiles = torch.special.ndtr(logits / ALL.t_spread).sort().values
    steps = torch.full((ALL.batch_size - 1,), 1 / ALL.batch_size)
    torch.testing.assert_close(quantiles.diff(), steps, rtol=1e-3, atol=1e-4)


def test_nothing_compiles_on_the_clock_and_warm_up_leaves_no_trace(tmp_path, monkeypatch):
    """With every switch on and over the end of the routing: without it, the same bits."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    graphs = []
    states = []
    for extra in ("", "warm_up = lambda *_: None\n"):
        config = replace(ALL, compile=True, steps=8)
        folder = racer(tmp_path / f"run_{len(states)}", config, KEEP_STATE + extra)
        log = (train_here(folder, monkeypatch) / "log.txt").read_text()
        graphs.append(int(re.search(r"graphs_compiled_on_the_clock: (\d+)", log)[1]))
        states.append(torch.load(folder / "final/state.pt"))
    assert distance(*states) == 0
    assert graphs[0] == 0 and graphs[1] >= 8  # losses of two kinds, validation, Muon's 5 shapes


def test_a_step_never_waits_for_the_device(tiny):
    """No value of a tensor is asked for between two log lines: no .item(), nonzero, bool mask."""
    aten = torch.ops.aten
    waits = (aten._local_scalar_dense, aten.nonzero, aten.equal, aten.masked_select)
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in waits:
                seen.append(func)
            return func(*args, **(kwargs or {}))

    state = ts.State(ALL, 0, world_of(0, 1), testing.COMPONENTS)
    captions = ts.load_captions(TRACK, "cpu")
    rows = some_rows()
    with Watch():
        for step in (0, 1, 14):
            batch = ts.make_batch(state.model, captions, rows, 0, step, state.world)
            losses = ts.train_step(state, step, batch)
        assert seen == []
        losses["flow"].item()  # the control
    assert len(seen) == 1


def test_attention_written_out_is_the_fused_kernel():
    q, k, v = torch.randn(3, 6, 18, 2, 16)
    rope = ts.rope_table(3, 6, 16, 0)
    found = ts.attend(q, k, v, rope)
    q = ts.rotate(ts.rms_norm(q), *rope)
    k = ts.rotate(ts.rms_norm(k), *rope)
    fused = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    torch.testing.assert_close(found, fused.transpose(1, 2), rtol=1e-4, atol=1e-5)


def test_adamw_is_that_of_torch():
    weights = torch.nn.Parameter(torch.randn(50))
    rows = dict(weights=weights.data.clone(), mean=torch.zeros(50), square=torch.zeros(50))
    adamw = torch.optim.AdamW([weights], CONFIG.adamw_lr, CONFIG.adamw_betas, weight_decay=0)
    for count in (1.0, 2.0, 3.0):
        weights.grad = torch.randn(50)
        adamw.step()
        ts.adamw(rows, weights.grad, dict(lr=1.0, count=torch.tensor(count)), CONFIG)
    torch.testing.assert_close(rows["weights"], weights.data)


def test_each_image_comes_once_an_epoch_whoever_loads_it(tiny):
    """In an order of its own each epoch, the same for any number of processes and any start."""
    shards = ts.Shards(TRACK, "train", dict(latents=TRACK.shape, labels=()))
    latents, labels = read_split("tiny", "train")
    loader = ts.Loader(shards, CONFIG, 0, world_of(0, 1))
    batches = [loader(step) for step in range(12)]
    order = []
    for image in torch.cat([rows["latents"] for rows in batches]):
        order.append((latents == image).flatten(1).all(1).nonzero().item())
    assert sorted(order[:96]) == sorted(order[96:]) == list(range(96))
    assert order[:96] != order[96:] and order[:96] != list(range(96))
    assert torch.equal(labels[order], torch.cat([rows["labels"] for rows in batches]).long())
    halves = [ts.Loader(shards, CONFIG, 0, world_of(rank, 2))(7)["latents"] for rank in range(2)]
    assert len(halves[0]) == 8 and torch.equal(torch.cat(halves), batches[7]["latents"])


def sparse_shards(count: int) -> ts.Shards:
    """Shards of 16 KiB an image that take no disk: a header and a hole."""
    track = ts.Track("sparse", (32, 16, 16), "float16", 0.0, 1.0, count, 16, 16, 100)
    size = 16384 * count
    latents = dict(dtype="F16", shape=[count, *track.shape], data_offsets=[0, size])
    labels = dict(dtype="I16", shape=[count], data_offsets=[size, size + 2 * count])
    header = json.dumps(dict(__metadata__=dict(track="sparse"), latents=latents, labels=labels))
    path = Path("data/sparse/train_000.safetensors")
    path.parent.mkdir(parents=True)
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode())
    os.truncate(path, 8 + len(header) + size + 2 * count)
    manifest = dict(files={path.name: dict(count=count, sha256="")})
    path.with_name("manifest.json").write_text(json.dumps(manifest))
    return ts.Shards(track, "train", dict(latents=track.shape, labels=()))


def test_loading_takes_neither_memory_nor_threads(tmp_path, monkeypatch):
    """51,200 latents of 1.6 GB: no copy stays, and no parallel operation starts OpenMP threads."""

    def megabytes() -> float:
        return int(re.search(r"RssAnon:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1024

    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(2)
    torch.randn(2, 100_000).exp()  # now the step's threads are there
    before = megabytes()
    threads = set(os.listdir("/proc/self/task"))
    loader = ts.Loader(sparse_shards(100_000), ts.CONFIGS["cifar10"], 0, world_of(0, 1))
    for step in (*range(199), 390):  # the last is of two epochs
        loader(step)
    started = set(os.listdir("/proc/self/task")) - threads
    torch.set_num_threads(1)
    assert len(started) == 1 and megabytes() - before < 100


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_used_again():
    """A buffer of 64 MiB comes without page faults, once the heap has a place for it."""
    ts.World()
    faults = []
    for _ in range(20):
        torch.ones(2**24)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    assert faults[-1] - faults[-11] < 1000  # otherwise 16,384 each of 10 times


DATA = Path("data/tiny")
SHARD = DATA / "train_001.safetensors"
MANIFEST = DATA / "manifest.json"


def rewrite(track: str = "tiny", path: Path = SHARD, **changes):
    """A shard with other content, or without what is None, as a whole file with its hash."""
    tensors = load_file(path) | changes
    save_file({name: x for name, x in tensors.items() if x is not None}, path, dict(track=track))
    manifest = json.loads(MANIFEST.read_text())
    manifest["files"][path.name]["sha256"] = sha256_of(path)
    MANIFEST.write_text(json.dumps(manifest))


def flip_one_bit():
    content = bytearray(SHARD.read_bytes())
    content[-1] ^= 1
    SHARD.write_bytes(content)


def set_last_label(label: int):
    labels = load_file(SHARD)["labels"]
    labels[-1] = label
    rewrite(labels=labels)


def rename_in_manifest(old: str, new: str):
    MANIFEST.write_text(MANIFEST.read_text().replace(old, new))


def label_captions(labels: list[int]):
    about = dict(captions=json.dumps(["a thing"] * len(labels)), labels=json.dumps(labels))
    save_file(dict(pooled=torch.zeros(len(labels), 16)), DATA / "text.safetensors", about)


DAMAGE = {
    "truncated": lambda: os.truncate(SHARD, 900),
    "missing": lambda: (DATA / "val_000.safetensors").unlink(),
    "garbage": lambda: SHARD.write_text("garbage " * 5000),
    "another track": lambda: rewrite("mnist"),
    "another shape": lambda: rewrite(latents=torch.zeros(32, 1, 8, 8).byte()),
    "another dtype": lambda: rewrite(latents=torch.zeros(32, 3, 8, 8)),
    "another count": lambda: rewrite(**{name: x[:31] for name, x in load_file(SHARD).items()}),
    "no manifest": MANIFEST.unlink,
    "broken manifest": lambda: MANIFEST.write_text("{"),
    "other manifest": lambda: MANIFEST.write_text('{"files": ["train_000"]}'),
    "too few images": lambda: rename_in_manifest("train_001", "other_001"),
    "no validation images": lambda: rename_in_manifest("val_000", "other_000"),
    "no captions": lambda: (DATA / "text.safetensors").unlink(),
    "uneven captions": lambda: label_captions([0, 0, 0, 1, 2, 2, 3, 3]),
    "label without captions": lambda: label_captions([0, 1, 3]),
    "a flipped bit": flip_one_bit,
    "a negative label": lambda: set_last_label(-1),
    "a label beyond the captions": lambda: set_last_label(4),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_data_is_one_line_and_no_run(damage, tiny, monkeypatch, refused):
    DAMAGE[damage]()
    monkeypatch.setitem(ts.CONFIGS, "tiny", ALL)
    refused(ts.main, "data/tiny", "run: python data/download.py tiny")
    assert not Path("logs").exists()


def test_features_are_wanted_where_a_config_learns_from_them(tiny, monkeypatch, refused):
    rewrite(features=None)
    ts.open_data(CONFIG, TRACK, world_of(0, 1))  # no error
    monkeypatch.setitem(ts.CONFIGS, "tiny", ALL)
    refused(ts.main, "features", "run: python data/download.py tiny --images DIR --features")


def test_other_data_than_the_tracks_is_refused(tiny, monkeypatch, refused):
    monkeypatch.setitem(ts.MANIFESTS, "tiny", "0" * 64)
    refused(ts.main, "data/tiny/manifest.json is not that of tiny", "run: python data/download.py")
    monkeypatch.delitem(ts.MANIFESTS, "tiny")
    monkeypatch.setitem(ts.TRACKS, "tiny", replace(TRACK, dtype="float32"))
    for path in DATA.glob("*_00?.safetensors"):  # the validation shard is the last one
        latents = load_file(path)["latents"].float()
        latents[-1, 0, 0, 0] = float("nan" if path.name.startswith("val") else 0)
        rewrite(path=path, latents=latents)
    refused(ts.main, "val_000.safetensors has latents that are not finite")


@pytest.mark.parametrize(
    "environment, words",
    [
        (dict(SEED="x"), "SEED='x' is not a whole number"),
        (dict(SEED="²"), "SEED='²' is not a whole number"),
        (dict(SEED="1" * 30), "is not a whole number of at most nine digits"),
        (dict(WORLD_SIZE="abc"), "WORLD_SIZE='abc' is not a whole number"),
        (dict(WORLD_SIZE="0"), "RANK=0 and WORLD_SIZE=0 are not torchrun's"),
        (dict(WORLD_SIZE="2"), "RANK=0 and WORLD_SIZE=2 are not torchrun's"),
        (dict(RANK="5"), "RANK=5 and WORLD_SIZE=1 are not torchrun's"),
        (dict(LOCAL_RANK="-1"), "LOCAL_RANK='-1' is not a whole number"),
    ],
)
def test_an_environment_that_is_no_launchers_is_one_line(environment, words, tiny, refused):
    refused(ts.main, words, **environment)
    assert not Path("logs").exists()


def test_commands_refuse_what_they_do_not_know(tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    refused(ts.main, "mnist", "cifar10, cifar10-cpu, imagenet256", track="mnist")
    refused(ts.main, "manifest.json", "data/download.py cifar10", track="cifar10")
    for name in ("run.sh", "requirements.txt", "train_speedrun.py"):
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.setenv("PYTHON", sys.executable)
    for arguments, word in (
        (["mnist"], "'mnist': choose one of cifar10 cifar10-cpu imagenet256"),
        (["cifar10", "cifar10-cpu"], "unknown config"),
        (["test", "smoking"], "test [smoke]"),
        (["imagenet512"], "IMAGES; or set reg = 0, repa_layers = ()"),
        (["folder"], "name their folder in IMAGES"),
    ):
        done = subprocess.run(["./run.sh", *arguments], capture_output=True, text=True)
        testing.refuses(done, word)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = subprocess.run([ROOT / "records/timing/gpu.sh"], capture_output=True, text=True)
    testing.refuses(done, "gpu.sh: ", "sees no GPU")


MACHINES = {  # config and its GPUS on a machine of so many: processes
    ("imagenet256", "", 3): 2,
    ("cifar10", "", 8): 1,
    ("cifar10", "4", 8): 4,
    ("cifar10", "", 0): 1,
}


@pytest.mark.parametrize("config, asked, gpus", MACHINES)
def test_as_many_gpus_run_as_race_and_batch_allow(config, asked, gpus, tmp_path):
    """Where torch says that there are so many; a number that cannot share the batch is refused."""
    for name in ("run.sh", "requirements.txt", "train_speedrun.py"):
        shutil.copy(ROOT / name, tmp_path)
    code = f"import torch\ntorch.cuda.device_count = lambda: {gpus}\n"
    (tmp_path / "sitecustomize.py").write_text(code)
    environment = testing.ENV | dict(PYTHON=sys.executable, PYTHONPATH=str(tmp_path), GPUS=asked)
    run = partial(subprocess.run, ["./run.sh", config], cwd=tmp_path, capture_output=True)
    done = run(env=environment, text=True)
    assert f"{config}, processes: {MACHINES[config, asked, gpus]}\n" in done.stdout
    if asked:
        done = run(env=environment | dict(GPUS="3"), text=True)
        testing.refuses(done, "run.sh: GPUS=3 does not fit", "[1, 2, 4, 8]")
