"""Rules of look-ups by tensors of indices or masks, and of writing to such places.

Where an index chooses among examples, what it brings is of the example that was there: sorted
batches, packed tokens and tokens sent to experts are followed by the very indices that move them.
An index that depends on other examples may only rearrange: what it leaves out or doubles, as tokens
over an expert's capacity, an example alone would have kept. Where an index chooses within an
example, it must come of that example itself.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from trak_dist.ops.examples import NOBODY, Along, Found, Lost, located, merged, of, owners, put
from trak_dist.ops.following.call import Call
from trak_dist.ops.following.entries import entrywise, shape_of

Owners = Int64[Tensor, "..."]


def looked_up(call: Call) -> Found:
    """`x[index]`."""
    tensor, by = call.first, call.lost().by
    places = _places(call.args[1], tensor)
    own = owners(tensor)[tuple(_on_cpu(p) for p in places)]
    chosen = [(d, p) for d, p in enumerate(_by_dimension(places)) if isinstance(p, Tensor)]
    found = of(tensor)
    if not any(of(p) for _, p in chosen):
        return located(own, by)
    if not isinstance(found, Along):  # a table that holds nothing of examples
        return _chosen_by([p for _, p in chosen], own, places, by)
    at = dict(chosen).get(found.dim)
    others = [p for d, p in chosen if d != found.dim and of(p)]
    if at is not None and not others and not _rearranges(at, found):
        return Lost(by)
    if others:
        if at is None or any(isinstance(of(p), Lost) for p in others):
            return Lost(by)
        ids = found.ids[at.cpu()].expand(shape_of([p for _, p in chosen]))
        if any(_disagree(owners(p).expand(ids.shape), ids) for p in (at, *others)):
            return Lost(by)
    return located(own, by)


def _rearranges(index: Tensor, found: Along) -> bool:
    """Whether examples stay whole where indices choose among them, whoever the indices are of."""
    own, at = of(index), index.cpu()
    if own is None or (isinstance(own, Along) and not _disagree(owners(index), found.ids[at])):
        return True
    times = (at % len(found.ids)).flatten().bincount(minlength=len(found.ids))
    times = times[found.ids != NOBODY]
    return bool((times == times[:1]).all())


def _disagree(own: Owners, other: Owners) -> bool:
    """Whether entries of one shape are of different examples."""
    return bool(((own != other) & (own != NOBODY) & (other != NOBODY)).any())


def _chosen_by(indices: list[Tensor], own: Owners, places: tuple[Any, ...], by: str) -> Found:
    """Of a table: what is looked up is of the examples that the indices are of."""
    if any(isinstance(of(p), Lost) for p in indices) or len(places) != len(indices):
        return Lost(by)
    shape = shape_of(indices)
    grid = torch.full((), NOBODY).expand(shape)
    for p in indices:
        mine = owners(p).expand(shape)
        if _disagree(mine, grid):
            return Lost(by)
        grid = torch.maximum(grid, mine)
    spare = [1] * (own.ndim - grid.ndim)
    return located(grid.reshape(*shape, *spare).expand(own.shape), by)


def selected(call: Call) -> Found:
    """`index_select`: whole indices of one dimension."""
    dim, index = call.get(1, "dim"), call.get(2, "index")
    found, own = of(call.first), of(index)
    if not isinstance(found, Along):
        return own if call.first.ndim == 1 else call.lost()
    if found.dim != dim % max(1, call.first.ndim):
        return call.lost() if own else found
    index = index.reshape(-1) if own is None else index
    if index.ndim != 1 or not _rearranges(index, found):
        return call.lost()
    return Along(found.dim, found.ids[index.cpu()])


def gathered(call: Call) -> Found:
    """`gather`: an index for each entry."""
    dim, index = call.get(1, "dim"), call.get(2, "index")
    return _gathered(call, dim, index, torch.gather)


def taken_along(call: Call) -> Found:
    """`take_along_dim`, which broadcasts."""
    index, dim = call.get(1, "indices"), call.get(2, "dim")
    if dim is None:
        return call.lost()
    return _gathered(call, dim, index, lambda x, dim, at: torch.take_along_dim(x, at, dim))


def _gathered(call: Call, dim: int, index: Tensor, gather: Any) -> Found:
    found, mine, by = of(call.first), of(index), call.lost().by
    own = gather(owners(call.first), dim, index.cpu())
    among = isinstance(found, Along) and found.dim == dim % max(1, call.first.ndim)
    if mine is None:
        return located(own, by)
    if isinstance(mine, Along) and not _disagree(owners(index).expand(own.shape), own):
        if among:
            return located(own, by)
        return merged([owners(index), own], own.shape, by)
    order = torch.arange(call.first.shape[dim]).view(-1, *[1] * (own.ndim - 1 - dim % own.ndim))
    whole = among and index.shape == call.first.shape
    if whole and torch.equal(index.cpu().sort(dim).values, order.expand(index.shape)):
        return located(own, by)
    return Lost(by)


def masked(call: Call) -> Found:
    """`masked_select`: the entries where a mask is true."""
    mask, by = call.get(1, "mask"), call.lost().by
    shape = shape_of([call.first, mask])
    own = owners(call.first).expand(shape)[mask.cpu().expand(shape)]
    mine = owners(mask).expand(shape)[mask.cpu().expand(shape)]
    if _disagree(own, mine) or (isinstance(of(mask), Lost) and not mask.all()):
        return Lost(by)
    return located(own, by)


def positions(call: Call) -> Found:
    """`nonzero`: the indices of entries, each of its entry's example."""
    if isinstance(of(call.first), Lost):
        return call.lost()
    own = owners(call.first)
    return located(own[tuple(call.first.cpu().nonzero().T)], call.lost().by)


