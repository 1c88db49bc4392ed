"""Per-sample gradients of one use of a parameter, from the input and the gradient of the output.

One rule for each function of torch that parameters go into. A rule has its function's signature
and gives, for each operand that may be a parameter, a `Use`; it leaves out those that it can't do.
`RULES` says which function has which rule; `ops.hooks` applies them.

Tensors come to a formula as (rows, n, …), where (batch · n, …) is what the function saw: n is 1,
but where a model has folded another dimension, frames of a video for instance, into the batch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

SMALL_PRODUCT = 2**21  # multiplications; below, calling a kernel for each example costs more

Formula = Callable[..., Float[Tensor, "rows ..."]]


@dataclass(frozen=True)
class Use:
    """One operand of a call.

    `formula(grad, *saved)` gives its per-sample gradients (rows, *shape) from the rows of the
    output's gradient and of the tensors in `saved`.
    """

    operand: Tensor
    saved: tuple[Tensor, ...]
    formula: Formula


Rule = Callable[..., Iterable[Use]]


# Products -------------------------------------------------------------------------------------


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Iterable[Use]:
    """`x Wᵀ + b`."""
    yield Use(weight, (input,), _outer)
    if bias is not None:
        yield Use(bias, (), lambda g: g.flatten(1, -2).sum(1))


def matmul(input: Tensor, other: Tensor) -> Iterable[Use]:
    """`x W`."""
    if other.ndim == 2:
        yield Use(other, (input,), lambda g, x: _outer(x, g))


def addmm(
    input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Iterable[Use]:
    """`b + x W`, as in Hugging Face's Conv1D."""
    if beta == 1 and alpha == 1 and input.ndim == 1:
        yield Use(mat2, (mat1,), lambda g, x: _outer(x, g))
        yield Use(input, (), lambda g: g.flatten(1, -2).sum(1))


def _outer(
    left: Float[Tensor, "rows ... a"], right: Float[Tensor, "rows ... b"]
) -> Float[Tensor, "rows a b"]:
    """The sum over positions of outer products, as one batched product."""
    left, right = left.flatten(1, -2), right.flatten(1, -2)
    if left.shape[1] == 1:
        return left.mT * right
    return torch.bmm(left.mT, right)


# Convolutions ---------------------------------------------------------------------------------


