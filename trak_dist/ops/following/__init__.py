"""How examples move through the functions of torch: what `ops.hooks` knows of a forward pass.

`follow` is told of each call, and notes on its results where the examples lie (`ops.examples`). A
function that may keep them apart has a rule in `ops.following.table`; after any other they are
`Lost`. A rule says only what holds for all tensors of those shapes, so what is known can be relied
on; what a function has mixed and what nobody has a rule for are the same to whoever reads rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trak_dist.ops.examples import Along, Found, Lost, located, of, put
from trak_dist.ops.following.call import Call
from trak_dist.ops.following.entries import nothing
from trak_dist.ops.following.moves import owners
from trak_dist.ops.following.table import INDEX_AT, RULES


def holds_examples(tensors: Sequence[Tensor]) -> bool:
    """Whether any of the tensors that go into a function holds something of examples."""
    for tensor in tensors:
        if of(tensor) is None and tensor.grad_fn is not None:
            # Made by what torch shows to nobody: a function of the user's own, a compiled one.
            put(tensor, Lost(f"{tensor.grad_fn.name()}, which is not followed"))
    return any(of(tensor) is not None for tensor in tensors)


def follow(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
    """Note where the examples lie in what a function gave."""
    call = Call(func, args, dict(kwargs), out)
    outs = call.outs
    if not outs:
        return
    found = _found(call)
    several = found if isinstance(found, list) else [found] * len(outs)
    for tensor, one in zip(outs, several, strict=True):
        changed = any(tensor is t for t in call.tensors)
        put(tensor, _fitting(one, tensor, call))
        if changed and tensor._is_view():  # noqa: SLF001
            _note_on_base(tensor, call)


def _found(call: Call) -> Found | list[Found]:
    rule = RULES.get(call.func)
    if rule is nothing:
        return None
    chooses = call.get(INDEX_AT[call.func], "index", "indices") if call.func in INDEX_AT else ()
    indices = Call(call.func, (chooses,), {}, None).tensors
    held = [(t, found) for t in call.tensors if (found := of(t)) is not None]
    for tensor, one in held:
        if isinstance(one, Lost) and not any(tensor is index for index in indices):
            return one
    owned = [one.only if isinstance(one, Along) else None for _, one in held]
    if owned[0] is not None and owned.count(owned[0]) == len(owned):
        # Whatever a function does, of one example it makes what is of that example.
        return [_all_of(owned[0], tensor) for tensor in call.outs]
    return call.lost() if rule is None else rule(call)


def _all_of(example: int, tensor: Tensor) -> Found:
    return Along(0, torch.full((len(tensor) if tensor.ndim else 1,), example))


def _fitting(found: Found, tensor: Tensor, call: Call) -> Found:
    """What a rule found, if it can be so of a tensor of this shape."""
    if isinstance(found, Along):
        size = tensor.shape[found.dim] if found.dim < tensor.ndim else 1
        if len(found.ids) != size or (found.dim and found.dim >= tensor.ndim):
            return call.lost()
    return found


def _note_on_base(tensor: Tensor, call: Call) -> None:
    """What was written to a part of a tensor is in the whole of it."""
    base, found = tensor._base, of(tensor)  # noqa: SLF001
    if isinstance(found, Lost) or isinstance(of(base), Lost) or not base.is_contiguous():
        put(base, call.lost())
        return
    own = owners(base).clone(memory_format=torch.contiguous_format)
    offset = tensor.storage_offset() - base.storage_offset()
    own.as_strided(tensor.shape, tensor.stride(), offset).copy_(owners(tensor))
    put(base, located(own, call.lost().by))
