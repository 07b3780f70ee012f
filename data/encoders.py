"""What tracks of latents are made with: the crop, the compressed features, the autoencoder, photos.

`data/download.py` turns photos into latents and features here; the referee decodes samples.
Definitions follow the sources named, to the resize. Not to be edited for a record.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data.common import UserError, World, product_dtype, progress, write_atomic
from data.networks import (
    IMAGENET,
    dinov2,
    enlarged,
    folded,
    lite,
    load_weights,
    tensor_bicubic,
)


def center_crop(image, size: int = 256) -> np.ndarray:
    """ADM's crop: halve by boxes above 2 size, bicubic to `size` at the shorter side, the centre.

    PIL image -> uint8 (size, size, 3). Source: center_crop_arr of arXiv 2105.05233's code.
    """
    from PIL import Image

    while min(image.size) >= 2 * size:
        halves = [side // 2 for side in image.size]
        image = image.resize(halves, Image.BOX)
    scale = size / min(image.size)
    sides = [round(side * scale) for side in image.size]
    pixels = np.asarray(image.resize(sides, Image.BICUBIC))
    top = (pixels.shape[0] - size) // 2
    left = (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


ENDINGS = (".jpeg", ".jpg", ".png")  # of a photo's file name, in small letters


def read_photo(file: Path, size: int, upright: bool = False) -> np.ndarray:
    """A photo's centre, uint8 (size, size, 3). Raises UserError.

    upright: turned as its camera says. ADM did not turn ImageNet's.
    """
    from PIL import Image, ImageOps

    try:
        photo = Image.open(file)
        if upright:
            photo = ImageOps.exif_transpose(photo)
        return center_crop(photo.convert("RGB"), size)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{file} is not a photo ({error}); replace or remove it")


# ---------------------------------------------------------------------------------------------
# Compressed features
# ---------------------------------------------------------------------------------------------

COMPONENTS = {"pca": 64, "full": 768}  # principal components kept of a token, by --features
PHOTOS_TO_FIT = 4  # for each component, or a class token's last ones would have no variance
NARROWEST = 0.01  # of the widest component's deviation: that of one which the photos hardly show


class PatchFeatures:
    """DINOv2-B/14 (arXiv 2304.07193) after the norm: class token, a patch for each latent's place.

    It sees 14 pixels for each 16 of the photo: 224 of 256, 448 of 512. The tokens are kept as int8
    in two PCA bases, one of class tokens and one of patches, fitted on some photos. A token is
    mean + widest * basis @ (int8 * scale); all of these are in features.safetensors, of whose
    `scale` (1 + patches, components) the training script takes the features' shape and steps.
    """

    KINDS = (slice(0, 1), slice(1, None))  # of the tokens: the class token, the patches
    width = 768  # of a token

    def __init__(self, device: torch.device, size: int = 256, components: int = 64):
        """size: pixels a side of the photos; components: how many are kept of a token."""
        self.side = size // 16  # patches
        self.components = components
        self.network = self.load_network(device)

    def load_network(self, device: torch.device) -> nn.Module:
        return dinov2("base", "dinov2-b", device, self.side)

    @torch.no_grad()
    def tokens(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, size, size) -> float (B, 1 + patches, width)."""
        return self.network.forward_features(tensor_bicubic(images, IMAGENET, 14 * self.side))

    def fit(self, batches: Iterable[Tensor], path: Path):
        """Fits both bases on batches of images and writes them to `path`. Raises UserError.

        mean (2, width), basis (2, width, components), widest (2, 1), explained share of the
        variance (2,), scale (1 + patches, components).
        """
        count = torch.zeros(2, 1)
        total = torch.zeros(2, self.width, dtype=torch.float64)
        products = torch.zeros(2, self.width, self.width, dtype=torch.float64)
        for images in batches:  # all their tokens would not fit into memory
            tokens = self.tokens(images).double()
            for i, kind in enumerate(self.KINDS):
                rows = tokens[:, kind].flatten(0, 1)
                count[i] += len(rows)
                total[i] += rows.sum(dim=0).cpu()
                products[i] += (rows.T @ rows).cpu()
        mean = total / count
        bases = []
        for i in range(2):
            covariance = products[i] / count[i] - mean[i].outer(mean[i])
            bases.append(principal_components(covariance, self.components))
        tensors = {name: torch.stack([basis[name] for basis in bases]) for name in bases[0]}
        tensors["mean"] = mean
        tensors["scale"] = tensors["scale"][[0] + [1] * self.side**2]
        tensors = {name: tensor.float().contiguous() for name, tensor in tensors.items()}
        write_atomic(path, lambda temporary: save_file(tensors, temporary))

    def load(self, path: Path, world: World):
        """Takes the bases that `fit` wrote, and says how much of the tokens they can express."""
        tensors = load_file(path)
        self.mean = tensors["mean"].to(world.device)
        self.basis = tensors["basis"].to(world.device)
        step = tensors["scale"][:2] * tensors["widest"]  # (2, components)
        self.step = step.to(world.device)
        of_class, of_patches = tensors["explained"]
        if world.rank == 0:
            print(
                f"{path}: {self.components} int8 values explain {of_class:.3f} of the class "
                f"tokens' variance, {of_patches:.3f} of the patches'",
                flush=True,
            )

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, size, size) -> int8 (B, 1 + patches, components), on the CPU."""
        tokens = self.tokens(images)
        parts = []
        for i, kind in enumerate(self.KINDS):
            components = (tokens[:, kind] - self.mean[i]) @ self.basis[i]
            parts.append(components / self.step[i])
        whole = torch.cat(parts, dim=1)
        return whole.round().clamp(-127, 127).to(torch.int8).cpu()


class SmallPatchFeatures(PatchFeatures):
    """EfficientNet-lite2 for images of 32 pixels: its pooled features, and its map of stride 16.

    It sees them four times enlarged, so that a patch is 4 x 4 of their pixels. Its weights are in
    the package index, and it is not the network that the referee asks.
    """

    width = 1280  # of the pooled features; a patch's 120 channels stand first, then zeros
    PATCH_STAGE = 4  # the last of those with stride 16

    def __init__(self, device: torch.device):
        super().__init__(device, size=128)

    def load_network(self, device: torch.device) -> nn.Module:
        net = folded(lite("tf_efficientnet_lite2", "lite2"))
        return net.to(device, product_dtype(device), memory_format=torch.channels_last)

    @torch.no_grad()
    def tokens(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, 32, 32) -> float (B, 1 + 64, 1280)."""
        net = self.network  # where the norms were, `folded` has left their activations
        x = net.bn1(net.conv_stem(enlarged(images)))
        maps = []
        for stage in net.blocks:
            x = stage(x)
            maps.append(x)
        pooled = net.global_pool(net.bn2(net.conv_head(x)))  # (B, 1280)
        patches = maps[self.PATCH_STAGE].flatten(2).mT  # (B, 64, 120)
        patches = F.pad(patches, (0, self.width - patches.shape[2]))
        return torch.cat([pooled[:, None], patches], dim=1).float()


