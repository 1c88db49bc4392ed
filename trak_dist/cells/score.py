"""Score cells: the ensemble's scores."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Self

from trak_dist.cells.cell import Cell
from trak_dist.cells.featurize import FeaturizeCell, largest_cell
from trak_dist.cells.fisher import FisherCell
from trak_dist.cells.gram import kernel_dim
from trak_dist.cells.kernel import KernelCell, kernel_identity
from trak_dist.cells.ownership import ArraySpec, OwnedRows
from trak_dist.cells.precondition import PreconditionCell, largest_block
from trak_dist.cells.series import Series
from trak_dist.coordinates import TRAIN, Rows
from trak_dist.plan import Plan, cached_on_plan, digest
from trak_dist.plan_inputs import CHUNK_BYTES, Split
from trak_dist.spacing import evenly_spaced

ALL_BYTES = 2**36  # of a target set's scores, up to which all are kept if the user does not say
HALVES_TARGETS = 64  # of each target set, for which scores of halves of the ensemble are kept


@dataclass(frozen=True)
class ScoreCell(Cell):
    """Writes one chunk of scores: some train rows against one target set, over the ensemble.

    Of `train` it is their self-influence, the score of each against itself.
    """

    kind = "score"
    step = "score"
    depends_on = (PreconditionCell, KernelCell, FeaturizeCell, FisherCell)
    run = "trak_dist.stages.score:score"
    gpu = False
    runs_problem = False
    memory_is_bound = True
    threads_from = "reduce"
    per_member = True
    if_too_large = "a smaller proj_dim, or fewer targets in a set"
    if_too_long = "a smaller proj_dim, or fewer targets in a set"
    work_unit = "products"

    targets: str
    rows: Rows

    @classmethod
    def of(cls, plan: Plan) -> Iterator[Self]:
        for name in _with_all_scores(plan):
            yield from cls.of_targets(plan, name)

    @classmethod
    def of_targets(cls, plan: Plan, targets: str) -> Iterator[Self]:
        """Those of one target set all of whose scores are kept, in order of rows."""
        return (cls(targets, rows) for rows in _cut(plan, targets).blocks())

    @classmethod
    def count(cls, plan: Plan) -> int:
        return sum(_cut(plan, name).cells for name in _with_all_scores(plan))

    def identity(self, plan: Plan) -> str:
        return _identity(plan, self.targets)

    def receipt_group(self, plan: Plan) -> tuple[str, ...]:
        return ()

    def needs(self, plan: Plan, done: Collection[Cell]) -> Iterator[Cell | Series[Cell]]:
        yield from made_of(plan, self.targets, done)

    @property
    def dependency_group(self) -> Hashable:
        return self.targets

    def arrays(self, plan: Plan) -> Mapping[str, OwnedRows]:
        """`scores` (n_train, t) float32, of `train` (n_train, 1).

        Of an ensemble also `halves` (n_train, 2, ≤ 64 of the targets): of either half of it.
        """
        owned = {"scores": self._owned(plan, "scores", columns(plan, self.targets))}
        if half_targets := halves_targets(plan, self.targets):
            owned["halves"] = self._owned(plan, "halves", 2, len(half_targets))
        return owned

    def _owned(self, plan: Plan, name: str, *columns: int) -> OwnedRows:
        train = _cut(plan, self.targets)
        spec = ArraySpec(
            shape=(train.rows, *columns),
            chunks=(train.cell_rows, *columns),
            dtype="float32",
            attributes={
                "model_ids": list(plan.model_ids),
                "proj_dim": plan.proj_dim,
                "lambda_reg": plan.spec.reduce.lambda_reg,
                "lambda_unit": plan.spec.reduce.lambda_unit,
                "kernel_scale": plan.spec.reduce.kernel_scale,
                **({} if plan.curvature == "none" else {"curvature": plan.curvature}),
            },
            if_changed="replace",
        )
        return OwnedRows(f"{name}/{self.targets}", spec, self.rows.start, self.rows.stop)

    @classmethod
    def one_per_array(cls, plan: Plan) -> Iterator[Self]:
        yield from (next(cls.of_targets(plan, name)) for name in _with_all_scores(plan))

    def work(self, plan: Plan) -> int:
        """Of each checkpoint rows · k · t; of the train rows themselves a triangular system."""
        k, d, models = plan.proj_dim, kernel_dim(plan), len(plan.model_ids)
        if self.targets != TRAIN:
            each = k * plan.split(self.targets).rows
        else:
            each = d**2 // 2 + (d * k if plan.dual else 0)
        return models * len(self.rows) * each

    @classmethod
    def memory(cls, plan: Plan) -> int:
        """The B of a block, or the factor, and a chunk's rows solved."""
        k, t = plan.proj_dim, largest_block(plan)
        d, rows = kernel_dim(plan), _cut(plan, TRAIN).cell_rows
        alone = 8 * d * d + (16 * largest_cell(plan) + 16 * d * rows if plan.dual else 0)
        return max(8 * k * t, alone * plan.self_influence) + 6 * CHUNK_BYTES


