"""ImageGen Speedrun: train a text-to-image flow-matching transformer to its target, fast.

    python train_speedrun.py [cifar10 | cifar10-cpu | imagenet256]        one process
    torchrun --nproc_per_node=8 train_speedrun.py imagenet256             one node of 8 GPUs
    SEED=1 python train_speedrun.py         another seed
    RESUME=logs/<run_id> python ...         continue a killed run to the weights it would have had

Everything else is edited in this file: it is copied whole into its own log, and the copy is what
the referee imports. A racer may change all of it but the contract. The referee uses five names:
CONFIGS, Text, load_checkpoint(path), velocity(model, x, t, text), sample(model, noise, text, fresh)

Clock  In: all from the fetch of the first batch on: tables derived from the data, steps, log lines.
       Out: process start, compilation and warm-up on noise, validation, checkpoint writes.
Sizes  B images, C x H x W latent, N = (H/patch)(W/patch) patches, D width, T caption tokens.
Cap    1,000 lines (tested)."""
import copy, gc, hashlib, json, math, os, platform, re, resource, signal, sys, time  # noqa: E401
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

# ---------------------------------------------------------------------------------------------
# Contract: do not edit for a record
# ---------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Track:
    """What makes two runs comparable: data, condition, validation, sampling budget."""
    name: str             # folder under data/
    shape: tuple          # (C, H, W) of one stored latent
    dtype: str            # of the stored latents
    shift: float          # x = (stored - shift) * scale
    scale: float
    train_images: int     # imagenet256: 4,096 of its 1,281,167 are held out for validation
    text_width: int       # of the pooled CLIP embedding; the model centres it by the table's mean
    val_images: int       # the first ones of val_*.safetensors
    val_seed: int = 2025  # of the validation noise, drawn on the CPU
    max_nfe: int = 100    # network evaluations per generated image; a guided step costs two

TRACKS = {t.name: t for t in (
    Track("cifar10", (3, 32, 32), "uint8", 127.5, 1 / 127.5, 50_000, 512, 4096),
    Track("imagenet256", (32, 16, 16), "float16", 0.0, 0.3099, 1_277_071, 768, 4096),
)}

def validation_draws(track: Track, count: int):
    """Fixed noise (count, C, H, W) and times (count,) of the validation loss, CPU float32.

    The times are the midpoints of `count` equal parts of [0, 1] in random order, so the loss is
    an average over uniform t whatever the training distribution is.
    """
    generator = torch.Generator().manual_seed(track.val_seed)
    noise = torch.randn(count, *track.shape, generator=generator)
    t = (torch.randperm(count, generator=generator) + 0.5) / count
    return noise, t

# ---------------------------------------------------------------------------------------------
# Hyperparameters
# ---------------------------------------------------------------------------------------------

@dataclass
class Config:
    """Every number of a run. All of them are edited here, none comes from outside."""
    track: str
    # model
    patch: int                     # latent pixels per token side
    width: int                     # D
    depth: int
    head_dim: int = 64
    mlp_ratio: int = 4
    text_tokens: int = 0           # T: CLIP tokens put in context, 0 = pooled text alone
    route_keep: float = 1.0        # share of the patches in the middle blocks; 1 = no routing
    route_dense: int = 2           # blocks before and after them that see all tokens
    path_drop: float = 0.05        # share of images trained without the middle blocks
    dense_tail: float = 0.0        # share of the run, at its end, trained without routing
    # length, in images and steps
    batch_size: int = 256          # global: the same for any number of processes
    micro_batch: int = 0           # images per forward on one device; 0 = all of its slice
    steps: int = 1000
    evals: int = 5                 # validations and EMA checkpoints on the way to the last step
    save_every: int = 1000         # steps between resume states
    # optimizers; the schedule multiplies both learning rates
    muon_lr: float = 0.02          # block matrices; 0 = AdamW for every parameter
    muon_momentum: float = 0.95
    adamw_lr: float = 1e-3         # embeddings, adaLN, head, gains
    adamw_betas: tuple = (0.9, 0.95)
    warmup: float = 0.02           # share of the run in which the learning rate rises
    cooldown: float = 0.5          # share of the run in which it falls to 0
    ema_decay: float = 0.999       # at most; warmed up as (1 + step) / (10 + step)
    # objective
    sigma_data: float = 0.5        # spread of x in the preconditioning; 0 = predict v directly
    caption_drop: float = 0.1      # share of images trained on the null caption, for guidance
    flip: bool = False             # mirror half of the images (pixels, not latents)
    t_shift: float = 1.0           # of the uniform training t: more noise where > 1
    cfm: float = 0.0               # weight of contrastive flow matching
    reg: float = 0.0               # weight of the class token's velocity (REG); 0 = no such token
    repa: float = 0.0              # weight of the alignment with DINOv2-B's features (REPA) ...
    repa_layers: tuple = ()        # ... of the states after these blocks
    # sampler
    sampler: str = "euler"         # or "sde": Euler-Maruyama (SiT, arXiv 2401.08740)
    sample_steps: int = 50
    guidance: float = 1.0          # 1 = off, and then a step costs one evaluation instead of two
    guidance_interval: tuple = (0.0, 1.0)  # of t (Kynkaanniemi et al., arXiv 2404.07724)
    sample_shift: float = 1.0      # time shift of the sampling grid
    last_step: float = 0.0         # final step, before the shift; 0 = as the others
    # numerics
    bf16: bool = True              # autocast over fp32 weights; Newton-Schulz in bf16 too
    compile: bool = True           # False: plain eager PyTorch, for debugging

CONFIGS = {
    "cifar10": Config(             # one GPU
        track="cifar10", patch=2, width=512, depth=12, flip=True,
        batch_size=512, steps=10_000, save_every=2000, guidance=2.0),
    "cifar10-cpu": Config(         # a laptop, in minutes
        track="cifar10", patch=4, width=192, depth=4, flip=True,
        batch_size=64, steps=1200, muon_lr=0, adamw_lr=0.004, cooldown=0.0,
        sample_steps=30, guidance=6.0, guidance_interval=(0.2, 0.85),
        sigma_data=0.0,
        sample_shift=2.0),
    "imagenet256": Config(         # SiT-B/1 on 8 GPUs; SR-DiT (arXiv 2512.12386) with Muon
        track="imagenet256", patch=1, width=768, depth=12,
        route_keep=0.25, dense_tail=0.05, cfm=0.05, reg=0.03, repa=0.5, repa_layers=(2, 4, 6),
        batch_size=256, steps=300_000, evals=6, save_every=10_000,
        muon_lr=1e-3, adamw_lr=1e-4, cooldown=0.3, ema_decay=0.9995,
        sigma_data=1.0,            # what the contract's scale is for
        t_shift=math.sqrt(32 * 16 * 16 / 4096), sample_shift=math.sqrt(32 * 16 * 16 / 4096),
        sampler="sde", sample_steps=100, last_step=0.04),
}

