"""Which names, versions and parts of a state dict are a model's: torch's own loading decides."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tiny
import torch
from torch import Tensor, nn

from trak_dist.checkpoints import state_dicts
from trak_dist.checkpoints.digests import content_digest
from trak_dist.checkpoints.state_dicts import Fitted
from trak_dist.errors import CheckpointError

State = dict[str, Tensor]


def fitted(state: Any, model: nn.Module) -> Fitted:
    """Fitted, and the model looked at: nothing of it may have changed."""
    before = copy.deepcopy(dict(model.state_dict()))
    versions = [t._version for t in (*model.parameters(), *model.buffers())]
    try:
        return state_dicts.fit_state_dict(state, model, where="here")
    finally:
        assert versions == [t._version for t in (*model.parameters(), *model.buffers())]
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def refused(state: State, model: nn.Module) -> str:
    with pytest.raises(CheckpointError) as caught:
        fitted(state, model)
    return str(caught.value)


def below(prefix: str, state: State) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def plain(state: State) -> State:
    """Without the versions that torch keeps, as after a dict comprehension or in safetensors."""
    return dict(state.items())


# What torch reads --------------------------------------------------------------------------------


def with_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))


def weight_normed(how: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return nn.Sequential(how(nn.Linear(6, 4)), nn.Tanh(), nn.Linear(4, 3))


class Renamed(nn.Linear):
    """Knows its first version, whose weight was transposed, and called `kernel`."""

    _version = 2

    def _load_from_state_dict(self, state, prefix, versions, *rest) -> None:
        if versions.get("version") == 1 or f"{prefix}kernel" in state:
            state[f"{prefix}weight"] = state.pop(f"{prefix}kernel").T
        super()._load_from_state_dict(state, prefix, versions, *rest)


class Shifted(nn.BatchNorm1d):
    """Writes into what it reads, as detectron2's frozen norm does with its older versions."""

    _version = 3

    def _load_from_state_dict(self, state, prefix, versions, *rest) -> None:
        if versions.get("version") is not None and versions["version"] < 3:
            state[f"{prefix}running_var"] -= 0.5
            state[f"{prefix}num_batches_tracked"] = torch.tensor(7)
        super()._load_from_state_dict(state, prefix, versions, *rest)


class Demanding(nn.Linear):
    """Raises where no version is told, as torchvision's MNASNet does."""

    def _load_from_state_dict(self, state, prefix, versions, *rest) -> None:
        if versions.get("version") != 1:
            raise ValueError(f"version should be 1 instead of {versions.get('version')}")
        super()._load_from_state_dict(state, prefix, versions, *rest)


def old_kernel() -> State:
    state = Renamed(4, 3).state_dict()
    state["kernel"] = state.pop("weight").T.contiguous()
    return state


def of_version_2() -> State:
    state = nn.Sequential(nn.Linear(6, 4), Shifted(4)).state_dict()
    del state["1.num_batches_tracked"]
    state._metadata["1"]["version"] = 2
    return state


