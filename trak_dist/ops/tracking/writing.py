"""Rules of writing to places that tensors of indices or masks say: `x[index] = y` and its like.

Examples go to where they are written. Where a number is written to a place that an example says,
all that it might have written to is of that example too.
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
from trak_dist.ops.tracking.places import (
    MASKS,
    Owners,
    chosen_by,
    dimension_of,
    disagree,
    on_cpu,
    places_of,
)


def assigned(call: Call) -> AxisInfo:
    """`x[index] = y`: examples go where it is written."""
    return _write(call, call.args[1], call.args[2], adds=False)


def put_at(call: Call) -> AxisInfo:
    """`index_put`."""
    adds = call.get(3, "accumulate", default=False)
    return _write(call, tuple(call.get(1, "indices")), call.get(2, "values"), adds=adds)


def _write(call: Call, where: Any, value: Any, *, adds: bool) -> AxisInfo:  # noqa: PLR0911
    target, by = call.args[0], call.untracked().by
    places = places_of(where, target)
    index = tuple(on_cpu(p) for p in places)
    own = entry_owners(target).clone(memory_format=torch.contiguous_format)
    old = own[index]
    new = entry_owners(value) if isinstance(value, Tensor) else torch.full((), NO_EXAMPLE)
    while new.ndim > old.ndim:  # of size 1, as torch has it
        new = new[0]
    new = new.expand(old.shape)
    if adds:
        if disagree(old, new):
            return Untracked(by)
        new = torch.maximum(old, new)
    own[index] = new
    if not torch.equal(own[index], new):  # two came to one place
        return Untracked(by)
    chosen = [p for p in places if isinstance(p, Tensor)]
    if not any(axis_of(p) for p in chosen):
        return axis_from_owners(own, by)
    where = where[0] if isinstance(where, tuple) and len(where) == 1 else where
    numbers = bool((new == NO_EXAMPLE).any())
    if (
        isinstance(where, Tensor)
        and where.dtype in MASKS
        and isinstance(axis_of(where), ExampleAxis)
    ):
        mask = entry_owners(where)
        mask = mask.reshape(*mask.shape, *[1] * (own.ndim - mask.ndim))
        return merge_owners([own, mask], own.shape, by)
    if numbers:
        return _numbered(own, chosen, places, by)
    found, index_axis = axis_from_owners(own, by), chosen_by(chosen, old, places, by)
    if isinstance(index_axis, ExampleAxis) and not disagree(index_axis.expand_to(old.shape), new):
        return found
    return (
        found
        if len(chosen) == 1 and _lies_along(found, dimension_of(chosen[0], places))
        else Untracked(by)
    )


def _lies_along(found: AxisInfo, dim: int) -> bool:
    """Whether indices of other examples into `dim` only determine the position of an example."""
    return isinstance(found, ExampleAxis) and found.dim == dim


def _numbered(own: Owners, chosen: list[Tensor], places: tuple[Any, ...], by: str) -> AxisInfo:
    """Where it is written is of an example too: all that it might have written is that one's.

    One index says which rows, those of examples where in them: `x[arange(n), labels] = 1`.
    """
    fixed = [d for d, p in enumerate(places) if isinstance(p, Tensor) and axis_of(p) is None]
    alike = len({p.shape for p in chosen}) == 1 and chosen[0].ndim == 1
    if len(fixed) != 1 or len(places) != len(chosen) or not alike:
        return Untracked(by)
    found = [axis_of(p) for p in chosen]
    if any(isinstance(f, Untracked) for f in found):
        return Untracked(by)
    rows = chosen[fixed[0]].cpu() % own.shape[fixed[0]]
    ids = [f.ids for f in found if isinstance(f, ExampleAxis)]
    index_owners, moved = ids[0], own.movedim(fixed[0], 0)
    example = index_owners.view(-1, *[1] * (own.ndim - 1)).expand(len(rows), *moved.shape[1:])
    if any(not torch.equal(other, index_owners) for other in ids) or bool(
        (rows.bincount() > 1).any()
    ):
        return Untracked(by)
    if disagree(moved[rows], example):
        return Untracked(by)
    moved[rows] = torch.maximum(moved[rows], example)
    return axis_from_owners(own, by)


def added_at(call: Call) -> AxisInfo:
    """`index_add`, `scatter` and their like: examples go, or are added, to where an index says."""
    target, by = call.first, call.untracked().by
    dim, index = call.get(1, "dim") % max(1, target.ndim), call.get(2, "index")
    value = call.get(3, "source", "src", "value")
    new = entry_owners(value) if isinstance(value, Tensor) else torch.full((), NO_EXAMPLE)
    at, index_owners = index.cpu(), entry_owners(index)
    if "index_" in by:
        shape = list(target.shape)
        shape[dim : dim + 1] = [at.numel()]
        own_dim = [1] * len(shape)
        own_dim[dim] = -1
        at, index_owners = (t.reshape(own_dim).expand(shape) for t in (at, index_owners))
    new = new[tuple(slice(n) for n in at.shape)] if new.ndim else new.expand(at.shape)
    numbers = new == NO_EXAMPLE
    if isinstance(axis_of(index), Untracked) and numbers.any():
        return Untracked(by)
    if disagree(new, index_owners):
        return Untracked(by)
    most = torch.full(target.shape, NO_EXAMPLE).scatter_reduce(dim, at, new, "amax")
    if ((most.gather(dim, at) != new) & ~numbers).any():  # two came to one place
        return Untracked(by)
    # Where a number is written is of an example too, so all places that might have been are.
    lines = torch.where(numbers, index_owners, NO_EXAMPLE)
    example = torch.full(target.shape, NO_EXAMPLE)
    if (lines != NO_EXAMPLE).any():
        line = lines.amax(dim, keepdim=True)
        if disagree(lines, line.expand(lines.shape)):
            return Untracked(by)
        part = [slice(n) for n in at.shape]
        part[dim : dim + 1] = [slice(None)]
        example[tuple(part)] = line
    found = merge_owners([entry_owners(target), most, example], target.shape, by)
    return (
        Untracked(by)
        if isinstance(axis_of(index), Untracked) and not _lies_along(found, dim)
        else found
    )
