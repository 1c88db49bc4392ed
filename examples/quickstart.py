"""The calls of TRAK's quickstart: which images made the model see a coat in this one?

    apt install dataset-fashion-mnist
    python examples/quickstart.py [DIRECTORY] [--train N] [--epochs N] [--subsets N]

ResNet-9 on the pullovers and coats of Fashion-MNIST, padded to 3 × 32 × 32; with other arguments,
give another directory. Trains three checkpoints, scores the train images for each target, draws
the strongest ones, and holds the scores against models that are trained on halves of the train set,
which takes longest; fewer --subsets tell less.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.stats import spearmanr
from timing import timed
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset

from trak_dist import ImageClassification, TRAKer
from trak_dist.problems import fashion_mnist
from trak_dist.problems.images import LabelledImages
from trak_dist.problems.networks import resnet9
from trak_dist.problems.training import classifier_trainer

ROOT = "/usr/share/datasets/fashion-mnist"
PULLOVER, COAT = 2, 4
CHECKPOINTS, TARGETS, BATCH = 3, 100, 50
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def main(directory: Path, train: int, epochs: int, subsets: int) -> None:
    ds_train, ds_val = datasets(train)
    fit = classifier_trainer(
        lambda: resnet9(2), epochs=epochs, batch_size=BATCH, learning_rate=0.05, weight_decay=5e-4
    )
    with timed(f"trained {CHECKPOINTS} checkpoints"):
        ckpts = [fit(ds_train, seed, DEVICE) for seed in range(CHECKPOINTS)]
    scores = attributed(directory, ckpts, ds_train, ds_val)
    draw(scores, ds_train, ds_val, directory / "quickstart.png")
    with timed(f"trained {subsets} models on halves of the train set"):
        masks = np.stack([half(seed, train) for seed in range(subsets)])
        margins = np.stack(
            [
                outputs(fit(Subset(ds_train, np.flatnonzero(mask).tolist()), seed, DEVICE), ds_val)
                for seed, mask in enumerate(masks)
            ]
        )
    predicted = masks.astype(float) @ scores
    found = [spearmanr(predicted[:, t], margins[:, t]).statistic for t in range(TARGETS)]
    print(f"LDS {np.mean(found):.3f}: mean over {TARGETS} targets, from {subsets} retrained models")


def attributed(
    directory: Path, ckpts: list[dict[str, Tensor]], ds_train: TensorDataset, ds_val: TensorDataset
) -> np.ndarray:
    """The calls of TRAK's quickstart."""
    loader_train, loader_val = (DataLoader(ds, batch_size=BATCH) for ds in (ds_train, ds_val))
    traker = TRAKer(
        model=resnet9(2),
        task="image_classification",
        proj_dim=512,
        lambda_reg=10,  # with fewer train images than dimensions XᵀX is singular
        train_set_size=len(ds_train),
        save_dir=directory / "trak_results",
    )
    with timed("featurized"):
        for model_id, ckpt in enumerate(ckpts):
            traker.load_checkpoint(ckpt, model_id=model_id)
            for batch in loader_train:
                on_device = [x.to(DEVICE) for x in batch]
                traker.featurize(batch=on_device, num_samples=batch[0].shape[0])
        traker.finalize_features()
    with timed("scored"):
        for model_id, ckpt in enumerate(ckpts):
            traker.start_scoring_checkpoint(
                exp_name="quickstart", checkpoint=ckpt, model_id=model_id, num_targets=len(ds_val)
            )
            for batch in loader_val:
                on_device = [x.to(DEVICE) for x in batch]
                traker.score(batch=on_device, num_samples=batch[0].shape[0])
        return traker.finalize_scores(exp_name="quickstart")


def datasets(train: int) -> tuple[TensorDataset, TensorDataset]:
    """Pullovers are 0, coats 1."""
    problem = fashion_mnist.problem(ROOT, train=60_000, targets=10_000)
    return two_classes(problem.train, train), two_classes(problem.targets["val"], TARGETS)


def two_classes(images: LabelledImages, count: int) -> TensorDataset:
    rows = np.flatnonzero(np.isin(images.labels.numpy(), (PULLOVER, COAT)))[:count].tolist()
    pixels = torch.stack([images[row][0] for row in rows])
    padded = torch.nn.functional.pad(pixels, (2, 2, 2, 2), value=float(pixels.min()))
    labels = torch.tensor([int(images[row][1] == COAT) for row in rows])
    return TensorDataset(padded.expand(-1, 3, -1, -1).contiguous(), labels)


def half(seed: int, rows: int) -> np.ndarray:
    mask = np.zeros(rows, dtype=bool)
    mask[np.random.default_rng(seed).permutation(rows)[: rows // 2]] = True
    return mask


def outputs(state: dict[str, Tensor], ds: TensorDataset) -> np.ndarray:
    model = resnet9(2).eval()
    model.load_state_dict(state)
    model.to(DEVICE)
    with torch.no_grad():
        batch = tuple(t.to(DEVICE) for t in ds.tensors)
        weights, buffers = dict(model.named_parameters()), dict(model.named_buffers())
        return ImageClassification().get_batch_output(model, weights, buffers, batch).cpu().numpy()


def draw(scores: np.ndarray, ds_train: TensorDataset, ds_val: TensorDataset, path: Path) -> None:
    """A row for each of two pullovers and two coats: the target, then the strongest images."""
    targets = [int(t) for c in (0, 1) for t in (ds_val.tensors[1] == c).nonzero()[:2]]
    names = ("pullover", "coat")
    figure, axes = plt.subplots(len(targets), 11, figsize=(13, 5.6), layout="constrained")
    for row, target in zip(axes, targets, strict=True):
        order = np.argsort(-scores[:, target])
        shown = [
            (ds_val, target, "target: {}"),
            *((ds_train, train, "+ {}") for train in order[:5]),
            *((ds_train, train, "− {}") for train in order[:-6:-1]),
        ]
        for axis, (ds, at, title) in zip(row, shown, strict=True):
            axis.imshow(ds.tensors[0][at][0].numpy(), cmap="gray_r")
            axis.set_title(title.format(names[ds.tensors[1][at]]), fontsize=8)
            axis.axis("off")
    figure.suptitle("Targets; then the five most helpful (+) and most harmful (−) train images")
    figure.savefig(path, dpi=110)
    print(f"picture: {path}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, nargs="?", default=Path("runs/quickstart"))
    parser.add_argument("--train", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--subsets", type=int, default=30)
    given = parser.parse_args()
    given.directory.mkdir(parents=True, exist_ok=True)
    main(given.directory, given.train, given.epochs, given.subsets)
