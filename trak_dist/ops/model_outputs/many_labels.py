"""Model outputs whose f is a sum, or a mean, of log-likelihoods of an example's labels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trak_dist.ops import draws
from trak_dist.ops.model_outputs.calls import predicted, with_labels
from trak_dist.ops.model_outputs.labels import KnownLabels
from trak_dist.ops.model_outputs.losses import NegativeLoss
from trak_dist.ops.model_outputs.protocol import Weights


class ManyLabels(KnownLabels, NegativeLoss, ABC):
    """F = Σ or mean of log p(label | input); Fisher rows by labels drawn from the prediction."""

    @abstractmethod
    def _log_likelihoods(
        self, logits: Tensor, labels: Tensor
    ) -> tuple[Float[Tensor, "batch labels"], Float[Tensor, " batch"]]:
        """Of each label, 0 of one that does not count; and what their sum is divided by."""

    @abstractmethod
    def _draw(self, logits: Tensor, labels: Tensor, uniform: draws.Uniform) -> Tensor:
        """Labels drawn from the prediction, where labels count."""

    def _logits_and_labels(
        self, model: nn.Module, weights: Weights, buffers: Weights, batch: Sequence[Any]
    ) -> tuple[Tensor, Tensor]:
        """The logits, and the labels that they are for."""
        return predicted(model, weights, buffers, batch)

    def _with_labels(self, batch: Sequence[Any], labels: Tensor) -> Sequence[Any]:
        """The batch with other labels, and inputs as they are."""
        return with_labels(batch, labels)

    def get_batch_output(
        self, model: nn.Module, weights: Weights, buffers: Weights, batch: Sequence[Any]
    ) -> Float[Tensor, " batch"]:
        """F of each example, from one forward pass.

        Raises
        ------
        ProblemError
            If the shapes of logits and labels do not go together.
        """
        each, count = self._log_likelihoods(
            *self._logits_and_labels(model, weights, buffers, batch)
        )
        return each.sum(1) / count

    def draw_labels(
        self,
        model: nn.Module,
        weights: Weights,
        buffers: Weights,
        batch: Sequence[Any],
        uniform: draws.Uniform,
    ) -> Sequence[Any]:
        """The batch with labels drawn from the model's own prediction (`ops.curvature`).

        The inputs stay as they are, so the tokens of a text are drawn each given the true ones.
        """
        with torch.no_grad():
            logits, labels = self._logits_and_labels(model, weights, buffers, batch)
        return self._with_labels(batch, self._draw(logits, labels, uniform))

    def get_batch_log_likelihood(
        self, model: nn.Module, weights: Weights, buffers: Weights, batch: Sequence[Any]
    ) -> Float[Tensor, " batch"]:
        """Σ log p(label) ÷ √count: of drawn labels E[u uᵀ] is then the loss's curvature.

        The loss is the sum ÷ count, whose curvature is Σ (that of a label) ÷ count; drawn labels
        are independent, so the products of different ones vanish in the mean.
        """
        each, count = self._log_likelihoods(
            *self._logits_and_labels(model, weights, buffers, batch)
        )
        return each.sum(1) / count.sqrt()
