"""The dual form of the kernel against numpy, and against the primal form."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trak_dist.configuration import config
from trak_dist.errors import NonFiniteGram, SingularGram
from trak_dist.ops import dual, kernel
from trak_dist.ops.spectrum import Spectrum

CPU = torch.device("cpu")
SETTINGS: dict[str, Any] = {
    "lambda_reg": 0.3,
    "lambda_unit": "mean_diagonal",
    "kernel_scale": "mean_abs",
}


def drawn(rows: int, k: int, seed: int = 0) -> Tensor:
    """Columns of unequal size, so that the mean diagonal differs from each entry."""
    found = np.random.default_rng(seed).normal(size=(rows, k)) * np.linspace(0.2, 3, k)
    return torch.from_numpy(found).float()


def opened(u: Tensor, block: int = 3, **changed: Any) -> dual.Dual:
    chosen, blocks = SETTINGS | changed, u.split(block)
    gram = dual.sum_gram(blocks, len(u), CPU)
    found = dual.factorise(gram, blocks, dim=u.shape[1], **chosen)
    return dual.Dual(found.factor, found.scale, found.lambda_absolute, blocks)


@pytest.mark.parametrize("block", [1, 4, 7])
def test_the_gram_is_each_row_times_each(block: int) -> None:
    u = drawn(7, 5)
    found = dual.sum_gram(u.split(block), 7, CPU)
    np.testing.assert_allclose(found, u.double() @ u.double().T, rtol=1e-14, atol=1e-14)
    assert found.equal(found.T)


@given(
    rows=st.integers(1, 12),
    k=st.integers(1, 20),
    lambda_reg=st.floats(1e-3, 1e3),
    unit=st.sampled_from(["mean_diagonal", "absolute"]),
    scale=st.sampled_from(["mean_abs", "none"]),
    block=st.integers(1, 5),
)
@settings(deadline=None)
def test_both_forms_are_one_kernel(
    rows: int, k: int, lambda_reg: float, unit: str, scale: str, block: int
) -> None:
    u, g = drawn(rows, k), drawn(4, k, seed=1)
    chosen = {"lambda_reg": lambda_reg, "lambda_unit": unit, "kernel_scale": scale}
    found = opened(u, block, **chosen)
    wanted = kernel.factorise(kernel.sum_gram([u], k, CPU), rows=rows, **chosen)
    primal = kernel.Primal(wanted.factor, wanted.scale)
    for name in ("precondition", "self_influence"):
        a, b = getattr(found, name)(g), getattr(primal, name)(g)
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9 * float(b.abs().max()))


def test_what_is_worth_knowing_of_it_is_that_of_the_primal() -> None:
    u = drawn(9, 24)
    found = dual.factorise(dual.sum_gram([u], 9, CPU), [u], dim=24, **SETTINGS)
    wanted = kernel.factorise(kernel.sum_gram([u], 24, CPU), rows=9, **SETTINGS)
    same = ("lambda_absolute", "scale", "effective_rank", "effective_dimension")
    for name in same:
        assert asdict(found)[name] == pytest.approx(asdict(wanted)[name], rel=1e-10), name
    regular = (u.double() @ u.double().T).numpy() + found.lambda_absolute * np.eye(9)
    assert found.condition == pytest.approx(np.linalg.cond(regular, 1), rel=1e-10)


def test_the_scale_of_many_columns_is_that_of_some_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    u = drawn(9, 24)
    for limit, name in ((8, "EXACT_SCALE_DIM"), (5, "SCALE_ROWS")):
        monkeypatch.setattr(dual, name, limit)
    found = opened(u)
    some = [0, 6, 12, 17, 23]
    wanted = kernel.factorise(
        kernel.sum_gram([u], 24, CPU), rows=9, **SETTINGS | {"kernel_scale": "none"}
    )
    entries = torch.cholesky_inverse(wanted.factor)[some]
    assert found.scale == pytest.approx(1 / float(entries.abs().mean()), rel=1e-10)
    assert config.SCALE_ROWS < config.EXACT_SCALE_DIM


@pytest.mark.parametrize("scale", ["mean_abs", "none"])
def test_predictions_are_those_of_the_primal_spectrum(scale: str) -> None:
    u, z, g = drawn(6, 20), drawn(5, 20, seed=1).double(), drawn(3, 20, seed=2).double()
    found = dual.DualSpectrum.of(dual.sum_gram([u], 6, CPU), u.split(4), 20)
    wanted = Spectrum.of(kernel.sum_gram([u], 20, CPU))
    assert found.mean_diagonal == pytest.approx(wanted.mean_diagonal, rel=1e-10)
    lambdas = [found.mean_diagonal * x for x in (1e-3, 1.0, 30.0)]
    np.testing.assert_allclose(
        found.predictions(z, g, lambdas, scale),
        wanted.predictions(z, g, lambdas, scale),
        rtol=1e-6,
        atol=1e-9,
    )


def test_without_lambda_there_is_none() -> None:
    with pytest.raises(SingularGram, match="λ = 0 with proj_dim 5 > 3 train rows"):
        opened(drawn(3, 5), lambda_reg=0.0)


def test_rows_that_depend_on_each_other_need_a_lambda_that_shows() -> None:
    u = drawn(1, 5).expand(3, 5)
    with pytest.raises(SingularGram, match="singular to working precision"):
        opened(u, lambda_reg=1e-18)


def test_entries_that_are_not_finite_are_refused() -> None:
    u = drawn(3, 5)
    u[1, 2] = torch.nan
    with pytest.raises(NonFiniteGram):
        opened(u)
