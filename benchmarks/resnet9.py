"""ResNet-9 on two classes of Fashion-MNIST that look alike, at a size that two cores can retrain.

    python -m trak_dist.launch problem._target_=benchmarks.resnet9.problem proj_dim=8192 \
      checkpoints.train=10 ground_truth.subsets=40 ground_truth.seeds=1 run_dir=runs/resnet9
    python -m trak_dist.launch -m proj_dim=2048,8192 reduce.curvature=none,output \
      run_dir=runs/resnet9

The network of TRAK's quickstart (2.3 million parameters); pullovers against coats, 2,000 to train,
averaged to 14 × 14 and framed to 16 × 16.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F  # noqa: N812

import trak_dist
from trak_dist.problems import fashion_mnist
from trak_dist.problems.images import LabelledImages, image_renderer
from trak_dist.problems.networks import resnet9
from trak_dist.problems.training import classifier_trainer

CLASSES = {2: "pullover", 4: "coat"}


def problem(
    root: str = "/usr/share/datasets/fashion-mnist", train: int = 2000, targets: int = 100
) -> trak_dist.Problem:
    """The first `train` and `targets` images of the two classes; `root` has the IDX files."""
    whole = fashion_mnist.problem(root, train=60_000, targets=10_000)

    def split(images: LabelledImages, count: int) -> LabelledImages:
        chosen = torch.isin(images.labels, torch.tensor(list(CLASSES))).nonzero()[:count, 0]
        small = F.pad(F.avg_pool2d(images.images[chosen].float(), 2), (1, 1, 1, 1))
        is_coat = images.labels[chosen] == max(CLASSES)
        return LabelledImages(
            small.round().byte().expand(-1, 3, -1, -1).numpy(),
            is_coat.numpy(),
            mean=[0.2860] * 3,
            std=[0.3530] * 3,
        )

    return trak_dist.Problem(
        model=resnet9(2),
        model_output=trak_dist.ImageClassification(),
        train=split(whole.train, train),
        targets={"val": split(whole.targets["val"], targets)},
        checkpoints=(),
        render=image_renderer(list(CLASSES.values())),
        train_checkpoint=classifier_trainer(
            lambda: resnet9(2), epochs=8, batch_size=64, learning_rate=0.1, weight_decay=5e-4
        ),
    )