def principal_components(covariance: Tensor, count: int) -> dict[str, Tensor]:
    """(width, width) -> basis (width, count), scale (count,), the deviation of the widest component
    (1,), the explained share of the variance ().

    scale is what a step of int8 is worth, in deviations of the widest component. It is the same
    for the first components, whose range is 4; where all are kept, the last would be rounded away,
    and each has a range of 6 deviations of its own.
    """
    values, vectors = torch.linalg.eigh(covariance)  # in ascending order
    values = values.flip(-1).clamp(min=1e-24)
    scale = torch.full_like(values, 4 / 127)
    if count == len(values):
        scale = 6 / 127 * (values / values[0]).sqrt().clamp(min=NARROWEST)
    return {
        "basis": vectors.flip(-1)[:, :count],
        "scale": scale[:count],
        "widest": values[:1].sqrt(),
        "explained": values[:count].sum() / values.sum(),
    }


# ---------------------------------------------------------------------------------------------
# The autoencoder. Its attributes bear the names of the published state dict
# ---------------------------------------------------------------------------------------------

WIDTHS = (128, 128, 256, 256, 512)  # channels of the levels, full resolution first
LATENT = 32  # channels of a latent


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResBlock(nn.Module):
    """Two convolutions beside a shortcut, which is a 1 x 1 convolution where the width changes."""

    def __init__(self, channels_in: int, channels: int):
        super().__init__()
        self.norm1 = group_norm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.norm2 = group_norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.nin_shortcut = nn.Identity()
        if channels_in != channels:
            self.nin_shortcut = nn.Conv2d(channels_in, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return self.nin_shortcut(x) + hidden


class Attention(nn.Module):
    """One head over all positions, beside a shortcut."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q = self.q(normed).flatten(2).mT  # (B, HW, C)
        k = self.k(normed).flatten(2).mT
        v = self.v(normed).flatten(2).mT
        mixed = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(mixed.mT.reshape(x.shape))


class Downsample(nn.Module):
    """Half the side. The padding is to the right and below alone, as the weights were trained."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the side, by the nearest neighbour."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0))


