"""Dropout masks by seed: gradients against networks thinned by hand, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from dropout_masks import kept
from gathered_gradients import gathered
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from trak_dist.errors import ConfigError
from trak_dist.ops.dropout import check_units_left, dropout_modules, thinned
from trak_dist.ops.gradients import LoopGradients, VmapGradients, outputs
from trak_dist.ops.hooks import HookGradients

FEATURES = 4
RATES = st.sampled_from([0.1, 0.25, 0.5, 0.8])
steady = settings(max_examples=20, deadline=None, derandomize=True)


class Weighed:
    """F: the sum of a smooth function of what a model gives, with weights unlike each other."""

    def get_output(self, model, weights, buffers, *example) -> Tensor:
        return self.get_batch_output(model, weights, buffers, [x[None] for x in example])[0]

    def get_batch_output(self, model, weights, buffers, batch) -> Tensor:
        return weighed(functional_call(model, (dict(weights), dict(buffers)), tuple(batch)))


def weighed(out: Tensor) -> Tensor:
    out = out.flatten(1)
    return (torch.sin(out) * torch.arange(1, out.shape[1] + 1)).sum(1)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def exact(model: nn.Module) -> nn.Module:
    """In float64, with weights by a seed."""
    model = model.double().eval()
    for at, tensor in enumerate(model.state_dict().values()):
        tensor.copy_(drawn(*tensor.shape, seed=at) / 2)
    return model


def mlp(hidden: int, rate: float) -> nn.Module:
    return exact(
        nn.Sequential(
            nn.Linear(FEATURES, hidden),
            nn.Tanh(),
            nn.Dropout(rate),
            nn.Linear(hidden, hidden),
            nn.Tanh(),
            nn.Dropout(rate),
            nn.Linear(hidden, 3),
        )
    )


def thinned_mlp(parameters: dict[str, Tensor], x: Tensor, seed: int, rate: float) -> Tensor:
    """The network without the units that are dropped: rows and columns taken out."""
    hidden = len(parameters["0.bias"])
    first, second = kept(seed, "2", hidden, rate), kept(seed, "5", hidden, rate)
    h = torch.tanh(x @ parameters["0.weight"][first].T + parameters["0.bias"][first])
    between = parameters["3.weight"][second][:, first] / (1 - rate)
    h = torch.tanh(h @ between.T + parameters["3.bias"][second])
    return h @ (parameters["6.weight"][:, second] / (1 - rate)).T + parameters["6.bias"]


def methods(model: nn.Module) -> dict[str, object]:
    return {
        "hooks": HookGradients(model, Weighed(), ["*"], piece_elements=2**20),
        "vmap": VmapGradients(model, Weighed(), ["*"]),
        "loop": LoopGradients(model, Weighed(), ["*"]),
    }


@steady
@given(
    seed=st.integers(0, 2**31),
    rate=RATES,
    hidden=st.integers(1, 70),
    batch=st.integers(1, 5),
)
def test_gradients_are_those_of_the_network_without_the_dropped_units(
    seed: int, rate: float, hidden: int, batch: int
) -> None:
    plain, x = mlp(hidden, rate), drawn(batch, FEATURES)
    parameters = {n: p.detach().requires_grad_() for n, p in plain.named_parameters()}
    f = weighed(thinned_mlp(parameters, x, seed, rate))
    model = thinned(plain, seed)
    torch.testing.assert_close(outputs(model, Weighed(), [x]), f.detach(), rtol=1e-9, atol=1e-9)
    for method, compute in methods(model).items():
        found = gathered(compute, model, [x])
        for row in range(batch):
            wanted = torch.autograd.grad(
                f[row], list(parameters.values()), retain_graph=True, allow_unused=True
            )
            for name, grads in zip(parameters, wanted, strict=True):
                expected = torch.zeros_like(parameters[name]) if grads is None else grads
                torch.testing.assert_close(
                    found[name][row], expected, rtol=1e-9, atol=1e-9, msg=f"{method} {name}"
                )


@steady
@given(seed=st.integers(0, 2**31), rate=RATES, by_channel=st.booleans())
def test_channels_are_dropped_whole_in_convolutions(
    seed: int, rate: float, by_channel: bool
) -> None:
    kind = nn.Dropout2d if by_channel else nn.Dropout
    plain = exact(
        nn.Sequential(nn.Conv2d(2, 8, 3), nn.Tanh(), kind(rate), nn.Conv2d(8, 3, 2), nn.Flatten())
    )
    x = drawn(3, 2, 5, 5)
    parameters = {n: p.detach().requires_grad_() for n, p in plain.named_parameters()}
    left = kept(seed, "2", 8, rate)
    assume(left)  # torch refuses a convolution to no channels
    h = torch.tanh(
        nn.functional.conv2d(x, parameters["0.weight"][left], parameters["0.bias"][left])
    )
    out = nn.functional.conv2d(
        h, parameters["3.weight"][:, left] / (1 - rate), parameters["3.bias"]
    )
    f = weighed(out)
    model = thinned(plain, seed)
    for method, compute in methods(model).items():
        found = gathered(compute, model, [x])
        for row in range(len(x)):
            wanted = torch.autograd.grad(f[row], list(parameters.values()), retain_graph=True)
            for name, grads in zip(parameters, wanted, strict=True):
                torch.testing.assert_close(
                    found[name][row], grads, rtol=1e-9, atol=1e-9, msg=f"{method} {name}"
                )


@pytest.mark.parametrize(
    ("kind", "shape", "dim"),
    [
        (nn.Dropout, (9,), 0),
        (nn.Dropout, (2, 9), 1),
        (nn.Dropout, (2, 5, 9), 2),
        (nn.Dropout, (2, 9, 5, 4), 1),
        (nn.Dropout, (2, 9, 3, 2, 2), 1),
        (nn.Dropout1d, (2, 9, 5), 1),
        (nn.Dropout2d, (2, 9, 5, 4), 1),
        (nn.Dropout3d, (2, 9, 3, 2, 2), 1),
    ],
)
def test_a_mask_is_of_units_the_same_for_all_examples_and_positions(
    kind: type[nn.Module], shape: tuple[int, ...], dim: int
) -> None:
    rate, seed = 0.4, 7
    out = thinned(nn.Sequential(kind(rate)).eval(), seed)(torch.ones(shape))
    found = out.movedim(dim, 0).reshape(9, -1)
    assert (found == found[:, :1]).all()
    left = kept(seed, "0", 9, rate)
    wanted = [1 / (1 - rate) if i in left else 0 for i in range(9)]
    torch.testing.assert_close(found[:, 0], torch.tensor(wanted))


def test_seeds_and_modules_have_masks_of_their_own_of_about_the_rate() -> None:
    model = nn.Sequential(nn.Dropout(0.3), nn.Identity(), nn.Dropout(0.3)).eval()
    masks = []
    for seed in range(3):
        copied = thinned(model, seed)
        masks += [copied[0](torch.ones(4000)) > 0, copied[2](torch.ones(4000)) > 0]
    for at, mask in enumerate(masks):
        assert abs(float(mask.float().mean()) - 0.7) < 0.03  # 4 standard deviations
        for other in masks[:at]:
            assert abs(float((mask == other).float().mean()) - (0.49 + 0.09)) < 0.04


def test_the_model_stays_as_it_is_and_its_tensors_are_shared() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)).eval()
    x = torch.randn(3, 4)
    before = model(x)
    copied = thinned(model, 0)
    assert torch.equal(model(x), before)
    assert not torch.equal(copied(x), before)
    assert copied.state_dict().keys() == model.state_dict().keys()
    pairs = zip(copied.state_dict().values(), model.state_dict().values(), strict=True)
    assert all(a.data_ptr() == b.data_ptr() for a, b in pairs)
    assert torch.equal(copy.deepcopy(copied)(x), copied(x))


def test_a_fused_layer_of_torch_does_not_pass_the_masks_by() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True).eval()
    copied, x = thinned(layer, 0), torch.randn(2, 3, 8)
    with_gradients = copied(x)
    with torch.no_grad():
        torch.testing.assert_close(copied(x), with_gradients)
        assert (copied(x) - layer(x)).abs().max() > 0.1


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (nn.Sequential(nn.Linear(2, 2)), "Sequential has no dropout module"),
        (
            nn.Sequential(nn.Dropout(0.0), nn.Dropout2d(0)),
            "Sequential has no dropout module with a rate above 0: 0, 1",
        ),
        (
            nn.Sequential(nn.Dropout(0.5), nn.AlphaDropout(0.5)),
            "'1' is AlphaDropout(p=0.5, inplace=False), which leaves no thinned network",
        ),
        (
            nn.Sequential(nn.Dropout(1.0)),
            "'0' is Dropout(p=1.0, inplace=False), which leaves no thinned network",
        ),
    ],
)
def test_models_that_can_not_be_thinned(model: nn.Module, why: str) -> None:
    with pytest.raises(ConfigError) as raised:
        dropout_modules(model)
    assert raised.value.what == why
    assert raised.value.where == "checkpoints.dropout_seeds"
    assert "leave checkpoints.dropout_seeds out" in (raised.value.next or "")


def test_masks_that_leave_nothing_of_a_module() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5))
    first = next(s for s in range(100) if not kept(s, "1", 3, 0.5))
    check_units_left(model, first, {"1": 3})
    with pytest.raises(ConfigError) as raised:
        check_units_left(model, first + 1, {"1": 3})
    assert raised.value.what == f"the mask of seed {first} drops all 3 units of '1'"
    assert raised.value.next == f"checkpoints.dropout_seeds={first}"


def test_modules_that_are_never_called() -> None:
    with pytest.raises(ConfigError) as raised:
        check_units_left(nn.Sequential(nn.Dropout(0.5)), 4, {})
    assert raised.value.what == "Sequential calls none of its dropout modules in eval(): 0"
