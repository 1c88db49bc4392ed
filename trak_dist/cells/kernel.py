"""Kernel cells: the Cholesky factor of UᵀU + λI, or of its dual UUᵀ + λI."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Self

from trak_dist.cells.cell import Cell
from trak_dist.cells.featurize import FeaturizeCell, largest_cell, of_checkpoint
from trak_dist.cells.fisher import FisherCell
from trak_dist.cells.gram import GramCell, all_grads, kernel_dim
from trak_dist.cells.gram_part import gram_identity, square
from trak_dist.cells.ownership import OwnedRows
from trak_dist.cells.series import Series
from trak_dist.configuration.config import EXACT_SCALE_DIM, SCALE_ROWS
from trak_dist.plan import Plan, cached_on_plan, digest


@dataclass(frozen=True)
class KernelCell(Cell):
    """Factorises one checkpoint's UᵀU + λI, or UUᵀ + λI."""

    kind = "kernel"
    step = "kernel"
    depends_on = (GramCell, FeaturizeCell, FisherCell)
    run = "trak_dist.stages.reduce:factorise"
    gpu = False
    runs_problem = False
    memory_is_bound = True
    threads_from = "reduce"
    per_member = False
    if_too_large = "a smaller proj_dim (memory goes with its square)"
    if_too_long = (
        "a smaller proj_dim (time goes with its cube), or more reduce.threads in a new run"
    )
    work_unit = "products"

    model_id: int

    @classmethod
    def of(cls, plan: Plan) -> Iterator[Self]:
        yield from map(cls, plan.model_ids)

    @classmethod
    def count(cls, plan: Plan) -> int:
        return len(plan.model_ids)

    def identity(self, plan: Plan) -> str:
        return kernel_identity(plan)

    def receipt_group(self, plan: Plan) -> tuple[str, ...]:
        return plan.projection_id, plan.kernel_id

    def needs(self, plan: Plan, done: Collection[Cell]) -> Iterator[Cell | Series[Cell]]:
        yield GramCell(self.model_id)
        yield from all_grads(plan, self.model_id)

    @property
    def chain(self) -> Hashable:
        return self.model_id

    def arrays(self, plan: Plan) -> Mapping[str, OwnedRows]:
        """`kernel` (d, d) float64, a lower triangle, of `kernel_dim`."""
        path = f"{of_kernel(plan, self.model_id)}/kernel"
        return {"kernel": OwnedRows(path, square(kernel_dim(plan)), 0, kernel_dim(plan))}

    @classmethod
    def one_per_array(cls, plan: Plan) -> Iterator[Self]:
        return cls.of(plan)

    def work(self, plan: Plan) -> int:
        """The factor and the inverse: d³ / 6 and d³ / 3."""
        return kernel_dim(plan) ** 3 // 2

    @classmethod
    def memory(cls, plan: Plan) -> int:
        """The Gram, its factor, its inverse, a temporary; of the dual some rows of the kernel."""
        k, d = plan.proj_dim, kernel_dim(plan)
        some = k if k <= EXACT_SCALE_DIM else SCALE_ROWS
        rows = 8 * some * (k + 3 * d) + 16 * largest_cell(plan) if plan.dual else 0
        return 4 * 8 * d**2 + rows


def of_kernel(plan: Plan, model_id: int) -> str:
    """The group of what is made with one choice of `reduce`, relative to the store."""
    return f"{of_checkpoint(plan, model_id)}/reduce/{plan.kernel_id}"


@cached_on_plan
def kernel_identity(plan: Plan) -> str:
    """Digest of what determines every kernel of the run."""
    return digest([gram_identity(plan), plan.kernel_id])