TAKEN = {
    "no num_batches_tracked": (
        with_norm,
        lambda: {k: v for k, v in with_norm().state_dict().items() if "tracked" not in k},
    ),
    "weight_g, weight_v": (
        lambda: weight_normed(nn.utils.parametrizations.weight_norm),
        lambda: plain(weight_normed(nn.utils.weight_norm).state_dict()),
    ),
    "a name of its own": (lambda: Renamed(4, 3), old_kernel),
    "an older version": (lambda: nn.Sequential(nn.Linear(6, 4), Shifted(4)), of_version_2),
    "its version": (lambda: Demanding(4, 3), lambda: Demanding(4, 3).state_dict()),
    "a scalar of torch 0.3": (with_norm, lambda: with_norm().state_dict() | {
        "1.num_batches_tracked": torch.tensor([5])}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("kind", TAKEN)
def test_what_torch_loads_is_loaded_as_torch_loads_it(
    kind: str, prefix: str, tmp_path: Path
) -> None:
    make, older = TAKEN[kind]
    state = older()
    torch.save(state, tmp_path / "alone.pt")
    by_torch, model = make(), make()
    by_torch.load_state_dict(torch.load(tmp_path / "alone.pt"))
    assert any(not torch.equal(t, by_torch.state_dict()[n]) for n, t in model.state_dict().items())
    holder = type(state)(below(prefix, state))
    if hasattr(state, "_metadata"):
        holder._metadata = {f"{prefix}{n}".rstrip("."): v for n, v in state._metadata.items()}
    torch.save({"state_dict": holder}, tmp_path / "last.ckpt")
    taken = fitted(state_dicts.read(tmp_path / "last.ckpt"), model)
    taken.load_into(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, by_torch.state_dict()[name]), name


def test_what_is_in_no_checkpoint_is_named_and_stays() -> None:
    make, older = TAKEN["no num_batches_tracked"]
    model = make()
    model[1].num_batches_tracked += 3
    taken = fitted(older(), model)
    taken.load_into(model)
    assert taken.absent == {"1.num_batches_tracked"}
    assert model[1].num_batches_tracked == 3


def test_a_fault_is_named_beside_older_names_that_are_read() -> None:
    model = weight_normed(nn.utils.parametrizations.weight_norm)
    old = {"0.weight_g": torch.ones(4, 1), "0.weight_v": torch.ones(4, 6), "0.bias": torch.ones(4)}
    assert "fit the model: missing 2.bias (3,); missing 2.weight (3, 4)\n" in refused(old, model)


def test_a_module_that_refuses_to_load_says_so() -> None:
    state = plain(Demanding(4, 3).state_dict())
    model = Demanding(4, 3)
    with pytest.raises(CheckpointError, match="ValueError: version should be 1 instead of None"):
        fitted(state, model).load_into(model)
    more = refused({**state, "other": torch.ones(1)}, model)
    assert "loading it raises ValueError: version should be 1 instead of None" in more


@pytest.mark.parametrize("junk", [3, "x", {"": 3}, [("", {})]])
def test_versions_that_are_none_are_not_looked_at(junk: object) -> None:
    model = tiny.net()
    fitted(state_dicts.State(tiny.state(0), junk), model).load_into(model)


def test_two_tensors_for_one_of_the_model_are_refused() -> None:
    model = nn.ModuleDict({"into": nn.Embedding(5, 4), "out": nn.Linear(4, 5, bias=False)})
    model["out"].weight = model["into"].weight
    state = {"into.weight": torch.ones(5, 4), "out.weight": torch.ones(5, 4)}
    assert not fitted(state, model).absent
    assert not fitted({"out.weight": torch.ones(5, 4)}, model).absent, "given by the other"
    said = refused(state | {"out.weight": torch.zeros(5, 4)}, model)
    assert "into.weight and out.weight are one tensor in the model, and two in the" in said


# Parts and prefixes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefix", "said"),
    [
        ("", ""),
        ("net.", "the prefix 'net.' of its names is left out"),
        ("trainer.net.", "the prefix 'trainer.net.' of its names is left out"),
        ("module._orig_mod.", "the prefix 'module._orig_mod.' of its names is left out"),
        ("net._orig_mod.", "the prefix 'net._orig_mod.' of its names is left out"),
    ],
)
def test_a_prefix_changes_no_digest(prefix: str, said: str) -> None:
    state = tiny.state(3)
    model = tiny.net()
    taken = fitted(below(prefix, state), model)
    assert taken.notes == said
    assert content_digest(taken.state) == content_digest(state)


@pytest.mark.parametrize("wrapper", ["module", "_orig_mod"])
def test_a_wrapped_layer_is_found_on_either_side(wrapper: str) -> None:
    state, wrapped = tiny.state(3), {}
    for name, tensor in state.items():
        wrapped[name.replace("2.", f"2.{wrapper}.")] = tensor
    model = tiny.net()
    taken = fitted(below("net.", wrapped), model)
    taken.load_into(model)
    assert taken.notes == (
        f"the prefix 'net.' of its names is left out; '{wrapper}.' inside of its names is left out"
    )
    assert torch.equal(model[2].weight, state["2.weight"])
    holder = nn.Module()
    holder.add_module(wrapper, tiny.net())
    other = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), holder)
    inner = {f"0.{n}": t for n, t in nn.Linear(6, 5).state_dict().items()}
    assert not fitted({**inner, **below("2.", state)}, other).absent


