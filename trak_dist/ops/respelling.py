"""Functions that parameters go into, spelled by others that have rules (for `ops.rewriting`).

Each takes its function's arguments, and gives a call of the same result; or None where they are of
a kind that it does not spell.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from trak_dist.ops.example_axis import ExampleAxis, axis_of

Respelled = Callable[[], Any] | None
_INDICES = (torch.int64, torch.int32)


def look_up(table: Tensor, index: Any) -> Respelled:
    """`table[index]`, where an index of examples chooses rows of a parameter."""
    if not isinstance(index, Tensor) or index.dtype not in _INDICES or axis_of(index) is None:
        return None
    if not index.ndim:  # which of a model's parts is used is a choice, as `if` and `for` are
        return lambda: table[int(index)]

    def rows() -> Tensor:
        at = torch.where(index < 0, index + len(table), index)
        found = F.embedding(at, table.reshape(len(table), -1))
        return found.reshape(*index.shape, *table.shape[1:])

    return rows


def select(table: Tensor, dim: int, index: Tensor) -> Respelled:
    """`index_select` of rows."""
    return look_up(table, index) if dim == 0 and index.ndim else None


def vector_product(input: Tensor, other: Tensor) -> Respelled:
    """`x @ v`."""
    if other.ndim == 1 and input.ndim > 1:
        return lambda: torch.matmul(input, other[:, None])[..., 0]
    return None


def product(input: Tensor, other: Tensor) -> Respelled:
    """`x @ v`; and of matrices side by side, which rows of several examples are multiplied by."""
    found = axis_of(input)
    if input.ndim == other.ndim == 3 and isinstance(found, ExampleAxis) and found.dim == 1:
        return lambda: torch.einsum("nhi,hio->nho", input.transpose(0, 1), other).transpose(0, 1)
    return vector_product(input, other)


def bilinear(
    input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Respelled:
    """`x₁ᵀ W x₂`, a linear function of all products."""
    return lambda: F.linear(
        (input1[..., :, None] * input2[..., None, :]).flatten(-2), weight.flatten(1), bias
    )


def embedding_bag(  # noqa: PLR0913, PLR0917
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,  # noqa: ARG001
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,  # noqa: ARG001
    padding_idx: int | None = None,
) -> Respelled:
    """Sums or means of rows of a table."""
    if input.ndim != 2 or offsets is not None or scale_grad_by_freq or mode == "max":
        return None

    def bags() -> Tensor:
        rows = F.embedding(input, weight, None, max_norm, norm_type)
        if per_sample_weights is not None:
            rows = rows * per_sample_weights[..., None]
        if padding_idx is None:
            return rows.sum(1) if mode == "sum" else rows.mean(1)
        blank = (input == padding_idx % len(weight))[..., None]
        found = rows.masked_fill(blank, 0).sum(1)
        return found if mode == "sum" else found / (~blank).sum(1).clamp(min=1)

    return bags


def masked_fill(input: Tensor, mask: Tensor, value: Any) -> Respelled:
    """A number that is a parameter, where a mask is true."""
    return (lambda: torch.where(mask, value, input)) if isinstance(value, Tensor) else None


def converted(input: Tensor, other: Any, *_: Any, **__: Any) -> Respelled:
    """The type and the device of another tensor."""
    if not isinstance(other, Tensor) or _ or __:
        return None
    return lambda: input.to(device=other.device, dtype=other.dtype)


RESPELLED: dict[Any, Callable[..., Respelled]] = {
    Tensor.__getitem__: look_up,
    **dict.fromkeys((torch.index_select, Tensor.index_select), select),
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), product),
    **dict.fromkeys((torch.bmm, Tensor.bmm), product),
    **dict.fromkeys((torch.mv, Tensor.mv), vector_product),
    F.bilinear: bilinear,
    torch.bilinear: bilinear,
    F.embedding_bag: embedding_bag,
    **dict.fromkeys((torch.masked_fill, Tensor.masked_fill), masked_fill),
    **dict.fromkeys((Tensor.to, Tensor.type_as), converted),
    Tensor.expand_as: lambda x, other: lambda: x.expand(other.shape),
    Tensor.view_as: lambda x, other: lambda: x.view(other.shape),
    Tensor.reshape_as: lambda x, other: lambda: x.reshape(other.shape),
}
