"""ImageGen Speedrun: the referee. Imports a run's own snapshot, samples, scores, draws.

    python eval_speedrun.py logs/<run_id>                     results.json, samples.png, curve.png
    python eval_speedrun.py logs/<run_id> --prompt "a frog"   samples of one caption: prompt.png

What a run may decide is in its snapshot: `load_checkpoint`, `velocity`, `sample`. Everything else a
number depends on is made here: captions (balanced over the labels), noise (seeded by the image's
index, so the images depend on neither batch size nor number of devices), the validation draws
(from the contract's text, checked by hash) and the count of network evaluations.
Not to be edited for a record. Cap: 700 lines (tested).
"""
import argparse
import hashlib
import importlib.util
import json
import logging
import os
import platform
import re
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

# ---------------------------------------------------------------------------------------------
# Protocol
# ---------------------------------------------------------------------------------------------

CONTRACT_SHA256 = "2e2406a8789e99f59025cde8ef7d8648b38abfdb82c28fac4d273a1775800e53"
NOISE_SEED = 50_000_000          # image i starts from the noise of seed NOISE_SEED + i
GRID_ROWS = 8                    # images of each caption in samples.png
CLIP_MODELS = {512: ("ViT-B-32-quickgelu", "openai"), 768: ("ViT-L-14-quickgelu", "openai")}


class UserError(Exception):
    """Something the user can mend: printed as one line, exit code 2."""


def progress(iterable, desc: str):
    from tqdm import tqdm
    return tqdm(iterable, desc=desc, ascii=True, disable=None)   # quiet where there is no terminal


def write_atomic(path: Path, write):
    """write(temporary path), then rename: the file is whole or not there. Raises UserError."""
    temporary = path.with_name(f"tmp_{path.name}")       # keeps the ending, which savefig reads
    try:
        write(temporary)
        os.replace(temporary, path)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({e}); free some disk and run this again")


# ---------------------------------------------------------------------------------------------
# The run: its snapshot, its contract, its checkpoints
# ---------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A folder that train_speedrun.py wrote."""
    folder: Path
    code: object          # the imported snapshot
    code_sha256: str
    track: object         # from the contract's text, not from the rest of the snapshot
    draws: object         # validation_draws of the same
    contract: str         # "as published" or "edited"
    checkpoints: list     # (path, metadata), by step


def contract_text(source: str) -> str:
    """The section 'Contract: do not edit for a record' of a snapshot, without its banners."""
    parts = source.split("# " + "-" * 93 + "\n")
    for title, body in zip(parts, parts[1:]):
        if title.strip() == "# Contract: do not edit for a record":
            return body
    raise UserError("the snapshot has no contract section: start from train_speedrun.py")


def load_run(folder) -> Run:
    """Imports logs/<run_id>/train_speedrun.py and lists its checkpoints. Raises UserError."""
    folder = Path(folder)
    path = folder / "train_speedrun.py"
    try:
        source = path.read_text()
    except OSError:
        raise UserError(f"{path} is missing: give the folder of a run, logs/<run_id>")
    contract = contract_text(source)
    spec = importlib.util.spec_from_file_location("snapshot", path)
    code = importlib.util.module_from_spec(spec)
    sys.modules["snapshot"] = code                               # dataclasses look their module up
    try:
        spec.loader.exec_module(code)
        for name in ("CONFIGS", "Text", "load_checkpoint", "velocity", "sample"):
            getattr(code, name)
        # from the contract's own text alone: nothing later in the file can replace its names
        names = dict(__name__="contract", dataclass=dataclass, torch=torch)
        exec(contract, names)
    except Exception as e:
        raise UserError(f"{path} does not import ({type(e).__name__}: {e}): mend it, train again")
    code_sha256 = hashlib.sha256(source.encode()).hexdigest()
    checkpoints = []
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
    config = checkpoints[-1][1]["config"]
    track = names["TRACKS"][code.CONFIGS[config].track]
    published = hashlib.sha256(contract.encode()).hexdigest() == CONTRACT_SHA256
    return Run(folder, code, code_sha256, track, names["validation_draws"],
               "as published" if published else "edited", checkpoints)


def load_model(run: Run, path: Path, device):
    """The checkpoint's model, on the device, in evaluation mode."""
    try:
        model, _ = run.code.load_checkpoint(path, device)
    except Exception as e:
        raise UserError(f"{path} does not load ({type(e).__name__}: {e}): resume or train again")
    return model.requires_grad_(False)


