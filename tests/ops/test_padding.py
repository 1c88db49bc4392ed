"""Texts padded on the left or on the right are the text itself, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_transformers as tiny
import torch
import transformers
from gathered_gradients import gathered
from torch import Tensor, nn

from trak_dist import EachToken, LanguageModeling
from trak_dist.ops.gradients import LoopGradients
from trak_dist.ops.hooks import HookGradients

LENGTH, PADDING = 6, 3
IDS = torch.tensor([[5, 9, 4, 21, 9, 7]])
OPT = transformers.OPTConfig(
    vocab_size=len(tiny.WORDS),
    hidden_size=tiny.WIDTH,
    ffn_dim=12,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=tiny.POSITIONS,
    word_embed_proj_dim=tiny.WIDTH,
)


def net(kind: str) -> nn.Module:
    torch.manual_seed(0)
    config = OPT if kind == "opt" else tiny.CONFIGS[kind]()
    made = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(5 if parameter.ndim > 1 else 1)
    return made


def padded(left: int, right: int, kind: str) -> dict[str, Tensor]:
    def with_padding(tokens: Tensor) -> Tensor:
        return nn.functional.pad(tokens, (left, right))

    text = {"input_ids": with_padding(IDS), "attention_mask": with_padding(torch.ones_like(IDS))}
    if kind == "gpt2":
        text["position_ids"] = with_padding(torch.arange(LENGTH)[None])
    return text


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt"])
@pytest.mark.parametrize("way", [LoopGradients, HookGradients])
def test_padding_on_either_side_is_no_text(kind: str, way: Any) -> None:
    model, output = net(kind), LanguageModeling()
    more = {"piece_elements": 10**6} if way is HookGradients else {}
    found = []
    for left, right in ((0, 0), (PADDING, 0), (0, PADDING)):
        batch = ({k: v.repeat(2, 1) for k, v in padded(left, right, kind).items()},)
        f = output.get_batch_output(model, {}, {}, batch)
        found.append({"f": f.detach(), **gathered(way(model, output, ["*"], **more), model, batch)})
    logits = model(IDS).logits[0, :-1].log_softmax(-1)
    assert float(found[0]["f"][0]) == pytest.approx(
        float(logits[torch.arange(LENGTH - 1), IDS[0, 1:]].sum().detach()), rel=1e-10
    )
    close = 1e-6 if kind == "llama" else 1e-9  # its angles, which padding shifts, are float32
    for other in found[1:]:
        for name, values in found[0].items():
            torch.testing.assert_close(other[name], values, rtol=close, atol=close)


def test_the_first_token_of_a_text_is_no_row_whichever_side_is_padded() -> None:
    for left, right in ((0, 0), (PADDING, 0), (0, PADDING)):
        text = {name: values[0] for name, values in padded(left, right, "llama").items()}
        rows = EachToken([text])
        assert [rows.place(i)[1] - left for i in range(len(rows))] == [1, 2, 3, 4, 5]
