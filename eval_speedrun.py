"""ImageGen Speedrun: the referee. Has a run's own snapshot sample, scores, draws.

    python eval_speedrun.py logs/<run_id>       results.json, samples.png, curve.png in that folder
      --images 10000                            samples to score: their count is in a metric's name
      --metrics FID KD-lite                     these, and the others of the same networks
      --last                                    only the last checkpoint: no curve
      --prompt "a frog"                         only samples of one caption: prompt.png
      --export geneval --prompts FILE           only images for an official tool: see export
      --export adm                              the scored samples, as ADM's .npz and as PNG
    torchrun --nproc_per_node=8 eval_speedrun.py logs/<run_id>      the same numbers on 8 GPUs
    python eval_speedrun.py --self-check        the metrics against published values

What a run may decide is in its snapshot: `load_checkpoint`, `velocity`, `sample`. It runs in a
process of its own, without the data in reach, and gives tensors. Everything else a number depends
on is made here: captions (balanced over the labels), noise (seeded by the image's index), the
validation draws (the contract's, and others that nobody knows before), the limits of evaluations
and time, the metrics. Not to be edited for a record.
"""

import argparse
import json
import os
import random
import re
import shutil
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import safe_open
from torch import Tensor

from data.common import (
    DAMAGED,
    Captions,
    UserError,
    World,
    key_of,
    machine,
    now,
    progress,
    read_captions,
    read_contract,
    sha256,
    sha256_of,
    write_atomic,
)
from data.encoders import load_autoencoder
from data.metrics import BATCH, digests, features_of, named
from data.networks import NETWORKS, clip_text
from data.pictures import draw_curve, draw_grid, to_picture, write_npz
from data.reference import reference
from data.sandbox import Child
from data.selfcheck import self_check
from data.validation import DRAWS_SEED, refuse_looked_up, validate

# ---------------------------------------------------------------------------------------------
# Protocol
# ---------------------------------------------------------------------------------------------

# Hash of each track's published contract. A new track adds its own and changes no other.
CONTRACTS = {
    "cifar10": "b7b197f12c93f2d01686bdeffe15d3ba1fccf1578db969dfcc7e4eb9085122f3",
    "cifar10-external": "cdbbbb16550ffd8c8990fcde52c33383629dc3e340a838f4ce97356ae574825e",
    "imagenet256": "f4d059bb8b2a03edbd3c8e89c07d7c75a845d7f4c7481e0d0d0b29a63812ccfc",
    "imagenet512": "4b11e37d1f42eb9d9c87288f42996bfba4609b0c4bd78c249755787eb43c40a1",
    "folder": "62e309148f515707e52e100ba49efd3d28440a121e0867536153b5c87bcbd7c3",
}
NOISE_SEED = 50_000_000  # image i starts from the noise of seed NOISE_SEED + i
AUDITS = 1  # batches of the last checkpoint that are drawn once more, all FLOPs counted
ROUNDS = 10  # evaluations that are timed
SLOWER = 1.5  # times that a sample may take, of max_nfe evaluations
TABLES = 2**16  # bytes in a checkpoint beside two sets of weights
MOST_IMAGES = 1_000_000
GRID_ROWS = 10  # images of each caption in samples.png: as many as a batch has
CURVE_IMAGES = {"uint8": 250, "float16": 1000}  # scored of every checkpoint
IMAGES = {"uint8": 2000, "float16": 50_000}  # scored of the last one, unless --images says
CURVE = {"uint8": ["lite"], "float16": ["dinov2", "judge"]}  # networks of every checkpoint
FINAL = dict.fromkeys(("cifar10", "cifar10-external"), ["inception"])  # of the last, on a GPU
FINAL |= dict.fromkeys(("imagenet256", "imagenet512"), ["inception", "hps"])

REFEREE = (  # whatever decides a number: results.json carries the hash of them all
    "eval_speedrun.py",
    "data/common.py",
    "data/metrics.py",
    "data/encoders.py",
    "data/networks.py",
    "data/reference.py",
    "data/validation.py",
    "data/sandbox.py",
    "data/confine.py",
    "data/guest.py",
)

# ---------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A folder that train_speedrun.py wrote, and the process that runs its snapshot."""

    folder: Path
    child: Child
    code_sha256: str  # of the snapshot
    checkpoints: list[tuple[Path, dict]]  # (path, metadata), by step
    track: SimpleNamespace  # from the contract's text, not from the rest of the snapshot
    contract: str  # "as published" or "edited: <sha256>"


