"""The referee's metrics against published values, wherever weights and data can be had."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from data.common import UserError, World, progress
from data.metrics import BATCH, features_of, frechet_distance, moments
from data.networks import NETWORKS, weights
from data.reference import real_images, reference


def check_lite(world: World) -> Iterator[tuple]:
    """The first 1,000 CIFAR-10 test images, as this referee measured them on its first day."""
    track = SimpleNamespace(name="cifar10", dtype="uint8")
    labels_alone = SimpleNamespace(labels=list(range(10)))
    network = NETWORKS["lite"](labels_alone, world.device)
    real, _ = reference(track, "lite", network, world)
    images, labels, _ = real_images(track, "val")
    fake = network(images[:1000].to(world.device), labels[:1000].to(world.device))
    values = network.values(real, fake)
    yield from zip(network.metrics, values, (0.0, 0.858, 0.01), (0.5, 0.01, 0.01), strict=True)


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
