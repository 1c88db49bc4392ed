"""Tracks where examples are in the results of torch functions, for `ops.hooks`.

`follow` is called for each call, and records on its results along which axis the examples are
(`ops.example_axis`). A function that may keep them apart has a rule in `ops.tracking.registry`;
after any other they are `Untracked`. A rule says only what holds for all tensors of those shapes,
so what is known can be relied on; results that a function has mixed and results without a rule are
treated alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from trak_dist.ops.example_axis import (
    AxisInfo,
    ExampleAxis,
    Untracked,
    axis_from_owners,
    axis_of,
    entry_owners,
    record_axis,
    recorded_axis,
)
from trak_dist.ops.tracking.call import Call
from trak_dist.ops.tracking.elementwise import no_example
from trak_dist.ops.tracking.registry import INDEX_AT, RULES

# Functions that take numbers of a tensor, or gradients, into Python, where they are not tracked:
# integers and conditions are sizes and choices; others are values.
_UNTRACKED_FUNCTIONS = {
    *(Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__array__),
    *(Tensor.__float__, Tensor.__complex__, Tensor.register_hook),
}


def depend_on_examples(tensors: Sequence[Tensor]) -> bool:
    """Whether any of a function's input tensors depends on examples."""
    for tensor in tensors:
        if (found := axis_of(tensor)) is not None:
            record_axis(tensor, found)  # as of now, for what is asked when it was changed in place
        made_by = tensor.grad_fn if found is None or isinstance(found, ExampleAxis) else None
        # Made by a function that torch does not show, or that has a custom backward pass.
        if made_by is None or (found is not None and not isinstance(made_by, BackwardCFunction)):
            continue
        if found is None or found.single_example is None:
            record_axis(tensor, Untracked(f"{made_by.name()}, which is not tracked"))
    return any(axis_of(tensor) is not None for tensor in tensors)


def escapes_tracking(func: Any, tensors: Sequence[Tensor]) -> bool:
    """Whether a function takes values of examples out of tracking."""
    transformed = torch._C._are_functorch_transforms_active()  # noqa: SLF001
    if func not in _UNTRACKED_FUNCTIONS and not transformed:
        return False
    values = [t for t in tensors if t.is_floating_point() or t.is_complex()]
    return any(axis_of(_plain(t)) is not None for t in values)


def _plain(tensor: Tensor) -> Tensor:
    """What a transform of torch.func has wrapped."""
    functorch = torch._C._functorch  # noqa: SLF001
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor


def track_call(
    func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any, versions: Sequence[int]
) -> None:
    """Record the axis of the examples in a function's result.

    Parameters
    ----------
    versions : sequence of int
        The versions of its tensors before the call.
    """
    call = Call(func, args, dict(kwargs), out)
    before = list(zip(call.tensors, versions, strict=True))
    for tensor, version in before:
        # rules ask for what was there before a change in place
        if recorded_axis(tensor)[1] == version:
            record_axis(tensor, recorded_axis(tensor)[0])
    outs = call.outs
    found = _found(call) if outs else None
    several = found if isinstance(found, list) else [found] * len(outs)
    for tensor, one in zip(outs, several, strict=True):
        changed = any(tensor is t for t in call.tensors)
        record_axis(tensor, _fitting(one, tensor, call))
        if changed:
            _note_on_base(tensor, call)
            if (origin := getattr(tensor, "_data_of", None)) is not None:
                record_axis(origin, axis_of(tensor))
        elif func == Tensor.data.__get__:  # type: ignore[attr-defined]
            # Its changes do not count as versions of what it is the data of.
            tensor._data_of = call.first  # type: ignore[attr-defined]  # noqa: SLF001
    outputs = [_whole(t) for t in outs]
    for tensor, version in before:
        if tensor._version != version and not any(_whole(tensor) is t for t in outputs):  # noqa: SLF001
            # changed in addition to the result, as running statistics are
            record_axis(tensor, call.untracked())
            _note_on_base(tensor, call)


def _whole(tensor: Tensor) -> Tensor:
    base = tensor._base  # noqa: SLF001
    return tensor if base is None else base


def _found(call: Call) -> AxisInfo | list[AxisInfo]:  # noqa: PLR0911
    rule = RULES.get(call.func)
    if rule is no_example:
        return None
    chooses = ()
    if call.func in INDEX_AT:
        chooses = call.get(INDEX_AT[call.func], "index", "indices", "offs")
    indices = Call(call.func, (chooses,), {}, None).tensors
    held = [(t, found) for t in call.tensors if (found := axis_of(t)) is not None]
    for tensor, one in held:
        if isinstance(one, Untracked) and not any(tensor is index for index in indices):
            return one
    if not held:
        return None
    owned = [one.single_example if isinstance(one, ExampleAxis) else None for _, one in held]
    if owned[0] is not None and owned.count(owned[0]) == len(owned):
        # Whatever a function does, of one example it makes what is of that example.
        return [_all_of(owned[0], tensor) for tensor in call.outs]
    if rule is None:
        return call.untracked()
    try:
        return rule(call)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return call.untracked()  # a spelling that torch takes and the rule doesn't know


def _all_of(example: int, tensor: Tensor) -> AxisInfo:
    return ExampleAxis(0, torch.full((len(tensor) if tensor.ndim else 1,), example))


def _fitting(found: AxisInfo, tensor: Tensor, call: Call) -> AxisInfo:
    """What a rule found, if it can be so of a tensor of this shape."""
    if isinstance(found, ExampleAxis):
        size = tensor.shape[found.dim] if found.dim < tensor.ndim else 1
        if len(found.ids) != size or (found.dim and found.dim >= tensor.ndim):
            return call.untracked()
    return found


def _note_on_base(tensor: Tensor, call: Call) -> None:
    """What was written to a part of a tensor is in the whole of it."""
    base, found = tensor._base, axis_of(tensor)  # noqa: SLF001
    if base is None:
        return
    known = base.is_contiguous() and base.dtype == tensor.dtype
    if isinstance(found, Untracked) or isinstance(recorded_axis(base)[0], Untracked) or not known:
        record_axis(base, call.untracked())
        return
    own = entry_owners(record_axis(base, recorded_axis(base)[0])).clone(
        memory_format=torch.contiguous_format
    )
    offset = tensor.storage_offset() - base.storage_offset()
    own.as_strided(tensor.shape, tensor.stride(), offset).copy_(entry_owners(tensor))
    record_axis(base, axis_from_owners(own, call.untracked().by))
