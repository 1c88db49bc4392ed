"""The kernel (XᵀX + λI)⁻¹ of one checkpoint, in float64, held as a Cholesky factor.

Everything here is O(k²) in memory, whatever the number of rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from trak_dist.errors import NonFiniteGram, SingularGram

SCALE_ROWS = 64
SMALL_TRIANGLE = 128  # below, the half that symmetry saves costs more than it saves


def sum_gram(
    blocks: Iterable[Float[Tensor, "rows k"]], dim: int, device: torch.device
) -> Float64[Tensor, "k k"]:
    """XᵀX from blocks of rows of X.

    Products are formed in float64: scores divide by the small eigenvalues of the sum, where a
    float32 product's rounding would show from a condition number of about 10⁴ on. What lies above
    the diagonal is not computed, but copied in the end.
    """
    gram = torch.zeros(dim, dim, dtype=torch.float64, device=device)
    for block in blocks:
        _add_lower(gram, block.T.double().contiguous())  # one after the other: products like that
    return gram.tril_().add_(gram.tril(-1).T)


def _add_lower(gram: Float64[Tensor, "k k"], columns: Float64[Tensor, "k rows"]) -> None:
    """Add the lower triangle of a block's Gram: two halves, and the square below the first."""
    if len(gram) <= SMALL_TRIANGLE:
        gram.addmm_(columns, columns.T)
        return
    half = len(gram) // 2
    upper, lower = columns[:half], columns[half:]
    _add_lower(gram[:half, :half], upper)
    _add_lower(gram[half:, half:], lower)
    gram[half:, :half].addmm_(lower, upper.T)


@dataclass(frozen=True)
class Kernel:
    """The factor L of XᵀX + λI = LLᵀ, and what is worth knowing about it.

    `scale` multiplies the kernel; `condition` is ‖M‖₁‖M⁻¹‖₁ of M = XᵀX + λI; `effective_rank` is
    tr(XᵀX)² / tr((XᵀX)²); `effective_dimension` is tr(XᵀX M⁻¹).
    """

    factor: Float64[Tensor, "k k"]
    lambda_absolute: float
    scale: float
    condition: float
    effective_rank: float
    effective_dimension: float


def factorise(
    gram: Float64[Tensor, "k k"],
    *,
    rows: int,
    lambda_reg: float,
    lambda_unit: str,
    kernel_scale: str,
) -> Kernel:
    """Factorise XᵀX + λI.

    Parameters
    ----------
    gram : (k, k) float64
        XᵀX.
    rows : int
        n, the rows of X.
    lambda_reg, lambda_unit
        λ, `absolute` or as a multiple of the `mean_diagonal` of XᵀX.
    kernel_scale : str
        `none` for the kernel as in the paper, `mean_abs` to divide it by the mean of its entries'
        absolute values, as the reference implementation does.

    Raises
    ------
    NonFiniteGram
        If XᵀX has entries that are not finite.
    SingularGram
        If XᵀX + λI is singular to working precision: within `rounding` of a singular matrix,
        however well a processor happened to round. Units do not matter: columns of very different
        size are no reason, an all-zero one is at λ = 0.
    """
    k = len(gram)
    if not gram.isfinite().all():
        raise NonFiniteGram("XᵀX has entries that are not finite")
    mean_diagonal = float(gram.diagonal().mean())
    lambda_absolute = lambda_reg * (mean_diagonal if lambda_unit == "mean_diagonal" else 1.0)
    if lambda_absolute == 0 and k > rows:
        raise rank_deficient(k, rows)
    regular = gram.clone()
    regular.diagonal().add_(lambda_absolute)
    factor, failed_at = torch.linalg.cholesky_ex(regular)
    if failed_at:
        raise _singular(lambda_absolute, 0.0, k, rows)
    inverse = torch.cholesky_inverse(factor)
    trace_of_inverse = float(inverse.diagonal().sum())
    inverse.abs_()
    distance = _distance(inverse, regular.diagonal())
    if not distance >= 2 * rounding(k, rows):
        raise _singular(lambda_absolute, distance, k, rows)
    norm, norm_of_inverse = (float(m.sum(0).max()) for m in (regular.abs_(), inverse))
    squares = float(gram.square().sum())
    return Kernel(
        factor=factor,
        lambda_absolute=lambda_absolute,
        scale=1 / float(inverse.mean()) if kernel_scale == "mean_abs" else 1.0,
        condition=norm * norm_of_inverse,
        effective_rank=(mean_diagonal * k) ** 2 / squares if squares else 0.0,
        effective_dimension=k - lambda_absolute * trace_of_inverse,
    )


