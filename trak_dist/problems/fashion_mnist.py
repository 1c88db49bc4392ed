"""fashion_mnist: Fashion-MNIST from the IDX files of Debian's package dataset-fashion-mnist."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trak_dist.errors import DatasetError
from trak_dist.ops.model_outputs import ImageClassification
from trak_dist.problem import Problem
from trak_dist.problems.images import LabelledImages, image_renderer
from trak_dist.problems.networks import cnn
from trak_dist.problems.training import classifier_trainer

CLASSES = (
    "T-shirt", "trouser", "pullover", "dress", "coat",
    "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
MAX_IDX_BYTES = 2**28


def problem(root: str, train: int, targets: int) -> Problem:
    """Fashion-MNIST with a small CNN.

    Parameters
    ----------
    root : str
        Directory of the four IDX files, gzipped or not.
    train, targets : int
        How many of the 60,000 train and of the 10,000 test images to use.

    Raises
    ------
    DatasetError
        If the files are not there, or are not IDX files.
    """
    directory = Path(root)

    def split(name: str, count: int) -> LabelledImages:
        images = _read_idx(directory / f"{name}-images-idx3-ubyte", dimensions=3)[:count, None]
        labels = _read_idx(directory / f"{name}-labels-idx1-ubyte", dimensions=1)[:count]
        return LabelledImages(images, labels, mean=[0.2860], std=[0.3530])

    return Problem(
        model=cnn(1, 10),
        model_output=ImageClassification(),
        train=split("train", train),
        targets={"val": split("t10k", targets)},
        checkpoints=(),
        render=image_renderer(CLASSES),
        train_checkpoint=classifier_trainer(
            lambda: cnn(1, 10), epochs=10, batch_size=128, learning_rate=0.05, weight_decay=5e-3
        ),
    )


def _read_idx(path: Path, *, dimensions: int) -> NDArray[np.uint8]:
    """An IDX file of unsigned bytes: magic 0 0 8 d, then d big-endian sizes, then the data."""
    packed = path.with_name(f"{path.name}.gz")
    try:
        if packed.exists():
            with gzip.open(packed) as file:
                content = file.read(MAX_IDX_BYTES)
        else:
            content = path.read_bytes()
    except FileNotFoundError:
        raise DatasetError(
            "the files of Fashion-MNIST are not there",
            where=str(path),
            next="apt install dataset-fashion-mnist, or problem.root=… of the four IDX files",
        ) from None
    sizes = np.frombuffer(content, ">u4", count=dimensions, offset=4) if len(content) > 16 else ()
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) != 4 * (
        1 + dimensions
    ) + np.prod(sizes):
        raise DatasetError(
            f"not a whole IDX file of unsigned bytes in {dimensions} dimensions",
            where=str(path),
            next="install dataset-fashion-mnist again, or fetch the file anew",
        )
    data = np.frombuffer(content, np.uint8, offset=4 * (1 + dimensions))
    return data.reshape([int(size) for size in sizes])
