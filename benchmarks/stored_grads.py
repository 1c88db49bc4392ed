"""Grads and ground truth of a finished run, and LDS by plain linear algebra in float64.

Of the package only what reads a run and what defines the LDS is used: kernels, scores and sums
over subsets are computed here anew, so that this is a second opinion on them.

Of checkpoint m: X (n, k) grads of train rows, G (t, k) those of targets, both divided by √p, Q (n,)
the out-to-loss. A curvature is H = Xᵀ diag(v) X for one of `WEIGHTS` v(Q), a kernel is
K = (H + λI)⁻¹, and λ is in units of H's mean diagonal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from trak_dist.cells import FeaturizeCell
from trak_dist.coordinates import TRAIN
from trak_dist.evaluation.ground_truth import read_ground_truth
from trak_dist.ops import lds
from trak_dist.runtime.inputs import read_grads
from trak_dist.runtime.session import Session
from trak_dist.store import contents
from trak_dist.store.run import Run

Matrix = NDArray[np.float64]
LAMBDAS = [float(x) for x in np.logspace(-3, 2, 20)]
# Of each train row, from its Q = −∂loss/∂f. With loss = log(1 + exp(−f)), Q = 1 − p and Q(1 − Q) is
# ∂²loss/∂f²: `output` makes H the generalised Gauss–Newton matrix of the loss through f. `fisher`
# is the empirical Fisher matrix, a sum of squares of the gradients of the loss.
WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": torch.ones_like,
    "output": lambda q: q * (1 - q),
    "q": lambda q: q,
    "fisher": torch.square,
}
SCALE_ROWS = 256  # of K, evenly spread, for the mean of its absolute entries


@dataclass(frozen=True)
class Checkpoint:
    """What is stored of one checkpoint; `squared_norm` is ‖θ‖² of its weights."""

    x: Tensor
    q: Tensor
    g: Tensor
    squared_norm: float

    def curvature(self, weights: str) -> Curvature:
        """H for one of `WEIGHTS`, decomposed."""
        v = WEIGHTS[weights](self.q)
        values, vectors = torch.linalg.eigh(self.x.T @ (self.x * v[:, None]))
        return Curvature(values.clamp_min(0), vectors)


@dataclass(frozen=True)
class Curvature:
    """H = V diag(w) Vᵀ."""

    values: Tensor
    vectors: Tensor

    @cached_property
    def mean(self) -> float:
        """H's mean diagonal, the unit of λ."""
        return float(self.values.mean())

    def inverse(self, relative: float) -> Tensor:
        """The eigenvalues of K."""
        return 1 / (self.values + relative * self.mean)

    def scale(self, relative: float) -> float:
        """1 / mean |K|, TRAK's scale of a kernel, from `SCALE_ROWS` of its rows."""
        some = self.vectors[:: max(1, len(self.vectors) // SCALE_ROWS)]
        return 1 / float(((some * self.inverse(relative)) @ self.vectors.T).abs().mean())


class StoredRun:
    """Masks (subsets, n) and mean margins (subsets, t) of a run, and its checkpoints one by one.

    Targets whose margins are the same for all subsets are left out. Without a ground truth there
    are neither.
    """

    def __init__(self, run_dir: Path, proj_dim: int = 0) -> None:
        run = Run.open(run_dir)
        self._session = Session(run, torch.device("cpu"))
        self.plan = run.plan
        self.proj_dim = proj_dim or self.plan.proj_dim
        self.members = len(self.plan.model_ids)
        self._targets = self.plan.targets[0].name
        self.margins: Matrix | None = None
        self._informative = np.arange(self.plan.targets[0].rows)
        if self.plan.ground_truth.subsets or self.plan.ground_truth.masks:
            truth = read_ground_truth(run, self._targets)
            margins = truth.margins.mean(axis=1)
            self._informative = np.flatnonzero(np.ptp(margins, axis=0) > 0)
            self.margins = margins[:, self._informative]
            self.masks = torch.from_numpy(truth.masks).double()

    def checkpoints(self) -> Iterator[Checkpoint]:
        """All of the ensemble."""
        for model_id in self.plan.model_ids:
            yield self.checkpoint(model_id)

    def checkpoint(self, model_id: int) -> Checkpoint:
        """One of them, folded to `proj_dim`."""
        x, g = (self._grads(model_id, split) for split in (TRAIN, self._targets))
        path = next(c.path for c in self.plan.checkpoints if c.model_id == model_id)
        assert path is not None, "weights are in the user's process alone"
        weights = load_file(self._session.run.layout.run_dir / path).values()
        norm = sum(float(w.double().square().sum()) for w in weights if w.is_floating_point())
        return Checkpoint(x, self._out_to_loss(model_id), g[self._informative], norm)

    @property
    def mislabelled(self) -> NDArray[np.bool_] | None:
        """Which rows (n,) have a wrong label, if the problem knows."""
        wrong = self._session.problem.mislabelled
        return None if wrong is None else np.asarray(wrong, dtype=bool)

    @cached_property
    def mean_q(self) -> Tensor:
        """The ensemble's mean Q (n,)."""
        return torch.stack([self._out_to_loss(m) for m in self.plan.model_ids]).mean(0)

    def lds(self, predictions: Tensor) -> Matrix:
        """Of each target, for predictions (subsets, t)."""
        assert self.margins is not None, "the run has no ground truth"
        return lds.spearman(predictions.numpy(), self.margins)

    def _grads(self, model_id: int, split: str) -> Tensor:
        cells = FeaturizeCell.of_split(self.plan, model_id, split)
        grads = torch.cat([read_grads(self._session, cell) for cell in cells]).double()
        return grads.view(len(grads), -1, self.proj_dim).sum(1)

    def _out_to_loss(self, model_id: int) -> Tensor:
        cells = FeaturizeCell.of_split(self.plan, model_id, TRAIN)
        blocks = [contents.read(self._session.run, cell, "out_to_loss") for cell in cells]
        return torch.from_numpy(np.concatenate(blocks)).double()


@dataclass(frozen=True)
class Predictions:
    """Sums of a checkpoint's scores over subsets, Z K Gᵀ, for any λ.

    Z (subsets, k) = (masks ⊙ Q) X with some Q; `z` and `g` are in H's eigenvectors.
    """

    curvature: Curvature
    z: Tensor
    g: Tensor

    @classmethod
    def of(cls, curvature: Curvature, z: Tensor, g: Tensor) -> Predictions:
        return cls(curvature, z @ curvature.vectors, g @ curvature.vectors)

    def at(self, relative: float, *, scaled: bool = True) -> Tensor:
        """(subsets, t), with TRAK's scale or without one."""
        factor = self.curvature.scale(relative) if scaled else 1.0
        return factor * (self.z * self.curvature.inverse(relative)) @ self.g.T


def best(by_lambda: Matrix) -> int:
    """Where the mean over targets of (λ, targets) is largest."""
    return int(by_lambda.mean(axis=1).argmax())


def table(heads: Sequence[str], rows: Iterator[Sequence[object]], widths: Sequence[int]) -> None:
    """Print columns, the first to the left."""
    for row in (heads, *rows):
        cells = [f"{c:.3f}" if isinstance(c, float) else str(c) for c in row]
        first, *rest = (f"{c:>{w}}" for c, w in zip(cells, widths, strict=True))
        print(cells[0].ljust(len(first)) + "".join(rest))
    print()
