"""The problem of the stored runs, which have a digest of this file: it is never edited.

All numbers but those of the model's output are multiples of 1/64, and so are exact: examples and
trained weights are the same on every processor. Nothing else of the tests is imported, for the
runs would hold a digest of that too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import trak_dist

FEATURES, CLASSES, ROWS = 6, 3, 24


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, CLASSES))


class Rows:
    """A map-style dataset of (features, label)."""

    def __init__(self, rows: int, seed: int) -> None:
        row, column = torch.arange(rows)[:, None], torch.arange(FEATURES)
        self.labels = (torch.arange(rows) + seed) % CLASSES
        noise = (37 * row + 101 * column + 59 * seed + 13 * row * column) ** 2 % 127 - 63
        self.features = (noise + 64 * (column % CLASSES == self.labels[:, None])) / 64

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.features[index], self.labels[index]


def train_checkpoint(dataset: Any, seed: int, device: torch.device) -> Mapping[str, Tensor]:
    """A classifier by the sums of each class, and what follows from the seed."""
    examples = [dataset[row] for row in range(len(dataset))]
    features, labels = (torch.stack(column) for column in zip(*examples, strict=True))
    of_class = (labels == torch.arange(CLASSES)[:, None]).float()
    drawn = (7 * seed + torch.arange(CLASSES * FEATURES)) % 31 - 15
    weight = of_class @ features / 8 + drawn.reshape(CLASSES, FEATURES) / 64
    return {"0.weight": weight.to(device), "0.bias": (of_class.sum(1) / 64).to(device)}


def render(example: tuple[Tensor, Tensor]) -> trak_dist.Rendered:
    return trak_dist.Rendered(str(example[0].tolist()), str(int(example[1])))


def problem() -> trak_dist.Problem:
    return trak_dist.Problem(
        model=net(),
        model_output=trak_dist.ImageClassification(),
        train=Rows(ROWS, seed=1),
        targets={"val": Rows(6, seed=2), "test": Rows(4, seed=3)},
        checkpoints=(),
        train_checkpoint=train_checkpoint,
        render=render,
        mislabelled=np.arange(ROWS) % 5 == 0,
    )
