"""Model outputs of several labels for each example: multi-label classes, and pixels."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from trak_dist.ops import draws
from trak_dist.ops.model_outputs.calls import check_shapes, nan_unless
from trak_dist.ops.model_outputs.many_labels import ManyLabels


class MultiLabelClassification(ManyLabels):
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
        each = nan_unless(self._is_label(logits, labels), each)
        return each.flatten(1), torch.ones_like(each.flatten(1)[:, 0])

    def _is_label(self, logits: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG002
        return (labels >= 0) & (labels <= 1)

    def _labels_are(self, logits: Tensor) -> str:  # noqa: ARG002
        return "which is not between 0 and 1"

    def _draw(self, logits: Tensor, labels: Tensor, uniform: draws.Uniform) -> Tensor:
        u = uniform(logits[0].numel()).view(logits.shape)
        return (u < logits.double().sigmoid()).to(labels.dtype)


class Segmentation(ManyLabels):
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
        each = nan_unless(self._is_label(logits, labels) & ~none, each)
        each = torch.where(counted | none, each, 0).flatten(1)
        return each, counted.flatten(1).sum(1).to(each.dtype)

    def _is_label(self, logits: Tensor, labels: Tensor) -> Tensor:
        labels = labels.long()
        is_class = (labels >= 0) & (labels < logits.shape[1])
        return is_class | (labels == self.ignore_index)

    def _labels_are(self, logits: Tensor) -> str:
        return f"the model has {logits.shape[1]} logits"

    def _draw(self, logits: Tensor, labels: Tensor, uniform: draws.Uniform) -> Tensor:
        u = uniform(labels[0].numel()).view(labels.shape)
        drawn = draws.categorical(logits.movedim(1, -1), u)
        return torch.where(labels == self.ignore_index, labels.long(), drawn)
