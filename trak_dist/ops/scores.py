"""Scores of a block of train rows, over an ensemble of checkpoints."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float, Float64
from torch import Tensor


def ensemble_scores(
    members: Iterable[
        tuple[Float[Tensor, "rows k"], Float[Tensor, "k targets"], Float[Tensor, " rows"]]
    ],
) -> Float64[Tensor, "rows targets"]:
    """Mean over m of [X_m B_m] ⊙ mean over m of [Q_m].

    Park et al. 2023, section 3 and Algorithm 1, with B_m = (X_mᵀX_m + λI)⁻¹ G_mᵀ. One member is in
    memory at a time; products are formed in the type of B_m, their mean over members in float64.

    Parameters
    ----------
    members : iterable of (X_m, B_m, Q_m)
        Train grads (rows, k), preconditioned targets (k, targets) and out-to-loss (rows,).
    """
    count, products, out_to_loss = 0, torch.zeros(()), torch.zeros(())
    for grads, preconditioned, q in members:
        products = products + (grads.to(preconditioned.dtype) @ preconditioned).double()
        out_to_loss = out_to_loss + q.double()
        count += 1
    assert count > 0
    return products.div_(count).mul_((out_to_loss / count)[:, None])
