"""Labelled images in memory, and how a report shows them. Shared by the shipped problems."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trak_dist.problem import Rendered


class LabelledImages:
    """A map-style dataset of (image (c, h, w) float32, normalised; label) from 8-bit images."""

    def __init__(
        self,
        images: NDArray[np.uint8],
        labels: NDArray[Any],
        *,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        assert images.ndim == 4 and len(images) == len(labels)
        self.images = torch.tensor(images)
        self.labels = torch.tensor(labels, dtype=torch.int64)
        self._mean, self._std = (torch.tensor(v)[:, None, None] for v in (mean, std))

    def __len__(self) -> int:
        """The number of images."""
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """One image and its label."""
        return (self.images[index] / 255 - self._mean) / self._std, self.labels[index]


def image_renderer(classes: Sequence[str]) -> Callable[[Any], Rendered]:
    """A `render` for `LabelledImages`: the picture stretched to its range, the class's name."""

    def render(example: tuple[Tensor, Tensor]) -> Rendered:
        image, label = example
        image = image - image.min()
        image = image / image.max().clamp_min(1e-12)
        picture = image.permute(1, 2, 0).numpy()
        return Rendered(picture[:, :, 0] if picture.shape[2] == 1 else picture, classes[int(label)])

    return render
