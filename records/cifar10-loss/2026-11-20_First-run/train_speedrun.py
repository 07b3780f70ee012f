"""ImageGen Speedrun: train a text-to-image flow-matching transformer to its target, fast.

    python train_speedrun.py [cifar10 | cifar10-cpu | imagenet256]        one process
    torchrun --nproc_per_node=8 train_speedrun.py imagenet256             one node of 8 GPUs
    SEED=1 python train_speedrun.py         another seed
    RESUME=logs/<run_id> python ...         continue a killed run to the weights it would have had

Everything else is edited in this file: it is copied whole into its own log, and the copy is what
the referee imports. A racer may change all of it but the contract. The referee uses five names:
CONFIGS, Text, load_checkpoint(path), velocity(model, x, t, text) and sample(model, noise, text,
fresh).

Clock  In: from the fetch of the first batch on, every table derived from the data, forward,
       backward, optimizer, EMA, the logged lines, the final swap of the EMA into the model.
       Out: process start, compilation and warm-up on random data, validation, checkpoint writes.
Sizes  B images, C x H x W latent, N = (H/patch)(W/patch) tokens, D width, T caption tokens.
Cap    1,000 lines (tested). Sections: contract, hyperparameters, optimizer, model, objective and
       sampler, data, distributed/log/clock, main.
"""
import copy, gc, hashlib, json, math, os, platform, re, resource, signal, sys, time  # noqa: E401
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Optional

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
    # sampler
    sampler: str = "euler"         # or "sde": Euler-Maruyama (SiT, arXiv 2401.08740)
    sample_steps: int = 50
    guidance: float = 1.0          # 1 = off, and then a step costs one evaluation instead of two
    guidance_interval: tuple = (0.0, 1.0)  # of t (Kynkaanniemi et al., arXiv 2404.07724)
    sample_shift: float = 1.0      # time shift of the sampling grid
    last_step: float = 0.0         # size of the sde's final, noise-free step; 0 = as the others
    # numerics
    bf16: bool = True              # autocast over fp32 weights; Newton-Schulz in bf16 too
    compile: bool = True           # False: plain eager PyTorch, for debugging

CONFIGS = {
    "cifar10": Config(             # one GPU
        track="cifar10", patch=2, width=512, depth=12, flip=True,
        batch_size=512, steps=10_000, save_every=2000, guidance=2.0),
    "cifar10-cpu": Config(         # a laptop, in minutes
        track="cifar10", patch=4, width=192, depth=4, flip=True,
        batch_size=64, steps=2400, muon_lr=0.025, adamw_lr=2e-3, cooldown=1.0,
        sample_steps=30, guidance=6.0, guidance_interval=(0.2, 0.85), sample_shift=2.0),
    "imagenet256": Config(         # SiT-B/1 on 8 GPUs
        track="imagenet256", patch=1, width=768, depth=12,
        batch_size=256, steps=400_000, evals=6, save_every=10_000, muon_lr=1e-3, adamw_lr=1e-4,
        sigma_data=1.0,            # what the contract's scale is for
        t_shift=math.sqrt(32 * 16 * 16 / 4096), sample_shift=math.sqrt(32 * 16 * 16 / 4096)),
}

def images_per_forward(cfg: Config, world, total: int) -> int:
    """The largest equal parts, up to micro_batch, in which a process does its share of `total`."""
    return math.gcd(total // world.size, cfg.micro_batch or cfg.batch_size // world.size)

def check_config(cfg: Config, world):
    """Refuses what cannot be trained, before any work. AssertionError with the values."""
    track, W, local = TRACKS[cfg.track], world.size, cfg.batch_size // world.size
    assert track.shape[1] % cfg.patch == track.shape[2] % cfg.patch == 0, (
        f"patch {cfg.patch} does not divide {track.shape}")
    assert cfg.width % cfg.head_dim == cfg.head_dim % 4 == 0, (
        f"head_dim {cfg.head_dim} must divide width {cfg.width} and be a multiple of 4 (2-D RoPE)")
    assert cfg.batch_size % W == track.val_images % W == 0, (
        f"world size {W} does not divide batch_size {cfg.batch_size} and the {track.val_images} "
        "validation images: start another number of processes")
    assert local % (cfg.micro_batch or local) == 0, (
        f"micro_batch {cfg.micro_batch} does not divide the {local} images of a process")
    assert 1 <= cfg.evals <= cfg.steps, f"evals {cfg.evals} is not in 1 .. steps {cfg.steps}"
    assert cfg.sampler in ("euler", "sde"), f"sampler {cfg.sampler!r} is neither euler nor sde"
    assert sampling_nfe(cfg) <= track.max_nfe, (
        f"sample takes {sampling_nfe(cfg)} network evaluations an image, more than {track.max_nfe}")

# ---------------------------------------------------------------------------------------------
# Optimizer: Muon on the block matrices, AdamW on the rest
# ---------------------------------------------------------------------------------------------

# Polar Express (arXiv 2505.16932): the optimal composition of odd quintics, 5 steps, safety 2e-2
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323))

