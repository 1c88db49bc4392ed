"""Rules of convolutions: the weight's gradients of many examples, by one grouped convolution."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from trak_dist.ops.bundles import GROUPS, Bundles
from trak_dist.ops.parameter_use import ParameterUse


def convolution(  # noqa: PLR0913, PLR0917
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Iterable[ParameterUse]:
    """Convolution in 1, 2 or 3 dimensions."""
    if input.ndim != weight.ndim:  # a single example
        return
    dims = weight.ndim - 2
    dilations = _each(dilation, dims)
    if padding == "same":
        total = [d * (size - 1) for d, size in zip(dilations, weight.shape[2:], strict=True)]
        if any(s % 2 for s in total):
            padded = F.pad(input, [side for s in reversed(total) for side in (0, s % 2)])
            padding = [s // 2 for s in total]
            yield from convolution(padded, weight, bias, stride, padding, dilation, groups)
            return
        padding = [s // 2 for s in total]
    pads = [0] * dims if isinstance(padding, str) else _each(padding, dims)
    settings = (_each(stride, dims), pads, dilations, False, [0] * dims, groups)
    yield from _convolution(input, weight, bias, settings)


def transposed_convolution(  # noqa: PLR0913, PLR0917
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Iterable[ParameterUse]:
    """Transposed convolution in 1, 2 or 3 dimensions."""
    if input.ndim != weight.ndim:
        return
    dims = weight.ndim - 2
    stride, padding, dilation = (_each(v, dims) for v in (stride, padding, dilation))
    settings = (stride, padding, dilation, True, _each(output_padding, dims), groups)
    yield from _convolution(input, weight, bias, settings)


def _convolution(
    input: Tensor, weight: Tensor, bias: Tensor | None, settings: tuple[Any, ...]
) -> Iterable[ParameterUse]:
    *_, transposed, _, groups = settings
    by_weight = functools.partial(_weight_gradients, weight.shape, settings)

    def by_bundled_weight(bundles: Bundles, g: Tensor, x: Tensor) -> Float[Tensor, "rows ..."]:
        if transposed:  # the channels of its weight are those of its output
            g = _bundled(bundles, g)
        else:
            x = _bundled(bundles, x)
        in_groups = (*settings[:-1], GROUPS)
        return _weight_gradients(bundles.bundled_shape, in_groups, g, x)

    yield ParameterUse(weight, (input,), by_weight, by_bundled_weight if groups == 1 else None)
    if bias is not None:
        yield ParameterUse(bias, (), per_channel)


def _bundled(
    bundles: Bundles, images: Float[Tensor, "rows n channels ..."]
) -> Float[Tensor, "rows n bundles ..."]:
    sums = bundles.sums(images.flatten(0, 1).flatten(2))
    return sums.view(*images.shape[:2], -1, *images.shape[3:])


def _weight_gradients(
    shape: Sequence[int],
    settings: tuple[Any, ...],
    g: Float[Tensor, "rows n out ..."],
    x: Float[Tensor, "rows n in ..."],
) -> Float[Tensor, "rows ..."]:
    """By the kernel of a training step: with examples as groups it does not add them up."""
    *others, groups = settings
    rows = len(g)
    weight = g.new_empty(1).expand(rows * shape[0], *shape[1:])  # nothing but its shape is read
    examples = [t.transpose(0, 1).flatten(1, 2) for t in (g, x)]
    mask = (False, True, False)
    found: Tensor = torch.ops.aten.convolution_backward(
        *examples, weight, None, *others, rows * groups, mask
    )[1]
    return found.view(rows, *shape)


def per_channel(g: Float[Tensor, "rows n c ..."]) -> Float[Tensor, "rows c"]:
    """The sum over all but examples and channels."""
    return g.reshape(*g.shape[:3], -1).sum((1, 3))


def _each(value: int | Sequence[int], dims: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * dims if len(values) == 1 else values