def images_per_forward(cfg: Config, world_size: int, total: int) -> int:
    """The largest equal parts, up to micro_batch, in which a process does its share of `total`."""
    return math.gcd(total // world_size, cfg.micro_batch or cfg.batch_size // world_size)

def check_config(cfg: Config, W: int):
    """Refuses what cannot be trained, before any work. AssertionError with the values."""
    track = TRACKS[cfg.track]
    assert track.shape[1] % cfg.patch == track.shape[2] % cfg.patch == 0, (
        f"patch {cfg.patch} does not divide {track.shape}")
    assert cfg.width % cfg.head_dim == cfg.head_dim % 4 == 0, (
        f"head_dim {cfg.head_dim} must divide width {cfg.width} and be a multiple of 4 (2-D RoPE)")
    assert cfg.batch_size % W == track.val_images % W == 0, (
        f"world size {W} does not divide batch_size {cfg.batch_size} and the {track.val_images} "
        "validation images: start another number of processes")
    assert 1 <= cfg.evals <= cfg.steps, f"evals {cfg.evals} is not in 1 .. steps {cfg.steps}"
    assert cfg.sampler in ("euler", "sde"), f"sampler {cfg.sampler!r} is neither euler nor sde"
    assert cfg.route_keep == 1 or 0 < 2 * cfg.route_dense < cfg.depth, (
        f"route_dense {cfg.route_dense}, twice, leaves no middle of depth {cfg.depth}")
    assert not cfg.cfm or images_per_forward(cfg, W, cfg.batch_size) % 2 == 0, (
        "cfm pairs images: give each forward an even number of them")
    assert set(cfg.repa_layers) <= set(range(1, cfg.depth + 1)), (
        f"repa_layers {cfg.repa_layers} are not in 1 .. depth {cfg.depth}")
    assert not cfg.repa_layers or math.prod(track.shape[1:]) == PATCHES * cfg.patch ** 2, (
        f"alignment needs one token for each of the {PATCHES} patches that DINOv2 saw")
    assert sampling_nfe(cfg) <= track.max_nfe, (
        f"sample takes {sampling_nfe(cfg)} network evaluations an image, more than {track.max_nfe}")

# ----- Optimizer: Muon on the block matrices, AdamW on the rest -----------------------------------

# Polar Express (arXiv 2505.16932): the optimal composition of odd quintics, 5 steps, safety 2e-2
POLAR_EXPRESS = ((8.15655452, -22.48329293, 15.87876992), (4.04292994, -2.80891747, 0.50001785),
                 (3.89166780, -2.77248415, 0.50606482), (3.28575366, -2.36812949, 0.46449024),
                 (2.34654133, -1.70978284, 0.42323551))

def orthogonalize(g: Tensor, dtype=torch.bfloat16) -> Tensor:
    """Nearest semi-orthogonal matrix, about: (n, rows, cols) with rows >= cols -> the same.
    All singular values go near 1. Source: Muon (Jordan 2024), with Polar Express coefficients."""
    x = g.to(dtype)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)   # spectral norm below 1
    for a, b, c in POLAR_EXPRESS:
        gram = x.mT @ x                                          # (n, cols, cols), the small side
        x = a * x + x @ (b * gram + c * gram @ gram)
    return x

def muon_update(grad: Tensor, momentum: Tensor, beta: float, dtype) -> Tensor:
    """Nesterov momentum (in place), then orthogonalization. (n, rows, cols) -> the same."""
    momentum.lerp_(grad, 1 - beta)
    return orthogonalize(grad.lerp(momentum, beta), dtype)

class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized per matrix (Jordan 2024), sharded over the processes of `world`.
    params: (out, in), or several of one shape (k, out, in). Matrices of one shape, transposed where
    wide, form a bucket (n, rows, cols); each process reduces, keeps the momentum of and updates
    n / W of them, while the next are on their way. Traffic a step and process, P parameters:
    reduce-scatter 4P(W-1)/W bytes of fp32 gradients, all-gather 2P(W-1)/W of bf16 updates."""
    def __init__(self, params, lr, momentum, dtype, world, update=muon_update):
        super().__init__(params, dict(lr=lr, momentum=momentum))
        self.world, self.dtype, self.update = world, dtype, update
        self.buckets, self.momentum = {}, {}                     # by shape, rows >= cols
        for p in self.param_groups[0]["params"]:
            self.buckets.setdefault(tuple(sorted(p.shape[-2:], reverse=True)), []).append(p)
        for (rows, cols), members in self.buckets.items():
            local = -(-sum(p.numel() for p in members) // (rows * cols * world.size))   # padded
            self.momentum[rows, cols] = torch.zeros(local, rows, cols, device=world.device)
    @torch.no_grad()
    def step(self):
        group, grads, updates = self.param_groups[0], [], []
        for shape, members in self.buckets.items():
            mats = [p.grad if p.shape[-2] >= p.shape[-1] else p.grad.mT for p in members]
            mats = torch.cat([m.reshape(-1, *shape) for m in mats])
            padding = len(self.momentum[shape]) * self.world.size - len(mats)
            grads.append(self.world.reduce_scatter(F.pad(mats, (0, 0, 0, 0, 0, padding))))
        for momentum, (grad, wait) in zip(self.momentum.values(), grads):
            wait()
            update = self.update(grad, momentum, group["momentum"], self.dtype)
            updates.append(self.world.all_gather(update))
        for members, (update, wait) in zip(self.buckets.values(), updates):
            wait()
            for p in members:
                *_, rows, cols = p.shape
                u, update = update.tensor_split([p.numel() // (rows * cols)])
                u = (u if rows >= cols else u.mT).reshape(p.shape)
                p.add_(u, alpha=-group["lr"] * max(1, rows / cols) ** 0.5)   # Keller's scaling
    def state_dict(self) -> dict:
        """Momentum of all matrices, the same for any number of processes. Collective."""
        out = {}
        for shape, members in self.buckets.items():
            full, wait = self.world.all_gather(self.momentum[shape])
            wait()
            out[shape] = full[:sum(p.numel() for p in members) // math.prod(shape)]
        return out
    def load_state_dict(self, state: dict):
        for shape, shard in self.momentum.items():
            mine = state[shape][self.world.rank * len(shard):][:len(shard)]
            shard.zero_()[:len(mine)].copy_(mine)                # the rest is padding

# Every parameter, by its name without numbers: (initialisation, optimizer). A new one goes here,
# into its module and into the forward; a name without a rule raises.
RULES = {name: how for how, names in {
    ("fan_in", "muon"): "blocks.qkv blocks.proj blocks.up blocks.down fuse",
    ("fan_in", "adamw"): "embed.weight time_in.weight time_out.weight pooled_in.weight "
                         "tokens_in.weight class_in.weight projectors.weight",
    ("zero", "adamw"): "embed.bias time_in.bias time_out.bias class_in.bias mask_token "
                       "modulation.weight modulation.bias "                        # adaLN-zero
                       "head.weight head.bias class_head.weight class_head.bias",
    ("small", "adamw"): "position",
}.items() for name in names.split()}

def rule(name: str) -> tuple:
    """(initialisation, optimizer) of a parameter. Raises ValueError for an unknown name."""
    if (key := re.sub(r"\.\d+\b", "", name)) not in RULES:
        raise ValueError(f"parameter {name} has no rule: give {key} one in RULES")
    return RULES[key]

def make_optimizers(model: nn.Module, cfg: "Config", world) -> list:
    """[Muon, AdamW], or [AdamW] where cfg.muon_lr is 0; together they train each parameter once."""
    groups = dict(muon=[], adamw=[])
    for name, p in model.named_parameters():
        groups[rule(name)[1] if cfg.muon_lr else "adamw"].append(p)
    optimizers = [torch.optim.AdamW([dict(params=groups["adamw"], peak_lr=cfg.adamw_lr)],
                                    cfg.adamw_lr, cfg.adamw_betas, weight_decay=0, fused=True)]
    if cfg.muon_lr:
        optimizers.insert(0, Muon(
            [dict(params=groups["muon"], peak_lr=cfg.muon_lr)], cfg.muon_lr, cfg.muon_momentum,
            torch.bfloat16 if cfg.bf16 else torch.float32, world,
            torch.compile(muon_update, dynamic=False) if cfg.compile else muon_update))
    trained = [p for opt in optimizers for group in opt.param_groups for p in group["params"]]
    assert sorted(map(id, trained)) == sorted(map(id, model.parameters())), "not each exactly once"
    return optimizers

def lr_schedule(progress: float, warmup: float, cooldown: float) -> float:
    """Share of the peak learning rate at progress in [0, 1): linear up, flat, linear to 0."""
    return min(1.0, progress / max(warmup, 1e-9), (1 - progress) / max(cooldown, 1e-9))

def ema_decay(step: int, limit: float) -> float:
    """EMA decay after update number `step` (from 0): warmed up, to forget the initial weights."""
    return min(limit, (1 + step) / (10 + step))

# ----- Model: a diffusion transformer (DiT, arXiv 2212.09748) on a pixel or latent grid -----------

class Text(NamedTuple):
    """A batch of captions as CLIP gives them, not normalised. Without token context T is 0."""
    pooled: Tensor    # (B, text_width)
    tokens: Tensor    # (B, T, text_width)

class Batch(NamedTuple):
    """One step's images and all that was drawn for them; unused parts have no columns."""
    x: Tensor         # (B, M), in the model's scale: see Transformer
    noise: Tensor     # (B, M)
    t: Tensor         # (B,)
    pooled: Tensor    # (B, text_width)
    tokens: Tensor    # (B, T, text_width)
    keep: Tensor      # (B, K) tokens that enter the middle blocks, int64; K = 0: all
    skip: Tensor      # (B,) bool: images that do not enter them
    features: Tensor  # (B, 1 + PATCHES, PCA): of DINOv2, class token and patches, centred

