"""Rules of functions that work entry by entry, or along dimensions that they name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trak_dist.ops.examples import Along, Found, Lost, merged, of
from trak_dist.ops.following.call import Call, Rule


def entrywise(call: Call) -> Found:
    """Operands are broadcast, and each entry comes of those at its place."""
    return broadcast([(t, of(t)) for t in call.tensors], call.outs[0].shape, call)


def broadcast(operands: Sequence[tuple[Tensor, Found]], shape: Sequence[int], call: Call) -> Found:
    """Where examples lie in what is made entry by entry of operands."""
    held = [(t, f) for t, f in operands if isinstance(f, Along)]
    if not held:
        return None
    (tensor, one), *others = held
    from_end = one.dim - tensor.ndim
    if tensor.ndim and all(f.dim - t.ndim == from_end and f.as_good_as(one) for t, f in others):
        dim = len(shape) + from_end
        return Along(dim, one.ids if len(one.ids) == shape[dim] else one.ids.expand(shape[dim]))
    return merged([f.spread(t.shape) for t, f in held], shape, call.lost().by)


def shape_of(operands: Sequence[Tensor]) -> torch.Size:
    """The shape that tensors are broadcast to."""
    shape: torch.Size = torch.broadcast_shapes(*(t.shape for t in operands))  # type: ignore[no-untyped-call]
    return shape


def as_first(call: Call) -> Found:
    """The tensor that it works on, in another form; of others it takes no values."""
    return of(call.first)


def nothing(call: Call) -> Found:  # noqa: ARG001
    """Values that come of no example: shapes, types and devices do not count."""
    return None


def along(position: int, *, default: int | tuple[int, ...] | None = None) -> Rule:
    """Works along the dimensions that its argument at `position` names; along all for None."""

    def rule(call: Call) -> Found:
        found, tensor = of(call.first), call.first
        dims = call.get(position, "dim", "axis", default=default)
        if isinstance(dims, Tensor) and not isinstance(dims, int):  # torch.max(x, y)
            return entrywise(call)
        if not isinstance(found, Along) or dims is None or isinstance(dims, bool):
            return call.lost()
        worked = {d % tensor.ndim for d in ([dims] if isinstance(dims, int) else dims)}
        if found.dim in worked or not worked:
            return call.lost()
        gone = tensor.ndim - call.outs[0].ndim
        if gone not in (0, len(worked)):
            return call.lost()
        before = sum(d < found.dim for d in worked) if gone else 0
        return Along(found.dim - before, found.ids)

    return rule


def last(dims: int) -> Rule:
    """Works on the last dimensions, each index before them apart; others hold nothing."""

    def rule(call: Call) -> Found:
        found, tensor = of(call.first), call.first
        same = len(call.held) == 1 and call.outs[0].ndim == tensor.ndim
        if not isinstance(found, Along) or not same or found.dim >= tensor.ndim - dims:
            return call.lost()
        return found

    return rule


def sorted_along(position: int) -> Rule:
    """Values in another order along a dimension, and the indices that tell it."""

    def rule(call: Call) -> Found | list[Found]:
        found, tensor = of(call.first), call.first
        dim = call.get(position, "dim", default=-1)
        if not isinstance(found, Along) or not isinstance(dim, int) or isinstance(dim, bool):
            return call.lost()
        if found.dim != dim % max(1, tensor.ndim):
            return found
        outs = call.outs  # of values and indices, or of indices alone
        if len(outs) == 1 or tensor.ndim != 1:
            return call.lost()
        return [Along(0, found.ids[outs[1].cpu()]), call.lost()]

    return rule


def of_each_entry(call: Call) -> Found:
    """A loss of each entry; their sum or mean is of several examples."""
    return entrywise(call) if call.kwargs.get("reduction") == "none" else call.lost()


def of_each_class(call: Call) -> Found:
    """A loss of each example's class, where examples come first."""
    held = call.held
    alike = all(not f.dim and f.as_good_as(held[0][1]) for _, f in held)
    batched = call.first.ndim > 1 and of(call.get(2, "weight")) is None
    none = call.kwargs.get("reduction") == "none"
    return held[0][1] if alike and batched and none else call.lost()


def filled(position: int) -> Rule:
    """Filled with the number at `position`, if that is of no example."""
    return lambda call: call.lost() if of(call.get(position, "fill_value")) else None


def quantile(call: Call) -> Found | list[Found]:
    """Of one number; several have a dimension of their own."""
    several = isinstance(q := call.get(1, "q"), Tensor) and (q.ndim or of(q))
    return call.lost() if several else along(2)(call)


def diff(call: Call) -> Found | list[Found]:
    """Differences along a dimension, with nothing before or after."""
    more = call.get(3, "prepend"), call.get(4, "append")
    return call.lost() if more != (None, None) else along(2, default=-1)(call)


def one_hot(call: Call) -> Found:
    """A dimension for a given number of classes; else it is the largest of all examples'."""
    classes = call.get(1, "num_classes", default=-1)
    return added_last(call) if classes != -1 else call.lost()


def added_last(call: Call) -> Found:
    """A dimension more at the end, or one less, that is not the examples'."""
    found = of(call.first)
    plain = len(call.held) == 1 and len(call.args) + len(call.kwargs) <= 2
    if isinstance(found, Along) and plain and found.dim < call.outs[0].ndim:
        return found
    return call.lost()


def reduced_pair(call: Call) -> Found:
    """Two tensors entry by entry, then along a dimension: cosine similarity."""
    dim: Any = call.get(2, "dim", default=1)
    shape = shape_of(call.tensors[:2])
    found = broadcast([(t, of(t)) for t in call.tensors], shape, call)
    if not isinstance(found, Along) or found.dim == dim % len(shape):
        return found if isinstance(found, Lost) else call.lost()
    return Along(found.dim - (found.dim > dim % len(shape)), found.ids)
