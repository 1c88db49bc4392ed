"""Make the arrays that a plan calls for. The planner does so; workers only fill them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from trak_dist.cells import Cell, GramCell, KernelCell, MarginsCell, PreconditionCell
from trak_dist.plan import Plan
from trak_dist.store import arrays
from trak_dist.store.contents import slabs
from trak_dist.store.run import Run


def prepare(run: Run) -> None:
    """Make whatever array of `run` is not there yet; those that are there are verified.

    Raises
    ------
    StoreError
        If an array of another kind is in the way, or the file system refuses.
    """
    plan = run.plan
    for model_id in plan.model_ids:
        prepare_checkpoint(run, model_id)
    prepare_scores(run, plan.scored())
    for split in plan.targets:
        for seed in range(plan.ground_truth.seeds if plan.ground_truth.subsets else 0):
            for slab in slabs(run, MarginsCell("0", seed, split.name)).values():
                arrays.grow(slab.path, slab.spec)
                _ensure_groups(run, slab.path)


def prepare_checkpoint(run: Run, model_id: int) -> None:
    """The same for the arrays of one checkpoint."""
    for cell in _one_of_each(run.plan, model_id):
        for slab in slabs(run, cell).values():
            arrays.ensure(slab.path, slab.spec)
            _ensure_groups(run, slab.path)


def prepare_scores(run: Run, names: Iterable[str]) -> None:
    """The same for scores of target sets; those of another ensemble, or damaged, are replaced.

    Where this plan's cells made some before, they are taken back: the next command does them.
    """
    for name in names:
        cells = list(run.plan.score_cells(name))
        owned = slabs(run, cells[0]).values()
        if any(arrays.is_other(slab.path, slab.spec) for slab in owned):
            for cell in run.receipts.done(cells):
                run.receipts.revoke(cell, why="its array was replaced")
        for slab in owned:
            arrays.replace(slab.path, slab.spec)
            _ensure_groups(run, slab.path)


def _one_of_each(plan: Plan, model_id: int) -> Iterator[Cell]:
    """A cell for each array of a checkpoint."""
    for split in (plan.train, *plan.targets):
        yield next(plan.featurize_cells(model_id, split.name))
    yield GramCell(model_id)
    yield KernelCell(model_id)
    yield from (PreconditionCell(model_id, split.name) for split in plan.targets)


def _ensure_groups(run: Run, path: Path) -> None:
    for group in path.parents:
        if group.is_relative_to(run.layout.store):
            arrays.ensure_group(group)
