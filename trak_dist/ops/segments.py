"""Sums of rows by a key, in an order that is fixed beforehand.

A GPU's scattered additions come in any order, and so do the roundings of their sums; torch's
deterministic mode sorts in each call. Here the order is found once, and then each sum is one walk
over its rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

# rows that are about as many as one thread adds up: a longer sum is that of several
MIN_ROWS_PER_PART = 64


def scatters_in_order(device: torch.device) -> bool:
    """Whether `scatter_add_` and `index_add_` add in one order on this device, as the CPU does."""
    return device.type == "cpu"


@dataclass(frozen=True)
class Segments:
    """Which rows are added up, sum by sum: `order` (n,), in which they begin at `starts`.

    There are `count` sums, each in as many parts as `starts` is longer.
    """

    order: Int32[Tensor, " n"]
    starts: Int32[Tensor, " parts"]
    count: int

    @classmethod
    def of(cls, keys: Int64[Tensor, " n"], count: int) -> Segments:
        """The sums of rows with equal keys, each of which is in [0, `count`)."""
        rows = len(keys)
        parts = max(1, rows // (MIN_ROWS_PER_PART * count))
        part = torch.arange(rows, device=keys.device) * parts // max(1, rows)
        sorted_keys, order = (keys + count * part).sort(stable=True)
        starts = torch.searchsorted(
            sorted_keys, torch.arange(parts * count, device=keys.device), out_int32=True
        )
        return cls(order.int(), starts, count)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return self.order.nbytes + self.starts.nbytes

    def sums(self, values: Float[Tensor, "n w"]) -> Float[Tensor, "count w"]:
        """The sums of rows of `values`; 0 where a key has none."""
        if not values.shape[1]:  # on some processors embedding_bag refuses rows of no columns
            return values.new_zeros(self.count, 0)
        # One thread walks over the rows of one sum: the forward kernel has no atomics.
        found = F.embedding_bag(self.order, values, self.starts, mode="sum")
        return found.view(len(self.starts) // self.count, self.count, values.shape[1]).sum(0)