def convolution(  # noqa: PLR0913, PLR0917
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Iterable[Use]:
    """Convolution in 1, 2 or 3 dimensions."""
    if input.ndim != weight.ndim:  # a single example
        return
    dims = weight.ndim - 2
    dilations = _each(dilation, dims)
    if padding == "same":
        spare = [d * (size - 1) for d, size in zip(dilations, weight.shape[2:], strict=True)]
        if any(s % 2 for s in spare):
            padded = F.pad(input, [side for s in reversed(spare) for side in (0, s % 2)])
            padding = [s // 2 for s in spare]
            yield from convolution(padded, weight, bias, stride, padding, dilation, groups)
            return
        padding = [s // 2 for s in spare]
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
) -> Iterable[Use]:
    """Transposed convolution in 1, 2 or 3 dimensions."""
    if input.ndim != weight.ndim:
        return
    dims = weight.ndim - 2
    stride, padding, dilation = (_each(v, dims) for v in (stride, padding, dilation))
    settings = (stride, padding, dilation, True, _each(output_padding, dims), groups)
    yield from _convolution(input, weight, bias, settings)


def _convolution(
    input: Tensor, weight: Tensor, bias: Tensor | None, settings: tuple[Any, ...]
) -> Iterable[Use]:
    stride, padding, dilation, transposed, _, groups = settings

    def by_weight(
        g: Float[Tensor, "rows n out ..."], x: Float[Tensor, "rows n in ..."]
    ) -> Float[Tensor, "rows ..."]:
        if groups == 1 and not transposed and g[0, 0, 0].numel() * weight.numel() <= SMALL_PRODUCT:
            columns = _columns(x.flatten(0, 1), weight.shape[2:], stride, padding, dilation)
            products = torch.bmm(g.flatten(0, 1).flatten(2), columns.mT)
            return products.view(*g.shape[:2], *weight.shape).sum(1)
        # Example by example, by the kernel of the training step: it needs no unfolded copy of the
        # input, and is faster than unfolding and a batched product.
        backward = functools.partial(_weight_gradient, weight, settings)
        each = [backward(g[row], x[row]) for row in range(len(g))]
        return torch.stack(each) if len(each) > 1 else each[0].unsqueeze(0)

    yield Use(weight, (input,), by_weight)
    if bias is not None:
        yield Use(bias, (), _per_channel)


def _columns(
    x: Float[Tensor, "batch c ..."],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Float[Tensor, "batch columns positions"]:
    """The inputs of each output position, from overlapping views."""
    x = F.pad(x, [side for p in reversed(padding) for side in (p, p)])
    dims = len(kernel)
    for at, (size, step, spread) in enumerate(zip(kernel, stride, dilation, strict=True), 2):
        x = x.unfold(at, spread * (size - 1) + 1, step)[..., ::spread]
    x = x.permute(0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims))
    return x.reshape(len(x), -1, math.prod(x.shape[2 + dims :]))


def _weight_gradient(weight: Tensor, settings: tuple[Any, ...], g: Tensor, x: Tensor) -> Tensor:
    mask = (False, True, False)
    found: Tensor = torch.ops.aten.convolution_backward(g, x, weight, None, *settings, mask)[1]
    return found


def _each(value: int | Sequence[int], dims: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * dims if len(values) == 1 else values


def _per_channel(g: Float[Tensor, "rows n c ..."]) -> Float[Tensor, "rows c"]:
    return g.reshape(*g.shape[:3], -1).sum((1, 3))


# Look-up --------------------------------------------------------------------------------------


def embedding(  # noqa: PLR0913, PLR0917
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,  # noqa: ARG001
    scale_grad_by_freq: bool = False,
    sparse: bool = False,  # noqa: ARG001
) -> Iterable[Use]:
    """Rows of a table."""
    if max_norm is not None or scale_grad_by_freq:
        return
    size, width = weight.shape

    def by_weight(g: Tensor, index: Tensor) -> Float[Tensor, "rows size width"]:
        index, g = index.flatten(1), g.flatten(1, -2)
        if padding_idx is not None:
            g = g.masked_fill((index == padding_idx % size)[..., None], 0)
        first = size * torch.arange(len(index), device=index.device)
        table = g.new_zeros(len(index) * size, width)
        table.index_add_(0, (index + first[:, None]).flatten(), g.reshape(-1, width))
        return table.view(-1, size, width)

    yield Use(weight, (input,), by_weight)


# Normalisation --------------------------------------------------------------------------------


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,  # noqa: ARG001
) -> Iterable[Use]:
    """Layer normalisation."""
    shape = tuple(normalized_shape)
    yield from _normalised_last(
        input, len(shape), weight, lambda x: F.layer_norm(x, shape, eps=eps)
    )
    if bias is not None:
        yield Use(bias, (), lambda g: g.flatten(1, -len(shape) - 1).sum(1))


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Iterable[Use]:
    """Root-mean-square normalisation."""
    shape = tuple(normalized_shape)
    yield from _normalised_last(input, len(shape), weight, lambda x: F.rms_norm(x, shape, eps=eps))


def _normalised_last(
    input: Tensor, dims: int, weight: Tensor | None, normalise: Callable[[Tensor], Tensor]
) -> Iterable[Use]:
    if weight is not None:
        yield Use(weight, (input,), lambda g, x: (g * normalise(x)).flatten(1, -dims - 1).sum(1))


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Iterable[Use]:
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
) -> Iterable[Use]:
    """Batch normalisation by its running statistics; by the batch's, examples would mix."""
    if training or running_mean is None:
        return
    yield from _normalised(
        input, weight, bias, lambda x: F.batch_norm(x, running_mean, running_var, eps=eps)
    )


def _normalised(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    normalise: Callable[[Tensor], Tensor],
) -> Iterable[Use]:
    def by_weight(g: Tensor, x: Tensor) -> Float[Tensor, "rows c"]:
        return _per_channel(g * normalise(x.flatten(0, 1)).view_as(g))

    if weight is not None:
        yield Use(weight, (input,), by_weight)
    if bias is not None:
        yield Use(bias, (), _per_channel)


# Element by element ---------------------------------------------------------------------------


def add(input: Any, other: Any, *, alpha: float = 1) -> Iterable[Use]:
    """`a + b`."""
    if alpha == 1:
        yield from _broadcast(input, other, (), lambda g: g)
        yield from _broadcast(other, input, (), lambda g: g)


def subtract(input: Any, other: Any, *, alpha: float = 1) -> Iterable[Use]:
    """`a − b`."""
    if alpha == 1:
        yield from _broadcast(input, other, (), lambda g: g)
        yield from _broadcast(other, input, (), torch.neg)


def multiply(input: Any, other: Any) -> Iterable[Use]:
    """`a ⊙ b`."""
    yield from _broadcast(input, other, (other,), torch.mul)
    yield from _broadcast(other, input, (input,), torch.mul)


def divide(input: Any, other: Any, *, rounding_mode: str | None = None) -> Iterable[Use]:
    """`a / b`."""
    if rounding_mode is None:
        yield from _broadcast(input, other, (other,), torch.div)
        yield from _broadcast(other, input, (input,), lambda g, x: -g * x / other.square())


def _broadcast(
    operand: Any, partner: Any, saved: tuple[Any, ...], derivative: Formula
) -> Iterable[Use]:
    """`operand`, that the function broadcasts to the shape of its result."""
    if not (isinstance(operand, Tensor) and isinstance(partner, Tensor)):
        return
    shape = torch.broadcast_shapes(operand.shape, partner.shape)  # type: ignore[no-untyped-call]
    values = tuple(t.expand(shape) for t in saved)
    own = (*[1] * (len(shape) - operand.ndim), *operand.shape)

    def one_for_all(g: Tensor, *values: Tensor) -> Tensor:
        product = derivative(g, *values).sum(1)
        return product.sum_to_size((len(g), *own[1:])).reshape(len(g), *operand.shape)

    def row_by_row(g: Tensor, at: Tensor, *values: Tensor) -> Tensor:
        product = derivative(g, *values)
        return _rows_of(operand, product.sum_to_size((*g.shape[:2], *own[1:])), at)

    if own[0] == 1:
        yield Use(operand, values, one_for_all)
    else:
        yield Use(operand, (_positions(operand), *values), row_by_row)


# Laying side by side --------------------------------------------------------------------------


def concatenate(tensors: Sequence[Tensor], dim: int = 0) -> Iterable[Use]:
    """Tensors side by side, as a class token before an example's patches."""
    dim %= tensors[0].ndim
    start = 0
    for operand in tensors:
        stop = start + operand.shape[dim]
        if dim > 0:
            take = functools.partial(_slice_rows, operand, dim, start, stop)
            yield Use(operand, (_positions(operand),), take)
        start = stop


def _slice_rows(operand: Tensor, dim: int, start: int, stop: int, g: Tensor, at: Tensor) -> Tensor:
    return _rows_of(operand, g.narrow(dim + 1, start, stop - start), at)


def _positions(operand: Tensor) -> Tensor:
    return torch.arange(len(operand), device=operand.device)


def _rows_of(
    operand: Tensor, values: Float[Tensor, "rows n ..."], at: Tensor
) -> Float[Tensor, "rows size ..."]:
    """Per-sample gradients of an operand with one row for each example: zero but in these."""
    grads = values.new_zeros(len(values), *operand.shape)
    grads[torch.arange(len(values), device=at.device)[:, None], at] = values
    return grads


RULES: dict[Any, Rule] = {
    F.linear: linear,
    torch.addmm: addmm,
    F.embedding: embedding,
    F.group_norm: group_norm,
    F.batch_norm: batch_norm,
    **dict.fromkeys((F.layer_norm, torch.layer_norm), layer_norm),
    **dict.fromkeys((F.rms_norm, torch.rms_norm), rms_norm),
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), convolution),
    **dict.fromkeys(
        (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), transposed_convolution
    ),
    **dict.fromkeys((torch.matmul, torch.mm, Tensor.matmul, Tensor.mm), matmul),
    **dict.fromkeys((torch.add, Tensor.add, Tensor.add_), add),
    **dict.fromkeys((torch.sub, Tensor.sub, Tensor.sub_), subtract),
    **dict.fromkeys((torch.mul, Tensor.mul), multiply),
    **dict.fromkeys((torch.div, Tensor.div), divide),
    **dict.fromkeys((torch.cat, torch.concat), concatenate),
}