def keeps_top(plan: Plan, targets: str) -> bool:
    """Whether of a target set's scores only the strongest of each target are kept.

    Streamed rows are scored by `TRAKer`, which hands out all scores.
    """
    if targets == TRAIN or plan.spec.scores.keep != "auto":
        return targets != TRAIN and plan.spec.scores.keep == "top"
    return not plan.train.streamed and 4 * plan.train.rows * plan.split(targets).rows > ALL_BYTES


def _with_all_scores(plan: Plan) -> Iterator[str]:
    return (name for name in plan.scored_names() if not keeps_top(plan, name))


def made_of(plan: Plan, targets: str, done: Collection[Cell]) -> Iterator[Cell | Series[Cell]]:
    """What scores of a target set are made of; of a checkpoint that is not solved, that only."""
    itself = targets == TRAIN
    for model_id in plan.model_ids:
        solved = KernelCell(model_id) if itself else PreconditionCell(model_id, targets)
        yield solved
        for split in dict.fromkeys((TRAIN, targets)) if solved in done else ():
            yield FeaturizeCell.blocks(plan, model_id, split)
        if itself and plan.dual and solved in done:
            yield from FisherCell.blocks(plan, model_id)


def columns(plan: Plan, targets: str) -> int:
    """Scores of a train row: one for each target, or its self-influence."""
    return 1 if targets == TRAIN else plan.split(targets).rows


def halves_targets(plan: Plan, targets: str) -> list[int]:
    """The targets for which scores of either half of the ensemble are kept."""
    several = targets != TRAIN and all(halves_of(plan))
    return evenly_spaced(plan.split(targets).rows, HALVES_TARGETS) if several else []


@cached_on_plan
def halves_of(plan: Plan) -> tuple[list[int], list[int]]:
    """The ensemble's models of its checkpoints 0, 2, … and 1, 3, …; of an odd number the last out.

    Models that masks make of one checkpoint are in one half: they agree more than two trainings.
    """
    checkpoints = list(dict.fromkeys(map(plan.checkpoint, plan.model_ids)))
    paired = len(checkpoints) // 2 * 2
    even, odd = (
        [m for m in plan.model_ids if plan.checkpoint(m) in checkpoints[start:paired:2]]
        for start in (0, 1)
    )
    return even, odd


def _cut(plan: Plan, targets: str) -> Split:
    """The train split, cut so that a cell's scores and grads stay below `CHUNK_BYTES`."""
    rows = max(1, CHUNK_BYTES // (4 * max(columns(plan, targets), plan.store_dim)))
    return replace(plan.train, cell_rows=min(rows, plan.train.rows))


@cached_on_plan
def scores_identity(plan: Plan) -> str:
    """Digest of what determines scores of this ensemble, whatever the targets."""
    return digest([kernel_identity(plan), plan.model_ids, HALVES_TARGETS])


@cached_on_plan
def _identity(plan: Plan, targets: str) -> str:
    return digest([scores_identity(plan), plan.cut(targets)])
