"""Restores models after forward passes that change them."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import checkpoint as checkpointing

from trak_dist.errors import ProblemError
from trak_dist.listing import first_few


def copy_model(model: nn.Module, *, shared: Iterable[Tensor] = ()) -> nn.Module:
    """A copy of a model, even if modules hold results of the last forward pass.

    As torch's old weight norm does, whose tensors `copy.deepcopy` refuses. The tensors `shared` are
    not copied.
    """
    memo = {id(tensor): tensor for tensor in shared}
    memo |= {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    return copy.deepcopy(model, memo)


class ModelStateGuard:
    """Restores a model after each pass.

    `torch.func.functional_call` leaves what it was given in a module that has two names, and
    forward passes count calls, average, or renormalise a table. Buffers and such tables are put
    back; another weight that a forward pass changes is an error.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._slots = [
            (cast("dict[str, Any]", slots), dict(slots))
            for module in model.modules()
            for slots in (module._parameters, module._buffers)  # noqa: SLF001
            if slots
        ]
        renormed = [
            m.weight
            for m in model.modules()
            if isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.max_norm is not None
        ]
        self._names = dict((*model.named_parameters(), *model.named_buffers()))
        self._copies = {id(t): t.detach().clone() for t in (*model.buffers(), *renormed)}

    @contextlib.contextmanager
    def preserve(self) -> Iterator[None]:
        """Around a pass.

        Raises
        ------
        ProblemError
            If it changed weights in place, of which there is no copy.
        """
        before = [t._version for t in self._names.values()]  # noqa: SLF001
        try:
            with _activations_kept():
                yield
        finally:
            for slots, own in self._slots:
                slots.update(own)
            changed = [
                (name, tensor)
                for (name, tensor), version in zip(self._names.items(), before, strict=True)
                if tensor._version != version  # noqa: SLF001
            ]
            for _, tensor in changed:
                if id(tensor) in self._copies:
                    with torch.no_grad():
                        tensor.copy_(self._copies[id(tensor)])
        unrestorable = [name for name, tensor in changed if id(tensor) not in self._copies]
        if unrestorable:
            raise ProblemError(
                f"the forward pass changes weights in place: {first_few(unrestorable, 5)}",
                where=type(self._model).__qualname__,
                next="let it work on a copy, in eval() at least: gradients are of a checkpoint",
            )


@contextlib.contextmanager
def _activations_kept() -> Iterator[None]:
    """Activation checkpointing switched off: hooks hold what it would compute again.

    With `use_reentrant=True` it refuses `torch.autograd.grad` besides.
    """
    names = ("CheckpointFunction", "_checkpoint_without_reentrant_generator")
    own = {name: getattr(checkpointing, name) for name in names}
    for name, plain in zip(names, (_Called, _nothing_saved), strict=True):
        setattr(checkpointing, name, plain)
    try:
        yield
    finally:
        for name, value in own.items():
            setattr(checkpointing, name, value)


class _Called:
    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:  # noqa: ARG004
        return function(*args)


def _nothing_saved(*_: Any, **__: Any) -> Iterator[None]:
    yield
