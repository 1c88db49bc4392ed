"""Per-sample gradients against a loop of autograd over single examples."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import small_cnn
import tiny
import torch
from torch import Tensor, nn

from trak_dist import ImageClassification
from trak_dist.errors import ConfigError
from trak_dist.ops.gradients import VmapGradients, activation_bytes, select_params

Batch = tuple[Tensor, Tensor]


class Tied(nn.Module):
    """One weight used by two modules, and one module used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.second(torch.tanh(self.first(self.first(x))))))


class Scaled(nn.Module):
    """A bare scalar parameter, like a temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(1.7))
        self.linear = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.temperature * self.linear(x)


def perceptron() -> nn.Module:
    model = tiny.net()
    model.load_state_dict(tiny.state(0))
    return model


def convolutional() -> nn.Module:
    model = small_cnn.net()
    model.load_state_dict(small_cnn.state(0))
    return model


def seeded(make: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make()


MODELS = {
    "perceptron": perceptron,
    "convolutional": convolutional,
    "tied": lambda: seeded(Tied),
    "scaled": lambda: seeded(Scaled),
}


def batch_for(model: nn.Module) -> Batch:
    if isinstance(model[0] if isinstance(model, nn.Sequential) else None, nn.Conv2d):
        images = small_cnn.Images(6, seed=5)
        return images.images, images.labels
    rows = tiny.Rows(6, seed=5)
    return rows.features, rows.labels


def one_by_one(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """In float64, from −log(eᵗ − 1) with t the cross-entropy, which is the margin."""
    model = model.double()
    rows: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for features, label in zip(*batch, strict=True):
        entropy = nn.functional.cross_entropy(model(features.double()[None]), label[None])
        margin = -torch.log(torch.expm1(entropy))
        grads = torch.autograd.grad(margin, list(model.parameters()))
        for row, grad in zip(rows.values(), grads, strict=True):
            row.append(grad)
    return {name: torch.stack(row) for name, row in rows.items()}


def assert_close_per_sample(found: Tensor, wanted: Tensor) -> None:
    """To 1e-5 in relative 2-norm, each example apart."""
    assert found.shape == wanted.shape
    difference = (found.double() - wanted).reshape(len(found), -1).norm(dim=1)
    size = wanted.reshape(len(found), -1).norm(dim=1)
    assert (size > 0).all()
    assert (difference <= 1e-5 * size).all()


def computed(model: nn.Module, batch: Batch, params: Sequence[str] = ("*",)) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def take(name: str, rows: slice, grads: Tensor) -> None:
        assert name not in found
        assert rows == slice(0, len(batch[0]))
        found[name] = grads

    VmapGradients(model.eval(), ImageClassification(), params)(batch, take)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_vmap_gradients_agree_with_a_loop_over_examples(name: str) -> None:
    model = MODELS[name]()
    batch = batch_for(model)
    found = computed(model, batch)
    wanted = one_by_one(model.eval(), batch)
    assert set(found) == set(wanted)
    for parameter, grads in found.items():
        assert grads.dtype == torch.float32
        assert_close_per_sample(grads, wanted[parameter])


def test_gradients_of_an_example_do_not_depend_on_its_batch() -> None:
    model = convolutional()
    images, labels = batch_for(model)
    together = computed(model, (images, labels))
    for i in range(len(images)):
        alone = computed(model, (images[i : i + 1], labels[i : i + 1]))
        for name, grads in alone.items():
            assert_close_per_sample(grads, together[name][i : i + 1].double())


def test_gradients_leave_the_model_as_it_was() -> None:
    model = convolutional()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    computed(model, batch_for(model))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("globs", "names"),
    [
        (["*"], ["0.bias", "0.weight", "1.bias", "1.weight", "5.bias", "5.weight"]),
        (["*.weight"], ["0.weight", "1.weight", "5.weight"]),
        (["5.*"], ["5.bias", "5.weight"]),
        (["[01].bias", "5.bias"], ["0.bias", "1.bias", "5.bias"]),
        (["5.*", "*.bias"], ["0.bias", "1.bias", "5.bias", "5.weight"]),
    ],
)
def test_globs_choose_parameters_whose_gradients_are_those_of_all(
    globs: list[str], names: list[str]
) -> None:
    model = convolutional()
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert select_params(model, globs) == {name: shapes[name] for name in names}
    assert list(select_params(model, globs)) == names
    everything = computed(model, batch_for(model))
    chosen = computed(model, batch_for(model), globs)
    assert sorted(chosen) == names
    for name, grads in chosen.items():
        assert_close_per_sample(grads, everything[name].double())


def test_a_glob_that_selects_nothing_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ConfigError) as caught:
        select_params(perceptron(), ["0.*", "head.*"])
    assert str(caught.value) == (
        "'head.*' selects no parameter that requires gradients; "
        "there are 0.weight, 0.bias, 2.weight, 2.bias\n"
        "  where: featurize.params\n"
        "  next:  featurize.params='[*.weight]' for example, or leave it out for all"
    )


class Wide(nn.Module):
    """Keeps its input (6 numbers), what tanh gives (1000) and what is squared of it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x)).square().unflatten(1, (4, 250)).sum(2)


def test_activations_are_what_the_forward_pass_of_one_example_keeps() -> None:
    batch = (torch.ones(5, 6), torch.zeros(5, dtype=torch.int64))
    found = activation_bytes(Wide().eval(), ImageClassification(), batch)
    kept = 4 * (6 + 1000)  # tanh's result is kept once, though two functions keep it
    margin = 200  # of the margin, whose tensors have four numbers each
    assert kept <= found <= kept + margin