PATCHES, PCA = 256, 64  # DINOv2-B's patches of an image, and the principal components kept of each

def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],))

def take(x: Tensor, keep: Tensor, dim: int = 1) -> Tensor:
    """Tokens keep (B, K) of x, which has them along `dim`: (B, ..., N, D) -> (B, ..., K, D)."""
    index = keep.view(len(keep), *[1] * (dim - 1), -1, 1)
    return x.gather(dim, index.expand(*x.shape[:dim], -1, x.shape[-1]))

def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention, (B, heads, N, head_dim) each -> the same."""
    if q.device.type == "cpu":         # about 4x faster than the fused one there, 64 tokens
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v)

class Block(nn.Module):
    """Attention and MLP, both behind adaLN-zero. (B, N, D) -> (B, N, D)."""
    def __init__(self, D: int, head_dim: int, mlp_ratio: int):
        super().__init__()
        self.head_dim = head_dim
        self.qkv, self.proj, self.up, self.down = (nn.Parameter(torch.empty(shape)) for shape in (
            (3, D, D), (D, D), (mlp_ratio * D, D), (D, mlp_ratio * D)))        # (..., out, in)
    def forward(self, x, modulation):
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation               # each (B, 1, D)
        h = rms_norm(x) * (1 + scale1) + shift1
        B, N, D = h.shape
        qkv = F.linear(h, self.qkv.flatten(0, 1)).view(B, N, 3, -1, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)                          # (B, heads, N, hd)
        h = attend(q.to(v.dtype), k.to(v.dtype), v).transpose(1, 2).reshape(B, N, D)
        x = x + gate1 * F.linear(h, self.proj)
        h = F.linear(rms_norm(x) * (1 + scale2) + shift2, self.up)
        return x + gate2 * F.linear(F.gelu(h), self.down)

def projector(width: int, hidden: int = 2048) -> nn.Module:
    """REPA's MLP from a block's states to DINOv2's components: (..., D) -> (..., PCA)."""
    sizes = (width, hidden), (hidden, hidden), (hidden, PCA)
    layers = [m for a, b in sizes for m in (nn.Linear(a, b, bias=False), nn.SiLU())]
    return nn.Sequential(*layers[:-1])

def precondition(x: Tensor, t: Tensor, s: float):
    """(skip, out, input): velocity = skip + out * network(input). EDM, arXiv 2206.00364, eq. 7, for
    velocities: the best linear guess from x_t comes for free, the network sees unit variance."""
    if not s:
        return 0.0, 1.0, x
    var = ((1 - t) * s) ** 2 + t ** 2                                           # of x_t
    return (t - (1 - t) * s * s) / var * x, s * var.rsqrt(), x * var.rsqrt()

