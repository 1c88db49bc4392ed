"""The tiny problem with dropout: checkpoints in a directory, or trained by a few steps of SGD."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tiny
import torch
from torch import Tensor, nn

import trak_dist

HIDDEN, STEPS, RATE = 8, 12, 0.8
DROPOUT = "2"  # the name of the module


def net(rate: float = 0.5) -> nn.Module:
    return nn.Sequential(
        nn.Linear(tiny.FEATURES, HIDDEN),
        nn.Tanh(),
        nn.Dropout(rate),
        nn.Linear(HIDDEN, tiny.CLASSES),
    )


def train_checkpoint(dataset: Any, seed: int, device: torch.device) -> Mapping[str, Tensor]:
    """Full-batch SGD, weights and dropout by `seed`."""
    examples = [dataset[row] for row in range(len(dataset))]
    features, labels = (torch.stack(column).to(device) for column in zip(*examples, strict=True))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = net().to(device).train()
        optimiser = torch.optim.SGD(model.parameters(), lr=RATE)
        for _ in range(STEPS):
            loss = nn.functional.cross_entropy(model(features), labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return model.state_dict()


def problem(directory: str = "", rows: int = 24, rate: float = 0.5) -> trak_dist.Problem:
    """Target sets `val` and `test`; the checkpoints are those of `directory`, or trained."""
    return trak_dist.Problem(
        model=net(rate),
        model_output=trak_dist.ImageClassification(),
        train=tiny.Rows(rows, seed=1),
        targets={"val": tiny.Rows(6, seed=2), "test": tiny.Rows(4, seed=3)},
        checkpoints=sorted(Path(directory).glob("*.pt")) if directory else (),
        train_checkpoint=train_checkpoint,
    )
