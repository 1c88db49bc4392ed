"""Precondition cells: B = (UᵀU + λI)⁻¹Gᵀ."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Self

from trak_dist.cells.cell import Cell
from trak_dist.cells.featurize import FeaturizeCell, largest_cell
from trak_dist.cells.fisher import FisherCell
from trak_dist.cells.gram import all_grads, kernel_dim
from trak_dist.cells.kernel import KernelCell, kernel_identity, of_kernel
from trak_dist.cells.ownership import ArraySpec, OwnedRows
from trak_dist.cells.series import Series
from trak_dist.coordinates import Rows
from trak_dist.plan import Plan, cached_on_plan, digest
from trak_dist.plan_inputs import CHUNK_BYTES

BLOCK_ENTRIES = 2**25  # of B, 256 MiB in float64
BLOCK_TARGETS = 4096


@dataclass(frozen=True)
class PreconditionCell(Cell):
    """Solves one checkpoint's kernel for the grads of one target set, a block of them at a time."""

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
    if_too_long = "fewer targets in a set, or a smaller proj_dim"
    work_unit = "products"

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
        """`precond`, B (k, t), one type above that of the stored grads; or one for each block."""
        blocks, group = target_blocks(plan, self.targets), of_kernel(plan, self.model_id)
        if len(blocks) == 1:
            paths = [f"{group}/precond/{self.targets}"]
        else:
            paths = [f"{group}/precond_blocks/{self.targets}/{block}" for block in blocks]
        return {
            array_of(plan, self.targets, block): _owned(plan, path, len(block))
            for block, path in zip(blocks, paths, strict=True)
        }

    @classmethod
    def one_per_array(cls, plan: Plan) -> Iterator[Self]:
        return cls.of(plan)

    def work(self, plan: Plan) -> int:
        """Two triangular systems; in the dual also U Gᵀ, and Uᵀ times what is solved."""
        k, d, t = plan.proj_dim, kernel_dim(plan), plan.split(self.targets).rows
        return t * (d**2 + (2 * d * k if plan.dual else 0))

    @classmethod
    def memory(cls, plan: Plan) -> int:
        """The factor; a block's grads and their solutions; of the dual a cell's rows of U."""
        k, t = plan.proj_dim, largest_block(plan)
        d = kernel_dim(plan)
        rows = 16 * largest_cell(plan) + 16 * d * t if plan.dual else 0
        return 8 * d * d + 24 * k * t + rows


def target_blocks(plan: Plan, targets: str) -> list[Rows]:
    """The targets of a set that are preconditioned, and scored, at once."""
    split, size = plan.split(targets), plan.spec.scores.block_targets
    size = size or max(1, min(BLOCK_ENTRIES // plan.proj_dim, BLOCK_TARGETS))
    return list(replace(split, cell_rows=min(size, split.rows)).blocks())


def largest_block(plan: Plan) -> int:
    """Targets in the largest block of all target sets."""
    return max((len(target_blocks(plan, s.name)[0]) for s in plan.targets), default=0)


def array_of(plan: Plan, targets: str, block: Rows) -> str:
    """The name of the array that holds the B of a block."""
    return "precond" if len(block) == plan.split(targets).rows else f"precond_{block}"


def _owned(plan: Plan, path: str, targets: int) -> OwnedRows:
    k = plan.proj_dim
    chunk = max(1, min(k, CHUNK_BYTES // (8 * targets)))
    spec = ArraySpec(shape=(k, targets), chunks=(chunk, targets), dtype=plan.precondition_dtype)
    return OwnedRows(path, spec, 0, k)


@cached_on_plan
def _identity(plan: Plan, targets: str) -> str:
    blocks = target_blocks(plan, targets)
    several = [len(blocks[0])] if len(blocks) > 1 else []
    return digest([kernel_identity(plan), plan.cut(targets), *several])
