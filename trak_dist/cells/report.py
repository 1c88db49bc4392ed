"""Report cells: a page of each target set."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Self

from trak_dist.cells.cell import Cell
from trak_dist.cells.evaluate import EvaluateCell, evaluated_on
from trak_dist.cells.ownership import OwnedFile
from trak_dist.cells.score import ScoreCell
from trak_dist.cells.series import Series
from trak_dist.cells.top import TopCell, scored_by
from trak_dist.plan import Plan, cached_on_plan, digest
from trak_dist.plan_inputs import CHUNK_BYTES

VERSION = 2  # of what a report shows: with another one the reports of old runs are drawn again


@dataclass(frozen=True)
class ReportCell(Cell):
    """Draws the report of one target set."""

    kind = "report"
    step = "report"
    depends_on = (EvaluateCell, ScoreCell, TopCell)
    run = "trak_dist.stages.report:report"
    gpu = False
    runs_problem = True
    memory_is_bound = True
    threads_from = "reduce"
    per_member = True
    if_too_large = "fewer targets in a set"
    if_too_long = ""
    work_unit = "pages"

    targets: str

    @classmethod
    def of(cls, plan: Plan) -> Iterator[Self]:
        yield from map(cls, plan.scored_names())

    @classmethod
    def count(cls, plan: Plan) -> int:
        return sum(1 for _ in plan.scored_names())

    def identity(self, plan: Plan) -> str:
        return _identity(plan, self.targets)

    def receipt_group(self, plan: Plan) -> tuple[str, ...]:
        return ()

    def needs(self, plan: Plan, done: Collection[Cell]) -> Iterator[Cell | Series[Cell]]:
        evaluated = [EvaluateCell(self.targets)] if plan.is_evaluated(self.targets) else []
        yield from evaluated
        if all(cell in done for cell in evaluated):
            yield from scored_by(plan, self.targets)

    def files(self) -> Mapping[str, OwnedFile]:
        page = f"report/{self.targets}"
        endings = {"examples": ".png", "lds": ".lds.png", "counterfactuals": ".counterfactuals.png"}
        pictures = {n: OwnedFile(page + end, always=False) for n, end in endings.items()}
        return {"page": OwnedFile(f"{page}.html"), **pictures}

    def work(self, plan: Plan) -> int:
        return 1

    @classmethod
    def memory(cls, plan: Plan) -> int:
        """Blocks of scores and what is selected of them; pictures."""
        return 4 * CHUNK_BYTES


@cached_on_plan
def _identity(plan: Plan, targets: str) -> str:
    return digest(["report", VERSION, *evaluated_on(plan, targets)])
