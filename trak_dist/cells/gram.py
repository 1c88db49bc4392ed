"""Gram cells: XᵀX, or the XᵀWX, Fisher matrix or dual that a kernel is made of."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Self

from trak_dist.cells.cell import Cell
from trak_dist.cells.featurize import FeaturizeCell, largest_cell, of_checkpoint
from trak_dist.cells.fisher import FisherCell
from trak_dist.cells.gram_part import GramPartCell, gram_identity, square
from trak_dist.cells.ownership import OwnedRows
from trak_dist.cells.series import Series
from trak_dist.plan import Plan


@dataclass(frozen=True)
class GramCell(Cell):
    """Sums one checkpoint's UᵀU, or UUᵀ, which every λ and kernel scale shares.

    U are the curvature rows: X, √W X, or the grads of drawn labels.
    """

    kind = "gram"
    step = "kernel"
    depends_on = (GramPartCell, FeaturizeCell, FisherCell)
    run = "trak_dist.stages.reduce:gram"
    gpu = False
    runs_problem = False
    memory_is_bound = True
    threads_from = "reduce"
    per_member = False
    if_too_large = "a smaller proj_dim or featurize.cell_rows"
    if_too_long = "reduce.gram_rows=…, which sums it in parts"
    work_unit = "products"

    model_id: int

    @classmethod
    def of(cls, plan: Plan) -> Iterator[Self]:
        yield from map(cls, plan.model_ids)

    @classmethod
    def count(cls, plan: Plan) -> int:
        return len(plan.model_ids)

    def identity(self, plan: Plan) -> str:
        return gram_identity(plan)

    def receipt_group(self, plan: Plan) -> tuple[str, ...]:
        return plan.projection_id, plan.gram_id

    def needs(self, plan: Plan, done: Collection[Cell]) -> Iterator[Cell | Series[Cell]]:
        yield from GramPartCell.of_checkpoint(plan, self.model_id)
        yield from all_grads(plan, self.model_id)

    @property
    def chain(self) -> Hashable:
        return self.model_id

    def arrays(self, plan: Plan) -> Mapping[str, OwnedRows]:
        """`gram` (d, d) float64, of `kernel_dim`."""
        path = f"{of_checkpoint(plan, self.model_id)}/gram/{plan.gram_id}"
        return {"gram": OwnedRows(path, square(kernel_dim(plan)), 0, kernel_dim(plan))}

    @classmethod
    def one_per_array(cls, plan: Plan) -> Iterator[Self]:
        return cls.of(plan)

    def work(self, plan: Plan) -> int:
        """Half of r · k² by symmetry, of the dual r² · k; the sums of parts."""
        r, k = plan.curvature_rows, plan.proj_dim
        if plan.gram_parts:
            return plan.gram_parts * k**2
        return r**2 * k // 2 if plan.dual else r * k**2 // 2

    @classmethod
    def memory(cls, plan: Plan) -> int:
        """The sum; a cell's rows as stored, in float32 and in float64, of the dual two cells'.

        In parts: the sum and a part.
        """
        matrix = 8 * kernel_dim(plan) ** 2
        blocks = (24 if plan.dual else 16) * largest_cell(plan)
        return 2 * matrix if plan.gram_parts else matrix + blocks


def all_grads(plan: Plan, model_id: int) -> Iterator[Series[Cell]]:
    """The grads of all splits, for which the tasks that reduce a checkpoint wait."""
    for split in plan.splits:
        yield FeaturizeCell.blocks(plan, model_id, split.name)
    yield from FisherCell.blocks(plan, model_id)


def kernel_dim(plan: Plan) -> int:
    """Rows of what is factorised: k of UᵀU, or in the dual those of U."""
    return plan.curvature_rows if plan.dual else plan.proj_dim
