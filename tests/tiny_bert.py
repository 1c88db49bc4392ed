"""A text classifier small enough for a test: Hugging Face's BERT of one layer, on random tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

VOCABULARY, LENGTH, CLASSES = 30, 9, 3


class Logits(nn.Module):
    """The classifier as TRAK's examples wrap it, for its model output to get logits."""

    def __init__(self) -> None:
        super().__init__()
        self.model = net()

    def forward(self, input_ids: Tensor, token_type_ids: Tensor, attention_mask: Tensor) -> Tensor:
        # Made here: with one row of a mask the model looks whether it is all ones, and vmap can't.
        added = torch.where(attention_mask[:, None, None] == 1, 0.0, torch.finfo().min)
        return self.model(
            input_ids=input_ids, token_type_ids=token_type_ids, attention_mask=added
        ).logits


def net() -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=LENGTH,
        num_labels=CLASSES,
        attn_implementation="eager",
    )
    return BertForSequenceClassification(config)


def state(seed: int, model: type[nn.Module] = Logits) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    made = model() if model is Logits else net()
    weights = made.state_dict()
    for name, tensor in weights.items():
        if tensor.is_floating_point() and "LayerNorm" not in name:
            tensor.mul_(20)  # from BERT's initial 0.02, with which every text is alike
    return weights


def batch(rows: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(input_ids, token_type_ids, attention_mask, labels), padded to different lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, LENGTH + 1, (rows, 1), generator=generator)
    mask = (torch.arange(LENGTH) < lengths).long()
    ids = torch.randint(1, VOCABULARY, (rows, LENGTH), generator=generator) * mask
    labels = torch.randint(0, CLASSES, (rows,), generator=generator)
    return ids, torch.zeros_like(ids), mask, labels
