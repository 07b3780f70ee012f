"""Draws three pictures a sample and keeps one by the network's own judgement: does it help?

    python records/cifar10/negative/best_of_three.py RUN 1000

RUN is a folder of logs/ with its checkpoints. A judgement is how much nearer the finished picture
is to the network's guess of it than to another guess: to that under the null caption ("caption"),
or that of the earlier EMA ("ema"); at a time of the sampler on the way, which costs nothing, or of
the finished picture with fresh noise ("again"). A line is a judgement and its time; the first
lines are the three draws by themselves.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from eval_speedrun import to_uint8  # noqa: E402
from records.looks import finished  # noqa: E402

DRAWS = 3
AGAIN = (0.25, 0.4, 0.55, 0.7, 0.85)


def guesses(script, model, x: Tensor, t: float, text: Tensor) -> tuple:
    """Velocity and the finished pictures (B, C, H, W) guessed from x: own, null's, earlier EMA's."""
    rows = torch.full((len(x),), t)
    null = model.null_text(len(x)).contiguous()
    own = script.velocity(model, x, rows, text)
    others = [script.velocity(model, x, rows, null), script.velocity(model.weak, x, rows, text)]
    return own, *(x - t * v for v in (own, *others))


def judgements(x: Tensor, own: Tensor, null: Tensor, weak: Tensor) -> Tensor:
    """(2, B): by how much x is nearer to `own` than to the others, mean squares."""
    far = [(x - guess).square().mean(dim=(1, 2, 3)) for guess in (own, null, weak)]
    return torch.stack([far[1] - far[0], far[2] - far[0]])


def draw(script, model, noise: Tensor, text: Tensor, fresh: Tensor) -> tuple[Tensor, dict]:
    """Pictures (B, C, H, W) of the script's Euler sampler, and every judgement of them (B,)."""
    x = noise
    times = script.sampling_times(model.cfg)
    way = []
    for t, t_next in zip(times, times[1:]):
        v, own, null, weak = guesses(script, model, x, t, text)
        from_null, from_weak = script.guidance_at(t, model.cfg)
        way.append((t, own, null, weak))
        x = x + (t_next - t) * (v + from_null * (null - own) / t + from_weak * (weak - own) / t)
    found = {}
    for t, *seen in way:
        found[f"caption {t:.2f}"], found[f"ema {t:.2f}"] = judgements(x, *seen)
    for t in AGAIN:
        _, *seen = guesses(script, model, (1 - t) * x + t * fresh, t, text)
        found[f"caption again {t}"], found[f"ema again {t}"] = judgements(x, *seen)
    return x, found


@torch.no_grad()
def main():
    run, count = Path(sys.argv[1]), int(sys.argv[2])
    script, model, judge = finished(run)
    rows = judge.captions.balanced(count)
    draws = [[] for _ in range(DRAWS)]
    for text, noises in judge.batches(rows):
        for parts in draws:
            x, found = draw(script, model, noises(), text, noises())
            parts.append((to_uint8(x), found))
    seen = [judge.features(torch.cat([x for x, _ in parts]), rows) for parts in draws]
    seen = {name: torch.stack([features[name] for features in seen]) for name in seen[0]}
    names = draws[0][0][1]
    found = {
        name: torch.stack([torch.cat([found[name] for _, found in parts]) for parts in draws])
        for name in names
    }  # (DRAWS, count) each
    choices = {f"draw {k}": torch.full((count,), k) for k in range(DRAWS)}
    choices |= {name: values.argmax(0) for name, values in found.items()}
    for kind in ("caption ", "ema ", "caption again ", "ema again "):
        own = [values for name, values in found.items() if name.rpartition(" ")[0] + " " == kind]
        choices[kind + "all"] = sum(values / values.std() for values in own).argmax(0)
    for name, choice in choices.items():
        kept = {key: values[choice, torch.arange(count)] for key, values in seen.items()}
        kd, accuracy = judge.score(kept)
        print(f"{name}: KD {kd:.1f}, accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
