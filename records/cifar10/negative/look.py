"""Draws a few samples of a finished run with other samplers, and scores them: looks, no results.

    python records/cifar10/negative/look.py RUN 500 guidance=8 sample_steps=12,flips=1

RUN is a folder of logs/ with its checkpoints; what is not named is SAMPLER's. `churn` is the share
of the remaining noise that a step replaces by fresh noise, where t is in churn_interval; `flips=1`
takes the mean of the velocities of a picture and of its mirror image (twice the evaluations that
are printed); `weak` is a checkpoint whose earlier EMA takes the place of this run's, or with
`weak_is_ema=1` its own EMA; `other` one that is asked in this run's place where t is above `above`.
"""

import ast
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from eval_speedrun import to_uint8  # noqa: E402
from records.looks import finished, load  # noqa: E402

SAMPLER = dict(
    sample_steps=16,
    sample_shift=1.2,
    last_step=0.03,
    guidance=8.0,
    guidance_interval=(0.1, 0.65),
    autoguidance=2.0,
    autoguidance_interval=(0.1, 0.95),
    churn=0.0,
    churn_interval=(0.0, 1.0),
    flips=0,
    weak="",
    weak_is_ema=0,
    other="",
    above=1.0,
)


def sample(script, own, other, x, text, look, times) -> torch.Tensor:
    """The script's own Euler sampler, with ancestral steps: x (B, C, H, W) at times[0] -> at 0."""

    def velocity(model, x, rows, text) -> torch.Tensor:
        v = script.velocity(model, x, rows, text)
        if look.flips:
            v = (v + script.velocity(model, x.flip(-1), rows, text).flip(-1)) / 2
        return v

    generator = torch.Generator().manual_seed(7)
    null = own.null_text(len(x)).contiguous()
    for t, t_next in zip(times, times[1:]):
        model = other if t > look.above else own
        from_null, from_weak = script.guidance_at(t, look)
        rows = torch.full((len(x),), t)
        v = velocity(model, x, rows, text)
        way = 0.0
        if from_null:
            way = from_null * (v - velocity(model, x, rows, null))
        if from_weak:
            way = way + from_weak * (v - velocity(model.weak, x, rows, text))
        v = v + way
        churn = look.churn if look.churn_interval[0] <= t <= look.churn_interval[1] else 0.0
        fresh = torch.randn(x.shape, generator=generator)
        kept = math.sqrt(1 - churn**2) * (x + (1 - t) * v) + churn * fresh
        x = (1 - t_next) * (x - t * v) + t_next * kept
    return x


@torch.no_grad()
def main():
    run, count, *looks = Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
    script, model, judge = finished(run)
    own_weak = model.weak
    rows = judge.captions.balanced(count)
    for changes in looks:
        given = ast.parse(f"dict({changes})", mode="eval").body.keywords
        given = {word.arg: ast.literal_eval(word.value) for word in given}
        look = SimpleNamespace(**SAMPLER | given)
        other = load(script, look.other) if look.other else model
        model.weak = own_weak
        if look.weak:
            donor = load(script, look.weak)
            model.weak = donor if look.weak_is_ema else donor.weak
        times = script.sampling_times(look)
        images = []
        for text, draws in judge.batches(rows):
            x = sample(script, model, other, draws(), text, look, times)
            images.append(to_uint8(x))
        kd, accuracy = judge.score(judge.features(torch.cat(images), rows))
        print(f"{changes}: {script.sampling_nfe(look)} nfe, KD {kd:.1f}, accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
