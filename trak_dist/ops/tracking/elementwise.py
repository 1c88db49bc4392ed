"""Rules of functions that work entry by entry, or along dimensions that they name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trak_dist.ops.example_axis import AxisInfo, ExampleAxis, Untracked, axis_of, merge_owners
from trak_dist.ops.tracking.call import Call, Rule


def entrywise(call: Call) -> AxisInfo:
    """Operands are broadcast, and each entry comes of those at its place."""
    return broadcast([(t, axis_of(t)) for t in call.tensors], call.outs[0].shape, call)


def broadcast(
    operands: Sequence[tuple[Tensor, AxisInfo]], shape: Sequence[int], call: Call
) -> AxisInfo:
    """The axis of the examples in the elementwise result of operands."""
    held = [(t, f) for t, f in operands if isinstance(f, ExampleAxis)]
    if not held:
        return None
    (tensor, one), *others = held
    from_end = one.dim - tensor.ndim
    if tensor.ndim and all(
        f.dim - t.ndim == from_end and f.has_same_examples(one) for t, f in others
    ):
        dim = len(shape) + from_end
        return ExampleAxis(
            dim, one.ids if len(one.ids) == shape[dim] else one.ids.expand(shape[dim])
        )
    return merge_owners([f.expand_to(t.shape) for t, f in held], shape, call.untracked().by)


def shape_of(operands: Sequence[Tensor]) -> torch.Size:
    """The shape that tensors are broadcast to."""
    shape: torch.Size = torch.broadcast_shapes(*(t.shape for t in operands))  # type: ignore[no-untyped-call]
    return shape


def like_first_operand(call: Call) -> AxisInfo:
    """The tensor that it works on, in another form; of others it takes no values."""
    return axis_of(call.first)


def no_example(call: Call) -> AxisInfo:  # noqa: ARG001
    """Values that come of no example: shapes, types and devices do not count."""
    return None


def along(position: int, *, default: int | tuple[int, ...] | None = None) -> Rule:
    """Works along the dimensions that its argument at `position` names; along all for None."""

    def rule(call: Call) -> AxisInfo:
        found, tensor = axis_of(call.first), call.first
        dims = call.get(position, "dim", "axis", default=default)
        if isinstance(dims, Tensor) and not isinstance(dims, int):  # torch.max(x, y)
            return entrywise(call)
        if not isinstance(found, ExampleAxis) or dims is None or isinstance(dims, bool):
            return call.untracked()
        worked = {d % tensor.ndim for d in ([dims] if isinstance(dims, int) else dims)}
        if found.dim in worked or not worked:
            return call.untracked()
        gone = tensor.ndim - call.outs[0].ndim
        if gone not in (0, len(worked)):
            return call.untracked()
        before = sum(d < found.dim for d in worked) if gone else 0
        return ExampleAxis(found.dim - before, found.ids)

    return rule


def last(dims: int) -> Rule:
    """Works on the last dimensions, each index before them apart; other operands hold none."""

    def rule(call: Call) -> AxisInfo:
        found, tensor = axis_of(call.first), call.first
        same = len(call.tracked_operands) == 1 and call.outs[0].ndim == tensor.ndim
        if not isinstance(found, ExampleAxis) or not same or found.dim >= tensor.ndim - dims:
            return call.untracked()
        return found

    return rule


def sorted_along(position: int) -> Rule:
    """Values in another order along a dimension, and the indices of that order."""

    def rule(call: Call) -> AxisInfo | list[AxisInfo]:
        found, tensor = axis_of(call.first), call.first
        dim = call.get(position, "dim", default=-1)
        if not isinstance(found, ExampleAxis) or not isinstance(dim, int) or isinstance(dim, bool):
            return call.untracked()
        if found.dim != dim % max(1, tensor.ndim):
            return found
        outs = call.outs  # of values and indices, or of indices alone
        if len(outs) == 1 or tensor.ndim != 1:
            return call.untracked()
        return [ExampleAxis(0, found.ids[outs[1].cpu()]), call.untracked()]

    return rule


def of_each_entry(call: Call) -> AxisInfo:
    """A loss of each entry; their sum or mean is of several examples."""
    return entrywise(call) if call.kwargs.get("reduction") == "none" else call.untracked()


def of_each_class(call: Call) -> AxisInfo:
    """A loss of each example's class, where examples come first."""
    held = call.tracked_operands
    alike = all(not f.dim and f.has_same_examples(held[0][1]) for _, f in held)
    batched = call.first.ndim > 1 and axis_of(call.get(2, "weight")) is None
    none = call.kwargs.get("reduction") == "none"
    return held[0][1] if alike and batched and none else call.untracked()


def filled(position: int) -> Rule:
    """Filled with the number at `position`, if that is of no example."""
    return lambda call: call.untracked() if axis_of(call.get(position, "fill_value")) else None


def quantile(call: Call) -> AxisInfo | list[AxisInfo]:
    """Of one number; several have a dimension of their own."""
    several = isinstance(q := call.get(1, "q"), Tensor) and (q.ndim or axis_of(q))
    return call.untracked() if several else along(2)(call)


def diff(call: Call) -> AxisInfo | list[AxisInfo]:
    """Differences along a dimension, with nothing before or after."""
    more = call.get(3, "prepend"), call.get(4, "append")
    return call.untracked() if more != (None, None) else along(2, default=-1)(call)


def one_hot(call: Call) -> AxisInfo:
    """A dimension for a given number of classes; else it is the largest of all examples'."""
    classes = call.get(1, "num_classes", default=-1)
    return added_last(call) if classes != -1 else call.untracked()


def added_last(call: Call) -> AxisInfo:
    """A dimension more at the end, or one less, that is not the examples'."""
    found = axis_of(call.first)
    plain = len(call.tracked_operands) == 1 and len(call.args) + len(call.kwargs) <= 2
    if isinstance(found, ExampleAxis) and plain and found.dim < call.outs[0].ndim:
        return found
    return call.untracked()


def reduced_pair(call: Call) -> AxisInfo:
    """Two tensors entry by entry, then along a dimension: cosine similarity."""
    dim: Any = call.get(2, "dim", default=1)
    shape = shape_of(call.tensors[:2])
    found = broadcast([(t, axis_of(t)) for t in call.tensors], shape, call)
    if not isinstance(found, ExampleAxis) or found.dim == dim % len(shape):
        return found if isinstance(found, Untracked) else call.untracked()
    return ExampleAxis(found.dim - (found.dim > dim % len(shape)), found.ids)
