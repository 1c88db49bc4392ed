"""Every model output that trak_dist ships but the classifiers': f, Q, gradients and Fisher rows.

All against float64 formulas that are written another way (`helpers/outputs.py`).
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from gathered_gradients import gathered
from outputs import CASES, Case, case
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import default_collate

import trak_dist
from trak_dist.datasets import as_batch
from trak_dist.errors import ConfigError, DatasetError, ProblemError
from trak_dist.ops.batches import rows_of
from trak_dist.ops.curvature import LogLikelihood, check_logistic, offered
from trak_dist.ops.gradients import LoopGradients, VmapGradients
from trak_dist.ops.hooks import HookGradients
from trak_dist.ops.model_outputs import bad_label, out_to_loss

OFFERED = {
    **dict.fromkeys(("regression", "regression of two", "loss"), ("none",)),
    "preference": ("output", "none"),
}


def batch_of(made: Case) -> tuple[Any, ...]:
    return as_batch(default_collate(list(made.examples)))


def exact(made: Case) -> tuple[np.ndarray, np.ndarray, list[list[Tensor]]]:
    """F, Q = −∂loss/∂f and ∂f/∂θ of each example, in float64."""
    net = copy.deepcopy(made.model).double()
    values, slopes, grads = [], [], []
    for example in made.examples:
        f = made.f(net, example)
        grads.append(
            torch.autograd.grad(f, [*net.parameters()], allow_unused=True, materialize_grads=True)
        )
        alone = f.detach().requires_grad_()
        (slope,) = torch.autograd.grad(made.loss(alone), alone)
        values.append(float(f.detach()))
        slopes.append(-float(slope))
    return np.array(values), np.array(slopes), grads


@pytest.mark.parametrize("name", CASES)
def test_f_and_out_to_loss(name: str) -> None:
    made = case(name)
    net, batch, weights = made.model, batch_of(made), dict(made.model.named_parameters())
    f, q, _ = exact(made)
    found = made.output.get_batch_output(net, weights, {}, batch)
    assert found.shape == (len(made.examples),)
    np.testing.assert_allclose(found.detach().numpy(), f, rtol=1e-5, atol=1e-5)
    for output in (found.detach(), None):
        found_q = out_to_loss(made.output, net, batch, output)
        np.testing.assert_allclose(found_q.detach().numpy(), q, rtol=1e-5, atol=1e-5)
    assert offered(made.output) == OFFERED.get(name, ("fisher", "none"))
    if "output" in offered(made.output):
        check_logistic(net, made.output, batch)


@pytest.mark.parametrize("way", ["hooks", "vmap", "loop"])
@pytest.mark.parametrize("name", CASES)
def test_gradients(name: str, way: str) -> None:
    made = case(name)
    compute = {
        "hooks": lambda: HookGradients(made.model, made.output, ["*"], piece_elements=10**6),
        "vmap": lambda: VmapGradients(made.model, made.output, ["*"]),
        "loop": lambda: LoopGradients(made.model, made.output, ["*"]),
    }
    found = gathered(compute[way](), made.model, batch_of(made))
    _, _, grads = exact(made)
    for row, wanted in enumerate(grads):
        size = sum(float(g.square().sum()) for g in wanted) ** 0.5
        for (label, _), grad in zip(made.model.named_parameters(), wanted, strict=True):
            error = float((found[label][row] - grad).norm())
            assert error <= 1e-5 * size + 1e-6, (label, row)


@pytest.mark.parametrize("name", [n for n in CASES if "fisher" in OFFERED.get(n, ("fisher",))])
def test_fisher_rows_have_the_curvature_of_the_loss_as_their_mean(name: str) -> None:
    """E[u uᵀ] is the Gauss–Newton matrix Jᵀ (∂²loss/∂z²) J, z what the model gives of a row."""
    made, copies = case(name), 2000
    net = copy.deepcopy(made.model).double()
    names = [n for n, _ in net.named_parameters()]
    doubled = [torch.utils._pytree.tree_map(_double, e) for e in made.examples[:2]]
    for example in doubled:
        one = as_batch(default_collate([example]))
        seed = torch.Generator().manual_seed(5)
        u = torch.rand(copies, 400, generator=seed, dtype=torch.float64)
        many = torch.utils._pytree.tree_map(
            lambda t: t.expand(copies, *t.shape[1:]).contiguous(), one
        )
        drawn = made.output.draw_labels(net, {}, {}, many, lambda count, u=u: u[:, :count])
        rows = gathered(VmapGradients(net, LogLikelihood(made.output), ["*"]), net, drawn)
        u_rows = torch.cat([rows[n].flatten(1) for n in names], 1)
        found = u_rows.T @ u_rows / copies
        wanted = gauss_newton(made, net, one, names)
        assert float((found - wanted).norm()) <= 0.12 * float(wanted.norm())
        assert float(found.trace()) == pytest.approx(float(wanted.trace()), rel=0.08)


def gauss_newton(made: Case, net: nn.Module, one: Any, names: list[str]) -> Tensor:
    """The Hessian of the loss of the model's first-order expansion in its parameters."""
    shapes = [net.get_parameter(n).shape for n in names]
    start = torch.cat([net.get_parameter(n).detach().flatten() for n in names])
    shift = getattr(net, "prepare_decoder_input_ids_from_labels", None)

    class Expanded(nn.Module):
        prepare_decoder_input_ids_from_labels = staticmethod(shift) if shift else None

        def __init__(self, step: Tensor) -> None:
            super().__init__()
            self.step = step

        def forward(self, *arguments: Any, **keywords: Any) -> Any:
            def outputs(flat: Tensor) -> Any:
                parts = flat.split([s.numel() for s in shapes])
                state = {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}
                found = functional_call(net, state, arguments, keywords)
                found = found["out"] if isinstance(found, dict) else found
                return getattr(found, "logits", getattr(found, "sample", found))

            slope = torch.autograd.functional.jacobian(outputs, start)
            return outputs(start).detach() + slope @ self.step

    def loss(step: Tensor) -> Tensor:
        return -made.output.get_batch_output(Expanded(step), {}, {}, one)[0]

    return torch.autograd.functional.hessian(loss, torch.zeros_like(start))


