"""Labels that are none of the model's: their output is NaN, and here they are named."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trak_dist.ops.batches import clone_batch
from trak_dist.ops.model_outputs.preparation import prepared
from trak_dist.ops.model_outputs.protocol import ModelOutput, Weights, own_method


@dataclass(frozen=True)
class BadLabel:
    """A label of the example `at` in a batch, and why it is none."""

    at: int
    label: float
    why: str

    def of(self, row: int, split: str) -> str:
        """It in words, of a row of a split."""
        return f"label {self.label:g} of row {row} of {split!r}, {self.why}"


class KnownLabels(ABC):
    """The part of a model output that knows which labels its model can have."""

    @abstractmethod
    def _logits_and_labels(
        self, model: nn.Module, weights: Weights, buffers: Weights, batch: Sequence[Any]
    ) -> tuple[Tensor, Tensor]:
        """The logits, and the labels that they are for."""

    @abstractmethod
    def _is_label(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Which labels are one, or do not count: a bool for each."""

    @abstractmethod
    def _labels_are(self, logits: Tensor) -> str:
        """Why one that is not is none, in words."""

    def get_bad_label(
        self, model: nn.Module, weights: Weights, buffers: Weights, batch: Sequence[Any]
    ) -> BadLabel | None:
        """The first label of a batch that is none."""
        logits, labels = self._logits_and_labels(model, weights, buffers, batch)
        bad = (~self._is_label(logits, labels)).nonzero()
        if not len(bad):
            return None
        return BadLabel(int(bad[0, 0]), float(labels[tuple(bad[0])]), self._labels_are(logits))


def bad_label(model_output: ModelOutput, model: nn.Module, batch: Sequence[Any]) -> BadLabel | None:
    """The first label of a batch that the model can't have, if the model output can tell."""
    get_bad_label = own_method(prepared(model_output, model), "get_bad_label")
    if get_bad_label is None:
        return None
    state = dict(model.named_parameters()), dict(model.named_buffers())
    with torch.no_grad():
        found: BadLabel | None = get_bad_label(model, *state, clone_batch(batch))
    return found
