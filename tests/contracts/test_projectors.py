"""The contract of a projector; a new kind is right when it passes with its name in KINDS.

On the CPU `sjlt` passes twice: as it is there, and with the sums as a GPU has them.
"""

from __future__ import annotations

import pytest
import torch
from devices import DEVICE
from torch import Tensor

from trak_dist.configuration.config import PROJECTIONS
from trak_dist.ops import segments
from trak_dist.ops.projection import Projector, make_projector

IN_DRAWN_ORDER = "sjlt in a drawn order"
KINDS = (*PROJECTIONS, IN_DRAWN_ORDER)
SHAPES = {"w": torch.Size([4, 3, 2]), "b": torch.Size([4]), "v": torch.Size([4]), "s": torch.Size()}
PARAMETERS = 33
BATCH = 5
pytestmark = pytest.mark.device


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == IN_DRAWN_ORDER:
        monkeypatch.setattr(segments, "scatters_in_order", lambda device: False)
        return "sjlt"
    return request.param


def make(kind: str, **changes: int) -> Projector:
    dim = PARAMETERS if kind == "identity" else 16
    return make_projector(kind, shapes=SHAPES, **{"dim": dim, "seed": 0, "model_id": 0, **changes})


def gradients(name: str, seed: int = 0) -> Tensor:
    """Small whole numbers: the sums of all kinds but gaussian are then exact."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, (BATCH, *SHAPES[name]), generator=generator).float().to(DEVICE)


def project(projector: Projector, *named: tuple[str, Tensor]) -> Tensor:
    into = torch.zeros(BATCH, projector.dim, device=DEVICE)
    for name, grads in named:
        projector.add(into, name, grads)
    return into


def test_it_fills_an_accumulator_of_its_dimension_in_float32(kind: str) -> None:
    sketch = project(make(kind), ("w", gradients("w")))
    assert sketch.shape == (BATCH, make(kind).dim)
    assert sketch.dtype == torch.float32
    assert (sketch.abs().sum(1) > 0).all()


def test_it_is_linear(kind: str) -> None:
    projector, x, y = make(kind), gradients("w", 1), gradients("w", 2)
    combined = project(projector, ("w", 3 * x - 2 * y))
    apart = 3 * project(projector, ("w", x)) - 2 * project(projector, ("w", y))
    torch.testing.assert_close(combined, apart, rtol=0, atol=1e-4)


def test_it_adds_to_what_is_in_the_accumulator(kind: str) -> None:
    projector = make(kind)
    before = torch.arange(BATCH * projector.dim, device=DEVICE).view(BATCH, -1).float()
    into = before.clone()
    projector.add(into, "w", gradients("w"))
    expected = before + project(projector, ("w", gradients("w")))
    torch.testing.assert_close(into, expected, rtol=0, atol=1e-4)


def test_it_writes_nothing_but_the_rows_it_is_given(kind: str) -> None:
    projector, grads = make(kind), gradients("w")
    untouched = grads.clone()
    whole = torch.full((BATCH + 2, projector.dim), 7.0, device=DEVICE)
    whole[1:-1] = 0
    projector.add(whole[1:-1], "w", grads)
    assert torch.equal(grads, untouched)
    assert (whole[[0, -1]] == 7).all()
    assert torch.equal(whole[1:-1], project(projector, ("w", grads)))


def test_two_made_alike_project_alike_also_the_second_time(kind: str) -> None:
    first, second = make(kind), make(kind)
    sketches = [project(p, ("w", gradients("w"))) for p in (first, second, first)]
    assert torch.equal(sketches[0], sketches[1])
    assert torch.equal(sketches[0], sketches[2])


def test_a_parameter_projects_alike_whatever_was_added_before_it(kind: str) -> None:
    alone = project(make(kind), ("b", gradients("b")))
    projector = make(kind)
    project(projector, ("w", gradients("w")), ("v", gradients("v")))
    assert torch.equal(project(projector, ("b", gradients("b"))), alone)


def test_parameters_of_one_shape_project_differently(kind: str) -> None:
    projector, same = make(kind), gradients("b")
    assert not torch.equal(project(projector, ("b", same)), project(projector, ("v", same)))


def test_each_example_projects_as_if_alone(kind: str) -> None:
    projector, grads = make(kind), gradients("w")
    together = project(projector, ("w", grads))
    for row in range(BATCH):
        into = torch.zeros(1, projector.dim, device=DEVICE)
        projector.add(into, "w", grads[row : row + 1])
        torch.testing.assert_close(into[0], together[row], rtol=0, atol=1e-4)


def test_gradients_need_not_be_contiguous(kind: str) -> None:
    grads = gradients("w")
    strided = grads.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    assert not strided.is_contiguous()
    sketches = [project(make(kind), ("w", g)) for g in (grads, strided)]
    torch.testing.assert_close(*sketches, rtol=0, atol=1e-4)


def test_a_parameter_may_be_a_scalar(kind: str) -> None:
    assert gradients("s").shape == (BATCH,)
    sketch = project(make(kind), ("s", torch.arange(1.0, BATCH + 1, device=DEVICE)))
    norms = sketch.norm(dim=1).cpu()
    torch.testing.assert_close(norms, norms[0] * torch.arange(1.0, BATCH + 1))
    assert norms[0] > 0


@pytest.mark.parametrize("change", [{"seed": 1}, {"model_id": 1}])
def test_seed_and_checkpoint_change_a_random_projection_only(
    kind: str, change: dict[str, int]
) -> None:
    sketches = [project(p, ("w", gradients("w"))) for p in (make(kind), make(kind, **change))]
    assert torch.equal(*sketches) == (kind == "identity")
