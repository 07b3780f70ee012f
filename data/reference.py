"""What the networks of networks.py see in real images, once and for all.

Not to be edited for a record.
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.common import World, key_of, read_split, sha256_of, write_atomic
from data.metrics import features_of, summary
from data.networks import digest, weights

# The names in WEIGHTS of ADM's reference batches; of other tracks the real images are their own
ADM_BATCHES = {"imagenet256": "ADM reference", "imagenet512": "ADM reference of 512"}


def real_images(track: SimpleNamespace, split: str = "train") -> tuple[Tensor, Tensor, str]:
    """Images uint8 (N, 3, H, W), their labels (N,), the sha256 of their file. Raises UserError."""
    if track.name not in ADM_BATCHES:
        stored = "latents" if track.dtype == "uint8" else "pixels"
        images, labels = read_split(track.name, split, stored)
        return images, labels, sha256_of(Path("data", track.name, "manifest.json"))
    path = weights(ADM_BATCHES[track.name])
    images = torch.from_numpy(np.load(path)["arr_0"]).permute(0, 3, 1, 2)
    return images, torch.zeros(len(images), dtype=torch.long), sha256_of(path)


def reference(track: SimpleNamespace, name: str, network, world: World) -> tuple[dict, dict]:
    """The real images' {name: features, name.mean, name.cov, label, ...}; how they were made.

    They are cached in data/<track>/ under a name that says how. Raises UserError.
    """
    dtype = getattr(network, "dtype", torch.float32)
    protocol = {"weights": digest(network.net), "dtype": str(dtype).removeprefix("torch.")}
    if not network.reference_rows:
        return {}, protocol
    images, labels, images_sha256 = real_images(track)
    rows = balanced_rows(labels, getattr(network, "reference_images", len(images)))
    protocol["reference"] = images_sha256
    protocol["reference_images"] = len(rows)
    folder = Path(__file__).resolve().parent
    code = [sha256_of(folder / f"{name}.py") for name in ("networks", "metrics", "reference")]
    key = key_of(protocol, *code)
    path = Path("data", track.name, f"reference_{name}_{key}.safetensors")
    if not path.is_file():
        parts = path.with_suffix("")

        def seen(images: Tensor, split: str) -> dict:
            return features_of(
                lambda start, stop: (images[start:stop], [0] * (stop - start)),
                len(images),
                {name: network},
                parts / split,
                world,
                f"reference: {name}, {split} images, once",
            )

        features = seen(images[rows], "train")
        tensors = summary(features, network.reference_rows)
        tensors["label"] = labels[rows]
        if hasattr(network, "compare"):
            test_images, test_labels, _ = real_images(track, "val")
            test = seen(test_images[: network.test_images], "val")
            test["label"] = test_labels[: network.test_images]
            tensors |= network.compare(features, test, images)
            tensors |= {f"test.{name}": value.cpu() for name, value in test.items()}
        if track.name in ADM_BATCHES and name == "inception":
            tensors.update(adm_moments(track))
        if world.rank == 0:
            notes = {"protocol": json.dumps(protocol)}
            write_atomic(path, lambda file: save_file(tensors, file, notes))
            shutil.rmtree(parts, ignore_errors=True)  # another referee may be at it
        world.wait()
    return load_file(path, device=str(world.device)), protocol


def balanced_rows(labels: Tensor, count: int) -> Tensor:
    """The first rows of each label, as many of each, `count` in all: (count,), in their order."""
    if count >= len(labels):
        return torch.arange(len(labels))
    kinds = labels.unique()
    each = max(1, count // len(kinds))  # captions may be as many as images
    rows = [(labels == kind).nonzero()[:each, 0] for kind in kinds]
    return torch.cat(rows)[:count].sort().values


def adm_moments(track: SimpleNamespace) -> dict:
    """ADM's own moments of all of ImageNet's training images. Raises UserError."""
    published = np.load(weights(ADM_BATCHES[track.name]))
    names = {"pool.mean": "mu", "pool.cov": "sigma"}
    names |= {"spatial.mean": "mu_s", "spatial.cov": "sigma_s"}
    return {name: torch.from_numpy(published[key]) for name, key in names.items()}