def load_run(folder: Path, device: torch.device) -> Run:
    """Starts logs/<run_id>/train_speedrun.py and lists the checkpoints. Raises UserError."""
    path = folder / "train_speedrun.py"
    try:
        content = path.read_bytes()
    except OSError:
        raise UserError(f"{path} is missing: give the folder of a run, logs/<run_id>")
    code_sha256 = sha256(content)
    checkpoints = list_checkpoints(folder, code_sha256)
    try:
        child = Child(content, device, folders_to_hide(folder))
    except UserError as error:
        raise UserError(f"{path} does not import: {error}; mend it, train again")
    try:
        last_path, last = checkpoints[-1]
        name = child.tracks.get(last["config"], "")
        if not re.fullmatch(r"[\w-]+", name):
            raise UserError(f"{last_path} is of no config of {path}: train again")
        contract = read_contract(content.decode(errors="replace"), name)
        refuse_strange_row(contract.track, path)
        published = contract.sha256 == CONTRACTS.get(name)
        verdict = "as published" if published else f"edited: {contract.sha256}"
    except UserError:
        child.close()
        raise
    return Run(folder, child, code_sha256, checkpoints, contract.track, verdict)


def folders_to_hide(folder: Path) -> list[Path]:
    """The run's folder, all data and weights: a snapshot has no business there."""
    project = Path(__file__).resolve().parent
    named_outside = [os.environ.get(name) for name in ("SPEEDRUN_DATA", "SPEEDRUN_WEIGHTS")]
    outside = [Path(name) for name in named_outside if name]
    return [folder, *outside, *Path("data").glob("*/"), *project.glob("data/*/")]


def refuse_strange_row(track: SimpleNamespace, path: Path):
    """Raises UserError where an edited row of TRACKS has not the fields of a track."""
    kinds = {"shift": (int, float), "scale": (int, float), "dtype": str, "shape": tuple}
    kinds |= {"val_images": int, "max_nfe": int, "text_width": int}
    is_strange = any(not isinstance(getattr(track, key, None), kinds[key]) for key in kinds)
    if is_strange or track.val_images < 2 or track.max_nfe < 1 or track.dtype not in CURVE:
        raise UserError(f"{path} has a strange row of the track: start from train_speedrun.py")


