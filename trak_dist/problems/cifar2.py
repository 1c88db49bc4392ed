"""cifar2: cats against dogs of the user's own CIFAR-10 files, ResNet-9 as in TRAK's quickstart."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from trak_dist.errors import DatasetError
from trak_dist.ops.model_outputs import ImageClassification
from trak_dist.problem import Problem
from trak_dist.problems.cifar_files import read_batch
from trak_dist.problems.images import LabelledImages, image_renderer
from trak_dist.problems.networks import resnet9
from trak_dist.problems.training import classifier_trainer

CLASSES = {3: "cat", 5: "dog"}
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def problem(root: str, targets: int) -> Problem:
    """CIFAR-2: the cats and dogs of CIFAR-10, 10,000 to train and 2,000 targets.

    Parameters
    ----------
    root : str
        The directory `cifar-10-batches-py` of CIFAR-10's python version.
    targets : int
        How many of the test images to use.

    Raises
    ------
    DatasetError
        If the files are not there, or hold anything but images and labels.
    """
    directory = Path(root).expanduser()

    def split(names: list[str], count: int) -> LabelledImages:
        batches = [read_batch(directory / name) for name in names]
        images = np.concatenate([images for images, _ in batches])
        labels = np.concatenate([labels for _, labels in batches])
        chosen = np.isin(labels, list(CLASSES)).nonzero()[0][:count]
        if not len(chosen):
            raise DatasetError(
                "no cat and no dog among the images", where=str(directory), next="see problem.root"
            )
        is_dog = labels[chosen] == max(CLASSES)
        return LabelledImages(images[chosen], is_dog, mean=MEAN, std=STD)

    return Problem(
        model=resnet9(2),
        model_output=ImageClassification(),
        train=split([f"data_batch_{i}" for i in range(1, 6)], 10_000),
        targets={"val": split(["test_batch"], targets)},
        checkpoints=(),
        render=image_renderer(list(CLASSES.values())),
        train_checkpoint=classifier_trainer(
            lambda: resnet9(2), epochs=24, batch_size=512, learning_rate=0.4, weight_decay=5e-4
        ),
    )
