"""What every track of data/download.py writes: shards, a caption table, and the manifest last.

Every file is written under a temporary name and renamed, so whatever is there is whole.
Not to be edited for a record.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

from data.common import DAMAGED, Captions, UserError, progress, sha256_of, write_atomic

SHARD = 10_000  # images in one shard


def write_track(
    folder: Path,
    splits: dict,
    text: Captions,
    about: dict,
    about_text: dict,
    request: dict | None = None,
):
    """Writes the shards, the caption table and the manifest of a track. Raises UserError.

    splits: {"train": {name: array or tensor}, "val": ...}: latents (N, C, H, W), uint8 pixels or
    float16 latents, as the track's row in TRACKS says; labels (N,), integers from 0; perhaps pixels
    of the latents, uint8 (N, 3, H, W), the referee's real images; perhaps features of the training
    images, int8 (N, 1 + patches, components).
    text: every label has equally many captions; pooled (captions, D) as wide as the row says.
    about, about_text: {name: string}, kept in the files: where images and embeddings come from.
    request: {name: string}, kept in the manifest: what `all_there` will be asked for.
    """
    counts = {"features.safetensors": 0} if "features" in splits["train"] else {}
    for split, arrays in splits.items():
        for number, start in enumerate(range(0, len(arrays["labels"]), SHARD)):
            shard = {}
            for name, array in arrays.items():
                shard[name] = torch.as_tensor(array[start : start + SHARD]).contiguous()
            path = folder / f"{split}_{number:03d}.safetensors"
            counts[path.name] = len(shard["labels"])
            metadata = about | {"track": folder.name, "count": str(counts[path.name])}
            write_safetensors(path, shard, metadata)
    table = {"pooled": text.pooled.half()}
    about_text = about_text | text_metadata(text.captions, text.labels)
    write_safetensors(folder / "text.safetensors", table, about_text)
    counts["text.safetensors"] = len(text.captions)
    asked = {"request": request} if request else {}
    write_manifest(folder, counts, {"track": folder.name} | asked)


def text_metadata(captions: list[str], labels: list[int]) -> dict:
    return {"captions": json.dumps(captions), "labels": json.dumps(labels)}


def write_safetensors(path: Path, tensors: dict, metadata: dict):
    """Atomically, with the header in sorted order: equal content gives equal files.

    A file that holds this already is left alone.
    """
    content = bytearray(save(tensors, metadata))
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    content[8:end] = text.ljust(end - 8)
    if not path.is_file() or path.read_bytes() != content:
        write_atomic(path, lambda temporary: temporary.write_bytes(content))


def write_manifest(folder: Path, counts: dict, manifest: dict):
    """The last file of a download: `manifest` and the files named in `counts`, {name: rows}."""
    files = {}
    for name in progress(counts, "hashing"):
        files[name] = entry_of(folder / name, counts[name])
    content = json.dumps(manifest | {"files": files}, indent=1) + "\n"
    write_atomic(folder / "manifest.json", lambda temporary: temporary.write_text(content))
    print(f"{folder}: {len(files)} files written")


def entry_of(path: Path, count: int) -> dict:
    """What the manifest says of a file."""
    return {"sha256": sha256_of(path), "bytes": path.stat().st_size, "count": count}


def all_there(folder: Path, request: dict) -> bool:
    """Whether the manifest answers this request and its files are whole. Removes damaged ones."""
    path = folder / "manifest.json"
    if not path.is_file():
        return False
    damaged = []
    try:
        manifest = json.loads(path.read_text())
        for name, entry in manifest["files"].items():
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"{name!r} is no plain name of a shard")  # it could be deleted
            file = folder / name
            if not file.is_file() or entry_of(file, entry["count"]) != entry:
                damaged.append(name)
        as_asked = manifest.get("request", {}) == request
    except DAMAGED as error:
        print(f"{path} cannot be used ({error}): rewriting it")
        return False
    if as_asked and not damaged:
        print(f"{folder}: {len(manifest['files'])} files, all there")
        return True
    print(f"{folder}: repairing {', '.join(damaged) or 'nothing; another part is asked for'}")
    for name in damaged:
        (folder / name).unlink(missing_ok=True)
    return False


def whole(path: Path, metadata: dict) -> bool:
    """Whether a file of this very download is there: they are renamed when they are complete."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata().items() >= metadata.items()
    except DAMAGED:
        return False


def need_disk(folder: Path, size: float, mend: str):
    """Raises UserError where fewer than `size` bytes are free, beside what stands already."""
    standing = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if shutil.disk_usage(folder.parent).free + standing < size:
        raise UserError(f"{folder} needs {size / 1e6:.0f} MB of disk; {mend}")
