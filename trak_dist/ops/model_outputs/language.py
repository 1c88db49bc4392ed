"""The model outputs of language models: the log-likelihood of a text's tokens."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.func import functional_call

from trak_dist.errors import ProblemError
from trak_dist.ops import draws
from trak_dist.ops.batches import Batch
from trak_dist.ops.model_outputs.calls import inputs_and_labels, nan_unless, numbers_of
from trak_dist.ops.model_outputs.many_labels import ManyLabels
from trak_dist.ops.model_outputs.protocol import Weights

IGNORED = -100  # a label that does not count, as torch and Hugging Face have it


class _Tokens(ManyLabels, ABC):
    """F = Σ log p(label) over the labels of a text that count: minus its cross-entropy, summed."""

    def _log_likelihoods(
        self,
        logits: Float[Tensor, "batch labels vocabulary"],
        labels: Int64[Tensor, "batch labels"],
    ) -> tuple[Float[Tensor, "batch labels"], Float[Tensor, " batch"]]:
        tokens = labels.clamp(0, logits.shape[-1] - 1)
        found = logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
        found = nan_unless(self._is_label(logits, labels), found)
        return torch.where(labels == IGNORED, 0, found), torch.ones_like(found.sum(1))

    def _is_label(self, logits: Tensor, labels: Tensor) -> Tensor:
        return ((labels >= 0) & (labels < logits.shape[-1])) | (labels == IGNORED)

    def _labels_are(self, logits: Tensor) -> str:
        return f"the model has {logits.shape[-1]} logits"

    def _draw(
        self,
        logits: Float[Tensor, "batch labels vocabulary"],
        labels: Int64[Tensor, "batch labels"],
        uniform: draws.Uniform,
    ) -> Int64[Tensor, "batch labels"]:
        """One number of each text is used for each position."""
        drawn = draws.categorical(logits, uniform(labels.shape[1]))
        return torch.where(labels == IGNORED, IGNORED, drawn)


class LanguageModeling(_Tokens):
    """F = Σ log p(token | those before it) over the labels of a text; the loss is −f, so Q = 1.

    A batch is one mapping of the model's arguments, `input_ids` (batch, tokens) among them, and
    perhaps `labels`; or (input_ids,), (input_ids, labels) or (input_ids, attention_mask, labels).
    As in Hugging Face, labels are not shifted: the logits at t are for the label at t + 1, and a
    label of −100 does not count. Where no labels are given, they are the input_ids where
    `attention_mask`, if there is one, is 1, and is 1 of the token before: the first token of a text
    is predicted from nothing, or from padding on its left. What the model returns has `logits`
    (batch, tokens, vocabulary), or is them.

    The model is called with what the batch has, as in training. So padding on the left changes
    nothing where it takes positions from the mask (OPT), or has relative ones (Llama); of others
    (GPT-2) a batch that is padded on the left needs `position_ids` that count the text's tokens
    alone.
    """

    def _logits_and_labels(
        self, model: nn.Module, weights: Weights, buffers: Weights, batch: Sequence[Any]
    ) -> tuple[Float[Tensor, "batch labels vocabulary"], Int64[Tensor, "batch labels"]]:
        arguments, keywords, labels = _parts(batch)
        logits = _logits(model, weights, buffers, arguments, keywords, labels)
        return logits[:, :-1], labels[:, 1:]

    def _with_labels(self, batch: Sequence[Any], labels: Int64[Tensor, "batch labels"]) -> Batch:
        _, _, whole = _parts(batch)
        whole = torch.cat([whole[:, :1], labels], dim=1)
        first = batch[0]
        if isinstance(first, Mapping):
            return ({**first, "labels": whole},)
        return *(batch[:-1] if len(batch) > 1 else batch), whole


class MaskedLanguageModeling(_Tokens):
    """F = Σ log p(token | the masked text) over the labels that count; the loss is −f, so Q = 1.

    A batch is one mapping of the model's arguments and `labels` (batch, tokens): the tokens that
    were masked, and −100 elsewhere. Logits at t are for the label at t. Which tokens are masked
    must be the dataset's, the same each time: mask there, not in collate.
    """

    def _logits_and_labels(
        self, model: nn.Module, weights: Weights, buffers: Weights, batch: Sequence[Any]
    ) -> tuple[Float[Tensor, "batch labels vocabulary"], Int64[Tensor, "batch labels"]]:
        arguments, keywords, labels = inputs_and_labels(batch)
        return _logits(model, weights, buffers, arguments, keywords, labels), labels


class SequenceToSequence(MaskedLanguageModeling):
    """F = Σ log p(token | the source, the tokens before it) over the labels of an answer; Q = 1.

    A batch is one mapping of the model's arguments and `labels` (batch, tokens of the answer), −100
    where none counts. Logits at t are for the label at t, as in Hugging Face's encoder-decoder
    models: where `decoder_input_ids` are not given they are the labels shifted by the model's own
    `prepare_decoder_input_ids_from_labels`.
    """

    def _logits_and_labels(
        self, model: nn.Module, weights: Weights, buffers: Weights, batch: Sequence[Any]
    ) -> tuple[Float[Tensor, "batch labels vocabulary"], Int64[Tensor, "batch labels"]]:
        return super()._logits_and_labels(model, weights, buffers, (_shifted(model, batch),))

    def draw_labels(
        self,
        model: nn.Module,
        weights: Weights,
        buffers: Weights,
        batch: Sequence[Any],
        uniform: draws.Uniform,
    ) -> Sequence[Any]:
        """As for other models; the decoder still reads the true answer."""
        return super().draw_labels(model, weights, buffers, (_shifted(model, batch),), uniform)


def _shifted(model: nn.Module, batch: Sequence[Any]) -> dict[str, Any]:
    """A batch's mapping, with what the decoder reads."""
    inputs = batch[0]
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if isinstance(inputs, Mapping) and "labels" in inputs:
        if "decoder_input_ids" in inputs:
            return dict(inputs)
        if shift is not None:
            return {**inputs, "decoder_input_ids": shift(labels=inputs["labels"])}
    raise ProblemError(
        "a batch for an encoder and a decoder needs labels, and decoder_input_ids if the model has "
        "no prepare_decoder_input_ids_from_labels",
        where="the batch",
        next="one mapping of the model's arguments and `labels`",
    )


