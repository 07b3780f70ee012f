"""Rehearses the imagenet256 track on any photos: shards, training, evaluation, each killed once.

    IMAGES=DIR python records/imagenet256/rehearsal/rehearse.py      DIR: class folders of photos
    IMAGES=DIR PHOTOS=5000 SAMPLES=500 python ...                    more of them: on GPUs

Each phase runs in as many processes as there are GPUs, or in two. Once a part of its work lies in
files, one process is ended by SIGKILL; the same command then continues, and what stood must stand
unchanged. Everything is written to logs/rehearsal: log.txt has each command, what it printed, and
at its end the tables of README.md.

It is the track's own code at the track's own sizes, but for what is listed here. The config is
small (`SHORT`), a quarter of the photos are held out, a shard has 20 photos and a batch of the
referee 8 images; there are as many classes as folders, with one caption each. Weights that cannot
be had are random, of the same networks (`STAND_INS`); without DINOv2-L the judge is
EfficientNet-lite0, whose weights are real.
"""

import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

HERE = Path(__file__).resolve()
ROOT = HERE.parents[3]
sys.path.insert(0, str(ROOT))  # this file is run as a script

import eval_speedrun  # noqa: E402
from data import download, encoders, metrics, networks, reference, shards, validation  # noqa: E402
from data.common import UserError, machine, now  # noqa: E402

HOME = ROOT / "logs" / "rehearsal"
METERS = HOME / "meters.jsonl"
PHOTOS = int(os.environ.get("PHOTOS", 64))  # that are taken, evenly spaced
SAMPLES = int(os.environ.get("SAMPLES", 10))  # of each of three checkpoints
PROCESSES = torch.cuda.device_count() or 2
SHORT = (
    f"width=192, depth=6, batch_size={4 * PROCESSES}, steps=60, evals=3, save_every=10, "
    f"sample_steps=10, compile={torch.cuda.is_available()}"
)
TRACK = 'Track("imagenet256", (32, 16, 16), "float16", 0.0, 0.3099, {}, 768, {}, 100)'

# How many of each the whole track has: photos; class names, alone and in 80 templates; samples of
# five checkpoints and of the last one, and ADM's 10,000 real images
WHOLE = {
    "photo read and cropped": 1_281_167,
    "photo to latent (INVAE)": 1_281_167,
    "photo to tokens (DINOv2-B)": 1_281_167,
    "caption (CLIP ViT-L/14)": 81_000,
    "sample decoded (INVAE)": 55_000,
    "image judged": 65_000,
}

# ---------------------------------------------------------------------------------------------
# Inside of a phase
# ---------------------------------------------------------------------------------------------


class FrechetLite(networks.Lite):
    """In place of DINOv2-L's Frechet distance: EfficientNet-lite0's."""

    metrics = ("FDD-lite",)
    reference_rows = {"lite": 0}
    compare = property()  # hasattr says that there is none

    @staticmethod
    def values(real: dict, fake: dict) -> tuple:
        return (networks.distance_to_reference(real, fake, "lite"),)


def with_stand_ins(plain: Callable) -> Callable:
    """networks.weights, with the stand-in of what cannot be had."""

    def weights(what: str) -> Path:
        try:
            return plain(what)
        except UserError:
            for path in HOME.glob(f"stand-ins/{what}.*"):
                return path
            raise

    return weights


def meter(owner, name: str, what: str):
    """Has owner.name note how many items it took, and its seconds of clock and of processor."""
    plain = getattr(owner, name)

    def metered(*arguments):
        clock, processor = now(), time.process_time()
        items = plain(*arguments)
        spent = [now() - clock, time.process_time() - processor]
        count = len(next(iter(items.values()))) if isinstance(items, dict) else len(items)
        with open(METERS, "a") as file:  # a line at a time, of all processes
            file.write(json.dumps([os.environ["LEG"], what, count, *spent]) + "\n")
        return items

    setattr(owner, name, metered)


