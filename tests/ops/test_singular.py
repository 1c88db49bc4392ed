"""Which Grams are refused as singular: not by how one processor rounds the last pivot."""

from __future__ import annotations

from dataclasses import dataclass

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor

from trak_dist.errors import NonFiniteGram, SingularGram
from trak_dist.ops import rows as row_format
from trak_dist.ops.kernel import Kernel, factorise, rounding, sum_gram

EPS = torch.finfo(torch.float64).eps
K, ROWS = 12, 40
PROPOSAL = "reduce.lambda_reg=1.0 reduce.lambda_unit=mean_diagonal, or another λ > 0"


def taken(gram: Tensor, *, n: int, lambda_reg: float, unit: str = "absolute") -> Kernel:
    return factorise(gram, rows=n, lambda_reg=lambda_reg, lambda_unit=unit, kernel_scale="none")


def refusal(gram: Tensor, *, n: int, lambda_reg: float, unit: str = "absolute") -> str:
    with pytest.raises(SingularGram) as caught:
        taken(gram, n=n, lambda_reg=lambda_reg, unit=unit)
    return str(caught.value)


# Hundreds of Grams, rounded this way and that --------------------------------------------------


@dataclass(frozen=True)
class Draw:
    """A Gram of exactly dependent columns, with what another processor may make of its last bits.

    `some` is a random number below 1. λ = `lost` is below what rounding may do in any column;
    λ = `comfortable` is above it by as much as the 1-norm may exceed the 2-norm, and twice.
    """

    gram: Tensor
    n: int
    some: float

    @property
    def rounding(self) -> float:
        return rounding(len(self.gram), self.n)

    @property
    def lost(self) -> float:
        return self.some * self.rounding / 2 * float(self.gram.diagonal().min())

    @property
    def comfortable(self) -> float:
        room = 4 * self.rounding * len(self.gram) ** 0.5
        return (1 + self.some) * room * float(self.gram.diagonal().max())


def draw(seed: int) -> Draw:
    """Integers times powers of two, so that columns that depend on others do so exactly."""
    random = np.random.default_rng(seed)
    k = int(np.exp(random.uniform(np.log(2), np.log(200))))
    n = int(random.integers(k, 4 * k + 20))
    missing = int(random.integers(1, k)) if random.random() < 0.5 else 1
    x = random.integers(-8, 9, size=(n, k)).astype(np.float64)
    x[0] = 9  # no column is empty by chance
    match ("few rows", "repeated", "combined", "empty")[seed % 4]:
        case "few rows":
            n = k - missing
            x = x[:n]
        case "repeated":
            x[:, -missing:] = x[:, random.integers(0, k - missing, size=missing)]
        case "combined":
            x[:, -missing:] = x[:, :-missing] @ random.integers(-1, 2, size=(k - missing, missing))
            x[:, -missing:] += x[:, :1] * (np.abs(x[:, -missing:]).max(0) == 0)
        case "empty":
            x[:, -missing:] = 0
    x = x[:, random.permutation(k)]
    stored = torch.from_numpy(x * 2.0 ** random.integers(-40, 40)).float()
    if seed % 4 != 2 and random.random() < 0.5:  # rounding keeps columns equal, not their sums
        stored = row_format.decode(*row_format.encode(stored, "float16"))
    if random.random() < 0.5:
        stored *= 2.0 ** torch.from_numpy(random.integers(-20, 20, size=k))
    gram = sum_gram(stored.split(16), k, stored.device)
    return Draw(noisy(gram, random, eps=random.choice([0, 1, 4])), n, random.random())


def noisy(gram: Tensor, random: np.random.Generator, *, eps: float) -> Tensor:
    """Each entry moved by up to so many ε of what sums of products of its columns are."""
    moved = np.tril(random.uniform(-eps * EPS, eps * EPS, size=gram.shape))
    root = gram.diagonal().sqrt()
    return gram + torch.from_numpy(moved + np.tril(moved, -1).T) * root * root[:, None]


DRAWS = range(600)


def test_a_singular_gram_is_refused_whatever_the_last_bits_say() -> None:
    accepted = 0
    for seed in DRAWS:
        drawn = draw(seed)
        accepted += not int(torch.linalg.cholesky_ex(drawn.gram).info)
        text = refusal(drawn.gram, n=drawn.n, lambda_reg=drawn.lost)
        assert "singular to working precision at λ = " in text or "has rank" in text, seed
    assert accepted > 50  # by Cholesky's algorithm: else this test would show little


def test_with_a_lambda_of_comfortable_size_it_is_taken_whatever_the_last_bits_say() -> None:
    for seed in DRAWS:
        drawn = draw(seed)
        kernel = taken(drawn.gram, n=drawn.n, lambda_reg=drawn.comfortable)
        assert 0 < kernel.effective_dimension < len(drawn.gram), seed


def test_a_lambda_lost_in_rounding_is_refused_and_a_larger_one_taken() -> None:
    for seed in range(200):
        random = np.random.default_rng(seed)
        x = random.standard_normal((K - 1, K)) * np.linspace(0.5, 2, K)
        gram = noisy(torch.from_numpy(x.T @ x), random, eps=seed % 5)
        text = refusal(gram, n=K - 1, lambda_reg=1e-17, unit="mean_diagonal")
        assert "singular to working precision at λ = " in text
        assert taken(gram, n=K - 1, lambda_reg=1e-6, unit="mean_diagonal").condition > 1e5


