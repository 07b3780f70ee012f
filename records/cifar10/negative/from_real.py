"""Where a sampler leaves the real images: KD-lite and accuracy by the time it begins at.

    python records/cifar10/negative/from_real.py RUN 500

RUN is a folder of logs/ with its checkpoints. Real test images get noise up to a time of the
script's own grid and are brought back by its sampler under their captions, with both kinds of
guidance and without any: what a line has more than the one before it is lost in that step. Below
it the same where the mean of their features is moved to that of the real images; at the end real
images with a little noise, for comparison.
"""

import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import torch
from look import SAMPLER, sample

from data.common import read_split
from eval_speedrun import to_uint8
from records.looks import BATCH, finished


@torch.no_grad()
def main():
    run, count = Path(sys.argv[1]), int(sys.argv[2])
    script, model, judge = finished(run)
    images, labels = read_split("cifar10", "val", "latents")
    images = script.to_model_scale(model.track, images[:count])
    rows = [judge.captions.first_of_labels()[label] for label in labels[:count].tolist()]
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    parts = [slice(start, start + BATCH) for start in range(0, count, BATCH)]

    def score(name: str, x: torch.Tensor) -> dict:
        features = judge.features(to_uint8(x), rows)
        kd, accuracy = judge.score(features)
        print(f"{name}: KD {kd:.1f}, accuracy {accuracy:.3f}", flush=True)
        return features

    guided = SimpleNamespace(**SAMPLER | asdict(model.cfg))
    plain = SimpleNamespace(**vars(guided) | {"guidance": 1.0, "autoguidance": 0.0})
    times = script.sampling_times(guided)
    for begin in range(len(times) - 2, -1, -1):
        x = (1 - times[begin]) * images + times[begin] * noise
        for name, look in (("guided", guided), ("without guidance", plain)):
            back = []
            for part in parts:
                text = judge.captions.pooled[rows[part]]
                back.append(sample(script, model, model, x[part], text, look, times[begin:]))
            features = score(f"from t={times[begin]:.3f}, {name}", torch.cat(back))
            moved = features["lite"].double()
            moved = moved - moved.mean(0) + judge.real["lite"].double().mean(0)
            kd, _ = judge.score(features | {"lite": moved})
            print(f"  its features moved to the real images' mean: KD {kd:.1f}")
    for deviation in (0.0, 0.01, 0.03):
        score(f"real images and noise of deviation {deviation}", images + deviation * noise)


if __name__ == "__main__":
    main()
