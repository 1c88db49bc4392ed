"""The log-likelihood of texts, its gradients, and labels drawn from it, against float64."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gathered_gradients import gathered
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from trak_dist import LanguageModeling
from trak_dist.errors import ProblemError
from trak_dist.ops import draws
from trak_dist.ops.gradients import LoopGradients, VmapGradients
from trak_dist.ops.hooks import HookGradients
from trak_dist.ops.model_outputs import out_to_loss

ROWS, TOKENS, VOCABULARY = 5, 7, 11
OUTPUT = LanguageModeling()


class Causal(nn.Module):
    """Attention to what came before; the table of tokens serves twice."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.qkv = nn.Embedding(VOCABULARY, 8), nn.Linear(8, 24)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        q, k, v = self.qkv(self.table(input_ids)).chunk(3, -1)
        later = torch.ones(len(q[0]), len(q[0]), dtype=torch.bool).triu(1)
        found = (q @ k.mT).masked_fill(later, -torch.inf).softmax(-1) @ v
        logits = F.linear(found, self.table.weight)
        return logits if attention_mask is None else SimpleNamespace(logits=logits)


class Given(nn.Module):
    """Logits that were given as input."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return input_ids


def model() -> Causal:
    torch.manual_seed(0)
    return Causal().eval()


def ids(rows: int = ROWS) -> Tensor:
    return torch.randint(VOCABULARY, (rows, TOKENS), generator=torch.Generator().manual_seed(1))


def mask() -> Tensor:
    return (torch.arange(TOKENS) < torch.tensor([[7], [3], [1], [6], [2]])).long()


def ignored() -> Tensor:
    return torch.where(mask() == 1, ids(), -100)


BATCHES: dict[str, tuple[Any, ...]] = {
    "ids": (ids(),),
    "ids and labels": (ids(), ignored()),
    "mapping": ({"input_ids": ids()},),
    "mapping, masked": ({"input_ids": ids(), "attention_mask": mask()},),
    "mapping with labels": ({"input_ids": ids(), "attention_mask": mask(), "labels": ignored()},),
}


def counted(name: str) -> np.ndarray:
    """Which tokens of a batch have a probability, (rows, tokens − 1)."""
    return (mask().numpy() if name not in {"ids", "mapping"} else np.ones((ROWS, TOKENS)))[:, 1:]


def log_probabilities(net: nn.Module) -> Tensor:
    """Log p of each token but the first, float64, by the softmax itself."""
    logits = copy.deepcopy(net).double()(ids())
    p = logits.exp() / logits.exp().sum(-1, keepdim=True)
    rows, places = torch.meshgrid(torch.arange(ROWS), torch.arange(TOKENS - 1), indexing="ij")
    return p[rows, places, ids()[:, 1:]].log()


@pytest.mark.parametrize("name", BATCHES)
def test_f_is_the_log_likelihood_of_the_labels_and_q_is_1(name: str) -> None:
    net = model()
    wanted = (log_probabilities(net).detach().numpy() * counted(name)).sum(1)
    weights = dict(net.named_parameters())
    found = OUTPUT.get_batch_output(net, weights, {}, BATCHES[name])
    np.testing.assert_allclose(found.detach().numpy(), wanted, rtol=1e-6, atol=1e-6)
    likely = OUTPUT.get_batch_log_likelihood(net, weights, {}, BATCHES[name])
    assert torch.equal(likely, found)
    assert torch.equal(out_to_loss(OUTPUT, net, BATCHES[name], found), torch.ones(ROWS))
    assert torch.equal(out_to_loss(OUTPUT, net, BATCHES[name], None), torch.ones(ROWS))


@pytest.mark.parametrize("way", ["hooks", "vmap", "loop"])
@pytest.mark.parametrize("name", BATCHES)
def test_gradients_are_those_in_float64(name: str, way: str) -> None:
    net = model()
    exact = copy.deepcopy(net).double()
    compute = {
        "hooks": lambda: HookGradients(net, OUTPUT, ["*"], piece_elements=10**6),
        "vmap": lambda: VmapGradients(net, OUTPUT, ["*"]),
        "loop": lambda: LoopGradients(net, OUTPUT, ["*"]),
    }
    found = gathered(compute[way](), net, BATCHES[name])
    for row in range(ROWS):
        chosen = exact(ids()[row : row + 1])[0, :-1].log_softmax(-1)
        one = (
            chosen[torch.arange(TOKENS - 1), ids()[row, 1:]] * torch.from_numpy(counted(name))[row]
        )
        grads = torch.autograd.grad(one.sum(), [*exact.parameters()])
        for (label, _), wanted in zip(exact.named_parameters(), grads, strict=True):
            error = (found[label][row] - wanted).norm()
            assert error <= 1e-5 * wanted.norm() + 1e-6, (label, row)


def test_a_label_outside_of_the_vocabulary_gives_nan_and_one_that_is_ignored_does_not() -> None:
    labels = ids().clone()
    labels[0, 2], labels[1, 3], labels[2, 1] = VOCABULARY, -1, -100
    labels[3, 0] = VOCABULARY  # before which there is nothing to predict it from
    found = OUTPUT.get_batch_output(model(), {}, {}, (ids(), labels))
    assert found.isnan().tolist() == [True, True, False, False, False]


def test_logits_that_do_not_fit_the_labels_are_refused_with_both_shapes() -> None:
    with pytest.raises(ProblemError, match=r"\(5, 7\) with logits of shape \(5, 6, 11\)"):
        OUTPUT.get_batch_output(Given(), {}, {}, (torch.randn(5, 6, 11), ids()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_summed_in_float32(dtype: torch.dtype) -> None:
    logits = (4 * torch.randn(ROWS, TOKENS, VOCABULARY)).to(dtype)
    found = OUTPUT.get_batch_output(Given(), {}, {}, (logits, ids()))
    wanted = logits.double()[:, :-1].log_softmax(-1).gather(-1, ids()[:, 1:, None]).sum((1, 2))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", BATCHES)
def test_drawn_labels_are_in_a_batch_of_the_same_form_where_labels_count(name: str) -> None:
    net, batch = model(), BATCHES[name]
    u = torch.rand(ROWS, TOKENS - 1, generator=torch.Generator().manual_seed(2))
    weights = dict(net.named_parameters())
    drawn = OUTPUT.draw_labels(net, weights, {}, batch, lambda count: u[:, :count])
    labels = drawn[0]["labels"] if isinstance(batch[0], dict) else drawn[1]
    inputs = drawn[0]["input_ids"] if isinstance(batch[0], dict) else drawn[0]
    assert torch.equal(inputs, ids())
    logits = copy.deepcopy(net).double()(ids())[:, :-1].detach()
    wanted = (logits.softmax(-1).cumsum(-1) > u[..., None]).int().argmax(-1)
    wanted = torch.where(torch.from_numpy(counted(name)) == 1, wanted, -100)
    assert torch.equal(labels[:, 1:], wanted)
    assert not OUTPUT.get_batch_output(net, weights, {}, drawn).isnan().any()


def test_labels_are_drawn_as_often_as_the_model_says() -> None:
    """Of many copies of one text: each position by p(token | the true tokens before it)."""
    net, copies = model(), 20000
    u = torch.rand(copies, TOKENS - 1, generator=torch.Generator().manual_seed(3))
    batch = (ids(1).expand(copies, -1),)
    _, labels = OUTPUT.draw_labels(net, {}, {}, batch, lambda count: u[:, :count])
    found = F.one_hot(labels[:, 1:], VOCABULARY).double().mean(0)
    wanted = copy.deepcopy(net).double()(ids(1))[0, :-1].softmax(-1)
    error = (found - wanted).abs() / (wanted * (1 - wanted) / copies).sqrt()
    assert error.max() < 4.5
    assert draws.categorical(torch.zeros(2, 3, 4), torch.zeros(2, 3)).shape == (2, 3)
