"""A problem small enough for a test, of images: convolution, batch norm in eval mode, pooling."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import trak_dist

CHANNELS, SIDE, CLASSES = 2, 6, 4


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(CHANNELS, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * (SIDE // 2) ** 2, CLASSES),
    )


class Images:
    """A map-style dataset of (image, label), drawn from a seed."""

    def __init__(self, rows: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.images = torch.randn(rows, CHANNELS, SIDE, SIDE, generator=generator)
        self.labels = torch.randint(0, CLASSES, (rows,), generator=generator)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.images[index], self.labels[index]


def state(seed: int, sharpness: float = 1.0) -> dict[str, torch.Tensor]:
    """Weights with running statistics far from their initial 0 and 1.

    `sharpness` multiplies the logits, so that a large one makes the model sure of itself.
    """
    torch.manual_seed(seed)
    weights = net().state_dict()
    weights["1.running_mean"] = 0.3 * torch.randn(4)
    weights["1.running_var"] = 0.5 + torch.rand(4)
    weights["1.weight"] = 0.5 + torch.rand(4)
    weights["1.bias"] = 0.2 * torch.randn(4)
    weights["5.weight"] *= sharpness
    return weights


def write_checkpoints(directory: Path, count: int = 3, sharpness: float = 1.0) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for seed in range(count):
        torch.save(state(seed, sharpness), directory / f"{seed}.pt")


def problem(directory: str, rows: int = 60, targets: int = 7) -> trak_dist.Problem:
    """One target set, `val`; the checkpoints are the `.pt` files of `directory`."""
    return trak_dist.Problem(
        model=net(),
        model_output=trak_dist.ImageClassification(),
        train=Images(rows, seed=1),
        targets={"val": Images(targets, seed=2)},
        checkpoints=sorted(Path(directory).glob("*.pt")),
    )
