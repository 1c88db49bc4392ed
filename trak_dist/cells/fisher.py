"""Fisher cells: projected gradients of the log-likelihood of labels drawn from the model."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Self

from trak_dist.cells.cell import Cell
from trak_dist.cells.featurize import FeaturizeCell, of_checkpoint, rows_of_array, trained_by
from trak_dist.cells.ownership import OwnedRows
from trak_dist.cells.series import Blocks, Series
from trak_dist.cells.train import TrainCell
from trak_dist.coordinates import Rows
from trak_dist.plan import Plan, cached_on_plan, digest
from trak_dist.plan_inputs import Split


@dataclass(frozen=True)
class FisherCell(Cell):
    """Writes one chunk of Fisher rows: one drawn label for each of some train rows.

    `rows` are positions among the train rows that labels are drawn for (`fisher_sample`).
    """

    kind = "fisher"
    step = "featurize"
    depends_on = (TrainCell,)
    run = "trak_dist.stages.fisher:fisher"
    gpu = True
    runs_problem = True
    memory_is_bound = True
    threads_from = "featurize"
    per_member = False
    if_too_large = FeaturizeCell.if_too_large
    if_too_long = FeaturizeCell.if_too_long
    work_unit = "rows"

    model_id: int
    draw: int
    rows: Rows

    @classmethod
    def of(cls, plan: Plan) -> Iterator[Self]:
        for series in cls.series(plan):
            yield from series

    @classmethod
    def of_checkpoint(cls, plan: Plan, model_id: int) -> Iterator[Self]:
        """Those of one checkpoint, by draw and rows."""
        for series in cls.blocks(plan, model_id):
            yield from series

    @classmethod
    def blocks(cls, plan: Plan, model_id: int) -> Iterator[Blocks[Self]]:
        """The same, as a series for each draw."""
        sample = fisher_sample(plan)
        yield from (Blocks.of(cls, model_id, draw, split=sample) for draw in range(_draws(plan)))

    @classmethod
    def series(cls, plan: Plan) -> Iterator[Blocks[Self]]:
        for model_id in plan.model_ids:
            yield from cls.blocks(plan, model_id)

    @classmethod
    def count(cls, plan: Plan) -> int:
        return len(plan.model_ids) * _draws(plan) * fisher_sample(plan).cells

    def identity(self, plan: Plan) -> str:
        return _identity(plan)

    def receipt_group(self, plan: Plan) -> tuple[str, ...]:
        return plan.projection_id, str(self.model_id), str(plan.fisher_rows)

    def needs(self, plan: Plan, done: Collection[Cell]) -> Iterator[Cell | Series[Cell]]:
        yield from trained_by(plan, self.model_id)

    @property
    def dependency_group(self) -> Hashable:
        return self.model_id

    @property
    def shard(self) -> tuple[Hashable, Rows]:
        return (self.model_id, self.kind, self.draw), self.rows

    def arrays(self, plan: Plan) -> Mapping[str, OwnedRows]:
        """`grads` (rows, k) and `row_scale` (rows,), chunked alike; an array for each draw."""
        sample = fisher_sample(plan)
        group = f"{of_checkpoint(plan, self.model_id)}/fisher/{sample.rows}/{self.draw}"

        def owned(name: str, dtype: str, *columns: int) -> OwnedRows:
            return rows_of_array(plan, f"{group}/{name}", sample, self.rows, dtype, *columns)

        return {
            "grads": owned("grads", plan.spec.featurize.dtype, plan.store_dim),
            "row_scale": owned("row_scale", "float32"),
        }

    @classmethod
    def one_per_array(cls, plan: Plan) -> Iterator[Self]:
        first = Rows(0, fisher_sample(plan).cell_rows)
        for model_id in plan.model_ids:
            yield from (cls(model_id, draw, first) for draw in range(_draws(plan)))

    def work(self, plan: Plan) -> int:
        return len(self.rows)

    @classmethod
    def memory(cls, plan: Plan) -> int:
        """As much as a featurize cell."""
        return FeaturizeCell.memory(plan)


def fisher_sample(plan: Plan) -> Split:
    """The train rows that labels are drawn for, cut into cells."""
    rows = plan.fisher_rows
    return replace(plan.train, rows=rows, cell_rows=min(rows, plan.train.cell_rows))


def _draws(plan: Plan) -> int:
    return plan.spec.reduce.fisher_draws if plan.curvature == "fisher" else 0


@cached_on_plan
def _identity(plan: Plan) -> str:
    return digest([plan.fingerprint, plan.cut(plan.train.name), plan.fisher_rows])
