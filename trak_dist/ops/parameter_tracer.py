"""Traces a forward pass: how parameters are used, and by which examples (for `ops.hooks`)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from trak_dist.errors import NotCovered
from trak_dist.listing import first_few
from trak_dist.ops import example_axis
from trak_dist.ops.bundles import Bundles
from trak_dist.ops.example_axis import ExampleAxis, RowsByExample, Untracked
from trak_dist.ops.gradients import GradientSink
from trak_dist.ops.layers import RULES
from trak_dist.ops.lifting import BroadcastDimension
from trak_dist.ops.parameter_use import ParameterUse
from trak_dist.ops.rewriting import rewrite_call
from trak_dist.ops.traced_parameter import (
    TracedParameter,
    call_detached,
    derive,
    versions_of,
)
from trak_dist.ops.tracking import depend_on_examples, escapes_tracking, track_call
from trak_dist.ops.tracking.call import is_in_place, name_of, tensors_in


@dataclass(frozen=True)
class _CallResult:
    """What a function gave, and the uses of parameters for it; saved tensors had those versions."""

    out: Any
    uses: list[ParameterUse] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)


class ParameterTracer(TorchFunctionMode):
    """Intercepts every call of a torch function, and traces parameters and batch through it."""

    def __init__(self, size: int, piece_elements: int) -> None:
        super().__init__()
        self.roots: list[Tensor] = []
        self.escaped_by: str | None = None  # what took values of examples out of sight
        self._size, self._piece_elements = size, piece_elements
        self._sources: dict[int, TracedParameter] = {}
        self._uncovered: dict[str, str] = {}

    def add_parameter(
        self, name: str, weight: Tensor, sink: GradientSink, bundles: Bundles | None
    ) -> None:
        """Trace one parameter, whose gradients `sink` gets."""

        def sink_of_rows(rows: slice, grads: Tensor) -> None:
            sink(name, rows, grads)

        self._sources[id(weight)] = TracedParameter(
            weight, weight.detach(), (name,), weight.numel(), sink_of_rows, bundles
        )

    def check_covered(self) -> None:
        """Raise `NotCovered` naming the first parameters with a use that has no rule, and it."""
        if self._uncovered:
            raise NotCovered(first_few([f"{n} (in {by})" for n, by in self._uncovered.items()], 2))

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensors = tensors_in((args, kwargs))
        sources = [self._sources[id(t)] for t in tensors if id(t) in self._sources]
        changed = [s for s in sources if s.is_changed]
        self._note_uncovered("a change in place by another name", changed)
        with_batch = depend_on_examples(tensors)
        if torch._C._are_functorch_transforms_active():  # noqa: SLF001
            self._note_uncovered("a transform of torch.func", sources)
            return func(*args, **kwargs)
        uses = bool(sources) and torch.is_grad_enabled() and func not in _DETACHING
        if with_batch and (others := self._other_calls(func, args, kwargs, sources, uses=uses)):
            with self:
                out = others()
            if out is not None:
                return out
        made: _CallResult | None = None
        if escapes_tracking(func, tensors):
            self.escaped_by = name_of(func)
        versions = versions_of(tensors)
        if not uses:
            out = func(*args, **kwargs)
        elif with_batch:
            made = self._call_with_parameters(func, args, kwargs, sources)
            out = made.out
        else:
            out, derived = derive(func, args, kwargs, sources)
            self._note_uncovered(name_of(func), sources if derived is None else ())
            self._sources |= {id(s.tensor): s for s in derived or ()}
        if func is Tensor.__iter__ and with_batch:  # its pieces are seen nowhere else
            pieces = tuple(out)
            track_call(Tensor.unbind, args, {}, pieces, versions)
            return iter(pieces)
        if with_batch:
            track_call(func, args, kwargs, out, versions)
        if made and made.uses:
            self._hook(made, name_of(func))
        return out

    def _other_calls(
        self, func: Any, args: Any, kwargs: Any, sources: Sequence[TracedParameter], *, uses: bool
    ) -> Callable[[], Any] | None:
        """The same call by others, if there are better ones; what they give may be None."""
        others = rewrite_call(func, args, kwargs, uses=uses)
        return others or (self._lifted_call(func, args, kwargs, sources) if uses else None)

    def _lifted_call(
        self, func: Any, args: Any, kwargs: Any, sources: Sequence[TracedParameter]
    ) -> Callable[[], Any] | None:
        """The same call with a copy for each example of what has no rule, if it broadcasts them."""
        if (where := BroadcastDimension.of(func, args, kwargs)) is None:
            return None
        ruled = {id(use.operand) for use in _uses(func, args, kwargs)}
        lifted = {id(s.tensor): s for s in sources if id(s.tensor) not in ruled}
        if not lifted or (id(args[0]) in lifted and is_in_place(func, kwargs)):
            return None
        copies: dict[int, Tensor] = {}
        for key, source in lifted.items():
            root = source.detached.detach().requires_grad_()
            if (found := where.lift(root)) is None:
                return None
            copy, use = found
            self.roots.append(root)
            example_axis.record_axis(copy, ExampleAxis(0, where.ids))
            of_source = [replace(use, operand=source.tensor)]
            self._hook(_CallResult(copy, of_source, versions_of(use.saved)), name_of(func))
            with self:
                copies[key] = copy.movedim(0, where.from_end)
        args, kwargs = pytree.tree_map_only(Tensor, lambda t: copies.get(id(t), t), (args, kwargs))
        return lambda: func(*args, **kwargs)

    def _call_with_parameters(
        self, func: Any, args: Any, kwargs: Any, sources: Sequence[TracedParameter]
    ) -> _CallResult:
        """Call a function that examples and parameters go into."""
        uses = _uses(func, args, kwargs)
        found = {id(use.operand) for use in uses}
        missing = [s for s in sources if id(s.tensor) not in found]
        traced_uses = [use for use in uses if id(use.operand) in self._sources]
        versions = versions_of([use.saved for use in traced_uses])
        before = versions_of(args, kwargs)
        out = call_detached(func, args, kwargs, sources)
        if missing and (tensors_in(out) or before != versions_of(args, kwargs)):
            self._note_uncovered(name_of(func), missing)
        if self._uncovered or not traced_uses:
            return _CallResult(out)
        in_place = any(out is t for t in tensors_in(args))
        if in_place and (out._is_view() or not out.requires_grad):  # noqa: SLF001
            # What is used later on is another tensor, whose gradient no hook would see.
            self._note_uncovered(name_of(func), sources)
            return _CallResult(out)
        if not out.requires_grad:
            self.roots.append(out.requires_grad_())
            out = out.clone()  # a leaf would refuse what a model does to it in place
        elif out._is_view():  # noqa: SLF001
            # As `linear` gives with a bias. A view that is changed in place forgets its hooks.
            out = torch.ops.aten._unsafe_view(out, out.shape)  # noqa: SLF001
        return _CallResult(out, traced_uses, versions)

    def _hook(self, made: _CallResult, by: str) -> None:
        """Have uses' gradients handed over when that of the function's result is known."""
        out, traced_uses, versions = made.out, made.uses, made.versions
        sources = [self._sources[id(use.operand)] for use in traced_uses]
        where = example_axis.axis_of(out)
        if not isinstance(where, ExampleAxis) or where.dim:
            since = f" after {where.by}" if isinstance(where, Untracked) and where.by != by else ""
            self._note_uncovered(f"{by}{since}", sources)
            return
        rows = RowsByExample(where.ids, self._size)

        def hook(grad: Tensor) -> None:
            names = ", ".join(name for s in sources for name in s.names)
            if versions != versions_of([use.saved for use in traced_uses]):
                raise NotCovered(f"{names} (its input was changed in place)")
            if rows.unowned_have_gradient(grad):
                raise NotCovered(f"{names} (in {by}, on rows that are of no example)")
            for use, source in zip(traced_uses, sources, strict=True):
                self._emit_gradients(use, source, grad, rows)
            # the graph keeps this function until its end: free the activations now
            traced_uses.clear()

        out.register_hook(hook)

    def _emit_gradients(
        self, use: ParameterUse, source: TracedParameter, grad: Tensor, rows: RowsByExample
    ) -> None:
        tensors = [rows.group(t) for t in (grad, *use.saved)]
        formula, elements = use.formula, source.elements
        if source.bundles and use.bundled:
            formula = functools.partial(use.bundled, source.bundles)
            elements = source.bundles.bundled_shape.numel()
        largest = max(elements, *(t[0].numel() for t in tensors))
        step = max(1, self._piece_elements // largest)
        for start in range(0, self._size, step):
            piece = slice(start, min(start + step, self._size))
            source.sink(piece, formula(*(t[piece] for t in tensors)))

    def _note_uncovered(self, by: str, sources: Sequence[TracedParameter]) -> None:
        for source in sources:
            for name in source.names:
                self._uncovered.setdefault(name, by)


def _uses(func: Any, args: Any, kwargs: Any) -> list[ParameterUse]:
    return list(RULES[func](*args, **kwargs)) if func in RULES else []


# Functions whose results are constants to autograd.
_DETACHING = {Tensor.detach, torch.detach, Tensor.data.__get__}  # type: ignore[attr-defined]
