"""The tiny problem with a `train_checkpoint`: a few steps of SGD, so that retraining is quick."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tiny
import torch
from torch import Tensor, nn

import trak_dist

STEPS, RATE = 12, 0.8


def train_checkpoint(dataset: Any, seed: int, device: torch.device) -> Mapping[str, Tensor]:
    """Full-batch SGD from weights that follow from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = tiny.net().to(device)
    examples = [dataset[row] for row in range(len(dataset))]
    features, labels = (torch.stack(column).to(device) for column in zip(*examples, strict=True))
    optimiser = torch.optim.SGD(model.parameters(), lr=RATE)
    for _ in range(STEPS):
        loss = nn.functional.cross_entropy(model(features), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.state_dict()


def problem(rows: int = 24, targets: int = 6, extra: int = 4) -> trak_dist.Problem:
    """Two target sets, `val` and `test`; all checkpoints are trained."""
    return trak_dist.Problem(
        model=tiny.net(),
        model_output=trak_dist.ImageClassification(),
        train=tiny.Rows(rows, seed=1),
        targets={"val": tiny.Rows(targets, seed=2), "test": tiny.Rows(extra, seed=3)},
        checkpoints=(),
        train_checkpoint=train_checkpoint,
    )
