"""The margin and the out-to-loss of image classification against float64 formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trak_dist import ImageClassification
from trak_dist.ops import model_outputs

CLASSES = 5
LABELS = torch.arange(40) % CLASSES


def logits(sharpness: float) -> Tensor:
    return sharpness * torch.randn(40, CLASSES, generator=torch.Generator().manual_seed(0))


def sure(gap: float) -> Tensor:
    """Logits whose true class leads all the others by about `gap`."""
    return logits(0.1) + gap * torch.nn.functional.one_hot(LABELS, CLASSES)


CASES = {
    "mild": logits(1),
    "sharp": logits(30),
    "sure": sure(25),  # 1 − p is about 1e-11
    "very sure": sure(80),  # about 1e-34
    "wrong": sure(-60),
    "far from 0": logits(1) + 1e4,
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> Tensor:
    return request.param


def margins(values: Tensor) -> Tensor:
    """Through the public method, a model that returns its input standing for the network."""
    output, model = ImageClassification(), nn.Identity()
    pairs = zip(values, LABELS, strict=True)
    return torch.stack([output.get_output(model, {}, {}, row, label) for row, label in pairs])


def out_to_loss(values: Tensor) -> Tensor:
    return ImageClassification().get_out_to_loss_grad(nn.Identity(), {}, {}, (values, LABELS))


def exact(values: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Margin and 1 − p in float64; 1 − p as the softmax's sum over the other classes."""
    z = values.double().numpy()
    z = z - z.max(axis=1, keepdims=True)
    odds = np.exp(z)
    own = odds[np.arange(len(z)), LABELS]
    rest = np.where(np.arange(CLASSES) == LABELS.numpy()[:, None], 0, odds).sum(axis=1)
    return np.log(own) - np.log(rest), rest / (own + rest)


def test_the_margin_is_the_log_odds_of_the_true_class(case: Tensor) -> None:
    found = margins(case)
    wanted, _ = exact(case)
    assert found.dtype == torch.float32
    # Logits of size s carry float32's rounding of s.
    rounding = 1e-6 * float(case.abs().max())
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-6, atol=rounding)


def test_out_to_loss_is_one_minus_p_to_a_small_relative_error(case: Tensor) -> None:
    found = out_to_loss(case)
    _, wanted = exact(case)
    assert found.dtype == torch.float32
    # An error of the margin is a relative error of 1 − p.
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-6 * float(case.abs().max()) + 1e-6)


def test_the_batched_form_gives_the_same_margins_and_the_same_out_to_loss(case: Tensor) -> None:
    output, model = ImageClassification(), nn.Identity()
    f = output.get_batch_output(model, {}, {}, (case, LABELS))
    assert torch.equal(f, margins(case))
    assert torch.equal(output.get_out_to_loss_from_output(f, (case, LABELS)), out_to_loss(case))


def test_out_to_loss_of_a_margin_in_half_precision_is_not_taken_from_it() -> None:
    batch = (CASES["sure"].bfloat16(), LABELS)
    f = ImageClassification().get_batch_output(nn.Identity(), {}, {}, batch).bfloat16()
    found = model_outputs.out_to_loss(ImageClassification(), nn.Identity(), batch, f)
    assert torch.equal(found, out_to_loss(batch[0]))


def test_out_to_loss_survives_where_one_minus_p_in_float32_is_0() -> None:
    for values in (CASES["sure"], CASES["very sure"]):
        p = torch.softmax(values, 1)[torch.arange(len(values)), LABELS]
        assert (1 - p == 0).all()
        assert (out_to_loss(values) > 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_out_to_loss_of_half_precision_logits_is_formed_in_float32(dtype: torch.dtype) -> None:
    values = sure(12).to(dtype)
    _, wanted = exact(values)
    found = out_to_loss(values)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-4)


def test_out_to_loss_is_minus_the_derivative_of_the_loss_by_the_margin(case: Tensor) -> None:
    """With ℓ = log(1 + exp(−f)), the cross-entropy written in the margin."""
    f = torch.from_numpy(exact(case)[0]).requires_grad_()
    loss = torch.nn.functional.softplus(-f, threshold=1e9)
    entropy = torch.nn.functional.cross_entropy(case.double(), LABELS, reduction="none")
    torch.testing.assert_close(loss.detach(), entropy, rtol=1e-6, atol=1e-10)
    (slope,) = torch.autograd.grad(loss.sum(), f)
    tolerance = 1e-6 * float(case.abs().max()) + 1e-6
    torch.testing.assert_close(out_to_loss(case).double(), -slope, rtol=tolerance, atol=0)


def test_the_gradient_of_the_margin_is_finite_and_exact(case: Tensor) -> None:
    """∂f/∂z is 1 at the true class, and minus the softmax among the others elsewhere."""
    values = case.clone().requires_grad_()
    (found,) = torch.autograd.grad(margins(values).sum(), values)
    assert found.isfinite().all()
    is_true = torch.nn.functional.one_hot(LABELS, CLASSES).bool()
    others = torch.softmax(case.double().masked_fill(is_true, -torch.inf), 1)
    wanted = is_true.double() - others
    # Backwards too, the log-sum-exp carries float32's rounding of the size of the logits.
    rounding = 1e-7 * float(case.abs().max()) + 1e-6
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=rounding)


def test_an_impossible_class_leaves_margin_and_gradient_finite() -> None:
    """A logit of −∞, as masked outputs have, is a class of probability 0."""
    values = torch.tensor([[1.0, -torch.inf, 2.0]]).requires_grad_()
    f = ImageClassification().get_output(nn.Identity(), {}, {}, values[0], torch.tensor(0))
    (grad,) = torch.autograd.grad(f, values)
    assert float(f.detach()) == pytest.approx(-1)
    assert grad.tolist() == [[1, 0, -1]]


def test_a_label_that_is_no_class_gives_nan_instead_of_a_plausible_number() -> None:
    model = torch.nn.Linear(4, 3)
    batch = (torch.randn(3, 4), torch.tensor([0, 3, -1]))
    weights = dict(model.named_parameters())
    q = ImageClassification().get_out_to_loss_grad(model, weights, {}, batch)
    assert q.isnan().tolist() == [False, True, True]
