"""Bundled gradients: what hooks hand over, what the sketch makes of it, and its statistics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from devices import DEVICE
from gathered_gradients import gathered
from test_layers import Weighed, moved
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from trak_dist.checkpoints.featurizer import projecting_sink
from trak_dist.ops import bundles as bundling
from trak_dist.ops.bundles import Bundles, has_bundles
from trak_dist.ops.gradients import VmapGradients, select_params
from trak_dist.ops.hooks import HookGradients
from trak_dist.ops.projection import Projector, make_projector

BATCH, DIM = 3, 96


def projector(model: nn.Module) -> Projector:
    return make_projector("sjlt", dim=DIM, seed=1, model_id=2, shapes=select_params(model, ["*"]))


class Bare(nn.Module):
    def __init__(self, use, *shape: int) -> None:
        super().__init__()
        self.p, self.use = nn.Parameter(torch.rand(shape)), use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x, self.p)


class Tied(nn.Module):
    """A table that is looked up and multiplied by."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(72, 64, padding_idx=3)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.table(ids)), self.table.weight)


def numbers(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(BATCH, *shape, generator=generator, dtype=torch.float64)


TOKENS = torch.randint(0, 72, (BATCH, 5), generator=torch.Generator().manual_seed(0))
LAYERS = {
    "linear": (nn.Linear(68, 64), numbers(68)),
    "linear on a sequence": (nn.Linear(64, 72), numbers(7, 64)),
    "linear on a grid": (nn.Linear(64, 72), numbers(2, 3, 64)),
    "x @ p": (Bare(lambda x, p: x @ p, 64, 68), numbers(7, 64)),
    "as Conv1D does": (
        Bare(lambda x, p: torch.addmm(p[0], x.view(-1, 64), p).view(*x.shape[:2], 68), 64, 68),
        numbers(7, 64),
    ),
    "convolution in 1 dimension": (nn.Conv1d(64, 64, 3, dilation=2), numbers(64, 9)),
    "convolution in 2 dimensions": (
        nn.Conv2d(68, 64, (3, 2), stride=(2, 1), padding=1), numbers(68, 5, 4),
    ),
    "convolution in 3 dimensions": (nn.Conv3d(64, 64, (2, 1, 1), bias=False), numbers(64, 2, 2, 1)),
    "transposed convolution": (nn.ConvTranspose2d(64, 68, 3, stride=2), numbers(64, 2, 3)),
    "convolution of frames": (
        Bare(lambda x, p: F.conv1d(x.reshape(-1, 64, 4), p).view(len(x), 5, -1), 64, 64, 2),
        numbers(5, 64, 4),
    ),
    "convolution in groups": (nn.Conv2d(128, 64, 1, groups=2), numbers(128, 2, 2)),
    "look-up": (nn.Embedding(72, 64), TOKENS),
    "tied table": (Tied(), TOKENS),
    "positions": (Bare(lambda x, p: x + p, 64, 64), numbers(64, 64)),
}  # fmt: skip


@pytest.mark.device
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("piece_elements", [1, 2**20])
def test_hooks_hand_over_what_vmap_would_have_bundled(layer: str, piece_elements: int) -> None:
    model, x = LAYERS[layer]
    model = moved(model)
    wanted, found = torch.zeros(BATCH, DIM), torch.zeros(BATCH, DIM, device=DEVICE)
    VmapGradients(model, Weighed(), ["*"])((x,), projecting_sink(projector(model), wanted))
    project = projector(model.to(DEVICE))
    hooks = HookGradients(
        model, Weighed(), ["*"], piece_elements=piece_elements, bundles=project.bundles
    )
    hooks((x.to(DEVICE),), projecting_sink(project, found))
    torch.testing.assert_close(found.cpu(), wanted, rtol=0, atol=1e-5 * float(wanted.norm()))


SHORTER = [n for n in LAYERS if n not in ("positions", "convolution in groups")]


@pytest.mark.parametrize("layer", LAYERS)
def test_wide_layers_are_never_handed_over_whole(layer: str) -> None:
    model, x = LAYERS[layer]
    project, shapes = projector(moved(model)), select_params(model, ["*"])
    handed: dict[str, set[torch.Size]] = {}

    def take(name: str, rows: slice, grads: Tensor) -> None:
        handed.setdefault(name, set()).add(grads.shape[1:])

    HookGradients(model, Weighed(), ["*"], piece_elements=1, bundles=project.bundles)((x,), take)
    for name, shape in shapes.items():
        found = project.bundles(name, torch.device("cpu"))
        assert bool(found) == has_bundles(shape)
        if found and layer in SHORTER and layer != "as Conv1D does":
            assert handed[name] == {found.bundled_shape}
        elif not found or layer not in SHORTER:
            assert handed[name] == {shape}


@pytest.mark.parametrize(
    ("shape", "wide"),
    [
        ((64, 64), True), ((64, 64, 3, 3), True), ((512, 2048), True), ((64, 784), True),
        ((64,), False), ((), False), ((10, 2048), False), ((2048, 3), False), ((60, 64), False),
        ((68, 64), False), ((64, 66), False), ((1, 64, 64), False),
    ],
)  # fmt: skip
def test_bundles_follow_from_the_shape(shape: tuple[int, ...], wide: bool) -> None:
    assert has_bundles(torch.Size(shape)) == wide


def drawn(key: int, *shape: int) -> Bundles:
    return Bundles.draw(key, torch.Size(shape), torch.device("cpu"))


def test_each_channel_of_each_group_is_in_one_bundle() -> None:
    found = drawn(5, 64, 72)
    assert found.channels.shape == found.signs.shape == (8 * 18, 4)
    for group in found.channels.view(8, -1):
        assert sorted(group.tolist()) == list(range(72))
    assert set(found.signs.flatten().tolist()) == {-1.0, 1.0}
    orders = {tuple(group.tolist()) for group in found.channels.view(8, -1)}
    assert len(orders) == 8
    assert abs(float(found.signs.sum())) < 5 * math.sqrt(found.signs.numel())


def test_bundles_are_pinned() -> None:
    """A run resumed after an upgrade must project alike: a change here needs a new version."""
    found = drawn(5, 64, 64)
    assert found.channels[:2].tolist() == PINNED_CHANNELS
    assert found.signs[:2].tolist() == PINNED_SIGNS


PINNED_CHANNELS = [[7, 40, 9, 41], [44, 57, 35, 25]]
PINNED_SIGNS = [[-1.0, 1.0, 1.0, 1.0], [-1.0, 1.0, 1.0, 1.0]]


def bundled(found: Bundles, grads: Tensor) -> Tensor:
    """(batch, rows, channels) with bundles in place of channels, by the definition."""
    rows = grads.shape[1]
    out = torch.zeros(len(grads), rows, found.width, dtype=grads.dtype)
    channels, signs = (
        t.view(bundling.GROUPS, found.width, -1) for t in (found.channels, found.signs)
    )
    for row in range(rows):
        group = row // (rows // bundling.GROUPS)
        out[:, row] = (grads[:, row][:, channels[group]] * signs[group]).sum(-1)
    return out


def test_sums_and_places_are_those_of_the_definition() -> None:
    found, grads = drawn(1, 64, 64, 3), torch.randn(2, 64, 64, 3)
    wanted = torch.stack([bundled(found, grads[..., i]) for i in range(3)], dim=-1)
    places, signs = found.places(torch.arange(grads[0].numel()))
    scattered = torch.zeros(2, wanted[0].numel())
    scattered.scatter_add_(1, places.expand(2, -1), grads.flatten(1) * signs)
    torch.testing.assert_close(scattered.view_as(wanted), wanted, rtol=0, atol=1e-5)
    sums = found.sums(grads[:, 10])  # the row's group is the second
    torch.testing.assert_close(sums.view(2, 8, 16, 3)[:, 1], wanted[:, 10], rtol=0, atol=1e-5)


def test_bundled_inner_products_have_the_mean_and_the_variance_of_theory() -> None:
    """For gradients whose channels have much in common, where bundling costs most."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(1, 64, generator=generator, dtype=torch.float64)
    a, b = (
        torch.randn(64, 64, generator=generator, dtype=torch.float64)
        + 2 * torch.randn(64, 1, generator=generator, dtype=torch.float64) * common
        for _ in range(2)
    )
    draws = 3000
    products = np.empty(draws)
    for key in range(draws):
        found = bundled(drawn(key, 64, 64), torch.stack([a, b]))
        products[key] = float((found[0] * found[1]).sum())
    exact = float((a * b).sum())
    theory = 0.0
    for group in range(8):
        rows = slice(8 * group, 8 * group + 8)
        m = (a[rows].T @ b[rows]).numpy()
        both = m + m.T
        theory += 0.5 * float((both**2).sum() - (np.diag(both) ** 2).sum()) * 3 / 63
    assert abs(products.mean() - exact) < 5 * math.sqrt(theory / draws)
    squares = (products - exact) ** 2
    standard_error = math.sqrt((np.mean(squares**2) - np.mean(squares) ** 2) / draws)
    assert abs(squares.mean() - theory) < 5 * standard_error
    assert standard_error < 0.05 * theory


def test_gathered_gradients_are_whole_where_nobody_asks_for_bundles() -> None:
    model, x = LAYERS["linear"]
    hooks = HookGradients(moved(model), Weighed(), ["*"], piece_elements=2**20)
    assert gathered(hooks, model, (x,))["weight"].shape == (BATCH, 64, 68)
