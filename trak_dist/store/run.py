"""A run on disk: its plan, layout and receipts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from trak_dist import commands, plan_file
from trak_dist.cell_map import Kinds
from trak_dist.cells import KINDS, Cell
from trak_dist.errors import PlanMismatch, RunNotFound
from trak_dist.hashing import digest_of
from trak_dist.plan import Plan
from trak_dist.store import atomic
from trak_dist.store.layout import Layout
from trak_dist.store.progress import Progress, read_progress
from trak_dist.store.receipts import Receipts
from trak_dist.store.record import Receipt


@dataclass(frozen=True)
class Run:
    """A run directory and its plan. Opening one loads neither torch nor zarr.

    A plan is never overwritten: extending it publishes the next generation, which only one of
    several processes can do.
    """

    layout: Layout
    plan: Plan
    generation: int

    @classmethod
    def open(cls, run_dir: Path) -> Run:
        """The run at `run_dir`.

        Raises
        ------
        RunNotFound
            If there is no plan.
        PlanMismatch
            If it is not one that this version reads.
        """
        layout = Layout(run_dir.absolute())
        with atomic.write_errors(layout.run_dir):
            generation = layout.generation()
        if generation is None:
            raise RunNotFound(
                "there is no run here: plan.json is missing",
                where=str(layout.run_dir),
                next=f"{commands.launch(run_dir, 'problem=mnist')} begins one, with your problem "
                "in place of mnist",
            )
        path = layout.plan(generation)
        return cls(layout, plan_file.load(atomic.read(path), where=str(path)), generation)

    @classmethod
    def exists(cls, run_dir: Path) -> bool:
        """Whether there is a plan at `run_dir`."""
        return Layout(run_dir.absolute()).generation() is not None

    @classmethod
    def create(cls, run_dir: Path, plan: Plan) -> Run:
        """Publish `plan` at `run_dir`; of several processes that do so at once, one wins.

        Raises
        ------
        PlanMismatch
            If another plan won.
        """
        return cls._publish(Layout(run_dir.absolute()), plan, 0)

    def extend(self, plan: Plan) -> Run:
        """Publish a plan with more checkpoints or target sets, or another reduce, than this one.

        Raises
        ------
        PlanMismatch
            If another process extended the run first.
        """
        assert plan.projection_id == self.plan.projection_id
        return self._publish(self.layout, plan, self.generation + 1)

    @classmethod
    def _publish(cls, layout: Layout, plan: Plan, generation: int) -> Run:
        path = layout.plan(generation)
        content = plan_file.dump(plan).encode()
        plan_file.load(content, where=str(path))  # a plan that can't be read is never written
        stored = atomic.write_once(path, content)
        if plan_file.load(stored, where=str(path)) != plan:
            raise PlanMismatch(
                "another process has just planned something else here",
                where=str(path),
                next="run the same command again: it starts from the other process's plan",
            )
        return cls(layout, plan, generation)

    def plan_digest(self, generation: int) -> str:
        """Digest of the file of the plan as extended so many times; empty if there is none."""
        try:
            return digest_of(atomic.read(self.layout.plan(generation)))
        except FileNotFoundError:
            return ""

    def publish(
        self,
        cell: Cell,
        digests: Mapping[str, str],
        *,
        facts: Mapping[str, Any],
        job: Mapping[str, Any],
    ) -> None:
        """Make a cell done, having written what `digests` are of."""
        receipt = Receipt(
            cell=cell.id,
            key=cell.key(self.plan),
            fingerprint=self.plan.fingerprint,
            digests=digests,
            facts=facts,
            job=job,
        )
        self.receipts.publish(cell, receipt)

    def progress(self, kinds: Kinds = KINDS) -> Progress:
        """What is done of the cells of some kinds, now."""
        return read_progress(self.layout, self.plan, kinds)

    @cached_property
    def receipts(self) -> Receipts:
        """The run's receipts."""
        return Receipts(self.layout, self.plan)

    def check_not_superseded(self, cell: Cell) -> None:
        """Called before a worker writes, so that a worker of an old plan does no harm.

        Raises
        ------
        PlanMismatch
            If `cell` has another key in the plan on disk than in this one, or is not in it.
        """
        current = Run.open(self.layout.run_dir)
        if current.generation < self.generation:
            return  # a listing from before: nothing replaced the plan that this one is
        try:
            key = cell.key(current.plan)
        except KeyError:  # the plan lacks its split, or its checkpoint
            key = "none"
        if key != cell.key(self.plan):
            raise PlanMismatch(
                f"the plan was superseded: {cell.id} has key {cell.key(self.plan)} in this "
                f"worker, {key} in the run directory",
                where=str(current.layout.plan(current.generation)),
                next="nothing to do: the jobs of the new plan compute it",
            )
