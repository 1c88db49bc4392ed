"""Per-sample gradients of one use of a parameter, from the input and the gradient of the output.

One rule (`ops.parameter_use`) for each function of torch that parameters go into: those of
look-ups, normalisation, arithmetic and concatenation are here, `RULES` has all; `ops.hooks` applies
them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from trak_dist.ops import segments
from trak_dist.ops.bundles import GROUPS, Bundles
from trak_dist.ops.convolutions import convolution, per_channel, transposed_convolution
from trak_dist.ops.parameter_use import ParameterUse, Rule, rows_of
from trak_dist.ops.products import addmm, einsum, grouped, linear, matmul
from trak_dist.ops.segments import Segments

# Look-up --------------------------------------------------------------------------------------


def embedding(  # noqa: PLR0913, PLR0917
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,  # noqa: ARG001  (what was renormalised is what is looked up)
    norm_type: float = 2.0,  # noqa: ARG001
    scale_grad_by_freq: bool = False,
    sparse: bool = False,  # noqa: ARG001
) -> Iterable[ParameterUse]:
    """Rows of a table."""
    if scale_grad_by_freq:
        return
    size = len(weight)

    def by_weight(g: Tensor, index: Tensor) -> Float[Tensor, "rows size w"]:
        return tables(index.flatten(1), g.flatten(1, -2))

    def by_bundled_weight(bundles: Bundles, g: Tensor, index: Tensor) -> Tensor:
        index, g = index.flatten(1), g.flatten(1, -2)
        sums = bundles.sums(g.mT).view(len(g), GROUPS, bundles.width, -1)
        group = (index // (size // GROUPS))[:, None, None].expand(-1, 1, bundles.width, -1)
        return tables(index, sums.gather(1, group)[:, 0].mT)

    def tables(index: Tensor, g: Float[Tensor, "rows n w"]) -> Float[Tensor, "rows size w"]:
        if padding_idx is not None:
            g = g.masked_fill((index == padding_idx % size)[..., None], 0)
        first = size * torch.arange(len(index), device=index.device)
        place, g = (index + first[:, None]).flatten(), g.flatten(0, 1)
        if segments.scatters_in_order(g.device):
            table = g.new_zeros(len(index) * size, g.shape[-1]).index_add_(0, place, g)
        else:
            table = Segments.of(place, len(index) * size).sums(g)
        return table.view(len(index), size, -1)

    yield ParameterUse(weight, (input,), by_weight, by_bundled_weight)


# Normalisation --------------------------------------------------------------------------------


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,  # noqa: ARG001
) -> Iterable[ParameterUse]:
    """Layer normalisation."""
    shape = tuple(normalized_shape)
    yield from _normalised_last(
        input, len(shape), weight, lambda x: F.layer_norm(x, shape, eps=eps)
    )
    if bias is not None:
        yield ParameterUse(bias, (), lambda g: g.flatten(1, -len(shape) - 1).sum(1))


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Iterable[ParameterUse]:
    """Root-mean-square normalisation."""
    shape = tuple(normalized_shape)
    yield from _normalised_last(input, len(shape), weight, lambda x: F.rms_norm(x, shape, eps=eps))


def _normalised_last(
    input: Tensor, dims: int, weight: Tensor | None, normalise: Callable[[Tensor], Tensor]
) -> Iterable[ParameterUse]:
    if weight is not None:
        yield ParameterUse(
            weight, (input,), lambda g, x: (g * normalise(x)).flatten(1, -dims - 1).sum(1)
        )


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Iterable[ParameterUse]:
    """Group normalisation."""
    yield from _normalised(input, weight, bias, lambda x: F.group_norm(x, num_groups, eps=eps))


def batch_norm(  # noqa: PLR0913, PLR0917
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,  # noqa: ARG001
    eps: float = 1e-5,
) -> Iterable[ParameterUse]:
    """Batch normalisation by its running statistics; by the batch's, examples would mix."""
    if training or running_mean is None:
        return
    yield from _normalised(
        input, weight, bias, lambda x: F.batch_norm(x, running_mean, running_var, eps=eps)
    )


def instance_norm(  # noqa: PLR0913, PLR0917
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,  # noqa: ARG001
    eps: float = 1e-5,
) -> Iterable[ParameterUse]:
    """Normalisation of each channel of each example."""

    def normalise(x: Tensor) -> Tensor:
        running = (None, None) if use_input_stats else (running_mean, running_var)
        return F.instance_norm(x, *running, use_input_stats=use_input_stats, eps=eps)

    yield from _normalised(input, weight, bias, normalise)


def _normalised(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    normalise: Callable[[Tensor], Tensor],
) -> Iterable[ParameterUse]:
    def by_weight(g: Tensor, x: Tensor) -> Float[Tensor, "rows c"]:
        return per_channel(g * normalise(x.flatten(0, 1)).view_as(g))

    if weight is not None:
        yield ParameterUse(weight, (input,), by_weight)
    if bias is not None:
        yield ParameterUse(bias, (), per_channel)


# Element by element ---------------------------------------------------------------------------


def prelu(input: Tensor, weight: Tensor) -> Iterable[ParameterUse]:
    """`max(x, 0) + a min(x, 0)`, with an a for each channel or for all."""

    def by_slope(g: Tensor, x: Tensor) -> Float[Tensor, "rows slopes"]:
        product = g * x.clamp(max=0)
        return product.flatten(1).sum(1, keepdim=True) if len(weight) == 1 else per_channel(product)

    yield ParameterUse(weight, (input,), by_slope)


# Laying side by side --------------------------------------------------------------------------


def concatenate(tensors: Sequence[Tensor], dim: int = 0) -> Iterable[ParameterUse]:
    """Tensors side by side, as a class token before an example's patches."""
    dim %= tensors[0].ndim
    start = 0
    for operand in tensors:
        stop = start + operand.shape[dim]
        if dim > 0:
            slice_rows = functools.partial(_slice_rows, operand, dim, start, stop)
            yield ParameterUse(operand, (_positions(operand),), slice_rows)
        start = stop


def _slice_rows(operand: Tensor, dim: int, start: int, stop: int, g: Tensor, at: Tensor) -> Tensor:
    return rows_of(operand, g.narrow(dim + 1, start, stop - start), at)


def _positions(operand: Tensor) -> Tensor:
    return torch.arange(len(operand), device=operand.device)


RULES: dict[Any, Rule] = {
    F.linear: linear,
    torch.addmm: addmm,
    F.embedding: embedding,
    torch.einsum: einsum,
    **{getattr(torch, name): grouped for name in ("_grouped_mm",) if hasattr(torch, name)},
    F.group_norm: group_norm,
    F.instance_norm: instance_norm,
    F.batch_norm: batch_norm,
    **dict.fromkeys((F.prelu, torch.prelu, Tensor.prelu), prelu),
    **dict.fromkeys((F.layer_norm, torch.layer_norm), layer_norm),
    **dict.fromkeys((F.rms_norm, torch.rms_norm), rms_norm),
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), convolution),
    **dict.fromkeys(
        (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), transposed_convolution
    ),
    **dict.fromkeys((torch.matmul, torch.mm, Tensor.matmul, Tensor.mm), matmul),
    **dict.fromkeys((torch.cat, torch.concat), concatenate),
}
