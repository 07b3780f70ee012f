"""The validation loss, on the contract's noise and times and on others that nobody can know.

The contract's are public: a velocity network could look a time up, subtract its noise and return
the image. On draws from the system's randomness that is no help. Not to be edited for a record.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

from data.common import Captions, UserError, read_split
from data.metrics import BATCH

DRAWS_SEED = 2025  # of the contract's validation draws
COUNTED = 2  # batches of a pass that run as plain PyTorch, with their FLOPs counted
PARTS = 16  # of [0, 1]: in each, how far errors of like t differ is measured by itself
ERRORS = 5  # standard errors by which a loss on other draws may exceed the logged one


@dataclass
class Validation:
    """Errors of all validation images under one set of draws."""

    loss: float
    errors: Tensor  # (count,) float64: each image's mean squared velocity error
    t: Tensor  # (count,)
    inputs: tuple  # x_t, t, text of the first batch

    def standard_error(self) -> float:
        """Of the mean of errors whose times are spread evenly: one in each of `count` parts.

        Neighbours in t differ by chance alone: sum (e_i+1 - e_i)^2 / 2 is (n - 1) variances.
        A difference counts as five median ones of its part of [0, 1] at most. Where all errors are
        large, as at small t where the image is predicted, they may differ by more. Wild images do
        not widen the error: half of a part must be wild, and of a race's 4,096 images so many raise
        the loss by more than they let pass.
        """
        differences = self.errors[self.t.argsort()].diff().abs()
        parts = differences.chunk(PARTS)
        differences = torch.cat([part.clamp(max=5 * part.median()) for part in parts])
        variance = differences.square().mean().item() / 2
        return math.sqrt(variance / len(self.errors))


def validation_draws(shape: tuple, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise (count, *shape) and times (count,), CPU float32, as the contract draws them.

    The times of other seeds than the contract's lie anywhere in their `count` parts of [0, 1].
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, *shape, generator=generator)
    order = torch.randperm(count, generator=generator)
    place = 0.5 if seed == DRAWS_SEED else torch.rand(count, generator=generator)
    return noise, (order + place) / count


def validate(
    track: SimpleNamespace, velocity: Callable, captions: Captions, seed: int
) -> Validation:
    """Mean squared error of velocity(x_t, t, text, compiled) over the track's validation images.

    x_t = (1 - t) x + t noise and its velocity is noise - x (arXiv 2209.03003). Each image comes
    with its label's first caption. All batches have one size: the last is filled up from the first.
    Raises UserError where images are missing.
    """
    count = track.val_images
    latents, labels = read_split(track.name, "val")
    if len(latents) < count or latents.shape[1:] != track.shape:
        found = f"{len(latents)} validation images {tuple(latents.shape[1:])}"
        mend = f"run: python data/download.py {track.name}"
        raise UserError(f"data/{track.name} holds {found}, not {count} {track.shape}; {mend}")
    noise, t = validation_draws(track.shape, count, seed)
    caption_of_label = torch.tensor(captions.first_of_labels())
    total = 0.0
    errors = []
    starts = range(0, count, BATCH)
    counted = random.SystemRandom().sample(starts, min(COUNTED, len(starts)))
    for start in starts:
        part = torch.arange(start, start + BATCH) % count
        x = (latents[part].float() - track.shift) * track.scale
        mix = t[part].view(-1, 1, 1, 1)
        x_t = (1 - mix) * x + mix * noise[part]
        text = captions.pooled[caption_of_label[labels[part]]]
        found = velocity(x_t, t[part], text, compiled=start not in counted)
        error = found.double() - (noise[part] - x)
        errors.append(error.square().mean(dim=(1, 2, 3))[: count - start])
        total += errors[-1].sum().item()
        if start == 0:
            inputs = (x_t, t[part], text)
    return Validation(total / count, torch.cat(errors), t, inputs)


def refuse_looked_up(logged: float, fresh: Validation):
    """Raises UserError where a loss is lower in the log than on draws that nobody could know.

    The two losses differ by chance by sqrt(2) standard errors. The contract's own errors do not
    enter: a run that has looked them up could make them as wide as it likes.
    """
    limit = logged + ERRORS * math.sqrt(2) * fresh.standard_error()
    if not fresh.loss <= limit:
        found = f"{fresh.loss:.5f} on noise and times drawn anew, {logged:.5f} in the log"
        raise UserError(f"validation loss {found}: more than {limit:.5f} is not chance")
