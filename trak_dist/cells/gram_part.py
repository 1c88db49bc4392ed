"""Gram part cells: UᵀU of some of a checkpoint's rows, where all would take one task too long."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Self

from trak_dist.cells.cell import Cell
from trak_dist.cells.featurize import FeaturizeCell, largest_cell, of_checkpoint
from trak_dist.cells.fisher import FisherCell
from trak_dist.cells.ownership import ArraySpec, OwnedRows
from trak_dist.cells.series import Blocks, Series
from trak_dist.coordinates import TRAIN
from trak_dist.plan import Plan, cached_on_plan, digest
from trak_dist.plan_inputs import CHUNK_BYTES


@dataclass(frozen=True)
class GramPartCell(Cell):
    """Sums UᵀU over neighbouring cells of one checkpoint; the Gram is the sum of the parts."""

    kind = "gram_part"
    step = "gram"
    depends_on = (FeaturizeCell, FisherCell)
    run = "trak_dist.stages.reduce:gram_part"
    gpu = False
    runs_problem = False
    memory_is_bound = True
    threads_from = "reduce"
    per_member = False
    if_too_large = "a smaller proj_dim or featurize.cell_rows"
    if_too_long = "a smaller reduce.gram_rows"
    work_unit = "products"

    model_id: int
    part: int

    @classmethod
    def of(cls, plan: Plan) -> Iterator[Self]:
        for model_id in plan.model_ids:
            yield from cls.of_checkpoint(plan, model_id)

    @classmethod
    def of_checkpoint(cls, plan: Plan, model_id: int) -> Iterator[Self]:
        """Those of one checkpoint, in order of rows; none if its Gram is one sum."""
        yield from (cls(model_id, part) for part in range(plan.gram_parts))

    @classmethod
    def count(cls, plan: Plan) -> int:
        return len(plan.model_ids) * plan.gram_parts

    def sources(self, plan: Plan) -> range:
        """Which of `curvature_cells` it sums."""
        cells = len(curvature_cells(plan, self.model_id))
        start, stop = (cells * i // plan.gram_parts for i in (self.part, self.part + 1))
        return range(start, stop)

    def identity(self, plan: Plan) -> str:
        return gram_identity(plan)

    def receipt_group(self, plan: Plan) -> tuple[str, ...]:
        return plan.projection_id, plan.gram_id

    def needs(self, plan: Plan, done: Collection[Cell]) -> Iterator[Cell | Series[Cell]]:
        """Those of the whole checkpoint, so that its parts are one job array."""
        yield from curvature_series(plan, self.model_id)

    @property
    def dependency_group(self) -> Hashable:
        return self.model_id

    def arrays(self, plan: Plan) -> Mapping[str, OwnedRows]:
        """`part`, its own of the checkpoint's (parts, k, k) float64."""
        matrix = square(plan.proj_dim)
        shape, chunks = (plan.gram_parts, *matrix.shape), (1, *matrix.chunks)
        path = f"{of_checkpoint(plan, self.model_id)}/gram_parts/{plan.gram_id}"
        spec = replace(matrix, shape=shape, chunks=chunks)
        return {"part": OwnedRows(path, spec, self.part, self.part + 1)}

    @classmethod
    def one_per_array(cls, plan: Plan) -> Iterator[Self]:
        yield from (cls(m, 0) for m in plan.model_ids if plan.gram_parts)

    def work(self, plan: Plan) -> int:
        """Half of rows · k², by symmetry."""
        rows, k = plan.curvature_rows, plan.proj_dim
        return rows * k**2 // (2 * plan.gram_parts)

    @classmethod
    def memory(cls, plan: Plan) -> int:
        """The sum; a cell's rows as stored, in float32 and in float64."""
        return 8 * plan.proj_dim**2 + 16 * largest_cell(plan)


@cached_on_plan
def curvature_cells(plan: Plan, model_id: int) -> list[FeaturizeCell | FisherCell]:
    """The cells whose rows a checkpoint's U is made of, in order."""
    return [cell for series in curvature_series(plan, model_id) for cell in series]


def curvature_series(
    plan: Plan, model_id: int
) -> Iterator[Blocks[FeaturizeCell] | Blocks[FisherCell]]:
    """The same, as series."""
    if plan.curvature == "fisher":
        yield from FisherCell.blocks(plan, model_id)
    else:
        yield FeaturizeCell.blocks(plan, model_id, TRAIN)


def square(d: int) -> ArraySpec:
    """A matrix (d, d) float64."""
    chunk = max(1, min(d, CHUNK_BYTES // (8 * d)))
    return ArraySpec(shape=(d, d), chunks=(chunk, d), dtype="float64")


@cached_on_plan
def gram_identity(plan: Plan) -> str:
    """Digest of what determines every UᵀU of the run."""
    threads = plan.settings_of("reduce.threads")
    return digest([plan.fingerprint, plan.proj_dim, threads, *plan.other_gram])
