"""A run on disk: its plan, layout and receipts, and the arrays that its plan calls for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from trak_dist.cells import Cell
from trak_dist.errors import PlanMismatch
from trak_dist.plan import Plan
from trak_dist.store import atomic
from trak_dist.store.layout import Layout
from trak_dist.store.receipts import Receipts


@dataclass(frozen=True)
class Run:
    """A run directory and its plan. Opening one loads neither torch nor zarr."""

    layout: Layout
    plan: Plan

    @classmethod
    def open(cls, run_dir: Path) -> Run:
        """The run at `run_dir`.

        Raises
        ------
        PlanMismatch
            If there is no plan, or not one that this version reads.
        """
        layout = Layout(run_dir.absolute())
        try:
            text = layout.plan.read_text()
        except FileNotFoundError:
            raise PlanMismatch(
                "there is no run here: plan.json is missing",
                where=str(layout.run_dir),
                next=f"python -m trak_dist.launch problem=… run_dir={run_dir}",
            ) from None
        return cls(layout, Plan.from_json(text, where=str(layout.plan)))

    @classmethod
    def exists(cls, run_dir: Path) -> bool:
        """Whether there is a plan at `run_dir`."""
        return Layout(run_dir.absolute()).plan.exists()

    @classmethod
    def create(cls, run_dir: Path, plan: Plan) -> Run:
        """Publish `plan` at `run_dir`; of several processes that do so at once, one wins.

        Raises
        ------
        PlanMismatch
            If another plan won.
        """
        layout = Layout(run_dir.absolute())
        there = atomic.write_once(layout.plan, plan.to_json().encode())
        if Plan.from_json(there.decode(), where=str(layout.plan)) != plan:
            raise PlanMismatch(
                "another process planned another run here just now",
                where=str(layout.run_dir),
                next="run the same command again to see how the two differ",
            )
        return cls(layout, plan)

    def extend(self, plan: Plan) -> Run:
        """Publish a plan with more checkpoints or target sets, or another reduce, than ours."""
        assert plan.fingerprint == self.plan.fingerprint
        atomic.write(self.layout.plan, plan.to_json().encode())
        return Run(self.layout, plan)

    @cached_property
    def receipts(self) -> Receipts:
        """The run's receipts."""
        return Receipts(self.layout, self.plan)

    def refuse_if_superseded(self, cell: Cell) -> None:
        """Called before a worker writes, so that one left over from an old plan does no harm.

        Raises
        ------
        PlanMismatch
            If `cell` has another key in the plan on disk than in ours.
        """
        there = Run.open(self.layout.run_dir).plan
        if there.fingerprint != self.plan.fingerprint or there.key(cell) != self.plan.key(cell):
            raise PlanMismatch(
                f"the plan was superseded: {cell.id} has key {self.plan.key(cell)} in this "
                f"worker, {there.key(cell)} in plan.json",
                where=str(self.layout.plan),
                next="nothing: the jobs of the new plan do the work",
            )
