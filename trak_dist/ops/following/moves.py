"""Rules of functions that give a tensor another shape, or lay several side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.utils import _pytree as pytree

from trak_dist.ops.examples import NOBODY, Along, Found, located, of, owners
from trak_dist.ops.following.call import Call


def viewed(call: Call) -> Found | list[Found]:
    """What does nothing but choose and order entries by numbers: done to the owners as well."""
    args, kwargs = pytree.tree_map_only(
        Tensor, lambda t: owners(t) if t is call.first else t, (call.args, call.kwargs)
    )
    out = call.func(*args, **kwargs)
    pieces = [out] if isinstance(out, Tensor) else list(out)
    return [located(piece, call.lost().by) for piece in pieces]


def reshaped(call: Call) -> Found:
    """Dimensions merged and split, entries in their order."""
    found, old, new = of(call.first), call.first.shape, call.outs[0].shape
    if not isinstance(found, Along) or old.numel() != new.numel():
        return call.lost()  # another dtype
    if not old.numel():
        return located(torch.empty(new, dtype=torch.int64), call.lost().by)
    ids = found.ids if old else found.ids.reshape(1)
    inner = math.prod(old[found.dim + 1 :])
    sizes = [math.prod(new[d + 1 :]) for d in range(len(new))]  # of one step along each dimension
    # The new dimensions that a step between examples goes along.
    dims = [d for d, size in enumerate(sizes) if size < inner * len(ids) and size * new[d] > inner]
    if not dims:  # all of one, or a tensor without dimensions
        return Along(0, ids[:1].expand(new[0] if new else 1))
    smallest, largest = sizes[dims[-1]], sizes[dims[0]] * new[dims[0]]
    if inner % smallest or largest % (inner * len(ids)):
        return call.lost()
    ids = ids.repeat_interleave(inner // smallest).repeat(largest // (inner * len(ids)))
    within = located(ids.view([new[d] for d in range(dims[0], dims[-1] + 1)]), call.lost().by)
    return Along(dims[0] + within.dim, within.ids) if isinstance(within, Along) else within


def joined(call: Call) -> Found:
    """Tensors side by side along a dimension that is there."""
    # torch takes a tensor of shape (0,) for none at all.
    tensors = [t for t in call.get(0, "tensors") if t.shape != (0,)]
    dim = call.get(1, "dim", "axis", default=0) % call.outs[0].ndim
    held = [found for t in tensors if isinstance(found := of(t), Along)]
    if not held:
        return None
    if all(f.dim == held[0].dim != dim and f.as_good_as(held[0]) for f in held):
        return held[0]
    if all(f.dim == dim for f in held):
        pieces = [found.ids if isinstance(found := of(t), Along) else _nobodys(t.shape[dim])
                  for t in tensors]  # fmt: skip
        return Along(dim, torch.cat(pieces))
    return located(torch.cat([owners(t) for t in tensors], dim), call.lost().by)


def stacked(call: Call) -> Found:
    """Tensors side by side along a new dimension."""
    tensors: Sequence[Tensor] = call.get(0, "tensors")
    dim = call.get(1, "dim", default=0) % call.outs[0].ndim
    held = [found for t in tensors if isinstance(found := of(t), Along)]
    if tensors[0].ndim and all(f.dim == held[0].dim and f.as_good_as(held[0]) for f in held):
        return Along(held[0].dim + (dim <= held[0].dim), held[0].ids)
    return located(torch.stack([owners(t) for t in tensors], dim), call.lost().by)


def padded_together(call: Call) -> Found:
    """Sequences, each of one example, padded to one length."""
    found = [of(t) for t in call.get(0, "sequences")]
    ids = [f.only if isinstance(f, Along) else NOBODY for f in found]
    if None in ids:
        return call.lost()
    return Along(0 if call.get(1, "batch_first", default=False) else 1, torch.tensor(ids))


def padded(call: Call) -> Found:
    """Margins filled with a number, or with what is beside them."""
    found = of(call.first)
    if not isinstance(found, Along):
        return call.lost()
    from_end = 2 * (call.first.ndim - 1 - found.dim)
    margins = [*call.get(1, "pad")][from_end : from_end + 2]
    if not any(margins):
        return found
    if call.get(2, "mode", default="constant") != "constant":
        return call.lost()
    return Along(found.dim, F.pad(found.ids, margins, value=NOBODY))


def repeated(call: Call) -> Found:
    """Copies of the whole, side by side."""
    found, out = of(call.first), call.outs[0]
    if not isinstance(found, Along) or not out.ndim:
        return call.lost()
    dim = found.dim + out.ndim - call.first.ndim if call.first.ndim else out.ndim - 1
    return Along(dim, found.ids.repeat(out.shape[dim] // max(1, len(found.ids))))


def repeated_each(call: Call) -> Found:
    """Copies of each index of a dimension."""
    found, dim = of(call.first), call.get(2, "dim")
    repeats = call.get(1, "repeats")
    if not isinstance(found, Along) or (dim is None and call.first.ndim != 1) or repeats is None:
        return call.lost()
    own = of(repeats)
    if found.dim != (dim or 0) % call.first.ndim:
        return call.lost() if own else found
    if isinstance(own, Along) and not own.as_good_as(found):
        return call.lost()
    times = repeats.cpu() if isinstance(repeats, Tensor) else repeats
    return Along(found.dim, found.ids.repeat_interleave(times))


def rolled(call: Call) -> Found:
    """Rolled round; along other dimensions examples stay where they are."""
    found, dims = of(call.first), call.get(2, "dims", default=())
    dims = [dims] if isinstance(dims, int) else list(dims)
    if not isinstance(found, Along) or not dims:
        return call.lost()
    if found.dim in [d % call.first.ndim for d in dims]:
        return located(call.func(owners(call.first), *call.args[1:], **call.kwargs), call.lost().by)
    return found


def _nobodys(size: int) -> Int64[Tensor, " size"]:
    return torch.full((size,), NOBODY)
