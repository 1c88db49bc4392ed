"""Predictions of many λ from one decomposition, against the formula with an inverse for each."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trak_dist.configuration.config import SCALE_ROWS
from trak_dist.ops.kernel import factorise
from trak_dist.ops.spectrum import Spectrum

LAMBDAS = (0.01, 0.3, 20.0)


def case(k: int, rows: int = 300) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """X (rows, k) with columns of unlike size, sums Z (5, k) and target grads G (7, k)."""
    random = np.random.default_rng(k)
    x = random.normal(size=(rows, k)) * np.geomspace(1, 0.01, k)
    return x, random.normal(size=(5, k)), random.normal(size=(7, k))


def direct(x: np.ndarray, z: np.ndarray, g: np.ndarray, lambda_: float, scale: str) -> np.ndarray:
    inverse = np.linalg.inv(x.T @ x + lambda_ * np.eye(x.shape[1]))
    divisor = np.abs(inverse).mean() if scale == "mean_abs" else 1.0
    return z @ inverse @ g.T / divisor


def found(x: np.ndarray, z: np.ndarray, g: np.ndarray, scale: str) -> np.ndarray:
    spectrum = Spectrum.of(torch.from_numpy(x.T @ x))
    return spectrum.predictions(torch.from_numpy(z), torch.from_numpy(g), LAMBDAS, scale).numpy()


@pytest.mark.parametrize("k", [1, 8, SCALE_ROWS, 200])
def test_predictions_are_the_formulas(k: int) -> None:
    x, z, g = case(k)
    predicted = found(x, z, g, "none")
    assert predicted.shape == (3, 5, 7)
    for one, lambda_ in zip(predicted, LAMBDAS, strict=True):
        wanted = direct(x, z, g, lambda_, "none")
        np.testing.assert_allclose(one, wanted, rtol=0, atol=1e-10 * np.abs(wanted).max())


@pytest.mark.parametrize("k", [1, 8, SCALE_ROWS])
def test_up_to_so_many_rows_the_scale_is_that_of_all_entries(k: int) -> None:
    x, z, g = case(k)
    for one, lambda_ in zip(found(x, z, g, "mean_abs"), LAMBDAS, strict=True):
        wanted = direct(x, z, g, lambda_, "mean_abs")
        np.testing.assert_allclose(one, wanted, rtol=0, atol=1e-10 * np.abs(wanted).max())


@pytest.mark.parametrize("k", [129, 256, 300])
def test_above_the_scale_is_taken_over_a_sample_and_changes_nothing_else(k: int) -> None:
    random = np.random.default_rng(k)
    x, z, g = (random.normal(size=(rows, k)) for rows in (600, 5, 7))
    for one, lambda_ in zip(found(x, z, g, "mean_abs"), LAMBDAS, strict=True):
        ratio = one / direct(x, z, g, lambda_, "mean_abs")
        assert np.ptp(ratio) < 1e-8
        assert ratio.mean() == pytest.approx(1, abs=0.03)  # random rows are alike


def test_a_singular_gram_has_predictions_at_every_positive_lambda() -> None:
    x, z, g = case(40, rows=10)
    for one, lambda_ in zip(found(x, z, g, "none"), LAMBDAS, strict=True):
        wanted = direct(x, z, g, lambda_, "none")
        np.testing.assert_allclose(one, wanted, rtol=0, atol=1e-9 * np.abs(wanted).max())


def test_unit_and_kernel_are_those_of_the_factor() -> None:
    x, z, g = case(32)
    gram = torch.from_numpy(x.T @ x)
    spectrum = Spectrum.of(gram)
    assert spectrum.mean_diagonal == pytest.approx(float(gram.diagonal().mean()), rel=1e-12)
    for scale in ("none", "mean_abs"):
        kernel = factorise(
            gram, rows=300, lambda_reg=0.3, lambda_unit="mean_diagonal", kernel_scale=scale
        )
        solved = torch.cholesky_solve(torch.from_numpy(g.T), kernel.factor) * kernel.scale
        predicted = spectrum.predictions(
            torch.from_numpy(z), torch.from_numpy(g), [kernel.lambda_absolute], scale
        )
        torch.testing.assert_close(predicted[0], torch.from_numpy(z) @ solved)
