"""A forward pass watched: what parameters are used for, and by which examples (for `ops.hooks`)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from trak_dist.errors import NotCovered
from trak_dist.ops import examples
from trak_dist.ops.bundles import Bundles
from trak_dist.ops.examples import Along, Lost, Rows
from trak_dist.ops.following import follow, holds_examples, loses_sight
from trak_dist.ops.following.call import name_of, tensors_in
from trak_dist.ops.gradients import Take
from trak_dist.ops.layers import RULES
from trak_dist.ops.rewriting import rewritten
from trak_dist.ops.use import Use

Receive = Callable[[slice, Float[Tensor, "rows ..."]], None]


@dataclass(frozen=True)
class _Source:
    """A parameter, or what was made of parameters alone; `tensor` keeps its id from being reused.

    It requires gradients, so that what torch shows to nobody makes of it is found by its `grad_fn`;
    functions get its stand-in `plain`, which doesn't.
    `receive` takes its per-sample gradients, `elements` is the largest size on their way. With
    `bundles`, which parameters alone have, `receive` takes them bundled too.
    """

    tensor: Tensor
    plain: Tensor
    names: tuple[str, ...]
    elements: int
    receive: Receive
    bundles: Bundles | None = None


@dataclass(frozen=True)
class _Made:
    """What a function gave, and the uses of parameters for it; saved tensors had those versions."""

    out: Any
    uses: list[Use] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)


class Watch(TorchFunctionMode):
    """Sees every call of a torch function, and follows parameters and batch through them."""

    def __init__(self, size: int, piece_elements: int) -> None:
        super().__init__()
        self.roots: list[Tensor] = []
        self.unseen: str | None = None  # what took values of examples out of sight
        self._size, self._piece_elements = size, piece_elements
        self._sources: dict[int, _Source] = {}
        self._uncovered: dict[str, str] = {}

    def add_parameter(self, name: str, weight: Tensor, take: Take, bundles: Bundles | None) -> None:
        """Follow one parameter, whose gradients `take` gets."""

        def receive(rows: slice, grads: Tensor) -> None:
            take(name, rows, grads)

        self._sources[id(weight)] = _Source(
            weight, weight.detach(), (name,), weight.numel(), receive, bundles
        )

    def refuse_uncovered(self) -> None:
        """Raise `NotCovered` naming every parameter with a use that has no rule."""
        if self._uncovered:
            raise NotCovered(", ".join(f"{n} (in {by})" for n, by in self._uncovered.items()))

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
        with_batch = holds_examples(tensors)
        if torch._C._are_functorch_transforms_active():  # noqa: SLF001
            if sources:
                self._note_uncovered("a transform of torch.func", sources)
            return func(*args, **kwargs)
        uses = bool(sources) and torch.is_grad_enabled() and func not in _CUT
        if with_batch and (others := rewritten(func, args, kwargs, uses=uses)):
            with self:
                out = others()
            if out is not None:
                return out
        made: _Made | None = None
        if loses_sight(func, tensors):
            self.unseen = name_of(func)
        versions = [t._version for t in tensors]  # noqa: SLF001
        if not uses:
            out = func(*args, **kwargs)
        elif with_batch:
            made = self._called(func, args, kwargs, sources)
            out = made.out
        else:
            out = self._made_of_parameters(func, args, kwargs, sources)
        if func is Tensor.__iter__ and with_batch:  # its pieces are seen nowhere else
            pieces = tuple(out)
            follow(Tensor.unbind, args, {}, pieces, versions)
            return iter(pieces)
        if with_batch:
            follow(func, args, kwargs, out, versions)
        if made and made.uses:
            self._hook(made, name_of(func))
        return out

    def _made_of_parameters(
        self, func: Any, args: Any, kwargs: Any, sources: Sequence[_Source]
    ) -> Any:
        """Call a function that no example goes into; what it gives is a source itself."""
        before = _versions(args, kwargs)
        out = _on_plain(func, args, kwargs, sources)
        if before != _versions(args, kwargs):
            self._note_uncovered(name_of(func), sources)
            return out
        several = isinstance(out, list | tuple)
        for index, made in enumerate(out if several else [out]):
            if not isinstance(made, Tensor) or id(made) in self._sources:
                continue
            if made.is_floating_point():
                plain = made.detach()
                made.requires_grad_()
                receive = _pullback(func, args, kwargs, sources, index if several else None)
                names = tuple(dict.fromkeys(n for s in sources for n in s.names))
                elements = max(made.numel(), *(s.elements for s in sources))
                self._sources[id(made)] = _Source(made, plain, names, elements, receive)
        return out

    def _called(self, func: Any, args: Any, kwargs: Any, sources: Sequence[_Source]) -> _Made:
        """Call a function that examples and parameters go into."""
        uses = list(RULES[func](*args, **kwargs)) if func in RULES else []
        found = {id(use.operand) for use in uses}
        missing = [s for s in sources if id(s.tensor) not in found]
        ours = [use for use in uses if id(use.operand) in self._sources]
        versions = [t._version for use in ours for t in use.saved]  # noqa: SLF001
        before = _versions(args, kwargs)
        out = _on_plain(func, args, kwargs, sources)
        if missing and (tensors_in(out) or before != _versions(args, kwargs)):
            self._note_uncovered(name_of(func), missing)
        if self._uncovered or not ours:
            return _Made(out)
        in_place = any(out is t for t in tensors_in(args))
        if in_place and (out._is_view() or not out.requires_grad):  # noqa: SLF001
            # What is used later on is another tensor, whose gradient no hook would see.
            self._note_uncovered(name_of(func), sources)
            return _Made(out)
        if not out.requires_grad:
            self.roots.append(out.requires_grad_())
            out = out.clone()  # a leaf would refuse what a model does to it in place
        elif out._is_view():  # noqa: SLF001
            # As `linear` gives with a bias. A view that is changed in place forgets its hooks.
            out = torch.ops.aten._unsafe_view(out, out.shape)  # noqa: SLF001
        return _Made(out, ours, versions)

    def _hook(self, made: _Made, by: str) -> None:
        """Have uses' gradients handed over when that of the function's result is known."""
        out, ours, versions = made.out, made.uses, made.versions
        sources = [self._sources[id(use.operand)] for use in ours]
        where = examples.of(out)
        if not isinstance(where, Along) or where.dim:
            since = f" after {where.by}" if isinstance(where, Lost) and where.by != by else ""
            self._note_uncovered(f"{by}{since}", sources)
            return
        rows = Rows(where.ids, self._size)

        def hook(grad: Tensor) -> None:
            names = ", ".join(name for s in sources for name in s.names)
            if versions != [t._version for use in ours for t in use.saved]:  # noqa: SLF001
                raise NotCovered(f"{names} (its input was changed in place)")
            if rows.left_out(grad):
                raise NotCovered(f"{names} (in {by}, on rows that are of no example)")
            for use, source in zip(ours, sources, strict=True):
                self._hand_over(use, source, grad, rows)
            ours.clear()  # the graph keeps this function until its end: free the activations now

        out.register_hook(hook)

    def _hand_over(self, use: Use, source: _Source, grad: Tensor, rows: Rows) -> None:
        tensors = [rows.dealt(t) for t in (grad, *use.saved)]
        formula, elements = use.formula, source.elements
        if source.bundles and use.bundled:
            formula = functools.partial(use.bundled, source.bundles)
            elements = source.bundles.bundled_shape.numel()
        largest = max(elements, *(t[0].numel() for t in tensors))
        step = max(1, self._piece_elements // largest)
        for start in range(0, self._size, step):
            piece = slice(start, min(start + step, self._size))
            source.receive(piece, formula(*(t[piece] for t in tensors)))

    def _note_uncovered(self, by: str, sources: Sequence[_Source]) -> None:
        for source in sources:
            for name in source.names:
                self._uncovered.setdefault(name, by)


# Functions whose results are constants to autograd.
_CUT = {Tensor.detach, torch.detach, Tensor.data.__get__}  # type: ignore[attr-defined]


def _versions(*arguments: Any) -> list[int]:
    return [t._version for t in tensors_in(arguments)]  # noqa: SLF001


def _on_plain(func: Any, args: Any, kwargs: Any, sources: Sequence[_Source]) -> Any:
    """Call a function with the stand-ins of parameters; where it gives one back, that parameter."""
    plain = {id(s.tensor): s.plain for s in sources}
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: plain.get(id(t), t), (args, kwargs))
    own = {id(s.plain): s.tensor for s in sources}
    return pytree.tree_map_only(Tensor, lambda t: own.get(id(t), t), func(*args, **kwargs))


def _pullback(
    func: Any, args: Any, kwargs: Any, sources: Sequence[_Source], index: int | None
) -> Receive:
    """What takes per-sample gradients of `func(*args, **kwargs)` on to those that it is made of."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    parents = list({id(s.tensor): s for s in sources}.values())
    places = [[i for i, leaf in enumerate(leaves) if leaf is s.tensor] for s in parents]

    def again(*values: Tensor) -> Tensor:
        filled = list(leaves)
        for value, at in zip(values, places, strict=True):
            for i in at:
                filled[i] = value
        args, kwargs = pytree.tree_unflatten(filled, spec)
        made = func(*args, **kwargs)
        out: Tensor = made if index is None else made[index]
        return out

    def receive(rows: slice, grads: Tensor) -> None:
        pull = torch.func.vjp(again, *(s.plain for s in parents))[1]
        for source, values in zip(parents, torch.func.vmap(pull)(grads), strict=True):
            source.receive(rows, values)

    return receive
