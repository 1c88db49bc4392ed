"""What a rule says of a function of torch that parameters go into, for `ops.hooks`.

A rule has its function's signature and gives, for each operand that may be a parameter, a
`ParameterUse`; it leaves out those that it can't do.

Tensors come to a formula as (rows, n, …), where (batch · n, …) is what the function saw: n is 1,
but where a model has folded another dimension, frames of a video for instance, into the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from jaxtyping import Float
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
