"""Gradients are compared with autograd's as closely as the type of the weights allows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from trak_dist import ImageClassification
from trak_dist.ops import products
from trak_dist.ops.layers import RULES
from trak_dist.ops.parameter_use import ParameterUse
from trak_dist.planning.gradient_method import select_gradient_method

ROWS, FEATURES, CLASSES = 12, 16, 3


class Deep(nn.Module):
    """Blocks normed after their sums, whose rounding adds up; the embedding is of two rows."""

    def __init__(self, layers: int = 8) -> None:
        super().__init__()
        self.kinds = nn.Embedding(2, FEATURES)
        block = nn.TransformerEncoderLayer(FEATURES, 2, 2 * FEATURES, batch_first=True)
        self.blocks = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(FEATURES), nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x + self.kinds((x[..., 0] > 0).long()))
        return self.head(self.blocks(h)[:, 0])


def chosen(dtype: torch.dtype, layers: int = 8) -> tuple[str, str]:
    torch.manual_seed(0)
    model = Deep(layers).to(dtype).eval()
    x = torch.randn(ROWS, 20, FEATURES).to(dtype)
    batch = x, torch.arange(ROWS) % CLASSES
    return select_gradient_method(
        model, ImageClassification(), {"train": batch}, params=["*"], requested="auto"
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("layers", [1, 16])
def test_rounding_of_half_precision_is_no_difference(dtype: torch.dtype, layers: int) -> None:
    assert chosen(dtype, layers) == ("hooks", "")


Wrong = Callable[[ParameterUse], ParameterUse]


def scaled(by: float) -> Wrong:
    return lambda use: replace(use, formula=lambda g, *saved: use.formula(g, *saved) * by)


def swapped(use: ParameterUse) -> ParameterUse:
    """Two examples have each other's gradients, neither of them among those computed alone."""

    def formula(g: Tensor, *saved: Tensor) -> Tensor:
        found = use.formula(g, *saved)
        order = [0, 2, 1, *range(3, len(found))]
        return found[order] if len(found) > 2 else found

    return replace(use, formula=formula)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wrong", [scaled(1.01), swapped], ids=["one percent", "two rows"])
def test_a_wrong_rule_is_found_in_half_precision(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, wrong: Wrong
) -> None:
    def rule(*args: Tensor | None) -> Iterable[ParameterUse]:
        return map(wrong, products.linear(*args))

    monkeypatch.setitem(RULES, F.linear, rule)
    method, why = chosen(dtype)
    assert method != "hooks"
    assert "has other gradients than" in why
    assert "in float32" in why


def test_a_rule_that_is_wrong_in_half_precision_alone_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def rule(input: Tensor, *others: Tensor | None) -> Iterable[ParameterUse]:
        wrong = scaled(1.5 if input.dtype == torch.bfloat16 else 1.0)
        return map(wrong, products.linear(input, *others))

    monkeypatch.setitem(RULES, F.linear, rule)
    method, why = chosen(torch.bfloat16)
    assert method != "hooks"
    assert "has other gradients than one by one" in why
    assert "in float32" not in why
