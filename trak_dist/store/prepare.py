"""Create the arrays of a plan. The planner does this; workers only fill them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from trak_dist.cells import KINDS, Cell, ScoreCell
from trak_dist.store import arrays
from trak_dist.store.contents import array_regions
from trak_dist.store.run import Run


def prepare(run: Run, requested: Callable[[Cell], bool] | None = None) -> None:
    """Create the missing arrays of `run`; existing ones are verified.

    Scores of another ensemble, or damaged, are replaced. Where cells of this plan were done before,
    they are revoked: the next command runs them again.

    Parameters
    ----------
    requested : callable
        Asked of a cell for each array; others are left as they are.

    Raises
    ------
    StoreError
        If a different array exists, or the file system refuses.
    """
    for kind in KINDS:
        for cell in filter(requested, kind.one_per_array(run.plan)):  # of None: all
            _prepare(run, cell)


def prepare_checkpoint(run: Run, model_id: int) -> None:
    """The same for the arrays of one checkpoint."""
    prepare(run, lambda cell: getattr(cell, "model_id", None) == model_id)


def prepare_scores(run: Run, names: Iterable[str]) -> None:
    """The same for the scores of some target sets."""
    names = set(names)
    prepare(run, lambda cell: isinstance(cell, ScoreCell) and cell.targets in names)


def _prepare(run: Run, cell: Cell) -> None:
    owned = array_regions(run, cell).values()
    replaced = [region for region in owned if region.spec.if_changed == "replace"]
    if any(arrays.is_other(region.path, region.spec) for region in replaced):
        paths = {region.path for region in owned}
        of_them = (
            c
            for c in type(cell).of(run.plan)
            if paths == {s.path for s in array_regions(run, c).values()}
        )
        for done in run.receipts.done(of_them):
            run.receipts.revoke(done, why="its array was replaced")
    for region in owned:
        arrays.prepare(region.path, region.spec)
        _ensure_groups(run, region.path)


def _ensure_groups(run: Run, path: Path) -> None:
    for group in path.parents:
        if group.is_relative_to(run.layout.store):
            arrays.ensure_group(group)
