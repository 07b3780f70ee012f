"""ImageGen Speedrun: train a text-to-image flow-matching transformer to its target, fast.

    python train_speedrun.py cifar10                  one of CONFIGS, in one process
    torchrun --nproc_per_node=8 train_speedrun.py imagenet256             one node of 8 GPUs
    SEED=1 python train_speedrun.py                                       another seed
    RESUME=logs/<run_id> python train_speedrun.py                         continue a killed run

Everything else is edited in this file. It is copied into its own log, and the copy is what the
referee imports: CONFIGS, load_checkpoint(path, device), velocity(model, x, t, text) and
sample(model, noise, text, fresh). All of it may change but the contract.

The clock runs from the fetch of the first batch to the last step, with everything that is derived
from the data and every log line. It stands still during process start with its one check of all
shards, compilation and warm-up on zeros, validation and checkpoint writes.

Sizes in comments: B images, C x H x W latents, N tokens, K of them kept by routing, D the width,
M values of an image (and, with REG, of its class token).
"""

import copy
import ctypes
import fcntl
import gc
import hashlib
import itertools
import json
import math
import os
import platform
import re
import resource
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
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
from torch.profiler import record_function

# ---------------------------------------------------------------------------------------------
# Contract: what makes the runs of a track comparable. Do not edit a track's row or the draws
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Track:
    """A data set, its captions, its validation and its sampling budget. Rows hold literals only."""

    name: str  # folder under data/
    shape: tuple  # (C, H, W) of one stored latent
    dtype: str  # of the stored latents
    shift: float  # x = (stored - shift) * scale
    scale: float
    train_images: int  # of ImageNet's 1,281,167, 4,096 are held out; 0: as many as there are
    text_width: int  # of a caption's pooled CLIP embedding
    val_images: int  # the first ones of val_*.safetensors
    max_nfe: int  # network evaluations per generated image; a guided step costs two


ROWS = (
    Track("cifar10", (3, 32, 32), "uint8", 127.5, 0.00784313725490196, 50_000, 512, 4096, 100),
    Track("cifar10-external", (3, 32, 32), "uint8", 127.5, 0.0078431373, 50_000, 512, 4096, 100),
    Track("imagenet256", (32, 16, 16), "float16", 0.0, 0.3099, 1_277_071, 768, 4096, 100),
    Track("imagenet512", (32, 32, 32), "float16", 0.0, 0.3099, 1_277_071, 768, 4096, 100),
    Track("folder", (3, 32, 32), "uint8", 127.5, 0.00784313725490196, 0, 512, 64, 100),
)
TRACKS = {row.name: row for row in ROWS}


def validation_draws(track: Track, count: int) -> tuple[Tensor, Tensor]:
    """Fixed noise (count, C, H, W) and times (count,) of the validation loss, CPU float32.

    The times are the midpoints of `count` equal parts of [0, 1] in random order, so the loss is
    an average over uniform t whatever the training distribution is.
    """
    generator = torch.Generator().manual_seed(2025)
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
    patch: int  # latent pixels per token side
    width: int  # D
    depth: int
    head_dim: int = 64
    mlp_ratio: int = 4
    route_keep: float = 1.0  # share of the patches in the middle blocks; 1 = no routing
    route_dense: int = 2  # blocks before and after them that see all tokens
    path_drop: float = 0.05  # share of images trained without the middle blocks
    dense_tail: float = 0.0  # share of the run, at its end, trained without routing
    # length, in images and steps
    batch_size: int = 256  # global: the same for any number of processes
    micro_batch: int = 0  # images per forward on one device; 0 = all of its slice
    steps: int = 1000
    evals: int = 5  # validations and EMA checkpoints on the way to the last step
    save_every: int = 1000  # steps between resume states
    # optimizers; the schedule multiplies both learning rates
    muon_lr: float = 0.02  # banks of matrices; 0 = AdamW for every parameter
    muon_momentum: float = 0.95
    muon_every: int = 1  # steps from one move of the banks to the next
    adamw_lr: float = 1e-3  # embeddings, adaLN, head, gains
    adamw_betas: tuple = (0.9, 0.95)
    warmup: float = 0.02  # share of the run in which the learning rate rises
    cooldown: float = 0.5  # share of the run in which it falls to 0
    ema_decay: float = 0.999  # at most; warmed up as (1 + step) / (10 + step)
    # objective
    sigma_data: float = 0.5  # spread of x, for the preconditioning
    x_floor: float = 0.0  # predict x, errors below this t weigh as at it; 0 = EDM's prediction
    mean_weight: float = 1.0  # of the error's mean over a patch; below 1 detail counts for more
    caption_drop: float = 0.1  # share of images trained on the null caption, for guidance
    flip: bool = False  # mirror half of the images (pixels, not latents)
    t_spread: float = 0.0  # of the logit of training t (logit-normal); 0 = uniform t
    t_shift: float = 1.0  # of training t: more noise where > 1
    cfm: float = 0.0  # weight of contrastive flow matching
    reg: float = 0.0  # weight of the class token's velocity (REG); 0 = no such token
    repa: float = 0.0  # weight of the alignment with the data's features (REPA) ...
    repa_layers: tuple = ()  # ... of the states after these blocks
    repa_width: int = 2048  # of its MLPs
    # sampler
    sampler: str = "euler"  # or "sde": Euler-Maruyama (SiT, arXiv 2401.08740)
    sample_steps: int = 50
    guidance: float = 1.0  # 1 = off, and then a step costs one evaluation instead of two
    guidance_interval: tuple = (0.0, 1.0)  # of t (Kynkaanniemi et al., arXiv 2404.07724)
    autoguidance: float = 0.0  # weight of the way from an earlier EMA's velocity; 0 = off
    autoguidance_interval: tuple = (0.1, 0.95)  # of t; a step in it costs one evaluation more
    weak_at: float = 0.4  # that EMA is of the last validation in this share of the run
    sample_shift: float = 1.0  # time shift of the sampling grid
    last_step: float = 0.0  # final step, before the shift; 0 = as the others
    # numerics: bf16 autocast and Newton-Schulz over fp32 weights; fp32 on CPUs that emulate bf16
    bf16: bool = torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    compile: bool = True  # False: plain eager PyTorch, for debugging


CONFIGS = {
    # one GPU; its size: records/cifar10-loss/SCALING.md
    "cifar10": Config(
        track="cifar10", patch=2, width=512, depth=12, flip=True, steps=20_000, guidance=2.0
    ),
    "cifar10-cpu": Config(  # two cores; the record takes 2,700 steps, with guidance 8.5 and 3
        track="cifar10",
        patch=4,
        width=128,
        depth=3,
        flip=True,
        batch_size=32,
        steps=12_000,
        muon_lr=0.025,
        muon_every=2,
        adamw_lr=1e-3,
        cooldown=1.0,
        t_spread=1.0,
        x_floor=0.2,
        mean_weight=0.2,
        caption_drop=0.2,
        sample_steps=12,
        guidance=7.0,
        guidance_interval=(0.1, 0.7),
        autoguidance=4.0,
        sample_shift=1.2,
    ),
    # SiT-B/1 on 8 GPUs: SR-DiT (arXiv 2512.12386) with Muon
    "imagenet256": Config(
        track="imagenet256",
        patch=1,
        width=768,
        depth=12,
        route_keep=0.25,
        dense_tail=0.05,
        cfm=0.05,
        reg=0.03,
        repa=0.5,
        repa_layers=(2, 4, 6),
        steps=300_000,
        evals=6,
        save_every=10_000,
        muon_lr=1e-3,
        adamw_lr=1e-4,
        cooldown=0.3,
        ema_decay=0.9995,
        sigma_data=1.0,  # what the contract's scale is for
        t_shift=math.sqrt(32 * 16 * 16 / 4096),  # SR-DiT's: by the number of latent values
        sample_shift=math.sqrt(32 * 16 * 16 / 4096),
        sampler="sde",
        sample_steps=100,
        last_step=0.04,
    ),
}
CONFIGS["cifar10-external"] = replace(  # with EfficientNet-lite2's features: REPA in small
    CONFIGS["cifar10-cpu"],
    track="cifar10-external",
    flip=False,
    repa=0.5,
    repa_layers=(1,),
    repa_width=256,
)
CONFIGS["folder"] = replace(CONFIGS["cifar10-cpu"], track="folder")  # your own photos
CONFIGS["imagenet512"] = replace(  # as SR-DiT: the same but for the shifts, of 4 times the values
    CONFIGS["imagenet256"], track="imagenet512", t_shift=math.sqrt(8), sample_shift=math.sqrt(8)
)