def test_other_parts_of_a_training_module_are_left_out_and_reported() -> None:
    state = tiny.state(3)
    whole = {
        **below("net.", state),
        "criterion.weight": torch.ones(3),
        **below("critic.0.", tiny.nn.Linear(4, 4).state_dict()),
    }
    model = tiny.net()
    taken = fitted(whole, model)
    assert taken.notes == (
        "the prefix 'net.' of its names is left out; other parts that it holds are left out: "
        "criterion.weight, critic.* (2 tensors)"
    )
    assert content_digest(taken.state) == content_digest(state)


@pytest.mark.parametrize("more", [{}, {"teacher.decay": torch.ones(1)}])
def test_of_two_parts_that_fit_none_is_taken(more: State) -> None:
    both = {**below("student.", tiny.state(0)), **below("teacher.", tiny.state(1)), **more}
    said = refused(both, tiny.net())
    assert "holds several parts that could be the model, with other weights" in said
    assert "names that begin with 'student.' and 'teacher.'\n" in said
    assert "module.get_submodule('student').state_dict()" in said
    beside = {**tiny.state(0), **below("ema.", tiny.state(1))}
    assert "begin with no prefix and 'ema.'\n" in refused(beside, tiny.net())
    of_other_width = {n: torch.ones(2, *t.shape) for n, t in tiny.state(1).items()}
    taken = fitted({**below("t.", tiny.state(0)), **below("s.", of_other_width)}, tiny.net())
    assert "the prefix 't.'" in taken.notes


def test_one_module_under_two_names_is_no_second_part() -> None:
    both = {**below("model.", tiny.state(0)), **below("loss.model.", tiny.state(0))}
    taken = fitted(both, tiny.net())
    assert taken.notes.endswith("are left out: loss.* (4 tensors)")


def test_a_part_that_holds_less_of_the_model_than_another_is_not_taken() -> None:
    class Headed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(6, 5).requires_grad_(False), nn.Linear(5, 3)

    state = Headed().state_dict()
    said = refused({**state, **below("aux.head.", nn.Linear(5, 3).state_dict())}, Headed())
    assert "does not fit the model: unexpected aux.head.bias (3,); unexpected aux.head" in said
    assert "next:  save only the model: torch.save(model.state_dict(), path), if" in said


def test_an_unfit_part_is_named_with_what_else_is_in_the_file() -> None:
    state = {**below("net.", tiny.state(0)), "criterion.weight": torch.ones(3)}
    state["net.0.weight"] = torch.ones(5, 9)
    said = refused(state, tiny.net())
    assert "does not fit the model below 'net.': 0.weight has shape (5, 9), the model's" in said
    assert "other parts are in it too (criterion.weight): save only the model" in said
    assert "the checkpoint does not fit the model: it is empty" in refused({}, nn.ReLU())


@pytest.mark.parametrize("turned", [False, True])
def test_a_name_written_in_two_ways_is_one_tensor_or_refused(turned: bool) -> None:
    state = tiny.state(0)
    twice = {**state, "0._orig_mod.bias": state["0.bias"].clone()}
    other = {**state, "0._orig_mod.bias": state["0.bias"] + 1}
    if turned:
        twice, other = dict(reversed(twice.items())), dict(reversed(other.items()))
    assert content_digest(fitted(twice, tiny.net()).state) == content_digest(state)
    assert "unexpected 0._orig_mod.bias (5,)" in refused(other, tiny.net())


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float64])
def test_a_conversion_of_types_is_reported(stored: torch.dtype, tmp_path: Path) -> None:
    state = {name: tensor.to(stored) for name, tensor in tiny.state(0).items()}
    safetensors.torch.save_file(state, tmp_path / "other.safetensors")
    taken = fitted(state_dicts.read(tmp_path / "other.safetensors"), tiny.net())
    kind = str(stored).removeprefix("torch.")
    assert taken.notes == f"what it holds in {kind} is converted to the model's float32"
