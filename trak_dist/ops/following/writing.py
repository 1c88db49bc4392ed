"""Rules of writing to places that tensors of indices or masks say: `x[index] = y` and its like.

Examples go to where they are written. Where a number is written to a place that an example says,
all that it might have written to is of that example too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trak_dist.ops.examples import NOBODY, Along, Found, Lost, located, merged, of, owners
from trak_dist.ops.following.call import Call
from trak_dist.ops.following.places import (
    MASKS,
    Owners,
    chosen_by,
    dimension_of,
    disagree,
    on_cpu,
    places_of,
)


def written(call: Call) -> Found:
    """`x[index] = y`: examples go where it is written."""
    return _write(call, call.args[1], call.args[2], adds=False)


def put_at(call: Call) -> Found:
    """`index_put`."""
    adds = call.get(3, "accumulate", default=False)
    return _write(call, tuple(call.get(1, "indices")), call.get(2, "values"), adds=adds)


def _write(call: Call, where: Any, value: Any, *, adds: bool) -> Found:  # noqa: PLR0911
    target, by = call.args[0], call.lost().by
    places = places_of(where, target)
    index = tuple(on_cpu(p) for p in places)
    own = owners(target).clone(memory_format=torch.contiguous_format)
    old = own[index]
    new = owners(value) if isinstance(value, Tensor) else torch.full((), NOBODY)
    while new.ndim > old.ndim:  # of size 1, as torch has it
        new = new[0]
    new = new.expand(old.shape)
    if adds:
        if disagree(old, new):
            return Lost(by)
        new = torch.maximum(old, new)
    own[index] = new
    if not torch.equal(own[index], new):  # two came to one place
        return Lost(by)
    chosen = [p for p in places if isinstance(p, Tensor)]
    if not any(of(p) for p in chosen):
        return located(own, by)
    where = where[0] if isinstance(where, tuple) and len(where) == 1 else where
    numbers = bool((new == NOBODY).any())
    if isinstance(where, Tensor) and where.dtype in MASKS and isinstance(of(where), Along):
        mask = owners(where)
        mask = mask.reshape(*mask.shape, *[1] * (own.ndim - mask.ndim))
        return merged([own, mask], own.shape, by)
    if numbers:
        return _numbered(own, chosen, places, by)
    found, mine = located(own, by), chosen_by(chosen, old, places, by)
    if isinstance(mine, Along) and not disagree(mine.spread(old.shape), new):
        return found
    return (
        found
        if len(chosen) == 1 and _lies_along(found, dimension_of(chosen[0], places))
        else Lost(by)
    )


def _lies_along(found: Found, dim: int) -> bool:
    """Whether others' indices into `dim` have only said where along it an example goes."""
    return isinstance(found, Along) and found.dim == dim


def _numbered(own: Owners, chosen: list[Tensor], places: tuple[Any, ...], by: str) -> Found:
    """Where it is written is of an example too: all that it might have written is that one's.

    One index says which rows, those of examples where in them: `x[arange(n), labels] = 1`.
    """
    fixed = [d for d, p in enumerate(places) if isinstance(p, Tensor) and of(p) is None]
    alike = len({p.shape for p in chosen}) == 1 and chosen[0].ndim == 1
    if len(fixed) != 1 or len(places) != len(chosen) or not alike:
        return Lost(by)
    found = [of(p) for p in chosen]
    if any(isinstance(f, Lost) for f in found):
        return Lost(by)
    rows = chosen[fixed[0]].cpu() % own.shape[fixed[0]]
    ids = [f.ids for f in found if isinstance(f, Along)]
    mine, turned = ids[0], own.movedim(fixed[0], 0)
    whose = mine.view(-1, *[1] * (own.ndim - 1)).expand(len(rows), *turned.shape[1:])
    if any(not torch.equal(other, mine) for other in ids) or bool((rows.bincount() > 1).any()):
        return Lost(by)
    if disagree(turned[rows], whose):
        return Lost(by)
    turned[rows] = torch.maximum(turned[rows], whose)
    return located(own, by)


def added_at(call: Call) -> Found:
    """`index_add`, `scatter` and their like: examples go, or are added, to where an index says."""
    target, by = call.first, call.lost().by
    dim, index = call.get(1, "dim") % max(1, target.ndim), call.get(2, "index")
    value = call.get(3, "source", "src", "value")
    new = owners(value) if isinstance(value, Tensor) else torch.full((), NOBODY)
    at, mine = index.cpu(), owners(index)
    if "index_" in by:
        shape = list(target.shape)
        shape[dim : dim + 1] = [at.numel()]
        own_dim = [1] * len(shape)
        own_dim[dim] = -1
        at, mine = (t.reshape(own_dim).expand(shape) for t in (at, mine))
    new = new[tuple(slice(n) for n in at.shape)] if new.ndim else new.expand(at.shape)
    numbers = new == NOBODY
    if isinstance(of(index), Lost) and numbers.any():
        return Lost(by)
    if disagree(new, mine):
        return Lost(by)
    most = torch.full(target.shape, NOBODY).scatter_reduce(dim, at, new, "amax")
    if ((most.gather(dim, at) != new) & ~numbers).any():  # two came to one place
        return Lost(by)
    # Where a number is written is of an example too, so all places that might have been are.
    lines = torch.where(numbers, mine, NOBODY)
    whose = torch.full(target.shape, NOBODY)
    if (lines != NOBODY).any():
        line = lines.amax(dim, keepdim=True)
        if disagree(lines, line.expand(lines.shape)):
            return Lost(by)
        part = [slice(n) for n in at.shape]
        part[dim : dim + 1] = [slice(None)]
        whose[tuple(part)] = line
    found = merged([owners(target), most, whose], target.shape, by)
    return Lost(by) if isinstance(of(index), Lost) and not _lies_along(found, dim) else found