class Level(nn.Module):
    """Residual blocks of one resolution, with attention in the deepest level alone."""

    def __init__(self, channels_in: int, channels: int, blocks: int, attention: bool):
        super().__init__()
        self.block = nn.ModuleList([ResBlock(channels_in, channels)])
        for _ in range(blocks - 1):
            self.block.append(ResBlock(channels, channels))
        self.attn = nn.ModuleList()
        if attention:
            self.attn.extend(Attention(channels) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return x


class Middle(nn.Module):
    """Between the halves' levels and the latent."""

    def __init__(self, channels: int):
        super().__init__()
        self.block_1 = ResBlock(channels, channels)
        self.attn_1 = Attention(channels)
        self.block_2 = ResBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Pixels (B, 3, H, W) -> (B, 2 LATENT, H/16, W/16), of which quant_conv makes the posterior."""

    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(3, WIDTHS[0], 3, padding=1)
        self.down = nn.ModuleList()
        channels = WIDTHS[0]
        for depth, width in enumerate(WIDTHS):
            deepest = depth == len(WIDTHS) - 1
            level = Level(channels, width, blocks=2, attention=deepest)
            level.downsample = nn.Identity() if deepest else Downsample(width)
            self.down.append(level)
            channels = width
        self.mid = Middle(channels)
        self.norm_out = group_norm(channels)
        self.conv_out = nn.Conv2d(channels, 2 * LATENT, 3, padding=1)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv_in(pixels)
        for level in self.down:
            x = level.downsample(level(x))
        x = self.mid(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """(B, LATENT, H/16, W/16) -> pixels (B, 3, H, W)."""

    def __init__(self):
        super().__init__()
        channels = WIDTHS[-1]
        self.conv_in = nn.Conv2d(LATENT, channels, 3, padding=1)
        self.mid = Middle(channels)
        self.up = nn.ModuleList()  # numbered from full resolution, like the encoder's levels
        for depth, width in reversed(list(enumerate(WIDTHS))):
            deepest = depth == len(WIDTHS) - 1
            level = Level(channels, width, blocks=3, attention=deepest)
            level.upsample = Upsample(width) if depth > 0 else nn.Identity()
            self.up.insert(0, level)
            channels = width
        self.norm_out = group_norm(channels)
        self.conv_out = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.mid(self.conv_in(latents))
        for level in reversed(self.up):
            x = level.upsample(level(x))
        return self.conv_out(F.silu(self.norm_out(x)))


class Autoencoder(nn.Module):
    """E2E-INVAE (REPA-E, arXiv 2504.10483): AutoencoderKL f16d32, names as in e2e-invae-400k.pt.

    Pixels (B, 3, H, W) in [-1, 1]; latents (B, 32, H/16, W/16), not scaled.
    """

    def __init__(self, state_dict: dict[str, Tensor] | None = None):
        super().__init__()
        self.encoder = Encoder()
        self.decoder = Decoder()
        self.quant_conv = nn.Conv2d(2 * LATENT, 2 * LATENT, 1)
        self.post_quant_conv = nn.Conv2d(LATENT, LATENT, 1)
        if state_dict is not None:
            self.load_state_dict(state_dict)
        self.eval().requires_grad_(False)

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """The posterior's mean, or with unit noise (B, 32, H/16, W/16) a sample of it."""
        mean, logvar = self.quant_conv(self.encoder(pixels)).chunk(2, dim=1)
        if noise is None:
            return mean
        deviation = (logvar.clamp(-30, 20) / 2).exp()
        return mean + deviation * noise

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(latents))


