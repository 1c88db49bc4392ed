"""The model output of CLIP: how well an image and its text match, against fixed other pairs."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F  # noqa: N812
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset

from trak_dist.errors import ConfigError, ProblemError
from trak_dist.hashing import truncated
from trak_dist.ops import draws
from trak_dist.ops.batches import Batch, clone_batch, examples_in
from trak_dist.ops.model_outputs.protocol import BatchedModelOutput, Weights

Embeddings = tuple[Float[Tensor, "rows d"], Float[Tensor, "rows d"]]  # of images, of texts
Encode = Callable[[nn.Module, Batch], Sequence[Tensor]]
TEXT = ("input_ids", "attention_mask", "position_ids", "token_type_ids")
DRAWN = "drawn"  # where a batch that is a mapping has the labels that were drawn


def two_towers(model: nn.Module, batch: Batch) -> Sequence[Tensor]:
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
    and held constant. a = log(p / (1 − p)) with p the probability of y among the texts, y and yⱼ, by
    image x; b the same of the images. The loss of the pair is CLIP's, log(1 + e⁻ᵃ) + log(1 + e⁻ᵇ)
    (Radford et al. 2021, arXiv 2103.00020, figure 3), and Q = 1 − (p_a + p_b)/2 is its derivative
    where both margins grow alike. f and Q are those of Park et al. 2023, section 5.1, and of TRAK's
    `CLIPModelOutput`: its f has τ = 1, and it draws the contrasts of each example anew. So f is no
    function of other examples of the batch.

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
        self._batches = _batches(contrast)
        # Numbers and texts are what a plan pins of a model output.
        self.temperature, self.contrast_digest = temperature, _digest(self._batches)
        self.encoder = f"{encode.__module__}.{getattr(encode, '__qualname__', repr(encode))}"
        self._encode = encode
        self._contrast: Embeddings | None = None

    def prepare(self, model: nn.Module, weights: Weights, buffers: Weights) -> CLIP:
        """This output with the contrast set's embeddings by these weights.

        Raises
        ------
        ProblemError
            If the model gives no embeddings.
        """
        ready, state = copy.copy(self), (dict(weights), dict(buffers))
        with torch.no_grad():
            found = [self._embed(model, state, _as_for(weights, b)) for b in self._batches]
        images, texts = zip(*found, strict=True)
        ready._contrast = torch.cat(images), torch.cat(texts)
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
        logits, u = self._logits(model, weights, buffers, batch), uniform(2)
        drawn = torch.stack([draws.categorical(logits[i], u[:, i]) for i in (0, 1)], 1)
        if isinstance(batch[0], Mapping):
            return ({**batch[0], DRAWN: drawn},)
        return *batch, drawn

    def get_batch_log_likelihood(
        self, model: nn.Module, weights: Weights, buffers: Weights, batch: Sequence[Any]
    ) -> Float[Tensor, " batch"]:
        """Log p_a of the text that was drawn, and log p_b of the image: minus the loss of both."""
        if isinstance(batch[0], Mapping):
            inputs = dict(batch[0])
            drawn, pairs = inputs.pop(DRAWN), (inputs,)
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
        """s S of each image with texts, and of each text with images, its own first."""
        if self._contrast is None:
            raise ProblemError(
                "the contrast set was not embedded",
                where="CLIP",
                next="output = output.prepare(model, weights, buffers), again for other weights",
            )
        images, texts = self._embed(model, (dict(weights), dict(buffers)), tuple(batch))
        if images.shape[1] != self._contrast[0].shape[1]:
            raise ProblemError(
                f"embeddings of {images.shape[1]} dimensions, {self._contrast[0].shape[1]} of the "
                "contrast set",
                where=self.encoder,
                next="let the model give embeddings (batch, d), not similarities of a batch",
            )
        scale, own = self._scale({**weights, **buffers}), (images * texts).sum(1, keepdim=True)
        of_images, of_texts = self._contrast
        return [
            scale * torch.cat([own, found @ others.mT], 1)
            for found, others in ((images, of_texts), (texts, of_images))
        ]

    def _scale(self, tensors: Weights) -> float | Float[Tensor, ""]:
        """s = 1/τ."""
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


def _batches(contrast: Iterable[Any]) -> tuple[Batch, ...]:
    if isinstance(contrast, Tensor | Mapping | str | Dataset) or not isinstance(contrast, Iterable):
        raise ConfigError(
            f"contrast is {type(contrast).__name__}, not batches",
            where="CLIP",
            next="a DataLoader of pairs, or a list of batches, as collate gives them",
        )
    batches = tuple(
        (dict(b),) if isinstance(b, Mapping) else tuple(b) if isinstance(b, list | tuple) else (b,)
        for b in contrast
    )
    if sum(examples_in(b) for b in batches) < 1:
        raise ConfigError(
            "contrast holds no pairs", where="CLIP", next="some hundred pairs that are no train rows"
        )
    return batches


def _digest(batches: Sequence[Batch]) -> str:
    sha = hashlib.sha256()
    for batch in batches:
        leaves, structure = pytree.tree_flatten(batch)
        sha.update(str(structure).encode())
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                sha.update(str((leaf.dtype, tuple(leaf.shape))).encode())
                sha.update(
                    leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
                )
            else:
                sha.update(repr(leaf).encode())
    return truncated(sha)


def _as_for(weights: Weights, batch: Batch) -> Batch:
    """A copy of a batch on the device of the weights, and of their type where they have one."""
    floating = {w.dtype for w in weights.values() if w.is_floating_point()}
    device = next((w.device for w in weights.values()), None)

    def moved(tensor: Tensor) -> Tensor:
        convert = tensor.is_floating_point() and len(floating) == 1
        return tensor.to(device, next(iter(floating)) if convert else None)

    converted: Batch = pytree.tree_map_only(Tensor, moved, clone_batch(batch))
    return converted
