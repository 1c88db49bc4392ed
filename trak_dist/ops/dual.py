"""The kernel (UᵀU + λI)⁻¹ of fewer curvature rows than columns, by the factor of UUᵀ + λI.

With U (r, k), r < k, and M = UUᵀ + λI, by the Woodbury identity

    (UᵀU + λI)⁻¹ = (I − Uᵀ M⁻¹ U) / λ,

which is r·k for each target instead of k², and needs λ > 0. U is read a block of rows at a time, as
often as it is needed: memory is O(r²), and what a block and the targets take.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from trak_dist.configuration.config import EXACT_SCALE_DIM, SCALE_ROWS
from trak_dist.errors import SingularGram
from trak_dist.ops.kernel import Kernel, absolute, factorised, rank_deficient, rounding
from trak_dist.spacing import evenly_spaced


class Blocks(Protocol):
    """U in blocks of rows (rows, k), which may be read when they are asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Tensor: ...

    def __iter__(self) -> Iterator[Tensor]: ...


def no_kernel(k: int, rows: int) -> SingularGram:
    """The error of λ = 0 in the dual."""
    if k > rows:
        return rank_deficient(k, rows)
    return SingularGram(
        "λ = 0 has no dual form",
        where="reduce.kernel_form",
        next="reduce.kernel_form=primal, or a λ > 0",
    )


def sum_gram(blocks: Blocks, rows: int, device: torch.device) -> Float64[Tensor, "rows rows"]:
    """UUᵀ, in float64 products of each two blocks."""
    gram = torch.zeros(rows, rows, dtype=torch.float64, device=device)
    stop = 0
    for i in range(len(blocks)):
        left, other = blocks[i].double(), 0
        start, stop = stop, stop + len(left)
        for j in range(i + 1):
            right = left if i == j else blocks[j].double()
            gram[start:stop, other : other + len(right)] = left @ right.T
            other += len(right)
    return gram.tril_().add_(gram.tril(-1).T)


def factorise(
    gram: Float64[Tensor, "r r"],
    blocks: Blocks,
    *,
    dim: int,
    lambda_reg: float,
    lambda_unit: str,
    kernel_scale: str,
) -> Kernel:
    """Factorise UUᵀ + λI; parameters and errors are those of `kernel.factorise`.

    Above `EXACT_SCALE_DIM` columns `mean_abs` is the mean over `SCALE_ROWS` rows of the kernel:
    it weighs checkpoints against each other, and nothing else.
    """
    rows = len(gram)
    lambda_absolute = absolute(lambda_reg, lambda_unit, gram, dim)
    if lambda_absolute == 0:
        raise no_kernel(dim, rows)
    found, _ = factorised(gram, lambda_absolute, rounding(rows, dim))
    if kernel_scale == "none":
        return found
    some = evenly_spaced(dim, dim if dim <= EXACT_SCALE_DIM else SCALE_ROWS)
    columns = _columns(blocks, some)
    entries = _rows_of_kernel(
        some, torch.cholesky_solve(columns, found.factor), blocks, lambda_absolute
    )
    return replace(found, scale=1 / float(entries.abs().mean()))


def _rows_of_kernel(
    some: Sequence[int], solved: Float64[Tensor, "r some"], blocks: Blocks, lambda_absolute: float
) -> Float64[Tensor, "some k"]:
    """Some rows of (I − Uᵀ M⁻¹ U) / λ; `solved` are those columns of M⁻¹ U."""
    products = _times(solved.T, blocks)
    products[range(len(some)), some] -= 1
    return products.div_(-lambda_absolute)


@dataclass(frozen=True)
class Dual:
    """The kernel scale · (UᵀU + λI)⁻¹ by the factor of UUᵀ + λI."""

    factor: Float64[Tensor, "r r"]
    scale: float
    lambda_absolute: float
    blocks: Blocks

    def precondition(self, grads: Float[Tensor, "targets k"]) -> Float64[Tensor, "k targets"]:
        """B = K Gᵀ: t·r·k work, and U read twice."""
        g = grads.double().T
        solved = torch.cholesky_solve(_products(self.blocks, g), self.factor)
        return (g - _times(solved.T, self.blocks).T).mul_(self.scale / self.lambda_absolute)

    def self_influence(self, grads: Float[Tensor, "rows k"]) -> Float64[Tensor, "rows 1"]:
        """Each row x against itself: xᵀ K x."""
        x = grads.double().T
        solved: Tensor = torch.linalg.solve_triangular(
            self.factor, _products(self.blocks, x), upper=False
        )
        difference = x.square().sum(0) - solved.square_().sum(0)
        return difference[:, None].mul_(self.scale / self.lambda_absolute)


@dataclass(frozen=True)
class DualSpectrum:
    """UUᵀ = W diag(w) Wᵀ, from which the kernel of any λ > 0 follows; see `spectrum.Spectrum`."""

    values: Float64[Tensor, " r"]
    vectors: Float64[Tensor, "r r"]
    blocks: Blocks
    dim: int

    @classmethod
    def of(cls, gram: Float64[Tensor, "r r"], blocks: Blocks, dim: int) -> DualSpectrum:
        """Decompose UUᵀ."""
        values, vectors = torch.linalg.eigh(gram)
        return cls(values.clamp_min_(0), vectors, blocks, dim)

    @property
    def mean_diagonal(self) -> float:
        """The mean of the diagonal of UᵀU, the unit of a relative λ."""
        return float(self.values.sum()) / self.dim

    def predictions(
        self,
        sums: Float64[Tensor, "subsets k"],
        target_grads: Float64[Tensor, "targets k"],
        lambdas: Sequence[float],
        kernel_scale: str,
    ) -> Float64[Tensor, "lambdas subsets targets"]:
        """Z (UᵀU + λI)⁻¹ Gᵀ, scaled, for each absolute λ."""
        z = _products(self.blocks, sums.T).T @ self.vectors
        g = self.vectors.T @ _products(self.blocks, target_grads.T)
        plain = sums @ target_grads.T
        found = []
        for lambda_absolute in lambdas:
            inverse = 1 / (self.values + lambda_absolute)
            scale = 1.0
            if kernel_scale == "mean_abs":
                scale = 1 / self._mean_abs(inverse, lambda_absolute)
            found.append((plain - (z * inverse) @ g).mul_(scale / lambda_absolute))
        return torch.stack(found)

    def _mean_abs(self, inverse: Float64[Tensor, " r"], lambda_absolute: float) -> float:
        some = evenly_spaced(self.dim, SCALE_ROWS)
        columns = _columns(self.blocks, some)
        solved = self.vectors @ (inverse[:, None] * (self.vectors.T @ columns))
        return float(_rows_of_kernel(some, solved, self.blocks, lambda_absolute).abs().mean())


def _columns(blocks: Blocks, some: Sequence[int]) -> Float64[Tensor, "r some"]:
    return torch.cat([block[:, some] for block in blocks]).double()


def _products(blocks: Blocks, right: Float64[Tensor, "k t"]) -> Float64[Tensor, "r t"]:
    """U times `right`."""
    return torch.cat([block.double() @ right for block in blocks])


def _times(left: Float64[Tensor, "t r"], blocks: Blocks) -> Float64[Tensor, "t k"]:
    """`left` times U."""
    dim = blocks[0].shape[1]
    total, at = left.new_zeros(len(left), dim), 0
    for block in blocks:
        total.addmm_(left[:, at : at + len(block)], block.double())
        at += len(block)
    return total
