"""Random projections as sketches: unbiased, of the variance stated, and the same everywhere."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from devices import DEVICE

from trak_dist.ops import projection, segments
from trak_dist.ops.projection import fold, make_projector

RANDOM = ("sjlt", "rademacher", "gaussian")
SHAPES = {"a": torch.Size([6]), "b": torch.Size([3, 2]), "c": torch.Size([41])}
DRAWS = 6000
CPU = torch.device("cpu")


def matrix(
    kind: str,
    *,
    dim: int = 8,
    seed: int = 0,
    model_id: int = 0,
    order: str = "abc",
    passes: int = 1,
    device: torch.device = CPU,
):
    """The projection as a (p, dim) matrix, parameters in the order a, b, c.

    Its rows are projections of unit vectors: no sum is rounded, so matrices compare exactly.
    """
    projector = make_projector(kind, dim=dim, seed=seed, model_id=model_id, shapes=SHAPES)
    blocks = {}
    for name in order * passes:
        size = SHAPES[name].numel()
        blocks[name] = torch.zeros(size, dim, device=device)
        unit = torch.eye(size, device=device)
        projector.add(blocks[name], name, unit.view(size, *SHAPES[name]))
    return torch.cat([blocks[n] for n in sorted(blocks)]).cpu()


# Statistics -----------------------------------------------------------------------------------


def variance(kind: str, x: np.ndarray, y: np.ndarray, k: int) -> float:
    full = (x @ x) * (y @ y) + (x @ y) ** 2
    return float(full if kind == "gaussian" else full - 2 * (x**2) @ (y**2)) / k


@pytest.mark.parametrize("kind", RANDOM)
def test_sketched_inner_products_have_the_mean_and_the_variance_of_theory(kind: str) -> None:
    """Over many seeds, for x and y with mass in two parameters of one shape.

    Were the two parameters projected alike, ⟨Sx, Sy⟩ would gain cross terms in its mean. A few
    large entries make Σ xᵢ²yᵢ² count, so that the variances of the two theories stay apart.
    """
    k = 4
    x = np.array([2.0, 1, 0.5, 0, 1, -0.5, 1, 1, 0, 0.5, 1, 1])
    y = np.array([2.0, 0.5, -1, 1, 1, 0, 1, 0, 0.5, 1, 1, 0.5])
    shapes = {"a": torch.Size([6]), "b": torch.Size([6])}
    both = torch.from_numpy(np.stack([x, y])).float()
    products = np.empty(DRAWS)
    for seed in range(DRAWS):
        projector = make_projector(kind, dim=k, seed=seed, model_id=0, shapes=shapes)
        sketch = torch.zeros(2, k)
        projector.add(sketch, "a", both[:, :6])
        projector.add(sketch, "b", both[:, 6:])
        products[seed] = float(sketch[0].double() @ sketch[1].double())
    theory = variance(kind, x, y, k)
    # z-test of the mean, with the variance of theory: 5 σ, once in 10⁶ draws if all is well.
    assert abs(products.mean() - x @ y) < 5 * math.sqrt(theory / DRAWS)
    # The sample variance around a known mean has standard error √((μ₄ − σ⁴)/N), μ₄ the fourth
    # central moment, here from the same sample.
    squares = (products - x @ y) ** 2
    standard_error = math.sqrt((np.mean(squares**2) - np.mean(squares) ** 2) / DRAWS)
    assert abs(squares.mean() - theory) < 5 * standard_error
    # The bound is sharp enough to tell the two theories apart.
    other = variance("sjlt" if kind == "gaussian" else "gaussian", x, y, k)
    assert abs(squares.mean() - other) > 5 * standard_error


@pytest.mark.parametrize("kind", RANDOM)
def test_checkpoints_seeds_and_parameters_have_uncorrelated_draws(kind: str) -> None:
    base = matrix(kind, dim=64)
    for other in (matrix(kind, dim=64, model_id=1), matrix(kind, dim=64, seed=1)):
        for size in SHAPES.values():
            assert not torch.equal(base[: size.numel()], other[: size.numel()])
        # Entries are uncorrelated with variance 1/k: their products sum to 0 ± √p.
        assert abs(float((base * other).sum())) < 5 * math.sqrt(len(base) / 64)
    assert not torch.equal(base[:6], base[6:12])


def test_dense_matrices_carry_the_factor_one_over_root_k() -> None:
    signs = matrix("rademacher", dim=16)
    assert set(signs.flatten().tolist()) == {-0.25, 0.25}
    gaussian = matrix("gaussian", dim=512).double()
    # Variance of a normal's square is 2, so the mean square of p·k entries is (1 ± √(2/pk))/k.
    bound = 5 * math.sqrt(2 / gaussian.numel())
    assert abs(float(gaussian.square().mean()) * 512 - 1) < bound


def test_sjlt_sends_each_coordinate_to_one_bucket_with_a_sign() -> None:
    sparse = matrix("sjlt", dim=8)
    assert (sparse.abs().sum(1) == 1).all()
    assert set(sparse.flatten().tolist()) == {-1.0, 0.0, 1.0}


# The same everywhere --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", RANDOM)
@pytest.mark.parametrize("block", [1, 7, 64, 2**22])
@pytest.mark.parametrize("cache_bytes", [0, 300, 2**30])
def test_draws_do_not_depend_on_block_or_cache_size(
    kind: str, block: int, cache_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = matrix(kind)
    monkeypatch.setattr(projection, "BLOCK_ELEMENTS", block)
    monkeypatch.setattr(projection, "CACHE_BYTES", cache_bytes)
    assert torch.equal(matrix(kind), wanted)
    assert torch.equal(matrix(kind, passes=2), wanted)  # the second time from the cache


@pytest.mark.parametrize("kind", RANDOM)
def test_draws_do_not_depend_on_the_order_of_parameters(kind: str) -> None:
    wanted = matrix(kind)
    for order in permutations("abc"):
        assert torch.equal(matrix(kind, order="".join(order)), wanted)


@pytest.mark.parametrize("kind", RANDOM)
def test_draws_do_not_depend_on_the_batch_size(kind: str) -> None:
    wanted = matrix(kind)[12:]
    projector = make_projector(kind, dim=8, seed=0, model_id=0, shapes=SHAPES)
    size = len(wanted)
    for batch in (1, 3, size):
        for start in range(0, size, batch):
            into = torch.zeros(min(batch, size - start), 8)
            projector.add(into, "c", torch.eye(size)[start : start + batch])
            assert torch.equal(into, wanted[start : start + batch])


@pytest.mark.parametrize("kind", RANDOM)
def test_sketches_do_not_depend_on_the_number_of_threads(kind: str) -> None:
    shapes = {"w": torch.Size([300, 200])}
    # Whole numbers and k = 64, so that sums of sjlt and rademacher are exact in any order.
    generator = torch.Generator().manual_seed(0)
    grads = torch.randint(-4, 5, (5, 300, 200), generator=generator).float()
    sketches = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        projector = make_projector(kind, dim=64, seed=0, model_id=0, shapes=shapes)
        into = torch.zeros(5, 64)
        projector.add(into, "w", grads)
        sketches.append(into)
    tolerance = 1e-5 * float(grads.flatten(1).norm(dim=1).max()) if kind == "gaussian" else 0
    torch.testing.assert_close(*sketches, rtol=0, atol=tolerance)


@pytest.mark.device
@pytest.mark.parametrize("kind", RANDOM)
@pytest.mark.parametrize("dim", [8, 4096])
def test_draws_do_not_depend_on_the_device(kind: str, dim: int) -> None:
    assert torch.equal(matrix(kind, dim=dim, device=DEVICE), matrix(kind, dim=dim))


@pytest.mark.parametrize("block", [7, 2**22])
@pytest.mark.parametrize("cache_bytes", [0, 2**30])
@pytest.mark.parametrize("dim", [1, 8, 4096])
def test_sums_in_a_drawn_order_are_of_the_same_draw(
    block: int, cache_bytes: int, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = matrix("sjlt", dim=dim)
    monkeypatch.setattr(segments, "scatters_in_order", lambda device: False)
    monkeypatch.setattr(projection, "BLOCK_ELEMENTS", block)
    monkeypatch.setattr(projection, "CACHE_BYTES", cache_bytes)
    assert torch.equal(matrix("sjlt", dim=dim, passes=2), wanted)


def test_draws_are_pinned() -> None:
    """A run resumed after an upgrade must project alike: a change here needs a new VERSION."""
    step = torch.arange(1.0, 42).view(1, 41)
    found = {}
    for kind in RANDOM:
        projector = make_projector(kind, dim=4, seed=5, model_id=2, shapes=SHAPES)
        into = torch.zeros(1, 4)
        projector.add(into, "c", step)
        found[kind] = into[0].tolist()
    assert found["sjlt"] == PINNED["sjlt"]
    assert found["rademacher"] == PINNED["rademacher"]
    assert found["gaussian"] == pytest.approx(PINNED["gaussian"], rel=1e-5)


PINNED = {
    "sjlt": [-129.0, 19.0, -40.0, 103.0],
    "rademacher": [-23.5, -22.5, -127.5, -5.5],
    "gaussian": [81.16932, -107.05780, -33.32583, 126.08510],
}

# Folding and identity -------------------------------------------------------------------------


@pytest.mark.parametrize(("large", "small"), [(32, 16), (48, 16), (64, 1), (16, 16)])
def test_a_folded_sketch_is_the_sketch_of_the_smaller_dimension(large: int, small: int) -> None:
    assert torch.equal(fold(matrix("sjlt", dim=large), small), matrix("sjlt", dim=small))
    grads = torch.randn(5, len(matrix("sjlt")), generator=torch.Generator().manual_seed(0))
    folded = fold(grads @ matrix("sjlt", dim=large), small)
    direct = grads @ matrix("sjlt", dim=small)
    rounding = 1e-6 * float(grads.norm(dim=1).max()) * math.sqrt(grads.shape[1])
    torch.testing.assert_close(folded, direct, rtol=0, atol=rounding)


def test_identity_sets_gradients_side_by_side_in_order_of_name() -> None:
    shapes = {"z": torch.Size([2]), "a": torch.Size([2, 2]), "m": torch.Size([1])}
    projector = make_projector("identity", dim=7, seed=0, model_id=0, shapes=shapes)
    grads = {"z": torch.tensor([[6.0, 7]]), "a": torch.tensor([[[1.0, 2], [3, 4]]])}
    grads["m"] = torch.tensor([[5.0]])
    into = torch.zeros(1, 7)
    for name, value in grads.items():
        projector.add(into, name, value)
    assert into.tolist() == [[1, 2, 3, 4, 5, 6, 7]]
