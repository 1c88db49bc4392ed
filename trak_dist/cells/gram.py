"""Gram cells: XᵀX."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Self

from trak_dist.cells.cell import Cell
from trak_dist.cells.featurize import FeaturizeCell, largest_cell, of_checkpoint
from trak_dist.cells.ownership import ArraySpec, OwnedRows
from trak_dist.plan import CHUNK_BYTES, Plan, cached_on_plan, digest


@dataclass(frozen=True)
class GramCell(Cell):
    """Sums one checkpoint's XᵀX, which every λ and kernel scale shares."""

    kind = "gram"
    step = "kernel"
    depends_on = (FeaturizeCell,)
    run = "trak_dist.stages.reduce:gram"
    gpu = False
    runs_problem = False
    memory_is_bound = True
    threads_from = "reduce"
    per_member = False
    if_too_large = "a smaller proj_dim or featurize.cell_rows"

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
        return plan.projection_id, str(plan.proj_dim)

    def dependencies(self, plan: Plan, done: Collection[Cell]) -> Iterator[Cell]:
        yield from all_grads(plan, self.model_id)

    @property
    def chain(self) -> Hashable:
        return self.model_id

    def arrays(self, plan: Plan) -> Mapping[str, OwnedRows]:
        """`gram` (k, k) float64."""
        path = f"{of_checkpoint(plan, self.model_id)}/gram/{plan.proj_dim}"
        return {"gram": OwnedRows(path, square(plan), 0, plan.proj_dim)}

    @classmethod
    def one_per_array(cls, plan: Plan) -> Iterator[Self]:
        return cls.of(plan)

    @classmethod
    def memory(cls, plan: Plan) -> int:
        """XᵀX; a cell's rows as stored, in float32 and in float64."""
        return 8 * plan.proj_dim**2 + 16 * largest_cell(plan)


def all_grads(plan: Plan, model_id: int) -> Iterator[FeaturizeCell]:
    """The grads of all splits, for which the tasks that reduce a checkpoint wait."""
    for split in plan.splits:
        yield from FeaturizeCell.of_split(plan, model_id, split.name)


def square(plan: Plan) -> ArraySpec:
    """An array (k, k) float64."""
    k = plan.proj_dim
    chunk = max(1, min(k, CHUNK_BYTES // (8 * k)))
    return ArraySpec(shape=(k, k), chunks=(chunk, k), dtype="float64")


@cached_on_plan
def gram_identity(plan: Plan) -> str:
    """Digest of what determines every XᵀX of the run."""
    return digest([plan.fingerprint, plan.proj_dim, plan.settings_of("reduce.threads")])