# ---------------------------------------------------------------------------------------------
# Model: a diffusion transformer (DiT, arXiv 2212.09748) on a grid of pixels or latents
# ---------------------------------------------------------------------------------------------


def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],))


def rope_table(rows: int, cols: int, head_dim: int, extra: int) -> tuple[Tensor, Tensor]:
    """cos, sin (extra + N, 1, head_dim / 2) of axial 2-D RoPE (RoFormer, arXiv 2104.09864).

    Half of the angles turns with the row, half with the column; `extra` tokens before them do not.
    """
    frequencies = 100.0 ** -(torch.arange(head_dim // 4) / (head_dim // 4))  # for 8 to 16 a side
    row = torch.arange(rows).repeat_interleave(cols)[:, None] * frequencies
    col = torch.arange(cols).repeat(rows)[:, None] * frequencies
    angles = F.pad(torch.cat([row, col], dim=1), (0, 0, extra, 0))[:, None]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(..., head_dim), turned by position."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, rope: tuple) -> Tensor:
    """QK-norm, turn by position, softmax attention: (B, N, heads, head_dim) each -> the same."""
    on_cpu = q.device.type == "cpu"
    if on_cpu:  # heads first from here on, so that the compiler reads k's gradient in tiles
        q, k, v, *rope = (x.transpose(-3, -2) for x in (q, k, v, *rope))
    q = rotate(rms_norm(q), *rope).to(v.dtype)
    k = rotate(rms_norm(k), *rope).to(v.dtype)
    if on_cpu:  # written out it is faster there, at 64 tokens
        h = (q @ k.mT * q.shape[-1] ** -0.5).softmax(dim=-1) @ v
    else:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # the kernel's order
        h = F.scaled_dot_product_attention(q, k, v)
    return h.transpose(1, 2)


def precondition(x: Tensor, t: Tensor, cfg: Config) -> tuple:
    """(guess, gain, x): velocity = guess + gain * network(x), which sees unit variance.

    It gives the image (JiT, arXiv 2511.13720), or what a linear guess leaves (EDM, 2206.00364).
    """
    deviation = torch.hypot((1 - t) * cfg.sigma_data, t)  # of x_t
    if cfg.x_floor:
        return x / t.clamp(min=0.05), -cfg.sigma_data / t.clamp(min=0.05), x / deviation
    guess = (t - (1 - t) * cfg.sigma_data**2) / deviation**2 * x
    return guess, cfg.sigma_data / deviation, x / deviation


class Transformer(nn.Module):
    """Velocity network: (B, M) at times (B,) under captions (B, text_width) -> (B, M), float32.

    A row is an image and, with REG (arXiv 2507.01467), a teacher's class token. With routing
    (SPRINT, arXiv 2510.21986) the middle blocks see some of the patches, the outer blocks all.
    """

    def __init__(self, cfg: Config, track: Track, components: int = 0):
        """components: how many the data keeps of a teacher's feature, for REG and REPA."""
        super().__init__()
        self.cfg = cfg
        self.track = track
        D, p = cfg.width, cfg.patch
        C, H, W = track.shape
        self.grid = (H // p, W // p)
        self.image_values = C * H * W
        self.class_tokens = 1 if cfg.reg else 0
        self.class_values = components * self.class_tokens
        self.middle = range(cfg.depth, cfg.depth)  # the routed blocks: none

        self.embed = nn.Linear(C * p * p, D)
        self.position = nn.Parameter(torch.empty(H // p * (W // p), D))
        self.time_in = nn.Linear(256, D)
        self.time_out = nn.Linear(D, D)
        self.text_in = nn.Linear(track.text_width, D, bias=False)
        self.modulation = nn.Linear(D, (6 * cfg.depth + 2) * D)  # adaLN of all blocks in one matmul
        # Banks: one role's matrices of all blocks in one parameter (matrices, out, in)
        self.qkv = nn.Parameter(torch.empty(3 * cfg.depth, D, D))
        self.proj = nn.Parameter(torch.empty(cfg.depth, D, D))
        self.up = nn.Parameter(torch.empty(cfg.depth, cfg.mlp_ratio * D, D))
        self.down = nn.Parameter(torch.empty(cfg.depth, D, cfg.mlp_ratio * D))
        self.value_mix = nn.Parameter(torch.empty(cfg.depth))
        self.head = nn.Linear(D, C * p * p)
        if cfg.route_keep < 1:
            self.middle = range(cfg.route_dense, cfg.depth - cfg.route_dense)
            self.mask_token = nn.Parameter(torch.empty(D))
            self.fuse = nn.Parameter(torch.empty(1, D, 2 * D))
        if cfg.reg:
            self.class_in = nn.Linear(components, D)
            self.class_head = nn.Linear(D, components)
        self.projectors = nn.ModuleList()  # REPA's MLPs from states to the teacher's components
        for _ in cfg.repa_layers:
            sizes = (D, cfg.repa_width, cfg.repa_width, components)
            linears = [nn.Linear(a, b, bias=False) for a, b in zip(sizes, sizes[1:])]
            mlp = nn.Sequential(linears[0], nn.SiLU(), linears[1], nn.SiLU(), linears[2])
            self.projectors.append(mlp)

        cos, sin = rope_table(*self.grid, cfg.head_dim, self.class_tokens)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        # CLIP embeddings of class captions lie close together: centred and scaled by the table's
        self.register_buffer("text_mean", torch.zeros(track.text_width))
        self.register_buffer("text_std", torch.ones(()))

    @torch.no_grad()
    def init_weights(self, seed: int):
        """Fills every parameter by its name, on the CPU: the same on every process and device."""
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            part = name.split(".")[0]
            normal = torch.randn(p.shape, generator=generator)
            if name.endswith(".bias") or part in ("modulation", "head", "class_head", "mask_token"):
                p.zero_()  # adaLN-zero: at first a block does nothing
            elif p.dim() == 3 or "_in" in part or part in ("embed", "time_out", "projectors"):
                p.copy_(normal * p.shape[-1] ** -0.5)  # 1 / sqrt(fan-in)
            elif part == "position":
                p.copy_(normal * 0.02)
            elif part == "value_mix":
                p.fill_(0.5)
            else:
                raise ValueError(f"parameter {name} has no initialisation: give it one here")

    @torch.no_grad()
    def set_text(self, pooled: Tensor):
        """Takes the centre and scale of the track's caption table (captions, text_width)."""
        self.text_mean.copy_(pooled.mean(0))
        self.text_std.copy_((pooled - self.text_mean).square().mean().sqrt().clamp(min=1e-6))

    def null_text(self, count: int) -> Tensor:
        """The empty caption (count, text_width): the table's mean, zero after centring."""
        return self.text_mean.expand(count, -1)

    def condition(self, t: Tensor, text: Tensor) -> tuple:
        """The 6 depth + 2 shifts, scales and gates of all blocks and the head, (B, 1, D) each."""
        frequencies = torch.exp(-math.log(10_000) * torch.arange(128, device=t.device) / 128)
        angles = 1000 * t[:, None] * frequencies  # (B, 128)
        waves = torch.cat([angles.cos(), angles.sin()], dim=1)
        c = self.time_out(F.silu(self.time_in(waves)))
        c = c + self.text_in((text - self.text_mean) / self.text_std)
        return self.modulation(F.silu(c)).view(len(t), -1, 1, self.cfg.width).unbind(1)

    def tokens(self, x: Tensor) -> Tensor:
        """(B, M) -> (B, N, D): with REG the class token, then the patches row by row."""
        image = x[:, : self.image_values].unflatten(1, self.track.shape)
        patches = F.pixel_unshuffle(image, self.cfg.patch).flatten(2).mT  # (B, patches, C p p)
        h = self.embed(patches)
        h = h + self.position.to(h.dtype)
        if self.class_tokens:
            class_token = rms_norm(self.class_in(x[:, self.image_values :]))
            h = torch.cat([class_token[:, None].to(h.dtype), h], dim=1)
        return h

    def block(self, x: Tensor, weights, modulation, value_mix, first_values, rope) -> tuple:
        """Attention and MLP, both behind adaLN-zero: tokens (B, n, D) -> the same.

        Also returns the values (B, n, heads, head_dim) of the first block, which mixes none in.
        """
        qkv, proj, up, down = weights
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation  # (B, 1, D) each
        h = F.linear(rms_norm(x) * (1 + scale1) + shift1, qkv)
        q, k, v = h.unflatten(2, (3, -1, self.cfg.head_dim)).unbind(2)  # (B, n, heads, head_dim)
        if first_values is None:
            first_values = v
        else:  # value residual, arXiv 2410.17897
            v = torch.lerp(v, first_values, value_mix.to(v.dtype))
        x = x + gate1 * F.linear(attend(q, k, v, rope).flatten(2), proj)
        h = F.linear(rms_norm(x) * (1 + scale2) + shift2, up)
        h = F.relu(h).square()  # Primer, arXiv 2109.08668
        return x + gate2 * F.linear(h, down), first_values

    def fuse_streams(self, outer: Tensor, routed: Tensor, keep, skip) -> Tensor:
        """The dense stream (B, N, D) and the middle blocks' tokens (B, K, D) -> (B, N, D).

        A mask stands where the middle saw no token. SPRINT, arXiv 2510.21986, eq. 4.
        """
        mask = self.mask_token.to(routed.dtype)
        if keep is not None:
            routed = mask.expand_as(outer).scatter(1, keep[..., None].expand_as(routed), routed)
        if skip is not None:
            routed = torch.where(skip.view(-1, 1, 1), mask, routed)
        return F.linear(torch.cat([outer.to(routed.dtype), routed], dim=2), self.fuse[0])

    def read_out(self, h: Tensor, modulation: tuple) -> Tensor:
        """Tokens (B, N, D) -> (B, M), float32."""
        shift, scale = modulation
        h = rms_norm(h) * (1 + scale) + shift
        patches = self.head(h[:, self.class_tokens :]).float().mT.unflatten(2, self.grid)
        out = F.pixel_shuffle(patches, self.cfg.patch).flatten(1)
        if self.class_tokens:
            out = torch.cat([out, self.class_head(h[:, 0]).float()], dim=1)
        return out

    def forward(self, x, t, text, keep=None, skip=None, drop_middle=False) -> tuple:
        """Velocity (B, M) and the states (B, n, D) after the layers that are to be aligned.

        keep (B, K): tokens that enter the middle blocks; None: all. skip (B,) bool: images that do
        not enter them; None: no image. drop_middle: no image does, and these blocks cost nothing.
        """
        guess, gain, x = precondition(x, t[:, None], self.cfg)
        modulation = self.condition(t, text)
        qkv = self.qkv.unflatten(0, (-1, 3)).flatten(1, 2)  # (depth, 3 D, D)
        banks = (qkv, self.proj, self.up, self.down)
        layers = list(zip(*(bank.unbind(0) for bank in banks)))
        h = self.tokens(x)
        rope = (self.cos, self.sin)
        values = None
        states = []
        for i in range(self.cfg.depth):
            if i == self.middle.start:
                outer = (h, values)
                if drop_middle:
                    h = self.mask_token.to(h.dtype).expand_as(h)
                elif keep is not None:
                    h = h.take_along_dim(keep[..., None], dim=1)  # (B, K, D)
                    values = values.take_along_dim(keep[..., None, None], dim=1)
                    rope = (self.cos[keep], self.sin[keep])  # (B, K, 1, head_dim / 2)
            if i == self.middle.stop:
                h = self.fuse_streams(outer[0], h, keep, skip)
                values = outer[1]
                rope = (self.cos, self.sin)
            if i in self.middle and drop_middle:
                continue
            adaln = modulation[6 * i : 6 * i + 6]
            h, values = self.block(h, layers[i], adaln, self.value_mix[i], values, rope)
            if i + 1 in self.cfg.repa_layers:
                states.append(h)
        return guess + gain * self.read_out(h, modulation[-2:]), states


# ---------------------------------------------------------------------------------------------
# Objective and sampler: x_t = (1 - t) x + t noise, velocity = noise - x (arXiv 2209.03003)
# ---------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Images and all that was drawn for them. What a config does not use is None."""

    x: Tensor  # (B, M), in the model's scale: see Transformer
    noise: Tensor  # (B, M)
    t: Tensor  # (B,)
    text: Tensor  # (B, text_width)
    keep: Tensor | None = None  # (B, K) tokens that enter the middle blocks, int64
    skip: Tensor | None = None  # (B,) bool: images that do not enter them
    features: Tensor | None = None  # (B, 1 + patches, components) of a teacher, centred

    def part(self, rows: slice) -> "Batch":
        return Batch(*(None if field is None else field[rows] for field in self))


def autocast(cfg: Config, x: Tensor):
    return torch.autocast(x.device.type, torch.bfloat16, enabled=cfg.bf16)


def velocity(model: Transformer, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    """The velocity of images x (B, C, H, W) at times t (B,): (B, C, H, W). One evaluation each.

    REG's class token is not known here: it is given as its mean, zero.
    """
    with autocast(model.cfg, x):
        out, _ = model(F.pad(x.flatten(1), (0, model.class_values)), t, text)
    return out[:, : model.image_values].view_as(x)


def loss_terms(model: Transformer, batch: Batch) -> dict[str, Tensor]:
    """The loss's weighted terms by name, (B,) float32 each: the loss is their sum.

    "flow" is the mean squared velocity error (arXiv 2210.02747, eq. 23); a model in evaluation mode
    gives it alone, all weights 1.
    """
    cfg = model.cfg
    t = batch.t[:, None]
    target = batch.noise - batch.x
    with autocast(cfg, batch.x):
        x_t = (1 - t) * batch.x + t * batch.noise
        out, states = model(x_t, batch.t, batch.text, batch.keep, batch.skip)
        aligned = [project(h) for project, h in zip(model.projectors, states)]
    image = slice(0, model.image_values)
    if not model.training:
        return {"flow": (out - target)[:, image].square().mean(dim=1)}
    weight = t / t.clamp(min=cfg.x_floor) if cfg.x_floor else 1.0
    error = weight * (out - target)
    terms = {"flow": error[:, image].square().mean(dim=1)}
    if cfg.mean_weight < 1:  # a 16th of the values have 0.4 of the error: their patches' means
        means = F.avg_pool2d(error[:, image].unflatten(1, model.track.shape), cfg.patch)
        terms["flow"] = terms["flow"] - (1 - cfg.mean_weight) * means.square().mean(dim=(1, 2, 3))
    if cfg.cfm:  # away from another image's velocity: contrastive flow matching, arXiv 2506.05350
        other = target.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)  # the other of a pair
        terms["cfm"] = -cfg.cfm * (weight * (out - other))[:, image].square().mean(dim=1)
    if cfg.reg:  # the class token has a velocity, too: REG, arXiv 2507.01467
        terms["reg"] = cfg.reg * error[:, model.image_values :].square().mean(dim=1)
    if cfg.repa:  # states like a teacher's: REPA, arXiv 2410.06940
        terms["repa"] = 0.0
        for h in aligned:
            aim = batch.features[:, 1 - model.class_tokens :]
            if h.shape[1] < aim.shape[1]:  # in the routed middle
                aim = aim.take_along_dim(batch.keep[..., None], dim=1)
            cosine = F.cosine_similarity(h.float(), aim, dim=2).mean(dim=1)
            terms["repa"] = terms["repa"] + cfg.repa / len(aligned) * (1 - cosine)
    return terms


def shift_time(t, shift: float):
    """SD3's time shift (arXiv 2403.03206, eq. 23): identity at 1, more noise above."""
    return shift * t / (1 + (shift - 1) * t)


def sampling_times(cfg: Config) -> list[float]:
    """The sampler's grid, sample_steps + 1 times from 1 to 0: even, then shifted."""
    even = np.linspace(1, cfg.last_step or 1 / cfg.sample_steps, cfg.sample_steps).tolist()
    return [shift_time(t, cfg.sample_shift) for t in [*even, 0.0]]


def guidance_at(t: float, cfg: Config) -> tuple[float, float]:
    """Weights at time t of the ways from the null caption's velocity and from the earlier EMA's."""
    is_guided = cfg.guidance_interval[0] <= t <= cfg.guidance_interval[1]
    is_autoguided = cfg.autoguidance_interval[0] <= t <= cfg.autoguidance_interval[1]
    return is_guided * (cfg.guidance - 1), is_autoguided * cfg.autoguidance


def sampling_nfe(cfg: Config) -> int:
    """Network evaluations per image of `sample`: one a step, and one of each guidance in it."""
    return sum(1 + np.count_nonzero(guidance_at(t, cfg)) for t in sampling_times(cfg)[:-1])


@torch.no_grad()
def sample(model: Transformer, noise: Tensor, text: Tensor, fresh=None) -> Tensor:
    """Images (B, C, H, W) in the model's scale from noise (B, C, H, W) under captions `text`.

    fresh() returns new unit noise of noise's shape, for the sde and for REG's class token. "euler"
    follows dx = v dt. "sde" is Euler-Maruyama on the reverse SDE with diffusion 2t (SiT, eq. 8):
    its score -(x + (1 - t) v) / t makes the drift v + x + (1 - t) v. Guidance leads away from the
    velocity of the null caption (arXiv 2207.12598, eq. 6), whose evaluation leaves out the routed
    blocks (SPRINT's path-drop guidance), and from that of the earlier EMA model.weak under the same
    caption, which knows less (autoguidance, arXiv 2406.02507, eq. 3).
    """
    cfg = model.cfg

    def with_class_token(image: Tensor) -> Tensor:  # (B, C, H, W) -> (B, M)
        if not model.class_tokens:
            return image.flatten(1)
        return torch.cat([image.flatten(1), fresh().flatten(1)[:, : model.class_values]], dim=1)

    x = with_class_token(noise)
    times = sampling_times(cfg)
    for t, t_next in zip(times, times[1:]):
        t_rows = x.new_full((len(x),), t)
        with autocast(cfg, x):
            v, _ = model(x, t_rows, text)
            from_null, from_weak = guidance_at(t, cfg)
            way = 0.0
            if from_null:
                null = model.null_text(len(x))
                v_null, _ = model(x, t_rows, null, drop_middle=cfg.route_keep < 1)
                way = from_null * (v - v_null)
            if from_weak:
                v_weak, _ = model.weak(x, t_rows, text)
                way = way + from_weak * (v - v_weak)
            v = v + way
        if cfg.sampler == "sde":
            v = v + x + (1 - t) * v
        x = x + (t_next - t) * v
        if cfg.sampler == "sde" and t_next > 0:  # the last step adds no noise
            x = x + math.sqrt(2 * t * (t - t_next)) * with_class_token(fresh())
    return x[:, : model.image_values].reshape(noise.shape)


# ---------------------------------------------------------------------------------------------
# Optimizers and schedules: Muon on the banks, AdamW on the rest
# ---------------------------------------------------------------------------------------------

# Polar Express (arXiv 2505.16932): the optimal composition of odd quintics, 5 steps, safety 2e-2
POLAR_EXPRESS = (
    (8.15655452, -22.48329293, 15.87876992),
    (4.04292994, -2.80891747, 0.50001785),
    (3.89166780, -2.77248415, 0.50606482),
    (3.28575366, -2.36812949, 0.46449024),
    (2.34654133, -1.70978284, 0.42323551),
)


def orthogonalize(matrices: Tensor, dtype=torch.bfloat16) -> Tensor:
    """About the nearest semi-orthogonal matrix of each: (n, out, in) -> the same, in `dtype`.

    All singular values go near 1. Source: Muon (Jordan 2024), with Polar Express coefficients.
    """
    is_wide = matrices.shape[1] < matrices.shape[2]
    x = (F.normalize(matrices, dim=(1, 2)) / 1.02).to(dtype)  # spectral norm below 1
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT if is_wide else x.mT @ x  # (n, short side, short side)
        factor = b * gram + c * gram @ gram
        x = a * x + (factor @ x if is_wide else x @ factor)
    return x


def muon(rows: dict, gradient: Tensor, now: dict, cfg: Config):
    """Momentum, orthogonalized matrix by matrix (Jordan 2024): rows (n, out, in), in place."""
    rows["momentum"].lerp_(gradient, 1 - cfg.muon_momentum)
    if now["moves_banks"]:
        nesterov = gradient.lerp(rows["momentum"], cfg.muon_momentum)
        update = orthogonalize(nesterov, torch.bfloat16 if cfg.bf16 else torch.float32)
        keller_scale = max(1, gradient.shape[1] / gradient.shape[2]) ** 0.5
        rows["weights"].sub_(now["lr"] * cfg.muon_lr * keller_scale * update)


def adamw(rows: dict, gradient: Tensor, now: dict, cfg: Config):
    """Adam (arXiv 1412.6980) without weight decay: rows (n,), in place."""
    beta1, beta2 = cfg.adamw_betas
    rows["mean"].lerp_(gradient, 1 - beta1)
    rows["square"].lerp_(gradient.square(), 1 - beta2)
    spread = (rows["square"] / (1 - beta2 ** now["count"])).sqrt()
    step = rows["mean"] / (1 - beta1 ** now["count"]) / (spread + 1e-8)
    rows["weights"].sub_(now["lr"] * cfg.adamw_lr * step)


def update(rule, rows: dict, gradient: Tensor, average: Tensor, now: dict, cfg: Config):
    """All that a step changes in some rows, in one graph: the rule's part, then the EMA."""
    rule(rows, gradient.float(), now, cfg)
    average.lerp_(rows["weights"], 1 - now["ema_decay"])


class Share:
    """Parameters, and the part of them that this process alone trains (ZeRO, arXiv 1910.02054).

    They are rows: matrices of one shape or, with shape (), all numbers end to end, and zeros up to
    equally many on each process. Rows are fp32; a step writes the model's bf16 views of `working`.
    """

    def __init__(self, params: list, averages: list, shape: tuple, cfg: Config, world):
        self.params = params
        self.shape = shape
        self.cfg = cfg
        self.world = world
        self.rule, kept = (muon, ["momentum"]) if shape else (adamw, ["mean", "square"])
        self.update = torch.compile(update, dynamic=False) if cfg.compile else update
        self.average = self.join([p.data for p in params])  # of all processes, but see gather_ema
        self.working = self.average.to(torch.bfloat16 if cfg.bf16 else torch.float32, copy=True)
        for tensors, whole in ((params, self.working), (averages, self.average)):
            nn.utils.vector_to_parameters(whole.flatten(), tensors)  # as views
        for p in params:  # several backward passes are summed in fp32
            p.grad_dtype = torch.float32 if cfg.micro_batch else p.dtype
        self.rows = dict(weights=world.rows(self.average).clone())
        self.rows |= {name: torch.zeros_like(self.rows["weights"]) for name in kept}

    def join(self, tensors: list) -> Tensor:
        """Tensors like `params` -> rows (n, *shape), a multiple of the number of processes."""
        rows = [x.reshape(-1, *self.shape) for x in tensors]
        extra = -sum(map(len, rows)) % self.world.size
        return torch.cat([*rows, rows[0].new_zeros(extra, *self.shape)])

    def reduce(self):
        """Begins to sum the gradients over the processes."""
        gradient = self.join([p.grad for p in self.params])
        self.gradient, self.wait = self.world.reduce_scatter(gradient)

    def step(self, now: dict):
        """Updates this process's rows, then begins to send their weights to the others."""
        self.wait()
        average = self.world.rows(self.average)
        self.update(self.rule, self.rows, self.gradient, average, now, self.cfg)
        self.gradient = None
        self.wait = self.world.all_gather(self.rows["weights"], self.working)

    def state_dict(self) -> dict:
        """All rows, the same for any number of processes. Collective."""
        state = {name: torch.empty_like(self.average) for name in self.rows}
        for name, whole in state.items():
            self.world.all_gather(self.rows[name], whole)()
        count = sum(len(p.reshape(-1, *self.shape)) for p in self.params)
        return {name: whole[:count] for name, whole in state.items()}

    def load_state_dict(self, state: dict):
        for name, mine in self.rows.items():
            mine.copy_(self.world.rows(self.join([state[name]])))


def lr_schedule(step: int, cfg: Config) -> float:
    """Share of the peak learning rate of update number `step` (from 0): linear up, flat, down."""
    rise = (step + 1) / max(1, cfg.warmup * cfg.steps)
    fall = (cfg.steps - step) / max(1, cfg.cooldown * cfg.steps)
    return min(1.0, rise, fall)


def ema_decay(step: int, cfg: Config) -> float:
    """EMA decay after update number `step` (from 0): warmed up, to forget the initial weights."""
    return min(cfg.ema_decay, (1 + step) / (10 + step))


# ---------------------------------------------------------------------------------------------
# Data: memory-mapped shards, one batch ahead
# ---------------------------------------------------------------------------------------------


class UserError(Exception):
    """Something the user can mend: printed as one line, exit code 2."""


# sha256 of manifest.json, for tracks whose shards are the same on every machine
MANIFESTS = {"cifar10": "c0946b2b3ef2dac73e411bbc877273c90cc733796389b900c57c1e12aaba1c60"}
UNREADABLE = (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError)


class Shards:
    """All shards of one split as memory-mapped arrays, checked by header before any work."""

    def __init__(self, track: Track, split: str, shapes: dict[str, tuple]):
        """shapes: of what is read of each image; of "features" it is their scale's. UserError."""
        self.track = track
        self.feature_scale = torch.ones(1, 0)  # (1 + patches, components) of a teacher: none
        self.shards = []  # {name: array (n, *shape)} each
        self.hashes = {}  # {path: sha256 of the file, as the manifest has it}, one each
        path = Path("data", track.name, "manifest.json")
        try:
            text = path.read_bytes()
            manifest = json.loads(text)
            if "features" in shapes:
                path = path.with_name("features.safetensors")
                with safe_open(path, "pt") as file:
                    self.feature_scale = file.get_tensor("scale")
                shapes = shapes | dict(features=tuple(self.feature_scale.shape))
            self.shapes = shapes
            for name in sorted(k for k in manifest["files"] if k.startswith(split + "_")):
                path = path.with_name(name)
                with safe_open(path, "pt") as file:  # maps the file, reads the header
                    shard = {key: file.get_tensor(key).numpy() for key in shapes}
                    found = [file.metadata()["track"], shard["latents"].dtype.name]
                found += [array.shape for array in shard.values()]
                count = manifest["files"][name]["count"]
                wanted = [track.name, track.dtype, *((count, *shape) for shape in shapes.values())]
                if found != wanted:
                    raise ValueError(f"holds {found}, not {wanted}")
                self.shards.append(shard)
                self.hashes[path] = manifest["files"][name]["sha256"]
        except UNREADABLE as error:
            mend = f"run: python data/download.py {track.name}"
            if "features" in shapes and not track.name.endswith("-external"):
                mend += " --images DIR --features"
            raise UserError(f"{path} is missing, damaged or foreign ({error}); {mend}")
        self.sha256 = hashlib.sha256(text).hexdigest()
        self.is_trial = "shards" in manifest.get("request", ())  # only a part of the data
        self.starts = np.cumsum([0] + [len(shard["labels"]) for shard in self.shards])
        self.count = int(self.starts[-1])

    def check(self, label_count: int, world):
        """Reads every shard once, each process its part. Off the clock. Raises UserError."""
        shards = list(zip(self.hashes.items(), self.shards))
        for (path, expected), shard in shards[world.rank :: world.size]:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            labels = shard["labels"]
            if digest != expected:
                fault = "is not what the manifest says (sha256)"
            elif labels.min() < 0 or labels.max() >= label_count:
                fault = f"has labels that are not in 0 .. {label_count - 1}"
            elif not torch.from_numpy(shard["latents"]).isfinite().all():
                fault = "has latents that are not finite"
            else:
                continue
            raise UserError(f"{path} {fault}; run: python data/download.py {self.track.name}")

    def gather(self, indices: np.ndarray, device) -> dict[str, Tensor]:
        """Copies of rows `indices` (B,), as stored: {name: (B, *shape)}, pinned for a GPU."""
        shards = np.searchsorted(self.starts, indices, side="right") - 1
        places = list(zip(shards.tolist(), (indices - self.starts[shards]).tolist()))
        rows = {}
        for name in self.shapes:
            array = np.stack([self.shards[shard][name][row] for shard, row in places])
            rows[name] = torch.from_numpy(array)
            if device.type == "cuda":
                torch.cuda.set_device(device)  # the loader's thread would use the first GPU
                rows[name] = rows[name].pin_memory()
        return rows


class Loader:
    """Training batches of this process's slice, fetched one step ahead by a thread.

    Their order is a function of (seed, step) alone: one permutation per epoch, global batches cut
    end to end. The thread uses numpy: torch would start OpenMP threads that slow the step.
    """

    def __init__(self, shards: Shards, cfg: Config, seed: int, world):
        self.shards = shards
        self.batch_size = cfg.batch_size
        self.seed = seed
        self.world = world
        self.pool = ThreadPoolExecutor(1)
        self.ahead = {}  # step -> batch on its way
        self.feature_scale = shards.feature_scale.to(world.device)

    @lru_cache(maxsize=2)  # noqa: B019
    def order(self, epoch: int) -> np.ndarray:
        generator = np.random.default_rng(draw_seed(self.seed, epoch, stream=1))
        return generator.permutation(self.shards.count)

    def fetch(self, step: int) -> dict[str, Tensor]:
        seen = step * self.batch_size + np.arange(self.batch_size)[self.world.part(self.batch_size)]
        places = zip(*np.divmod(seen, self.shards.count))
        indices = [self.order(int(epoch))[place] for epoch, place in places]
        return self.shards.gather(np.array(indices), self.world.device)

    def __call__(self, step: int) -> dict[str, Tensor]:
        """This process's slice of `step` on the device: see Shards.gather; features are scaled."""
        batch = self.ahead.pop(step, None) or self.pool.submit(self.fetch, step)
        self.ahead = {step + 1: self.pool.submit(self.fetch, step + 1)}
        rows = {k: x.to(self.world.device, non_blocking=True) for k, x in batch.result().items()}
        if "features" in rows:
            rows["features"] = rows["features"] * self.feature_scale
        return rows


def load_captions(track: Track, device) -> Tensor:
    """The track's captions by label: (labels, captions of each, text_width). Raises UserError."""
    path = Path("data", track.name, "text.safetensors")
    try:
        with safe_open(path, "pt") as file:
            pooled = file.get_tensor("pooled").to(device).float()
            labels = np.array(json.loads(file.metadata()["labels"]))
        counts = np.bincount(labels)
        if counts.min() < counts.max():
            raise ValueError(f"labels have {counts.min()} to {counts.max()} captions, not as many")
        by_label = pooled[np.argsort(labels, kind="stable")]
        return by_label.view(len(counts), -1, track.text_width)
    except (*UNREADABLE, IndexError, RuntimeError) as error:
        raise UserError(f"{path} is damaged ({error}); run: python data/download.py {track.name}")


def draw_seed(seed: int, counter: int, stream: int) -> int:
    """A 32-bit seed, different for every (counter, stream) of a run."""
    return (seed * 0x9E3779B1 + counter * 2 + stream) % 2**32


def to_model_scale(track: Track, stored: Tensor) -> Tensor:
    """Stored latents (B, C, H, W) -> what the model sees, float32."""
    return (stored.float() - track.shift) * track.scale


def draw_routing(model: Transformer, step: int, u: Tensor) -> tuple:
    """(keep, skip) of a Batch from uniform u (B, 1 + patches); how many depends on `step` alone."""
    cfg = model.cfg
    if cfg.route_keep == 1:
        return None, None
    skip = u[:, 0] < cfg.path_drop
    if step >= (1 - cfg.dense_tail) * cfg.steps:
        return None, skip
    count = round(cfg.route_keep * len(model.position))
    patches = u[:, 1:].argsort(dim=1)[:, :count] + model.class_tokens
    return F.pad(patches, (model.class_tokens, 0)), skip  # the class token, number 0, always stays


def make_batch(model, captions: Tensor, rows: dict, seed: int, step: int, world) -> Batch:
    """This process's slice of a global batch, from its stored rows (see Shards.gather).

    All that is random in a step is drawn here, for the global batch, from (seed, step) alone, and
    then sliced: so any number of processes trains the same model.
    """
    cfg, device = model.cfg, world.device
    B = cfg.batch_size
    mine = world.part(B)
    g = torch.Generator(device).manual_seed(draw_seed(seed, step, stream=0))
    noise = torch.randn(B, model.image_values, generator=g, device=device)[mine]
    first_t, caption, drop, flip = torch.rand(4, B, generator=g, device=device)
    routing = torch.rand(B, 1 + len(model.position), generator=g, device=device)[mine]
    class_noise = torch.randn(B, model.class_values, generator=g, device=device)[mine]
    t = (first_t[0] + torch.arange(B, device=device) / B) % 1  # low discrepancy: VDM, appendix I.1
    if cfg.t_spread:  # fewer steps at both ends: SD3, arXiv 2403.03206, eq. 19
        t = torch.sigmoid(cfg.t_spread * torch.special.ndtri(t))

    x = to_model_scale(model.track, rows["latents"])
    if cfg.flip:
        x = torch.where(flip[mine].view(-1, 1, 1, 1) < 0.5, x.flip(-1), x)
    x = x.flatten(1)
    if model.class_tokens:
        x = torch.cat([x, rows["features"][:, 0]], dim=1)
        noise = torch.cat([noise, class_noise], dim=1)
    text = captions[rows["labels"].long(), (caption[mine] * captions.shape[1]).long()]
    is_shown = (drop[mine] >= cfg.caption_drop).view(-1, 1)
    text = torch.where(is_shown, text, model.null_text(len(x)))
    keep, skip = draw_routing(model, step, routing)
    return Batch(x, noise, shift_time(t[mine], cfg.t_shift), text, keep, skip, rows.get("features"))


# ---------------------------------------------------------------------------------------------
# Distributed and clock
# ---------------------------------------------------------------------------------------------


def environment_number(name: str, default: int) -> int:
    """A whole number from the environment. Raises UserError."""
    text = os.environ.get(name, str(default))
    if not re.fullmatch("[0-9]{1,9}", text):
        raise UserError(f"{name}={text!r} is not a whole number of at most nine digits")
    return int(text)


def complain(problem: str, world: "World | None"):
    """One line on standard error, with the place where it is known."""
    place = f"rank {world.rank}, step {world.step}: " if world and world.step else ""
    print(f"train_speedrun.py: {place}{problem}", file=sys.stderr, flush=True)


class World:
    """This process, and a run's collectives. Raises UserError for a launcher's odd settings."""

    def __init__(self):
        self.rank = environment_number("RANK", 0)
        self.size = environment_number("WORLD_SIZE", 1)
        local_rank = environment_number("LOCAL_RANK", 0)
        if self.rank >= self.size or self.size > 1 and "MASTER_PORT" not in os.environ:
            found = f"RANK={self.rank} and WORLD_SIZE={self.size}"
            mend = f"torchrun --nproc_per_node={max(self.size, 1)} train_speedrun.py"
            raise UserError(f"{found} are not torchrun's: unset them, or start with {mend}")
        self.step = 0  # for error lines, as the folder
        self.folder = None
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            if local_rank >= torch.cuda.device_count():
                found = f"there are {torch.cuda.device_count()}, start as many processes"
                raise UserError(f"process {local_rank} of this node has no GPU of its own: {found}")
            self.device = torch.device("cuda", local_rank)
            torch.cuda.set_device(self.device)
        elif platform.libc_ver()[0] == "glibc":  # keep freed memory: new pages cost more
            ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX
            ctypes.CDLL(None).mallopt(-1, -1)  # M_TRIM_THRESHOLD
        if self.size > 1:  # the timeout is that of one collective
            if sys.platform == "linux":  # killed when torchrun dies, or it would train on
                ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(minutes=10))
            dist.barrier()  # or rank 0, ending early, takes the store that others still join by

    def end_on_signals(self):
        """SIGTERM and Ctrl-C end it with one line: by a thread, also where a collective waits."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)

        def wait():
            cause = signal.Signals(os.read(reader, 1)[0]).name
            if self.rank == 0:
                mend = f"continue with RESUME={self.folder}" if self.folder else "start again"
                complain(f"ended by {cause} (or another process died); {mend}", self)
            os._exit(2)

        threading.Thread(target=wait, daemon=True).start()

    def part(self, count: int) -> slice:
        """This process's part of `count` rows."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def sum(self, x: Tensor) -> Tensor:
        """Sum over processes, in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def rows(self, x: Tensor) -> Tensor:
        """This process's of the equally many rows of each: a view."""
        return x.chunk(self.size)[self.rank]

    def reduce_scatter(self, x: Tensor) -> tuple:
        """(n, ...) on each -> its rows of their sum, in fp32, and a function that waits for it."""
        if self.size == 1:
            return x, lambda: None
        out = torch.empty_like(self.rows(x), dtype=torch.float32)
        return out, dist.reduce_scatter_tensor(out, x.float(), async_op=True).wait

    def all_gather(self, x: Tensor, out: Tensor):
        """Each one's rows into all of them, (n, ...); returns a function that waits for it."""
        if self.size == 1:
            out.copy_(x)
            return lambda: None
        return dist.all_gather_into_tensor(out, x.to(out.dtype), async_op=True).wait

    def machine(self) -> str:
        """How many of which GPU, or of which CPU with how many threads."""
        if self.device.type == "cuda":
            return f"{self.size} x {torch.cuda.get_device_name()}"
        cpu = os.popen("lscpu 2> /dev/null | sed -n 's/^Model name: *//p'").read().strip()
        return f"{self.size} x {cpu or platform.machine()}, {torch.get_num_threads()} threads"

    def now(self) -> float:
        """Seconds, once every process and device has arrived."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self.size > 1:
            dist.barrier()
        return time.perf_counter()


class Clock:
    """Seconds of the timed region. The only clock a record's number is read from."""

    def __init__(self, world: World, seconds: float):
        self.world = world
        self.seconds = seconds
        self.started = None

    def start(self):
        self.started = self.world.now()

    def read(self) -> float:
        return self.seconds + (self.world.now() - self.started if self.started else 0.0)

    def stop(self):
        self.seconds = self.read()
        self.started = None


# ---------------------------------------------------------------------------------------------
# Step, validation, warm-up
# ---------------------------------------------------------------------------------------------


class State:
    """What a run carries from step to step: model, EMA, optimizers. Saved, restored, rewound."""

    def __init__(self, cfg: Config, seed: int, world: World, components: int = 0):
        self.cfg = cfg
        self.world = world
        self.model = Transformer(cfg, TRACKS[cfg.track], components)
        self.model.init_weights(seed)
        self.model.to(world.device)
        self.ema = copy.deepcopy(self.model).requires_grad_(False).eval()
        if cfg.autoguidance:
            self.ema.weak = copy.deepcopy(self.ema)
        groups = {(): []}  # AdamW's, whose exchange is the longest, then the banks by shape
        for pair in zip(self.model.parameters(), self.ema.parameters()):
            is_bank = pair[0].dim() == 3 and cfg.muon_lr
            groups.setdefault(tuple(pair[0].shape[1:]) if is_bank else (), []).append(pair)
        self.shares = [Share(*zip(*g), shape, cfg, world) for shape, g in groups.items()]
        self.parts = dict(model=self.model, ema=self.ema)
        self.parts |= {f"rows {share.shape}": share for share in self.shares}
        compiled = torch.compile(loss_terms, dynamic=False, fullgraph=True)
        self.loss_terms = compiled if cfg.compile else loss_terms

    def gather_ema(self):
        """Brings the other processes' rows of the EMA here. Collective."""
        for share in self.shares:
            self.world.all_gather(self.world.rows(share.average).clone(), share.average)()

    def state_dict(self) -> dict:
        """Everything, the same for any number of processes. Collective."""
        self.gather_ema()
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict):
        """In place: what is compiled stays valid."""
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


def images_per_forward(cfg: Config, world: World, total: int) -> int:
    """The largest equal parts, up to micro_batch, in which a process does its share of `total`."""
    return math.gcd(total // world.size, cfg.micro_batch or cfg.batch_size // world.size)


def train_step(state: State, step: int, batch: Batch) -> dict[str, Tensor]:
    """One update of model and EMA. Never waits for the device.

    Returns this process's part of each term's mean. Losses are divided by the global batch, so
    gradients only ever need a sum.
    """
    cfg = state.cfg
    size = images_per_forward(cfg, state.world, cfg.batch_size)
    means = {}
    for start in range(0, len(batch.x), size):
        with record_function("forward"):
            terms = state.loss_terms(state.model, batch.part(slice(start, start + size)))
            terms = {name: term.sum() / cfg.batch_size for name, term in terms.items()}
        with record_function("backward"):
            sum(terms.values()).backward()
        for name, term in terms.items():
            means[name] = means.get(name, 0.0) + term.detach()
    now = dict(lr=lr_schedule(step, cfg), ema_decay=ema_decay(step, cfg), count=step + 1.0)
    now = {name: torch.full((), x, device=state.world.device) for name, x in now.items()}
    now["moves_banks"] = (step + 1) % cfg.muon_every == 0
    with record_function("exchange"):
        for share in state.shares:  # begun before the first update, they go on beside it
            share.reduce()
        state.model.zero_grad(set_to_none=True)
    for share in state.shares:
        with record_function(share.rule.__name__):
            share.step(now)
    for share in state.shares:
        share.wait()
    return means


def read_losses(losses: list[dict], step: int, world: World) -> dict[str, float]:
    """ "train_loss" and its terms, means over the global batch, of the last of `losses`.

    losses: what train_step returned for the steps up to `step`, counted from 1. Waits for the
    device. Raises UserError where one is not finite.
    """
    means = world.sum(torch.stack([torch.stack(list(terms.values())) for terms in losses]))
    is_finite = means.isfinite().all(dim=1).tolist()
    if not all(is_finite):
        first = step - len(losses) + 1 + is_finite.index(False)
        mend = "lower the learning rate; what was saved before it stays"
        raise UserError(f"the loss of step {first} is not finite: {mend}")
    last = dict(zip(losses[-1], means[-1].tolist()))
    return dict(train_loss=sum(last.values()), **(last if len(last) > 1 else {}))


@torch.no_grad()
def validate(state: State, val: Shards, captions: Tensor) -> float:
    """Mean loss of the EMA over the contract's validation images, noise and times.

    With each label's first caption, and zeros for REG's class token. The same on every process.
    """
    track, device = state.model.track, state.world.device
    noise, t = validation_draws(track, track.val_images)
    total = torch.zeros((), dtype=torch.float64, device=device)
    mine = state.world.part(track.val_images)
    size = images_per_forward(state.cfg, state.world, track.val_images)
    for start in range(mine.start, mine.stop, size):
        part = slice(start, start + size)
        rows = val.gather(np.arange(start, start + size), device)
        x = to_model_scale(track, rows["latents"])
        images = torch.stack([x, noise[part]]).flatten(2)  # (2, B, CHW)
        images = F.pad(images, (0, state.model.class_values)).to(device)
        text = captions[rows["labels"].long().to(device), 0]
        batch = Batch(*images.unbind(0), t[part].to(device), text)
        total += state.loss_terms(state.ema, batch)["flow"].double().sum()
    return state.world.sum(total).item() / track.val_images


def warm_up(state: State, shapes: dict[str, tuple], captions: Tensor):
    """Compiles every shape of the run on zeros, then puts everything back. Off the clock."""
    cfg, world = state.cfg, state.world
    before = copy.deepcopy(state.state_dict())
    count = cfg.batch_size // world.size
    rows = {name: torch.zeros(count, *s, device=world.device) for name, s in shapes.items()}
    for step in (0, 1, 2, cfg.steps - 1, cfg.steps - 1):  # the last may be unrouted
        batch = make_batch(state.model, captions, rows, 0, step, world)
        train_step(state, step, batch)
    size = images_per_forward(cfg, world, state.model.track.val_images)
    x = batch.x[:1].repeat(size, 1)
    with torch.no_grad():
        validation = Batch(x, x + 1, batch.t[:1].repeat(size), batch.text[:1].repeat(size, 1))
        state.loss_terms(state.ema, validation)
    state.load_state_dict(before)


# ---------------------------------------------------------------------------------------------
# Run: checks, files, log, timed loop
# ---------------------------------------------------------------------------------------------


def write_atomic(path: Path, write):
    """write(temporary path), sync, rename: the file is whole or not there. Raises UserError."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save raises RuntimeError
        temporary.unlink(missing_ok=True)
        reason = str(error).splitlines()[0]
        mend = f"free some disk, then continue with RESUME={path.parent}"
        raise UserError(f"cannot write {path} ({reason}); {mend}")


def save_checkpoint(folder: Path, ema: Transformer, meta: dict):
    """The EMA's weights, for the referee: step_<step>.safetensors."""
    weights = {name: x.cpu() for name, x in ema.state_dict().items()}
    notes = {key: str(value) for key, value in meta.items()}
    path = folder / f"step_{meta['step']:06d}.safetensors"
    write_atomic(path, lambda temporary: save_file(weights, temporary, notes))


def load_checkpoint(path, device="cpu") -> tuple[Transformer, dict]:
    """(model with the checkpoint's EMA weights, in evaluation mode; its metadata)."""
    with safe_open(path, "pt") as file:
        meta = file.metadata()
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    cfg = CONFIGS[meta["config"]]
    model = Transformer(cfg, TRACKS[cfg.track], int(meta["feature_components"]))
    if cfg.autoguidance:
        model.weak = copy.deepcopy(model).requires_grad_(False)
    model.load_state_dict(weights)
    return model.to(device).eval(), meta


def save_state(folder: Path, state: State, meta: dict):
    """All that RESUME needs: state.pt. Collective; rank 0 writes."""
    whole = dict(meta=meta, **state.state_dict())
    if state.world.rank == 0:
        write_atomic(folder / "state.pt", lambda temporary: torch.save(whole, temporary))


def load_state(folder: Path, code_sha256: str) -> dict:
    """What a killed run left in its folder. Raises UserError."""
    path = folder / "state.pt"
    if not path.exists():
        reason = "it is finished or no run's folder; start a new run"
        raise UserError(f"{folder} has no state to resume from: {reason}")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        assert saved["meta"].keys() >= {"config", "seed", "step", "seconds", "code_sha256"}
    except Exception as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}): start a new run")
    if saved["meta"]["code_sha256"] != code_sha256 or saved["meta"]["config"] not in CONFIGS:
        mend = f"cp {folder}/train_speedrun.py ."
        raise UserError(f"{folder} is of another train_speedrun.py: {mend}")
    return saved


def make_folder(wanted: Path, source: str) -> Path:
    """A run's new folder, or one numbered beside it: snapshot, log's head. Raises UserError."""
    folder = wanted
    for count in itertools.count(2):
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            folder = wanted.with_name(f"{wanted.name}_{count}")
    write_atomic(folder / "train_speedrun.py", lambda path: path.write_text(source))
    write_atomic(folder / "log.txt", lambda path: path.write_text(source + "=" * 100 + "\n"))
    return folder


def open_log(folder: Path):
    """The log of a run, locked until this process ends: one alone may write. Raises UserError."""
    try:
        file = open(folder / "log.txt", "r+")  # noqa: SIM115
        file.seek(0, os.SEEK_END)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        raise UserError(f"{folder} is no run's folder: give one of logs/")
    except BlockingIOError:
        raise UserError(f"{folder} is being written by another process: wait for it, or end it")
    return file


def check_config(cfg: Config, world: World):
    """Refuses what cannot be trained, before any work. AssertionError with the values."""
    track = TRACKS[cfg.track]
    layers = cfg.repa_layers
    counts = f"batch_size {cfg.batch_size} and the {track.val_images} validation images"
    divides = cfg.batch_size % world.size == track.val_images % world.size == 0
    assert divides, f"world size {world.size} does not divide {counts}: start another number"
    fits = track.shape[1] % cfg.patch == track.shape[2] % cfg.patch == cfg.width % cfg.head_dim == 0
    assert fits, f"patch must divide {track.shape}, head_dim {cfg.head_dim} the width {cfg.width}"
    assert cfg.head_dim % 4 == 0, f"head_dim {cfg.head_dim} is no multiple of 4 (2-D RoPE)"
    assert 1 <= cfg.evals <= cfg.steps, f"evals {cfg.evals} is not in 1 .. steps {cfg.steps}"
    assert cfg.sampler in ("euler", "sde"), f"sampler {cfg.sampler!r} is neither euler nor sde"
    has_middle = 0 < 2 * cfg.route_dense < cfg.depth
    assert cfg.route_keep == 1 or has_middle, f"route_dense {cfg.route_dense} leaves no middle"
    even = images_per_forward(cfg, world, cfg.batch_size) % 2 == 0
    assert even or not cfg.cfm, "cfm pairs images: give each forward an even number of them"
    aligns = set(layers) <= set(range(1, cfg.depth + 1)) and bool(layers) == bool(cfg.repa)
    assert aligns, f"repa {cfg.repa}, repa_layers {layers}: both or none, in 1 .. {cfg.depth}"
    assert not cfg.flip or not (cfg.reg or cfg.repa), "features are not mirrored: set flip = False"
    nfe = sampling_nfe(cfg)
    assert nfe <= track.max_nfe, f"sample takes {nfe} network evaluations, of {track.max_nfe}"


def open_data(cfg: Config, track: Track, world: World) -> tuple[Shards, Shards]:
    """Training and validation shards, read once and checked. Raises UserError."""
    shapes = dict(latents=track.shape, labels=())
    features = dict(features=None) if cfg.reg or cfg.repa else {}
    data = Shards(track, "train", shapes | features)
    val = Shards(track, "val", shapes)
    mend = f"run: python data/download.py {track.name}"
    wanted = track.train_images or data.count
    if not data.is_trial and data.count != wanted or val.count < track.val_images:
        found = f"{data.count} training and {val.count} validation images"
        raise UserError(f"data/{track.name}: {found}, not {wanted} and {track.val_images}; {mend}")
    if not data.is_trial and data.sha256 != MANIFESTS.get(track.name, data.sha256):
        raise UserError(f"data/{track.name}/manifest.json is not that of {track.name}; {mend}")
    patches = math.prod(track.shape[1:]) // cfg.patch**2
    seen = len(data.feature_scale) - 1
    assert patches == seen or not cfg.repa, f"{patches} patches, but the teacher saw {seen}"
    label_count = len(load_captions(track, "cpu"))
    data.check(label_count, world)
    val.check(label_count, world)
    return data, val


class Run:
    """A run that is ready to train: its data, state, clock, folder and log.

    meta: what its checkpoints say of it. Raises UserError.
    """

    def __init__(self, name: str, seed: int, resume: Path | None, world: World):
        source = Path(__file__).read_text()
        code = hashlib.sha256(source.encode()).hexdigest()
        self.meta = dict(config=name, seed=seed, step=0, images=0, seconds=0.0, code_sha256=code)
        self.folder = world.folder = resume
        self.log_file = open(os.devnull, "w")  # noqa: SIM115
        if resume:
            if world.rank == 0:
                self.log_file = open_log(resume)
            saved = load_state(resume, code)
            self.meta = saved["meta"]
        self.resumed = int(bool(resume))
        self.cfg = CONFIGS[self.meta["config"]]
        self.track = TRACKS[self.cfg.track]
        check_config(self.cfg, world)
        self.data, self.val = open_data(self.cfg, self.track, world)
        self.meta.update(track=self.track.name, data_sha256=self.data.sha256)
        self.meta["feature_components"] = self.data.feature_scale.shape[1]
        torch.set_float32_matmul_precision("high")
        self.state = State(self.cfg, self.meta["seed"], world, self.meta["feature_components"])
        self.clock = Clock(world, self.meta["seconds"])
        if resume:
            try:
                self.state.load_state_dict(saved)
            except Exception as error:  # torch's own errors have no common class
                reason = type(error).__name__
                raise UserError(f"{resume}/state.pt is damaged ({reason}): start again")
            self.log(f"\nresumed from step {self.meta['step']} at {self.clock.seconds:.3f}s")
        else:
            self.folder = Path("logs", f"{datetime.now():%Y%m%d-%H%M%S}_{name}_seed{seed}")
            if world.rank == 0:  # the others write nothing
                self.folder = make_folder(self.folder, source)
                self.log_file = open_log(self.folder)
            save_state(self.folder, self.state, self.meta)  # a full disk shows now
            world.folder = self.folder
        self.parameters = sum(p.numel() for p in self.state.model.parameters())
        trial = " (a part: a trial, no record)" if self.data.is_trial else ""
        self.log(
            f"{self.folder}: seed {self.meta['seed']}, {self.parameters / 1e6:.2f}M parameters, "
            f"{self.data.count} training images{trial}\n{world.machine()}, "
            f"python {platform.python_version()}, torch {torch.__version__}\n"
            f"{json.dumps(asdict(self.cfg))}"
        )

    def log(self, text: str):
        """To the log and, by the process of rank 0, to the terminal."""
        print(text, file=self.log_file, flush=True)
        if self.state.world.rank == 0:
            print(text, flush=True)

    def log_step(self, step: int, losses: dict[str, float]):
        """The line after `step` updates: the first loss, the clock, then the loss's terms."""
        ms = 1000 * self.clock.read()
        first, *terms = (f"{name}:{value:.5f}" for name, value in losses.items())
        times = f"train_time:{ms:.0f}ms step_avg:{ms / max(step, 1):.2f}ms"
        line = f"step:{step}/{self.cfg.steps} images:{step * self.cfg.batch_size} {first} {times}"
        self.log(" ".join([line, *terms]))
        if self.state.world.rank == 0 and sys.stderr.isatty():  # a line that the next one covers
            left = ms / max(step, 1) * (self.cfg.steps - step) / 1000
            print(f"about {left:.0f} s of training left", end="\r", file=sys.stderr, flush=True)

    def log_summary(self, graphs: int):
        """The last block, for tools: one `key: value` a line."""
        world = self.state.world
        memory = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        attention = "written out"
        if world.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated()
            q = torch.empty(2, 2, 256, self.cfg.head_dim, dtype=torch.bfloat16, device=world.device)
            attention = torch.nn.attention.SDPBackend(torch._fused_sdp_choice(q, q, q)).name
        summary = self.meta | dict(
            run_id=self.folder.name,
            resumed=self.resumed,
            world_size=world.size,
            steps=self.cfg.steps,
            parameters=self.parameters,
            val_loss=f"{self.meta['val_loss']:.5f}",
            train_time_s=f"{self.clock.seconds:.3f}",
            images_per_second=f"{self.meta['images'] / self.clock.seconds:.1f}",
            sampling_nfe=sampling_nfe(self.cfg),
            attention=attention,
            peak_memory_mib=memory // 2**20,
            graphs_compiled_on_the_clock=graphs,
        )
        self.log("=" * 100)
        self.log("\n".join(f"{key}: {value}" for key, value in summary.items()))


def train(run: Run, world: World):
    """The timed loop, with its validations and checkpoints. Raises UserError."""
    cfg, meta, state, clock = run.cfg, run.meta, run.state, run.clock
    validation_steps = {round(cfg.steps * (k + 1) / cfg.evals) for k in range(cfg.evals)}
    warm_up(state, run.data.shapes, load_captions(run.track, world.device))
    if world.device.type == "cuda":  # warm-up's copies are gone, and no part of the run's memory
        torch.cuda.reset_peak_memory_stats()
    torch._dynamo.utils.counters.clear()
    losses = []  # of the steps since they were last read

    clock.start()
    captions = load_captions(run.track, world.device)
    state.model.set_text(captions.flatten(0, 1))
    state.ema.set_text(captions.flatten(0, 1))
    loader = Loader(run.data, cfg, meta["seed"], world)
    for step in range(meta["step"], cfg.steps + 1):
        world.step = step + 1
        is_pause = step in validation_steps or (step % cfg.save_every == 0 and step > 0)
        if is_pause and step > meta["step"]:  # a resumed run begins behind one
            state.gather_ema()
            clock.stop()
            if losses:
                read_losses(losses, step, world)  # what is not finite is never saved
                losses = []
            meta.update(step=step, images=step * cfg.batch_size, seconds=clock.seconds)
            if step in validation_steps:
                meta["val_loss"] = validate(state, run.val, captions)
                if cfg.autoguidance and step <= max(cfg.weak_at * cfg.steps, min(validation_steps)):
                    state.ema.weak.load_state_dict(state.ema.state_dict(), strict=False)
                run.log_step(step, dict(val_loss=meta["val_loss"]))
                if world.rank == 0:
                    save_checkpoint(run.folder, state.ema, meta)
            if step == cfg.steps:
                break
            save_state(run.folder, state, meta)
            clock.start()
        with record_function("step"):
            with record_function("loader"):
                rows = loader(step)
            with record_function("batch"):
                batch = make_batch(state.model, captions, rows, meta["seed"], step, world)
            losses.append(train_step(state, step, batch))
        if step < 10 or (step + 1) % 50 == 0:
            run.log_step(step + 1, read_losses(losses, step + 1, world))
            losses = []

    run.log_summary(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    if world.rank == 0:
        (run.folder / "state.pt").unlink()  # finished: nothing left to resume


# ---------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------


def main() -> int:
    """The track from the command line, RESUME and SEED from the environment. The exit code."""
    world = None
    status = 0
    try:
        name = " ".join(sys.argv[1:]) or "cifar10"
        seed = environment_number("SEED", 0)
        resume = os.environ.get("RESUME")
        assert name in CONFIGS, f"unknown track {name!r}: choose one of {', '.join(CONFIGS)}"
        world = World()
        world.end_on_signals()
        train(Run(name, seed, Path(resume) if resume else None, world), world)
    except (UserError, AssertionError, OSError) as error:
        status = 2
        problem = str(error)
    except RuntimeError as error:
        if not world or world.size == 1:
            raise  # a bug: its traceback is the help
        status = 1
        problem = f"{str(error).splitlines()[0]}: another process died, or a bug here"
    if status:
        complain(problem, world)
    if world and world.size > 1:
        if status:
            os._exit(status)  # never wait for a dead process
        gc.collect()  # gloo aborts where tensors outlive it
        dist.barrier()
        dist.destroy_process_group()
    return status


if __name__ == "__main__":
    sys.exit(main())
