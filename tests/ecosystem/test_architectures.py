"""Small models of Hugging Face's architectures: planning takes hooks, in any type of weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as hf
from gathered_gradients import gathered
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from trak_dist import ImageClassification, LanguageModeling, TextClassification
from trak_dist.ops.gradients import LoopGradients
from trak_dist.ops.hooks import HookGradients
from trak_dist.ops.model_outputs import ModelOutput
from trak_dist.planning.gradient_method import select_gradient_method

pytestmark = pytest.mark.slow

TOKENS, VOCABULARY, CLASSES = 9, 40, 3
SIZES: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "vocab_size": VOCABULARY, "max_position_embeddings": 32,
}  # fmt: skip
SWIN: dict[str, Any] = {
    "image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2],
    "window_size": 4, "num_labels": CLASSES,
}  # fmt: skip
DEBERTA: dict[str, Any] = SIZES | {
    "num_labels": CLASSES, "relative_attention": True, "pos_att_type": ["p2c", "c2p"],
    "max_relative_positions": -1, "type_vocab_size": 0,
}  # fmt: skip


class Logits(nn.Module):
    """Of images, by position."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(pixel_values=x).logits


class SequenceToSequence(LanguageModeling):
    """The log-likelihood of `wanted`, given the inputs."""

    def get_batch_output(self, model, weights, buffers, batch) -> Tensor:
        inputs = dict(batch[0])
        wanted = inputs.pop("wanted")
        found = functional_call(model, ({**weights}, {**buffers}), (), inputs)
        return found.logits.log_softmax(-1).gather(-1, wanted[..., None])[..., 0].sum(1)

    def get_out_to_loss_grad(self, model, weights, buffers, batch) -> Tensor:
        return torch.ones(len(batch[0]["wanted"]))


def drawn(size: int, tokens: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (size, tokens), generator=generator)


def texts(size: int) -> dict[str, Tensor]:
    lengths = torch.tensor([9, 4, 7, 3, 6])[:size, None]
    return {
        "input_ids": drawn(size, TOKENS),
        "attention_mask": (torch.arange(TOKENS) < lengths).long(),
    }


def labelled(size: int) -> Any:
    return ({**texts(size), "labels": torch.arange(size) % CLASSES},)


def pairs(size: int) -> Any:
    return ({**texts(size), "decoder_input_ids": drawn(size, 6, 2), "wanted": drawn(size, 6, 3)},)


def images(size: int) -> Any:
    x = torch.randn(size, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return x, torch.arange(size) % CLASSES


@dataclass(frozen=True)
class Architecture:
    auto: Any
    config: Callable[[], Any]
    output: ModelOutput
    batch: Callable[[int], Any]

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        model = self.auto.from_config(self.config()).eval()
        return Logits(model) if self.batch is images else model


def causal(config: Callable[[], Any]) -> Architecture:
    return Architecture(
        hf.AutoModelForCausalLM, config, LanguageModeling(), lambda size: (texts(size),)
    )


def classifier(config: Callable[[], Any]) -> Architecture:
    return Architecture(
        hf.AutoModelForSequenceClassification, config, TextClassification(), labelled
    )


def vision(config: Callable[[], Any]) -> Architecture:
    return Architecture(hf.AutoModelForImageClassification, config, ImageClassification(), images)


ARCHITECTURES = {
    "GPT-2": causal(lambda: hf.GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2)),
    "Llama": causal(lambda: hf.LlamaConfig(**SIZES)),
    "Mamba": causal(
        lambda: hf.MambaConfig(
            vocab_size=VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=2,
            time_step_rank=2,
        )
    ),
    "T5": Architecture(
        hf.AutoModelForSeq2SeqLM,
        lambda: hf.T5Config(
            d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=VOCABULARY,
            relative_attention_num_buckets=8,
        ),
        SequenceToSequence(),
        pairs,
    ),
    "BERT": classifier(lambda: hf.BertConfig(**SIZES, num_labels=CLASSES)),
    "DeBERTa": classifier(lambda: hf.DebertaConfig(**DEBERTA)),
    "DeBERTa, version 2": classifier(
        lambda: hf.DebertaV2Config(
            **DEBERTA, position_buckets=4, norm_rel_ebd="layer_norm", share_att_key=True
        )
    ),
    "Swin": vision(lambda: hf.SwinConfig(**SWIN)),
    "Swin, version 2": vision(lambda: hf.Swinv2Config(**SWIN)),
}  # fmt: skip


def in_type(batch: Any, dtype: torch.dtype) -> Any:
    return pytree.tree_map_only(
        Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, batch
    )


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], to: float) -> None:
    whole = torch.stack([grads.norm() for grads in wanted.values()]).norm()
    for parameter, grads in wanted.items():
        error = (found[parameter] - grads).norm()
        assert error <= to * (grads.norm() + 1e-2 * whole), parameter


# Its experts are multiplied by a function that knows no float64.
MIXTRAL = causal(lambda: hf.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=3))


def test_gradients_of_experts_in_one_tensor_are_those_one_by_one_in_float64() -> None:
    model, batch = MIXTRAL.build(), MIXTRAL.batch(4)
    exact = copy.deepcopy(model).double()
    exact.set_experts_implementation("eager")
    wanted = gathered(LoopGradients(exact, MIXTRAL.output, ["*"]), exact, batch)
    hooks = HookGradients(model, MIXTRAL.output, ["*"], piece_elements=1000)
    assert_close(gathered(hooks, model, batch), wanted, to=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*ARCHITECTURES, "Mixtral"])
def test_hooks_are_taken(name: str, dtype: torch.dtype) -> None:
    one = ARCHITECTURES.get(name, MIXTRAL)
    model, batch = one.build().to(dtype), in_type(one.batch(5), dtype)
    method = select_gradient_method(
        model, one.output, {"train": batch}, params=["*"], requested="auto"
    )
    assert method == ("hooks", "")


@pytest.mark.parametrize(
    "size", [2, *(pytest.param(size, marks=pytest.mark.long) for size in (1, 4))]
)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_by_hooks_are_those_of_each_example_alone_in_float64(
    name: str, size: int
) -> None:
    one = ARCHITECTURES[name]
    model, batch = one.build().double(), in_type(one.batch(size), torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():  # no zeros, no ones, more than they begin with
            parameter.add_(0.1 * torch.randn_like(parameter))
    wanted = gathered(LoopGradients(copy.deepcopy(model), one.output, ["*"]), model, batch)
    hooks = HookGradients(model, one.output, ["*"], piece_elements=1000)
    found = gathered(hooks, model, batch)
    # Some of these models compute parts in float32, whatever their weights are.
    assert_close(found, wanted, to=1e-6)