def phase(name: str, arguments: list[str]) -> int:
    """data/download.py or eval_speedrun.py at small sizes, metered. Returns the exit code."""
    import open_clip

    open_clip.IMAGENET_CLASSNAMES = open_clip.IMAGENET_CLASSNAMES[: len([*HOME.glob("photos/*")])]
    networks.weights = reference.weights = with_stand_ins(networks.weights)
    download.ROOT = HOME / "data"
    shards.SHARD = 20
    eval_speedrun.GRID_ROWS = 1
    for module in (eval_speedrun, metrics, validation):
        module.BATCH = 8
    try:
        networks.weights("dinov2")
    except UserError:
        networks.NETWORKS["dinov2"] = FrechetLite
    meter(encoders.Photos, "pixels", "photo read and cropped")
    meter(encoders.Autoencoder, "encode", "photo to latent (INVAE)")
    meter(encoders.PatchFeatures, "tokens", "photo to tokens (DINOv2-B)")
    meter(download, "clip_text", "caption (CLIP ViT-L/14)")
    meter(encoders.Autoencoder, "decode", "sample decoded (INVAE)")
    meter(networks.NETWORKS["dinov2"], "__call__", "image judged")
    return {"download": download, "evaluate": eval_speedrun}[name].main(arguments)


# ---------------------------------------------------------------------------------------------
# What is prepared
# ---------------------------------------------------------------------------------------------


def choose_photos(folder: Path) -> list[Path]:
    """Links to PHOTOS of the photos, evenly spaced, in class folders of the same names."""
    files = [file for file in sorted(folder.glob("*/*")) if file.suffix.lower() in encoders.ENDINGS]
    if len(files) < PHOTOS:
        raise UserError(f"{folder} holds {len(files)} photos in class folders, not {PHOTOS}")
    links = []
    for i in np.linspace(0, len(files) - 1, PHOTOS).astype(int):
        links.append(HOME / "photos" / files[i].parent.name / files[i].name)
        links[-1].parent.mkdir(parents=True, exist_ok=True)
        links[-1].symlink_to(files[i].resolve())
    return links


def random_clip() -> dict:
    import open_clip

    return open_clip.create_model("ViT-L-14-quickgelu").state_dict()


def random_dinov2() -> dict:
    import timm

    return timm.create_model("vit_base_patch14_dinov2", num_classes=0).state_dict()


STAND_INS = {
    "autoencoder": lambda: encoders.Autoencoder().state_dict(),
    "dinov2-b": random_dinov2,
    "ViT-L-14-quickgelu": random_clip,
}


def make_stand_ins(photos: list[Path]) -> list[str]:
    """Random weights of the networks that cannot be had, and the photos as ADM's batch: names."""
    folder = HOME / "stand-ins"
    folder.mkdir()
    torch.manual_seed(0)
    made = []
    for what in (*STAND_INS, "ADM reference", "dinov2", "judge"):
        try:
            networks.weights(what)
            continue
        except UserError:
            made.append(what)
        if what in STAND_INS:
            save_file(STAND_INS[what](), folder / f"{what}.safetensors")
        elif what == "ADM reference":
            crops = [encoders.read_photo(photo, 256) for photo in photos]
            np.savez(folder / f"{what}.npz", arr_0=np.stack(crops))
    return made


def shorten_script(val_images: int):
    """The training script with another row of the track and one more config."""
    source = (ROOT / "train_speedrun.py").read_text()
    row = TRACK.format("1_277_071", 4096)
    start = '\nif __name__ == "__main__":'
    assert source.count(row) == source.count(start) == 1, "train_speedrun.py has changed: see TRACK"
    config = f'\nCONFIGS["rehearsal"] = replace(CONFIGS["imagenet256"], {SHORT})\n'
    source = source.replace(row, TRACK.format(0, val_images)).replace(start, config + start)
    (HOME / "train_speedrun.py").write_text(source)


# ---------------------------------------------------------------------------------------------
# The phases, each killed once
# ---------------------------------------------------------------------------------------------


def spent() -> np.ndarray:
    """Seconds of the clock, and of processors in all processes that were waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return np.array([time.perf_counter(), used.ru_utime + used.ru_stime])


def start(leg: str, command: list, log, **environment) -> subprocess.Popen:
    """The command under torchrun, in HOME, its output in the log."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, f"--nproc_per_node={PROCESSES}", *map(str, command)]
    print(f"\n== {leg}: {' '.join(command[1:])}", file=log, flush=True)
    inherited = {name: value for name, value in os.environ.items() if name != "RESUME"}
    environment = inherited | {"LEG": leg, "PYTHONPATH": str(ROOT)} | environment
    return subprocess.Popen(
        command, cwd=HOME, env=environment, stdout=log, stderr=subprocess.STDOUT
    )


