"""Rows as stored: float32 as they are, or float16 or int8 with one float32 scale per row."""

from __future__ import annotations

import torch
from jaxtyping import Float32, Num
from torch import Tensor

# Row maxima land here: far from float16's overflow, and with 29 binary orders of magnitude
# below the maximum before an entry is subnormal.
FLOAT16_PEAK = 2.0**15
INT8_PEAK = 127.0  # symmetric; -128 is what other readers find where a chunk is missing


def encode(
    rows: Float32[Tensor, "rows k"], dtype: str
) -> tuple[Num[Tensor, "rows k"], Float32[Tensor, " rows"]]:
    """The stored rows, rounded to nearest, and the scale that `decode` multiplies them by."""
    if dtype == "float32":
        return rows, rows.new_ones(len(rows))
    peak = rows.abs().amax(1)
    largest = INT8_PEAK if dtype == "int8" else FLOAT16_PEAK
    scale = torch.where(peak > 0, peak / largest, torch.ones_like(peak))
    scale = scale.clamp_min(torch.finfo(torch.float32).tiny)
    scaled = rows / scale[:, None]
    return (scaled.round_().to(torch.int8) if dtype == "int8" else scaled.half()), scale


def decode(
    rows: Num[Tensor, "rows k"], scale: Float32[Tensor, " rows"]
) -> Float32[Tensor, "rows k"]:
    """Float32 rows from stored ones."""
    return rows.float() * scale[:, None]
