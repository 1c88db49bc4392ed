"""The scores of one target set against models retrained on subsets: the LDS, and what bounds it.

The masks are multiplied into the grads first, Z = (masks ⊙ Q) X, so that a λ costs no scores:
predictions are Z (UᵀU + λI)⁻¹ Gᵀ, from one decomposition per checkpoint and dimension. The
run's own LDS is taken from its scores as stored or, where only the strongest are, from predictions
at its λ.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64
from numpy.typing import NDArray
from torch import Tensor

from trak_dist.cells import (
    EvaluateCell,
    FeaturizeCell,
    GramCell,
    KernelCell,
    MarginsCell,
    ScoreCell,
)
from trak_dist.cells.score import keeps_top
from trak_dist.cells.train import retrained
from trak_dist.coordinates import TRAIN
from trak_dist.errors import EvaluationError
from trak_dist.evaluation.ground_truth import GroundTruthData, read_ground_truth
from trak_dist.ops import dual, kernel, lds, projection
from trak_dist.ops.dual import DualSpectrum
from trak_dist.ops.lds import Interval
from trak_dist.ops.spectrum import Spectrum
from trak_dist.runtime.curvature import CurvatureRows
from trak_dist.runtime.inputs import read_grads, require
from trak_dist.runtime.session import Session
from trak_dist.spacing import evenly_spaced
from trak_dist.store import contents

LAMBDAS = tuple(float(x) for x in np.logspace(-3, 2, 20))  # of the mean diagonal
SIZES = (1, 2, 3, 5, 10, 20, 50, 100)  # of ensembles
MIN_DIM = 64
SHOWN_TARGETS = 4


@dataclass(frozen=True)
class Curve:
    """The LDS of one ensemble at one dimension, for each of `LAMBDAS`.

    `chosen` is the LDS with λ chosen on other targets than those it is taken on, at
    `chosen_lambdas`: one for each half of the targets.
    """

    checkpoints: int
    proj_dim: int
    by_lambda: list[Interval]
    chosen: Interval
    chosen_lambdas: tuple[float, float]


def datamodeling_scores(session: Session, cell: EvaluateCell) -> dict[str, Any]:
    """What `report/<targets>.json` says of the LDS.

    Raises
    ------
    MissingInputs
        If grads, kernels or margins are missing.
    EvaluationError
        If the ground truth can't be used.
    """
    run, plan = session.run, session.run.plan
    models = [MarginsCell(*model, cell.targets) for model in retrained(plan)]
    kernels = [KernelCell(model_id) for model_id in plan.model_ids]
    require(run, [*models, *kernels], needed_by=cell)
    truth = read_ground_truth(run, cell.targets)
    informative = np.flatnonzero(np.ptp(truth.margins.mean(axis=1), axis=0) > 0)
    truth = GroundTruthData(truth.masks, truth.margins[:, :, informative])
    if not len(informative):
        raise EvaluationError(
            f"the margins of every target of {cell.targets!r} are the same for all subsets",
            where=cell.id,
            next="see that they are outputs of models trained on different subsets",
        )
    margins = truth.margins.mean(axis=1)
    curves, at_own_lambda = _curves(session, cell, truth, informative)
    own = at_own_lambda
    if not keeps_top(plan, cell.targets):
        own = _predictions(session, cell, truth.masks)[:, informative]
    per_target = lds.spearman(own, margins)
    whole = next(c for c in curves if c.checkpoints == len(plan.model_ids))
    reliable = lds.reliability(truth.margins)
    shown = evenly_spaced(len(informative), SHOWN_TARGETS)
    return {
        "subsets": len(truth.masks),
        "seeds": truth.margins.shape[1],
        "share": float(truth.masks.mean()),
        "lds": asdict(lds.interval(per_target)),
        "lds_targets": informative.tolist(),
        "lds_per_target": per_target.round(4).tolist(),
        "left_out": plan.split(cell.targets).rows - len(informative),
        "chosen": {"lds": asdict(whole.chosen), "lambdas": whole.chosen_lambdas},
        "reliability": asdict(reliable) if reliable else None,
        "lambdas": LAMBDAS,
        "own_lambda": _own_lambda(session),
        "curves": [asdict(curve) for curve in curves],
        "shown": [
            {
                "target": int(informative[t]),
                "lds": float(per_target[t]),
                "predicted": own[:, t].tolist(),
                "margins": margins[:, t].tolist(),
            }
            for t in shown
        ],
    }


def _predictions(
    session: Session, cell: EvaluateCell, masks: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Sums of the stored scores over each subset (subsets, targets)."""
    total = np.zeros((len(masks), session.run.plan.split(cell.targets).rows))
    for block in ScoreCell.of_targets(session.run.plan, cell.targets):
        rows = masks[:, block.rows.start : block.rows.stop].astype(np.float64)
        total += rows @ contents.read(session.run, block, "scores").astype(np.float64)
    return total


def _own_lambda(session: Session) -> list[float]:
    """The run's λ of each checkpoint, as a multiple of the mean diagonal of UᵀU."""
    run = session.run
    grams = (contents.read(run, GramCell(m), "gram") for m in run.plan.model_ids)
    diagonals = (float(np.trace(gram)) / run.plan.proj_dim for gram in grams)
    return [x / d for x, d in zip(_absolute_lambdas(session), diagonals, strict=True)]


def _absolute_lambdas(session: Session) -> list[float]:
    cells = [KernelCell(m) for m in session.run.plan.model_ids]
    receipts = session.run.receipts.done(cells)
    return [receipts[c].fact("lambda_absolute", (int, float)) for c in cells]


