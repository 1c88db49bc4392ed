"""The model output of diffusion models, and the rows that their noise is drawn for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from trak_dist.errors import ConfigError, ProblemError
from trak_dist.ops import draws
from trak_dist.ops.model_outputs.losses import NegativeLoss
from trak_dist.ops.model_outputs.protocol import Weights


class NoisedRows:
    """A map-style dataset of noised samples, whose noise and times follow from the row alone.

    Row i is a mapping with `sample` x_t (draws, …), `timestep` t (draws,) int64, `noise` ε
    (draws, …) float32, x_t = √ᾱ_t x + √(1 − ᾱ_t) ε (Ho et al. 2020, "Denoising Diffusion
    Probabilistic Models", equation 4), and `condition`, if the dataset's examples have more than
    the image.

    Parameters
    ----------
    dataset
        Map-style, of images (…) float32, or of (image, condition).
    alphas_cumprod : Tensor
        ᾱ of each time, (times,), as the noise schedule has it.
    draws : int
        How many times and noises of each row. More make the loss of a row less a matter of chance.
    seed : int
        Another seed, other draws.

    Raises
    ------
    ConfigError
        If `draws` is not at least 1.
    """

    def __init__(
        self,
        dataset: Any,
        alphas_cumprod: Float[Tensor, " times"],
        *,
        draws: int = 4,
        seed: int = 0,
    ) -> None:
        if draws < 1:
            raise ConfigError(f"draws must be at least 1, not {draws}", where="NoisedRows")
        self._dataset, self._draws, self._seed = dataset, draws, seed
        self._alphas = torch.as_tensor(alphas_cumprod).double().cpu()

    def __len__(self) -> int:
        """That of the dataset."""
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One row, the same each time."""
        found = self._dataset[index]
        image, *condition = found if isinstance(found, tuple | list) else (found,)
        keys = torch.tensor(draws.stream_key("time", self._seed, index))
        u = draws.uniform(keys, torch.arange(self._draws))
        times = (u * len(self._alphas)).long()
        noise = draws.normals(
            draws.stream_key("noise", self._seed, index), torch.arange(self._draws), image.numel()
        ).view(self._draws, *image.shape)
        share = self._alphas[times].view(-1, *[1] * image.ndim)
        sample = (share.sqrt() * image + (1 - share).sqrt() * noise).float()
        row: dict[str, Any] = {"sample": sample, "timestep": times, "noise": noise}
        return row | {"condition": condition[0]} if condition else row


class Diffusion(NegativeLoss):
    """F = −mean ‖ε − ε̂(x_t, t)‖² over an image's numbers and draws: minus the simple loss.

    Ho et al. 2020, equation 14; of a model that predicts the noise. A batch is a mapping as
    `NoisedRows` makes it. The model is called with (x_t, t), and the condition if there is one, and
    returns ε̂ of x_t's shape, or has it as `sample`, as diffusers' do. Fisher rows: the noise is
    drawn from the Gaussian around the prediction of which the loss is minus the log-likelihood.
    """

    def get_batch_output(
        self, model: nn.Module, weights: Weights, buffers: Weights, batch: Sequence[Any]
    ) -> Float[Tensor, " batch"]:
        """F of each image, from a forward pass of each of its draws."""
        return -_errors(model, weights, buffers, batch).square().mean(1)

    def draw_labels(
        self,
        model: nn.Module,
        weights: Weights,
        buffers: Weights,
        batch: Sequence[Any],
        uniform: draws.Uniform,
    ) -> Sequence[Any]:
        """The batch with the noise drawn from N(ε̂, ½) (`ops.curvature`)."""
        noise = batch[0]["noise"]
        with torch.no_grad():
            errors = _errors(model, weights, buffers, batch)
        u = uniform(errors.shape[1]).clamp(2.0**-54, 1)
        drawn = torch.special.ndtri(u) * 0.5**0.5
        predicted = noise.flatten(1) - errors
        return ({**batch[0], "noise": (predicted + drawn).to(noise.dtype).view(noise.shape)},)

    def get_batch_log_likelihood(
        self, model: nn.Module, weights: Weights, buffers: Weights, batch: Sequence[Any]
    ) -> Float[Tensor, " batch"]:
        """−Σ ‖ε − ε̂‖² ÷ √(numbers): of drawn noise E[u uᵀ] is then the mean's curvature."""
        errors = _errors(model, weights, buffers, batch)
        numbers: float = errors.shape[1] ** 0.5
        return -errors.square().sum(1) / numbers


def _errors(
    model: nn.Module, weights: Weights, buffers: Weights, batch: Sequence[Any]
) -> Float[Tensor, "batch numbers"]:
    """ε − ε̂ of each image, of all draws."""
    inputs = _mapping(batch)
    state = ({**weights}, {**buffers})
    condition = (inputs["condition"],) if "condition" in inputs else ()
    errors = []
    for i in range(inputs["sample"].shape[1]):
        arguments = (inputs["sample"][:, i], inputs["timestep"][:, i], *condition)
        found = functional_call(model, state, arguments)
        found = getattr(found, "sample", found)
        noise = inputs["noise"][:, i]
        if found.shape != noise.shape:
            raise ProblemError(
                f"a prediction of shape {tuple(found.shape)} for noise of shape "
                f"{tuple(noise.shape)}",
                where="the model",
                next="let it predict the noise; of a model that predicts more, wrap it",
            )
        errors.append((noise - found.to(noise.dtype)).flatten(1))
    return torch.cat(errors, dim=1)


def _mapping(batch: Sequence[Any]) -> Mapping[str, Tensor]:
    inputs = batch[0]
    lacking = [
        name
        for name in ("sample", "timestep", "noise")
        if not isinstance(inputs, Mapping) or name not in inputs
    ]
    if lacking:
        raise ProblemError(
            f"a batch of noised images without {', '.join(lacking)}",
            where="the batch",
            next="make the dataset trak_dist.NoisedRows(dataset, alphas_cumprod)",
        )
    found: Mapping[str, Tensor] = inputs
    return found
