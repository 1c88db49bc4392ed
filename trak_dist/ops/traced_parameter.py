"""Parameters, and what a model makes of them before examples come in (for `ops.hooks`).

A slice, a transpose, weight norm, a table of positions looked up: such a tensor is of no example,
so it may be used by any rule as a parameter is. Its per-sample gradients are pulled back through
the function that made it, to the parameters that it is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils import _pytree as pytree

from trak_dist.ops.bundles import Bundles
from trak_dist.ops.tracking.call import is_in_place, tensors_in

SampleGradientSink = Callable[[slice, Float[Tensor, "rows ..."]], None]


@dataclass(frozen=True)
class TracedParameter:
    """A parameter, or what was made of parameters alone; `tensor` keeps its id from being reused.

    It requires gradients, so that what torch shows to nobody makes of it is found by its `grad_fn`;
    functions get its stand-in `detached`, which doesn't.
    `sink` takes its per-sample gradients, `elements` is the largest size on their way. With
    `bundles`, which parameters alone have, `sink` takes them bundled too. What was made of
    parameters has the `version` that it had then.
    """

    tensor: Tensor
    detached: Tensor
    names: tuple[str, ...]
    elements: int
    sink: SampleGradientSink
    bundles: Bundles | None = None
    version: int | None = None

    @property
    def is_changed(self) -> bool:
        """Whether it was changed in place by way of another tensor with the same memory."""
        return self.version not in (None, self.tensor._version)  # noqa: SLF001


def call_detached(func: Any, args: Any, kwargs: Any, sources: Sequence[TracedParameter]) -> Any:
    """Call a function with the stand-ins of parameters; where it gives one back, that parameter."""
    detached = {id(s.tensor): s.detached for s in sources}
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: detached.get(id(t), t), (args, kwargs))
    own = {id(s.detached): s.tensor for s in sources}
    return pytree.tree_map_only(Tensor, lambda t: own.get(id(t), t), func(*args, **kwargs))


def derive(
    func: Any, args: Any, kwargs: Any, sources: Sequence[TracedParameter]
) -> tuple[Any, list[TracedParameter] | None]:
    """Call a function that no example goes into.

    Returns
    -------
    out
        What it gives.
    derived : list or None
        What is to be traced of that. None if the function changes what it was given in place, but
        for the one tensor that it also gives, made of parameters itself.
    """
    before = versions_of(args, kwargs)
    changed = args[0] if args and is_in_place(func, kwargs) else None
    # The gradient of a function in place is by what it was given, of which a copy is left.
    parents = [
        replace(s, detached=s.detached.clone()) if s.tensor is changed else s for s in sources
    ]
    may_change = any(s.tensor is changed and s.version is not None for s in sources)
    out = call_detached(func, args, kwargs, sources)
    if before != versions_of(args, kwargs) and not (may_change and out is changed):
        return out, None
    several = isinstance(out, list | tuple)
    known = {id(s.tensor) for s in sources if s.tensor is not changed}
    names = tuple(dict.fromkeys(name for s in sources for name in s.names))
    derived = []
    for index, made in enumerate(out if several else [out]):
        if isinstance(made, Tensor) and made.is_floating_point() and id(made) not in known:
            detached = made.detach()
            made.requires_grad_()
            sink = _pullback(func, args, kwargs, parents, index if several else None)
            elements = max(made.numel(), *(s.elements for s in sources))
            version = made._version  # noqa: SLF001
            derived.append(TracedParameter(made, detached, names, elements, sink, version=version))
    return out, derived


def versions_of(*arguments: Any) -> list[int]:
    """How often each tensor in arguments was changed in place."""
    return [t._version for t in tensors_in(arguments)]  # noqa: SLF001


def _pullback(
    func: Any, args: Any, kwargs: Any, parents: Sequence[TracedParameter], index: int | None
) -> SampleGradientSink:
    """What takes per-sample gradients of `func(*args, **kwargs)` on to those that it is made of."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    parents = list({id(s.tensor): s for s in parents}.values())
    places = [[i for i, leaf in enumerate(leaves) if leaf is s.tensor] for s in parents]
    in_place = is_in_place(func, kwargs)

    def again(*values: Tensor) -> Tensor:
        filled = list(leaves)
        for value, at in zip(values, places, strict=True):
            for i in at:
                filled[i] = value.clone() if in_place else value
        args, kwargs = pytree.tree_unflatten(filled, spec)
        made = func(*args, **kwargs)
        out: Tensor = made if index is None else made[index]
        return out

    def sink(rows: slice, grads: Tensor) -> None:
        pull = torch.func.vjp(again, *(s.detached for s in parents))[1]
        for source, values in zip(parents, torch.func.vmap(pull)(grads), strict=True):
            source.sink(rows, values)

    return sink
