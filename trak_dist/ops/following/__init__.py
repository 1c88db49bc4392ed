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
from torch.autograd.function import BackwardCFunction

from trak_dist.ops.examples import Along, Found, Lost, located, noted, of, owners, put
from trak_dist.ops.following.call import Call
from trak_dist.ops.following.entries import nothing
from trak_dist.ops.following.table import INDEX_AT, RULES

# Functions that take numbers of a tensor into Python, or gradients. What is made of them is not
# followed: whole numbers and conditions say how many and which, as lengths do; others are values.
_UNFOLLOWED = {
    *(Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__array__),
    *(Tensor.__float__, Tensor.__complex__, Tensor.register_hook),
}


def holds_examples(tensors: Sequence[Tensor]) -> bool:
    """Whether any of the tensors that go into a function holds something of examples."""
    for tensor in tensors:
        if (found := of(tensor)) is not None:
            put(tensor, found)  # as of now, for what is asked when it was changed in place
        made_by = tensor.grad_fn if found is None or isinstance(found, Along) else None
        # Made by what torch shows to nobody, or whose backward pass is written by hand.
        if made_by is None or (found is not None and not isinstance(made_by, BackwardCFunction)):
            continue
        if found is None or found.only is None:
            put(tensor, Lost(f"{made_by.name()}, which is not followed"))
    return any(of(tensor) is not None for tensor in tensors)


def loses_sight(func: Any, tensors: Sequence[Tensor]) -> bool:
    """Whether a function takes values of examples to where they are not followed."""
    transformed = torch._C._are_functorch_transforms_active()  # noqa: SLF001
    if func not in _UNFOLLOWED and not transformed:
        return False
    values = [t for t in tensors if t.is_floating_point() or t.is_complex()]
    return any(of(_plain(t)) is not None for t in values)


def _plain(tensor: Tensor) -> Tensor:
    """What a transform of torch.func has wrapped."""
    functorch = torch._C._functorch  # noqa: SLF001
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor


def follow(
    func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any, versions: Sequence[int]
) -> None:
    """Note where the examples lie in what a function gave.

    Parameters
    ----------
    versions : sequence of int
        Those that its tensors had before it.
    """
    call = Call(func, args, dict(kwargs), out)
    before = list(zip(call.tensors, versions, strict=True))
    for tensor, version in before:
        if noted(tensor)[1] == version:  # rules ask for what was there before a change in place
            put(tensor, noted(tensor)[0])
    outs = call.outs
    found = _found(call) if outs else None
    several = found if isinstance(found, list) else [found] * len(outs)
    for tensor, one in zip(outs, several, strict=True):
        changed = any(tensor is t for t in call.tensors)
        put(tensor, _fitting(one, tensor, call))
        if changed:
            _note_on_base(tensor, call)
            if (origin := getattr(tensor, "_data_of", None)) is not None:
                put(origin, of(tensor))
        elif func == Tensor.data.__get__:  # type: ignore[attr-defined]
            # Its changes do not count as versions of what it is the data of.
            tensor._data_of = call.first  # type: ignore[attr-defined]  # noqa: SLF001
    given = [_whole(t) for t in outs]
    for tensor, version in before:
        if tensor._version != version and not any(_whole(tensor) is t for t in given):  # noqa: SLF001
            put(tensor, call.lost())  # changed beside what it gave, as running statistics are
            _note_on_base(tensor, call)


def _whole(tensor: Tensor) -> Tensor:
    base = tensor._base  # noqa: SLF001
    return tensor if base is None else base


def _found(call: Call) -> Found | list[Found]:  # noqa: PLR0911
    rule = RULES.get(call.func)
    if rule is nothing:
        return None
    chooses = call.get(INDEX_AT[call.func], "index", "indices") if call.func in INDEX_AT else ()
    indices = Call(call.func, (chooses,), {}, None).tensors
    held = [(t, found) for t in call.tensors if (found := of(t)) is not None]
    for tensor, one in held:
        if isinstance(one, Lost) and not any(tensor is index for index in indices):
            return one
    if not held:
        return None
    owned = [one.only if isinstance(one, Along) else None for _, one in held]
    if owned[0] is not None and owned.count(owned[0]) == len(owned):
        # Whatever a function does, of one example it makes what is of that example.
        return [_all_of(owned[0], tensor) for tensor in call.outs]
    if rule is None:
        return call.lost()
    try:
        return rule(call)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return call.lost()  # a spelling that torch takes and the rule doesn't know


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
    if base is None:
        return
    known = base.is_contiguous() and base.dtype == tensor.dtype
    if isinstance(found, Lost) or isinstance(noted(base)[0], Lost) or not known:
        put(base, call.lost())
        return
    own = owners(put(base, noted(base)[0])).clone(memory_format=torch.contiguous_format)
    offset = tensor.storage_offset() - base.storage_offset()
    own.as_strided(tensor.shape, tensor.stride(), offset).copy_(owners(tensor))
    put(base, located(own, call.lost().by))
