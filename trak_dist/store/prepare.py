"""Create the arrays of a plan. The planner does this; workers only fill them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from inspect import get_annotations
from pathlib import Path

from trak_dist.cells import KINDS, Cell, ScoreCell
from trak_dist.store import arrays
from trak_dist.store.contents import array_regions
from trak_dist.store.run import Run


def prepare(run: Run) -> None:
    """Create the missing arrays of `run`; existing ones are verified.

    Scores of another ensemble, or damaged, are replaced. Where cells of this plan were done before,
    they are revoked: the next command runs them again.

    Raises
    ------
    StoreError
        If a different array exists, or the file system refuses.
    """
    for kind in KINDS:
        for cell in kind.one_per_array(run.plan):
            _prepare(run, cell)


def prepare_checkpoint(run: Run, model_id: int) -> None:
    """The same for the arrays of one checkpoint, also of one outside the ensemble."""
    alone = replace(run.plan, use=(model_id,))
    for kind in KINDS:
        if "model_id" in get_annotations(kind):  # its arrays are of one checkpoint each
            for cell in kind.one_per_array(alone):
                _prepare(run, cell)


def prepare_scores(run: Run, names: Iterable[str]) -> None:
    """The same for the scores of some target sets."""
    names = set(names)
    for cell in ScoreCell.one_per_array(run.plan):
        if cell.targets in names:
            _prepare(run, cell)


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
