"""Rules of look-ups by tensors of indices or masks.

Where an index chooses among examples, what it brings is of the example that was there: sorted
batches, packed tokens and tokens sent to experts are followed by the very indices that move them.
An index that depends on other examples may only rearrange: what it leaves out or doubles, as tokens
over an expert's capacity, an example alone would have kept. Where an index chooses within an
example, it must come of that example itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trak_dist.ops.examples import NOBODY, Along, Found, Lost, located, merged, of, owners
from trak_dist.ops.following.call import Call
from trak_dist.ops.following.entries import entrywise, shape_of
from trak_dist.ops.following.places import by_dimension, chosen_by, disagree, on_cpu, places_of


def looked_up(call: Call) -> Found:
    """`x[index]`."""
    tensor, by = call.first, call.lost().by
    places = places_of(call.args[1], tensor)
    own = owners(tensor)[tuple(on_cpu(p) for p in places)]
    chosen = [(d, p) for d, p in enumerate(by_dimension(places)) if isinstance(p, Tensor)]
    found = of(tensor)
    if not any(of(p) for _, p in chosen):
        return located(own, by)
    if not isinstance(found, Along):  # a table that holds nothing of examples
        return chosen_by([p for _, p in chosen], own, places, by)
    at = dict(chosen).get(found.dim)
    others = [p for d, p in chosen if d != found.dim and of(p)]
    if at is not None and not others and not _rearranges(at, found):
        return Lost(by)
    if others:
        if at is None or any(isinstance(of(p), Lost) for p in others):
            return Lost(by)
        ids = found.ids[at.cpu()].expand(shape_of([p for _, p in chosen]))
        if any(disagree(owners(p).expand(ids.shape), ids) for p in (at, *others)):
            return Lost(by)
    return located(own, by)


def _rearranges(index: Tensor, found: Along) -> bool:
    """Whether examples stay whole where indices choose among them, whoever the indices are of."""
    own, at = of(index), index.cpu()
    if own is None or (isinstance(own, Along) and not disagree(owners(index), found.ids[at])):
        return True
    times = (at % len(found.ids)).flatten().bincount(minlength=len(found.ids))
    times = times[found.ids != NOBODY]
    return bool((times == times[:1]).all())


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
    if isinstance(mine, Along) and not disagree(owners(index).expand(own.shape), own):
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
    if disagree(own, mine) or (isinstance(of(mask), Lost) and not mask.all()):
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
