"""Counter-based random draws: a pure function of (key, counter), the same on every device.

SplitMix64 (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators") in wrapping
int64 arithmetic. Nothing here keeps state, so neither the size of a block nor the order of calls,
nor the number of threads, can change a draw.
"""

from __future__ import annotations

import functools
import hashlib
import statistics
from collections.abc import Callable
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from trak_dist.configuration.config import DRAW_VERSION

# `uniform(count)` gives (batch, count) numbers in [0, 1), each example's own whatever its batch.
Uniform: TypeAlias = Callable[[int], Float64[Tensor, "batch count"]]
SIGNS_PER_DRAW = 64
NORMALS_PER_DRAW = 4
PIECE = 2**20  # logits whose probabilities are held at once


def stream_key(*parts: object) -> int:
    """Key of the stream that `parts` name, a signed 64-bit integer."""
    raw = hashlib.blake2b(repr((DRAW_VERSION, *parts)).encode(), digest_size=8).digest()
    return int.from_bytes(raw, "little", signed=True)


def draw(key: int | Int64[Tensor, "..."], counters: Int64[Tensor, "..."]) -> Int64[Tensor, "..."]:
    """64 random bits for each counter."""
    z = (counters + 1) * _signed(0x9E3779B97F4A7C15) + key
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift(z, 31)


def signs(key: int, rows: Int64[Tensor, " rows"], columns: int) -> Float[Tensor, "rows columns"]:
    """±1 with equal probability; a counter's row does not depend on which others are asked for."""
    bits = _lanes(key, rows, columns, per_draw=SIGNS_PER_DRAW)
    return bits.to(torch.float32).mul_(2).sub_(1)


def normals(key: int, rows: Int64[Tensor, " rows"], columns: int) -> Float[Tensor, "rows columns"]:
    """Standard normal draws, from a table of 2¹⁶ quantiles with mean 0 and variance 1.

    A table, since logarithms and cosines round differently from device to device.
    """
    lanes = _lanes(key, rows, columns, per_draw=NORMALS_PER_DRAW)
    return _normal_table(rows.device)[lanes]


def bucket_and_sign(
    key: int, counters: Int64[Tensor, " m"], buckets: int
) -> tuple[Int64[Tensor, " m"], Float[Tensor, " m"]]:
    """A bucket in [0, `buckets`) and a sign for each counter, from different bits of one draw."""
    bits = draw(key, counters)
    return _shift(bits, 1) % buckets, (bits & 1).to(torch.float32).mul_(2).sub_(1)


def categorical(
    logits: Float[Tensor, "... classes"], uniform: Float[Tensor, "..."]
) -> Int64[Tensor, "..."]:
    """A class for each number in [0, 1), by the inverse of the softmax's distribution function.

    It is the first class whose cumulative probability, in float64, is above the number.
    """
    classes = logits.shape[-1]
    rows = max(1, PIECE // classes)
    pieces = zip(
        torch.split(logits.reshape(-1, classes), rows),
        torch.split(uniform.reshape(-1, 1), rows),
        strict=True,
    )
    found = [
        torch.searchsorted(some.double().softmax(-1).cumsum(-1), u.double(), right=True)
        for some, u in pieces
    ]
    return torch.cat(found).clamp(max=classes - 1).view(uniform.shape)


def uniform(
    keys: Int64[Tensor, "*#shape"], counters: Int64[Tensor, "*#shape"]
) -> Float64[Tensor, "..."]:
    """Numbers in [0, 1) with 53 random bits, for each key and counter, broadcast."""
    return _shift(draw(keys, counters), 11).to(torch.float64) * 2.0**-53


def kept(key: int, units: Int64[Tensor, " units"], rate: float) -> Bool[Tensor, " units"]:
    """Whether each unit is kept, dropped being a share `rate`: 53 bits of a draw, so exactly."""
    return _shift(draw(key, units), 11) >= round(rate * 2**53)


def subset(index: int, rows: int, share: float) -> Int64[Tensor, " chosen"]:
    """Subset number `index`: a share of `rows` rows, without replacement, in ascending order."""
    return _first_shuffled(stream_key("subset", index), rows, round(share * rows))


def some_rows(seed: int, rows: int, count: int) -> Int64[Tensor, " count"]:
    """`count` of `rows` rows, without replacement, in ascending order."""
    return _first_shuffled(stream_key("some", seed), rows, count)


def _first_shuffled(key: int, rows: int, count: int) -> Int64[Tensor, " count"]:
    bits = draw(key, torch.arange(rows))
    return bits.argsort(stable=True)[:count].sort().values


def _lanes(
    key: int, rows: Int64[Tensor, " rows"], columns: int, *, per_draw: int
) -> Int64[Tensor, "rows columns"]:
    width = 64 // per_draw
    draws_per_row = -(-columns // per_draw)
    words = torch.arange(draws_per_row, device=rows.device)
    bits = draw(key, rows[:, None] * draws_per_row + words)
    shifts = torch.arange(0, 64, width, device=rows.device)
    lanes = (bits[:, :, None] >> shifts) & ((1 << width) - 1)
    return lanes.reshape(len(rows), -1)[:, :columns]


def _shift(z: Int64[Tensor, "..."], by: int) -> Int64[Tensor, "..."]:
    """Logical shift to the right; torch's is arithmetic."""
    return (z >> by) & ((1 << (64 - by)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


@functools.cache
def _normal_table(device: torch.device) -> Float[Tensor, " 65536"]:
    if device.type != "cpu":  # once: each copy to a GPU waits for it
        return _normal_table(torch.device("cpu")).to(device)
    half = [statistics.NormalDist().inv_cdf((i + 0.5) / 65536) for i in range(32768, 65536)]
    table = torch.tensor([-x for x in reversed(half)] + half, dtype=torch.float64)
    return (table / table.square().mean().sqrt()).to(torch.float32)
