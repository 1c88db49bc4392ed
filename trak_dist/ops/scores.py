"""Scores of a block of train rows, over an ensemble of checkpoints."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64
from torch import Tensor


class Ensemble:
    """Mean over m of [X_m B_m] ⊙ mean over m of [Q_m], of the checkpoints added so far.

    Park et al. 2023, section 3 and Algorithm 1, with B_m = (X_mᵀX_m + λI)⁻¹ G_mᵀ. Products are
    formed in the type of B_m, their mean over checkpoints in float64.
    """

    def __init__(self) -> None:
        self._count, self._products, self._q = 0, torch.zeros(()), torch.zeros(())

    def add(
        self, products: Float[Tensor, "rows targets"], out_to_loss: Float[Tensor, " rows"]
    ) -> None:
        """Add one checkpoint's X_m B_m (rows, targets) and Q_m (rows,)."""
        self._products = self._products + products.double()
        self._q = self._q + out_to_loss.double()
        self._count += 1

    def scores(self) -> Float64[Tensor, "rows targets"]:
        """The scores; they take over the memory of the products."""
        assert self._count > 0
        return self._products.div_(self._count).mul_((self._q / self._count)[:, None])