def orthogonalize(g: Tensor, dtype=torch.bfloat16) -> Tensor:
    """Nearest semi-orthogonal matrix, about: (n, rows, cols) with rows >= cols -> the same.

    All singular values go near 1. Source: Muon (Jordan 2024), with Polar Express coefficients.
    """
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

    params: (out, in) matrices; a group's `split` says how many matrices its members hold below
    each other (3 for a fused QKV). Matrices of one shape, transposed where wide, form a bucket
    (n, rows, cols); each process reduces, keeps the momentum of and orthogonalizes n / W of them.

    Traffic a step and process with ring collectives, for P parameters and W processes:
    reduce-scatter 4P(W-1)/W bytes of fp32 gradients, all-gather 2P(W-1)/W bytes of bf16 updates
    (4P in fp32): 297 and 149 MB for the 85M of imagenet256 on 8. All reductions start at once; a
    bucket is orthogonalized while the reductions behind it and the gathers before it are on their
    way. Gradients are SUMs: the loss is scaled.
    """

    def __init__(self, params, lr, momentum, dtype, world, update=muon_update):
        super().__init__(params, dict(lr=lr, momentum=momentum, split=1))
        self.world, self.dtype, self.update = world, dtype, update
        self.buckets, self.momentum = {}, {}                     # by shape, rows >= cols
        for group in self.param_groups:
            for p in group["params"]:
                shape = (p.shape[0] // group["split"], p.shape[1])
                self.buckets.setdefault(tuple(sorted(shape, reverse=True)), []).append((group, p))
        for shape, members in self.buckets.items():
            local = -(-sum(g["split"] for g, _ in members) // world.size)   # padded: equal shards
            self.momentum[shape] = torch.zeros(local, *shape, device=world.device)

    @torch.no_grad()
    def step(self):
        grads, updates = [], []
        for shape, members in self.buckets.items():
            mats = [p.grad.view(g["split"], -1, p.shape[1]) for g, p in members]
            mats = torch.cat([m if m.shape[1] >= m.shape[2] else m.mT for m in mats])
            padding = len(self.momentum[shape]) * self.world.size - len(mats)
            grads.append(self.world.reduce_scatter(F.pad(mats, (0, 0, 0, 0, 0, padding))))
        for (shape, members), (grad, wait) in zip(self.buckets.items(), grads):
            wait()
            beta = members[0][0]["momentum"]
            updates.append(self.world.all_gather(
                self.update(grad, self.momentum[shape], beta, self.dtype)))
        for members, (update, wait) in zip(self.buckets.values(), updates):
            wait()
            for group, p in members:
                u, update = update[:group["split"]], update[group["split"]:]
                rows, cols = p.shape[0] // group["split"], p.shape[1]
                u = (u if rows >= cols else u.mT).reshape(p.shape)
                p.add_(u, alpha=-group["lr"] * max(1, rows / cols) ** 0.5)   # Keller's scaling

    def state_dict(self) -> dict:
        """Momentum of all matrices, the same for any number of processes. Collective."""
        out = {}
        for shape, members in self.buckets.items():
            full, wait = self.world.all_gather(self.momentum[shape])
            wait()
            out[shape] = full[:sum(g["split"] for g, _ in members)]
        return out

    def load_state_dict(self, state: dict):
        for shape, shard in self.momentum.items():
            mine = state[shape][self.world.rank * len(shard):][:len(shard)]
            shard.zero_()[:len(mine)].copy_(mine)                # the rest is padding

# Every parameter, by its name without "blocks.N.": (initialisation, optimizer). A new one goes
# here, into its module and into the forward; a name without a rule raises.
RULES = {
    "embed.weight": ("fan_in", "adamw"), "embed.bias": ("zero", "adamw"),
    "position": ("small", "adamw"), "value_mix": ("half", "adamw"),
    "time_in.weight": ("fan_in", "adamw"), "time_in.bias": ("zero", "adamw"),
    "time_out.weight": ("fan_in", "adamw"), "time_out.bias": ("zero", "adamw"),
    "pooled_in.weight": ("fan_in", "adamw"), "tokens_in.weight": ("fan_in", "adamw"),
    "modulation.weight": ("zero", "adamw"), "modulation.bias": ("zero", "adamw"),  # adaLN-zero
    "qkv.weight": ("fan_in", "muon_qkv"), "proj.weight": ("fan_in", "muon"),
    "up.weight": ("fan_in", "muon"), "down.weight": ("fan_in", "muon"),
    "head.weight": ("zero", "adamw"), "head.bias": ("zero", "adamw"),
}

def rule(name: str) -> tuple:
    """(initialisation, optimizer) of a parameter. Raises ValueError for an unknown name."""
    leaf = re.sub(r"^blocks\.\d+\.", "", name)
    if leaf not in RULES:
        raise ValueError(f"parameter {name} has no rule: give {leaf} one in RULES")
    return RULES[leaf]

def make_optimizers(model: nn.Module, cfg: "Config", world) -> list:
    """[Muon, AdamW], or [AdamW] where cfg.muon_lr is 0; together they train each parameter once."""
    groups, optimizers = dict(muon_qkv=[], muon=[], adamw=[]), []
    for name, p in model.named_parameters():
        groups[rule(name)[1] if cfg.muon_lr else "adamw"].append(p)
    if cfg.muon_lr:
        optimizers.append(Muon(
            [dict(params=groups["muon_qkv"], split=3), dict(params=groups["muon"])],
            cfg.muon_lr, cfg.muon_momentum, torch.bfloat16 if cfg.bf16 else torch.float32, world,
            torch.compile(muon_update, dynamic=False) if cfg.compile else muon_update))
    optimizers.append(torch.optim.AdamW(groups["adamw"], cfg.adamw_lr, cfg.adamw_betas,
                                        weight_decay=0.0, fused=True))
    trained = [p for opt in optimizers for group in opt.param_groups for p in group["params"]]
    assert sorted(map(id, trained)) == sorted(map(id, model.parameters())), "not each exactly once"
    for opt in optimizers:
        for group in opt.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers

def lr_schedule(progress: float, warmup: float, cooldown: float) -> float:
    """Share of the peak learning rate at progress in [0, 1): linear up, flat, linear to 0."""
    return min(1.0, progress / max(warmup, 1e-9), (1 - progress) / max(cooldown, 1e-9))

def ema_decay(step: int, limit: float) -> float:
    """EMA decay after update number `step` (from 0): warmed up, to forget the initial weights."""
    return min(limit, (1 + step) / (10 + step))

# ---------------------------------------------------------------------------------------------
# Model: a diffusion transformer (DiT, arXiv 2212.09748) on a pixel or latent grid
# ---------------------------------------------------------------------------------------------

class Text(NamedTuple):
    """A batch of captions as CLIP gives them, not normalised. Without token context T is 0."""
    pooled: Tensor    # (B, text_width)
    tokens: Tensor    # (B, T, text_width)

def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],))

def rope_table(rows: int, cols: int, head_dim: int, context: int = 0):
    """cos, sin (1, 1, context + N, head_dim / 2) of axial 2-D RoPE; context tokens do not turn.

    The first half of the angles turns with the row, the second with the column. Wavelengths from
    2 pi to 2 pi * 100 tokens: the grid has 8 to 16 a side. Source: RoFormer (arXiv 2104.09864).
    """
    freqs = 100.0 ** -(torch.arange(head_dim // 4) / (head_dim // 4))
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    angles = torch.cat([y.reshape(-1, 1) * freqs, x.reshape(-1, 1) * freqs], dim=1)  # (N, d/2)
    angles = torch.cat([torch.zeros(context, head_dim // 2), angles])
    return angles.cos()[None, None], angles.sin()[None, None]

def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(B, heads, N, head_dim), turned by position."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)

def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention, (B, heads, N, head_dim) each -> the same."""
    if q.device.type == "cpu":         # about 4x faster than the fused one there, 64 tokens
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v)

