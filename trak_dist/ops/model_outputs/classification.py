"""The model outputs of classifiers: the margin of the true class."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from trak_dist.errors import ProblemError
from trak_dist.ops import draws
from trak_dist.ops.model_outputs.calls import predicted, with_labels
from trak_dist.ops.model_outputs.labels import KnownLabels
from trak_dist.ops.model_outputs.losses import LogisticLoss
from trak_dist.ops.model_outputs.protocol import Weights

# What the tensors of a batch are, by their number; four as TRAK's batches have them.
TEXT_FIELDS = {
    3: ("input_ids", "attention_mask", "labels"),
    4: ("input_ids", "token_type_ids", "attention_mask", "labels"),
}


class _Classification(KnownLabels, LogisticLoss, ABC):
    """The margin f = log(p / (1 − p)) of the true class.

    Park et al. 2023, "TRAK: Attributing Model Behavior at Scale", section 3.3: with cross-entropy
    ℓ = log(1 + exp(−f)), −∂ℓ/∂f = 1 − p = sigmoid(−f).
    """

    @abstractmethod
    def _logits_and_labels(
        self, model: nn.Module, weights: Weights, buffers: Weights, batch: Sequence[Any]
    ) -> tuple[Float[Tensor, "batch classes"], Int64[Tensor, " batch"]]:
        """The logits of a batch, and its labels."""

    def get_batch_output(
        self, model: nn.Module, weights: Weights, buffers: Weights, batch: Sequence[Any]
    ) -> Float[Tensor, " batch"]:
        """F of each example, from one forward pass."""
        return _margins(*self._logits_and_labels(model, weights, buffers, batch))

    def draw_labels(
        self,
        model: nn.Module,
        weights: Weights,
        buffers: Weights,
        batch: Sequence[Any],
        uniform: draws.Uniform,
    ) -> Sequence[Any]:
        """The batch with labels drawn from the model's own prediction (`ops.curvature`)."""
        logits, _ = self._logits_and_labels(model, weights, buffers, batch)
        return with_labels(batch, draws.categorical(logits, uniform(1)[:, 0]))

    def get_batch_log_likelihood(
        self, model: nn.Module, weights: Weights, buffers: Weights, batch: Sequence[Any]
    ) -> Float[Tensor, " batch"]:
        """Log p of each example's label."""
        logits, labels = self._logits_and_labels(model, weights, buffers, batch)
        return -nn.functional.cross_entropy(logits.float(), labels, reduction="none")

    def _is_label(self, logits: Tensor, labels: Tensor) -> Tensor:
        return _one_hot(logits, labels).any(1)

    def _labels_are(self, logits: Tensor) -> str:
        return f"the model has {logits.shape[1]} logits"


class ImageClassification(_Classification):
    """The margin log(p / (1 − p)) of the true class; batches of (images, labels)."""

    def _logits_and_labels(
        self, model: nn.Module, weights: Weights, buffers: Weights, batch: Sequence[Any]
    ) -> tuple[Float[Tensor, "batch classes"], Int64[Tensor, " batch"]]:
        return predicted(model, weights, buffers, batch)


class TextClassification(_Classification):
    """The same of a Hugging Face classifier, `BertForSequenceClassification` for instance.

    A batch is (input_ids, token_type_ids, attention_mask, labels), as for TRAK's
    `TextClassificationModelOutput`, (input_ids, attention_mask, labels), or one mapping of the
    model's arguments and `labels`. What the model returns has `logits`, or is them.
    """

    def _logits_and_labels(
        self, model: nn.Module, weights: Weights, buffers: Weights, batch: Sequence[Any]
    ) -> tuple[Float[Tensor, "batch classes"], Int64[Tensor, " batch"]]:
        inputs = batch[0] if len(batch) == 1 else _named(batch)
        if not inputs:
            raise ProblemError(
                f"a batch of {len(batch)} tensors for a text classifier",
                where="the batch",
                next="(input_ids, attention_mask, labels), TRAK's (input_ids, token_type_ids, "
                "attention_mask, labels), or one mapping of the model's arguments and `labels`",
            )
        return predicted(model, weights, buffers, (inputs,))


def attention_mask(batch: Sequence[Any]) -> Tensor | None:
    """Where a batch of texts is not padding, (batch, tokens); None if it does not say so."""
    inputs = batch[0] if len(batch) == 1 else _named(batch)
    if not isinstance(inputs, Mapping):
        return None
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if not isinstance(ids, Tensor) or not isinstance(mask, Tensor) or mask.shape != ids.shape:
        return None
    return mask if mask.ndim == 2 and not mask.is_floating_point() else None


def _named(batch: Sequence[Any]) -> dict[str, Any]:
    """The tensors of a batch of texts by their names; none if it is another kind of batch."""
    return dict(zip(TEXT_FIELDS.get(len(batch), ()), batch, strict=False))


def _margins(
    logits: Float[Tensor, "batch classes"], labels: Int64[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    is_true = _one_hot(logits, labels)
    # The margin does not depend on an offset; its rounding, forward and backward, would.
    logits = logits - logits.detach().amax(1, keepdim=True)
    # where(), not indexing in place: the same under vmap, and no NaN in its gradient
    others = torch.where(is_true, -torch.inf, logits).logsumexp(1)
    own = torch.where(is_true, logits, 0).sum(1)
    # A label that is no class must not pass for one: NaN is found, and its row named.
    return torch.where(is_true.any(1), own - others, torch.nan)


def _one_hot(
    logits: Float[Tensor, "batch classes"], labels: Int64[Tensor, " batch"]
) -> Bool[Tensor, "batch classes"]:
    """Where an example's true class is."""
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ProblemError(
            f"logits of shape {tuple(logits.shape)}: the margin of a class needs (batch, classes), "
            "two classes or more",
            where="the model",
            next="of one logit for each example, MultiLabelClassification and labels (batch, 1) of "
            "0 and 1; of a value, Regression; or a model with a logit for each class",
        )
    if labels.shape != logits.shape[:1]:
        raise ProblemError(
            f"labels of shape {tuple(labels.shape)} with logits of shape {tuple(logits.shape)}",
            where="the batch",
            next="give the number of its class for each example",
        )
    classes = torch.arange(logits.shape[1], device=logits.device)
    return classes == labels[:, None]
