"""The referee's pictures: samples under their captions, and the curve of a run's checkpoints."""

import zipfile
from pathlib import Path

import numpy as np
from torch import Tensor

from data.common import UserError, write_atomic


def draw_grid(images: Tensor, captions: list[str], columns: int, path: Path):
    """Images (n, 3, H, W) uint8 in rows, each with its caption below. Small ones are enlarged."""
    from PIL import Image, ImageDraw, ImageFont

    size = max(96, images.shape[-1])
    font = ImageFont.load_default(size // 9)
    row_height = size + size // 9 + 10
    column_width = size + 4
    row_count = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * column_width, row_count * row_height), "white")
    pen = ImageDraw.Draw(sheet)
    for i, caption in enumerate(captions):
        x = i % columns * column_width + 2
        y = i // columns * row_height + 2
        tile = to_picture(images[i]).resize((size, size), Image.NEAREST)
        sheet.paste(tile, (x, y))
        pen.text((x + size / 2, y + size), caption, fill="black", font=font, anchor="ma")
    write_atomic(path, lambda file: sheet.save(file, format="PNG"))


def to_picture(image: Tensor):
    """uint8 (3, H, W) -> PIL image."""
    from PIL import Image

    return Image.fromarray(image.permute(1, 2, 0).cpu().numpy())


def write_npz(files: list[Path], path: Path):
    """PNG files of one size -> ADM's evaluator's .npz: arr_0, uint8 (count, H, W, 3).

    They are read one by one: 50,000 images of 256 pixels are 10 GB.
    """
    from PIL import Image

    with (
        zipfile.ZipFile(path, "w") as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as out,
    ):
        for i, file in enumerate(files):
            with Image.open(file) as picture:
                pixels = np.asarray(picture)
            if i == 0:
                shape = (len(files), *pixels.shape)
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(out, header)
            out.write(pixels.tobytes())


def draw_curve(runs: list[dict], path: Path):
    """Every checkpoint's metrics over wall clock and images seen, of one or more results.json.

    Dashed: the real test images' value. Raises UserError where two were measured differently.
    """
    from matplotlib.figure import Figure

    first = runs[0]
    for other in runs[1:]:
        refuse_mixed_rules(first, other)
    metrics = ["val_loss_logged", *first["checkpoints"][0]["metrics"]]
    figure = Figure(figsize=(10, 1 + 3 * len(metrics)), layout="constrained")
    grid = figure.subplots(len(metrics), 2, sharex="col", sharey="row", squeeze=False)
    for (over_seconds, over_images), metric in zip(grid, metrics, strict=True):
        over_seconds.set_ylabel(metric)
        draw_metric(over_seconds, runs, metric, "seconds", "training seconds")
        draw_metric(over_images, runs, metric, "images", "images seen")
    grid[-1, 0].legend()
    write_atomic(path, lambda file: figure.savefig(file, format="png"))


def refuse_mixed_rules(first: dict, other: dict):
    """Raises UserError where two results were not measured by the same rules."""
    for key in first["rules"] | other["rules"]:
        rules = [run["rules"].get(key) for run in (first, other)]
        if rules[0] != rules[1]:
            runs = f"{first['run_id']} and {other['run_id']}"
            values = f"{rules[0]} and {rules[1]}"
            raise UserError(f"{runs} cannot share a curve: {key} is {values}; evaluate anew")


def draw_metric(axis, runs: list[dict], metric: str, key: str, label: str):
    """One metric of all runs over the checkpoints' `key`."""
    for run in runs:
        points = run["checkpoints"]
        values = [(point | point["metrics"])[metric] for point in points]
        axis.plot([point[key] for point in points], values, "o-", label=run["run_id"])
    if metric in runs[0]["real"]:
        axis.axhline(runs[0]["real"][metric], ls="--", c="gray", label="real test images")
    axis.set_xlabel(label)
    axis.label_outer()
    axis.grid(alpha=0.3)
