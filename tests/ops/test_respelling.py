"""Layers that are spelled by others, and experts in one tensor, against each example alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from one_by_one import assert_hooks_are_exact, gradients_alone
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from trak_dist.errors import NotCovered

TOKENS, WIDTH, ROWS = 3, 4, 6
Forward = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    """A linear layer before what is tried; `parts` are what it needs."""

    def __init__(self, forward: Forward, parts: nn.Module | Tensor | None = None) -> None:
        super().__init__()
        self.way, self.first = forward, nn.Linear(WIDTH, WIDTH)
        self.part = nn.Parameter(parts) if isinstance(parts, Tensor) else parts

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self, torch.tanh(self.first(x)))


def index(h: Tensor) -> Tensor:
    """(batch, tokens) rows of a table, some of them twice."""
    return (h[..., 0].abs() * 9).long().clamp(max=ROWS - 1)


def by_queries(m: Net, h: Tensor) -> Tensor:
    query = m.first.bias.expand(len(h), 2, WIDTH) * torch.arange(1, 3)[:, None]
    return m.part(query, h, h)[0]


def side_by_side(m: Net, h: Tensor) -> Tensor:
    heads = h.unflatten(-1, (2, 2)).flatten(0, 1).transpose(0, 1)
    return torch.bmm(heads, m.part).transpose(0, 1).reshape(len(h), -1)


def side_by_side_by_matmul(m: Net, h: Tensor) -> Tensor:
    heads = h.unflatten(-1, (2, 2)).flatten(0, 1).transpose(0, 1)
    return (heads @ m.part).transpose(0, 1).reshape(len(h), -1)


def bag(**settings: object) -> Callable[[], Net]:
    weighted = settings.pop("weighted", False)
    return lambda: Net(
        lambda m, h: (
            m.part(index(h), per_sample_weights=h[..., 1] if weighted else None) + h.mean(1)
        ),
        nn.EmbeddingBag(ROWS, WIDTH, **settings),
    )


def sequence_first(*, token: bool) -> Callable[[], Net]:
    block = nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.0)

    def forward(m: Net, h: Tensor) -> Tensor:
        turned = h.transpose(0, 1)
        if token:
            turned = torch.cat([turned, m.first.bias.expand(1, len(h), WIDTH)])
        return m.part(turned)[-1]

    return lambda: Net(forward, nn.TransformerEncoder(block, 2, enable_nested_tensor=False))


def recurrent(
    kind: type[nn.RNNBase], learned: bool = False, steps: int = TOKENS, **settings: object
) -> Callable[[], Net]:
    def forward(m: Net, h: Tensor) -> Tensor:
        first, h = m.part.batch_first, h[:, :steps]
        start = m.first.bias.expand(1, len(h), WIDTH) if learned else None
        out, state = m.part(h if first else h.transpose(0, 1), start)
        out = out if first else out.transpose(0, 1)
        states = state if isinstance(state, tuple) else (state,)
        return torch.cat([out.flatten(1), *(s.transpose(0, 1).flatten(1) for s in states)], 1)

    return lambda: Net(forward, kind(WIDTH, WIDTH, **settings))


NETS: dict[str, Callable[[], Net]] = {
    "bilinear": lambda: Net(lambda m, h: m.part(h, h.sin()), nn.Bilinear(WIDTH, WIDTH, 3)),
    "bilinear of rows": lambda: Net(
        lambda m, h: m.part(h[:, 0], h[:, 1]), nn.Bilinear(WIDTH, WIDTH, 3, bias=False)
    ),
    "bag": bag(),
    "bag with padding": bag(padding_idx=-1),
    "bag of sums with padding": bag(mode="sum", padding_idx=0),
    "bag with weights": bag(mode="sum", weighted=True),
    "queries": lambda: Net(by_queries, nn.MultiheadAttention(WIDTH, 2, batch_first=True)),
    "rows": lambda: Net(lambda m, h: m.part[index(h)] * h, torch.randn(ROWS, WIDTH)),
    "rows, one for all tokens": lambda: Net(
        lambda m, h: m.part[index(h)[:, 0] - ROWS] @ h.mT, torch.randn(ROWS, 2, WIDTH)
    ),
    "numbers": lambda: Net(lambda m, h: m.part[index(h)][..., None] * h, torch.randn(ROWS)),
    "rows, index_select": lambda: Net(
        lambda m, h: m.part.index_select(0, index(h).flatten()).view_as(h) * h,
        torch.randn(ROWS, WIDTH),
    ),
    "rows, one example after the other": lambda: Net(
        lambda m, h: torch.stack([m.part[index(one)[0]] * one for one in h]),
        torch.randn(ROWS, WIDTH),
    ),
    "vector": lambda: Net(
        lambda m, h: (h @ m.part).softmax(1)[..., None] * h, torch.randn(WIDTH)
    ),
    "vector, mv": lambda: Net(
        lambda m, h: torch.mv(h[:, 0], m.part)[:, None] + h.mean(1), torch.randn(WIDTH)
    ),
    "masked_fill": lambda: Net(lambda m, h: h.masked_fill(h > 0, m.part), torch.tensor(0.3)),
    "side by side": lambda: Net(side_by_side, torch.randn(2, 2, 3)),
    "side by side, matmul": lambda: Net(side_by_side_by_matmul, torch.randn(2, 2, 3)),
    "expand_as, type_as": lambda: Net(
        lambda m, h: torch.cat([h, m.part.type_as(h).expand_as(h)], 1) ** 2, torch.randn(WIDTH)
    ),
    "sequences first": sequence_first(token=False),
    "LSTM": recurrent(nn.LSTM, batch_first=True),
    "LSTM, both ways": recurrent(nn.LSTM, num_layers=2, bidirectional=True, batch_first=True),
    "LSTM, sequences first": recurrent(nn.LSTM, num_layers=2, bias=False),
    "GRU": recurrent(nn.GRU, batch_first=True),
    "GRU, both ways": recurrent(nn.GRU, num_layers=2, bidirectional=True),
    "GRU from a learned state": recurrent(nn.GRU, learned=True, batch_first=True),
    "LSTM of one step": recurrent(nn.LSTM, steps=1, batch_first=True),
    "RNN": recurrent(nn.RNN, nonlinearity="tanh", batch_first=True),
    "RNN, relu": recurrent(nn.RNN, nonlinearity="relu", num_layers=2),
}  # fmt: skip


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("name", NETS)
def test_it_has_the_gradients_of_each_example_alone(name: str, size: int) -> None:
    torch.manual_seed(0)
    model = NETS[name]().double().eval()
    assert_hooks_are_exact(model, [torch.randn(size, TOKENS, WIDTH).double()])


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_token_may_be_appended_to_sequences_that_come_first(size: int) -> None:
    torch.manual_seed(0)
    model = sequence_first(token=True)().double().eval()
    assert_hooks_are_exact(model, [torch.randn(size, TOKENS, WIDTH).double()])


def test_a_bag_of_maxima_is_refused() -> None:
    model = bag(mode="max")().double()
    batch = [torch.randn(2, TOKENS, WIDTH).double()]
    with pytest.raises(NotCovered, match="embedding_bag"):
        assert_hooks_are_exact(model, batch)


EXPERTS = 5


class Experts(nn.Module):
    """Each token goes to two experts, whose weights are one tensor."""

    def __init__(self, *, one_by_one: bool) -> None:
        super().__init__()
        self.one_by_one, self.gate = one_by_one, nn.Linear(WIDTH, EXPERTS)
        self.weights = nn.Parameter(torch.randn(EXPERTS, 8, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        scores, chosen = self.gate(rows).softmax(-1).topk(2, dim=-1)
        if self.one_by_one:
            found = torch.einsum("nkoi,ni->nko", self.weights[chosen], rows)
            return (found * scores[..., None]).sum(1).view(len(x), -1)
        expert, order = torch.sort(chosen.flatten())
        offs = torch.histc(expert.float(), EXPERTS, 0, EXPERTS - 1).cumsum(0, dtype=torch.int32)
        found = F.grouped_mm(rows[order // 2], self.weights.mT, offs=offs)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        return (found[back].view(-1, 2, 8) * scores[..., None]).sum(1).view(len(x), -1)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_experts_in_one_tensor_have_the_gradients_of_each_example_alone(size: int) -> None:
    torch.manual_seed(0)
    model, other = (Experts(one_by_one=alone) for alone in (False, True))
    other.load_state_dict(model.state_dict())
    x = torch.randn(size, TOKENS, WIDTH)
    wanted = gradients_alone(other.double(), [x.double()])
    assert_hooks_are_exact(model, [x], wanted=wanted, to=1e-5)
    assert (wanted["weights"].flatten(2).norm(dim=2) == 0).any(), "an expert of no token"
