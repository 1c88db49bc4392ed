"""Rules of functions that give a tensor another shape, or lay several side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.utils import _pytree as pytree

from trak_dist.ops.example_axis import (
    NO_EXAMPLE,
    AxisInfo,
    ExampleAxis,
    axis_from_owners,
    axis_of,
    entry_owners,
)
from trak_dist.ops.tracking.call import Call


def by_view(call: Call) -> AxisInfo | list[AxisInfo]:
    """What does nothing but choose and order entries by numbers: done to the owners as well."""
    args, kwargs = pytree.tree_map_only(
        Tensor, lambda t: entry_owners(t) if t is call.first else t, (call.args, call.kwargs)
    )
    out = call.func(*args, **kwargs)
    pieces = [out] if isinstance(out, Tensor) else list(out)
    return [axis_from_owners(piece, call.untracked().by) for piece in pieces]


def reshaped(call: Call) -> AxisInfo:
    """Dimensions merged and split, entries in their order."""
    found, old, new = axis_of(call.first), call.first.shape, call.outs[0].shape
    if not isinstance(found, ExampleAxis) or old.numel() != new.numel():
        return call.untracked()  # another dtype
    if not old.numel():
        return axis_from_owners(torch.empty(new, dtype=torch.int64), call.untracked().by)
    ids = found.ids if old else found.ids.reshape(1)
    inner = math.prod(old[found.dim + 1 :])
    sizes = [math.prod(new[d + 1 :]) for d in range(len(new))]  # of one step along each dimension
    # The new dimensions that a step between examples goes along.
    dims = [d for d, size in enumerate(sizes) if size < inner * len(ids) and size * new[d] > inner]
    if not dims:  # all of one, or a tensor without dimensions
        return ExampleAxis(0, ids[:1].expand(new[0] if new else 1))
    smallest, largest = sizes[dims[-1]], sizes[dims[0]] * new[dims[0]]
    if inner % smallest or largest % (inner * len(ids)):
        return call.untracked()
    ids = ids.repeat_interleave(inner // smallest).repeat(largest // (inner * len(ids)))
    within = axis_from_owners(
        ids.view([new[d] for d in range(dims[0], dims[-1] + 1)]), call.untracked().by
    )
    return (
        ExampleAxis(dims[0] + within.dim, within.ids) if isinstance(within, ExampleAxis) else within
    )


def concatenated(call: Call) -> AxisInfo:
    """Tensors side by side along a dimension that is there."""
    # torch takes a tensor of shape (0,) for none at all.
    tensors = [t for t in call.get(0, "tensors") if t.shape != (0,)]
    dim = call.get(1, "dim", "axis", default=0) % call.outs[0].ndim
    held = [found for t in tensors if isinstance(found := axis_of(t), ExampleAxis)]
    if not held:
        return None
    if all(f.dim == held[0].dim != dim and f.has_same_examples(held[0]) for f in held):
        return held[0]
    if all(f.dim == dim for f in held):
        pieces = [
            found.ids
            if isinstance(found := axis_of(t), ExampleAxis)
            else _no_examples(t.shape[dim])
            for t in tensors
        ]
        return ExampleAxis(dim, torch.cat(pieces))
    return axis_from_owners(torch.cat([entry_owners(t) for t in tensors], dim), call.untracked().by)


def stacked(call: Call) -> AxisInfo:
    """Tensors side by side along a new dimension."""
    tensors: Sequence[Tensor] = call.get(0, "tensors")
    dim = call.get(1, "dim", default=0) % call.outs[0].ndim
    held = [found for t in tensors if isinstance(found := axis_of(t), ExampleAxis)]
    if tensors[0].ndim and all(f.dim == held[0].dim and f.has_same_examples(held[0]) for f in held):
        return ExampleAxis(held[0].dim + (dim <= held[0].dim), held[0].ids)
    return axis_from_owners(
        torch.stack([entry_owners(t) for t in tensors], dim), call.untracked().by
    )


def padded_together(call: Call) -> AxisInfo:
    """Sequences, each of one example, padded to one length."""
    found = [axis_of(t) for t in call.get(0, "sequences")]
    ids = [f.single_example if isinstance(f, ExampleAxis) else NO_EXAMPLE for f in found]
    if None in ids:
        return call.untracked()
    return ExampleAxis(0 if call.get(1, "batch_first", default=False) else 1, torch.tensor(ids))


def padded(call: Call) -> AxisInfo:
    """Margins filled with a number, or with adjacent entries."""
    found = axis_of(call.first)
    if not isinstance(found, ExampleAxis):
        return call.untracked()
    from_end = 2 * (call.first.ndim - 1 - found.dim)
    margins = [*call.get(1, "pad")][from_end : from_end + 2]
    if not any(margins):
        return found
    if call.get(2, "mode", default="constant") != "constant":
        return call.untracked()
    return ExampleAxis(found.dim, F.pad(found.ids, margins, value=NO_EXAMPLE))


def repeated(call: Call) -> AxisInfo:
    """Copies of the whole, side by side."""
    found, out = axis_of(call.first), call.outs[0]
    if not isinstance(found, ExampleAxis) or not out.ndim:
        return call.untracked()
    dim = found.dim + out.ndim - call.first.ndim if call.first.ndim else out.ndim - 1
    return ExampleAxis(dim, found.ids.repeat(out.shape[dim] // max(1, len(found.ids))))


def repeated_each(call: Call) -> AxisInfo:
    """Copies of each index of a dimension."""
    found, dim = axis_of(call.first), call.get(2, "dim")
    repeats = call.get(1, "repeats")
    if (
        not isinstance(found, ExampleAxis)
        or (dim is None and call.first.ndim != 1)
        or repeats is None
    ):
        return call.untracked()
    own = axis_of(repeats)
    if found.dim != (dim or 0) % call.first.ndim:
        return call.untracked() if own else found
    if isinstance(own, ExampleAxis) and not own.has_same_examples(found):
        return call.untracked()
    times = repeats.cpu() if isinstance(repeats, Tensor) else repeats
    return ExampleAxis(found.dim, found.ids.repeat_interleave(times))


def rolled(call: Call) -> AxisInfo:
    """Rolled round; along other dimensions examples stay where they are."""
    found, dims = axis_of(call.first), call.get(2, "dims", default=())
    dims = [dims] if isinstance(dims, int) else list(dims)
    if not isinstance(found, ExampleAxis) or not dims:
        return call.untracked()
    if found.dim in [d % call.first.ndim for d in dims]:
        return axis_from_owners(
            call.func(entry_owners(call.first), *call.args[1:], **call.kwargs), call.untracked().by
        )
    return found


def _no_examples(size: int) -> Int64[Tensor, " size"]:
    return torch.full((size,), NO_EXAMPLE)