def run_killed(name: str, command: list, parts: str, log, said: str = "") -> str:
    """Runs a phase, kills it once there are two of its `parts`, runs it to its end.

    parts: a pattern of files in HOME. said: what the log must say besides; then the phase is
    training, whose folder RESUME names. Returns the row of the table.
    """
    began = spent()
    launcher = start(f"{name}, killed", command, log)
    stood = {}  # when each part was written
    while len(stood) < 2 or said not in (HOME / "log.txt").read_text():
        stood = {path: path.stat().st_mtime_ns for path in HOME.glob(parts)}
        if launcher.poll() is not None:
            raise UserError(f"{name} ended before it could be killed: see {HOME}/log.txt")
        time.sleep(0.2)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert launcher.wait() != 0, f"{name} does not say that a process of it was killed"
    killed_after = spent() - began
    environment = {"RESUME": str(next(iter(stood)).parent)} if said else {}
    began = spent()
    if start(f"{name}, resumed", command, log, **environment).wait() != 0:
        raise UserError(f"{name} failed after it was resumed: see {HOME}/log.txt")
    changed = [path for path in stood if path.exists() and path.stat().st_mtime_ns != stood[path]]
    assert not changed, f"{name} wrote again what stood: {changed}"
    cells = [name, *killed_after, f"{len(stood)} files", *(spent() - began)]
    cells = [cell if isinstance(cell, str) else f"{cell:.0f}" for cell in cells]
    return f"| {' | '.join(cells)} |"


def rehearse(photos: Path, log) -> list[str]:
    """All phases in turn; the lines of the tables."""
    chosen = choose_photos(photos)
    stand_ins = make_stand_ins(chosen)
    order = ["imagenet256", "--images", "photos", "--features", "--templates", 0]
    rows = [
        "| phase | seconds until killed | of processors | stood then | resumed: seconds to the end "
        "| of processors |",
        "|---|---|---|---|---|---|",
    ]
    command = [HERE, "download", *order]
    rows.append(run_killed("download", command, "data/imagenet256/train_*.safetensors", log))
    shorten_script(val_images=PHOTOS // 4)
    command = ["train_speedrun.py", "rehearsal"]
    checkpoints = "logs/*/step_*.safetensors"
    rows.append(run_killed("training", command, checkpoints, log, "step:50/60"))
    run = next(HOME.glob(checkpoints)).parent
    command = [HERE, "evaluate", run.relative_to(HOME), "--images", SAMPLES]
    parts = "logs/*/evaluation/*/*.safetensors"
    rows.append(run_killed("evaluation", command, parts, log))
    results = json.loads((run / "results.json").read_text())
    sizes = [os.path.getsize(photo) for photo in chosen]
    about = [
        f"{PHOTOS} photos of {np.mean(sizes) / 1000:.0f} kB on average, {PROCESSES} processes",
        f"{machine(torch.device('cuda' if torch.cuda.is_available() else 'cpu'))}, "
        f"python {platform.python_version()}, torch {torch.__version__}",
        f"could not be had: {', '.join(stand_ins) or 'nothing was missing'}",
        f"metrics: {results['metrics']}",
        f"training: {results['images']} images in {results['train_seconds']:.1f} s on the clock",
    ]
    return [*about, "", *rows, "", *table_of_parts()]


def table_of_parts() -> list[str]:
    """What each part of the work took, and a forecast of the whole track by it.

    Without a GPU, of the processor's time, which other work on the machine hardly changes.
    """
    per = "GPU" if torch.cuda.is_available() else "core"
    totals = {}
    for line in METERS.read_text().splitlines():
        _, what, *numbers = json.loads(line)
        totals[what] = np.add(totals.get(what, 0), numbers)
    rows = [f"| part | items | {per}-seconds | items/s per {per} | whole track | forecast |"]
    rows.append("|---|---|---|---|---|---|")
    for what, count in WHOLE.items():
        items, clock, processor = totals[what]
        spent = clock if torch.cuda.is_available() else processor
        hours = count * spent / items / 3600
        rate = f"{items:.0f} | {spent:.1f} | {items / spent:.3g}"
        rows.append(f"| {what} | {rate} | {count:,} | {hours:,.1f} {per}-hours |")
    return rows


def main() -> int:
    """Exit code: 0, or 2 after one line that says what to mend."""
    photos = Path(os.environ.get("IMAGES", "")).resolve()
    shutil.rmtree(HOME, ignore_errors=True)
    HOME.mkdir(parents=True)
    try:
        if "IMAGES" not in os.environ:
            raise UserError("IMAGES=DIR: name a folder of class folders of photos")
        with open(HOME / "log.txt", "a") as log:
            lines = rehearse(photos, log)
            print("\n" + "\n".join(lines), file=log)
        print("\n".join(lines))
    except UserError as error:
        print(f"rehearse.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(phase(sys.argv[1], sys.argv[2:]) if sys.argv[1:] else main())
