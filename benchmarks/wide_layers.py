"""A problem with wide layers, small enough to be trained hundreds of times: what do bundles cost?

    python -m trak_dist.launch -m problem._target_=benchmarks.wide_layers.problem \
      projection=sjlt,rademacher proj_dim=2048 checkpoints.train=4 featurize.batch_rows=256 \
      ground_truth.subsets=60 ground_truth.seeds=2 run_dir=runs/wide

ResNet-9 as in TRAK's quickstart, on the first images of Fashion-MNIST, halved to 16 × 16. Hours
on two cores, most of them for the 120 models of the ground truth and for the dense projection.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F  # noqa: N812

import trak_dist
from trak_dist.problem import MapDataset
from trak_dist.problems import fashion_mnist
from trak_dist.problems.networks import resnet9
from trak_dist.problems.training import classifier_trainer

CLASSES = 10


class Halved:
    """Images (3, 16, 16) of a dataset of (1, 28, 28): each 2 × 2 averaged, edges repeated."""

    def __init__(self, images: MapDataset) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        image, label = self._images[index]
        small = F.pad(F.avg_pool2d(image[None], 2), (1, 1, 1, 1), mode="replicate")[0]
        return small.repeat(3, 1, 1), label


def problem(
    root: str = "/usr/share/datasets/fashion-mnist", train: int = 1000, targets: int = 200
) -> trak_dist.Problem:
    """The first `train` and `targets` images of Fashion-MNIST's two splits."""
    whole = fashion_mnist.problem(root, train, targets)
    return trak_dist.Problem(
        model=resnet9(CLASSES),
        model_output=trak_dist.ImageClassification(),
        train=Halved(whole.train),
        targets={name: Halved(images) for name, images in whole.targets.items()},
        checkpoints=(),
        render=whole.render,
        train_checkpoint=classifier_trainer(
            lambda: resnet9(CLASSES),
            epochs=8,
            batch_size=50,
            learning_rate=0.05,
            weight_decay=5e-3,
        ),
    )
