"""Per-sample gradients from one batched forward and one backward pass.

The forward pass is watched: whatever function of torch a selected parameter goes into gives its
output a hook. In the backward pass, which computes gradients by activations only, the hook forms
the parameter's per-sample gradients by the function's rule (`ops.layers`), hands them over in
pieces, and lets go of them. So neither the (batch, p) matrix nor the summed weight gradients exist.

What is watched are functions and not modules, so `F.linear(x, self.fc.weight)`, tied weights and
modules used twice need no case of their own; a use without a rule is found, never passed over.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils import _pytree as pytree

from trak_dist.errors import NotCovered, ProblemError
from trak_dist.ops.attention import REWRITTEN
from trak_dist.ops.bundles import Bundles
from trak_dist.ops.gradients import Take, examples_in, select_params
from trak_dist.ops.layers import RULES
from trak_dist.ops.model_outputs import ModelOutput
from trak_dist.ops.use import Use

Receive = Callable[[slice, Float[Tensor, "rows ..."]], None]


class HookGradients:
    """Gradients by hooks, where every use of a selected parameter has a rule.

    Parameters
    ----------
    model : torch.nn.Module
        With its weights loaded, in `eval()`.
    model_output : ModelOutput
        With `get_batch_output`.
    params : sequence of str
        Globs that select parameters.
    piece_elements : int
        About how many numbers are handed over at a time; more where one example has more.
    bundles : callable
        Gives the bundles of a parameter, by its name and device, if its gradients are to be handed
        over bundled where they can be; by default none are.

    Raises
    ------
    NotCovered
        If the model output has no `get_batch_output`; when called, if a use has no rule.
    """

    def __init__(
        self,
        model: nn.Module,
        model_output: ModelOutput,
        params: Sequence[str],
        *,
        piece_elements: int,
        bundles: Callable[[str, torch.device], Bundles | None] = lambda *_: None,
    ) -> None:
        # TRAK's model outputs have no such method: it is optional.
        output = getattr(model_output, "get_batch_output", None)
        if output is None:
            raise NotCovered(f"{type(model_output).__qualname__} has no get_batch_output")
        self._output: Callable[..., Tensor] = output
        self._model = model
        self._weights = {n: p.detach() for n, p in model.named_parameters()}
        self._buffers = {n: b.detach() for n, b in model.named_buffers()}
        self._selected = select_params(model, params)
        self._piece_elements = piece_elements
        self._bundles = bundles

    def __call__(self, batch: Sequence[Any], take: Take) -> Float[Tensor, " batch"]:
        """See `GradientComputer`."""
        size = examples_in(batch)
        watch = _Watch(size, self._piece_elements)
        for name in self._selected:
            weight = self._weights[name]
            watch.add_parameter(name, weight, take, self._bundles(name, weight.device))
        batch = pytree.tree_map_only(Tensor, _of_batch, tuple(batch))
        with torch.enable_grad(), watch:
            f = self._output(self._model, self._weights, self._buffers, batch)
        watch.refuse_uncovered()
        if f.numel() != size:
            raise ProblemError(
                f"get_batch_output gave {tuple(f.shape)} for {size} examples",
                where="the model output",
                next="it must give one value for each example: no mean over the batch",
            )
        if watch.roots:
            torch.autograd.grad(f, watch.roots, torch.ones_like(f), allow_unused=True)
        return f.detach().reshape(size)


@dataclass(frozen=True)
class _Source:
    """A parameter, or what was made of parameters alone; `tensor` keeps its id from being reused.

    `receive` takes its per-sample gradients, `elements` is the largest size on their way. With
    `bundles`, which parameters alone have, `receive` takes them bundled too.
    """

    tensor: Tensor
    names: tuple[str, ...]
    elements: int
    receive: Receive
    bundles: Bundles | None = None


class _Watch(TorchFunctionMode):
    """Sees every call of a torch function, and follows parameters and batch through them."""

    def __init__(self, size: int, piece_elements: int) -> None:
        super().__init__()
        self.roots: list[Tensor] = []
        self._size, self._piece_elements = size, piece_elements
        self._sources: dict[int, _Source] = {}
        self._uncovered: dict[str, str] = {}

    def add_parameter(self, name: str, weight: Tensor, take: Take, bundles: Bundles | None) -> None:
        """Follow one parameter, whose gradients `take` gets."""

        def receive(rows: slice, grads: Tensor) -> None:
            take(name, rows, grads)

        self._sources[id(weight)] = _Source(weight, (name,), weight.numel(), receive, bundles)

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
        tensors = list(_tensors((*args, *kwargs.values())))
        sources = [self._sources[id(t)] for t in tensors if id(t) in self._sources]
        with_batch = any(map(_is_of_batch, tensors))
        if not (sources and torch.is_grad_enabled()):
            out = func(*args, **kwargs)
        elif not with_batch:
            out = self._made_of_parameters(func, args, kwargs, sources)
        else:
            if func in REWRITTEN:
                with self:
                    out = REWRITTEN[func](*args, **kwargs)
                if out is not None:
                    return out
            out = self._used(func, args, kwargs, sources)
        if with_batch:
            pytree.tree_map_only(Tensor, _mark, out)
            if out is None:  # x[i] = y
                _mark(tensors[0])
        return out

    def _made_of_parameters(
        self, func: Any, args: Any, kwargs: Any, sources: Sequence[_Source]
    ) -> Any:
        """Call a function that no example goes into; what it gives is a source itself."""
        before = [s.tensor._version for s in sources]  # noqa: SLF001
        out = func(*args, **kwargs)
        if before != [s.tensor._version for s in sources]:  # noqa: SLF001
            self._note_uncovered(func, sources)
        several = isinstance(out, list | tuple)
        for index, made in enumerate(out if several else [out]):
            if not isinstance(made, Tensor) or id(made) in self._sources:
                continue
            if made.is_floating_point():
                receive = _pullback(func, args, kwargs, sources, index if several else None)
                names = tuple(dict.fromkeys(n for s in sources for n in s.names))
                elements = max(made.numel(), *(s.elements for s in sources))
                self._sources[id(made)] = _Source(made, names, elements, receive)
        return out

    def _used(self, func: Any, args: Any, kwargs: Any, sources: Sequence[_Source]) -> Any:
        """Call a function that examples go into, and hook its output."""
        uses = list(RULES[func](*args, **kwargs)) if func in RULES else []
        found = {id(use.operand) for use in uses}
        missing = [s for s in sources if id(s.tensor) not in found]
        ours = [use for use in uses if id(use.operand) in self._sources]
        versions = [t._version for use in ours for t in use.saved]  # noqa: SLF001
        out = func(*args, **kwargs)
        if missing and any(isinstance(t, Tensor) for t in pytree.tree_leaves(out)):
            self._note_uncovered(func, missing)
        if self._uncovered or not ours:
            return out
        if not out.requires_grad:
            if any(out is t for t in _tensors(args)):  # in place: it can't become another tensor
                self._note_uncovered(func, sources)
                return out
            self.roots.append(out.requires_grad_())
            out = out.clone()  # a leaf would refuse what a model does to it in place

        def hook(grad: Tensor) -> None:
            if versions != [t._version for use in ours for t in use.saved]:  # noqa: SLF001
                names = ", ".join(n for s in sources for n in s.names)
                raise NotCovered(f"{names} (its input was changed in place)")
            for use in ours:
                self._hand_over(use, self._sources[id(use.operand)], grad)
            ours.clear()  # the graph keeps this function until its end: free the activations now

        out.register_hook(hook)
        return out

    def _hand_over(self, use: Use, source: _Source, grad: Tensor) -> None:
        tensors = [self._by_example(t, source) for t in (grad, *use.saved)]
        formula, elements = use.formula, source.elements
        if source.bundles and use.bundled:
            formula = functools.partial(use.bundled, source.bundles)
            elements = source.bundles.bundled_shape.numel()
        largest = max(elements, *(t[0].numel() for t in tensors))
        rows = max(1, self._piece_elements // largest)
        for start in range(0, self._size, rows):
            piece = slice(start, min(start + rows, self._size))
            source.receive(piece, formula(*(t[piece] for t in tensors)))

    def _by_example(self, tensor: Tensor, source: _Source) -> Tensor:
        if not tensor.ndim or len(tensor) % self._size:
            names = ", ".join(source.names)
            raise NotCovered(f"{names} (used on {tuple(tensor.shape)}, not on examples)")
        return tensor.reshape(self._size, len(tensor) // self._size, *tensor.shape[1:])

    def _note_uncovered(self, func: Any, sources: Sequence[_Source]) -> None:
        by = resolve_name(func) or getattr(func, "__name__", str(func))
        for source in sources:
            for name in source.names:
                self._uncovered.setdefault(name, by)


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
        pull = torch.func.vjp(again, *(s.tensor for s in parents))[1]
        for source, values in zip(parents, torch.func.vmap(pull)(grads), strict=True):
            source.receive(rows, values)

    return receive


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
        elif isinstance(value, dict):
            yield from _tensors(list(value.values()))


# Whether a tensor depends on the batch is noted on the tensor: its id may be another's later on.
def _mark(tensor: Tensor) -> Tensor:
    tensor._of_batch = True  # type: ignore[attr-defined]  # noqa: SLF001
    return tensor


def _of_batch(tensor: Tensor) -> Tensor:
    return _mark(tensor.view_as(tensor))


def _is_of_batch(tensor: Tensor) -> bool:
    return hasattr(tensor, "_of_batch")
