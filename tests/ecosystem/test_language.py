"""`LanguageModeling` of Hugging Face's GPT-2, small, against its own loss."""

from __future__ import annotations

import copy

import pytest
import torch
from gathered_gradients import gathered
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from trak_dist import LanguageModeling
from trak_dist.ops.hooks import HookGradients

ROWS, TOKENS, VOCABULARY = 4, 9, 30


@pytest.fixture
def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=TOKENS, n_embd=8, n_layer=2, n_head=2,
        initializer_range=0.5, attn_implementation="eager",
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def padded() -> dict[str, Tensor]:
    """As a collator of Hugging Face gives it: labels are −100 where the mask is 0."""
    ids = torch.randint(VOCABULARY, (ROWS, TOKENS), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(TOKENS) < torch.tensor([[9], [4], [2], [7]])).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


@pytest.mark.parametrize("labels", [True, False])
def test_f_and_its_gradients_are_minus_the_loss_of_gpt2(
    gpt2: GPT2LMHeadModel, labels: bool
) -> None:
    whole = padded()
    batch = (whole if labels else {n: t for n, t in whole.items() if n != "labels"},)
    found = LanguageModeling().get_batch_output(gpt2, {}, {}, batch)
    grads = gathered(
        HookGradients(gpt2, LanguageModeling(), ["*"], piece_elements=10**6), gpt2, batch
    )
    exact = copy.deepcopy(gpt2).double()
    for row in range(ROWS):
        one = {name: tensor[row : row + 1] for name, tensor in whole.items()}
        tokens = int(one["attention_mask"].sum()) - 1  # the loss is their mean
        loss = exact(**one).loss * tokens
        assert found[row].item() == pytest.approx(-loss.item(), rel=1e-5)
        wanted = torch.autograd.grad(-loss, [*exact.parameters()])
        size = torch.stack([w.norm() for w in wanted]).norm()
        for (name, _), grad in zip(exact.named_parameters(), wanted, strict=True):
            assert (grads[name][row] - grad).norm() <= 1e-5 * grad.norm() + 1e-6 * size, name
