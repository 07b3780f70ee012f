"""How much of a metric is chance: one run's samples, scored in disjoint sets of several sizes.

    python records/noise.py logs/<run_id> [--images 6000]

Prints mean and standard deviation of each metric over the sets: what another noise would change.
What another training seed changes is the spread of a series, see stats.py.
"""

import argparse
import shutil
import sys
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.common import UserError, World, read_captions  # noqa: E402
from data.metrics import features_of  # noqa: E402
from eval_speedrun import CURVE, Model, Panel, Sampler, load_run  # noqa: E402
from records.series import sd  # noqa: E402

SIZES = (250, 500, 1000, 2000)


def study(folder: Path, count: int, world: World) -> list[str]:
    """A Markdown table's lines, of `count` samples of the run's last checkpoint. UserError."""
    run = load_run(folder, world.device)
    captions = read_captions(run.track.name)
    rows = captions.balanced(count)
    with run.child:
        panel = Panel(CURVE[run.track.dtype], run, captions, count, world)
        sampler = Sampler(run, Model(run, run.checkpoints[-1][0], count), captions, world.device)
        features = features_of(
            lambda start, stop: (sampler(rows[start:stop], start), rows[start:stop]),
            count,
            panel.networks,
            folder / "noise",
            world,
            f"{count} samples",
        )
    world.wait()
    shutil.rmtree(folder / "noise", ignore_errors=True)
    lines = []
    for size in SIZES:
        sets = []
        for start in range(0, count - size + 1, size):
            part = {name: values[start : start + size] for name, values in features.items()}
            sets.append(panel.scores(list(panel.networks), part, size))
        if len(sets) < 2:
            continue
        if not lines:
            names = " | ".join(name.rpartition("-")[0] for name in sets[0])
            lines = [f"| samples | sets | {names} |", "|---" * (2 + len(sets[0])) + "|"]
        cells = []
        for name in sets[0]:
            values = [found[name] for found in sets]
            cells.append(f"{fmean(values):.4g} ± {sd(values):.2g}")
        lines.append(f"| {size} | {len(sets)} | {' | '.join(cells)} |")
    return lines


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a run: logs/<run_id>")
    parser.add_argument("--images", type=int, default=6000, help="samples to draw in all")
    arguments = parser.parse_args(argv)
    try:
        world = World()
        lines = study(arguments.run, arguments.images, world)
    except UserError as error:
        print(f"noise.py: {error}", file=sys.stderr)
        return 2
    if world.rank == 0:
        print("\n".join(lines))
    world.end()
    return 0


if __name__ == "__main__":
    sys.exit(main())