def _logits(
    model: nn.Module,
    weights: Weights,
    buffers: Weights,
    arguments: tuple[Any, ...],
    keywords: Mapping[str, Any],
    labels: Int64[Tensor, "batch labels"],
) -> Float[Tensor, "batch labels vocabulary"]:
    """What the model gives, of half types in float32: these can't hold a sum over a vocabulary."""
    logits = numbers_of(
        functional_call(model, ({**weights}, {**buffers}), arguments, dict(keywords))
    )
    if logits.ndim != 3 or logits.shape[:2] != labels.shape:
        raise ProblemError(
            f"labels of shape {tuple(labels.shape)} with logits of shape {tuple(logits.shape)}",
            where="the batch",
            next="labels (batch, tokens) for logits (batch, tokens, vocabulary), not shifted",
        )
    return logits


def _parts(
    batch: Sequence[Any],
) -> tuple[tuple[Any, ...], dict[str, Any], Int64[Tensor, "batch tokens"]]:
    """The model's arguments, those by name, and the labels before they are shifted."""
    first = batch[0]
    if not isinstance(first, Mapping):
        if len(batch) > 3:
            raise ProblemError(
                f"a batch of {len(batch)} tensors for a language model",
                where="the batch",
                next="(input_ids, attention_mask, labels), or one mapping of the model's arguments",
            )
        if len(batch) == 3:
            return (), {"input_ids": first, "attention_mask": batch[1]}, batch[2]
        return (first,), {}, batch[-1]
    inputs, labels = dict(first), text_labels(first)
    inputs.pop("labels", None)
    return (), inputs, labels


def text_labels(text: Mapping[str, Any]) -> Int64[Tensor, "*batch tokens"]:
    """The labels of a text, or of a batch of them: those that are given, else its tokens."""
    labels, ids, mask = (text.get(k) for k in ("labels", "input_ids", "attention_mask"))
    if labels is None and mask is not None:
        real = torch.as_tensor(mask) == 1
        counted = real & nn.functional.pad(real[..., :-1], (1, 0))
        labels = torch.where(counted, torch.as_tensor(ids), IGNORED)
    return torch.as_tensor(ids if labels is None else labels)
