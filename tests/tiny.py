"""A problem small enough for a test: a two-layer net on random data, checkpoints in a directory."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import trak_dist

FEATURES, HIDDEN, CLASSES = 6, 5, 3


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CLASSES))


class Rows:
    """A map-style dataset of (features, label), drawn from a seed."""

    def __init__(self, rows: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.features = torch.randn(rows, FEATURES, generator=generator)
        self.labels = torch.randint(0, CLASSES, (rows,), generator=generator)

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.features[index], self.labels[index]


def state(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return net().state_dict()


def write_checkpoints(directory: Path, count: int = 3) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for seed in range(count):
        torch.save(state(seed), directory / f"{seed}.pt")


def problem(directory: str, rows: int = 50, targets: int = 7, extra: int = 5) -> trak_dist.Problem:
    """Two target sets, `val` and `test`; the checkpoints are the `.pt` files of `directory`."""
    return trak_dist.Problem(
        model=net(),
        model_output=trak_dist.ImageClassification(),
        train=Rows(rows, seed=1),
        targets={"val": Rows(targets, seed=2), "test": Rows(extra, seed=3)},
        checkpoints=sorted(Path(directory).glob("*.pt")),
    )
