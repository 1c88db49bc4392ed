"""The eigenvalues of UᵀU, from which the kernels of any number of λ follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from trak_dist.configuration.config import SCALE_ROWS


@dataclass(frozen=True)
class Spectrum:
    """UᵀU = V diag(w) Vᵀ, from which the kernel of any λ follows in O(k²)."""

    values: Float64[Tensor, " k"]
    vectors: Float64[Tensor, "k k"]

    @classmethod
    def of(cls, gram: Float64[Tensor, "k k"]) -> Spectrum:
        """Decompose UᵀU."""
        values, vectors = torch.linalg.eigh(gram)
        return cls(values.clamp_min_(0), vectors)

    @property
    def mean_diagonal(self) -> float:
        """The mean of the diagonal of UᵀU, the unit of a relative λ."""
        return float(self.values.mean())

    def predictions(
        self,
        sums: Float64[Tensor, "subsets k"],
        target_grads: Float64[Tensor, "targets k"],
        lambdas: Sequence[float],
        kernel_scale: str,
    ) -> Float64[Tensor, "lambdas subsets targets"]:
        """Z (UᵀU + λI)⁻¹ Gᵀ, scaled, for each absolute λ.

        With `mean_abs` the mean of the kernel's absolute entries is taken over `SCALE_ROWS` of its
        rows: it weighs checkpoints against each other, and nothing else.
        """
        z, g = sums @ self.vectors, target_grads @ self.vectors
        some = self.vectors[:: max(1, len(self.vectors) // SCALE_ROWS)]
        found = []
        for lambda_absolute in lambdas:
            inverse = 1 / (self.values + lambda_absolute)
            scale = 1.0
            if kernel_scale == "mean_abs":
                scale = 1 / float(((some * inverse) @ self.vectors.T).abs().mean())
            found.append((z * inverse) @ g.T * scale)
        return torch.stack(found)
