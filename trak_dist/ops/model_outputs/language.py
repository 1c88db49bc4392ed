"""The model output of causal language models: the log-likelihood of a text's tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.func import functional_call

from trak_dist.errors import ProblemError
from trak_dist.ops import draws
from trak_dist.ops.model_outputs.protocol import BatchedModelOutput, Weights

IGNORED = -100  # a label that does not count, as torch and Hugging Face have it


class LanguageModeling(BatchedModelOutput):
    """F = Σ log p(token | those before it) over the labels of a text; the loss is −f, so Q = 1.

    A batch is one mapping of the model's arguments, `input_ids` (batch, tokens) among them, and
    perhaps `labels`; or (input_ids,) or (input_ids, labels). As in Hugging Face, labels are not
    shifted: the logits at t are for the label at t + 1, and a label of −100 does not count. Where
    no labels are given, they are the input_ids where `attention_mask`, if there is one, is 1. What
    the model returns has `logits` (batch, tokens, vocabulary), or is them.
    """

    def get_batch_output(
        self, model: nn.Module, weights: Weights, buffers: Weights, batch: Sequence[Any]
    ) -> Float[Tensor, " batch"]:
        """F of each text, from one forward pass."""
        logits, labels = _logits_and_labels(model, weights, buffers, batch)
        size = logits.shape[-1]
        tokens = labels.clamp(0, size - 1)
        found = logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
        # A label that is no token must not pass for one: NaN is found, and its row named.
        found = torch.where(tokens == labels, found, torch.nan)
        return torch.where(labels == IGNORED, 0, found).sum(1)

    def get_out_to_loss_from_output(
        self,
        output: Float[Tensor, " batch"],
        batch: Sequence[Any],  # noqa: ARG002
    ) -> Float[Tensor, " batch"]:
        """Q = −∂(−f)/∂f = 1 of each text."""
        return torch.ones_like(output)

    def get_out_to_loss_grad(
        self,
        model: nn.Module,  # noqa: ARG002
        weights: Weights,  # noqa: ARG002
        buffers: Weights,  # noqa: ARG002
        batch: Sequence[Any],
    ) -> Float[Tensor, " batch"]:
        """Q = 1 of each text, which needs no forward pass."""
        _, _, labels = _parts(batch)
        return torch.ones(len(labels), device=labels.device)

    def draw_labels(
        self,
        model: nn.Module,
        weights: Weights,
        buffers: Weights,
        batch: Sequence[Any],
        uniform: draws.Uniform,
    ) -> Sequence[Any]:
        """The batch with each label that counts drawn from p(token | the tokens before it).

        The inputs stay as they are, so the tokens of a text are drawn each given the true ones.
        One number of each text is used for each position.
        """
        with torch.no_grad():
            logits, labels = _logits_and_labels(model, weights, buffers, batch)
        drawn = draws.categorical(logits, uniform(labels.shape[1]))
        drawn = torch.where(labels == IGNORED, IGNORED, drawn)
        _, _, whole = _parts(batch)
        whole = torch.cat([whole[:, :1], drawn], dim=1)
        first = batch[0]
        return ({**first, "labels": whole},) if isinstance(first, Mapping) else (first, whole)

    def get_batch_log_likelihood(
        self, model: nn.Module, weights: Weights, buffers: Weights, batch: Sequence[Any]
    ) -> Float[Tensor, " batch"]:
        """Log p(labels | inputs) of each text: f itself."""
        return self.get_batch_output(model, weights, buffers, batch)


def _logits_and_labels(
    model: nn.Module, weights: Weights, buffers: Weights, batch: Sequence[Any]
) -> tuple[Float[Tensor, "batch tokens-1 vocabulary"], Int64[Tensor, "batch tokens-1"]]:
    """The logits and the labels that they are for, of half types in float32."""
    arguments, keywords, labels = _parts(batch)
    found = functional_call(model, ({**weights}, {**buffers}), arguments, keywords)
    logits = getattr(found, "logits", found)
    if logits.ndim != 3 or logits.shape[:2] != labels.shape:
        raise ProblemError(
            f"labels of shape {tuple(labels.shape)} with logits of shape {tuple(logits.shape)}",
            where="the batch",
            next="labels (batch, tokens) for logits (batch, tokens, vocabulary), not shifted",
        )
    logits = logits[:, :-1]
    if logits.dtype.itemsize < 4:  # a half type can't hold a sum over the vocabulary
        logits = logits.float()
    return logits, labels[:, 1:]


def _parts(
    batch: Sequence[Any],
) -> tuple[tuple[Tensor, ...], dict[str, Any], Int64[Tensor, "batch tokens"]]:
    """The model's arguments, those by name, and the labels before they are shifted."""
    first = batch[0]
    if not isinstance(first, Mapping):
        ids, labels = batch if len(batch) == 2 else (*batch, *batch)
        return (ids,), {}, labels
    inputs = dict(first)
    labels, mask = inputs.pop("labels", None), inputs.get("attention_mask")
    if labels is None:
        ids = inputs["input_ids"]
        labels = ids if mask is None else torch.where(mask == 1, ids, IGNORED)
    return (), inputs, labels
