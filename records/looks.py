"""What quick looks at samples share: a run's networks, the referee's noise, its lite judge."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

import eval_speedrun
from data.common import World, import_snapshot, read_captions
from data.guest import unit_noise
from data.networks import Lite
from data.reference import reference

BATCH = 100


def load(script, path):
    """A script's model from a checkpoint or, of a run's folder, the last; its networks compiled."""
    path = Path(path)
    if path.is_dir():
        path = max(path.glob("step_*.safetensors"))
    model, _ = script.load_checkpoint(path)
    for network in (model, model.weak):
        network.forward = torch.compile(network.forward, dynamic=False)
    return model


def finished(run: Path) -> tuple:
    """The script of a run's folder, its last model, the judge of its track. Raises UserError."""
    script = import_snapshot(run / "train_speedrun.py")
    model = load(script, run)
    return script, model, Judge(model.track)


class Judge:
    """KD-lite and accuracy of any number of images, as the referee finds them. Raises UserError."""

    def __init__(self, track):
        world = World()
        self.track = track
        self.captions = read_captions(track.name)
        self.lite = Lite(self.captions, world.device)
        self.real, _ = reference(track, "lite", self.lite, world)

    def batches(self, rows: list[int]) -> Iterator[tuple]:
        """Texts (B, text_width) of the captions `rows`, and what draws their noise (B, C, H, W)."""
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH]
            seeds = [eval_speedrun.NOISE_SEED + start + i for i in range(len(part))]
            draws = unit_noise(seeds, self.track.shape, torch.device("cpu"))
            yield self.captions.pooled[part], draws

    def features(self, images: Tensor, rows: list[int]) -> dict:
        """Of images uint8 (N, C, H, W) under the captions `rows`."""
        cuts = [slice(start, start + BATCH) for start in range(0, len(rows), BATCH)]
        parts = [self.lite(images[cut], rows[cut]) for cut in cuts]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def score(self, features: dict) -> tuple[float, float]:
        """KD-lite and prompt accuracy."""
        distance, accuracy, *_ = Lite.values(self.real, features)
        return distance, accuracy
