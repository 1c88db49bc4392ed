"""What a rule says of a function of torch that parameters go into, for `ops.hooks`.

A rule has its function's signature and gives, for each operand that may be a parameter, a
`ParameterUse`; it leaves out those that it can't do.

Tensors come to a formula as (rows, n, …), where (batch · n, …) is what the function saw: n is 1,
but where a model has folded another dimension, frames of a video for instance, into the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

Formula = Callable[..., Float[Tensor, "rows ..."]]


@dataclass(frozen=True)
class ParameterUse:
    """One operand of a call.

    `formula(grad, *saved)` gives its per-sample gradients (rows, *shape) from the rows of the
    output's gradient and of the tensors in `saved`; `bundled(bundles, grad, *saved)`, if there is a
    shorter way to them, gives them with bundles in place of channels.
    """

    operand: Tensor
    saved: tuple[Tensor, ...]
    formula: Formula
    bundled: Formula | None = None


Rule = Callable[..., Iterable[ParameterUse]]


def rows_of(
    operand: Tensor, values: Float[Tensor, "rows n ..."], at: Int64[Tensor, "rows n"]
) -> Float[Tensor, "rows size ..."]:
    """Per-sample gradients of an operand with rows of single examples: zero but `at` these."""
    grads = values.new_zeros(len(values), *operand.shape)
    example = torch.arange(len(values), device=at.device)[:, None].expand_as(at)
    # added, since what pads an example may be at one of its own
    return grads.index_put_((example, at), values, accumulate=True)
