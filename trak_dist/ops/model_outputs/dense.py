"""Model outputs of several labels for each example: multi-label classes, and pixels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from trak_dist.ops import draws
from trak_dist.ops.model_outputs.calls import check_shapes, nan_unless, predicted, with_labels
from trak_dist.ops.model_outputs.negative_loss import NegativeLoss
from trak_dist.ops.model_outputs.protocol import Weights


class _ManyLabels(NegativeLoss, ABC):
    """F = Σ or mean of log p(label | input); Fisher rows by labels drawn from the prediction."""

    @abstractmethod
    def _log_likelihoods(
        self, logits: Tensor, labels: Tensor
    ) -> tuple[Float[Tensor, "batch labels"], Float[Tensor, " batch"]]:
        """Of each label, 0 of one that does not count; and what their sum is divided by."""

    @abstractmethod
    def _draw(self, logits: Tensor, labels: Tensor, uniform: draws.Uniform) -> Tensor:
        """Labels drawn from the prediction, where labels count."""

    def get_batch_output(
        self, model: nn.Module, weights: Weights, buffers: Weights, batch: Sequence[Any]
    ) -> Float[Tensor, " batch"]:
        """F of each example, from one forward pass.

        Raises
        ------
        ProblemError
            If the labels' shape is not that of the predictions.
        """
        each, count = self._log_likelihoods(*predicted(model, weights, buffers, batch))
        return each.sum(1) / count

    def draw_labels(
        self,
        model: nn.Module,
        weights: Weights,
        buffers: Weights,
        batch: Sequence[Any],
        uniform: draws.Uniform,
    ) -> Sequence[Any]:
        """The batch with labels drawn from the model's own prediction (`ops.curvature`)."""
        with torch.no_grad():
            logits, labels = predicted(model, weights, buffers, batch)
        return with_labels(batch, self._draw(logits, labels, uniform))

    def get_batch_log_likelihood(
        self, model: nn.Module, weights: Weights, buffers: Weights, batch: Sequence[Any]
    ) -> Float[Tensor, " batch"]:
        """Σ log p(label) ÷ √count: of drawn labels E[u uᵀ] is then the loss's curvature.

        The loss is the sum ÷ count, whose curvature is Σ (that of a label) ÷ count; drawn labels
        are independent, so the products of different ones vanish in the mean.
        """
        each, count = self._log_likelihoods(*predicted(model, weights, buffers, batch))
        return each.sum(1) / count.sqrt()


class MultiLabelClassification(_ManyLabels):
    """F = Σ y log p + (1 − y) log(1 − p), p = sigmoid(logit): minus the binary cross-entropy.

    A batch is (inputs, …, labels) or a mapping of the model's arguments and `labels`, (batch,
    classes) between 0 and 1, of any type; the model returns logits of that shape, or has them as
    `logits`. A label that is not between 0 and 1 gives NaN, which is found.
    """

    def _log_likelihoods(
        self, logits: Tensor, labels: Tensor
    ) -> tuple[Float[Tensor, "batch labels"], Float[Tensor, " batch"]]:
        check_shapes(labels, logits.shape, logits)
        labels = labels.to(logits.dtype)
        each = -F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        each = nan_unless((labels >= 0) & (labels <= 1), each)
        return each.flatten(1), torch.ones_like(each.flatten(1)[:, 0])

    def _draw(self, logits: Tensor, labels: Tensor, uniform: draws.Uniform) -> Tensor:
        u = uniform(logits[0].numel()).view(logits.shape)
        return (u < logits.double().sigmoid()).to(labels.dtype)


class Segmentation(_ManyLabels):
    """F = the mean of log p(class of a pixel) over an image's pixels: minus the cross-entropy.

    A batch is (images, labels) or a mapping of the model's arguments and `labels`, (batch, height,
    width) classes; the model returns logits (batch, classes, height, width), or has them as
    `logits` or as "out". Pixels of the class `ignore_index` do not count. An image without any that
    counts, or with a label that is no class, gives NaN, which is found.
    """

    def __init__(self, ignore_index: int = -100) -> None:
        self.ignore_index = ignore_index

    def _log_likelihoods(
        self, logits: Tensor, labels: Tensor
    ) -> tuple[Float[Tensor, "batch labels"], Float[Tensor, " batch"]]:
        check_shapes(labels, logits[:, 0].shape, logits)
        labels = labels.long()
        classes = labels.clamp(0, logits.shape[1] - 1)
        each = logits.log_softmax(1).gather(1, classes[:, None])[:, 0]
        counted = labels != self.ignore_index
        none = ~counted.flatten(1).any(1)[:, None, None]
        each = nan_unless((classes == labels) | ~(counted | none), each)
        each = torch.where(counted | none, each, 0).flatten(1)
        return each, counted.flatten(1).sum(1).to(each.dtype)

    def _draw(self, logits: Tensor, labels: Tensor, uniform: draws.Uniform) -> Tensor:
        u = uniform(labels[0].numel()).view(labels.shape)
        drawn = draws.categorical(logits.movedim(1, -1), u)
        return torch.where(labels == self.ignore_index, labels.long(), drawn)
