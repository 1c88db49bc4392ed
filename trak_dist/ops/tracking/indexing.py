"""Rules of look-ups by tensors of indices or masks.

Where an index chooses among examples, the result is of the example that was there: sorted batches,
packed tokens and tokens sent to experts are tracked by the very indices that move them. An index
that depends on other examples may only rearrange: an example alone would have kept what it leaves
out or doubles, as tokens over an expert's capacity. Where an index chooses within an example, it
must come of that example itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trak_dist.ops.example_axis import (
    NO_EXAMPLE,
    AxisInfo,
    ExampleAxis,
    Untracked,
    axis_from_owners,
    axis_of,
    entry_owners,
    merge_owners,
)
from trak_dist.ops.tracking.call import Call
from trak_dist.ops.tracking.elementwise import entrywise, shape_of
from trak_dist.ops.tracking.places import by_dimension, chosen_by, disagree, on_cpu, places_of


def indexed(call: Call) -> AxisInfo:
    """`x[index]`."""
    tensor, by = call.first, call.untracked().by
    places = places_of(call.args[1], tensor)
    own = entry_owners(tensor)[tuple(on_cpu(p) for p in places)]
    chosen = [(d, p) for d, p in enumerate(by_dimension(places)) if isinstance(p, Tensor)]
    found = axis_of(tensor)
    if not any(axis_of(p) for _, p in chosen):
        return axis_from_owners(own, by)
    if not isinstance(found, ExampleAxis):  # a table that holds nothing of examples
        return chosen_by([p for _, p in chosen], own, places, by)
    at = dict(chosen).get(found.dim)
    others = [p for d, p in chosen if d != found.dim and axis_of(p)]
    if at is not None and not others and not _rearranges(at, found):
        return Untracked(by)
    if others:
        if at is None or any(isinstance(axis_of(p), Untracked) for p in others):
            return Untracked(by)
        ids = found.ids[at.cpu()].expand(shape_of([p for _, p in chosen]))
        if any(disagree(entry_owners(p).expand(ids.shape), ids) for p in (at, *others)):
            return Untracked(by)
    return axis_from_owners(own, by)


def _rearranges(index: Tensor, found: ExampleAxis) -> bool:
    """Whether examples stay whole where indices choose among them, whoever the indices are of."""
    own, at = axis_of(index), index.cpu()
    if own is None or (
        isinstance(own, ExampleAxis) and not disagree(entry_owners(index), found.ids[at])
    ):
        return True
    times = (at % len(found.ids)).flatten().bincount(minlength=len(found.ids))
    times = times[found.ids != NO_EXAMPLE]
    return bool((times == times[:1]).all())


def selected(call: Call) -> AxisInfo:
    """`index_select`: whole indices of one dimension."""
    dim, index = call.get(1, "dim"), call.get(2, "index")
    found, own = axis_of(call.first), axis_of(index)
    if not isinstance(found, ExampleAxis):
        return own if call.first.ndim == 1 else call.untracked()
    if found.dim != dim % max(1, call.first.ndim):
        return call.untracked() if own else found
    index = index.reshape(-1) if own is None else index
    if index.ndim != 1 or not _rearranges(index, found):
        return call.untracked()
    return ExampleAxis(found.dim, found.ids[index.cpu()])


def gathered(call: Call) -> AxisInfo:
    """`gather`: an index for each entry."""
    dim, index = call.get(1, "dim"), call.get(2, "index")
    return _gathered(call, dim, index, torch.gather)


def taken_along(call: Call) -> AxisInfo:
    """`take_along_dim`, which broadcasts."""
    index, dim = call.get(1, "indices"), call.get(2, "dim")
    if dim is None:
        return call.untracked()
    return _gathered(call, dim, index, lambda x, dim, at: torch.take_along_dim(x, at, dim))


def _gathered(call: Call, dim: int, index: Tensor, gather: Any) -> AxisInfo:
    found, index_axis, by = axis_of(call.first), axis_of(index), call.untracked().by
    own = gather(entry_owners(call.first), dim, index.cpu())
    among = isinstance(found, ExampleAxis) and found.dim == dim % max(1, call.first.ndim)
    if index_axis is None:
        return axis_from_owners(own, by)
    if isinstance(index_axis, ExampleAxis) and not disagree(
        entry_owners(index).expand(own.shape), own
    ):
        if among:
            return axis_from_owners(own, by)
        return merge_owners([entry_owners(index), own], own.shape, by)
    order = torch.arange(call.first.shape[dim]).view(-1, *[1] * (own.ndim - 1 - dim % own.ndim))
    whole = among and index.shape == call.first.shape
    if whole and torch.equal(index.cpu().sort(dim).values, order.expand(index.shape)):
        return axis_from_owners(own, by)
    return Untracked(by)


def masked(call: Call) -> AxisInfo:
    """`masked_select`: the entries where a mask is true."""
    mask, by = call.get(1, "mask"), call.untracked().by
    shape = shape_of([call.first, mask])
    own = entry_owners(call.first).expand(shape)[mask.cpu().expand(shape)]
    mask_owners = entry_owners(mask).expand(shape)[mask.cpu().expand(shape)]
    if disagree(own, mask_owners) or (isinstance(axis_of(mask), Untracked) and not mask.all()):
        return Untracked(by)
    return axis_from_owners(own, by)


def positions(call: Call) -> AxisInfo:
    """`nonzero`: the indices of entries, each of its entry's example."""
    if isinstance(axis_of(call.first), Untracked):
        return call.untracked()
    own = entry_owners(call.first)
    return axis_from_owners(own[tuple(call.first.cpu().nonzero().T)], call.untracked().by)


def where(call: Call) -> AxisInfo:
    """One of two, entry by entry; of a condition alone the indices where it holds."""
    return positions(call) if len(call.args) + len(call.kwargs) == 1 else entrywise(call)
