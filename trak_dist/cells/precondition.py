"""Precondition cells: B = (UᵀU + λI)⁻¹Gᵀ."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Self

from trak_dist.cells.cell import Cell
from trak_dist.cells.featurize import FeaturizeCell, largest_cell
from trak_dist.cells.fisher import FisherCell
from trak_dist.cells.gram import all_grads, kernel_dim
from trak_dist.cells.kernel import KernelCell, kernel_identity, of_kernel
from trak_dist.cells.ownership import ArraySpec, OwnedRows
from trak_dist.cells.series import Series
from trak_dist.plan import Plan, cached_on_plan, digest
from trak_dist.plan_inputs import CHUNK_BYTES


@dataclass(frozen=True)
class PreconditionCell(Cell):
    """Solves one checkpoint's kernel for the grads of one target set."""

    kind = "precondition"
    step = "kernel"
    depends_on = (KernelCell, FeaturizeCell, FisherCell)
    run = "trak_dist.stages.reduce:precondition"
    gpu = False
    runs_problem = False
    memory_is_bound = True
    threads_from = "reduce"
    per_member = False
    if_too_large = "a smaller proj_dim, or fewer targets in a set"

    model_id: int
    targets: str

    @classmethod
    def of(cls, plan: Plan) -> Iterator[Self]:
        yield from (cls(m, split.name) for m in plan.model_ids for split in plan.targets)

    @classmethod
    def count(cls, plan: Plan) -> int:
        return len(plan.model_ids) * len(plan.targets)

    def identity(self, plan: Plan) -> str:
        return _identity(plan, self.targets)

    def receipt_group(self, plan: Plan) -> tuple[str, ...]:
        return plan.projection_id, plan.kernel_id

    def needs(self, plan: Plan, done: Collection[Cell]) -> Iterator[Cell | Series[Cell]]:
        yield KernelCell(self.model_id)
        yield from all_grads(plan, self.model_id)

    @property
    def chain(self) -> Hashable:
        return self.model_id

    def arrays(self, plan: Plan) -> Mapping[str, OwnedRows]:
        """`precond`, B (k, t), one type above that of the stored grads."""
        k, t = plan.proj_dim, plan.split(self.targets).rows
        chunk = max(1, min(k, CHUNK_BYTES // (8 * t)))
        spec = ArraySpec(shape=(k, t), chunks=(chunk, t), dtype=plan.precondition_dtype)
        path = f"{of_kernel(plan, self.model_id)}/precond/{self.targets}"
        return {"precond": OwnedRows(path, spec, 0, k)}

    @classmethod
    def one_per_array(cls, plan: Plan) -> Iterator[Self]:
        return cls.of(plan)

    @classmethod
    def memory(cls, plan: Plan) -> int:
        """The factor; the targets' grads and their solutions; of the dual a cell's rows of U."""
        k, t = plan.proj_dim, max((split.rows for split in plan.targets), default=0)
        d = kernel_dim(plan)
        rows = 16 * largest_cell(plan) + 16 * d * t if plan.dual else 0
        return 8 * d * d + 24 * k * t + rows


@cached_on_plan
def _identity(plan: Plan, targets: str) -> str:
    return digest([kernel_identity(plan), plan.cut(targets)])
