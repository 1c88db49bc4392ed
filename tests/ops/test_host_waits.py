"""The loop over batches never waits for the device: it reads nothing from it, and sends nothing.

On the CPU the batch is on `meta`, tensors without content: whatever reads a value from them fails,
and operations between them and tensors of the CPU are counted.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from devices import DEVICE
from test_bundles import LAYERS
from test_hooks import MODELS, built
from test_layers import BARE, Bare, Weighed, inputs
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from trak_dist import ImageClassification
from trak_dist.configuration.config import FeaturizeConfig, ProjectionConfig, Spec
from trak_dist.ingest.streamed_plan import new_plan
from trak_dist.ops import projection as projections
from trak_dist.ops.gradients import select_params
from trak_dist.runtime.session import CheckpointFeaturizer

BATCHES = 2
ON = torch.device("meta") if DEVICE.type == "cpu" else DEVICE

pytestmark = [
    pytest.mark.device,
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
]


class Waits(TorchDispatchMode):
    """Notes the operations between two devices: what is sent from one to the other is waited for.

    A number of the CPU is none of it: it goes to the device as an argument.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]
        there = {t.device.type for t in given if t.ndim or t.device.type != "cpu"}
        there |= {t.device.type for t in made if given}
        if len(there) > 1:
            self.found.append(str(func))
        return out


def waits(loop: Callable[[], object]) -> list[str]:
    """What is waited for in `loop`."""
    if ON.type != "cuda":
        with Waits() as counted:
            loop()
        return counted.found
    torch.cuda.set_sync_debug_mode("error")
    try:
        loop()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return []


def of_featurizing(
    model: nn.Module, output: Any, batch: tuple[Tensor, ...], gradients: str, **spec: Any
) -> list[str]:
    """What the batches after the first wait for: with that, the projection is drawn."""
    parameters = sum(s.numel() for s in select_params(model, ["*"]).values())
    projection = ProjectionConfig(kind=spec.pop("projection", "sjlt"))
    settings = replace(Spec(problem={}, proj_dim=96, store_dim=96, projection=projection), **spec)
    plan = new_plan(settings, rows=9, parameters=parameters, model="", gradients=gradients)
    loaded = CheckpointFeaturizer(plan, 0, "", copy.deepcopy(model).to(ON).eval(), output)
    batch = tuple(t.to(ON) for t in batch)
    grads = torch.zeros(len(batch[0]), plan.store_dim, device=ON)
    loaded.featurize(batch, grads)

    def loop() -> None:
        for _ in range(BATCHES):
            loaded.featurize(batch, grads)

    return waits(loop)


WAYS = [("hooks", n) for n in MODELS if n != "up and down"]
WAYS += [(way, n) for way in ("vmap", "loop") for n in ("cnn", "vit", "language model")]


@pytest.mark.parametrize(("gradients", "name"), WAYS)
def test_no_batch_of_a_model_waits(gradients: str, name: str) -> None:
    model, batch = built(name, torch.float32)
    assert of_featurizing(model, ImageClassification(), batch, gradients) == []


@pytest.mark.parametrize("projection", ["sjlt", "rademacher", "gaussian", "identity"])
@pytest.mark.parametrize("cache_bytes", [0, 2**30])
def test_no_batch_waits_for_a_projection(
    projection: str, cache_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor where it is too large to be kept, and drawn anew for each batch."""
    monkeypatch.setattr(projections, "CACHE_BYTES", cache_bytes)
    model, batch = built("cnn", torch.float32)
    found = of_featurizing(model, ImageClassification(), batch, "hooks", projection=projection)
    assert found == []


def test_no_batch_in_bfloat16_waits() -> None:
    model, batch = built("vit", torch.float32)
    featurize = FeaturizeConfig(compute="bfloat16")
    found = of_featurizing(model, ImageClassification(), batch, "hooks", featurize=featurize)
    assert found == []


class WeighedToo(Weighed):
    """With an out-to-loss."""

    def get_out_to_loss_grad(self, model, weights, buffers, batch) -> Tensor:
        return torch.ones(len(batch[0]), device=batch[0].device)


@pytest.mark.parametrize("use", BARE)
def test_no_rule_of_bare_parameters_waits(use: str) -> None:
    formula, *shape = BARE[use]
    model = Bare(formula, *shape)
    assert of_featurizing(model, WeighedToo(), (inputs(4, 5).float(),), "hooks") == []


@pytest.mark.parametrize("layer", LAYERS)
def test_no_wide_layer_waits(layer: str) -> None:
    model, x = LAYERS[layer]
    x = x.float() if x.is_floating_point() else x
    assert of_featurizing(model.float(), WeighedToo(), (x,), "hooks") == []


def test_what_reads_from_the_device_is_found() -> None:
    """Else the tests above would show nothing."""
    x = torch.ones(3, device=ON)
    reads = (
        lambda: float(x.sum()),
        x.cpu,
        x.nonzero,
        lambda: x[x > 0],
        lambda: bool((x > 0).any()),
        lambda: x + torch.ones(3).to(ON),
        lambda: x[torch.tensor([0, 1])],
    )
    for read in reads:
        with pytest.raises((RuntimeError, NotImplementedError, AssertionError)):
            assert waits(read) == []
