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
from look import BATCH, SAMPLER, load, sample

import eval_speedrun
from data.common import World, import_snapshot, read_captions, read_split
from data.networks import Lite
from data.reference import reference


@torch.no_grad()
def main():
    run, count = Path(sys.argv[1]), int(sys.argv[2])
    world = World()
    script = import_snapshot(run / "train_speedrun.py")
    model = load(script, max(run.glob("step_*.safetensors")))
    captions = read_captions("cifar10")
    lite = Lite(captions, world.device)
    track = script.TRACKS["cifar10"]
    real, _ = reference(track, "lite", lite, world)
    images, labels = read_split("cifar10", "val", "latents")
    images = script.to_model_scale(track, images[:count])
    rows = [captions.first_of_labels()[label] for label in labels[:count].tolist()]
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    parts = [slice(start, start + BATCH) for start in range(0, count, BATCH)]

    def score(name: str, x: torch.Tensor) -> dict:
        seen = [lite(eval_speedrun.to_uint8(x[part]), rows[part]) for part in parts]
        fake = {key: torch.cat([features[key] for features in seen]) for key in seen[0]}
        kd, accuracy, *_ = Lite.values(real, fake)
        print(f"{name}: KD {kd:.1f}, accuracy {accuracy:.3f}", flush=True)
        return fake

    guided = SimpleNamespace(**SAMPLER | asdict(model.cfg))
    plain = SimpleNamespace(**vars(guided) | {"guidance": 1.0, "autoguidance": 0.0})
    times = script.sampling_times(guided)
    for begin in range(len(times) - 2, -1, -1):
        x = (1 - times[begin]) * images + times[begin] * noise
        for name, look in (("guided", guided), ("without guidance", plain)):
            back = []
            for part in parts:
                text = captions.pooled[rows[part]]
                back.append(sample(script, model, model, x[part], text, look, times[begin:]))
            features = score(f"from t={times[begin]:.3f}, {name}", torch.cat(back))
            moved = features["lite"].double()
            moved = moved - moved.mean(0) + real["lite"].double().mean(0)
            kd, *_ = Lite.values(real, features | {"lite": moved})
            print(f"  its features moved to the real images' mean: KD {kd:.1f}")
    for deviation in (0.0, 0.01, 0.03):
        score(f"real images and noise of deviation {deviation}", images + deviation * noise)


if __name__ == "__main__":
    main()
