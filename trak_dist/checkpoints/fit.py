"""Whether a part of a state dict fits a model, by what torch's own loading would take."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from trak_dist.checkpoints.names import Part, State

_EXTRA_STATE = "_extra_state"  # how torch ends the name of what `get_extra_state` gives


class Fault(NamedTuple):
    """What does not fit; `surplus` if it is only that the model has no such tensor."""

    text: str
    surplus: bool = False


class Fit:
    """Whether a part of a state dict fits a model, which stays as it is.

    `matched_ids` are the ids of the model's tensors that it gives a value, `faults` what does not
    fit.
    """

    def __init__(self, part: Part, model: nn.Module, own: Mapping[str, Tensor]) -> None:
        self.part, state = part, part.state
        shared = state.keys() & own.keys()
        others = {k for k in shared if state[k].shape != own[k].shape}
        self.matched_ids = {id(own[k]) for k in shared - others}
        faults = [
            *self._missing(own, own.keys() - state.keys()),
            *self._unexpected(state.keys() - own.keys()),
            *(
                Fault(f"{k} has shape {tuple(state[k].shape)}, the model's {tuple(own[k].shape)}")
                for k in others
            ),
        ]
        self.faults = (
            self._faults_after_torch_load(model, own, faults)
            if faults
            else _broken_ties(state, own)
        )
        self.fits = bool(self.matched_ids) and not self.faults

    def _faults_after_torch_load(
        self, model: nn.Module, own: Mapping[str, Tensor], faults: list[Fault]
    ) -> list[Fault]:
        """The faults that remain after its modules have read older names and versions."""
        state = self.part.state
        extra = {name for name in state if name.endswith(_EXTRA_STATE)}
        # Copies, since some modules write into what they read.
        tensors = {name: t.clone() for name, t in state.items() if name not in extra}
        noted = _CopyRecorder((*own.values(), *model.buffers()))
        try:
            with noted:
                found = model.load_state_dict(State(tensors, state.metadata), strict=False)
            missing, unexpected = set(found.missing_keys), set(found.unexpected_keys)
        except Exception as error:  # other sizes, or hooks of the model may raise anything
            by_size = str(error).startswith("Error(s) in loading state_dict")
            return faults if by_size else [*faults, Fault(f"loading it raises {one_line(error)}")]
        self.matched_ids = noted.matched_ids | {id(own[name]) for name in extra & own.keys()}
        return [
            *self._missing(own, (missing & own.keys()) - extra),
            *self._unexpected(unexpected | (extra - own.keys())),
            *_broken_ties(state, own),
        ]

    def _missing(self, own: Mapping[str, Tensor], names: Iterable[str]) -> list[Fault]:
        """The required ones of `names`: neither frozen, nor tied to a tensor that is there."""
        needed = (k for k in names if id(own[k]) not in self.matched_ids and not is_frozen(own[k]))
        return [Fault(f"missing {k} {tuple(own[k].shape)}") for k in needed]

    def _unexpected(self, names: Iterable[str]) -> list[Fault]:
        state = self.part.state
        shapes = ((k, tuple(state[k].shape) if k in state else "") for k in names)
        return [Fault(f"unexpected {k} {shape}", surplus=True) for k, shape in shapes]


class _CopyRecorder(TorchFunctionMode):
    """Records which tensors would be written, and copies nothing."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self._tensors = {id(tensor): tensor for tensor in tensors}
        self.matched_ids: set[int] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is Tensor.copy_ and id(args[0]) in self._tensors:
            if id(args[1]) not in self._tensors:  # else a default: the model's own value
                self.matched_ids.add(id(args[0]))
            return args[0]
        return func(*args, **(kwargs or {}))


def same_weights(one: State, other: State) -> bool:
    """Whether two parts are the same weights, as of a module that has two names."""
    return one.keys() == other.keys() and all(
        a is b or (a.dtype == b.dtype and torch.equal(a, b))
        for a, b in ((one[name], other[name]) for name in one)
    )


def one_line(error: Exception) -> str:
    """Its type and message on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _broken_ties(state: State, own: Mapping[str, Tensor]) -> list[Fault]:
    """Tensors that are one in the model, and differ in the checkpoint."""
    first: dict[int, str] = {}
    pairs = ((name, first.setdefault(id(own[name]), name)) for name in own if name in state)
    return [
        Fault(f"{other} and {name} are one tensor in the model, and two in the checkpoint")
        for name, other in pairs
        if name != other and not same_weights(State({"": state[name]}), State({"": state[other]}))
    ]


def is_frozen(tensor: Tensor) -> bool:
    """Whether it is a parameter without gradients, which a checkpoint may lack."""
    return isinstance(tensor, nn.Parameter) and not tensor.requires_grad
