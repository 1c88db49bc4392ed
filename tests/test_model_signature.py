"""What pins a model: tensors that no checkpoint holds, and what it computes as it is built."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import tiny
import torch
from torch import nn

from trak_dist import ImageClassification
from trak_dist.checks import pinned_model
from trak_dist.errors import ProblemError
from trak_dist.plan_inputs import Source


class Net(nn.Module):
    """A net with one of each kind of state that a state dict need not hold."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
        self.pooler = nn.Linear(6, 6).requires_grad_(False)
        self.register_buffer("drawn", torch.randn(6), persistent=False)
        self.register_buffer("kept", torch.randn(6))
        self.order = torch.randperm(6)
        self.tables = {"a": torch.randn(6), "b": np.arange(6.0)}
        self.plain = [nn.Linear(6, 6)]
        self.alias, self.twice = self.head.weight, [self.body]
        self.view = self.head.weight.detach()[:2]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pooler(self.body(x).tanh()) * self.drawn + self.tables["a"]
        return self.head(self.plain[0](x[:, self.order]).tanh() + self.kept)


HELD = {"body.weight", "body.bias", "head.weight", "head.bias", "kept"}
UNSAVED = {
    *("pooler.weight", "pooler.bias", "drawn", "order", "tables[0]", "tables[1]"),
    *("plain.weight", "plain.bias"),
}


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def planned(model: nn.Module) -> Source:
    unsaved = pinned_model.unsaved_tensors(model, HELD)
    return Source("f", "m", "/", unsaved=unsaved, built=computed(model, unsaved))


def computed(model: nn.Module, unsaved: object) -> dict:
    rows = tiny.Rows(2, 0)
    batch = rows.features, rows.labels
    return pinned_model.built_values(
        model, ImageClassification(), batch, params=["*"], unsaved=unsaved
    )


def test_all_tensors_that_checkpoints_do_not_hold_are_reported() -> None:
    assert pinned_model.unsaved_tensors(net(), HELD).keys() == UNSAVED


CHANGES: dict[str, Callable[[Net], object]] = {
    "pooler.weight": lambda n: n.pooler.weight.normal_(),
    "drawn": lambda n: n.drawn.normal_(),
    "order": lambda n: n.order.copy_(n.order.flip(0)),
    "tables[0]": lambda n: n.tables["a"][2].add_(0.01),
    "tables[1]": lambda n: n.tables["b"].__setitem__(3, 0),
    "plain.bias": lambda n: n.plain[0].bias.copy_(n.plain[0].bias.roll(1)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_tensor_that_no_checkpoint_holds_is_refused_by_name(name: str) -> None:
    source, other = planned(net()), net()
    pinned_model.check_unsaved(source, other, what="made.problem")
    with torch.no_grad():
        CHANGES[name](other)
    with pytest.raises(ProblemError) as caught:
        pinned_model.check_unsaved(source, other, what="made.problem")
    said = caught.value
    assert said.what == (
        f"made.problem built a model that differs from the planned one: {name}, which the "
        "checkpoints do not hold"
    )
    assert "register_buffer" in said.next


def test_an_added_attribute_is_noticed() -> None:
    source, other = planned(net()), net()
    other.more = torch.ones(2)
    with pytest.raises(ProblemError, match="that differs from the planned one: more, which"):
        pinned_model.check_unsaved(source, other, what="p")


def test_weights_that_checkpoints_hold_may_be_built_as_any() -> None:
    source, other = planned(net()), net()
    with torch.no_grad():
        other.body.weight.normal_()
    pinned_model.check_unsaved(source, other, what="p")
    pinned_model.check_built(source, computed(other, source.unsaved), what="p")


@pytest.mark.parametrize("scale", [1e-7, 1e-6])
def test_rounding_of_another_processor_is_no_difference(scale: float) -> None:
    source, other = planned(net()), net()
    with torch.no_grad():
        for tensor in (*other.parameters(), other.drawn, other.tables["a"]):
            tensor.mul_(1 + scale * torch.randn(tensor.shape))
    pinned_model.check_unsaved(source, other, what="p")
    pinned_model.check_built(source, computed(other, source.unsaved), what="p")


@pytest.mark.parametrize("way", ["output", "gradient"])
def test_a_model_that_computes_otherwise_is_refused(way: str) -> None:
    class Otherwise(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found = super().forward(x)
            return 1.01 * found if way == "output" else found + (found - found.detach())

    torch.manual_seed(0)
    other, source = Otherwise(), planned(net())
    with pytest.raises(ProblemError, match=f"the model of p gives another {way} of 2 train rows"):
        pinned_model.check_built(source, computed(other, source.unsaved), what="p")


def test_outputs_that_are_not_finite_are_no_difference() -> None:
    broken = net()
    broken.drawn.fill_(torch.nan)
    source = planned(broken)
    pinned_model.check_built(source, computed(broken, source.unsaved), what="p")


def test_half_types_have_more_room() -> None:
    half = net().to(torch.bfloat16)
    half.tables["a"] = half.tables["a"].to(torch.bfloat16)
    half.plain[0].to(torch.bfloat16)
    batch = (torch.randn(2, 6, dtype=torch.bfloat16), torch.tensor([0, 1]))
    found = pinned_model.built_values(half, ImageClassification(), batch, params=["*"], unsaved=())
    assert 0.05 < found["tolerance"][0] < 0.1
    assert computed(net(), ())["tolerance"] == [1e-3]


def test_plans_of_earlier_versions_are_not_pinned() -> None:
    pinned_model.check_unsaved(Source("f", "m", "/"), net(), what="p")
    pinned_model.check_built(Source("f", "m", "/"), {}, what="p")


def test_large_tensors_are_reported_in_pieces() -> None:
    model = nn.Linear(1, 1)
    model.table = torch.randn(pinned_model.PIECE + 5)
    before = pinned_model.unsaved_tensors(model, {"weight", "bias"})
    model.table[-1] += 5
    after = pinned_model.unsaved_tensors(model, {"weight", "bias"})
    assert before["table"] != after["table"]
    assert before["table"][0] == pytest.approx(float(model.table.norm()), rel=1e-2)
