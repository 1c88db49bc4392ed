"""A call of a function of torch, as the rules see it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.overrides import resolve_name
from torch.utils import _pytree as pytree

from trak_dist.ops.example_axis import AxisInfo, ExampleAxis, Untracked, axis_of


@dataclass(frozen=True)
class Call:
    """A call, and what it gave."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any

    @property
    def first(self) -> Tensor:
        """The tensor that it works on."""
        first_argument = self.args[0] if self.args else None
        return first_argument if isinstance(first_argument, Tensor) else self.tensors[0]

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors that go into it."""
        return tensors_in((self.args, self.kwargs))

    @property
    def outs(self) -> list[Tensor]:
        """All tensors that come out of it; what `x[i] = y` changed."""
        return [self.args[0]] if self.out is None else tensors_in(self.out)

    @property
    def tracked_operands(self) -> list[tuple[Tensor, ExampleAxis]]:
        """The inputs that depend on examples, and their axes."""
        return [(t, found) for t in self.tensors if isinstance(found := axis_of(t), ExampleAxis)]

    def get(self, position: int, *names: str, default: Any = None) -> Any:
        """An argument, by its position or one of its names."""
        if position < len(self.args):
            return self.args[position]
        return next((self.kwargs[n] for n in names if n in self.kwargs), default)

    def untracked(self) -> Untracked:
        """Its result, where examples are no longer separable."""
        return Untracked(name_of(self.func))


Rule = Callable[[Call], AxisInfo | list[AxisInfo]]


def name_of(func: Any) -> str:
    """A function's name, for people."""
    return str(resolve_name(func)) if resolve_name(func) else getattr(func, "__name__", str(func))


def is_in_place(func: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether a call changes its first operand, by its name or as it says: `add_`, `__iadd__`."""
    name = name_of(func).rpartition(".")[2]
    by_name = name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))
    return by_name or bool(kwargs.get("inplace"))


def tensors_in(values: Any) -> list[Tensor]:
    """All tensors in nested lists, tuples and dicts."""
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]
