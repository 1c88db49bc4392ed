"""Rules of look-ups by tensors of indices or masks, and of writing to such places.

Where an index chooses among examples, what it brings is of the example that was there: sorted
batches, packed tokens and tokens sent to experts are followed by the very indices that move them.
Where it chooses within an example, it must come of that example itself.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from trak_dist.ops.examples import NOBODY, Along, Found, Lost, located, of, put
from trak_dist.ops.following.call import Call
from trak_dist.ops.following.entries import entrywise
from trak_dist.ops.following.moves import owners

Owners = Int64[Tensor, "..."]


def looked_up(call: Call) -> Found:
    """`x[index]`."""
    tensor, by = call.first, call.lost().by
    places = _places(call.args[1], tensor)
    index = tuple(_on_cpu(p) for p in places)
    own = owners(tensor)[index]
    chosen = [(d, p) for d, p in enumerate(_by_dimension(places)) if isinstance(p, Tensor)]
    found = of(tensor)
    if not any(of(p) for _, p in chosen):
        return located(own, by)
    if not isinstance(found, Along):  # a table that holds nothing of examples
        return _chosen_by([p for _, p in chosen], own, places, by)
    at = dict(chosen).get(found.dim)
    others = [p for d, p in chosen if d != found.dim]
    if any(isinstance(of(p), Lost) for p in others):
        return Lost(by)
    if any(of(p) for p in others):
        if at is None:
            return Lost(by)
        grid = torch.broadcast_tensors(at, *others)  # type: ignore[no-untyped-call]
        ids = found.ids[grid[0].cpu()]
        for other in others:
            own_of = owners(other).expand(grid[0].shape)
            if ((own_of != ids) & (own_of != NOBODY)).any():
                return Lost(by)
    return located(own, by)


def _chosen_by(indices: list[Tensor], own: Owners, places: tuple[Any, ...], by: str) -> Found:
    """Of a table: what is looked up is of the examples that the indices are of."""
    if any(isinstance(of(p), Lost) for p in indices) or len(places) != len(indices):
        return Lost(by)
    shape = torch.broadcast_shapes(*(p.shape for p in indices))  # type: ignore[no-untyped-call]
    grid = torch.full((), NOBODY).expand(shape)
    for p in indices:
        mine = owners(p).expand(shape)
        if ((mine != grid) & (mine != NOBODY) & (grid != NOBODY)).any():
            return Lost(by)
        grid = torch.maximum(grid, mine)
    spare = [1] * (own.ndim - grid.ndim)
    return located(grid.reshape(*shape, *spare).expand(own.shape), by)


def selected(call: Call) -> Found:
    """`index_select`: whole indices of one dimension."""
    dim, index = call.get(1, "dim"), call.get(2, "index")
    found = of(call.first)
    if not isinstance(found, Along):
        return of(index) if call.first.ndim == 1 else call.lost()
    if found.dim == dim % max(1, call.first.ndim):
        return Along(found.dim, found.ids[index.cpu().reshape(-1)])
    return call.lost() if of(index) else found


def gathered(call: Call) -> Found:
    """`gather` and `take_along_dim`: an index for each entry."""
    swapped = "take_along" in call.lost().by
    dim, index = call.get(2 if swapped else 1, "dim"), call.get(1 if swapped else 2, "index")
    if swapped:
        index = call.get(1, "indices")
    found, by = of(call.first), call.lost().by
    if dim is None:
        return Lost(by)
    own = torch.take_along_dim(owners(call.first), index.cpu(), dim)
    if isinstance(found, Along) and found.dim == dim % call.first.ndim:
        return located(own, by)
    if isinstance(of(index), Lost):
        return Lost(by)
    mine = owners(index).expand(own.shape)
    if ((mine != own) & (mine != NOBODY) & (own != NOBODY)).any():
        return Lost(by)
    return located(torch.maximum(mine, own), by)


def masked(call: Call) -> Found:
    """`masked_select`: the entries where a mask is true."""
    mask = call.get(1, "mask")
    tensor, mask = torch.broadcast_tensors(owners(call.first), mask.cpu())  # type: ignore[no-untyped-call]
    return located(tensor[mask], call.lost().by)


def positions(call: Call) -> Found:
    """`nonzero`: the indices of entries, each of its entry's example."""
    own = owners(call.first)
    return located(own[tuple(call.first.cpu().nonzero().T)], call.lost().by)


def where(call: Call) -> Found:
    """One of two, entry by entry; of a condition alone the indices where it holds."""
    return positions(call) if len(call.args) + len(call.kwargs) == 1 else entrywise(call)


def written(call: Call) -> Found:
    """`x[index] = y`: examples go where it is written."""
    target, by = call.args[0], call.lost().by
    places = _places(call.args[1], target)
    return _write(target, places, call.args[2], by)


def put_at(call: Call) -> Found:
    """`index_put`."""
    if call.get(3, "accumulate", default=False):
        return call.lost()
    return _write(
        call.args[0], tuple(call.get(1, "indices")), call.get(2, "values"), call.lost().by
    )


def _write(target: Tensor, places: tuple[Any, ...], value: Any, by: str) -> Found:
    places = _places(places, target)
    own = owners(target).clone(memory_format=torch.contiguous_format)
    index = tuple(_on_cpu(p) for p in places)
    new = owners(value) if isinstance(value, Tensor) else torch.full((), NOBODY)
    chosen = [p for p in places if isinstance(p, Tensor)]
    if any(of(p) for p in chosen):
        # Where it is written is of an example too: a number written there is that one's.
        if any(isinstance(of(p), Lost) for p in chosen):
            if (new == NOBODY).any():
                return Lost(by)
        else:
            found = _chosen_by(chosen, own[index], places, by)
            if not isinstance(found, Along):
                return Lost(by)
            mine, new = found.spread(own[index].shape), new.expand(own[index].shape)
            if ((new != mine) & (new != NOBODY)).any():
                return Lost(by)
            new = torch.where(new == NOBODY, mine, new)
    own[index] = new
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
        shape[dim] = at.numel()
        own_dim = [1] * target.ndim
        own_dim[dim] = -1
        at, mine = (t.reshape(own_dim).expand(shape) for t in (at, mine))
    new = new[tuple(slice(n) for n in at.shape)] if new.ndim else new.expand(at.shape)
    if isinstance(of(index), Lost) and (new == NOBODY).any():
        return Lost(by)
    if ((new != mine) & (new != NOBODY) & (mine != NOBODY)).any():
        return Lost(by)
    new = torch.maximum(new, mine)
    most = torch.full(target.shape, NOBODY).scatter_reduce(dim, at, new, "amax")
    own = owners(target)
    met = (most.gather(dim, at) != new) & (new != NOBODY)
    if met.any() or ((own != most) & (own != NOBODY) & (most != NOBODY)).any():
        return Lost(by)
    return located(torch.maximum(own, most), by)


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
        elif isinstance(place, Tensor) and place.dtype in (torch.bool, torch.uint8) and place.ndim:
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
    return place.ndim if isinstance(place, Tensor) and place.dtype is torch.bool else 1


def _by_dimension(places: tuple[Any, ...]) -> list[Any]:
    return [p for p in places if p is not None]


def _on_cpu(place: Any) -> Any:
    return place.cpu() if isinstance(place, Tensor) else place
