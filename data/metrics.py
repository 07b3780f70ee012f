"""Features of images, gathered in parts that survive a kill, and the metrics as functions of them.

All of them multiply and sum in float64. A float32 product is rounded in an order that depends on
the number of threads and on the CPU, and a difference of two means shows that rounding; in float64
what remains lies far below any digit that is compared. Not to be edited for a record.
"""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.common import World, progress, write_atomic

BATCH = 100  # images that are sampled and judged together
ROWS = 1000  # rows of a matrix of distances at a time, so that it fits into memory


@torch.no_grad()
def features_of(
    images_of: Callable, count: int, networks: dict, folder: Path, world: World, description: str
) -> dict:
    """Features of images 0 .. count - 1 of all networks, {name: (count, ...)}, on every process.

    images_of(start, stop) -> uint8 (B, 3, H, W), caption rows. Process r takes every
    world.size-th batch; what lies in `folder` from before is not done again.
    """
    torch.set_float32_matmul_precision("highest")  # TF32 would be seen in the features
    torch.backends.cudnn.allow_tf32 = False
    starts = range(0, count, BATCH)
    paths = [folder / f"{start}.safetensors" for start in starts]
    mine = range(world.rank, len(starts), world.size)
    for i in progress(mine, description):
        if paths[i].is_file():
            continue
        images, rows = images_of(starts[i], min(starts[i] + BATCH, count))
        images = images.to(world.device)
        features = {}
        for network in networks.values():
            for name, value in network(images, rows).items():
                features[name] = value.cpu().contiguous()
        write_atomic(paths[i], lambda path, features=features: save_file(features, path))
    world.wait()
    parts = [load_file(path) for path in paths]
    whole = {}
    for name in parts[0]:
        whole[name] = torch.cat([part[name] for part in parts]).to(world.device)
    return whole


def digests(images: Tensor, rows: list[int]) -> dict:
    """{"digest": sha256 of each image's bytes (C, H, W), uint8 (B, 32)}."""
    found = [hashlib.sha256(image.cpu().numpy().tobytes()).digest() for image in images]
    return {"digest": torch.tensor([list(digest) for digest in found], dtype=torch.uint8)}


def named(metric: str, count: int) -> str:
    """FID of 50,000 images is FID-50k: no metric goes without its count."""
    return f"{metric}-{count // 1000}k" if count % 1000 == 0 else f"{metric}-{count}"