class Transformer(nn.Module):
    """Velocity network: (B, M) at times (B,) under a caption -> (B, M), float32. A row is an image
    and, with REG (arXiv 2507.01467), DINOv2's class token beside it: M = CHW + PCA. With routing
    (SPRINT, arXiv 2510.21986) the middle blocks see some of the patches, the outer blocks all."""
    def __init__(self, cfg: Config, track: Track):
        super().__init__()
        (c, h, w), D, p, self.cfg, self.track = track.shape, cfg.width, cfg.patch, cfg, track
        self.embed = nn.Linear(c * p * p, D)
        self.position = nn.Parameter(torch.empty(h * w // p ** 2, D))
        self.time_in, self.time_out = nn.Linear(256, D), nn.Linear(D, D)
        self.pooled_in = nn.Linear(track.text_width, D, bias=False)
        if cfg.text_tokens:
            self.tokens_in = nn.Linear(track.text_width, D, bias=False)
        self.modulation = nn.Linear(D, (6 * cfg.depth + 2) * D)   # all adaLN in one matmul
        self.blocks = nn.ModuleList(
            Block(D, cfg.head_dim, cfg.mlp_ratio) for _ in range(cfg.depth))
        self.head = nn.Linear(D, c * p * p)
        if cfg.route_keep < 1:
            self.mask_token = nn.Parameter(torch.empty(D))
            self.fuse = nn.Parameter(torch.empty(D, 2 * D))
        if cfg.reg:
            self.class_in, self.class_head = nn.Linear(PCA, D), nn.Linear(D, PCA)
        self.projectors = nn.ModuleList(projector(D) for _ in cfg.repa_layers)
        self.context, self.extra = cfg.text_tokens + bool(cfg.reg), PCA * bool(cfg.reg)
        # CLIP embeddings of class captions lie close together: centred and scaled by the table's
        self.register_buffer("text_mean", torch.zeros(track.text_width))
        self.register_buffer("text_std", torch.ones(()))
        self.register_buffer("token_mean", torch.zeros(cfg.text_tokens, track.text_width))
        self.register_buffer("token_std", torch.ones(()))
    @torch.no_grad()
    def init_weights(self, seed: int):
        """By RULES, on the CPU, from `seed`: the same on every process and device."""
        g = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            kind = rule(name)[0]
            std = dict(zero=0.0, small=0.02, fan_in=p.shape[-1:].numel() ** -0.5)[kind]
            p.copy_(std * torch.randn(p.shape, generator=g))
    @torch.no_grad()
    def set_text(self, table: Text):
        """Takes the centre and scale of the track's caption table (captions, ...)."""
        for x, mean, std in zip(table, (self.text_mean, self.token_mean),
                                (self.text_std, self.token_std)):
            if x.numel():
                mean.copy_(x.mean(0))
                std.copy_((x - mean).square().mean().sqrt())
    def null_text(self, count: int) -> Text:
        """The empty caption: the table's mean, zero after centring."""
        return Text(self.text_mean.expand(count, -1), self.token_mean.expand(count, -1, -1))
    def run(self, layers: range, x: Tensor, mods):
        """Blocks `layers` on tokens x (B, n, D). Returns x and the states after those of the layers
        that are aligned."""
        states = []
        for i in layers:
            x = self.blocks[i](x, mods[6 * i:6 * i + 6])
            if i + 1 in self.cfg.repa_layers:
                states.append(x)
        return x, states
    def forward(self, z: Tensor, t: Tensor, text: Text, keep=None, skip=None):
        """keep (B, K), skip (B,): see Batch; None: all tokens, no image. Returns the velocity and
        the states (B, n, D) that are to be aligned."""
        B, cfg, (C, H, W), p = len(z), self.cfg, self.track.shape, self.cfg.patch
        h, w = H // p, W // p
        # time and caption
        freqs = torch.exp(-math.log(10_000) * torch.arange(128, device=z.device) / 128)
        angles = 1000 * t[:, None] * freqs                                      # (B, 128)
        c = self.time_out(F.silu(self.time_in(torch.cat([angles.cos(), angles.sin()], dim=1))))
        c = c + self.pooled_in((text.pooled - self.text_mean) / self.text_std)
        mods = self.modulation(F.silu(c)).view(B, -1, 1, cfg.width).unbind(1)
        # tokens
        base, out, z = precondition(z, t.view(-1, 1), cfg.sigma_data)
        x, class_token = z.tensor_split([C * H * W], dim=1)
        x = x.view(B, C, h, p, w, p).permute(0, 2, 4, 1, 3, 5).reshape(B, h * w, C * p * p)
        x = self.embed(x)                                                       # (B, N, D)
        x = x + self.position.to(x.dtype)
        if cfg.reg:
            x = torch.cat([rms_norm(self.class_in(class_token))[:, None].to(x.dtype), x], dim=1)
        if cfg.text_tokens:
            context = self.tokens_in((text.tokens - self.token_mean) / self.token_std)
            x = torch.cat([context, x], dim=1)        # T caption tokens, class token, N patches
        # blocks
        edge = cfg.route_dense if cfg.route_keep < 1 else 0
        x, states = self.run(range(edge), x, mods)
        mid = x
        if keep is not None:
            mid = take(x, keep)
        mid, more = self.run(range(edge, cfg.depth - edge), mid, mods)
        if edge:
            mask = self.mask_token.to(mid.dtype)
            if keep is not None:
                at = keep[..., None].expand_as(mid)
                mid = mask.expand_as(x).scatter(1, at, mid)
            if skip is not None:
                mid = torch.where(skip.view(-1, 1, 1), mask, mid)
            mid = F.linear(torch.cat([x.to(mid.dtype), mid], dim=2), self.fuse)  # SPRINT, eq. 4
        x, last = self.run(range(cfg.depth - edge, cfg.depth), mid, mods)
        # velocity
        x = rms_norm(x) * (1 + mods[-1]) + mods[-2]
        v = self.head(x[:, self.context:]).float()                              # (B, N, C p p)
        v = v.view(B, h, w, C, p, p).permute(0, 3, 1, 4, 2, 5).reshape(B, C * H * W)
        if cfg.reg:
            v = torch.cat([v, self.class_head(x[:, cfg.text_tokens]).float()], dim=1)
        return base + out * v, states + more + last

# ----- Objective and sampler: x_t = (1 - t) x + t noise, velocity = noise - x (arXiv 2209.03003) --

def autocast(cfg: Config, x: Tensor):
    return torch.autocast(x.device.type, torch.bfloat16, enabled=cfg.bf16)

def velocity(model: nn.Module, x: Tensor, t: Tensor, text: Text) -> Tensor:
    """The model's velocity at (x, t): (B, C, H, W), (B,) -> (B, C, H, W). One evaluation each. With
    REG the class token is not known here: it is given as its mean, zero."""
    with autocast(model.cfg, x):
        v, _ = model(F.pad(x.flatten(1), (0, model.extra)), t, text)
    return v[:, :x[0].numel()].view_as(x)

def flow_matching_loss(model: nn.Module, x, noise, t, text: Text) -> Tensor:
    """Per-image mean squared velocity error (B,), float32. Source: arXiv 2210.02747, eq. 23."""
    tt = t.view(-1, 1, 1, 1)
    error = velocity(model, (1 - tt) * x + tt * noise, t, text) - (noise - x)
    return error.square().mean(dim=(1, 2, 3))

def training_loss(model: nn.Module, b: Batch) -> Tensor:
    """Per-image flow matching loss and the terms that the config adds to it (B,), float32."""
    cfg, t, target, T = model.cfg, b.t[:, None], b.noise - b.x, model.cfg.text_tokens
    M, keep = b.x.shape[1] - model.extra, b.keep if b.keep.shape[1] else None
    with autocast(cfg, b.x):
        v, states = model((1 - t) * b.x + t * b.noise, b.t, Text(b.pooled, b.tokens), keep, b.skip)
        aligned = [project(x[:, T:]) for project, x in zip(model.projectors, states)]
    error = (v - target).square()
    loss = error[:, :M].mean(dim=1)
    if cfg.cfm:             # away from another image's velocity: arXiv 2506.05350, eq. 4
        other = target.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
        loss = loss - cfg.cfm * (v - other)[:, :M].square().mean(dim=1)
    if cfg.reg:             # REG, eq. 7
        loss = loss + cfg.reg * error[:, M:].mean(dim=1)
    for z in aligned:       # REPA, eq. 8
        aim = b.features[:, 1 - bool(cfg.reg):]
        if z.shape[1] < aim.shape[1]:                            # in the routed middle
            aim = take(aim, keep[:, T:] - T)
        cosine = F.cosine_similarity(z.float(), aim, dim=2).mean(dim=1)
        loss = loss + cfg.repa / len(aligned) * (1 - cosine)
    return loss

def shift_time(t, shift: float):
    """SD3's time shift (arXiv 2403.03206, eq. 23): identity at 1, more noise above."""
    return shift * t / (1 + (shift - 1) * t)

def sampling_times(cfg: Config) -> list:
    """The sampler's grid, sample_steps + 1 times from 1 to 0: even, then shifted."""
    n, last = cfg.sample_steps, cfg.last_step or 1 / cfg.sample_steps
    grid = [1 - (1 - last) * i / max(1, n - 1) for i in range(n)] + [0.0]
    return [shift_time(t, cfg.sample_shift) for t in grid]

def guided(t: float, cfg: Config) -> bool:
    return cfg.guidance != 1 and cfg.guidance_interval[0] <= t <= cfg.guidance_interval[1]

def sampling_nfe(cfg: Config) -> int:
    """Network evaluations per image of `sample`: one a step, two where it is guided."""
    return sum(1 + guided(t, cfg) for t in sampling_times(cfg)[:-1])

@torch.no_grad()
def sample(model: nn.Module, noise: Tensor, text: Text, fresh=None) -> Tensor:
    """Images (B, C, H, W) in the model's scale from noise (B, C, H, W) under captions `text`.
    fresh: a function that returns new unit noise of noise's shape at every call, for the sde and
    for REG's class token. Euler on dz = v dt, or Euler-Maruyama on the reverse SDE with diffusion
    2t (SiT, eq. 8): its score -(z + (1 - t) v) / t makes the drift v + z + (1 - t) v. The null half
    of guidance (arXiv 2207.12598, eq. 6) leaves out the middle blocks where they are routed."""
    cfg, B, M = model.cfg, len(noise), noise[0].numel()

    def joint(unit):
        return torch.cat([unit.flatten(1)] + ([fresh().flatten(1)[:, :PCA]] if cfg.reg else []), 1)

    both = Text(*(torch.cat(pair) for pair in zip(text, model.null_text(B))))
    null = torch.arange(2 * B, device=noise.device) >= B if cfg.route_keep < 1 else None
    z, times = joint(noise), sampling_times(cfg)
    for i, (t, t_next) in enumerate(zip(times, times[1:])):
        with autocast(cfg, z):
            if guided(t, cfg):                                   # one call, two evaluations
                v, _ = model(torch.cat([z, z]), z.new_full((2 * B,), t), both, None, null)
                v = torch.lerp(v[B:], v[:B], cfg.guidance)
            else:
                v, _ = model(z, z.new_full((B,), t), text)
        if cfg.sampler == "sde":
            v = v + z + (1 - t) * v
        z = z + (t_next - t) * v
        if cfg.sampler == "sde" and i < cfg.sample_steps - 1:    # the last step adds no noise
            z = z + math.sqrt(2 * t * (t - t_next)) * joint(fresh())
    return z[:, :M].reshape(noise.shape)

# ----- Data: memory-mapped shards, one batch ahead ------------------------------------------------

class UserError(Exception):
    """Something the user can mend: printed as one line, exit code 2."""

@contextmanager
def reading(track: Track, how: str = ""):
    """Turns whatever a missing, damaged or foreign data file raises into one line with the mend."""
    try:
        yield
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"data/{track.name} is missing, damaged or foreign ({e}); "
                        f"run: python data/download.py {track.name}{how}")

class Shards:
    """All shards of one split as one memory-mapped array, checked by header before any work."""
    def __init__(self, track: Track, split: str, features: bool = False):
        folder, shapes = Path("data", track.name), dict(latents=track.shape, labels=())
        if features:
            shapes["features"] = 1 + PATCHES, PCA
        self.columns = [[] for _ in shapes]                      # of each: one array a shard
        with reading(track, " --images DIR --features" * features):
            raw = (folder / "manifest.json").read_bytes()
            manifest, self.sha256 = json.loads(raw), hashlib.sha256(raw).hexdigest()
            self.trial = "shards" in manifest.get("request", ())  # a part of the data
            for name in sorted(k for k in manifest["files"] if k.startswith(split + "_")):
                n = manifest["files"][name]["count"]
                with safe_open(folder / name, "pt") as f:        # maps the file, reads the header
                    arrays = [f.get_tensor(key) for key in shapes]
                    found = f.metadata()["track"], str(arrays[0].dtype), *(a.shape for a in arrays)
                wanted = track.name, "torch." + track.dtype, *((n, *s) for s in shapes.values())
                if found != wanted:
                    raise ValueError(f"{name} holds {found}, not {wanted}")
                for column, a in zip(self.columns, arrays):
                    column.append(a.numpy())
        self.starts = np.cumsum([0] + [len(a) for a in self.columns[0]])
        self.count = int(self.starts[-1])
    def gather(self, indices: np.ndarray, pin: bool = False) -> list:
        """Copies rows `indices` (B,): [latents (B, C, H, W), labels (B,)] and, where asked for,
        features (B, 1 + PATCHES, PCA), as stored, on the CPU."""
        shards = np.searchsorted(self.starts, indices, side="right") - 1
        at = list(zip(shards.tolist(), (indices - self.starts[shards]).tolist()))
        rows = [torch.from_numpy(np.stack([column[shard][row] for shard, row in at]))
                for column in self.columns]                      # one memcpy from the page cache
        return [a.pin_memory() for a in rows] if pin else rows

class Loader:
    """Training batches of this process's slice, fetched one step ahead by a thread. Their order is
    a function of (seed, step) alone: one permutation per epoch, global batches cut end to end."""
    def __init__(self, shards: Shards, cfg: Config, seed: int, world):
        self.shards, self.seed, self.batch = shards, seed, cfg.batch_size
        self.mine, self.device = world.part(cfg.batch_size), world.device
        self.pool, self.ahead = ThreadPoolExecutor(1), {}        # step -> batch on its way
    @lru_cache(maxsize=2)
    def order(self, epoch: int) -> np.ndarray:
        g = torch.Generator().manual_seed(draw_seed(self.seed, epoch, stream=1))
        return torch.randperm(self.shards.count, generator=g).numpy()
    def fetch(self, step: int) -> list:
        at = np.arange(step * self.batch, (step + 1) * self.batch)[self.mine]
        rows = [self.order(int(e))[r] for e, r in zip(*np.divmod(at, self.shards.count))]
        return self.shards.gather(np.array(rows), pin=self.device.type == "cuda")
    def __call__(self, step: int) -> list:
        """What Shards.gather gives for this process's slice of `step`, on the device."""
        batch = self.ahead.pop(step, None) or self.pool.submit(self.fetch, step)
        self.ahead = {step + 1: self.pool.submit(self.fetch, step + 1)}
        return [x.to(self.device, non_blocking=True) for x in batch.result()]

class Captions(NamedTuple):
    """A caption table and which of its captions belong to a label."""
    text: Text          # (captions, ...)
    of_label: Tensor    # (labels, captions of each), rows of `text`
    def pick(self, labels: Tensor, u: Tensor) -> Text:
        """One of each label's captions, by uniform u in [0, 1): (B,), (B,) -> a batch of B."""
        rows = self.of_label[labels.long(), (u * self.of_label.shape[1]).long()]
        return Text(self.text.pooled[rows], self.text.tokens[rows])

def load_captions(track: Track, tokens: int, device) -> Captions:
    """The track's own table, with `tokens` CLIP tokens of each caption."""
    with reading(track), safe_open(Path("data", track.name, "text.safetensors"), "pt") as f:
        labels = np.array(json.loads(f.metadata()["labels"]))
        n, width, pooled = len(labels), track.text_width, f.get_tensor("pooled").float()
        context = f.get_tensor("tokens").float() if tokens else torch.zeros(n, 0, width)
        counts = set(np.bincount(labels).tolist())               # captions of a label: all alike
        found, wanted = (pooled.shape, context.shape), ((n, width), (n, tokens, width))
        if found != wanted or len(counts) > 1:
            raise ValueError(f"text.safetensors holds {found}, {counts} a label, not {wanted}")
        of_label = np.argsort(labels, kind="stable").reshape(-1, counts.pop())
        return Captions(Text(pooled.to(device), context.to(device)),
                        torch.from_numpy(of_label).to(device))

def draw_seed(seed: int, counter: int, stream: int) -> int:
    """A 32-bit seed, different for every (counter, stream) of a run."""
    return (seed * 0x9E3779B1 + counter * 2 + stream) % 2 ** 32

def scaled(track: Track, stored: Tensor) -> Tensor:
    """Stored latents (B, C, H, W) -> the model's scale, float32."""
    return (stored.float() - track.shift) * track.scale

def route(cfg: Config, context: int, step: int, u: Tensor):
    """(keep, skip) of a Batch from uniform u (B, 1 + N); the counts depend on `step` alone."""
    skip, patches = u[:, 0] < cfg.path_drop, u[:, 1:].argsort(dim=1) + context
    routed = cfg.route_keep < 1 and step < (1 - cfg.dense_tail) * cfg.steps
    first = torch.arange(context, device=u.device).expand(len(u), -1)          # always kept
    keep = torch.cat([first, patches[:, :round(cfg.route_keep * patches.shape[1])]], dim=1)
    return keep[:, :None if routed else 0], skip

def make_batch(state, captions: Captions, rows: list, seed: int, step: int) -> Batch:
    """This process's slice of a global batch, from its stored rows (see Shards.gather). All that is
    random in a step is drawn here, for the global batch, from (seed, step) alone, then sliced."""
    cfg, model, device, mine = state.cfg, state.model, state.world.device, state.mine
    B, (stored, labels, *features) = cfg.batch_size, rows
    g = torch.Generator(device).manual_seed(draw_seed(seed, step, stream=0))
    noise = torch.randn(B, math.prod(model.track.shape), generator=g, device=device)[mine]
    start, caption, drop, flip = torch.rand(4, B, generator=g, device=device)
    t = shift_time(start, cfg.t_shift)[mine]
    u = torch.rand(B, 1 + len(model.position), generator=g, device=device)[mine]
    more_noise = torch.randn(B, model.extra, generator=g, device=device)[mine]
    x = scaled(model.track, stored)
    if cfg.flip:
        x = torch.where(flip[mine].view(-1, 1, 1, 1) < 0.5, x.flip(-1), x)
    # int8 -> standard deviations of the first component
    features = features[0].float() * (4 / 127) if features else x.new_zeros(len(x), 1, PCA)
    text, null = captions.pick(labels, caption[mine]), model.null_text(len(x))
    shown = (drop[mine] >= cfg.caption_drop).view(-1, 1)
    return Batch(torch.cat([x.flatten(1), features[:, 0, :model.extra]], dim=1),
                 torch.cat([noise, more_noise], dim=1), t,
                 torch.where(shown, text.pooled, null.pooled),
                 torch.where(shown[..., None], text.tokens, null.tokens),
                 *route(cfg, model.context, step, u), features)

# ----- Distributed, log, clock, checkpoints -------------------------------------------------------

class World:
    """This process among all, and the collectives of a run. One process needs no launcher."""
    def __init__(self):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.step, self.device, gpu = 0, torch.device("cpu"), None   # step: for error lines
        if torch.cuda.is_available():
            self.device = gpu = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(gpu)
        if self.size > 1:
            dist.init_process_group("nccl" if gpu else "gloo", device_id=gpu,
                                    timeout=timedelta(minutes=10))   # of one collective
    def part(self, count: int) -> slice:
        """This process's part of `count` rows."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)
    def sum(self, x: Tensor) -> Tensor:
        """Sum over processes, in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x
    def reduce_scatter(self, x: Tensor):
        """(n, ...) on each -> this process's n / size rows of the sum, and a function to wait."""
        if self.size == 1:
            return x, lambda: None
        out = x.new_empty(len(x) // self.size, *x.shape[1:])
        return out, dist.reduce_scatter_tensor(out, x, async_op=True).wait
    def all_gather(self, x: Tensor):
        """(n, ...) on each -> (n * size, ...) on all, and a function to wait."""
        if self.size == 1:
            return x, lambda: None
        out = x.new_empty(len(x) * self.size, *x.shape[1:])
        return out, dist.all_gather_into_tensor(out, x.contiguous(), async_op=True).wait
    def now(self) -> float:
        """Seconds, once every process and device has arrived."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self.size > 1:
            dist.barrier()
        return time.perf_counter()
    def machine(self) -> str:
        """How many of which GPU, or of which CPU with how many threads."""
        if self.device.type == "cuda":
            return f"{self.size} x {torch.cuda.get_device_name()}"
        cpu = os.popen("lscpu 2> /dev/null | sed -n 's/^Model name: *//p'").read().strip()
        return f"{self.size} x {cpu or platform.machine()}, {torch.get_num_threads()} threads"

class Clock:
    """Seconds of the timed region. The only clock a record's number is read from."""
    def __init__(self, world: World, seconds: float):
        self.world, self.seconds, self.started = world, seconds, None
    def start(self):
        self.started = self.world.now()
    def read(self) -> float:
        return self.seconds + (self.world.now() - self.started if self.started else 0.0)
    def stop(self):
        self.seconds, self.started = self.read(), None

def write_atomic(path: Path, write):
    """write(temporary path), sync, rename: the file is whole or not there. Raises UserError."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as e:        # torch.save raises RuntimeError
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({str(e).splitlines()[0]}); free some disk, then "
                        f"continue with RESUME={path.parent}")

def load_checkpoint(path, device="cpu"):
    """(model with the checkpoint's EMA weights, its metadata)."""
    with safe_open(path, "pt") as f:
        meta, weights = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}
    cfg = CONFIGS[meta["config"]]
    model = Transformer(cfg, TRACKS[cfg.track])
    model.load_state_dict(weights)
    return model.to(device).eval(), meta

class State:
    """What a run carries from step to step: model, EMA, optimizers. Saved, restored, rewound."""
    def __init__(self, cfg: Config, seed: int, world: World):
        self.cfg, self.world, self.mine = cfg, world, world.part(cfg.batch_size)
        self.model = Transformer(cfg, TRACKS[cfg.track])
        self.model.init_weights(seed)
        self.ema = copy.deepcopy(self.model.to(world.device)).requires_grad_(False)
        self.params, self.ema_params = list(self.model.parameters()), list(self.ema.parameters())
        self.optimizers = make_optimizers(self.model, cfg, world)
        self.training_loss, self.val_loss = (
            torch.compile(f, dynamic=False, fullgraph=True) if cfg.compile else f
            for f in (training_loss, flow_matching_loss))
    def state_dict(self) -> dict:
        """Everything, the same for any number of processes. Collective."""
        return dict(model=self.model.state_dict(), ema=self.ema.state_dict(),
                    optimizers=[opt.state_dict() for opt in self.optimizers])
    def load_state_dict(self, state: dict):
        """In place: what is compiled stays valid."""
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        for opt, saved in zip(self.optimizers, state["optimizers"]):
            opt.load_state_dict(saved)

# ----- Main ---------------------------------------------------------------------------------------

def train_step(state: State, step: int, batch: Batch) -> Tensor:
    """One update of model and EMA. Returns this process's part of the mean loss; never waits for
    the device. The loss is divided by the global batch, so gradients only ever need a SUM."""
    cfg, world, total = state.cfg, state.world, 0.0
    size = images_per_forward(cfg, world.size, cfg.batch_size)
    for i in range(0, len(batch.x), size):
        part = Batch(*(a[i:i + size] for a in batch))
        loss = state.training_loss(state.model, part).sum() / cfg.batch_size
        loss.backward()
        total = total + loss.detach()
    share = lr_schedule(step / cfg.steps, cfg.warmup, cfg.cooldown)
    for opt in state.optimizers:
        for group in opt.param_groups:
            group["lr"] = group["peak_lr"] * share
        if world.size > 1 and not isinstance(opt, Muon):         # one flat all-reduce, 8P(W-1)/W B
            grads = [p.grad for group in opt.param_groups for p in group["params"]]
            flat = world.sum(torch.cat([g.flatten() for g in grads]))
            for g, summed in zip(grads, flat.split([g.numel() for g in grads])):
                g.copy_(summed.view_as(g))
        opt.step()
    state.model.zero_grad(set_to_none=True)
    with torch.no_grad():
        torch._foreach_lerp_(state.ema_params, state.params, 1 - ema_decay(step, cfg.ema_decay))
    return total

@torch.no_grad()
def validate(state: State, val: Shards, captions: Captions) -> float:
    """Mean loss of the EMA over the contract's validation images, noise and times, with each
    label's first caption. The same float on every process."""
    track, world = state.model.track, state.world
    noise, t = validation_draws(track, track.val_images)
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    mine, size = world.part(len(t)), images_per_forward(state.cfg, world.size, len(t))
    for i in range(mine.start, mine.stop, size):
        stored, labels, e, tt = (a.to(world.device) for a in (
            *val.gather(np.arange(i, i + size)), noise[i:i + size], t[i:i + size]))
        text = captions.pick(labels, torch.zeros_like(tt))
        total += state.val_loss(state.ema, scaled(track, stored), e, tt, text).double().sum()
    return world.sum(total).item() / len(t)

def warm_up(state: State, shapes: list):
    """Compiles every shape of the run on noise, then puts everything back. Off the clock.
    shapes: of a row of each column of the shards."""
    cfg, world, track = state.cfg, state.world, state.model.track
    before = copy.deepcopy(state.state_dict())
    one = torch.zeros(1, 1, dtype=torch.int64, device=world.device)
    captions = Captions(state.model.null_text(1), one)
    rows = [torch.zeros(cfg.batch_size // world.size, *s, device=world.device) for s in shapes]
    for step in (0, 1, 2, cfg.steps - 1, cfg.steps - 1):         # the last may be unrouted
        batch = make_batch(state, captions, rows, 0, step)
        train_step(state, step, batch)
    size = images_per_forward(cfg, world.size, track.val_images)
    t, pooled, tokens = (a[:size] for a in batch[2:5])
    x = scaled(track, rows[0][:size])
    with torch.no_grad():
        state.val_loss(state.ema, x, x + 1, t, Text(pooled, tokens))
    state.load_state_dict(before)

def load_state(resume: Path, code_sha256: str) -> dict:
    """What a killed run left in its folder. Raises UserError."""
    try:
        saved = torch.load(resume / "state.pt", map_location="cpu", weights_only=True)
    except Exception as e:
        raise UserError(f"{resume} has no state to resume from ({type(e).__name__}): it is "
                        "finished or not a run's folder; start a new one without RESUME")
    if saved["meta"]["code_sha256"] == code_sha256:
        return saved
    raise UserError(f"{resume} is of another train_speedrun.py: cp {resume}/train_speedrun.py .")

def train(name: str, seed: int, resume: Path | None, world: World) -> Path:
    """One run, from the checks to the last log line; returns its folder. Raises UserError."""
    source = Path(__file__).read_text()
    meta = dict(config=name, seed=seed, step=0, seconds=0.0,
                code_sha256=hashlib.sha256(source.encode()).hexdigest())
    if resume:
        saved = load_state(resume, meta["code_sha256"])
        meta = saved["meta"]
    name, seed, start = meta["config"], meta["seed"], meta["step"]
    cfg, track = CONFIGS[name], TRACKS[CONFIGS[name].track]
    check_config(cfg, world.size)
    data, val = Shards(track, "train", bool(cfg.reg or cfg.repa_layers)), Shards(track, "val")
    load_captions(track, cfg.text_tokens, "cpu")         # a check: the run's is made on the clock
    counts, wanted = (data.count, val.count), (track.train_images, track.val_images)
    assert (data.trial or counts[0] == wanted[0]) and counts[1] >= wanted[1], (
        f"data/{track.name} holds {counts} training and validation images, the contract {wanted}; "
        f"run: python data/download.py {track.name}")
    meta["data_sha256"] = data.sha256
    torch.set_float32_matmul_precision("high")
    state, clock = State(cfg, seed, world), Clock(world, meta["seconds"])
    if resume:
        state.load_state_dict(saved)
    folder = resume or Path("logs", f"{datetime.now():%Y%m%d-%H%M%S}_{name}_seed{seed}")

    def save(step: int):
        """State to resume from; where it is time, validation and checkpoint before it. Rank 0
        writes; where it cannot, its end ends the others."""
        if step in eval_at:
            meta["val_loss"] = validate(state, val, captions)
            report(step, "val_loss", meta["val_loss"])
        meta.update(step=step, images=step * cfg.batch_size, seconds=clock.seconds)
        whole, notes = state.state_dict() | dict(meta=meta), {k: str(v) for k, v in meta.items()}
        if world.rank == 0 and step in eval_at:
            weights = {k: v.cpu() for k, v in whole["ema"].items()}
            write_atomic(folder / f"step_{step:06d}.safetensors",
                         lambda path: save_file(weights, path, notes))
        if world.rank == 0 and step < cfg.steps:
            write_atomic(folder / "state.pt", lambda path: torch.save(whole, path))

    eval_at = {round(cfg.steps * (k + 1) / cfg.evals) for k in range(cfg.evals)}
    if not resume:
        save(0)                                          # a full disk shows now
        if world.rank == 0:
            (folder / "train_speedrun.py").write_text(source)
    log_file = open(folder / "log.txt" if world.rank == 0 else os.devnull, "a")

    def log(line: str):
        print(line, file=log_file, flush=True)
        if world.rank == 0:
            print(line, flush=True)

    print(f"\nresumed from step {start} at {1000 * clock.seconds:.0f}ms" if resume
          else source + "=" * 100, file=log_file)
    parameters = sum(p.numel() for p in state.params)
    log(f"{folder}: seed {seed}, {parameters / 1e6:.2f}M parameters, {data.count} training images"
        f"{' (a part: a trial, no record)' * data.trial}\n{world.machine()}, python "
        f"{platform.python_version()}, torch {torch.__version__}\n{json.dumps(asdict(cfg))}")
    warm_up(state, [column[0].shape[1:] for column in data.columns])
    losses = torch.zeros(cfg.steps, device=world.device)         # this process's parts

    def checked_losses() -> Tensor:
        """Mean loss of every step so far. Raises where one is not finite."""
        mean = world.sum(losses.clone())
        if not mean.isfinite().all():
            raise UserError(f"the loss of step {mean.isfinite().int().argmin() + 1} is not finite: "
                            "lower the learning rate; what was saved before it stays")
        return mean

    def report(step: int, key: str, value: float):
        ms = 1000 * clock.read()
        log(f"step:{step}/{cfg.steps} images:{step * cfg.batch_size} {key}:{value:.5f} "
            f"train_time:{ms:.0f}ms step_avg:{ms / max(step, 1):.2f}ms")

    compiled = torch._dynamo.utils.counters["stats"]
    graphs = compiled["unique_graphs"]
    clock.start()
    captions = load_captions(track, cfg.text_tokens, world.device)
    for model in (state.model, state.ema):
        model.set_text(captions.text)
    loader = Loader(data, cfg, seed, world)
    for step in range(start, cfg.steps):
        world.step = step + 1
        if step > start and (step in eval_at or step % cfg.save_every == 0):
            clock.stop()
            checked_losses()
            save(step)
            clock.start()
        batch = make_batch(state, captions, loader(step), seed, step)
        losses[step] = train_step(state, step, batch)
        if step < 10 or (step + 1) % 50 == 0:
            report(step + 1, "train_loss", checked_losses()[step].item())
    checked_losses()
    clock.stop()
    graphs = compiled["unique_graphs"] - graphs
    save(cfg.steps)
    memory = torch.cuda.max_memory_allocated() if world.device.type == "cuda" else \
        1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    log("=" * 100 + "\n" + "\n".join(f"{k}: {v}" for k, v in dict(
        run_id=folder.name, config=name, track=cfg.track, seed=seed, resumed=int(bool(resume)),
        world_size=world.size, steps=cfg.steps, images=meta["images"], parameters=parameters,
        val_loss=f"{meta['val_loss']:.5f}", train_time_s=f"{clock.seconds:.3f}",
        images_per_second=f"{meta['images'] / clock.seconds:.1f}", sampling_nfe=sampling_nfe(cfg),
        peak_memory_mib=memory // 2 ** 20, graphs_compiled_on_the_clock=graphs,
        code_sha256=meta["code_sha256"], data_sha256=meta["data_sha256"]).items()))
    if world.rank == 0:
        (folder / "state.pt").unlink()          # finished: nothing left to resume
    return folder

def main() -> int:
    """The track from the command line, RESUME and SEED from the environment. The exit code."""
    world, status, env = None, 0, os.environ

    def terminated(signum, frame):
        raise UserError("ended by SIGTERM; continue with RESUME=logs/<run_id>")
    try:
        signal.signal(signal.SIGTERM, terminated)
        name, seed, resume = " ".join(sys.argv[1:]), env.get("SEED", "0"), env.get("RESUME")
        assert (name := name or "cifar10") in CONFIGS, (
            f"unknown track {name!r}: choose one of {', '.join(CONFIGS)}")
        assert seed.isdigit(), f"SEED={seed!r} is not a whole number"
        world = World()
        train(name, int(seed), Path(resume) if resume else None, world)
    except (UserError, AssertionError, OSError) as e:
        status, line = 2, e
    except RuntimeError as e:
        if not world or world.size == 1:
            raise                                        # a bug: its traceback is the help
        status, line = 1, f"{str(e).splitlines()[0]}: another process died, or a bug here"
    if status:
        at = f"rank {world.rank}, step {world.step}: " if world and world.step else ""
        print(f"train_speedrun.py: {at}{line}", file=sys.stderr, flush=True)
    if world and world.size > 1:
        if status:
            os._exit(status)                             # never wait for a dead process
        gc.collect()                                     # gloo aborts where tensors outlive it
        dist.barrier()
        dist.destroy_process_group()
    return status

if __name__ == "__main__":
    sys.exit(main())
