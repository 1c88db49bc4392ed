"""Model outputs that need something of the weights before any example: prepared, and never stale.

A model output may have `prepare(model, weights, buffers)`, which returns a model output for these
weights: itself with whatever it computed of them, held constant. Whatever computes an output, its
gradients or its out-to-loss calls `prepared` first. What was prepared is kept for a model until any
of its tensors changes; a copy of a model has its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from trak_dist.errors import ProblemError
from trak_dist.ops.model_state import ModelStateGuard

if TYPE_CHECKING:
    from trak_dist.ops.model_outputs.protocol import ModelOutput

Output = TypeVar("Output", bound="ModelOutput")
Versions = tuple[tuple[int, int], ...]


@dataclass
class _OfWeights:
    """What was prepared of one state of a model; by the address of the output, which it holds."""

    versions: Versions
    outputs: dict[int, tuple[ModelOutput, ModelOutput]] = field(default_factory=dict)


_known: WeakKeyDictionary[nn.Module, _OfWeights] = WeakKeyDictionary()


def prepared(model_output: Output, model: nn.Module) -> Output:
    """`model_output` for the weights that `model` has now; itself if it has no `prepare`.

    Parameters
    ----------
    model_output : ModelOutput
        As the problem has it.
    model : torch.nn.Module
        With its weights loaded, in `eval()`. It is left as it is.

    Raises
    ------
    ProblemError
        If `prepare` returns no model output.
    """
    prepare = getattr(model_output, "prepare", None)
    if prepare is None:
        return model_output
    known = _known.get(model)
    if known is not None and known.versions == _versions(model):
        found = known.outputs.get(id(model_output))
        if found is not None:
            return found[1]  # type: ignore[return-value]
    weights = {n: p.detach() for n, p in model.named_parameters()}
    buffers = {n: b.detach() for n, b in model.named_buffers()}
    with torch.no_grad(), ModelStateGuard(model).preserve():
        ready: Output = prepare(model, weights, buffers)
    if not hasattr(ready, "get_output"):
        raise ProblemError(
            f"prepare returned {type(ready).__name__}, not a model output",
            where=type(model_output).__qualname__,
            next="return a copy of the output that holds what these weights give: another "
            "checkpoint is prepared beside it",
        )
    now = _versions(model)  # a pass that puts back a buffer is seen as a change
    known = _known.get(model)
    if known is None or known.versions != now:
        known = _known[model] = _OfWeights(now)
    known.outputs[id(model_output)] = model_output, ready
    return ready


def forget(model: nn.Module) -> None:
    """Drop what was prepared of a model's weights: others were loaded, by whatever code."""
    _known.pop(model, None)


def _versions(model: nn.Module) -> Versions:
    tensors = (*model.parameters(), *model.buffers())
    return tuple((_address(t), t._version) for t in tensors)  # noqa: SLF001


def _address(tensor: Tensor) -> int:
    return tensor.data_ptr() if tensor.layout is torch.strided else id(tensor)
