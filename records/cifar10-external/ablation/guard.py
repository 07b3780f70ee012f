"""A judge of samples that is no relative of the teacher: a small network trained on CIFAR-10 alone.

    python records/cifar10-external/ablation/guard.py        trains it, guard.safetensors beside this file

Teacher (EfficientNet-lite2) and judge (EfficientNet-lite0) are of one family and saw the same
images. So a network that has learned the teacher's features could please the judge without drawing
better. This one has plain convolutions, random first weights and has seen CIFAR-10's training
images alone.
"""

import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))  # this file is run as a script

from data.common import machine, read_split  # noqa: E402
from data.metrics import mean_within, whole_kernel_distance  # noqa: E402

WEIGHTS = Path(__file__).with_name("guard.safetensors")
CHANNELS = (48, 96, 192)  # at 32 x 32, 16 x 16 and 8 x 8 pixels
EPOCHS = 5
BATCH = 250
PEAK_LR = 0.4
SMOOTHING = 0.1  # of the labels


class Unit(nn.Module):
    """Two 3 x 3 convolutions, the second beside a way around it."""

    def __init__(self, before: int, channels: int):
        super().__init__()
        self.first = nn.Conv2d(before, channels, 3, padding=1, bias=False)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)])

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norms[0](self.first(x)))
        return x + F.relu(self.norms[1](self.second(x)))


class Guard(nn.Module):
    def __init__(self):
        super().__init__()
        sizes = (3, *CHANNELS)
        self.units = nn.ModuleList(Unit(a, b) for a, b in zip(sizes, sizes[1:]))
        self.head = nn.Linear(CHANNELS[-1], 10)

    def features(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, 32, 32) -> (B, 192)."""
        x = (images.float() - 127.5) / 64
        x = x.contiguous(memory_format=torch.channels_last)
        for i, unit in enumerate(self.units):
            x = unit(F.max_pool2d(x, 2) if i else x)
        return x.mean(dim=(2, 3))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


def load() -> Guard:
    guard = Guard()
    guard.load_state_dict(load_file(WEIGHTS))
    return guard.eval()


@torch.no_grad()
def seen(guard: Guard, images: Tensor) -> tuple[Tensor, Tensor]:
    """Features (N, 192) and classes (N,) of uint8 images."""
    parts = [guard.features(part) for part in images.split(BATCH)]
    features = torch.cat(parts)
    return features, guard.head(features).argmax(dim=1)


def scores(guard: Guard, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Share of samples that show their label; kernel distance x 1000 to the 10,000 test images."""
    real, _ = seen(guard, read_split("cifar10", "val")[0])
    fake, classes = seen(guard, images)
    accuracy = (classes == labels).float().mean().item()
    return accuracy, 1000 * whole_kernel_distance(fake, real, mean_within(real))


def shifted(images: Tensor) -> Tensor:
    """Each image mirrored or not, all moved by up to 2 pixels, what is outside being mirrored."""
    is_mirrored = torch.rand(len(images), 1, 1, 1) < 0.5
    images = torch.where(is_mirrored, images.flip(3), images)
    padded = F.pad(images.float(), (2, 2, 2, 2), mode="reflect")
    down, right = torch.randint(0, 5, (2,)).tolist()
    return padded[:, :, down : down + 32, right : right + 32]


def main():
    torch.manual_seed(0)
    images, labels = read_split("cifar10", "train")
    guard = Guard().to(memory_format=torch.channels_last)
    steps = EPOCHS * len(images) // BATCH
    optimizer = torch.optim.SGD(
        guard.parameters(), lr=PEAK_LR, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_LR, total_steps=steps, pct_start=0.2, anneal_strategy="linear"
    )
    train_step = torch.compile(guard, dynamic=False)
    print(f"machine: {machine(torch.device('cpu'))}")
    began = time.perf_counter()
    for epoch in range(EPOCHS):
        losses = []
        for rows in torch.randperm(len(images)).split(BATCH):
            with torch.autocast("cpu", torch.bfloat16):
                logits = train_step(shifted(images[rows]))
            loss = F.cross_entropy(logits.float(), labels[rows], label_smoothing=SMOOTHING)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
        mean = sum(losses) / len(losses)
        assert math.isfinite(mean), "the training diverged"
        print(
            f"epoch: {epoch + 1} loss: {mean:.4f} s: {time.perf_counter() - began:.0f}", flush=True
        )
    save_file({name: tensor.half() for name, tensor in guard.state_dict().items()}, WEIGHTS)
    test_images, test_labels = read_split("cifar10", "val")
    accuracy, _ = scores(load(), test_images, test_labels)
    print(f"accuracy of the {len(test_images)} test images: {accuracy:.4f}")


if __name__ == "__main__":
    main()
