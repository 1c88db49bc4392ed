"""What was derived from cells, in a run and in all plans that share its grads."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from trak_dist import plan_file
from trak_dist.cells import Cell, of_run
from trak_dist.store.layout import Layout
from trak_dist.store.run import Run


def derived_from(run: Run, sources: Collection[Cell]) -> dict[Cell, str]:
    """The done cells that were derived from `sources`, directly or not; and from which."""
    found: dict[Cell, str] = {}
    cells = dict.fromkeys(of_run(run.plan))
    for cell in cells if sources else ():  # each after its dependencies, done or revoked before
        needed = cell.dependencies(run.plan, cells)
        origin = next((other for other in needed if other in sources or other in found), None)
        if origin and cell not in sources:
            found[cell] = f"derived from {origin.id}"
    done = run.receipts.done(found)
    return {cell: why for cell, why in found.items() if cell in done}


def runs_sharing_grads(run: Run) -> Iterator[Run]:
    """The run and its members under every plan they ever had, if it has the same grads."""
    for layout in map(Layout, run.layout.run_dirs()):
        for generation in range((layout.generation() or 0) + 1):
            path = layout.plan(generation)
            plan = plan_file.load(path.read_bytes(), where=str(path))
            if plan.projection_id == run.plan.projection_id:
                yield Run(layout, plan, generation)
