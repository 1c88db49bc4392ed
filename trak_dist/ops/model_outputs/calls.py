"""How a model is called with a batch of inputs and labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from trak_dist.errors import ProblemError
from trak_dist.ops.model_outputs.protocol import Weights


def predicted(
    model: nn.Module, weights: Weights, buffers: Weights, batch: Sequence[Any]
) -> tuple[Tensor, Tensor]:
    """What a model gives of a batch, half types in float32, and the batch's labels.

    A batch is (inputs, …, labels), or one mapping of the model's arguments and `labels`.

    Raises
    ------
    ProblemError
        If the batch has no labels.
    """
    arguments, keywords, labels = inputs_and_labels(batch)
    state = ({**weights}, {**buffers})
    return numbers_of(functional_call(model, state, arguments, keywords)), labels


def inputs_and_labels(
    batch: Sequence[Any],
) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
    """A model's arguments, those by name, and the labels."""
    if not isinstance(batch[0], Mapping):
        if len(batch) < 2:
            raise _no_labels("(inputs,)")
        return tuple(batch[:-1]), {}, batch[-1]
    inputs = dict(batch[0])
    if "labels" not in inputs:
        raise _no_labels(f"a mapping of {', '.join(map(str, inputs))}")
    labels = inputs.pop("labels")
    return (), inputs, labels


def with_labels(batch: Sequence[Any], labels: Tensor) -> Sequence[Any]:
    """The batch with other labels."""
    if isinstance(batch[0], Mapping):
        return ({**batch[0], "labels": labels},)
    return *batch[:-1], labels


def numbers_of(found: Any) -> Tensor:
    """The tensor in what a model returned: its `logits`, its "out", or itself; at least float32."""
    if isinstance(found, Mapping) and "out" in found:  # as torchvision's segmentation models do
        found = found["out"]
    logits = getattr(found, "logits", found)
    if not isinstance(logits, Tensor):
        raise ProblemError(
            f"the model returned {type(found).__name__}, which is no tensor and has no `logits`",
            where="the model",
            next="let it return a tensor, or something with `logits`",
        )
    return logits.float() if logits.dtype.itemsize < 4 else logits


def nan_unless(valid: Tensor, values: Tensor) -> Tensor:
    """Values, NaN with a gradient of NaN where they are not valid: found, and the row named.

    A label that is none must not pass for one. By `torch.where` the gradient would be 0.
    """
    return values * torch.where(valid, 1.0, torch.nan)


def check_shapes(labels: Tensor, wanted: torch.Size, found: Tensor) -> None:
    """Raise `ProblemError` if labels do not have the shape that goes with what was `found`."""
    if labels.shape != wanted:
        raise ProblemError(
            f"labels of shape {tuple(labels.shape)} with predictions of shape "
            f"{tuple(found.shape)}, for which they must be {tuple(wanted)}",
            where="the batch",
            next="give labels of that shape",
        )


def _no_labels(found: str) -> ProblemError:
    return ProblemError(
        f"a batch without labels: {found}",
        where="the batch",
        next="(inputs, labels), or one mapping of the model's arguments and `labels`",
    )