# The size of rounding --------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "n"), [(1, 40), (2, 10), (48, 100), (48, 3_000), (8, 100_000)])
@pytest.mark.parametrize("rows", ["random", "positive", "repeated"])
def test_rounding_is_not_underestimated(k: int, n: int, rows: str) -> None:
    random = np.random.default_rng(k)
    x = random.standard_normal((n, k), dtype=np.float32)
    if rows == "positive":
        x = np.abs(x) + 1
    if rows == "repeated":  # every sum errs to one side for as long as its exponent stays
        x[:] = x[0]
    gram = sum_gram(torch.from_numpy(x).split(1000), k, torch.device("cpu")).numpy()
    exact = np.zeros((k, k), np.longdouble)
    for block in np.array_split(x.astype(np.longdouble), -(-n // 1000)):
        exact += block.T @ block
    root = np.sqrt(np.diag(exact))
    error = ((gram - exact) / root / root[:, None]).astype(float)
    assert np.linalg.norm(error, 2) < rounding(k, n)


def test_what_is_taken_is_right_by_its_distance_whatever_the_sizes_of_columns() -> None:
    """The kernel against 200 digits, from well-conditioned Grams to those just not refused."""
    k, n, distances = 6, 9, []
    for seed in range(60):
        random = np.random.default_rng(seed)
        sizes = 2.0 ** random.integers(-60, 60, size=k)
        x = random.standard_normal((n, k), dtype=np.float32).astype(np.float64)
        x[:, -1] = x[:, 0] + 10.0 ** random.uniform(-6, 0) * x[:, -1]
        x = (x.astype(np.float32) * sizes).astype(np.float64)
        with mpmath.workdps(200):
            exact = mpmath.matrix(x.tolist())
            inverse = np.array((exact.T * exact) ** -1, dtype=np.float64).reshape(k, k)
        found = taken(torch.from_numpy(x.T @ x), n=n, lambda_reg=0)
        root = np.linalg.norm(x, axis=0)
        scaled, wanted = (
            m * root * root[:, None]
            for m in (torch.cholesky_inverse(found.factor).numpy(), inverse)
        )
        distance = 1 / np.linalg.norm(wanted, 1)
        distances.append(distance)
        error = np.linalg.norm(scaled - wanted, 2) / np.linalg.norm(wanted, 2)
        assert error < rounding(k, n) / distance
    assert min(distances) < 100 * rounding(k, n)


@pytest.mark.parametrize("power", [-140, -1, 90])
def test_units_of_the_gradients_change_nothing(power: int) -> None:
    random = np.random.default_rng(0)
    x = torch.from_numpy(random.standard_normal((ROWS, K)))
    one, other = (
        taken(g.T @ g, n=ROWS, lambda_reg=0.3, unit="mean_diagonal") for g in (x, x * 2.0**power)
    )
    assert torch.equal(one.factor * 2.0**power, other.factor)
    assert one.condition == other.condition


# Single cases ----------------------------------------------------------------------------------


def test_more_dimensions_than_rows_are_refused_without_lambda() -> None:
    x = np.random.default_rng(0).standard_normal((K - 1, K))
    assert refusal(torch.from_numpy(x.T @ x), n=K - 1, lambda_reg=0) == (
        f"λ = 0 with proj_dim 12 > 11 train rows: XᵀX has rank 11 at most\n  next:  {PROPOSAL}"
    )


def test_a_duplicated_column_is_refused_without_lambda() -> None:
    gram = torch.full((2, 2), 4.0, dtype=torch.float64)
    assert refusal(gram, n=7, lambda_reg=0) == (
        "XᵀX + λI is singular to working precision at λ = 0: scaled to a diagonal of ones "
        "it is 0.0e+00 from a singular matrix, less than 5.3e-15\n"
        f"  next:  {PROPOSAL}"
    )


def test_one_column_is_singular_only_if_it_is_zero() -> None:
    gram = torch.full((1, 1), 1e-60, dtype=torch.float64)
    assert taken(gram, n=1, lambda_reg=0).condition == pytest.approx(1, rel=1e-15)
    assert "singular to working precision" in refusal(gram * 0, n=1, lambda_reg=0)


@pytest.mark.parametrize("unit", ["absolute", "mean_diagonal"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at", [(0, 0), (3, 7), slice(None)])
def test_a_gram_that_is_not_finite_is_refused(bad: float, unit: str, at: object) -> None:
    gram = torch.eye(K, dtype=torch.float64)
    gram[at] = bad
    for lambda_reg in (0, 1):
        with pytest.raises(NonFiniteGram, match="XᵀX has entries that are not finite"):
            taken(gram, n=ROWS, lambda_reg=lambda_reg, unit=unit)


def test_a_gram_of_zeros_is_refused_but_with_an_absolute_lambda() -> None:
    gram = torch.zeros(K, K, dtype=torch.float64)
    for lambda_reg, unit in ((0, "absolute"), (0, "mean_diagonal"), (1, "mean_diagonal")):
        text = refusal(gram, n=ROWS, lambda_reg=lambda_reg, unit=unit)
        assert "singular to working precision at λ = 0" in text
    kernel = taken(gram, n=ROWS, lambda_reg=4)
    assert torch.equal(kernel.factor, 2 * torch.eye(K, dtype=torch.float64))
    assert (kernel.condition, kernel.effective_rank, kernel.effective_dimension) == (1, 0, 0)