def moments(batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean (D,) and unbiased covariance (D, D) of rows that arrive in batches (B, D), float64."""
    count = 0
    total = 0.0
    products = 0.0
    for batch in batches:
        batch = batch.double()
        count += len(batch)
        total = total + batch.sum(dim=0)
        products = products + batch.T @ batch
    mean = total / count
    covariance = (products - count * mean.outer(mean)) / (count - 1)
    return mean, covariance


def summary(features: dict, reference_rows: dict) -> dict:
    """What is needed of real images' features, on the CPU: mean, covariance, the first rows."""
    tensors = {}
    for name, rows in reference_rows.items():
        mean, covariance = moments(features[name].split(1000))
        tensors[name] = features[name][:rows].cpu().clone()
        tensors[f"{name}.mean"] = mean.cpu()
        tensors[f"{name}.cov"] = covariance.cpu()
    return tensors


def frechet_distance(
    mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor
) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^1/2) of means (D,) and covariances (D, D).

    The trace of the root is that of (C1^1/2 C2 C1^1/2)^1/2, which is symmetric.
    Source: Heusel et al., arXiv 1706.08500, eq. 6.
    """
    difference = mean1.double() - mean2.double()
    covariance1 = covariance1.double()
    covariance2 = covariance2.double()
    values, vectors = torch.linalg.eigh(covariance1)
    root1 = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    squares = torch.linalg.eigvalsh(root1 @ covariance2 @ root1)
    trace_of_root = squares.clamp(min=0).sqrt().sum()
    traces = covariance1.trace() + covariance2.trace() - 2 * trace_of_root
    return (difference.square().sum() + traces).item()


def kernel_distance(
    x: Tensor, y: Tensor, subsets: int = 100, size: int = 1000, seed: int = 0
) -> float:
    """Unbiased squared MMD under (<a, b> / D + 1)^3, mean over random subsets. (N, D), (M, D).

    Each subset takes `size` rows of x and of y without replacement, fewer where there are fewer.
    Source: Binkowski et al., arXiv 1801.01401, eq. 4 and section 4.
    """
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for _ in range(subsets):
        a = random_rows(x, size, generator)
        b = random_rows(y, size, generator)
        total += whole_kernel_distance(a, b, mean_within(b))
    return total / subsets


def whole_kernel_distance(x: Tensor, y: Tensor, within_y: float) -> float:
    """kernel_distance in one subset of all rows, (N, D) and (M, D): what its subsets estimate.

    within_y: mean_within(y), which is known of real images beforehand.
    """
    x = x.double()
    between = sum(cubic_kernel(x, part.double()).sum().item() for part in y.split(ROWS))
    return mean_within(x) + within_y - 2 * between / (len(x) * len(y))


def mean_within(x: Tensor) -> float:
    """Mean of the kernel over all pairs of different rows of x (N, D)."""
    total = 0.0
    parts = x.double().split(ROWS)
    for i, part in enumerate(parts):  # of two parts that differ, one order stands for both
        total += sum(2 * cubic_kernel(part, other).sum().item() for other in parts[:i])
        own = cubic_kernel(part, part)
        total += (own.sum() - own.trace()).item()
    return total / (len(x) * (len(x) - 1))


def random_rows(x: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """At most `size` rows of x (N, D), drawn on the CPU without replacement, as float64."""
    order = torch.randperm(len(x), generator=generator)
    return x[order[:size].to(x.device)].double()


def cubic_kernel(a: Tensor, b: Tensor) -> Tensor:
    """(n, D), (m, D) -> (n, m)."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Shares of fake inside the real manifold and of real inside the fake one. (N, D), (M, D).

    A manifold is the union of balls around its points, each as large as the distance to the
    point's k-th neighbour. Source: Kynkaanniemi et al., arXiv 1904.06991, eq. 1 and 2.
    """
    real = real.double()
    fake = fake.double()
    return share_covered(real, fake, k), share_covered(fake, real, k)


def share_covered(points: Tensor, queries: Tensor, k: int) -> float:
    """Share of queries (M, D) that lie in the ball of at least one point (N, D)."""
    radii = []
    for part in points.split(ROWS):
        distances = torch.cdist(part, points)
        radii.append(distances.kthvalue(k + 1, dim=1).values)  # the nearest is the point itself
    radius = torch.cat(radii)
    covered = 0
    for part in queries.split(ROWS):
        inside = torch.cdist(part, points) <= radius
        covered += inside.any(dim=1).sum().item()
    return covered / len(queries)


def inception_score(logits: Tensor, chunk: int = 5000) -> float:
    """exp of the mean KL(p(y|x), p(y)), mean over chunks. (N, classes). arXiv 1606.03498."""
    scores = []
    for part in logits.double().split(chunk):
        given_image = part.softmax(dim=1)
        overall = given_image.mean(dim=0)
        # The mean KL is the mean of sum p log p less the same sum of the overall distribution.
        negentropy = torch.special.xlogy(given_image, given_image).sum(dim=1).mean()
        overall_negentropy = torch.special.xlogy(overall, overall).sum()
        scores.append((negentropy - overall_negentropy).exp())
    return torch.stack(scores).mean().item()


def nearest(real: Tensor, fake: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosines (M, k), float64, and rows (M, k) of the k nearest of real (N, D) to fake (M, D)."""
    real = F.normalize(real.double())
    found = [(F.normalize(part.double()) @ real.T).topk(k) for part in fake.split(ROWS)]
    cosines, rows = zip(*found, strict=True)
    return torch.cat(cosines), torch.cat(rows)


def thumbnails(images: Tensor, size: int = 12) -> Tensor:
    """uint8 (B, 3, H, W) -> uint8 (B, 3, size, size), by areas."""
    return F.interpolate(images.float(), size, mode="area").round().to(torch.uint8)


def nearest_thumbnail(real: Tensor, fake: Tensor) -> Tensor:
    """Cosine (M,), float32, of each of fake to the nearest of real, mirrored ones with them.

    Thumbnails (N, 3, h, w) and (M, 3, h, w), each less its mean. In float32, since only a share of
    them is counted.
    """

    def unit(images: Tensor) -> Tensor:
        values = images.flatten(1).float()
        return F.normalize(values - values.mean(dim=1, keepdim=True))

    both = unit(torch.cat([fake, fake.flip(3)]))
    best = [(both @ unit(part).T).amax(dim=1) for part in real.split(10 * ROWS)]
    return torch.maximum(*torch.stack(best).amax(dim=0).chunk(2))


def neighbour_accuracy(cosines: Tensor, rows: Tensor, real_labels: Tensor, labels: Tensor) -> float:
    """Share of samples whose nearest real ones (M, k) vote for their label (M,).

    Near is a large cosine. Of labels with as many votes, that of the nearer neighbours wins.
    """
    votes = cosines.new_zeros(len(labels), int(real_labels.max()) + 1)
    votes.scatter_add_(1, real_labels[rows], 1 + cosines / 1000)
    return (votes.argmax(dim=1) == labels).sum().item() / len(labels)


def copy_threshold(cosines: Tensor) -> Tensor:
    """The cosine to their nearest training image that 1 % of real test images exceed. (M,)."""
    return cosines.quantile(0.99)


def share_of_copies(cosines: Tensor, threshold: Tensor) -> float:
    """Share of samples that are nearer to a training image than 99 % of test images. (M,)."""
    return (cosines > threshold).double().mean().item()
