"""Parameters that a function broadcasts to a batch get a dimension of examples: they are lifted.

A relative-position bias is added to the logits of attention, a learned query is multiplied by keys,
a scale is an exponent: whatever the function is, as it broadcasts, each example may have a copy.
Autograd's gradient by that copy is the example's own, so the function needs no rule for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from trak_dist.ops.example_axis import ExampleAxis, axis_of
from trak_dist.ops.parameter_use import ParameterUse, rows_of
from trak_dist.ops.tracking import elementwise, indexing, products
from trak_dist.ops.tracking.call import name_of, tensors_in
from trak_dist.ops.tracking.registry import RULES

# The dimensions at the end that a function does not broadcast, by its rule of tracking.
_OWN_DIMENSIONS: dict[Any, int] = {
    elementwise.entrywise: 0,
    indexing.where: 0,
    products.matmul: 2,
    products.added_product: 2,
    products.attention: 2,
}
_TAKE_NUMBERS = ("masked_fill", "fill")  # their operand has no dimensions


@dataclass(frozen=True)
class BroadcastDimension:
    """Where a function that broadcasts has the examples, and the example of each index there."""

    from_end: int
    ids: Int64[Tensor, " size"]

    @classmethod
    def of(cls, func: Any, args: Any, kwargs: Any) -> BroadcastDimension | None:
        """That of a call that broadcasts its operands; None of any other."""
        own, name = _OWN_DIMENSIONS.get(RULES.get(func)), name_of(func).rpartition(".")[2]
        tensors = tensors_in((args, kwargs))
        held = [(t, f) for t in tensors if isinstance(f := axis_of(t), ExampleAxis)]
        if own is None or not held or "out" in kwargs or name.rstrip("_") in _TAKE_NUMBERS:
            return None
        (first, axis), *others = held
        from_end = axis.dim - first.ndim
        if any(f.dim - t.ndim != from_end or not f.has_same_examples(axis) for t, f in others):
            return None
        if from_end >= -own or not first.ndim or (own and any(t.ndim < own for t in tensors)):
            return None
        size = max(t.shape[from_end] for t in tensors if t.ndim >= -from_end)
        return cls(from_end, axis.ids.expand(size)) if len(axis.ids) in (1, size) else None

    def lift(self, parameter: Tensor) -> tuple[Float[Tensor, "size ..."], ParameterUse] | None:
        """A parameter with examples first, and the use that it is.

        Where it has the dimension itself, index j of it is used by the example of j alone.
        """
        size, at = len(self.ids), parameter.ndim + self.from_end
        ones = [1] * max(0, -at - 1)
        first = (
            parameter.movedim(at, 0) if at >= 0 else parameter.reshape(1, *ones, *parameter.shape)
        )
        if len(first) == 1:

            def summed(g: Float[Tensor, "rows n ..."]) -> Float[Tensor, "rows ..."]:
                return g.sum(1).reshape(len(g), *parameter.shape)

            return first.expand(size, *first.shape[1:]), ParameterUse(parameter, (), summed)
        if len(first) != size:
            return None

        def by_index(g: Float[Tensor, "rows n ..."], at: Tensor) -> Float[Tensor, "rows ..."]:
            return rows_of(first, g, at).movedim(1, parameter.ndim + self.from_end + 1)

        positions = torch.arange(size, device=parameter.device)
        return first, ParameterUse(parameter, (positions,), by_index)