def _curves(
    session: Session, cell: EvaluateCell, truth: GroundTruthData, informative: NDArray[np.intp]
) -> tuple[list[Curve], NDArray[np.float64]]:
    """Of ensembles of the first 1, 2, … checkpoints, and of the whole one at smaller dimensions.

    Then the predictions (subsets, targets) of the whole one at the run's own λ.
    """
    plan = session.run.plan
    members = len(plan.model_ids)
    sizes = [size * plan.models_each for size in SIZES]
    cases = [(size, plan.proj_dim) for size in (*(s for s in sizes if s < members), members)]
    cases += [(members, dim) for dim in _smaller_dims(plan.spec.projection.kind, plan.proj_dim)]
    own_lambdas = _absolute_lambdas(session)
    shape = (len(LAMBDAS) + 1, *truth.margins[:, 0].shape)
    totals = {case: torch.zeros(shape, dtype=torch.float64) for case in cases}
    out_to_loss = [_out_to_loss(session, m) for m in plan.model_ids]
    for position, model_id in enumerate(plan.model_ids):
        sizes = sorted({size for size, _ in cases if size > position})
        means = {size: torch.stack(out_to_loss[:size]).mean(0) for size in sizes}
        sums = _masked_sums(session, model_id, truth.masks, means)
        targets = torch.cat(
            [read_grads(session, c) for c in FeaturizeCell.of_split(plan, model_id, cell.targets)]
        ).double()[informative]
        gram: Tensor | None = None
        for dim in sorted({dim for size, dim in cases if size > position}, reverse=True):
            spectrum, gram = _spectrum(session, model_id, dim, gram)
            lambdas = [*(x * spectrum.mean_diagonal for x in LAMBDAS), own_lambdas[position]]
            for size in [size for size, d in cases if d == dim and size > position]:
                totals[size, dim] += spectrum.predictions(
                    projection.fold(sums[size], dim),
                    projection.fold(targets, dim),
                    lambdas,
                    plan.spec.reduce.kernel_scale,
                ).cpu()
    margins = truth.margins.mean(axis=1)
    curves = [
        _curve(size, dim, predicted[:-1].numpy(), margins)
        for (size, dim), predicted in totals.items()
    ]
    return curves, totals[members, plan.proj_dim][-1].numpy()


def _curve(
    size: int, dim: int, predicted: NDArray[np.float64], margins: NDArray[np.float64]
) -> Curve:
    by_lambda = np.stack([lds.spearman(p, margins) for p in predicted])
    chosen, picks = lds.cross_fitted(by_lambda)
    return Curve(
        size,
        dim,
        [lds.interval(row) for row in by_lambda],
        lds.interval(chosen),
        (LAMBDAS[picks[0]], LAMBDAS[picks[1]]),
    )


def _smaller_dims(kind: str, dim: int) -> Iterator[int]:
    while kind == "sjlt" and dim % 2 == 0 and dim // 2 >= MIN_DIM:
        dim //= 2
        yield dim


def _spectrum(
    session: Session, model_id: int, dim: int, larger: Tensor | None
) -> tuple[Spectrum | DualSpectrum, Tensor | None]:
    """The spectrum at one dimension, and its UᵀU, of which those of smaller ones are folded."""
    plan, device = session.run.plan, session.device
    if larger is not None:
        gram = _folded(larger, dim)
        return Spectrum.of(gram), gram
    whole, rows = dim == plan.proj_dim, CurvatureRows(session, model_id, dim)
    as_dual = plan.dual and (whole or plan.curvature_rows < dim)
    if whole:
        stored = contents.read(session.run, GramCell(model_id), "gram")
        gram = torch.from_numpy(stored).to(device)
    elif as_dual:
        gram = dual.sum_gram(rows, plan.curvature_rows, device)
    else:
        gram = kernel.sum_gram(rows, dim, device)
    return (DualSpectrum.of(gram, rows, dim), None) if as_dual else (Spectrum.of(gram), gram)


def _folded(gram: Float64[Tensor, "k k"], dim: int) -> Float64[Tensor, "dim dim"]:
    """The Gram of folded grads: folding is linear, so it may come after the sum over rows."""
    return projection.fold(projection.fold(gram, dim).T.contiguous(), dim)


def _out_to_loss(session: Session, model_id: int) -> Float[Tensor, " rows"]:
    cells = FeaturizeCell.of_split(session.run.plan, model_id, TRAIN)
    blocks = [contents.read(session.run, c, "out_to_loss") for c in cells]
    return torch.from_numpy(np.concatenate(blocks))


def _masked_sums(
    session: Session, model_id: int, masks: NDArray[np.bool_], weights: dict[int, Tensor]
) -> dict[int, Float64[Tensor, "subsets k"]]:
    """(masks ⊙ Q) X of one checkpoint, for each of several Q (rows,)."""
    plan = session.run.plan
    shape = (len(masks), plan.proj_dim)
    sums = {key: torch.zeros(shape, dtype=torch.float64, device=session.device) for key in weights}
    for source in FeaturizeCell.of_split(plan, model_id, TRAIN):
        block = slice(source.rows.start, source.rows.stop)
        grads = read_grads(session, source).double()
        chosen = torch.from_numpy(masks[:, block]).to(session.device)
        for key, q in weights.items():
            sums[key] += (chosen * q[block].to(session.device).double()) @ grads
    return sums