def load_autoencoder(device: torch.device) -> Autoencoder:
    """The published one. Raises UserError where its weights cannot be had or are not these."""
    network = Autoencoder()
    load_weights("autoencoder", network)
    return network.to(device)


# ---------------------------------------------------------------------------------------------
# Photos, encoded
# ---------------------------------------------------------------------------------------------


class Photos:
    """A folder of class folders of photos, encoded here; classes are numbered by folder name.

    names and labels of the images, in order; read(rows) gives their tensors. Raises UserError.
    """

    image_bytes = 0  # to be fetched for one image: they are here already

    def __init__(self, folder: Path, world: World, size: int = 256):
        self.size = size  # pixels a side
        self.files = []
        self.labels = []
        classes = sorted(path for path in folder.glob("*") if path.is_dir())
        for label, path in enumerate(classes):
            files = [file for file in path.iterdir() if file.suffix.lower() in ENDINGS]
            self.files += sorted(files)
            self.labels += [label] * len(files)
        self.names = [f"{file.parent.name}/{file.name}" for file in self.files]
        if not self.files:
            raise UserError(f"{folder} holds no class folders of photos ({', '.join(ENDINGS)})")
        self.source = f"{len(self.files)} photos"
        self.device = world.device
        self.autoencoder = load_autoencoder(world.device)
        self.features = None

    def add_features(self, path: Path, world: World, components: int):
        """Fits the features' bases on 512 photos or more, evenly spaced, once."""
        self.features = PatchFeatures(world.device, self.size, components)
        if world.rank == 0 and scale_shape(path) != [1 + (self.size // 16) ** 2, components]:
            count = min(max(512, PHOTOS_TO_FIT * components), len(self.files))
            rows = np.linspace(0, len(self.files) - 1, count).astype(int).tolist()
            starts = progress(range(0, count, 16), "PCA")
            self.features.fit((self.pixels(rows[at : at + 16]) for at in starts), path)
        world.wait()
        self.features.load(path, world)

    def pixels(self, rows: Iterable[int]) -> Tensor:
        """uint8 (n, 3, size, size). Raises UserError."""
        crops = [torch.tensor(read_photo(self.files[row], self.size)) for row in rows]
        return torch.stack(crops).permute(0, 3, 1, 2).to(self.device)

    def read(self, rows: range) -> dict[str, Tensor]:
        """latents (n, 32, side, side) float16, side = size / 16, and features where asked for:
        int8 (n, 1 + side^2, components).
        """
        latents, features = [], []
        for at in range(0, len(rows), 16):
            batch = rows[at : at + 16]
            pixels = self.pixels(batch)
            latents.append(sample_latents(self.autoencoder, pixels, batch))
            if self.features:
                features.append(self.features(pixels))
        if not self.features:
            return {"latents": torch.cat(latents)}
        return {"latents": torch.cat(latents), "features": torch.cat(features)}


def scale_shape(path: Path) -> list[int]:
    """[1 + patches, components] of a file of bases; empty where there is none."""
    try:
        with safe_open(path, "pt") as file:
            return file.get_slice("scale").get_shape()
    except (OSError, SafetensorError):
        return []


def sample_latents(autoencoder: Autoencoder, pixels: Tensor, rows: Iterable[int]) -> Tensor:
    """uint8 (n, 3, size, size) -> samples of the posterior, float16 (n, 32, size/16, size/16).

    The noise is of the image's number alone: any process encodes it to the same latent.
    """
    side = pixels.shape[-1] // 16
    generators = [torch.Generator().manual_seed(row) for row in rows]
    noise = torch.stack([torch.randn(LATENT, side, side, generator=g) for g in generators])
    return autoencoder.encode(pixels / 127.5 - 1, noise.to(pixels.device)).half().cpu()
