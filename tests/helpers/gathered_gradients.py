"""What a gradient computer hands over, put together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trak_dist.ops.gradients import GradientComputer, examples_in, select_params


def gathered(
    compute: GradientComputer,
    model: nn.Module,
    batch: Sequence[Any],
    params: Sequence[str] = ("*",),
) -> dict[str, Tensor]:
    """(batch, …) gradients by name, on the CPU; zero where nothing was handed over."""
    size, weights = examples_in(batch), dict(model.named_parameters())
    names = select_params(model, params)
    found = {n: torch.zeros(size, *weights[n].shape, dtype=weights[n].dtype) for n in names}

    def take(name: str, rows: slice, grads: Tensor) -> None:
        assert grads.shape == found[name][rows].shape
        assert grads.dtype == weights[name].dtype
        found[name][rows] += grads.cpu()

    compute(batch, take)
    return found
