"""Top part cells: the strongest of some train rows, where not all scores are kept."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Self

from trak_dist.cells.cell import Cell
from trak_dist.cells.featurize import FeaturizeCell, largest_cell
from trak_dist.cells.kernel import KernelCell
from trak_dist.cells.ownership import ArraySpec, OwnedRows
from trak_dist.cells.precondition import PreconditionCell, largest_block, target_blocks
from trak_dist.cells.score import halves_targets, keeps_top, made_of, scores_identity
from trak_dist.cells.series import Series
from trak_dist.coordinates import Rows
from trak_dist.plan import Plan, cached_on_plan, digest
from trak_dist.plan_inputs import Split

HALVES_COUNT = 100  # strongest rows by either half of the ensemble: what a report compares
ROWS_PER_KEPT = 32  # a part keeps 2 · count of at least 32 · count scores, with their rows
MAX_ROWS = 2**24  # row numbers within a part are exact in float32
BLOCK_SCORES = 2**25  # scores of a block that are summed over the ensemble, 256 MiB in float64


@dataclass(frozen=True)
class TopPartCell(Cell):
    """Scores some train rows for a block of targets, and keeps the strongest of each target."""

    kind = "top_part"
    step = "score"
    depends_on = (PreconditionCell, KernelCell, FeaturizeCell)
    run = "trak_dist.stages.top:top_part"
    gpu = False
    runs_problem = False
    memory_is_bound = True
    threads_from = "reduce"
    per_member = True
    if_too_large = "a smaller scores.block_targets or scores.count"
    if_too_long = "a smaller scores.block_targets or scores.count, or more reduce.threads"
    work_unit = "products"

    targets: str
    block: Rows
    rows: Rows

    @classmethod
    def of(cls, plan: Plan) -> Iterator[Self]:
        for name in with_tops(plan):
            for block in target_blocks(plan, name):
                yield from cls.of_block(plan, name, block)

    @classmethod
    def of_block(cls, plan: Plan, targets: str, block: Rows) -> Iterator[Self]:
        """Those of one block of targets, in order of rows."""
        return (cls(targets, block, rows) for rows in _cut(plan).blocks())

    @classmethod
    def count(cls, plan: Plan) -> int:
        return sum(len(target_blocks(plan, name)) for name in with_tops(plan)) * _cut(plan).cells

    def identity(self, plan: Plan) -> str:
        return tops_identity(plan, self.targets)

    def receipt_group(self, plan: Plan) -> tuple[str, ...]:
        return ()

    def needs(self, plan: Plan, done: Collection[Cell]) -> Iterator[Cell | Series[Cell]]:
        yield from made_of(plan, self.targets, done)

    @property
    def dependency_group(self) -> Hashable:
        return self.targets

    def arrays(self, plan: Plan) -> Mapping[str, OwnedRows]:
        """`top` (parts, targets, 2, 2, count) float32: [highest, lowest][row in the part, score].

        The lowest by their negatives; where a part has fewer rows the last ones are −1. Of an
        ensemble also `halves` (parts, some targets, 2, 2, ≤ 100): the highest by
        [either half][row in the part, score].
        """
        part, count = self.rows.start // _cut(plan).cell_rows, kept(plan)
        group = f"top_parts/{self.targets}/{self.block}"

        def owned(name: str, *shape: int) -> OwnedRows:
            spec = ArraySpec(
                shape=(_cut(plan).cells, *shape),
                chunks=(1, *shape),
                dtype="float32",
                attributes={"model_ids": list(plan.model_ids)},
                if_changed="replace",
            )
            return OwnedRows(f"{group}/{name}", spec, part, part + 1)

        found = {"top": owned("top", len(self.block), 2, 2, count)}
        if some := halves_within(plan, self.targets, self.block):
            found["halves"] = owned("halves", len(some), 2, 2, kept(plan, HALVES_COUNT))
        return found

    @classmethod
    def one_per_array(cls, plan: Plan) -> Iterator[Self]:
        for name in with_tops(plan):
            for block in target_blocks(plan, name):
                yield next(cls.of_block(plan, name, block))

    def work(self, plan: Plan) -> int:
        """X B of each checkpoint."""
        return len(self.rows) * len(self.block) * plan.proj_dim * len(plan.model_ids)

    @classmethod
    def memory(cls, plan: Plan) -> int:
        """B; scores of a block in float64, one checkpoint's, and while they are sorted; the top."""
        t = largest_block(plan)
        scored = 6 * 8 * t * min(rows_at_once(t), _cut(plan).cell_rows)
        return 8 * plan.proj_dim * t + scored + 64 * t * kept(plan) + 16 * largest_cell(plan)


def with_tops(plan: Plan) -> Iterator[str]:
    """The target sets of which the strongest scores are kept, and not all."""
    return (split.name for split in plan.targets if keeps_top(plan, split.name))


def kept(plan: Plan, count: int = 0) -> int:
    """How many rows are kept of each target."""
    return min(count or plan.spec.scores.count, plan.train.rows)


def rows_at_once(targets: int) -> int:
    """Train rows whose scores for so many targets are summed over the ensemble at once."""
    return max(1, BLOCK_SCORES // targets)


def halves_within(plan: Plan, targets: str, block: Rows) -> list[int]:
    """The targets of a block for which either half of the ensemble's strongest rows are kept."""
    return [t for t in halves_targets(plan, targets) if block.start <= t < block.stop]


def _cut(plan: Plan) -> Split:
    """The train split in parts: whole featurize cells, many times as many rows as are kept."""
    cell = plan.train.cell_rows
    rows = -(-ROWS_PER_KEPT * max(plan.spec.scores.count, HALVES_COUNT) // cell) * cell
    return replace(plan.train, cell_rows=min(rows, plan.train.rows, MAX_ROWS))


@cached_on_plan
def tops_identity(plan: Plan, targets: str) -> str:
    """Digest of what determines the strongest scores of a target set, but for the block."""
    cuts = [_cut(plan).cell_rows, len(target_blocks(plan, targets)[0]), HALVES_COUNT]
    return digest(["top", scores_identity(plan), plan.cut(targets), kept(plan), cuts])