def rounding(k: int, rows: int) -> float:
    """How far rounding may move H, XᵀX + λI scaled to a diagonal of ones, in the 2-norm.

    The sums of XᵀX, adding λ, and Cholesky's algorithm all err in entry ij by a multiple of
    √(m_ii m_jj) (Higham 2002, (3.5) and theorem 10.3): in H by that multiple, whatever the columns'
    sizes. A sum of n products errs like a random walk (Higham and Mary 2019), by 2√n·ε at most in
    what was measured up to n = 10⁶; a factor's entries are sums of k products. A k by k matrix of
    such errors has a norm of k times as much at most, and of a tenth of that as a rule.
    """
    return 2 * k * math.sqrt(rows + k) * torch.finfo(torch.float64).eps


def _distance(inverse: Float64[Tensor, "k k"], diagonal: Float64[Tensor, " k"]) -> float:
    """1/‖H⁻¹‖₁ from |M⁻¹| and the diagonal of M: the smallest change that makes H singular.

    A singular H that rounding moved by e in the 2-norm has e at most.
    """
    root = diagonal.sqrt()
    return 1 / float((inverse @ root).mul_(root).max())


@dataclass(frozen=True)
class Spectrum:
    """XᵀX = V diag(w) Vᵀ, from which the kernel of any λ follows in O(k²)."""

    values: Float64[Tensor, " k"]
    vectors: Float64[Tensor, "k k"]

    @classmethod
    def of(cls, gram: Float64[Tensor, "k k"]) -> Spectrum:
        """Decompose XᵀX."""
        values, vectors = torch.linalg.eigh(gram)
        return cls(values.clamp_min_(0), vectors)

    @property
    def mean_diagonal(self) -> float:
        """The mean of the diagonal of XᵀX, the unit of a relative λ."""
        return float(self.values.mean())

    def predictions(
        self,
        sums: Float64[Tensor, "subsets k"],
        target_grads: Float64[Tensor, "targets k"],
        lambdas: Sequence[float],
        kernel_scale: str,
    ) -> Float64[Tensor, "lambdas subsets targets"]:
        """Z (XᵀX + λI)⁻¹ Gᵀ, scaled, for each absolute λ.

        With `mean_abs` the mean of the kernel's absolute entries is taken over `SCALE_ROWS` of its
        rows: it weighs checkpoints against each other, and nothing else.
        """
        z, g = sums @ self.vectors, target_grads @ self.vectors
        some = self.vectors[:: max(1, len(self.vectors) // SCALE_ROWS)]
        found = []
        for lambda_absolute in lambdas:
            inverse = 1 / (self.values + lambda_absolute)
            scale = 1.0
            if kernel_scale == "mean_abs":
                scale = 1 / float(((some * inverse) @ self.vectors.T).abs().mean())
            found.append((z * inverse) @ g.T * scale)
        return torch.stack(found)


_PROPOSAL = "reduce.lambda_reg=1.0 reduce.lambda_unit=mean_diagonal, or another λ > 0"


def _singular(lambda_absolute: float, distance: float, k: int, rows: int) -> SingularGram:
    return SingularGram(
        f"XᵀX + λI is singular to working precision at λ = {lambda_absolute:.3g}: scaled to a "
        f"diagonal of ones it is {distance:.1e} from a singular matrix, "
        f"less than {2 * rounding(k, rows):.1e}",
        next=_PROPOSAL,
    )


def rank_deficient(k: int, rows: int) -> SingularGram:
    """The error of λ = 0 with more columns than rows."""
    return SingularGram(
        f"λ = 0 with proj_dim {k} > {rows} train rows: XᵀX has rank {rows} at most",
        next=_PROPOSAL,
    )


def precondition(
    factor: Float64[Tensor, "k k"], scale: float, target_grads: Float[Tensor, "targets k"]
) -> Float64[Tensor, "k targets"]:
    """B = scale · (XᵀX + λI)⁻¹ Gᵀ: t·k² work, so that new targets cost only themselves."""
    return torch.cholesky_solve(target_grads.double().T, factor).mul_(scale)


def self_influence(
    factor: Float64[Tensor, "k k"], scale: float, grads: Float[Tensor, "rows k"]
) -> Float64[Tensor, "rows 1"]:
    """Each row x against itself: scale · xᵀ(XᵀX + λI)⁻¹x."""
    solved: Tensor = torch.linalg.solve_triangular(factor, grads.double().T, upper=False)
    return solved.square_().sum(0)[:, None].mul_(scale)
