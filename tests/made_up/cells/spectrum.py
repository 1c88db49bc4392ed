"""Spectrum cells: the eigenvalues of XᵀX."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Self

from trak_dist.cells.cell import Cell
from trak_dist.cells.featurize import of_checkpoint
from trak_dist.cells.gram import GramCell
from trak_dist.cells.gram_part import gram_identity
from trak_dist.cells.ownership import ArraySpec, OwnedRows
from trak_dist.cells.series import Series
from trak_dist.plan import Plan, digest


@dataclass(frozen=True)
class SpectrumCell(Cell):
    """Writes the eigenvalues of one checkpoint's XᵀX."""

    kind = "spectrum"
    step = "kernel"
    depends_on = (GramCell,)
    run = "trak_dist.stages.spectrum:spectrum"
    gpu = False
    runs_problem = False
    memory_is_bound = True
    threads_from = "reduce"
    per_member = False
    if_too_large = "a smaller proj_dim (memory goes with its square)"
    if_too_long = "a smaller proj_dim"
    work_unit = "products"

    model_id: int

    @classmethod
    def of(cls, plan: Plan) -> Iterator[Self]:
        yield from map(cls, plan.model_ids)

    @classmethod
    def count(cls, plan: Plan) -> int:
        return len(plan.model_ids)

    def identity(self, plan: Plan) -> str:
        return digest(["spectrum", gram_identity(plan)])

    def receipt_group(self, plan: Plan) -> tuple[str, ...]:
        return plan.projection_id, str(plan.proj_dim)

    def needs(self, plan: Plan, done: Collection[Cell]) -> Iterator[Cell | Series[Cell]]:
        yield GramCell(self.model_id)

    @property
    def chain(self) -> Hashable:
        return self.model_id

    def arrays(self, plan: Plan) -> Mapping[str, OwnedRows]:
        """`spectrum` (k,) float64, ascending."""
        k = plan.proj_dim
        path = f"{of_checkpoint(plan, self.model_id)}/spectrum/{k}"
        return {
            "spectrum": OwnedRows(path, ArraySpec(shape=(k,), chunks=(k,), dtype="float64"), 0, k)
        }

    @classmethod
    def one_per_array(cls, plan: Plan) -> Iterator[Self]:
        return cls.of(plan)

    def work(self, plan: Plan) -> int:
        return 5 * plan.proj_dim**3

    @classmethod
    def memory(cls, plan: Plan) -> int:
        """XᵀX and a temporary."""
        return 2 * 8 * plan.proj_dim**2
