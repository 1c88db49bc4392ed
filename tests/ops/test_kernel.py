"""Gram and kernel against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trak_dist.ops.kernel import Kernel, Primal, factorise, sum_gram

K, ROWS = 12, 40


def rows(n: int = ROWS, k: int = K, seed: int = 0) -> np.ndarray:
    """Columns of unequal size, so that the mean diagonal differs from each of its entries."""
    return np.random.default_rng(seed).standard_normal((n, k)) * np.linspace(0.5, 2, k)


def factorised(x: np.ndarray, lambda_reg: float = 0.3, **changes: str) -> Kernel:
    settings = {"lambda_unit": "absolute", "kernel_scale": "none", **changes}
    gram = torch.from_numpy(x.T @ x)
    return factorise(gram, rows=len(x), lambda_reg=lambda_reg, **settings)


def inverse(kernel: Kernel) -> np.ndarray:
    return torch.cholesky_inverse(kernel.factor).numpy() * kernel.scale


@pytest.mark.parametrize("k", [1, K, 127, 128, 300])
def test_the_gram_of_blocks_is_that_of_all_rows_in_float64(k: int) -> None:
    x = torch.from_numpy(rows(k=k)).float()
    gram = sum_gram(x.split(7), k, x.device)
    exact = x.double().numpy()
    assert torch.equal(gram, gram.T)
    # Products of float32 numbers are exact in float64: what is left is float64's summation.
    np.testing.assert_allclose(gram.numpy(), exact.T @ exact, rtol=1e-13, atol=1e-12)


@pytest.mark.parametrize("unit", ["absolute", "mean_diagonal"])
@pytest.mark.parametrize("scale", ["none", "mean_abs"])
@pytest.mark.parametrize("n", [ROWS, K - 5])
def test_the_kernel_is_the_inverse_that_numpy_finds(unit: str, scale: str, n: int) -> None:
    x = rows(n)
    gram = x.T @ x
    absolute = 0.3 * (np.diag(gram).mean() if unit == "mean_diagonal" else 1)
    wanted = np.linalg.inv(gram + absolute * np.eye(K))
    if scale == "mean_abs":
        wanted /= np.abs(wanted).mean()
    kernel = factorised(x, lambda_unit=unit, kernel_scale=scale)
    assert kernel.lambda_absolute == pytest.approx(absolute, rel=1e-14)
    assert kernel.factor.dtype == torch.float64
    assert torch.equal(kernel.factor, kernel.factor.tril())
    np.testing.assert_allclose(inverse(kernel), wanted, rtol=1e-10, atol=1e-12 * wanted.max())


@pytest.mark.parametrize("lambda_reg", [0, 0.3, 50])
def test_what_the_kernel_reports_is_what_numpy_finds(lambda_reg: float) -> None:
    x = rows()
    gram = x.T @ x
    regular = gram + lambda_reg * np.eye(K)
    kernel = factorised(x, lambda_reg)
    eigenvalues = np.linalg.eigvalsh(gram)
    assert kernel.condition == pytest.approx(np.linalg.cond(regular, 1), rel=1e-9)
    assert kernel.effective_rank == pytest.approx(sum(eigenvalues) ** 2 / sum(eigenvalues**2))
    dimension = sum(eigenvalues / (eigenvalues + lambda_reg))
    assert kernel.effective_dimension == pytest.approx(dimension, rel=1e-9)


def test_factorising_leaves_the_gram_as_it_was() -> None:
    gram = torch.from_numpy(rows().T @ rows())
    before = gram.clone()
    settings = {"lambda_unit": "mean_diagonal", "kernel_scale": "mean_abs"}
    factorise(gram, rows=ROWS, lambda_reg=1, **settings)
    assert torch.equal(gram, before)


def test_preconditioned_targets_are_the_scaled_kernel_times_the_targets() -> None:
    kernel = factorised(rows(), kernel_scale="mean_abs")
    targets = torch.randn(5, K, generator=torch.Generator().manual_seed(0))
    before = targets.clone()
    found = Primal(kernel.factor, kernel.scale).precondition(targets)
    assert found.shape == (K, 5)
    assert found.dtype == torch.float64
    wanted = inverse(kernel) @ targets.double().numpy().T
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-10, atol=1e-12)
    assert torch.equal(targets, before)