def where(call: Call) -> Found:
    """One of two, entry by entry; of a condition alone the indices where it holds."""
    return positions(call) if len(call.args) + len(call.kwargs) == 1 else entrywise(call)


def written(call: Call) -> Found:
    """`x[index] = y`: examples go where it is written."""
    return _write(call, call.args[1], call.args[2], adds=False)


def put_at(call: Call) -> Found:
    """`index_put`."""
    adds = call.get(3, "accumulate", default=False)
    return _write(call, tuple(call.get(1, "indices")), call.get(2, "values"), adds=adds)


def _write(call: Call, where: Any, value: Any, *, adds: bool) -> Found:  # noqa: PLR0911
    target, by = call.args[0], call.lost().by
    places = _places(where, target)
    index = tuple(_on_cpu(p) for p in places)
    own = owners(target).clone(memory_format=torch.contiguous_format)
    old = own[index]
    new = owners(value) if isinstance(value, Tensor) else torch.full((), NOBODY)
    while new.ndim > old.ndim:  # of size 1, as torch has it
        new = new[0]
    new = new.expand(old.shape)
    if adds:
        if _disagree(old, new):
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
    if isinstance(where, Tensor) and where.dtype in _MASKS and isinstance(of(where), Along):
        mask = owners(where)
        mask = mask.reshape(*mask.shape, *[1] * (own.ndim - mask.ndim))
        return merged([own, mask], own.shape, by)
    if numbers:
        return _numbered(own, chosen, places, by)
    found, mine = located(own, by), _chosen_by(chosen, old, places, by)
    if isinstance(mine, Along) and not _disagree(mine.spread(old.shape), new):
        return found
    return (
        found
        if len(chosen) == 1 and _lies_along(found, _dimension(chosen[0], places))
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
    if _disagree(turned[rows], whose):
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
    if _disagree(new, mine):
        return Lost(by)
    most = torch.full(target.shape, NOBODY).scatter_reduce(dim, at, new, "amax")
    if ((most.gather(dim, at) != new) & ~numbers).any():  # two came to one place
        return Lost(by)
    # Where a number is written is of an example too, so all places that might have been are.
    lines = torch.where(numbers, mine, NOBODY)
    whose = torch.full(target.shape, NOBODY)
    if (lines != NOBODY).any():
        line = lines.amax(dim, keepdim=True)
        if _disagree(lines, line.expand(lines.shape)):
            return Lost(by)
        part = [slice(n) for n in at.shape]
        part[dim : dim + 1] = [slice(None)]
        whose[tuple(part)] = line
    found = merged([owners(target), most, whose], target.shape, by)
    return Lost(by) if isinstance(of(index), Lost) and not _lies_along(found, dim) else found


_MASKS = (torch.bool, torch.uint8)


def _places(index: Any, tensor: Tensor) -> tuple[Any, ...]:
    """An index of each kind as a tuple, masks as the indices of what they choose."""
    places = index if isinstance(index, tuple) else (index,)
    taken = sum(_takes(p) for p in places)
    found: list[Any] = []
    for place in places:
        if isinstance(place, list):
            place = torch.as_tensor(place)  # noqa: PLW2901
        if place is Ellipsis:
            found += [slice(None)] * (tensor.ndim - taken)
        elif isinstance(place, Tensor) and place.dtype in _MASKS and place.ndim:
            chosen = place.cpu().nonzero()
            own = of(place)
            if isinstance(own, Along):
                own = Along(0, owners(place)[tuple(chosen.T)])
            found += [put(column, own) for column in chosen.unbind(1)]
        else:
            found.append(place)
    return tuple(found)


def _takes(place: Any) -> int:
    if place is None or place is Ellipsis:
        return 0
    if isinstance(place, list):
        place = torch.as_tensor(place)
    return place.ndim if isinstance(place, Tensor) and place.dtype in _MASKS else 1


def _dimension(index: Tensor, places: tuple[Any, ...]) -> int:
    return next(d for d, place in enumerate(_by_dimension(places)) if place is index)


def _by_dimension(places: tuple[Any, ...]) -> list[Any]:
    return [p for p in places if p is not None]


def _on_cpu(place: Any) -> Any:
    return place.cpu() if isinstance(place, Tensor) else place
