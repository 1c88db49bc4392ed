"""The same numbers on the device as on the CPU, in float32, and the same bits there each time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import pytest
import torch
from devices import DEVICE
from gathered_gradients import gathered
from test_bundles import LAYERS
from test_hooks import MODELS, assert_agree, built
from test_layers import BARE, Bare, Weighed, inputs, moved
from torch import Tensor, nn

from trak_dist import ImageClassification
from trak_dist.configuration.config import PROJECTIONS
from trak_dist.ops import kernel
from trak_dist.ops import rows as row_format
from trak_dist.ops.gradients import GradientComputer, LoopGradients, VmapGradients, select_params
from trak_dist.ops.hooks import HookGradients
from trak_dist.ops.projection import make_projector
from trak_dist.ops.scores import Ensemble
from trak_dist.ops.spectrum import Spectrum

CLOSE = 1e-4
CPU = torch.device("cpu")

pytestmark = [
    pytest.mark.device,
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
]

Batch = tuple[Tensor, ...]


def to(device: torch.device, tensors: Iterable[Tensor]) -> Batch:
    return tuple(t.to(device) for t in tensors)


def assert_close(found: Tensor, wanted: Tensor) -> None:
    """To `CLOSE` in relative 2-norm."""
    assert found.device.type == DEVICE.type
    assert found.dtype == wanted.dtype
    difference = (found.cpu().double() - wanted.double()).norm()
    assert float(difference) <= CLOSE * float(wanted.double().norm())


# Gradients ------------------------------------------------------------------------------------

WAYS: dict[str, Callable[..., GradientComputer]] = {
    "hooks": functools.partial(HookGradients, piece_elements=10_000),
    "vmap": VmapGradients,
    "loop": LoopGradients,
}


def assert_as_on_the_cpu(way: str, model: nn.Module, output: object, batch: Batch) -> None:
    wanted = gathered(LoopGradients(model.cpu(), output, ["*"]), model, batch)
    compute = WAYS[way](model.to(DEVICE), output, ["*"])
    first, second = (gathered(compute, model, to(DEVICE, batch)) for _ in range(2))
    assert_agree(first, wanted, to=CLOSE)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_of(name: str, way: str) -> None:
    if (name, way) != ("up and down", "hooks"):  # which refuse it
        model, batch = built(name, torch.float32)
        assert_as_on_the_cpu(way, model, ImageClassification(), batch)


@pytest.mark.parametrize("use", BARE)
def test_rules_of_bare_parameters(use: str) -> None:
    formula, *shape = BARE[use]
    model = moved(Bare(formula, *shape)).float()
    batch = inputs(4, 5).float()
    wanted = gathered(LoopGradients(model, Weighed(), ["*"]), model, (batch,))
    compute = HookGradients(model.to(DEVICE), Weighed(), ["*"], piece_elements=10)
    first, second = (gathered(compute, model, (batch.to(DEVICE),)) for _ in range(2))
    for name, grads in wanted.items():
        assert float((first[name] - grads).norm()) <= CLOSE * float(grads.norm())
        assert torch.equal(first[name], second[name])


@pytest.mark.parametrize("kind", ["sjlt", "rademacher", "gaussian"])
@pytest.mark.parametrize("layer", LAYERS)
def test_sketches_of_wide_layers(layer: str, kind: str) -> None:
    model, x = LAYERS[layer]
    model = moved(model).float()
    x = x.float() if x.is_floating_point() else x
    wanted, first, second = (
        sketch(model.to(device), x.to(device), kind) for device in (CPU, DEVICE, DEVICE)
    )
    assert_close(first, wanted)
    assert torch.equal(first, second)


def sketch(model: nn.Module, x: Tensor, kind: str) -> Tensor:
    project = make_projector(kind, dim=96, seed=1, model_id=2, shapes=select_params(model, ["*"]))
    into = torch.zeros(len(x), project.dim, device=x.device)
    hooks = HookGradients(model, Weighed(), ["*"], piece_elements=10_000, bundles=project.bundles)
    hooks((x,), lambda name, rows, grads: project.add(into[rows], name, grads))
    return into


@pytest.mark.parametrize("kind", PROJECTIONS)
@pytest.mark.parametrize("dim", [8, 512])
def test_sketches_of_many_numbers(kind: str, dim: int) -> None:
    shapes = {"w": torch.Size([60, 50]), "b": torch.Size([60])}
    dim = sum(s.numel() for s in shapes.values()) if kind == "identity" else dim
    generator = torch.Generator().manual_seed(0)
    grads = {n: torch.randn(5, *shape, generator=generator) for n, shape in shapes.items()}
    sketches = []
    for device in (CPU, DEVICE, DEVICE):
        project = make_projector(kind, dim=dim, seed=0, model_id=0, shapes=shapes)
        into = torch.zeros(5, dim, device=device)
        for name, values in grads.items():
            project.add(into, name, values.to(device))
        sketches.append(into)
    assert_close(sketches[1], sketches[0])
    assert torch.equal(sketches[1], sketches[2])


# Reduce ---------------------------------------------------------------------------------------


def reduced(x: Tensor, g: Tensor) -> dict[str, Tensor]:
    """What becomes of train grads (rows, k) and target grads (targets, k), on their device."""
    gram = kernel.sum_gram(x.split(70), x.shape[1], x.device)
    settings = {"lambda_reg": 0.1, "lambda_unit": "mean_diagonal", "kernel_scale": "mean_abs"}
    found = kernel.factorise(gram, rows=len(x), **settings)
    solved = kernel.Primal(found.factor, found.scale).precondition(g)
    ensemble = Ensemble()
    for _ in range(2):
        ensemble.add(x.double() @ solved, x[:, 0].abs())
    spectrum = Spectrum.of(gram)
    lambdas = [spectrum.mean_diagonal * by for by in (0.1, 1.0)]
    numbers = [found.scale, found.condition, found.effective_rank, found.effective_dimension]
    stored, scale = row_format.encode(x, "float16")
    return {
        "gram": gram,
        "factor": found.factor,
        "numbers": torch.tensor(numbers, dtype=torch.float64, device=x.device),
        "solved": solved,
        "scores": ensemble.scores(),
        "self-influence": kernel.Primal(found.factor, found.scale).self_influence(x),
        "predictions": spectrum.predictions(x[:9].double(), g.double(), lambdas, "mean_abs"),
        "stored": row_format.decode(stored, scale),
    }


@pytest.mark.parametrize("k", [12, 300])
def test_gram_kernel_and_scores(k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(n, k, generator=generator) for n in (400, 11))
    wanted, first, second = (reduced(*to(device, (x, g))) for device in (CPU, DEVICE, DEVICE))
    for name in wanted:
        assert_close(first[name], wanted[name])
        assert torch.equal(first[name], second[name]), name
