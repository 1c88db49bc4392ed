"""The kernel (UᵀU + λI)⁻¹ of one checkpoint, in float64, held as a Cholesky factor.

U (r, k) are the curvature rows; without curvature they are X. Everything here is O(k²) in memory,
whatever the number of rows; `ops.dual` is for fewer rows than columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from trak_dist.errors import NonFiniteGram, SingularGram

SMALL_TRIANGLE = 128  # below, the half that symmetry saves costs more than it saves


def sum_gram(
    blocks: Iterable[Float[Tensor, "rows k"]], dim: int, device: torch.device
) -> Float64[Tensor, "k k"]:
    """UᵀU from blocks of rows of U.

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
    """The factor L of M = LLᵀ, and what is worth knowing about it; M = S + λI, S = UᵀU.

    In the dual S = UUᵀ. `scale` multiplies the kernel; `condition` is ‖M‖₁‖M⁻¹‖₁;
    `effective_rank` is tr(S)² / tr(S²); `effective_dimension` is tr(S M⁻¹). The last two are the
    same in both.
    """

    factor: Float64[Tensor, "d d"]
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
    """Factorise UᵀU + λI.

    Parameters
    ----------
    gram : (k, k) float64
        UᵀU.
    rows : int
        r, the rows of U.
    lambda_reg, lambda_unit
        λ, `absolute` or as a multiple of the `mean_diagonal` of UᵀU.
    kernel_scale : str
        `none` for the kernel as in the paper, `mean_abs` to divide it by the mean of its entries'
        absolute values, as the reference implementation does.

    Raises
    ------
    NonFiniteGram
        If UᵀU has entries that are not finite.
    SingularGram
        If UᵀU + λI is singular to working precision: within `rounding` of a singular matrix,
        however well a processor happened to round. Units do not matter: columns of very different
        size are no reason, an all-zero one is at λ = 0.
    """
    k = len(gram)
    lambda_absolute = absolute(lambda_reg, lambda_unit, gram, k)
    if lambda_absolute == 0 and k > rows:
        raise rank_deficient(k, rows)
    found, inverse = factorised(gram, lambda_absolute, rounding(k, rows))
    scale = 1 / float(inverse.mean()) if kernel_scale == "mean_abs" else 1.0
    return replace(found, scale=scale)


def absolute(lambda_reg: float, unit: str, gram: Float64[Tensor, "d d"], dim: int) -> float:
    """Λ in absolute terms; the mean diagonal of UᵀU is the trace of either Gram over k."""
    if not gram.isfinite().all():
        raise NonFiniteGram("XᵀX has entries that are not finite")
    if unit == "absolute":
        return lambda_reg
    mean_diagonal = float(gram.diagonal().mean())
    return lambda_reg * (mean_diagonal if len(gram) == dim else mean_diagonal * len(gram) / dim)


def factorised(
    gram: Float64[Tensor, "d d"], lambda_absolute: float, error: float
) -> tuple[Kernel, Float64[Tensor, "d d"]]:
    """The factor of S + λI, and the absolute values of its inverse; `error` is `rounding`.

    Raises
    ------
    SingularGram
        If it is singular to working precision.
    """
    regular = gram.clone()
    regular.diagonal().add_(lambda_absolute)
    factor, failed_at = torch.linalg.cholesky_ex(regular)
    if failed_at:
        raise _singular(lambda_absolute, 0.0, error)
    inverse = torch.cholesky_inverse(factor)
    trace_of_inverse = float(inverse.diagonal().sum())
    inverse.abs_()
    distance = _distance(inverse, regular.diagonal())
    if not distance >= 2 * error:
        raise _singular(lambda_absolute, distance, error)
    norm, norm_of_inverse = (float(m.sum(0).max()) for m in (regular.abs_(), inverse))
    squares = float(gram.flatten().dot(gram.flatten()))  # no temporary of its size
    found = Kernel(
        factor=factor,
        lambda_absolute=lambda_absolute,
        scale=1.0,
        condition=norm * norm_of_inverse,
        effective_rank=(float(gram.diagonal().mean()) * len(gram)) ** 2 / squares
        if squares
        else 0.0,
        effective_dimension=len(gram) - lambda_absolute * trace_of_inverse,
    )
    return found, inverse


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


_PROPOSAL = "reduce.lambda_reg=1.0 reduce.lambda_unit=mean_diagonal, or another λ > 0"


def _singular(lambda_absolute: float, distance: float, error: float) -> SingularGram:
    return SingularGram(
        f"XᵀX + λI is singular to working precision at λ = {lambda_absolute:.3g}: scaled to a "
        f"diagonal of ones it is {distance:.1e} from a singular matrix, "
        f"less than {2 * error:.1e}",
        next=_PROPOSAL,
    )


def rank_deficient(k: int, rows: int) -> SingularGram:
    """The error of λ = 0 with more columns than rows."""
    return SingularGram(
        f"λ = 0 with proj_dim {k} > {rows} train rows: XᵀX has rank {rows} at most",
        next=_PROPOSAL,
    )


@dataclass(frozen=True)
class Primal:
    """The kernel scale · (UᵀU + λI)⁻¹ by the factor of UᵀU + λI."""

    factor: Float64[Tensor, "k k"]
    scale: float

    def precondition(self, grads: Float[Tensor, "targets k"]) -> Float64[Tensor, "k targets"]:
        """B = K Gᵀ: t·k² work, so that new targets cost only themselves."""
        return torch.cholesky_solve(grads.double().T, self.factor).mul_(self.scale)

    def self_influence(self, grads: Float[Tensor, "rows k"]) -> Float64[Tensor, "rows 1"]:
        """Each row x against itself: xᵀ K x."""
        solved: Tensor = torch.linalg.solve_triangular(self.factor, grads.double().T, upper=False)
        return solved.square_().sum(0)[:, None].mul_(self.scale)
