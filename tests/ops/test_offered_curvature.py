"""What model outputs offer as curvature, and the rows that it is summed over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn

import trak_dist
from trak_dist.errors import ProblemError
from trak_dist.ops import curvature, draws

CPU = torch.device("cpu")


class Margin(trak_dist.ImageClassification):
    """Another output, with what it inherits of the loss no longer true."""

    def get_output(self, model: nn.Module, weights: Any, buffers: Any, *example: Any) -> Tensor:
        return 2 * super().get_output(model, weights, buffers, *example)


class Plain:
    def get_output(self, *_: Any) -> Tensor:
        raise NotImplementedError

    def get_out_to_loss_grad(self, *_: Any) -> Tensor:
        raise NotImplementedError


class Declares(Margin):
    loss = "logistic"

    def get_output(self, model: nn.Module, weights: Any, buffers: Any, *example: Any) -> Tensor:
        return super().get_output(model, weights, buffers, *example)


@pytest.mark.parametrize(
    ("output", "offers"),
    [
        (trak_dist.ImageClassification(), ("output", "fisher", "none")),
        (trak_dist.TextClassification(), ("output", "fisher", "none")),
        (Margin(), ("none",)),
        (Plain(), ("none",)),
    ],
)
def test_what_is_offered(output: Any, offers: Sequence[str]) -> None:
    assert curvature.offered(output) == offers


def batch(rows: int = 6) -> tuple[Tensor, Tensor]:
    data = tiny.Rows(rows, seed=4)
    return data.features, data.labels


def test_the_logistic_loss_is_checked() -> None:
    model = tiny.net()
    curvature.check_logistic(model, trak_dist.ImageClassification(), batch())
    with pytest.raises(
        ProblemError, match=r"declares the logistic loss, but out-to-loss .* is 0\."
    ):
        curvature.check_logistic(model, Declares(), batch())


def test_the_weight_is_the_second_derivative_of_the_loss_by_the_output() -> None:
    f = torch.linspace(-30, 30, 41, dtype=torch.float64, requires_grad=True)
    (q,) = torch.autograd.grad(nn.functional.softplus(-f).sum(), f, create_graph=True)
    (second,) = torch.autograd.grad(q.sum(), f)
    found = curvature.row_weights(torch.sigmoid(-f.detach()).float())
    sure = f.detach() > 0  # of the label; of other rows 1 − Q has the absolute error of a float32
    np.testing.assert_allclose(found[sure], second.detach()[sure], rtol=1e-6)
    np.testing.assert_allclose(found[~sure], second.detach()[~sure], rtol=1e-6, atol=1e-7)


def test_numbers_of_a_row_do_not_depend_on_its_batch() -> None:
    whole = curvature.uniform_of_rows([5, 3, 9], 1, CPU)(7)
    alone = curvature.uniform_of_rows([3], 1, CPU)(4)
    assert whole.shape == (3, 7)
    assert whole[1, :4].equal(alone[0])
    assert not curvature.uniform_of_rows([3], 2, CPU)(4).equal(alone)


def test_numbers_are_uniform() -> None:
    found = draws.uniform(torch.tensor([[1], [2]]), torch.arange(20_000))
    assert float(found.min()) >= 0
    assert float(found.max()) < 1
    assert float(found.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(found.var()) == pytest.approx(1 / 12, abs=0.005)


def test_fisher_rows_average_to_the_gauss_newton_matrix_of_the_softmax() -> None:
    """Σ_c p_c ∇log p_c ∇log p_cᵀ over all classes, in float64."""
    torch.manual_seed(0)
    model, (features, labels) = tiny.net().double(), batch(1)
    features, times = features.double(), 20_000
    output = trak_dist.ImageClassification()
    many = features.expand(times, -1), labels.expand(times)
    uniform = curvature.uniform_of_rows(range(times), 0, CPU)
    _, drawn = output.draw_labels(model, {}, {}, many, uniform)
    counts = torch.bincount(drawn, minlength=tiny.CLASSES) / times

    log_p = model(features).log_softmax(1)[0]
    np.testing.assert_allclose(counts, log_p.exp().detach(), atol=0.015)
    rows = []
    for label in range(tiny.CLASSES):
        one = features, torch.tensor([label])
        state = dict(model.named_parameters()), {}
        likelihood = curvature.LogLikelihood(output).get_batch_output(model, *state, one)
        assert float(likelihood.detach()) == pytest.approx(float(log_p[label].detach()))
        found = torch.autograd.grad(likelihood.sum(), model.parameters())
        rows.append(torch.cat([g.flatten() for g in found]))
    u = torch.stack(rows)
    fisher = u.T @ (counts[:, None] * u)
    jacobian = torch.stack(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(logit, model.parameters())])
            for logit in [model(features)[0, c] for c in range(tiny.CLASSES)]
        ]
    )
    p = log_p.exp().detach()
    hessian = torch.diag(p) - torch.outer(p, p)  # of the cross-entropy by the logits
    expected = jacobian.T @ hessian @ jacobian
    assert float((fisher - expected).norm() / expected.norm()) < 0.05