def list_checkpoints(folder: Path, code_sha256: str) -> list[tuple[Path, dict]]:
    """(path, metadata) by step, at least one. Raises UserError."""
    checkpoints = []
    for path in sorted(folder.glob("step_*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                meta = file.metadata()
            if meta["code_sha256"] != code_sha256:
                script = folder / "train_speedrun.py"
                raise UserError(f"{path} was written by other code than {script}: train again")
            float(meta["val_loss"])
        except DAMAGED as error:
            mend = f"delete it, or resume the run with RESUME={folder}"
            raise UserError(f"{path} is not a checkpoint ({error}): {mend}")
        checkpoints.append((path, meta))
    if not checkpoints:
        raise UserError(f"{folder} has no checkpoints yet: continue it with RESUME={folder}")
    return checkpoints


class Model:
    """A checkpoint as the run's process has loaded it. What it answers raises UserError."""

    def __init__(self, run: Run, path: Path, count: int = 0):
        """count: of the images that it is to draw."""
        self.compiled = count >= 500  # compiling pays for many alone
        try:
            self.count_stored(path, set(run.child.load(path)))
        except (UserError, *DAMAGED) as error:
            raise UserError(f"{path} does not load: {error}; resume or train again")
        self.child = run.child
        self.flops = []  # of one evaluation, as counted in each batch

    def count_stored(self, path: Path, names: set[str]):
        """Counts what the file holds, parameters and all else. Raises UserError where it is much.

        A second set of weights may lie beside the trained one, as for guidance; images may not.
        """
        self.parameters = 0
        self.buffers = 0
        self.stored_bytes = path.stat().st_size
        trained_bytes = 0
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                if name in names and tensor.is_floating_point():
                    self.parameters += tensor.numel()
                    trained_bytes += tensor.nbytes
                else:
                    self.buffers += tensor.numel()
        if self.stored_bytes > 2 * trained_bytes + TABLES:
            found = f"{self.stored_bytes:,} bytes, its model's parameters {trained_bytes:,}"
            raise UserError(f"it has {found}: more than two sets of weights")

    def velocity(self, x: Tensor, t: Tensor, text: Tensor, rounds: int = 1, compiled=False):
        """The velocity (B, C, H, W). rounds: how often it is computed, for a timing.

        compiled: as compiled code, where this model's samples are drawn so. Otherwise its FLOPs
        are counted.
        """
        compiled = compiled and self.compiled
        request = {"rounds": rounds, "compiled": compiled}
        tensors = {"x": x.contiguous(), "t": t.contiguous(), "text": text.contiguous()}
        out, found = self.child.tensor("velocity", request, tensors, x.shape)
        if rounds == 1 and not compiled:
            self.flops.append(found["flops"] / len(x))
            if not self.flops[-1]:
                raise UserError("velocity has no FLOPs that are counted: it runs no network")
        return out


# ---------------------------------------------------------------------------------------------
# Sampling, on a budget
# ---------------------------------------------------------------------------------------------


class Sampler:
    """A checkpoint's images by index, on the contract's budget of network evaluations.

    Counted are rows that enter the model's forward and, in FLOPs of one evaluation, whatever else
    `sample` computes: through a copy, a re-wrapped model or parts of it, compiled or not. Where the
    forward runs as plain PyTorch, or in an audit, its FLOPs are counted too. All that is the
    guest's own word; `refuse_slow` holds the time of a sample against it, read from outside.
    """

    def __init__(self, run: Run, model: Model, captions: Captions, device: torch.device):
        self.run = run
        self.model = model
        self.captions = captions
        self.device = device
        self.compiled = model.compiled
        if run.track.dtype != "uint8":
            self.autoencoder = load_autoencoder(device)
        self.nfe = 0.0  # the most evaluations that any image took
        self.nfe_by_flops = 0.0  # the same, by all FLOPs
        self.spent = {}  # of each number of images: its calls' (processor seconds, seconds)
        if not model.flops:
            noise = torch.randn(2, BATCH, *run.track.shape)
            text = captions.pooled[[0] * BATCH]
            model.velocity(noise[0], noise[1].flatten(1)[:, 0].sigmoid(), text)

    def refuse_outside_budget(self, nfe: float):
        """Raises UserError. A hundredth more is the table look-ups and projections around it."""
        limit = self.run.track.max_nfe
        if not 0.99 <= nfe <= limit * 1.01:
            found = f"{nfe:.1f} network evaluations' worth per image"
            raise UserError(f"sample computes {found}; the contract allows {limit}, and 1 at least")

    def __call__(self, rows: list[int], first: int = 0) -> Tensor:
        """Images first, first + 1, ... under caption rows: uint8 (B, 3, H, W). Raises UserError."""
        x = self.draw(rows, first, self.compiled)
        if self.run.track.dtype != "uint8":
            latents = x.to(self.device) / self.run.track.scale + self.run.track.shift
            x = torch.cat([self.autoencoder.decode(part) for part in latents.split(25)])
        return to_uint8(x)

    def draw(self, rows: list[int], first: int, compiled: bool) -> Tensor:
        """What `sample` returns, within its budget: float32 (B, C, H, W). Raises UserError."""
        shape = self.run.track.shape
        seeds = [NOISE_SEED + first + i for i in range(len(rows))]
        request = {"seeds": seeds, "shape": shape, "compiled": compiled}
        text = {"text": self.captions.pooled[rows]}
        child = self.run.child
        before = child.seconds()
        x, found = child.tensor("sample", request, text, (len(rows), *shape))
        seconds = [after - start for after, start in zip(child.seconds(), before, strict=True)]
        if compiled == self.compiled:
            self.spent.setdefault(len(rows), []).append(seconds)
        flops = min(self.model.flops)
        nfe = (found["rows"] + found["flops_outside"] / flops) / len(rows)
        self.refuse_outside_budget(nfe)
        self.nfe = max(self.nfe, nfe)
        if not compiled:
            by_flops = found["flops"] / flops / len(rows)
            if by_flops > self.run.track.max_nfe:
                self.refuse_outside_budget(by_flops)
            self.nfe_by_flops = max(self.nfe_by_flops, by_flops)
        return x

    def time_ratio(self, rows: list[int], inputs: tuple) -> float:
        """Time of a sample over that of max_nfe evaluations, each with a draw of noise.

        inputs: x_t, t, text of some velocities. Processor time of all threads and, since other
        processes could help, time by the clock; on a GPU this alone. The larger ratio counts.
        """
        count = len(rows)
        order = torch.arange(count) % len(inputs[0])
        batch = [tensor[order] for tensor in inputs]
        before = self.run.child.seconds()
        self.model.velocity(*batch, ROUNDS, self.compiled)
        after = self.run.child.seconds()
        samples = self.spent[count][1:]  # the first one compiles
        ratios = []
        for kind in range(self.device.type == "cuda", 2):
            evaluation = (after[kind] - before[kind]) / ROUNDS
            sample = sum(spent[kind] for spent in samples) / len(samples)
            ratios.append(sample / (self.run.track.max_nfe * evaluation))
        return max(ratios)

    def refuse_slow(self, rows: list[int], inputs: tuple) -> float:
        """The time ratio; where it is too large, that of a sample drawn anew. Raises UserError."""
        count = len(rows)
        while len(self.spent.get(count, [])) < 2:
            self.draw(rows, 0, self.compiled)
        ratio = self.time_ratio(rows, inputs)
        for _ in range(2):  # other work on the machine is no fault of the sampler's
            if ratio <= SLOWER:
                break
            del self.spent[count][1:]
            self.draw(rows, 0, self.compiled)
            ratio = min(ratio, self.time_ratio(rows, inputs))
        if ratio > SLOWER:
            limit = f"{self.run.track.max_nfe} evaluations"
            raise UserError(f"a sample takes {ratio:.1f} times the time of {limit}")
        return ratio


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] -> uint8, DiT's rule: clamp(127.5 x + 128, 0, 255), truncated. Once."""
    return (127.5 * x.float() + 128).clamp(0, 255).to(torch.uint8)


# ---------------------------------------------------------------------------------------------
# A run refereed
# ---------------------------------------------------------------------------------------------


def rows_of_grid(captions: Captions) -> tuple[list[int], int]:
    """Caption rows of samples.png, and its columns: at most ten labels, evenly chosen."""
    caption_of_label = captions.first_of_labels()
    columns = min(len(caption_of_label), 10)
    stride = len(caption_of_label) // columns
    return caption_of_label[::stride][:columns] * GRID_ROWS, columns


class Panel:
    """The networks that were asked for and could be had, each with its reference."""

    def __init__(
        self, asked: Sequence[str], run: Run, captions: Captions, count: int, world: World
    ):
        self.networks = {}
        self.real = {}  # of each network: the real images' features
        self.protocol = {}  # of each network: weights and reference
        self.why_null = {}  # of each metric of the others: why it has no value
        for name, network_class in NETWORKS.items():
            try:
                if name not in asked:
                    raise UserError(f"not asked for: --metrics {network_class.metrics[0]}")
                network = network_class(captions, world.device)
                self.real[name], self.protocol[name] = reference(run.track, name, network, world)
                self.networks[name] = network
            except UserError as error:
                for metric in network_class.metrics:
                    self.why_null[named(metric, count)] = str(error)

    def scores(self, names: Sequence[str], fake: dict, count: int) -> dict:
        """{metric-count: value} of these networks for the features of the first `count` images."""
        first = {name: features[:count] for name, features in fake.items()}
        found = {}
        for name in names:
            network = self.networks[name]
            values = network.values(self.real[name], first)
            for metric, value in zip(network.metrics, values, strict=True):
                found[named(metric, count)] = value
        return found


class Evaluation:
    """One run, the networks that judge it, and the rules by which they do."""

    def __init__(self, folder: Path, world: World, count: int, asked: Sequence[str]):
        self.world = world
        self.seconds = {}  # that each part of the evaluation took
        with self.timed("start of the run's process"):
            self.run = load_run(folder, world.device)
        track = self.run.track
        self.captions = read_captions(track.name)
        self.count = count or IMAGES[track.dtype]
        self.curve_count = min(self.count, CURVE_IMAGES[track.dtype])
        extra = FINAL.get(track.name, []) if world.device.type == "cuda" else []
        asked = asked or CURVE[track.dtype] + extra
        with self.timed("networks and references"):
            self.panel = Panel(asked, self.run, self.captions, self.count, world)
        self.curve_names = [name for name in CURVE[track.dtype] if name in self.panel.networks]
        self.work = self.run.folder / "evaluation"  # what a killed evaluation continues from
        self.nfe = 0.0  # the most evaluations that any image took
        self.metrics = {}  # of the last checkpoint
        self.samples_sha256 = None  # of its scored samples: sha256 of the sha256 of each image
        self.draws_seed = world.same(random.SystemRandom().getrandbits(48))  # nobody knew it before
        project = Path(__file__).resolve().parent
        self.referee = key_of(*[sha256_of(project / name) for name in REFEREE])
        self.rules = {
            "track": track.name,
            "contract": self.run.contract,
            "data_sha256": sha256_of(Path("data", track.name, "manifest.json")),
            "val_images": track.val_images,
            "batch": BATCH,
            "noise_seed": NOISE_SEED,
            "images": self.curve_count,
        }
        for name in self.curve_names:
            self.rules[name] = self.panel.protocol[name]

    @contextmanager
    def timed(self, part: str):
        """Adds the seconds inside to those of this part."""
        began = now()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + now() - began

    def draw(self, rows: list[int], start: int) -> tuple[Tensor, list[int]]:
        """Samples from number `start` on under these caption rows, and the rows."""
        with self.timed("samples"):
            return self.sampler(rows, start), rows

    def features(self, path: Path, rows: list[int], names: list[str]) -> dict:
        """What these networks see in a checkpoint's samples under these caption rows."""
        networks = {name: self.panel.networks[name] for name in names} | {"": digests}
        rules = [self.referee, self.rules, self.panel.protocol, names]
        folder = self.work / key_of(path.stem, sha256_of(path), *rules)
        draw = lambda start, stop: self.draw(rows[start:stop], start)  # noqa: E731
        with self.timed("samples and their features"):
            return features_of(draw, len(rows), networks, folder, self.world, path.stem)

    def ceiling(self) -> dict:
        """The curve's metrics of real test images, where the reference has their features."""
        real = {}
        for name in self.curve_names:
            reference = self.panel.real[name].items()
            test = {key[5:]: tensor for key, tensor in reference if key.startswith("test.")}
            for count in sorted({self.curve_count, self.count}) if test else ():
                if count <= len(test["label"]):
                    real |= self.panel.scores([name], test, count)
        return real

    def point(self, path: Path, meta: dict) -> dict:
        """A checkpoint's place on the curve; the last one's metrics of all networks, too."""
        is_last = path == self.run.checkpoints[-1][0]
        count = self.count if is_last else self.curve_count
        names = list(self.panel.networks) if is_last else self.curve_names
        model = Model(self.run, path, count)
        point = {
            "step": int(meta["step"]),
            "images": int(meta["images"]),
            "seconds": float(meta["seconds"]),
            "val_loss_logged": float(meta["val_loss"]),
            "metrics": {},
        }
        if is_last:
            known = (self.run.track, model.velocity, self.captions)
            with self.timed("validation"):
                self.val_loss = validate(*known, DRAWS_SEED).loss
                self.fresh = validate(*known, self.draws_seed)
            refuse_looked_up(point["val_loss_logged"], self.fresh)
        self.sampler = Sampler(self.run, model, self.captions, self.world.device)
        if not names:
            return point
        features = self.features(path, self.captions.balanced(count), names)
        self.nfe = max(self.nfe, self.sampler.nfe)
        point["metrics"] = self.panel.scores(self.curve_names, features, self.curve_count)
        if is_last:
            if count == self.curve_count:  # those of the curve are known
                names = [name for name in names if name not in self.curve_names]
            self.metrics = point["metrics"] | self.panel.scores(names, features, count)
            self.samples_sha256 = sha256(features["digest"].cpu().numpy().tobytes())
        return point

    def budget(self) -> dict:
        """What a sample of the last checkpoint costs, and the pictures. Raises UserError."""
        sampler = self.sampler
        rows = self.captions.balanced(self.count)
        starts = range(0, self.count, BATCH)
        if sampler.compiled:
            for start in random.SystemRandom().sample(starts, min(AUDITS, len(starts))):
                sampler.draw(rows[start : start + BATCH], start, False)
        time_ratio = sampler.refuse_slow(rows[:BATCH], self.fresh.inputs)
        grid_rows, self.columns = rows_of_grid(self.captions)
        self.grid = (sampler(grid_rows), [self.captions.captions[row] for row in grid_rows])
        return {
            "gflops": max(sampler.model.flops) / 1e9,
            "nfe": max(self.nfe, sampler.nfe),
            "nfe_by_flops": sampler.nfe_by_flops,
            "max_nfe": self.run.track.max_nfe,
            "time_ratio": time_ratio,
            "parameters": sampler.model.parameters,
            "buffers": sampler.model.buffers,
            "checkpoint_bytes": sampler.model.stored_bytes,
        }


def evaluate(
    folder: Path, world: World, count: int = 0, asked: Sequence[str] = (), last_alone: bool = False
) -> dict:
    """Referees a run: results.json, samples.png, curve.png in its folder. Returns the results.

    count: samples of the last checkpoint, 0: as many as usual on this track. asked: names of
    NETWORKS, none: the track's own. last_alone: no other checkpoint is looked at. Collective.
    Raises UserError.
    """
    began = now()
    if world.rank == 0:  # whoever wrote it: only a whole evaluation leaves results
        Path(folder, "results.json").unlink(missing_ok=True)
    evaluation = Evaluation(folder, world, count, asked)
    run = evaluation.run
    panel = evaluation.panel
    if last_alone:
        del run.checkpoints[:-1]
    with run.child:
        ceiling = evaluation.ceiling()
        points = [evaluation.point(*checkpoint) for checkpoint in run.checkpoints]
        with evaluation.timed("budget and pictures"):
            budget = evaluation.budget()
    meta = run.checkpoints[-1][1]
    results = {
        "run_id": run.folder.resolve().name,
        "config": meta["config"],
        "seed": int(meta["seed"]),
        "code_sha256": run.code_sha256,
        "val_loss": evaluation.val_loss,
        "val_loss_fresh": evaluation.fresh.loss,
        "val_draws_seed": evaluation.draws_seed,
        "metrics": evaluation.metrics | dict.fromkeys(panel.why_null),
        "why_null": panel.why_null,
        "real": ceiling,
        "samples": evaluation.count,
        "samples_sha256": evaluation.samples_sha256,
        "images": points[-1]["images"],
        "train_seconds": points[-1]["seconds"],
        **budget,
        "checkpoints": points,
        "rules": evaluation.rules,
        "isolation": run.child.isolation,
        "protocol": panel.protocol,
        "referee_sha256": evaluation.referee,
        "processes": world.size,
        "machine": machine(world.device),
        "torch": torch.__version__,
        "evaluation_seconds": evaluation.seconds | {"all": now() - began},
    }
    world.wait()  # no other process still reads its parts
    if world.rank == 0:
        draw_grid(*evaluation.grid, evaluation.columns, run.folder / "samples.png")
        draw_curve([results], run.folder / "curve.png")
        text = json.dumps(results, indent=1) + "\n"
        write_atomic(run.folder / "results.json", lambda file: file.write_text(text))
        shutil.rmtree(evaluation.work, ignore_errors=True)
    return results


# ---------------------------------------------------------------------------------------------
# Captions of the user's; official tools
# ---------------------------------------------------------------------------------------------


def any_captions(run: Run, wanted: list[str]) -> Captions:
    """Embeddings of any captions: the track's table where it has them all, else CLIP's."""
    table = read_captions(run.track.name)
    if set(wanted) <= set(table.captions):
        pooled = table.pooled[[table.captions.index(caption) for caption in wanted]]
    else:
        pooled = clip_text(wanted, run.track.text_width)
    return Captions(wanted, list(range(len(wanted))), pooled)


def draw_prompt(folder: Path, prompt: str, world: World) -> Path:
    """Eight samples of one caption by the run's last checkpoint -> prompt.png. Raises UserError."""
    path = Path(folder, "prompt.png")
    run = load_run(folder, world.device)
    with run.child:
        captions = any_captions(run, [prompt])
        model = Model(run, run.checkpoints[-1][0])
        images = Sampler(run, model, captions, world.device)([0] * 8)
    draw_grid(images, [prompt] * 8, 8, path)
    return path


def read_prompts(path: Path, tool: str) -> tuple[list, list[str]]:
    """An official prompt file's entries and their captions. Raises UserError.

    JSON lines, or a JSON list, of objects with "prompt" or "caption"; or plain lines.
    """
    try:
        text = path.read_text().strip()
        if text.startswith("["):
            entries = json.loads(text)
        else:
            entries = []
            for line in filter(str.strip, text.splitlines()):
                entries.append(json.loads(line) if line.startswith("{") else {"prompt": line})
        wanted = []
        for entry in entries:
            wanted.append(entry["prompt"] if "prompt" in entry else entry["caption"])
        if not wanted or not all(isinstance(x, str) and x.strip() for x in wanted):
            raise ValueError("no prompts, or an empty one")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is not a prompt file ({error!r}); give {tool}'s")
    return entries, wanted


def export(folder: Path, tool: str, prompts: Path | None, world: World, count: int = 0) -> Path:
    """Images laid out as an official tool reads them: of its prompt file, or those that are scored.

    adm        000000.png and samples.npz, its evaluator's: arr_0, uint8 (count, H, W, 3)
    geneval    00000/metadata.jsonl (the prompt's line) and 00000/samples/00000.png to 00003.png
    geneval2   00000.png and image_filepaths.json {prompt: path}, its --image_filepath_data
    hpsv3      00000.png with its prompt in 00000.txt, for evaluate/benchmark.py --image_folders
    prompts: see read_prompts. A killed export continues. Raises UserError.
    """
    run = load_run(folder, world.device)
    out = Path(folder, tool).resolve()
    with run.child:
        if tool == "adm":
            captions = read_captions(run.track.name)
            rows = captions.balanced(count or IMAGES[run.track.dtype])
            files = [out / f"{i:06d}.png" for i in range(len(rows))]
        else:
            wanted, rows, files = lay_out(out, tool, prompts)
            captions = any_captions(run, wanted)
        draw_files(run, captions, rows, files, world)
    world.wait()
    if tool == "adm" and world.rank == 0:
        write_atomic(out / "samples.npz", lambda path: write_npz(files, path))
    return out


def lay_out(out: Path, tool: str, prompts: Path) -> tuple[list[str], list[int], list[Path]]:
    """The prompts, each image's prompt by number, and its file; writes the tool's texts."""
    entries, wanted = read_prompts(prompts, tool)
    copies = 4 if tool == "geneval" else 1
    files = []
    texts = {}  # of each file that the tool wants beside the images
    for i, prompt in enumerate(wanted):
        if tool == "geneval":
            files += [out / f"{i:05d}/samples/{copy:05d}.png" for copy in range(copies)]
            texts[out / f"{i:05d}/metadata.jsonl"] = json.dumps(entries[i])
        else:
            files.append(out / f"{i:05d}.png")
        if tool == "hpsv3":
            texts[out / f"{i:05d}.txt"] = prompt
    if tool == "geneval2":
        file_of_prompt = dict(zip(wanted, map(str, files), strict=True))
        texts[out / "image_filepaths.json"] = json.dumps(file_of_prompt)
    for path, text in texts.items():
        write_atomic(path, lambda file, text=text: file.write_text(text))
    return wanted, [i // copies for i in range(len(files))], files


def draw_files(run: Run, captions: Captions, rows: list[int], files: list[Path], world: World):
    """Image i of caption row rows[i] -> files[i], where it is not there yet. Raises UserError."""
    model = Model(run, run.checkpoints[-1][0], len(files))
    sampler = Sampler(run, model, captions, world.device)
    starts = range(0, len(files), BATCH)
    for start in progress(starts[world.rank :: world.size], "images to export"):
        part = range(start, min(start + BATCH, len(files)))
        if all(files[i].is_file() for i in part):
            continue
        images = sampler([rows[i] for i in part], start)
        for i, image in zip(part, images, strict=True):
            picture = to_picture(image)
            save = lambda file, picture=picture: picture.save(file, format="PNG")  # noqa: E731
            write_atomic(files[i], save)


# ---------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------


def scored(results: dict) -> dict:
    """The metrics of all samples that have a value: not those of the curve."""
    count = named("", results["samples"])
    metrics = results["metrics"].items()
    return {name: value for name, value in metrics if name.endswith(count) and value is not None}


def markdown_row(results: dict) -> str:
    """The row to paste into a README or a pull request, under its header."""
    row = {
        "run": results["run_id"],
        "config": results["config"],
        "val loss": f"{results['val_loss']:.5f}",
    }
    for name, value in scored(results).items():
        row[name] = f"{value:.4g}"
    row["train time"] = f"{results['train_seconds']:.1f} s"
    row["images"] = f"{results['images']:,}"
    row["NFE"] = f"{results['nfe']:g}"
    row["parameters"] = f"{results['parameters'] / 1e6:.2f}M"
    row["machine"] = results["machine"]
    lines = []
    for cells in (row, ["---"] * len(row), row.values()):
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def beside_record(results: dict) -> str:
    """One line: the run's metrics, those of the track's last record, and real images'."""
    records = Path(__file__).resolve().parent / "records" / results["rules"]["track"]
    record = {}
    for folder in sorted(records.glob("2*")):
        text = folder / "README.md"
        path = folder / "results.json"
        if text.is_file() and path.is_file() and "\nPredecessor: " in text.read_text():
            record = json.loads(path.read_text())["metrics"]
    parts = []
    for name, value in scored(results).items():
        others = (("the record", record.get(name)), ("real images", results["real"].get(name)))
        known = [f"{what} {number:.3g}" for what, number in others if number is not None]
        parts.append(f"{name} {value:.3g}" + (f" ({', '.join(known)})" if known else ""))
    return "; ".join(parts)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line. argparse ends the process where it is not one."""
    metrics = [metric for network in NETWORKS.values() for metric in network.metrics]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", type=Path, help="folder of a run: logs/<run_id>")
    parser.add_argument("--images", type=int, help="samples of the last checkpoint")
    parser.add_argument("--metrics", nargs="+", choices=metrics, default=[])
    parser.add_argument("--last", action="store_true", help="only the last checkpoint: no curve")
    parser.add_argument("--prompt", help="only draw samples of this caption")
    tools = ("adm", "geneval", "geneval2", "hpsv3")
    parser.add_argument("--export", choices=tools, help="only images for this tool")
    parser.add_argument("--prompts", type=Path, help="the official prompt file of --export")
    parser.add_argument("--self-check", action="store_true", help="against published values")
    return parser.parse_args(argv)


def refuse_arguments(args: argparse.Namespace):
    """Raises UserError for a command line that could not do all that it asks for."""
    wanted = {"--self-check": args.self_check, "--prompt": args.prompt, "--export": args.export}
    ways = [name for name, value in wanted.items() if value not in (None, False)]
    if len(ways) > 1:
        raise UserError(f"{' and '.join(ways)} are different requests: give one of them")
    if not args.run and not args.self_check:
        raise UserError("give a run's folder, logs/<run_id>")
    if args.images is not None and not 10 <= args.images <= MOST_IMAGES:
        raise UserError(f"give 10 or more --images, and at most {MOST_IMAGES:,}")
    if args.prompt is not None and not args.prompt.strip():
        raise UserError("--prompt is empty: give a caption")
    if bool(args.export not in (None, "adm")) != bool(args.prompts):
        raise UserError("give --export of a tool with --prompts, its own prompt file; adm has none")


def referee_run(args: argparse.Namespace, world: World):
    """Evaluates the run and prints what lies where, and the row to paste. Raises UserError."""
    asked = [name for name, network in NETWORKS.items() if {*network.metrics} & {*args.metrics}]
    results = evaluate(args.run, world, args.images or 0, asked, args.last)
    if world.rank == 0:
        for name in ("log.txt", "results.json", "samples.png", "curve.png"):
            print(f"{name}: {Path(args.run, name)}")
        print("\n" + markdown_row(results))
        print("\n" + beside_record(results))


def main(argv: list[str] | None = None) -> int:
    """Runs the command line `argv`. Returns the exit code."""
    args = parse_arguments(argv)
    status = 0
    try:
        refuse_arguments(args)
        world = World()
        if args.self_check:
            status = self_check(world)
        elif args.prompt:
            print("samples:", draw_prompt(args.run, args.prompt, world))
        elif args.export:
            print("samples:", export(args.run, args.export, args.prompts, world, args.images or 0))
        else:
            referee_run(args, world)
    except UserError as error:
        print(f"eval_speedrun.py: {error}", file=sys.stderr)
        return 2
    world.end()
    return status


if __name__ == "__main__":
    sys.exit(main())
