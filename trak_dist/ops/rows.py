"""Rows as stored: float32 as they are, or float16 with one float32 scale per row."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32
from torch import Tensor

# Row maxima land here: far from float16's overflow, and with 29 binary orders of magnitude
# below the maximum before an entry is subnormal.
FLOAT16_PEAK = 2.0**15


def encode(
    rows: Float32[Tensor, "rows k"], dtype: str
) -> tuple[Float[Tensor, "rows k"], Float32[Tensor, " rows"]]:
    """The stored rows and the scale that `decode` multiplies them by."""
    if dtype == "float32":
        return rows, rows.new_ones(len(rows))
    peak = rows.abs().amax(1)
    scale = torch.where(peak > 0, peak / FLOAT16_PEAK, torch.ones_like(peak))
    scale = scale.clamp_min(torch.finfo(torch.float32).tiny)
    return (rows / scale[:, None]).to(torch.float16), scale


def decode(
    rows: Float[Tensor, "rows k"], scale: Float32[Tensor, " rows"]
) -> Float32[Tensor, "rows k"]:
    """Float32 rows from stored ones."""
    return rows.float() * scale[:, None]