def _double(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


@pytest.mark.parametrize("name", ["causal", "masked"])
def test_padding_changes_nothing(name: str) -> None:
    """Two texts alone, cut at their length, and in one batch padded on."""
    made = case(name)
    weights = dict(made.model.named_parameters())
    whole = made.output.get_batch_output(made.model, weights, {}, batch_of(made))
    for row, text in enumerate(made.examples):
        length = int(text["attention_mask"].sum())
        cut = ({k: v[None, :length] for k, v in text.items()},)
        alone = made.output.get_batch_output(made.model, weights, {}, cut)
        assert float(alone.detach()) == pytest.approx(float(whole[row].detach()), rel=1e-5)


def test_noise_follows_from_the_row_alone() -> None:
    images = list(torch.zeros(5, 2, 3))
    rows = trak_dist.NoisedRows(images, torch.tensor([1.0, 0.5, 0.0]), draws=40)
    again = trak_dist.NoisedRows(images, torch.tensor([1.0, 0.5, 0.0]), draws=40)
    other = trak_dist.NoisedRows(images, torch.tensor([1.0, 0.5, 0.0]), draws=40, seed=1)
    assert len(rows) == 5
    for i in (3, 0, 3):
        assert all(torch.equal(rows[i][k], again[i][k]) for k in rows[i])
    assert not torch.equal(rows[0]["noise"], rows[1]["noise"])
    assert not torch.equal(rows[0]["noise"], other[0]["noise"])
    row = rows[2]
    assert set(row["timestep"].tolist()) == {0, 1, 2}
    last = row["timestep"] == 2
    assert torch.equal(row["sample"][last], row["noise"][last])
    assert float(row["sample"][row["timestep"] == 0].abs().max()) == 0
    assert float(row["noise"].std()) == pytest.approx(1, rel=0.15)
    with pytest.raises(ConfigError, match="draws must be at least 1, not 0"):
        trak_dist.NoisedRows(images, torch.ones(2), draws=0)
    conditioned = trak_dist.NoisedRows([(torch.zeros(2), 7)], torch.ones(3), draws=2)
    assert conditioned[0]["condition"] == 7


REFUSED = {
    "regression": ((torch.zeros(4, 3), torch.zeros(4, 2)), r"\(4, 2\) with predictions of shape"),
    "many labels": ((torch.zeros(4, 3), torch.zeros(4)), r"labels of shape \(4,\) with"),
    "segmentation": (
        (torch.zeros(2, 2, 4, 5), torch.zeros(2, 4, 4)),
        r"must be \(2, 4, 5\)",
    ),
    "preference": (({"chosen_input_ids": torch.ones(2, 3)},), "without rejected_input_ids"),
    "diffusion": ((torch.zeros(2, 3),), "without sample, timestep, noise"),
    "masked": (({"input_ids": torch.ones(2, 3)},), "a batch without labels"),
    "sequence": (({"input_ids": torch.ones(2, 3)},), "an encoder and a decoder needs labels"),
    "causal": ((torch.ones(2, 3),) * 4, "a batch of 4 tensors for a language model"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_batch_of_another_form_is_refused(name: str) -> None:
    batch, says = REFUSED[name]
    with pytest.raises(ProblemError, match=says):
        case(name).output.get_batch_output(case(name).model, {}, {}, batch)


def test_a_loss_with_a_mean_over_the_batch_is_refused() -> None:
    output = trak_dist.LossOutput(lambda model, batch: model(batch[0]).mean())
    with pytest.raises(ProblemError, match=r"the loss of 4 examples came as \(\), not as \(4,\)"):
        output.get_batch_output(nn.Linear(3, 1), {}, {}, (torch.zeros(4, 3),))


def test_labels_that_are_none_give_nan_and_ignored_ones_do_not() -> None:
    made = case("segmentation")
    images, labels = rows_of(batch_of(made), slice(0, 3))
    labels = labels.clone()
    labels[0, 1, 1], labels[1] = 7, 255
    found = made.output.get_batch_output(made.model, {}, {}, (images, labels))
    assert found.isnan().tolist() == [True, True, False]
    made = case("many labels")
    inputs, marks = rows_of(batch_of(made), slice(0, 2))
    found = made.output.get_batch_output(made.model, {}, {}, (inputs, marks * 2))
    assert found.isnan().tolist() == [bool(row.any()) for row in marks]


BAD = {
    "causal": (99, "label 99 of row 1 of 'val', the model has 9 logits"),
    "masked": (-7, "label -7 of row 1 of 'val', the model has 9 logits"),
    "sequence": (9, "label 9 of row 1 of 'val', the model has 9 logits"),
    "preference": (99, "label 99 of row 1 of 'val', the model has 9 logits"),
    "segmentation": (3, "label 3 of row 1 of 'val', the model has 3 logits"),
    "many labels": (2, "label 2 of row 1 of 'val', which is not between 0 and 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_label_that_is_none_is_named(name: str) -> None:
    made, (label, says) = case(name), BAD[name]
    batch = torch.utils._pytree.tree_map(torch.clone, batch_of(made))
    inputs = batch[0] if isinstance(batch[0], dict) else {"labels": batch[1]}
    assert bad_label(made.output, made.model, batch) is None
    inputs["rejected_labels" if name == "preference" else "labels"][1][-1] = label
    found = bad_label(made.output, made.model, batch)
    assert found
    assert found.of(found.at, "val") == says


def test_each_token_is_a_row_and_they_add_up_to_the_text() -> None:
    made = case("causal")
    rows = trak_dist.EachToken(made.examples)
    weights = dict(made.model.named_parameters())
    texts = made.output.get_batch_output(made.model, weights, {}, batch_of(made))
    batch = as_batch(default_collate([rows[i] for i in range(len(rows))]))
    each = made.output.get_batch_output(made.model, weights, {}, batch)
    owner = torch.tensor([rows.place(i)[0] for i in range(len(rows))])
    sums = torch.zeros_like(texts).index_add(0, owner, each)
    torch.testing.assert_close(sums, texts, rtol=1e-5, atol=1e-5)
    row, position = rows.place(7)
    counted = (rows[7]["labels"] != -100).nonzero()[:, 0].tolist()
    assert counted == [position]
    assert rows[7]["labels"][position] == made.examples[row]["input_ids"][position]
    with pytest.raises(IndexError, match=f"row {len(rows)} of {len(rows)} tokens"):
        rows[len(rows)]


def test_texts_without_a_token_that_counts_are_refused() -> None:
    with pytest.raises(DatasetError, match="none of the 2 texts has a token that counts"):
        trak_dist.EachToken([{"input_ids": torch.ones(1)}] * 2)
    with pytest.raises(DatasetError, match="example 0 is tuple without input_ids"):
        trak_dist.EachToken([(torch.ones(1), 2)])


@pytest.mark.parametrize("way", ["hooks", "vmap", "loop"])
@pytest.mark.parametrize("name", ["causal", "masked", "segmentation", "many labels"])
def test_a_label_that_is_none_has_a_gradient_of_nan_and_its_row_alone(name: str, way: str) -> None:
    """By each method: with Q = 1 there is nothing else to see it by."""
    made = case(name)
    batch = torch.utils._pytree.tree_map(torch.clone, batch_of(made))
    labels = batch[0]["labels"] if isinstance(batch[0], dict) else batch[1]
    labels[1] = torch.where(labels[1] == -100, -100, 99)
    compute = {
        "hooks": lambda: HookGradients(made.model, made.output, ["*"], piece_elements=10**6),
        "vmap": lambda: VmapGradients(made.model, made.output, ["*"]),
        "loop": lambda: LoopGradients(made.model, made.output, ["*"]),
    }
    found = gathered(compute[way](), made.model, batch)
    finite = [
        all(bool(grads[row].isfinite().all()) for grads in found.values())
        for row in range(len(made.examples))
    ]
    assert finite == [row != 1 for row in range(len(made.examples))]


def test_masks_of_8_bits_are_classes() -> None:
    made = case("segmentation")
    images, labels = batch_of(made)
    weights = dict(made.model.named_parameters())
    wanted = made.output.get_batch_output(made.model, weights, {}, (images, labels))
    found = made.output.get_batch_output(made.model, weights, {}, (images, labels.byte()))
    assert torch.equal(found, wanted)


def test_a_prompt_that_is_apart_is_refused() -> None:
    made = case("preference")
    batch = ({**batch_of(made)[0], "prompt_input_ids": torch.ones(2, 3)},)
    with pytest.raises(ProblemError, match="the prompt is apart"):
        made.output.get_batch_output(made.model, {}, {}, batch)
