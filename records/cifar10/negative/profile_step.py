"""Where a training step of cifar10-cpu spends its time, by operation: milliseconds and a table.

python records/cifar10/negative/profile_step.py SCRIPT THREADS
"""

import sys
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from data.common import import_snapshot  # noqa: E402


def main():
    script = import_snapshot(Path(sys.argv[1]))
    torch.set_num_threads(int(sys.argv[2]))
    cfg = script.CONFIGS["cifar10-cpu"]
    track = script.TRACKS[cfg.track]
    world = script.World()
    state = script.State(cfg, 0, world)
    rows = dict(
        latents=torch.randint(0, 255, (cfg.batch_size, *track.shape)).byte(),
        labels=torch.randint(0, 10, (cfg.batch_size,)),
    )
    captions = script.load_captions(track, world.device)
    batch = script.make_batch(state.model, captions, rows, 0, 0, world)
    for _ in range(4):
        script.train_step(state, 0, batch)
    began = time.time()
    for _ in range(15):
        script.train_step(state, 0, batch)
    print(f"{(time.time() - began) / 15 * 1000:.1f} ms a step")
    with profile(activities=[ProfilerActivity.CPU]) as steps:
        for _ in range(5):
            script.train_step(state, 0, batch)
    print(steps.key_averages().table(sort_by="self_cpu_time_total", row_limit=22))


if __name__ == "__main__":
    main()
