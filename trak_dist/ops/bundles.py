"""Bundles of inputs: the part of a sketch that is taken before a layer's gradients are formed.

The gradient of a wide layer is a sum over positions of outer products, of the output's gradient and
the input. A bundle is four input channels, added up with random signs: with bundles in place of
channels, the products are a quarter of the work, and what is left to sketch a quarter of the
numbers. Rows of the weight come in `GROUPS` groups, each with bundles of its own, drawn from a
random order of the channels; so two channels that are bundled for some rows are apart for others.

That is still a sketch with one non-zero per column (`ops.projection.Sjlt`), but for what is
independent of what. Of gradients A and B of a layer with c channels, the bundled ones have
E⟨A', B'⟩ = ⟨A, B⟩; Var = (BUNDLED − 1)/(c − 1) · Σⱼ ½‖Mⱼ + Mⱼᵀ‖² without the diagonals, where
Mⱼ = AⱼᵀBⱼ (c, c) is of the rows of group j. It is small unless few channels have all the gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from trak_dist.ops import draws

GROUPS = 8  # of rows; each costs a pass over the inputs
BUNDLED = 4  # channels in a bundle
NARROW = 64  # a layer with fewer rows or channels has no bundles: it costs little


@dataclass(frozen=True)
class Bundles:
    """What is bundled of one parameter, of shape (rows, channels, …).

    `channels` (groups · width, `BUNDLED`) are those of each bundle, group by group, and `signs` are
    theirs.
    """

    shape: torch.Size
    channels: Int64[Tensor, "bundles bundled"]
    signs: Float[Tensor, "bundles bundled"]

    @classmethod
    def draw(cls, key: int, shape: torch.Size, device: torch.device) -> Bundles:
        """The bundles of a parameter of a shape that `has_bundles`."""
        counters = torch.arange(GROUPS * shape[1], device=device).view(GROUPS, -1)
        order = draws.draw(key, counters).argsort(dim=1, stable=True)
        signs = draws.bucket_and_sign(draws.stream_key(key, "signs"), counters, 1)[1]
        return cls(shape, order.view(-1, BUNDLED), signs.view(-1, BUNDLED))

    @property
    def width(self) -> int:
        """Bundles of a group."""
        return self.shape[1] // BUNDLED

    @property
    def bundled_shape(self) -> torch.Size:
        """That of the parameter with bundles in place of channels."""
        return torch.Size((self.shape[0], self.width, *self.shape[2:]))

    def sums(
        self, inputs: Float[Tensor, "batch channels positions"]
    ) -> Float[Tensor, "batch bundles positions"]:
        """The signed sums of inputs, of each bundle of each group."""
        batch, channels, positions = inputs.shape
        first = channels * torch.arange(batch, device=inputs.device)
        found = F.embedding_bag(
            (self.channels + first[:, None, None]).view(-1, BUNDLED),
            inputs.reshape(batch * channels, positions),
            mode="sum",
            per_sample_weights=self.signs.to(inputs).repeat(batch, 1),
        )
        return found.view(batch, -1, positions)

    def places(
        self, counters: Int64[Tensor, " m"]
    ) -> tuple[Int64[Tensor, " m"], Float[Tensor, " m"]]:
        """Where in the bundled parameter each number of the flat parameter goes, with what sign."""
        rows, channels = self.shape[:2]
        size = math.prod(self.shape[2:])
        row, channel, within = (
            counters // (channels * size),
            counters // size % channels,
            counters % size,
        )
        group = row // (rows // GROUPS)
        order = self.channels.view(GROUPS, channels)
        position = order.argsort(1)[group, channel]
        signs = self.signs.view(GROUPS, channels)[group, position]
        return (row * self.width + position // BUNDLED) * size + within, signs


def has_bundles(shape: torch.Size) -> bool:
    """Whether a parameter of this shape has bundles: rows and channels are many, and divide."""
    return (
        len(shape) > 1
        and min(shape[0], shape[1]) >= NARROW
        and shape[0] % GROUPS == 0
        and shape[1] % BUNDLED == 0
    )
