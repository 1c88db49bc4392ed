"""CLIP's output, out-to-loss, gradients and drawn labels against float64; what is prepared."""

from __future__ import annotations

import copy
import functools
import gc
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_clip
import torch
from gathered_gradients import gathered
from tiny_clip import CONTRAST, Pairs, towers
from torch import Tensor, nn

from trak_dist import CLIP
from trak_dist.checkpoints import state_dicts
from trak_dist.errors import ConfigError, ProblemError
from trak_dist.ops.gradients import LoopGradients, VmapGradients, activation_bytes, outputs
from trak_dist.ops.hooks import HookGradients
from trak_dist.ops.model_outputs import forget, out_to_loss, preparation, prepared
from trak_dist.ops.wrapped_outputs import SeededByExample
from trak_dist.source import model_digest

PAIRS, OTHERS = Pairs(5, seed=1), Pairs(CONTRAST, seed=3)
METHODS = {
    "loop": LoopGradients,
    "vmap": VmapGradients,
    "hooks": lambda *arguments: HookGradients(*arguments, piece_elements=64),
}


def state_of(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return dict(model.named_parameters()), dict(model.named_buffers())


@pytest.mark.parametrize("temperature", [None, 1.0, 0.2])
def test_f_is_traks_formula(temperature: float | None) -> None:
    model = towers()
    found = outputs(model, tiny_clip.output(temperature=temperature), PAIRS.batch())
    scale = None if temperature is None else 1 / temperature
    wanted = tiny_clip.values(tiny_clip.exact(model.state_dict()), OTHERS, PAIRS, scale)
    assert np.allclose(found.numpy(), wanted, rtol=1e-5, atol=1e-5)


def test_out_to_loss_is_traks_of_the_pair_in_a_batch_with_the_contrasts() -> None:
    model = towers()
    found = out_to_loss(tiny_clip.output(), model, PAIRS.batch(), None)
    wanted = tiny_clip.out_to_loss(tiny_clip.exact(model.state_dict()), OTHERS, PAIRS)
    assert np.allclose(found.numpy(), wanted, rtol=1e-5)


class ForTrak(nn.Module):
    """As open_clip's models are called, and what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.towers = towers()

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        both = self.towers.encode_image(image), self.towers.encode_text(text)
        x, y = (nn.functional.normalize(e) for e in both)
        return x, y, self.towers.logit_scale.exp()


def test_traks_own_class_gives_the_same_f_and_q(monkeypatch: pytest.MonkeyPatch) -> None:
    trak = pytest.importorskip("trak.modelout_functions").CLIPModelOutput
    model = ForTrak().eval()
    with torch.no_grad():
        fixed = model(*OTHERS.batch())[:2]
    never_drawn = torch.zeros(1, tiny_clip.DIMENSIONS)  # it draws row i in proportion to i
    for name, table in zip(("image_embeddings", "text_embeddings"), fixed, strict=True):
        monkeypatch.setattr(trak, name, torch.cat([never_drawn, table]))
    monkeypatch.setattr(trak, "num_computed_embeddings", CONTRAST + 1)
    theirs, state = trak(simulated_batch_size=CONTRAST), state_of(model)
    found = outputs(model, tiny_clip.output(temperature=1.0), PAIRS.batch())
    q = out_to_loss(tiny_clip.output(), model, PAIRS.batch(), None)
    for row, pair in enumerate(PAIRS):
        assert theirs.get_output(model, *state, *pair).item() == pytest.approx(found[row].item())
        whole = [
            torch.cat([one[None], others]) for one, others in zip(pair, OTHERS.batch(), strict=True)
        ]
        assert theirs.get_out_to_loss_grad(model, *state, whole)[0] == pytest.approx(q[row].item())


def test_out_to_loss_is_minus_the_slope_of_the_loss_where_both_margins_grow_alike() -> None:
    model = towers()
    output = prepared(tiny_clip.output(), model)
    margins = torch.stack(output._margins(model, *state_of(model), PAIRS.batch()))
    margins = margins.detach().double()
    t = torch.zeros(len(PAIRS), dtype=torch.float64, requires_grad=True)
    loss = nn.functional.softplus(-(margins + t)).sum()
    (slope,) = torch.autograd.grad(loss, t)  # f = a + b grows by 2t
    q = out_to_loss(output, model, PAIRS.batch(), None)
    assert torch.allclose(q.double(), -slope / 2, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_those_of_differences_with_the_contrasts_held_constant(method: str) -> None:
    model = towers()
    compute = METHODS[method](model, tiny_clip.output(), ["*"])
    found = gathered(compute, model, PAIRS.batch())
    wanted = tiny_clip.gradients(tiny_clip.exact(model.state_dict()), OTHERS, PAIRS)
    flat = np.concatenate(
        [found[name].reshape(len(PAIRS), -1).numpy() for name in sorted(found)], 1
    )
    assert flat.shape == wanted.shape
    assert np.abs(flat - wanted).max() <= 1e-4 * np.abs(wanted).max()
    assert np.abs(wanted[:, -1]).max() > 0  # words; and the temperature is a weight like others
    assert np.abs(found["logit_scale"].numpy()).max() > 0


def test_labels_are_drawn_by_both_choices_and_their_likelihood_is_that_of_the_softmax() -> None:
    model = towers()
    output, one = prepared(tiny_clip.output(), model), Pairs(1, seed=5)
    draws = 4000
    image, text = (t.expand(draws, -1) for t in one.batch())
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(draws, 2, generator=generator, dtype=torch.float64)
    batch = output.draw_labels(model, *state_of(model), (image, text), lambda count: u[:, :count])
    drawn = batch[-1].numpy()
    assert drawn.shape == (draws, 2)
    state = tiny_clip.exact(model.state_dict())
    fixed = tiny_clip.embedded(state, *OTHERS.batch())
    log_p = tiny_clip.log_probabilities(state, fixed, one[0])
    for choice in (0, 1):
        counts = np.bincount(drawn[:, choice], minlength=CONTRAST + 1) / draws
        assert np.abs(counts - np.exp(log_p[choice])).max() < 4 * np.sqrt(0.25 / draws)
    found = output.get_batch_log_likelihood(model, *state_of(model), batch)
    wanted = log_p[0][drawn[:, 0]] + log_p[1][drawn[:, 1]]
    assert np.allclose(found.detach().numpy(), wanted, atol=1e-5)


# Interfaces of models --------------------------------------------------------------------------


class AsTuple(nn.Module):
    def __init__(self, names: tuple[str, str] | None = None) -> None:
        super().__init__()
        self.towers, self.names = towers(), names

    def forward(self, image: Tensor, text: Tensor) -> Any:
        found = self.towers.encode_image(image), self.towers.encode_text(text)
        named = dict(zip(self.names or (), found, strict=False))
        return SimpleNamespace(**named) if named else (*found, self.towers.logit_scale.exp())


WANTED = {"tuple": None, "embeds": ("image_embeds", "text_embeds")}
WANTED["features"] = ("image_features", "text_features")


@pytest.mark.parametrize("name", WANTED)
def test_embeddings_are_found_in_what_the_model_returns(name: str) -> None:
    found = outputs(AsTuple(WANTED[name]).eval(), tiny_clip.output(), PAIRS.batch())
    assert torch.allclose(found, outputs(towers(), tiny_clip.output(), PAIRS.batch()))


def test_a_batch_that_is_a_mapping_goes_to_the_model_by_name() -> None:
    def mapping(pairs: Pairs) -> dict[str, Tensor]:
        return dict(zip(("image", "text"), pairs.batch(), strict=True))

    model, contrast = AsTuple().eval(), [mapping(OTHERS)]
    found = outputs(model, CLIP(contrast), (mapping(PAIRS),))
    assert torch.allclose(found, outputs(towers(), tiny_clip.output(), PAIRS.batch()), atol=1e-5)
    output, uniform = prepared(CLIP(contrast), model), torch.full((5, 2), 0.5)
    drawn = output.draw_labels(model, *state_of(model), (mapping(PAIRS),), lambda _: uniform)
    likelihood = output.get_batch_log_likelihood(model, *state_of(model), drawn)
    assert likelihood.shape == (5,)
    assert (likelihood < 0).all()


def test_a_function_gives_the_embeddings() -> None:
    def encode(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
        return model.encode_image(batch[0]), 3 * model.encode_text(batch[1])

    found = outputs(towers(), tiny_clip.output(encode=encode), PAIRS.batch())
    assert torch.allclose(found, outputs(towers(), tiny_clip.output(), PAIRS.batch()), atol=1e-5)


@pytest.mark.parametrize("compute", [torch.float16, torch.float64])
def test_the_contrasts_are_embedded_in_the_type_of_the_weights(compute: torch.dtype) -> None:
    model, (images, texts) = towers().to(compute), PAIRS.batch()
    found = outputs(model, tiny_clip.output(), (images.to(compute), texts))
    wanted = tiny_clip.values(tiny_clip.exact(towers().state_dict()), OTHERS, PAIRS)
    error = np.abs(found.double().numpy() - wanted).max()
    assert error < (0.05 if compute is torch.float16 else 1e-6)


def similarities(_: Any, batch: Any) -> tuple[Tensor, Tensor]:
    square = batch[0] @ batch[0].mT
    return square, square.mT


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a model without a temperature": ({"model": AsTuple()}, "no tensors called logit_scale"),
    "similarities": ({"encode": similarities}, "embeddings of 3 dimensions, 4 of other pairs"),
    "another number of embeddings": (
        {"encode": lambda m, b: (m.encode_image(b[0])[:1],) * 2},
        "embeddings of 4 pairs came as",
    ),
    "no embeddings": ({"encode": lambda *_: ()}, "nothing that is known"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_gives_no_embeddings_is_refused(name: str) -> None:
    settings, told = dict(REFUSED[name][0]), REFUSED[name][1]
    model = settings.pop("model", None)
    if model is not None:
        model = copy.deepcopy(model).eval()
        del model.towers.logit_scale
        model.forward = lambda image, text: (
            model.towers.encode_image(image),
            model.towers.encode_text(text),
        )
    model = model or towers()
    with pytest.raises(ProblemError, match=told):
        LoopGradients(model, tiny_clip.output(**settings), ["*"])(PAIRS.batch(), lambda *_: None)


NO_BATCHES = {
    "dataset": OTHERS,
    "empty": [],
    "number": 3,
    "tensor": OTHERS.batch()[0],
    "mapping": {"a": 1},
    "examples": [OTHERS[0]],
    "no rows": [(torch.zeros(0, 6), torch.zeros(0, 3))],
    "names": [(torch.zeros(2, 6), ["a cat", "a dog"])],
}


@pytest.mark.parametrize("contrast", NO_BATCHES.values(), ids=NO_BATCHES)
def test_what_is_no_batches_is_refused(contrast: Any) -> None:
    with pytest.raises(ConfigError, match="contrast"):
        CLIP(contrast)


@pytest.mark.parametrize("temperature", [0, -1.0, 14.3, float("nan")])
def test_a_temperature_that_is_a_scale_is_refused(temperature: float) -> None:
    with pytest.raises(ConfigError, match=r"not in \(0, 1\]"):
        tiny_clip.output(temperature=temperature)


def test_a_contrast_set_is_known_by_its_content() -> None:
    def digest(contrast: Any, **settings: Any) -> str:
        return model_digest(towers(), CLIP(contrast, **settings))

    images, texts = OTHERS.batch()
    known = digest([(images, texts)])
    assert digest([[images.clone(), texts.clone()]]) == known
    others = {
        "order": digest([(images.flip(0), texts.flip(0))]),
        "batches": digest([(images[:3], texts[:3]), (images[3:], texts[3:])]),
        "type": digest([(images.double(), texts)]),
        "content": digest([(images + 1e-6, texts)]),
        "name": digest([{"image": images, "text": texts}]),
        "another name": digest([{"picture": images, "text": texts}]),
        "temperature": digest([(images, texts)], temperature=0.5),
        "encode": digest([(images, texts)], encode=similarities),
        "partial": digest([(images, texts)], encode=functools.partial(similarities)),
    }
    assert len({known, *others.values()}) == len(others) + 1
    again = digest([(images, texts)], encode=functools.partial(similarities))
    assert again == others["partial"]


# Prepared ---------------------------------------------------------------------------------------


def expected(model: nn.Module) -> np.ndarray:
    return tiny_clip.values(tiny_clip.exact(model.state_dict()), OTHERS, PAIRS)


def by_data(model: nn.Module, state: dict[str, Tensor]) -> None:
    """A loader that changes weights behind autograd's back, as some modules' own do."""
    for name, parameter in model.named_parameters():
        parameter.data.copy_(state[name])
    forget(model)


@pytest.mark.parametrize("load", [nn.Module.load_state_dict, by_data])
def test_embeddings_are_never_those_of_other_weights(load: Any) -> None:
    model, output = towers(), tiny_clip.output()
    states = [towers(seed).state_dict() for seed in (10, 11)]
    for turn in (0, 1, 0, 1, 1, 0):
        load(model, states[turn])
        found = outputs(model, output, PAIRS.batch())
        assert np.allclose(found.numpy(), expected(model), rtol=1e-5, atol=1e-5)


def test_a_checkpoint_that_modules_load_behind_autograds_back_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
        for name, parameter in module._parameters.items():
            parameter.data.copy_(state[prefix + name])

    model, output = towers(), tiny_clip.output()
    outputs(model, output, PAIRS.batch())
    versions = preparation._versions(model)
    monkeypatch.setattr(nn.Module, "_load_from_state_dict", load)
    fitted = state_dicts.fit_state_dict(towers(10).state_dict(), model, where="here")
    fitted.load_into(model)
    assert preparation._versions(model) == versions
    found = outputs(model, output, PAIRS.batch())
    assert np.allclose(found.numpy(), expected(model), rtol=1e-5, atol=1e-5)


def test_a_step_of_training_and_a_copy_are_seen() -> None:
    model, output = towers(), tiny_clip.output()
    before = outputs(model, output, PAIRS.batch())
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.image.weight.mul_(2)
    for one in (model, other, model):
        assert np.allclose(outputs(one, output, PAIRS.batch()).numpy(), expected(one), rtol=1e-4)
    with torch.no_grad():
        model.words.weight.add_(0.5)
    after = outputs(model, output, PAIRS.batch())
    assert np.allclose(after.numpy(), expected(model), rtol=1e-4)
    assert not torch.allclose(before, after)


class Counted(CLIP):
    calls = 0

    def prepare(self, *arguments: Any) -> CLIP:
        type(self).calls += 1
        return super().prepare(*arguments)


def test_it_is_prepared_once_of_a_models_weights_also_if_it_is_wrapped() -> None:
    model, output = towers(), Counted([OTHERS.batch()])
    wrapped = SeededByExample(output)
    for one in (output, wrapped, output, wrapped):
        LoopGradients(model, one, ["*"])(PAIRS.batch(), lambda *_: None)
        out_to_loss(one, model, PAIRS.batch(), None)
    assert Counted.calls == 1


def test_a_model_that_is_gone_leaves_nothing_behind() -> None:
    gc.collect()
    before = len(preparation._known)
    model = towers()
    prepared(tiny_clip.output(), model)
    assert len(preparation._known) == before + 1
    del model
    gc.collect()
    assert len(preparation._known) == before


def test_an_output_that_was_not_prepared_says_so() -> None:
    model = towers()
    with pytest.raises(ProblemError, match="contrast set was not embedded"):
        tiny_clip.output().get_batch_output(model, *state_of(model), PAIRS.batch())


def test_prepare_must_return_a_model_output() -> None:
    class Changed(CLIP):
        def prepare(self, *_: Any) -> Any:
            self.ready = True

    with pytest.raises(ProblemError, match="prepare returned NoneType, not a model output"):
        prepared(Changed([OTHERS.batch()]), towers())


def test_activations_do_not_count_the_contrasts_for_each_example() -> None:
    few, many = (CLIP([Pairs(rows, 3).batch()]) for rows in (100, 1000))
    held = [activation_bytes(towers(), output, PAIRS.batch()) for output in (few, many)]
    per_contrast = (held[1] - held[0]) / 900
    assert per_contrast < 2 * 4 * tiny_clip.DIMENSIONS  # numbers of either table
