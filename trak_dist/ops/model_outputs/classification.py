"""The model outputs of classifiers: the margin of the true class."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.func import functional_call

from trak_dist.errors import ProblemError
from trak_dist.ops import draws
from trak_dist.ops.model_outputs.protocol import BatchedModelOutput, Weights

State = tuple[dict[str, Tensor], dict[str, Tensor]]

# as TRAK's batches have them
TEXT_FIELDS = ("input_ids", "token_type_ids", "attention_mask", "labels")


class _Classification(BatchedModelOutput, ABC):
    """The margin f = log(p / (1 − p)) of the true class.

    Park et al. 2023, "TRAK: Attributing Model Behavior at Scale", section 3.3: with cross-entropy
    ℓ = log(1 + exp(−f)), −∂ℓ/∂f = 1 − p.
    """

    loss = "logistic"  # as a function of f: what its curvature is

    @abstractmethod
    def _logits(
        self, model: nn.Module, state: State, batch: Sequence[Any]
    ) -> tuple[Float[Tensor, "batch classes"], Int64[Tensor, " batch"]]:
        """The logits of a batch, and its labels."""

    def get_batch_output(
        self, model: nn.Module, weights: Weights, buffers: Weights, batch: Sequence[Any]
    ) -> Float[Tensor, " batch"]:
        """F of each example, from one forward pass."""
        return _margins(*self._logits(model, (dict(weights), dict(buffers)), batch))

    def get_out_to_loss_from_output(
        self,
        output: Float[Tensor, " batch"],
        batch: Sequence[Any],  # noqa: ARG002
    ) -> Float[Tensor, " batch"]:
        """1 − p of each example, from its margin."""
        return torch.sigmoid(-output)

    def get_out_to_loss_grad(
        self, model: nn.Module, weights: Weights, buffers: Weights, batch: Sequence[Any]
    ) -> Float[Tensor, " batch"]:
        """1 − p = sigmoid(−f), which keeps small values that 1 − p would cancel."""
        return torch.sigmoid(-self.get_batch_output(model, weights, buffers, batch))

    def draw_labels(
        self,
        model: nn.Module,
        weights: Weights,
        buffers: Weights,
        batch: Sequence[Any],
        uniform: draws.Uniform,
    ) -> Sequence[Any]:
        """The batch with labels drawn from the model's own prediction (`ops.curvature`)."""
        logits, _ = self._logits(model, (dict(weights), dict(buffers)), batch)
        return self._with_labels(batch, draws.categorical(logits, uniform(1)[:, 0]))

    def get_batch_log_likelihood(
        self, model: nn.Module, weights: Weights, buffers: Weights, batch: Sequence[Any]
    ) -> Float[Tensor, " batch"]:
        """Log p of each example's label."""
        logits, labels = self._logits(model, (dict(weights), dict(buffers)), batch)
        return -nn.functional.cross_entropy(logits.float(), labels, reduction="none")

    @abstractmethod
    def _with_labels(self, batch: Sequence[Any], labels: Int64[Tensor, " batch"]) -> Sequence[Any]:
        """The batch with other labels."""


class ImageClassification(_Classification):
    """The margin log(p / (1 − p)) of the true class; batches of (images, labels).

    What the model returns has `logits` (batch, classes), as Hugging Face's do, or is them.
    """

    def _logits(
        self, model: nn.Module, state: State, batch: Sequence[Any]
    ) -> tuple[Float[Tensor, "batch classes"], Int64[Tensor, " batch"]]:
        images, labels = batch
        return _logits_in(functional_call(model, state, (images,))), labels

    def _with_labels(self, batch: Sequence[Any], labels: Int64[Tensor, " batch"]) -> Sequence[Any]:
        return batch[0], labels


class TextClassification(_Classification):
    """The same of a Hugging Face classifier, `BertForSequenceClassification` for instance.

    A batch is (input_ids, token_type_ids, attention_mask, labels), as for TRAK's
    `TextClassificationModelOutput`, or one mapping of the model's arguments and `labels`. What the
    model returns has `logits`, or is them.
    """

    def _logits(
        self, model: nn.Module, state: State, batch: Sequence[Any]
    ) -> tuple[Float[Tensor, "batch classes"], Int64[Tensor, " batch"]]:
        inputs = dict(batch[0] if len(batch) == 1 else zip(TEXT_FIELDS, batch, strict=True))
        labels = inputs.pop("labels")
        return _logits_in(functional_call(model, state, (), inputs)), labels

    def _with_labels(self, batch: Sequence[Any], labels: Int64[Tensor, " batch"]) -> Sequence[Any]:
        if len(batch) == 1:
            return ({**batch[0], "labels": labels},)
        return *batch[:-1], labels


def attention_mask(batch: Sequence[Any]) -> Tensor | None:
    """Where a batch of texts is not padding, (batch, tokens); None if it does not say so."""
    inputs = batch[0] if len(batch) == 1 else dict(zip(TEXT_FIELDS, batch, strict=False))
    if not isinstance(inputs, Mapping):
        return None
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if not isinstance(ids, Tensor) or not isinstance(mask, Tensor) or mask.shape != ids.shape:
        return None
    return mask if mask.ndim == 2 and not mask.is_floating_point() else None


def _logits_in(found: Any) -> Tensor:
    """The logits of what a model returned."""
    logits = getattr(found, "logits", found)
    if not isinstance(logits, Tensor):
        raise ProblemError(
            f"the model returned {type(found).__name__}, which is no tensor and has no `logits`",
            where="the model",
            next="let it return logits (batch, classes), or something with `logits`",
        )
    return logits


def _margins(
    logits: Float[Tensor, "batch classes"], labels: Int64[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    if labels.shape != logits.shape[:1]:
        raise ProblemError(
            f"labels of shape {tuple(labels.shape)} with logits of shape {tuple(logits.shape)}",
            where="the batch",
            next="give the number of its class for each example",
        )
    classes = torch.arange(logits.shape[1], device=logits.device)
    is_true = classes == labels[:, None]
    if logits.dtype.itemsize < 4:  # a half type can't hold the 1 − p of a good model
        logits = logits.float()
    # The margin does not depend on an offset; its rounding, forward and backward, would.
    logits = logits - logits.detach().amax(1, keepdim=True)
    # where(), not indexing in place: the same under vmap, and no NaN in its gradient
    others = torch.where(is_true, -torch.inf, logits).logsumexp(1)
    own = torch.where(is_true, logits, 0).sum(1)
    # A label that is no class must not pass for one: NaN is found, and its row named.
    return torch.where(is_true.any(1), own - others, torch.nan)
