"""Per-sample gradients of the model output.

A gradient computer takes a batch and gives, for each selected parameter, the gradient of each
example's model output. `VmapGradients` is general; it holds all of a batch's gradients at once.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trak_dist.errors import ConfigError
from trak_dist.ops.model_outputs import ModelOutput


class GradientComputer(Protocol):
    """Per-sample gradients of one model with its weights loaded."""

    def __call__(self, batch: Sequence[Any]) -> dict[str, Float[Tensor, "batch ..."]]:
        """The gradients of each example's model output, by parameter name."""
        ...


class VmapGradients:
    """`torch.func.vmap` of `torch.func.grad`: any model that torch.func can trace."""

    def __init__(self, model: nn.Module, model_output: ModelOutput, params: Sequence[str]) -> None:
        selected = select_params(model, params)
        self._weights = {n: p.detach() for n, p in model.named_parameters() if n in selected}
        self._buffers = {n: b.detach() for n, b in model.named_buffers()}
        self._frozen = {n: p.detach() for n, p in model.named_parameters() if n not in selected}
        self._model = model
        self._gradient = torch.func.grad(model_output.get_output, argnums=1)

    def __call__(self, batch: Sequence[Any]) -> dict[str, Float[Tensor, "batch ..."]]:
        """See `GradientComputer`."""
        axes = (None, None, None, *([0] * len(batch)))
        per_sample = torch.func.vmap(self._gradient, in_dims=axes)
        grads: dict[str, Tensor] = per_sample(
            self._model, self._weights, {**self._buffers, **self._frozen}, *batch
        )
        return grads


def outputs(
    model: nn.Module, model_output: ModelOutput, batch: Sequence[Any]
) -> Float[Tensor, " batch"]:
    """f(z; θ) of each example of a batch."""
    weights = {n: p.detach() for n, p in model.named_parameters()}
    buffers = dict(model.named_buffers())
    axes = (None, None, None, *([0] * len(batch)))
    values: Tensor = torch.func.vmap(model_output.get_output, in_dims=axes)(
        model, weights, buffers, *batch
    )
    return values


def select_params(model: nn.Module, patterns: Sequence[str]) -> dict[str, torch.Size]:
    """The names and shapes of the parameters that the glob `patterns` select, in order of name.

    Raises
    ------
    ConfigError
        If a pattern selects none.
    """
    shapes = {name: p.shape for name, p in model.named_parameters()}
    for pattern in patterns:
        if not fnmatch.filter(shapes, pattern):
            raise ConfigError(
                f"{pattern!r} selects no parameter; there are {', '.join(shapes)}",
                where="featurize.params",
                next="featurize.params='[*.weight]' for example, or leave it out for all",
            )
    chosen = {n for pattern in patterns for n in fnmatch.filter(shapes, pattern)}
    return {name: shapes[name] for name in sorted(chosen)}
