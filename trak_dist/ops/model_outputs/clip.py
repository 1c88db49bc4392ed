"""The model output of CLIP: how well an image and its text match, against fixed other pairs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F  # noqa: N812

from trak_dist.errors import ConfigError, ProblemError
from trak_dist.ops import draws
from trak_dist.ops.batches import Batch, examples_in
from trak_dist.ops.model_outputs import contrast_set
from trak_dist.ops.model_outputs.protocol import BatchedModelOutput, Weights

Embeddings = tuple[Float[Tensor, "rows d"], Float[Tensor, "rows d"]]  # of images, of texts
Encode = Callable[[Any, Batch], Sequence[Tensor]]
TEXT = ("input_ids", "attention_mask", "position_ids", "token_type_ids")
DRAWN = "drawn"  # where a batch that is a mapping has the labels that were drawn


def two_towers(model: Any, batch: Batch) -> Sequence[Tensor]:
    """The embeddings of a batch's images and texts, by the model's own interface.

    A batch of one mapping goes to Hugging Face's methods `get_image_features` and
    `get_text_features`, one of (images, texts) to `encode_image` and `encode_text`, as OpenAI's and
    open_clip's models have them. Without these it goes to the model, which returns the embeddings
    first, or by the names `image_embeds` and `text_embeds`, or `image_features` and
    `text_features`.
    """
    named = len(batch) == 1 and isinstance(batch[0], Mapping)
    if named and hasattr(model, "get_image_features") and hasattr(model, "get_text_features"):
        texts = {name: value for name, value in batch[0].items() if name in TEXT}
        images = {name: value for name, value in batch[0].items() if name not in TEXT}
        both = model.get_image_features(**images), model.get_text_features(**texts)
        return [getattr(found, "pooler_output", found) for found in both]
    if named:
        found = model(**batch[0])
    elif hasattr(model, "encode_image") and hasattr(model, "encode_text"):
        images, texts = batch
        return model.encode_image(images), model.encode_text(texts)
    else:
        found = model(*batch)
    for names in (("image_embeds", "text_embeds"), ("image_features", "text_features")):
        if isinstance(found, Mapping) and all(name in found for name in names):
            return [found[name] for name in names]
        if all(hasattr(found, name) for name in names):
            return [getattr(found, name) for name in names]
    return tuple(found)[:2] if isinstance(found, tuple | list) else ()


class CLIP(BatchedModelOutput):
    """How well image x and text y match: f = a + b, the margins of either among fixed others.

    With the cosine similarity S and s = 1/τ,

        a = s S(x, y) − log Σⱼ exp(s S(x, yⱼ)),   b = s S(x, y) − log Σⱼ exp(s S(xⱼ, y)),

    over the pairs (xⱼ, yⱼ) of a contrast set, whose embeddings are computed once of each checkpoint
    and held constant. a = log(p / (1 − p)), p the probability of y among the texts, y and yⱼ, by
    image x; b is the same of the images. The loss of a pair is CLIP's (Radford et al. 2021, arXiv
    2103.00020, figure 3), log(1 + e⁻ᵃ) + log(1 + e⁻ᵇ), and Q = 1 − (p_a + p_b)/2 is −∂loss/∂f where
    both margins grow alike. f and Q are those of Park et al. 2023, section 5.1, and of TRAK's
    `CLIPModelOutput`: its f has τ = 1, and it draws each example's contrasts anew. So f is no
    function of the other examples of a batch.

    The loss is no function of f, so there is no `loss` to declare; the curvature is the Fisher
    matrix of both choices, with a text drawn by p_a and an image by p_b.

    Parameters
    ----------
    contrast : iterable of batches
        The pairs (xⱼ, yⱼ), as collate gives batches: a `DataLoader`, or a list of batches. They are
        read once, kept in memory, and pinned by a digest. They should be none of the train rows or
        targets: of a pair that is in it, the pair itself counts as another.
    temperature : float, optional
        τ in (0, 1]. Left out: the model's own, 1/exp(`logit_scale`), which is a weight like others.
        TRAK's `temperature` multiplies: t there is 1/t here.
    encode : callable, optional
        `(model, batch)` to the embeddings of the images (batch, d) and of the texts (batch, d),
        which need not be normalised. Left out: `two_towers`.

    Raises
    ------
    ConfigError
        If there is no contrast, or what is given is no batches; if τ is not in (0, 1].
    """

    def __init__(
        self,
        contrast: Iterable[Any],
        *,
        temperature: float | None = None,
        encode: Encode = two_towers,
    ) -> None:
        if temperature is not None and not 0 < temperature <= 1:
            raise ConfigError(
                f"temperature {temperature!r} is not in (0, 1]: cosine similarities are divided by "
                "it",
                where="CLIP",
                next="1 / exp(logit_scale), 0.01 for example; or leave it out for the model's own",
            )
        self._batches = contrast_set.read(contrast)
        # Numbers and texts are what a plan pins of a model output.
        self.temperature, self.contrast_digest = temperature, contrast_set.digest(self._batches)
        named = encode if hasattr(encode, "__qualname__") else type(encode)
        self.encoder = f"{named.__module__}.{named.__qualname__}"
        self._encode = encode
        self._contrast: Embeddings | None = None

    def prepare(self, model: nn.Module, weights: Weights, buffers: Weights) -> CLIP:
        """The same output with the contrast set's embeddings by these weights.

        Raises
        ------
        ProblemError
            If the model gives no embeddings.
        """
        ready, state = copy.copy(self), (dict(weights), dict(buffers))
        with torch.no_grad():
            found = [
                self._embed(model, state, contrast_set.copy_for(weights, batch))
                for batch in self._batches
            ]
        for images, _ in found:
            self._check_dimensions(images, found[0][0])
        images, texts = (torch.cat(column) for column in zip(*found, strict=True))
        vars(ready)["_contrast"] = images, texts
        return ready

    def get_batch_output(
        self, model: nn.Module, weights: Weights, buffers: Weights, batch: Sequence[Any]
    ) -> Float[Tensor, " batch"]:
        """F of each pair, from one forward pass."""
        by_image, by_text = self._margins(model, weights, buffers, batch)
        return by_image + by_text

    def get_out_to_loss_grad(
        self, model: nn.Module, weights: Weights, buffers: Weights, batch: Sequence[Any]
    ) -> Float[Tensor, " batch"]:
        """1 − (p_a + p_b)/2, from 1 − p = sigmoid(−margin), which keeps small values."""
        by_image, by_text = self._margins(model, weights, buffers, batch)
        return (torch.sigmoid(-by_image) + torch.sigmoid(-by_text)) / 2

    def draw_labels(
        self,
        model: nn.Module,
        weights: Weights,
        buffers: Weights,
        batch: Sequence[Any],
        uniform: draws.Uniform,
    ) -> Sequence[Any]:
        """The batch with a text drawn for each image, and an image for each text, (batch, 2).

        0 is the pair's own, j + 1 the contrast set's j-th.
        """
        both = zip(self._logits(model, weights, buffers, batch), uniform(2).unbind(1), strict=True)
        drawn = torch.stack([draws.categorical(logits, u.contiguous()) for logits, u in both], 1)
        if isinstance(batch[0], Mapping):
            return ({**batch[0], DRAWN: drawn},)
        return *batch, drawn

    def get_batch_log_likelihood(
        self, model: nn.Module, weights: Weights, buffers: Weights, batch: Sequence[Any]
    ) -> Float[Tensor, " batch"]:
        """Log p_a of the text that was drawn, and log p_b of the image: minus the loss of both."""
        if isinstance(batch[0], Mapping):
            inputs = dict(batch[0])
            drawn, pairs = inputs.pop(DRAWN), [inputs]
        else:
            *pairs, drawn = batch
        both = zip(self._logits(model, weights, buffers, pairs), drawn.unbind(1), strict=True)
        return torch.stack(
            [-F.cross_entropy(logits, label, reduction="none") for logits, label in both]
        ).sum(0)

    def _margins(
        self, model: nn.Module, weights: Weights, buffers: Weights, batch: Sequence[Any]
    ) -> list[Float[Tensor, " batch"]]:
        """A and b of each pair."""
        both = self._logits(model, weights, buffers, batch)
        return [logits[:, 0] - logits[:, 1:].logsumexp(1) for logits in both]

    def _logits(
        self, model: nn.Module, weights: Weights, buffers: Weights, batch: Sequence[Any]
    ) -> list[Float[Tensor, "batch contrast+1"]]:
        """Logits s S of each image with texts, and of each text with images, its own first."""
        if self._contrast is None:
            raise ProblemError(
                "the contrast set was not embedded",
                where="CLIP",
                next="output = output.prepare(model, weights, buffers), again for other weights",
            )
        images, texts = self._embed(model, (dict(weights), dict(buffers)), tuple(batch))
        self._check_dimensions(images, self._contrast[0])
        scale, own = self._scale({**weights, **buffers}), (images * texts).sum(1, keepdim=True)
        of_images, of_texts = self._contrast
        return [
            scale * torch.cat([own, found @ others.mT], 1)
            for found, others in ((images, of_texts), (texts, of_images))
        ]

    def _check_dimensions(self, images: Tensor, others: Tensor) -> None:
        if images.shape[1] != others.shape[1]:
            raise ProblemError(
                f"embeddings of {images.shape[1]} dimensions, {others.shape[1]} of other pairs",
                where=self.encoder,
                next="let the model give embeddings (batch, d), not similarities of a batch",
            )

    def _scale(self, tensors: Weights) -> float | Float[Tensor, ""]:
        """The factor s = 1/τ."""
        if self.temperature is not None:
            return 1 / self.temperature
        names = [name for name in tensors if name.rpartition(".")[2] == "logit_scale"]
        if len(names) != 1:
            raise ProblemError(
                f"the model has {len(names) or 'no'} tensors called logit_scale",
                where="CLIP",
                next="CLIP(contrast=…, temperature=0.07), as it was trained with",
            )
        scale = tensors[names[0]].reshape(()).exp()
        return scale.float() if scale.dtype.itemsize < 4 else scale

    def _embed(
        self, model: nn.Module, state: tuple[dict[str, Tensor], dict[str, Tensor]], batch: Batch
    ) -> Embeddings:
        """The normalised embeddings of a batch, of half types in float32."""
        named = tuple({f"model.{name}": t for name, t in of.items()} for of in state)
        found = functional_call(_Encoder(model, self._encode), named, (batch,))
        size = examples_in(batch)
        if len(found) != 2 or not all(
            isinstance(e, Tensor) and e.ndim == 2 and len(e) == size for e in found
        ):
            shapes = [tuple(getattr(e, "shape", ())) for e in found]
            raise ProblemError(
                f"embeddings of {size} pairs came as {shapes or 'nothing that is known'}",
                where=self.encoder,
                next="CLIP(contrast=…, encode=…): a function of (model, batch) that returns the "
                "embeddings of its images (batch, d) and of its texts (batch, d)",
            )
        images, texts = (e.float() if e.dtype.itemsize < 4 else e for e in found)
        return F.normalize(images, dim=1), F.normalize(texts, dim=1)


class _Encoder(nn.Module):
    """`encode(model, batch)` as a module, for `functional_call`."""

    def __init__(self, model: nn.Module, encode: Encode) -> None:
        super().__init__()
        self.model, self._encode = model, encode

    def forward(self, batch: Batch) -> Sequence[Tensor]:
        return self._encode(self.model, batch)