# ---------------------------------------------------------------------------------------------
# Captions
# ---------------------------------------------------------------------------------------------


def caption_table(run: Run):
    """(captions, labels, pooled (captions, D), tokens (captions, T, D)), T may be 0."""
    path = Path("data", run.track.name, "text.safetensors")
    try:
        with safe_open(path, "pt") as f:
            meta = f.metadata()
            tensors = {k: f.get_tensor(k).float() for k in f.keys()}
        pooled = tensors["pooled"]
        return (json.loads(meta["captions"]), json.loads(meta["labels"]), pooled,
                tensors.get("tokens", torch.zeros(len(pooled), 0, pooled.shape[1])))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as e:
        raise UserError(f"{path} is not a caption table ({e}); "
                        f"run: python data/download.py {run.track.name}")


def balanced(labels: list, count: int) -> list:
    """Caption rows of images 0 .. count - 1: labels in turn, then each label's captions in turn."""
    rows = [[i for i, label in enumerate(labels) if label == k] for k in range(max(labels) + 1)]
    return [rows[i % len(rows)][i // len(rows) % len(rows[i % len(rows)])] for i in range(count)]


def clip_text(captions: list, width: int = 512):
    """Pooled, projected, unnormalised CLIP text embeddings (captions, width), float32.

    OpenAI's CLIP through open_clip (quickgelu: without it the weights run with another activation).
    Raises UserError where the weights cannot be had.
    """
    if width not in CLIP_MODELS:
        raise UserError(f"no CLIP model of width {width}: use a caption of the track's table")
    import huggingface_hub.constants as hub
    import open_clip
    name, weights = CLIP_MODELS[width]
    try:
        urllib.request.urlopen(hub.ENDPOINT, timeout=10).close()
    except OSError:
        hub.HF_HUB_OFFLINE = True                                # cache only, without retries
    try:
        logging.disable(logging.ERROR)                           # our line says it
        model = open_clip.create_model(name, pretrained=weights).eval()
    except Exception as e:                                       # the hub raises a dozen kinds
        raise UserError(f"CLIP {name} cannot be had ({type(e).__name__}): connect to the hub, or "
                        "use a caption of the track's table")
    finally:
        logging.disable(logging.NOTSET)
    with torch.no_grad():
        return model.encode_text(open_clip.get_tokenizer(name)(captions)).float()


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


def flops(function) -> int:
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function()
    return counter.get_total_flops()


class Budget:
    """Counts network evaluations per image and refuses more than the contract allows.

    Twice: rows that enter the model's forward, by a hook, for every image; and, for the first two
    images, the floating-point operations of `sample` over those of one evaluation, which also
    sees evaluations of a copy, a re-wrapped model or a bare .forward().
    """

    def __init__(self, model, limit: int):
        self.limit, self.rows, self.images = limit, 0, 0
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, model, args, kwargs):
        self.rows += len(args[0] if args else next(iter(kwargs.values())))

    def audit(self, run: Run, model, noise, text, fresh) -> float:
        """FLOPs of `sample` in evaluations per image. Eager: before anything is compiled."""
        t = torch.full((len(noise),), 0.5, device=noise.device)
        one = flops(lambda: run.code.velocity(model, noise, t, text))
        ratio = flops(lambda: run.code.sample(model, noise, text, fresh)) / one
        self.rows = 0
        if ratio > self.limit * 1.01:
            raise UserError(f"sample computes as much as {ratio:.1f} network evaluations per image;"
                            f" the contract allows {self.limit}")
        return ratio

    def check(self, images: int):
        """Called after each batch of `images`."""
        self.images += images
        if self.rows > self.limit * self.images:
            raise UserError(f"sample took {self.rows / self.images:.1f} network evaluations per "
                            f"image; the contract allows {self.limit}")


def to_uint8(x: torch.Tensor) -> torch.Tensor:
    """[-1, 1] -> uint8, DiT's rule: clamp(127.5 x + 128, 0, 255), truncated. Once."""
    return (127.5 * x.float() + 128).clamp(0, 255).to(torch.uint8)


def text_batch(run: Run, pooled, tokens, rows, device):
    """The snapshot's Text of caption rows."""
    return run.code.Text(pooled[rows].to(device), tokens[rows].to(device))


def generate(run: Run, model, pooled, tokens, rows: list, device, batch: int = 100):
    """Images 0 .. len(rows) - 1 under caption rows: (uint8 (n, 3, H, W), NFE, FLOP audit)."""
    shape, budget, out = run.track.shape, Budget(model, run.track.max_nfe), []
    first = IndexedNoise(range(2), shape, device)
    audit = budget.audit(run, model, first(), text_batch(run, pooled, tokens, rows[:1] * 2, device),
                         first)
    if device.type == "cpu" and len(rows) * run.track.max_nfe >= 5000:
        model.forward = torch.compile(model.forward, dynamic=False)      # the hook stays outside
    for at in progress(range(0, len(rows), batch), "sampling"):
        part = rows[at:at + batch]
        fresh = IndexedNoise(range(at, at + len(part)), shape, device)
        text = text_batch(run, pooled, tokens, part, device)
        images = run.code.sample(model, fresh(), text, fresh)
        budget.check(len(part))
        if images.shape != (len(part), *shape) or not images.isfinite().all():
            raise UserError(f"sample returned {tuple(images.shape)}, finite: "
                            f"{bool(images.isfinite().all())}; expected {(len(part), *shape)}")
        out.append(decode(run, images).cpu())
    return torch.cat(out), budget.rows / budget.images, audit


def decode(run: Run, x: torch.Tensor) -> torch.Tensor:
    """Samples in the model's scale -> uint8 pixels (B, 3, H, W)."""
    if run.track.dtype != "uint8":
        raise UserError(f"decoding {run.track.name} latents needs its autoencoder, which this "
                        "version of the referee does not have")
    return to_uint8(x)


# ---------------------------------------------------------------------------------------------
# Metrics
# ---------------------------------------------------------------------------------------------


@torch.no_grad()
def val_loss(run: Run, model, pooled, tokens, labels: list, device, batch: int = 256) -> float:
    """Mean squared velocity error over the contract's validation images, noise and times."""
    track, total, done = run.track, 0.0, 0
    noise, t = run.draws(track, track.val_images)
    caption = balanced(labels, max(labels) + 1)                  # each label's first caption
    for path in sorted(Path("data", track.name).glob("val_*.safetensors")):
        try:
            with safe_open(path, "pt") as f:
                latents, shard_labels = f.get_tensor("latents"), f.get_tensor("labels")
        except (OSError, SafetensorError) as e:
            raise UserError(f"{path} is not a shard ({e}); "
                            f"run: python data/download.py {track.name}")
        for at in range(0, min(len(latents), track.val_images - done), batch):
            stop = min(at + batch, len(latents), at + track.val_images - done)
            x = (latents[at:stop].float() - track.shift) * track.scale
            e, tt = noise[done:done + len(x)], t[done:done + len(x)]
            mix = tt.view(-1, 1, 1, 1)
            x_t, target = ((1 - mix) * x + mix * e).to(device), (e - x).to(device)
            rows = [caption[k] for k in shard_labels[at:stop].tolist()]
            v = run.code.velocity(model, x_t, tt.to(device),
                                  text_batch(run, pooled, tokens, rows, device))
            total += (v.float() - target).square().mean(dim=(1, 2, 3)).double().sum().item()
            done += len(x)
    if done < track.val_images:
        raise UserError(f"data/{track.name} holds {done} validation images, not "
                        f"{track.val_images}; run: python data/download.py {track.name}")
    return total / done


# ---------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------


def draw_grid(images: torch.Tensor, captions: list, columns: int, path: Path):
    """Images (n, 3, H, W) uint8 in rows, each with its caption below. Small ones are enlarged."""
    from PIL import Image, ImageDraw, ImageFont
    size = max(96, images.shape[-1])
    font, line = ImageFont.load_default(size // 9), size // 9 + 6
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (size + 4), rows * (size + line + 4)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (image, caption) in enumerate(zip(images, captions)):
        x, y = i % columns * (size + 4) + 2, i // columns * (size + line + 4) + 2
        tile = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((size, size), Image.NEAREST)
        sheet.paste(tile, (x, y))
        pen.text((x + size / 2, y + size), caption, fill="black", font=font, anchor="ma")
    write_atomic(path, lambda p: sheet.save(p, format="PNG"))


def draw_curve(points: list, title: str, path: Path):
    """Validation loss of each checkpoint over wall clock and over images seen."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axis, key, label in ((axes[0], "seconds", "training seconds"),
                             (axes[1], "images", "images seen")):
        axis.plot([p[key] for p in points], [p["val_loss"] for p in points], "o-")
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("validation loss")
    figure.suptitle(title)
    write_atomic(path, figure.savefig)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------


def evaluate(folder, device) -> dict:
    """Referees a run: results.json, samples.png, curve.png in its folder. Returns the results."""
    began, run = time.perf_counter(), load_run(folder)
    captions, labels, pooled, tokens = caption_table(run)
    points = []
    for path, meta in progress(run.checkpoints, "validation"):
        model = load_model(run, path, device)
        points.append(dict(
            step=int(meta["step"]), images=int(meta["images"]), seconds=float(meta["seconds"]),
            val_loss=val_loss(run, model, pooled, tokens, labels, device),
            val_loss_logged=float(meta["val_loss"])))
    meta = run.checkpoints[-1][1]
    classes = max(labels) + 1
    rows = balanced(labels, min(classes, 10) * GRID_ROWS) if classes <= 10 else \
        [i // GRID_ROWS * (classes // 10) for i in range(10 * GRID_ROWS)]
    images, nfe, audit = generate(run, model, pooled, tokens, rows, device)
    draw_grid(images, [captions[r] for r in rows], min(classes, 10), run.folder / "samples.png")
    draw_curve(points, run.folder.resolve().name, run.folder / "curve.png")
    results = dict(
        run_id=run.folder.resolve().name, track=run.track.name, config=meta["config"],
        seed=int(meta["seed"]), contract=run.contract, code_sha256=run.code_sha256,
        referee_sha256=hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
        data_sha256=meta["data_sha256"], val_loss=points[-1]["val_loss"],
        val_images=run.track.val_images, images=points[-1]["images"],
        train_seconds=points[-1]["seconds"], nfe=nfe, nfe_by_flops=audit, nfe_images=len(rows),
        parameters=sum(p.numel() for p in model.parameters()), checkpoints=points,
        machine=machine(device), torch=torch.__version__,
        evaluation_seconds=time.perf_counter() - began)
    write_atomic(run.folder / "results.json",
                 lambda p: p.write_text(json.dumps(results, indent=1) + "\n"))
    return results


def machine(device) -> str:
    """Name of the GPU, or of the CPU and its cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpu.read_text() if cpu.exists() else "")
    return f"{found[1] if found else platform.machine()}, {os.cpu_count()} cores"


def draw_prompt(folder, prompt: str, device) -> Path:
    """Eight samples of one caption by the run's last checkpoint -> prompt.png."""
    run = load_run(folder)
    captions, _, pooled, tokens = caption_table(run)
    if prompt in captions:
        row = captions.index(prompt)
    else:
        if tokens.shape[1]:
            raise UserError("this run's captions have tokens: use a caption of the track's table")
        row, pooled = 0, clip_text([prompt], run.track.text_width)
        tokens = pooled.new_zeros(1, 0, run.track.text_width)
    model = load_model(run, run.checkpoints[-1][0], device)
    images, _, _ = generate(run, model, pooled, tokens, [row] * 8, device)
    draw_grid(images, [prompt] * 8, 8, run.folder / "prompt.png")
    return run.folder / "prompt.png"


def markdown_row(r: dict) -> str:
    """The row to paste into a README or a pull request, under its header."""
    head = "run | config | val loss | train time | images | NFE | parameters | machine".split(" | ")
    row = [r["run_id"], r["config"], f"{r['val_loss']:.5f}", f"{r['train_seconds']:.1f} s",
           f"{r['images']:,}", f"{r['nfe']:g}", f"{r['parameters'] / 1e6:.2f}M", r["machine"]]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), row))


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="folder of a run: logs/<run_id>")
    parser.add_argument("--prompt", help="only draw samples of this caption")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if args.prompt:
            print(f"samples: {draw_prompt(args.run, args.prompt, device)}")
            return 0
        results = evaluate(args.run, device)
    except UserError as e:
        print(f"eval_speedrun.py: {e}", file=sys.stderr)
        return 2
    for name in ("log.txt", "results.json", "samples.png", "curve.png"):
        print(f"{name}: {Path(args.run, name)}")
    print("\n" + markdown_row(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