class Block(nn.Module):
    """Attention and MLP, both behind adaLN-zero. (B, N, D) -> (B, N, D)."""

    def __init__(self, width: int, head_dim: int, mlp_ratio: int):
        super().__init__()
        self.head_dim = head_dim
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, mlp_ratio * width, bias=False)
        self.down = nn.Linear(mlp_ratio * width, width, bias=False)

    def forward(self, x, rope, modulation, first_values, value_mix):
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation               # each (B, 1, D)
        h = rms_norm(x) * (1 + scale1) + shift1
        B, N, D = h.shape
        qkv = self.qkv(h).view(B, N, 3, D // self.head_dim, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)                          # (B, heads, N, hd)
        first_values = v if first_values is None else first_values
        v = torch.lerp(v, first_values, value_mix.to(v.dtype))  # value residual: arXiv 2410.17897
        q, k = rotate(rms_norm(q), *rope), rotate(rms_norm(k), *rope)           # QK-norm
        h = attend(q.to(v.dtype), k.to(v.dtype), v)
        x = x + gate1 * self.proj(h.transpose(1, 2).reshape(B, N, D))
        h = rms_norm(x) * (1 + scale2) + shift2
        return x + gate2 * self.down(F.relu(self.up(h)).square()), first_values  # Primer: relu^2

class Transformer(nn.Module):
    """Velocity network: (B, C, H, W) at times (B,) under a caption -> (B, C, H, W), float32."""

    def __init__(self, cfg: Config, track: Track):
        super().__init__()
        c, h, w = track.shape
        D, p = cfg.width, cfg.patch
        self.cfg, self.track = cfg, track
        self.embed = nn.Linear(c * p * p, D)
        self.position = nn.Parameter(torch.empty(h * w // p ** 2, D))
        self.time_in = nn.Linear(256, D)
        self.time_out = nn.Linear(D, D)
        self.pooled_in = nn.Linear(track.text_width, D, bias=False)
        if cfg.text_tokens:
            self.tokens_in = nn.Linear(track.text_width, D, bias=False)
        self.modulation = nn.Linear(D, (6 * cfg.depth + 2) * D)   # all adaLN in one matmul
        self.value_mix = nn.Parameter(torch.empty(cfg.depth))
        self.blocks = nn.ModuleList(
            Block(D, cfg.head_dim, cfg.mlp_ratio) for _ in range(cfg.depth))
        self.head = nn.Linear(D, c * p * p)
        cos, sin = rope_table(h // p, w // p, cfg.head_dim, cfg.text_tokens)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
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
            std = dict(zero=0.0, half=0.0, small=0.02, fan_in=p.shape[-1:].numel() ** -0.5)[kind]
            p.copy_(std * torch.randn(p.shape, generator=g) + 0.5 * (kind == "half"))

    @torch.no_grad()
    def set_text(self, table: Text):
        """Takes the centre and scale of the track's caption table (captions, ...)."""
        for x, mean, std in ((table.pooled, self.text_mean, self.text_std),
                             (table.tokens, self.token_mean, self.token_std)):
            if x.numel():
                mean.copy_(x.mean(0))
                std.copy_((x - mean).square().mean().sqrt())

    def null_text(self, count: int) -> Text:
        """The empty caption: the table's mean, zero after centring."""
        return Text(self.text_mean.expand(count, -1), self.token_mean.expand(count, -1, -1))

    def forward(self, x: Tensor, t: Tensor, text: Text) -> Tensor:
        B, C, H, W = x.shape
        p = self.cfg.patch
        h, w = H // p, W // p
        # time and caption
        freqs = torch.exp(-math.log(10_000) * torch.arange(128, device=x.device) / 128)
        angles = 1000 * t[:, None] * freqs                                      # (B, 128)
        c = self.time_out(F.silu(self.time_in(torch.cat([angles.cos(), angles.sin()], dim=1))))
        c = c + self.pooled_in((text.pooled - self.text_mean) / self.text_std)
        mods = self.modulation(F.silu(c)).view(B, -1, 1, self.cfg.width).unbind(1)
        # preconditioning (EDM, arXiv 2206.00364, eq. 7, for velocities): the best linear guess from
        # x_t comes for free, the network sees unit variance and gives the rest
        skip, out = 0.0, 1.0
        if s := self.cfg.sigma_data:
            tt = t.view(-1, 1, 1, 1)
            var = ((1 - tt) * s) ** 2 + tt ** 2                                 # of x_t
            skip, out, x = (tt - (1 - tt) * s * s) / var * x, s * var.rsqrt(), x * var.rsqrt()
        # patches
        x = x.view(B, C, h, p, w, p).permute(0, 2, 4, 1, 3, 5).reshape(B, h * w, C * p * p)
        x = self.embed(x)                                                       # (B, N, D)
        x = x + self.position.to(x.dtype)
        if self.cfg.text_tokens:
            context = self.tokens_in((text.tokens - self.token_mean) / self.token_std)
            x = torch.cat([context, x], dim=1)                                  # (B, T + N, D)
        rope, values = (self.cos, self.sin), None
        for i, block in enumerate(self.blocks):
            x, values = block(x, rope, mods[6 * i:6 * i + 6], values, self.value_mix[i])
        x = rms_norm(x[:, self.cfg.text_tokens:]) * (1 + mods[-1]) + mods[-2]
        x = self.head(x).float()                                                # (B, N, C p p)
        x = x.view(B, h, w, C, p, p).permute(0, 3, 1, 4, 2, 5).reshape(B, C, H, W)
        return skip + out * x

# ---------------------------------------------------------------------------------------------
# Objective and sampler: x_t = (1 - t) x + t noise, velocity = noise - x (arXiv 2209.03003)
# ---------------------------------------------------------------------------------------------

def velocity(model: nn.Module, x: Tensor, t: Tensor, text: Text) -> Tensor:
    """The model's velocity at (x, t): (B, C, H, W), (B,) -> (B, C, H, W). One evaluation each."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=model.cfg.bf16):
        return model(x, t, text)

def flow_matching_loss(model: nn.Module, x, noise, t, text: Text) -> Tensor:
    """Per-image mean squared velocity error (B,), float32. Source: arXiv 2210.02747, eq. 23."""
    tt = t.view(-1, 1, 1, 1)
    error = velocity(model, (1 - tt) * x + tt * noise, t, text) - (noise - x)
    return error.square().mean(dim=(1, 2, 3))

def shift_time(t, shift: float):
    """SD3's time shift (arXiv 2403.03206, eq. 23): identity at 1, more noise above."""
    return shift * t / (1 + (shift - 1) * t)

def sampling_times(cfg: Config) -> list:
    """The sampler's grid, sample_steps + 1 times from 1 to 0."""
    times = [shift_time(1 - i / cfg.sample_steps, cfg.sample_shift)
             for i in range(cfg.sample_steps + 1)]
    if cfg.last_step:
        times = [max(t, cfg.last_step) if t > 0 else t for t in times[:-2]] + [cfg.last_step, 0.0]
    return times

def guided(t: float, cfg: Config) -> bool:
    return cfg.guidance != 1 and cfg.guidance_interval[0] <= t <= cfg.guidance_interval[1]

def sampling_nfe(cfg: Config) -> int:
    """Network evaluations per image of `sample`: one a step, two where it is guided."""
    return sum(1 + guided(t, cfg) for t in sampling_times(cfg)[:-1])

@torch.no_grad()
def sample(model: nn.Module, noise: Tensor, text: Text, fresh=None) -> Tensor:
    """Images (B, C, H, W) in the model's scale from noise (B, C, H, W) under captions `text`.

    fresh: a function that returns new unit noise of noise's shape at every call; the sde asks for
    it once a step. Euler on dx = v dt, or Euler-Maruyama on the reverse SDE with diffusion 2t
    (SiT, eq. 8): its score -(x + (1 - t) v) / t makes the drift v + x + (1 - t) v.
    """
    cfg, x, B = model.cfg, noise, len(noise)
    both = Text(*(torch.cat(pair) for pair in zip(text, model.null_text(B))))
    times = sampling_times(cfg)
    for i, (t, t_next) in enumerate(zip(times, times[1:])):
        if guided(t, cfg):                                       # one call, two evaluations
            v, v_null = velocity(model, torch.cat([x, x]), x.new_full((2 * B,), t), both).chunk(2)
            v = v_null + cfg.guidance * (v - v_null)             # arXiv 2207.12598, eq. 6
        else:
            v = velocity(model, x, x.new_full((B,), t), text)
        if cfg.sampler == "sde":
            v = v + x + (1 - t) * v
        x = x + (t_next - t) * v
        if cfg.sampler == "sde" and i < cfg.sample_steps - 1:    # the last step adds no noise
            x = x + math.sqrt(2 * t * (t - t_next)) * fresh()
    return x

# ---------------------------------------------------------------------------------------------
# Data: memory-mapped shards, one batch ahead
# ---------------------------------------------------------------------------------------------

class UserError(Exception):
    """Something the user can mend: printed as one line, exit code 2."""

@contextmanager
def reading(track: Track):
    """Turns whatever a missing, damaged or foreign data file raises into one line with the mend."""
    try:
        yield
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"data/{track.name} is missing, damaged or foreign ({e}); "
                        f"run: python data/download.py {track.name}")

class Shards:
    """All shards of one split as one memory-mapped array, checked by header before any work."""

    def __init__(self, track: Track, split: str):
        folder, self.latents, self.labels = Path("data", track.name), [], []
        with reading(track):
            raw = (folder / "manifest.json").read_bytes()
            manifest, self.sha256 = json.loads(raw), hashlib.sha256(raw).hexdigest()
            self.trial = "shards" in manifest.get("request", ())  # a part of the data
            for name, entry in sorted(manifest["files"].items()):
                if not name.startswith(split + "_"):
                    continue
                size, n = (folder / name).stat().st_size, entry["count"]
                if size != entry["bytes"]:
                    raise ValueError(f"{name} has {size} bytes, not {entry['bytes']}")
                with safe_open(folder / name, "pt") as f:        # maps the file, reads the header
                    latents, labels = f.get_tensor("latents"), f.get_tensor("labels")
                    found = f.metadata()["track"], str(latents.dtype), *latents.shape, len(labels)
                if found != (track.name, "torch." + track.dtype, n, *track.shape, n):
                    raise ValueError(f"{name} holds {found}, not {n} of {track}")
                self.latents.append(latents.numpy())
                self.labels.append(labels.numpy())
        self.starts = np.cumsum([0] + [len(x) for x in self.latents])
        self.count = int(self.starts[-1])

    def gather(self, indices: np.ndarray, pin: bool = False):
        """Copies rows: indices (B,) -> latents (B, C, H, W) as stored, labels (B,) int64, CPU."""
        shards = np.searchsorted(self.starts, indices, side="right") - 1
        at = list(zip(shards.tolist(), (indices - self.starts[shards]).tolist()))
        latents = torch.empty(len(at), *self.latents[0].shape[1:], pin_memory=pin,
                              dtype=torch.from_numpy(self.latents[0][:0]).dtype)
        out = latents.numpy()
        for i, (shard, row) in enumerate(at):
            out[i] = self.latents[shard][row]                    # one memcpy from the page cache
        return latents, torch.tensor([int(self.labels[shard][row]) for shard, row in at])

class Loader:
    """Training batches of this process's slice, fetched one step ahead by a thread.

    The order is a function of (seed, step) alone: one permutation per epoch, global batches cut
    from it end to end, so there is no position to save and it is the same for any world size.
    """

    def __init__(self, shards: Shards, cfg: Config, seed: int, world):
        self.shards, self.seed, self.batch = shards, seed, cfg.batch_size
        self.mine, self.device = world.part(cfg.batch_size), world.device
        self.pool, self.ahead = ThreadPoolExecutor(1), {}        # step -> batch on its way

    @lru_cache(maxsize=2)
    def order(self, epoch: int) -> np.ndarray:
        g = torch.Generator().manual_seed(draw_seed(self.seed, epoch, stream=1))
        return torch.randperm(self.shards.count, generator=g).numpy()

    def indices(self, step: int) -> np.ndarray:
        """Rows of the global batch of `step`, (batch_size,) int64."""
        at = np.arange(step * self.batch, (step + 1) * self.batch)
        return np.array([self.order(int(e))[r]
                         for e, r in zip(*np.divmod(at, self.shards.count))])

    def __call__(self, step: int):
        """Stored latents (local, C, H, W) and labels (local,) of `step`, on the device."""
        def submit(step):
            return self.pool.submit(lambda: self.shards.gather(
                self.indices(step)[self.mine], pin=self.device.type == "cuda"))
        batch = self.ahead.pop(step, None) or submit(step)
        self.ahead = {step + 1: submit(step + 1)}
        return [x.to(self.device, non_blocking=True) for x in batch.result()]

class Captions:
    """The track's caption table on the device, and which captions belong to a label."""

    def __init__(self, track: Track, tokens: int, device):
        with reading(track), safe_open(Path("data", track.name, "text.safetensors"), "pt") as f:
            labels = np.array(json.loads(f.metadata()["labels"]))
            n, width = len(labels), track.text_width
            pooled = f.get_tensor("pooled").float()
            context = f.get_tensor("tokens").float() if tokens else torch.zeros(n, 0, width)
            found, wanted = (pooled.shape, context.shape), ((n, width), (n, tokens, width))
            if found != wanted:
                raise ValueError(f"text.safetensors holds {found}, not {wanted}")
            self.text = Text(pooled.to(device), context.to(device))
            of_label = [np.flatnonzero(labels == k) for k in range(labels.max() + 1)]
            self.of_label = torch.from_numpy(np.stack(of_label)).to(device)   # (classes, captions)

    def pick(self, labels: Tensor, u: Tensor) -> Text:
        """One of each label's captions, by uniform u in [0, 1): (B,), (B,) -> a batch of B."""
        rows = self.of_label[labels, (u * self.of_label.shape[1]).long()]
        return Text(self.text.pooled[rows], self.text.tokens[rows])

def draw_seed(seed: int, counter: int, stream: int) -> int:
    """A 32-bit seed, different for every (counter, stream) of a run."""
    return (seed * 0x9E3779B1 + counter * 2 + stream) % 2 ** 32

def scaled(track: Track, stored: Tensor) -> Tensor:
    """Stored latents (B, C, H, W) -> the model's scale, float32."""
    return (stored.float() - track.shift) * track.scale

def make_batch(cfg: Config, model, captions: Captions, stored, labels, seed: int, step: int, world):
    """(x, noise, t, text) of this process's slice of step's global batch.

    All randomness of a step is drawn here, for the global batch, on every process, from
    (seed, step) alone, and then sliced: the number of processes cannot change it.
    """
    track, B, device = TRACKS[cfg.track], cfg.batch_size, world.device
    g = torch.Generator(device).manual_seed(draw_seed(seed, step, stream=0))
    mine = world.part(B)
    noise = torch.randn(B, *track.shape, generator=g, device=device)[mine]
    start, caption, drop, flip = torch.rand(4, B, generator=g, device=device)
    t = (start[0] + torch.arange(B, device=device) / B) % 1      # low discrepancy: VDM, app. I.1
    t = shift_time(t, cfg.t_shift)[mine]
    x = scaled(track, stored)
    if cfg.flip:
        x = torch.where(flip[mine].view(-1, 1, 1, 1) < 0.5, x.flip(-1), x)
    text, null = captions.pick(labels, caption[mine]), model.null_text(len(x))
    keep = (drop[mine] >= cfg.caption_drop).view(-1, 1)
    return x, noise, t, Text(torch.where(keep, text.pooled, null.pooled),
                             torch.where(keep[..., None], text.tokens, null.tokens))

# ---------------------------------------------------------------------------------------------
# Distributed, log, clock, checkpoints
# ---------------------------------------------------------------------------------------------

TIMEOUT = timedelta(minutes=10)      # of one collective: a hung process ends the run after this

class World:
    """This process among all, and the collectives of a run. One process needs no launcher."""

    def __init__(self):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.step, self.device, gpu = 0, torch.device("cpu"), None   # step: for error lines
        if torch.cuda.is_available():
            self.device = gpu = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(gpu)
        if self.size > 1:
            dist.init_process_group("nccl" if gpu else "gloo", timeout=TIMEOUT, device_id=gpu)

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
        if self.device.type == "cpu":                            # gloo has no reduce-scatter
            return x[self.part(len(x))], dist.all_reduce(x, async_op=True).wait
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

class Clock:
    """Seconds of the timed region. The only clock a record's number is read from."""

    def __init__(self, world: World):
        self.world, self.seconds, self.started = world, 0.0, None

    def start(self):
        self.started = self.world.now()

    def stop(self):
        self.seconds, self.started = self.read(), None

    def read(self) -> float:
        return self.seconds + (self.world.now() - self.started if self.started else 0.0)

    @contextmanager
    def paused(self):
        self.stop()
        yield
        self.start()

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
        self.model = Transformer(cfg, TRACKS[cfg.track])
        self.model.init_weights(seed)
        self.model.to(world.device)
        self.params = list(self.model.parameters())
        self.ema = [p.detach().clone() for p in self.params]
        self.optimizers = make_optimizers(self.model, cfg, world)
        self.world = world

    def state_dict(self) -> dict:
        """Everything, the same for any number of processes. Collective."""
        return dict(model=self.model.state_dict(), ema=self.ema,
                    optimizers=[opt.state_dict() for opt in self.optimizers])

    @torch.no_grad()
    def load_state_dict(self, state: dict):
        """In place: what is compiled stays valid."""
        self.model.load_state_dict(state["model"])
        torch._foreach_copy_(self.ema, state["ema"])
        for opt, saved in zip(self.optimizers, state["optimizers"]):
            opt.load_state_dict(saved)

    @torch.no_grad()
    def swap_ema(self):
        """Exchanges the model's weights and their EMA, in place."""
        keep = [p.clone() for p in self.params]
        torch._foreach_copy_(self.params, self.ema)
        torch._foreach_copy_(self.ema, keep)

# ---------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------

def train_step(cfg: Config, state: State, loss_of, step: int, x, noise, t, text: Text) -> Tensor:
    """One update of model and EMA. Returns this process's part of the mean loss, on the device.

    Never waits for the device. The loss is divided by the global batch, so gradients only ever
    need a SUM, whatever the number of processes and micro-batches.
    """
    total, size = 0.0, images_per_forward(cfg, state.world, cfg.batch_size)
    for i in range(0, len(x), size):
        s = slice(i, i + size)
        part = Text(text.pooled[s], text.tokens[s])
        loss = loss_of(state.model, x[s], noise[s], t[s], part).sum() / cfg.batch_size
        loss.backward()
        total = total + loss.detach()
    share = lr_schedule(step / cfg.steps, cfg.warmup, cfg.cooldown)
    for opt in state.optimizers:
        for group in opt.param_groups:
            group["lr"] = group["peak_lr"] * share
        if state.world.size > 1 and not isinstance(opt, Muon):   # one flat all-reduce, 8P(W-1)/W B
            grads = [p.grad for group in opt.param_groups for p in group["params"]]
            flat = state.world.sum(torch.cat([g.flatten() for g in grads]))
            for g, summed in zip(grads, flat.split([g.numel() for g in grads])):
                g.copy_(summed.view_as(g))
        opt.step()
    state.model.zero_grad(set_to_none=True)
    torch._foreach_lerp_(state.ema, [p.data for p in state.params],
                         1 - ema_decay(step, cfg.ema_decay))
    return total

@torch.no_grad()
def validate(cfg: Config, state: State, loss_of, val: Shards, captions: Captions) -> float:
    """Mean loss over the contract's validation images, noise and times, with each label's first
    caption. The same float on every process."""
    track, world = TRACKS[cfg.track], state.world
    size = images_per_forward(cfg, world, track.val_images)
    noise, t = validation_draws(track, track.val_images)
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    mine = world.part(track.val_images)
    for i in range(mine.start, mine.stop, size):
        s = slice(i, i + size)
        stored, labels, e, tt = (a.to(world.device) for a in (
            *val.gather(np.arange(i, i + size)), noise[s], t[s]))
        text = captions.pick(labels, torch.zeros_like(tt))
        total += loss_of(state.model, scaled(track, stored), e, tt, text).double().sum()
    return world.sum(total).item() / track.val_images

def warm_up(cfg: Config, state: State, loss_of):
    """Compiles every shape of the run on random data, then puts everything back. Off the clock."""
    world, track = state.world, TRACKS[cfg.track]
    g = torch.Generator(world.device).manual_seed(0)             # the global one stays untouched
    before = copy.deepcopy(state.state_dict())

    def random_inputs(n):
        image, text = (n, *track.shape), state.model.null_text(n)
        shapes = image, image, (n,), text.pooled.shape, text.tokens.shape
        x, noise, t, *text = (torch.randn(s, generator=g, device=world.device) for s in shapes)
        return x, noise, t.sigmoid(), Text(*text)

    for step in range(3):
        train_step(cfg, state, loss_of, step, *random_inputs(cfg.batch_size // world.size))
    with torch.no_grad():
        loss_of(state.model, *random_inputs(images_per_forward(cfg, world, track.val_images)))
    state.load_state_dict(before)

def train(name: str, seed: int, resume: Optional[Path], world: World) -> Path:
    """One run, from the checks to the last log line; returns its folder. Raises UserError."""
    source = Path(__file__).read_text()
    meta = dict(config=name, seed=seed, code_sha256=hashlib.sha256(source.encode()).hexdigest())
    start, saved = 0, None
    if resume:
        try:
            saved = torch.load(resume / "state.pt", map_location="cpu", weights_only=True)
        except Exception as e:
            raise UserError(f"{resume} has no state to resume from ({type(e).__name__}): it is "
                            "finished or not a run's folder; start a new one without RESUME")
        if saved["meta"]["code_sha256"] != meta["code_sha256"]:
            raise UserError(f"{resume} was started with another train_speedrun.py: bring its own "
                            f"back, cp {resume}/train_speedrun.py .")
        start, name, seed = (saved["meta"][k] for k in ("step", "config", "seed"))
        meta.update(config=name, seed=seed)
    cfg = CONFIGS[name]
    track = TRACKS[cfg.track]
    check_config(cfg, world)
    data, val = Shards(track, "train"), Shards(track, "val")
    meta["data_sha256"] = data.sha256
    Captions(track, cfg.text_tokens, "cpu")              # a check: the run's is made on the clock
    counts, wanted = (data.count, val.count), (track.train_images, track.val_images)
    assert (data.trial or counts[0] == wanted[0]) and counts[1] >= wanted[1], (
        f"data/{track.name} holds {counts} training and validation images, the contract has "
        f"{wanted}; run: python data/download.py {track.name}")
    torch.set_float32_matmul_precision("high")
    state, clock = State(cfg, seed, world), Clock(world)
    if resume:
        state.load_state_dict(saved)
        clock.seconds = saved["meta"]["seconds"]
    loss_of = torch.compile(flow_matching_loss, dynamic=False, fullgraph=True) \
        if cfg.compile else flow_matching_loss
    folder = resume or Path("logs", f"{datetime.now():%Y%m%d-%H%M%S}_{name}_seed{seed}")

    def save(filename: str, step: int, write):
        """Rank 0 writes, with the step in `meta`; every process learns whether it could."""
        meta.update(step=step, images=step * cfg.batch_size, seconds=clock.seconds)
        error = None
        if world.rank == 0:
            try:
                write_atomic(folder / filename, write)
            except UserError as e:
                error = e
        if world.sum(torch.tensor(float(error is not None), device=world.device)).item():
            raise error or UserError(f"rank 0 could not write {filename}")

    def save_state(step: int):
        state_dict = state.state_dict() | dict(meta=meta)
        save("state.pt", step, lambda path: torch.save(state_dict, path))

    if not resume:
        save_state(0)                                    # a full disk shows now
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
        f"{' (a part: a trial, no record)' if data.trial else ''}\n"
        f"{world.size} x {machine(world)}, python {platform.python_version()}, "
        f"torch {torch.__version__}\n{json.dumps(asdict(cfg))}")
    warm_up(cfg, state, loss_of)
    eval_at = {round(cfg.steps * k / cfg.evals) for k in range(cfg.evals + 1)}
    first_bad = torch.full((), cfg.steps, device=world.device)   # first step of non-finite loss

    def check_finite():
        bad = first_bad.clone()
        if world.size > 1:
            dist.all_reduce(bad, dist.ReduceOp.MIN)
        if bad.item() < cfg.steps:
            raise UserError(f"the loss of step {bad.item() + 1} is not finite: lower the learning "
                            "rate; what was saved before it stays")

    def report(step: int, key: str, value: float):
        seconds = clock.read()
        log(f"step:{step}/{cfg.steps} images:{step * cfg.batch_size} {key}:{value:.5f} "
            f"train_time:{1000 * seconds:.0f}ms step_avg:{1000 * seconds / max(step, 1):.2f}ms")

    def evaluate(step: int):
        """Validation loss and checkpoint of the weights that the model holds now: the EMA's."""
        meta["val_loss"] = validate(cfg, state, loss_of, val, captions)
        report(step, "val_loss", meta["val_loss"])
        if step:
            save(f"step_{step:06d}.safetensors", step, lambda path: save_file(
                {k: v.cpu() for k, v in state.model.state_dict().items()}, path,
                {k: str(v) for k, v in meta.items()}))

    compiled = torch._dynamo.utils.counters["stats"]
    graphs = compiled["unique_graphs"]
    clock.start()
    captions = Captions(track, cfg.text_tokens, world.device)
    state.model.set_text(captions.text)
    loader = Loader(data, cfg, seed, world)
    for step in range(start, cfg.steps):
        world.step = step + 1
        if (step in eval_at or step % cfg.save_every == 0) and (step > start or step == 0):
            with clock.paused():
                check_finite()
                if step in eval_at:
                    state.swap_ema()
                    evaluate(step)
                    state.swap_ema()
                if step:
                    save_state(step)
        stored, labels = loader(step)
        batch = make_batch(cfg, state.model, captions, stored, labels, seed, step, world)
        loss = train_step(cfg, state, loss_of, step, *batch)
        first_bad = torch.where(loss.isfinite(), first_bad, first_bad.clamp(max=step))
        if step < 10 or (step + 1) % 50 == 0:
            check_finite()
            report(step + 1, "train_loss", world.sum(loss.clone()).item())
    check_finite()
    state.swap_ema()                                     # the model that is delivered
    clock.stop()
    graphs = compiled["unique_graphs"] - graphs
    evaluate(cfg.steps)

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

def machine(world: World) -> str:
    """Name of the GPU, or of the CPU and its threads."""
    if world.device.type == "cuda":
        return torch.cuda.get_device_name()
    cpu = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpu.read_text() if cpu.exists() else "")
    return f"{found[1] if found else platform.machine()}, {torch.get_num_threads()} threads"

def main() -> int:
    """The track from the command line, RESUME and SEED from the environment. The exit code."""
    world, seed, resume = None, os.environ.get("SEED", "0"), os.environ.get("RESUME")

    def terminated(signum, frame):
        raise UserError("ended by SIGTERM; continue with RESUME=logs/<run_id>")
    try:
        signal.signal(signal.SIGTERM, terminated)
        name = " ".join(sys.argv[1:]) or "cifar10"
        assert name in CONFIGS, f"unknown track {name!r}: choose one of {', '.join(CONFIGS)}"
        assert seed.isdigit(), f"SEED={seed!r} is not a whole number"
        world = World()
        train(name, int(seed), Path(resume) if resume else None, world)
        status = 0
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
