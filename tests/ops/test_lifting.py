"""Parameters that are broadcast to a batch, by whatever function, against each example alone.

Batches have as many examples as there are tokens, heads or features, too: what is a dimension of
examples must not be told by its size.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from one_by_one import assert_hooks_are_exact
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

TOKENS, HEADS, WIDTH = 3, 2, 4
WHERE = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS) + TOKENS - 1
Forward = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    """A linear layer before, and one after, what is tried."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.way = forward
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)
        self.table = nn.Embedding(2 * TOKENS - 1, HEADS)
        self.scale = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.one = nn.Parameter(torch.tensor(0.7))
        self.square = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.positions = nn.Parameter(torch.randn(TOKENS, WIDTH))
        self.query = nn.Parameter(torch.randn(1, 2, WIDTH))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.way(self, torch.tanh(self.first(x))))

    def bias(self) -> Tensor:
        """(1, heads, tokens, tokens) of relative positions."""
        return self.table(WHERE).permute(2, 0, 1)[None]


def in_heads(h: Tensor) -> Tensor:
    return h.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def together(h: Tensor) -> Tensor:
    return h.transpose(1, 2).flatten(2)


def attended(m: Net, h: Tensor, bias: Tensor) -> Tensor:
    q = in_heads(h)
    return together((q @ q.mT + bias).softmax(-1) @ q)


def by_mask(m: Net, h: Tensor) -> Tensor:
    q = in_heads(h)
    return together(F.scaled_dot_product_attention(q, q, q, m.bias()))


def by_mask_of_the_batch(m: Net, h: Tensor) -> Tensor:
    keep = h[:, None, None, :, 0] > -0.5
    keep = keep | torch.eye(TOKENS, dtype=torch.bool)
    return attended(m, h, torch.where(keep, m.bias(), torch.finfo(h.dtype).min))


def in_place_in_the_batch(m: Net, h: Tensor) -> Tensor:
    logits = in_heads(h) @ in_heads(h).mT
    logits += m.bias()
    logits.mul_(m.one)
    return together(logits.softmax(-1) @ in_heads(h))


def changed_in_place(m: Net, h: Tensor) -> Tensor:
    bias = m.bias() * 2
    bias.div_(3).add_(m.one)
    return attended(m, h, F.relu(bias, inplace=True) + bias)


def content_to_position(m: Net, h: Tensor) -> Tensor:
    """As in DeBERTa: positions are repeated for each example, for a product by rows."""
    q = in_heads(h).flatten(0, 1)
    keys = in_heads(m.norm(m.positions)[None]).repeat(len(h), 1, 1, 1).flatten(0, 1)
    logits = torch.bmm(q, keys.mT).view(-1, HEADS, TOKENS, TOKENS)
    return together(logits.softmax(-1) @ in_heads(h))


def learned_query(m: Net, h: Tensor) -> Tensor:
    query = m.query.expand(len(h), -1, -1)
    return (query @ h.mT).softmax(-1) @ h


def learned_query_without_batch(m: Net, h: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(m.query, h, h)


def written_over(m: Net, h: Tensor) -> Tensor:
    h = h.clone()
    h[:, 0].mul_(m.scale)
    return h.sub_(m.positions)


def sorted_examples(m: Net, h: Tensor) -> Tensor:
    order = h[:, 0, 0].argsort(stable=True)
    return ((1 + h[order].abs()) ** m.scale)[order.argsort()]


def examples_in_the_middle(m: Net, h: Tensor) -> Tensor:
    turned = h.transpose(0, 1)
    return ((m.positions[:, None] * turned).exp() + torch.maximum(turned, m.scale)).transpose(0, 1)


WAYS: dict[str, Forward] = {
    "logits": lambda m, h: attended(m, h, m.bias()),
    "mask of attention": by_mask,
    "where, by a mask of the batch": by_mask_of_the_batch,
    "in place in the batch": in_place_in_the_batch,
    "changed in place": changed_in_place,
    "repeated for each example": content_to_position,
    "learned query, expanded": learned_query,
    "learned query": learned_query_without_batch,
    "written over": written_over,
    "base of a power": lambda m, h: m.scale**h,
    "exponent": lambda m, h: (1 + h.square()) ** m.one,
    "square of a weight": lambda m, h: h * m.scale**2 + h @ m.square**2,
    "left of a product": lambda m, h: (m.square @ h.mT).mT,
    "left of a product, a part": lambda m, h: torch.matmul(m.square[:, :TOKENS], h),
    "batched on the right": lambda m, h: h[:, None] @ torch.stack([m.square, m.square.T])[None],
    "where, by the batch": lambda m, h: torch.where(h > 0, m.positions, m.scale),
    "three at once": lambda m, h: torch.addcmul(h, m.positions, m.scale, value=0.5),
    "lerp": lambda m, h: torch.lerp(h, m.positions, m.one.sigmoid()),
    "no copy but its own": lambda m, h: torch.atan2(m.positions[None], h),
    "used twice": lambda m, h: torch.hypot(h * m.scale, m.scale) + m.scale,
    "examples in the middle": examples_in_the_middle,
    "sorted examples": sorted_examples,
}


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("way", WAYS)
def test_a_parameter_that_is_broadcast_has_the_gradients_of_each_example_alone(
    way: str, size: int
) -> None:
    torch.manual_seed(0)
    model = Net(WAYS[way]).double().eval()
    used = torch.autograd.grad(
        model(torch.rand(2, TOKENS, WIDTH).double()).sum(),
        [*model.parameters()],
        allow_unused=True,
    )
    for parameter, grad in zip(model.parameters(), used, strict=True):
        parameter.requires_grad_(grad is not None)
    assert sum(grad is not None for grad in used) >= 4
    assert_hooks_are_exact(model, [torch.randn(size, TOKENS, WIDTH).double()])
