"""Rules of linear layers: the weight's gradient is a sum over positions of outer products."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from trak_dist.ops.bundles import GROUPS, Bundles
from trak_dist.ops.example_axis import NO_EXAMPLE, RowsByExample
from trak_dist.ops.parameter_use import ParameterUse


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Iterable[ParameterUse]:
    """`x Wᵀ + b`."""
    yield ParameterUse(weight, (input,), _outer, _bundled_outer)
    if bias is not None:
        yield ParameterUse(bias, (), lambda g: g.flatten(1, -2).sum(1))


def matmul(input: Tensor, other: Tensor) -> Iterable[ParameterUse]:
    """`x W`."""
    if other.ndim == 2:
        yield ParameterUse(
            other,
            (input,),
            lambda g, x: _outer(x, g),
            lambda bundles, g, x: _bundled_outer(bundles, x, g),
        )


def addmm(
    input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Iterable[ParameterUse]:
    """`b + x W`, as in Hugging Face's Conv1D."""
    if beta == 1 and alpha == 1 and input.ndim == 1:
        yield from matmul(mat1, mat2)
        yield ParameterUse(input, (), lambda g: g.flatten(1, -2).sum(1))


def einsum(equation: str, *operands: Any) -> Iterable[ParameterUse]:
    """A product of two, examples being the first dimension of one and of the result."""
    terms, _, result = equation.replace(" ", "").partition("->")
    names = terms.split(",")
    several = operands[0] if isinstance(operands[0], list | tuple) else operands
    if len(several) != 2 or "." in equation or not result:
        return
    pairs = list(zip(several, names, strict=True))
    for (operand, own), (partner, other) in (pairs, pairs[::-1]):
        alone = own.count(result[0]) or any(letter not in result + other for letter in own)
        if result[0] == other[0] and not alone and all(len(set(n)) == len(n) for n in names):
            # In a formula's terms examples come before what the function saw.
            derivative = f"...{result},...{other}->...{own}"
            yield ParameterUse(operand, (partner,), functools.partial(torch.einsum, derivative))


def grouped(
    input: Tensor, mat2: Tensor, *, offs: Tensor | None = None, **_: Any
) -> Iterable[ParameterUse]:
    """`x W[e]`, where the rows before `offs[0]` are of expert e = 0, those up to `offs[1]` of 1."""
    if input.ndim != 2 or mat2.ndim != 3 or offs is None:
        return
    size = len(mat2)
    expert = torch.bucketize(torch.arange(len(input), device=offs.device), offs, right=True)

    def by_weights(
        g: Float[Tensor, "rows n o"], x: Float[Tensor, "rows n i"], expert: Tensor
    ) -> Float[Tensor, "rows experts i o"]:
        ids = size * torch.arange(len(g), device=expert.device)[:, None] + expert
        ids = ids.masked_fill(expert == size, NO_EXAMPLE).flatten()  # rows after the last group
        of_each = RowsByExample(ids.cpu(), size * len(g))
        x, g = (of_each.group(t.flatten(0, 1)) for t in (x, g))
        return torch.bmm(x.mT, g).view(-1, *mat2.shape)

    yield ParameterUse(mat2, (input, expert), by_weights)


def _outer(
    left: Float[Tensor, "rows ... a"], right: Float[Tensor, "rows ... b"]
) -> Float[Tensor, "rows a b"]:
    """The sum over positions of outer products, as one batched product."""
    return _products(left.flatten(1, -2).mT, right.flatten(1, -2))


def _bundled_outer(
    bundles: Bundles, left: Float[Tensor, "rows ... a"], right: Float[Tensor, "rows ... b"]
) -> Float[Tensor, "rows a width"]:
    """The same with bundles in place of b: a product for each group of rows of the weight."""
    left, right = left.flatten(1, -2), right.flatten(1, -2)
    rows, positions, _ = left.shape
    # With one position it is one look-up for the whole batch, of longer rows.
    sums = bundles.sums(right.mT) if positions > 1 else bundles.sums(right.transpose(0, 1).mT)[0].T
    groups = rows * GROUPS
    products = _products(
        left.mT.reshape(groups, -1, positions), sums.reshape(groups, -1, positions).mT
    )
    return products.view(rows, *bundles.bundled_shape)


def _products(
    left: Float[Tensor, "batch a positions"], right: Float[Tensor, "batch positions b"]
) -> Float[Tensor, "batch a b"]:
    return left * right if right.shape[1] == 1 else torch.bmm(left, right)
