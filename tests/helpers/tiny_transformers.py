"""Hugging Face models and tokenizers small enough for a test, written to directories."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = ["[PAD]", "[UNK]", "[EOS]", *(f"w{i}" for i in range(27))]
WIDTH, POSITIONS = 8, 24
_SIZES = {"vocab_size": len(WORDS), "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 2}
_ATTENTION = {
    "hidden_size": WIDTH,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": POSITIONS,
}
CONFIGS: Mapping[str, Any] = {
    "gpt2": lambda **more: transformers.GPT2Config(
        n_embd=WIDTH, n_layer=1, n_head=2, n_positions=POSITIONS, **{**_SIZES, **more}
    ),
    "llama": lambda **more: transformers.LlamaConfig(
        num_key_value_heads=1, **_ATTENTION, **_SIZES, **more
    ),
    "qwen2": lambda **more: transformers.Qwen2Config(
        num_key_value_heads=1, **_ATTENTION, **_SIZES, **more
    ),
    "bert": lambda **more: transformers.BertConfig(
        vocab_size=len(WORDS), pad_token_id=0, **_ATTENTION, **more
    ),
}


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]"
    )


def write_model(
    directory: Path, kind: str, auto: str = "AutoModelForCausalLM", *, seed: int = 0, **more: Any
) -> Path:
    """A model with weights that make its texts unlike, and the tokenizer."""
    torch.manual_seed(seed)
    model = getattr(transformers, auto).from_config(CONFIGS[kind](**more))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "norm" not in name:
                parameter.mul_(15)
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def texts(count: int, seed: int) -> list[str]:
    """Texts of 3 to 12 words."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 13, (count,), generator=draw).tolist()
    words = WORDS[3:]
    return [
        " ".join(words[i] for i in torch.randint(len(words), (n,), generator=draw).tolist())
        for n in lengths
    ]
