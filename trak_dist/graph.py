"""The job graph: which cells form a task, and what a task depends on. Pure: no torch, no Slurm.

A task is a tuple of cells that one process runs in order, or several share. Every executor takes
its tasks from here.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trak_dist.cell_map import CellMap, Owners
from trak_dist.cells import STEPS, Cell
from trak_dist.cells.series import Blocks, Series
from trak_dist.plan import Plan

Task = Sequence[Cell]


def tasks(
    plan: Plan, step: str, *, skip: Collection[Cell] = (), rows_per_task: int = 1
) -> list[Task]:
    """The tasks of one step, without the cells to `skip`.

    A task is a chain of cells, or a data shard: neighbouring cells with at most `rows_per_task`
    rows, or one cell; it is a slice of their series.
    """
    chains: dict[Hashable, list[Cell]] = {}
    shards: list[Task] = []
    for series, skipped in CellMap.of(plan, skip).series(STEPS[step]):
        if isinstance(series, Blocks):
            shards += _shards(series, skipped, rows_per_task)
        else:
            for place in np.flatnonzero(skipped == 0).tolist():
                chains.setdefault(series[place].chain, []).append(series[place])
    in_order = (sorted(chain, key=lambda cell: cell.chain_order) for chain in chains.values())
    return [*shards, *map(tuple, in_order)]


def _shards(
    series: Blocks[Cell], skipped: NDArray[np.uint8], rows_per_task: int
) -> Iterator[Blocks[Cell]]:
    most = max(1, rows_per_task // series.split.cell_rows)
    edges = np.flatnonzero(np.diff(skipped == 0, prepend=False, append=False))
    for begin, end in edges.reshape(-1, 2).tolist():
        start = begin
        while start < end:
            stop = min(start + most, end)
            if stop == len(series) - 1 < end and series[start:].rows <= rows_per_task:
                stop = end  # the last cell has fewer rows than the others
            yield series[start:stop]
            start = stop


def ids(task: Task) -> list[str]:
    """The ids of a task's cells."""
    return task.ids() if isinstance(task, Series) else [cell.id for cell in task]


def chains(task: Task) -> int:
    """How many processes can share a task."""
    return len(task) if isinstance(task, Blocks) else len({cell.chain for cell in task})


def share(task: Task, part: int, parts: int) -> tuple[Cell, ...]:
    """What one of several processes runs of a task that they share: whole chains, neighbours."""
    chains = list(dict.fromkeys(cell.chain for cell in task))
    start, stop = (-(-at * len(chains) // parts) for at in (part, part + 1))
    own = {*chains[start:stop]}
    return tuple(cell for cell in task if cell.chain in own)


def upstream(plan: Plan, cells: Collection[Cell], done: Collection[Cell]) -> set[Cell]:
    """All that `cells` depend on; what of it is not done depends on others in its turn."""
    found, frontier = set[Cell](), set(cells)
    while frontier:
        new = {needed for cell in frontier for needed in cell.dependencies(plan, done)} - found
        found |= new
        frontier = new.difference(done)
    return found


@dataclass(frozen=True)
class TaskGroup:
    """Tasks of one step with the same dependencies.

    `after` are the names of those tasks; `after_any` are those of tasks of this step, of another
    run of the same sweep, that make a Gram or a kernel first, and may fail at what comes next;
    `missing_inputs` are cells that the group needs and no task makes.
    """

    step: str
    tasks: tuple[Task, ...]
    after: frozenset[str]
    after_any: frozenset[str]
    missing_inputs: tuple[Cell, ...]


def task_groups(
    plan: Plan,
    steps: Sequence[str],
    *,
    done: Collection[Cell],
    owners: Owners,
    skip: Collection[Cell],
    rows_per_task: int,
) -> Iterator[TaskGroup]:
    """The groups of tasks that are neither done nor owned nor skipped, upstream first.

    Parameters
    ----------
    owners : Owners
        Which task makes a cell. The caller adds the tasks of each group before asking for the next.
    """
    finished = CellMap.of(plan, done)
    for step in steps:
        taken = CellMap.of(plan, finished, owners, skip)
        groups: dict[frozenset[Hashable], list[Task]] = {}
        for task in tasks(plan, step, skip=taken, rows_per_task=rows_per_task):
            groups.setdefault(frozenset(_by_dependencies(task)), []).append(task)
        by_inputs: dict[_Inputs, list[Task]] = {}
        for group in groups.values():
            waits = inputs(plan, step, group[0], finished, owners)
            by_inputs.setdefault(waits, []).extend(group)
        for waits, grouped in by_inputs.items():
            yield TaskGroup(step, tuple(grouped), *waits)


_Inputs = tuple[frozenset[str], frozenset[str], tuple[Cell, ...]]


def inputs(plan: Plan, step: str, task: Task, done: CellMap, owners: Owners) -> _Inputs:
    """What a task waits for: `after`, `after_any` and `missing_inputs` of its group."""
    after, after_any, missing = set[str](), set[str](), dict[Cell, None]()
    for cell in _by_dependencies(task).values():
        for needed in cell.needs(plan, done):
            owned, lacking = _made_by(needed, done, owners)
            first = needed[0] if isinstance(needed, Series) else needed
            (after_any if type(first) in STEPS[step] else after).update(owned)
            missing.update(dict.fromkeys(c for c in lacking if c not in task))
    return frozenset(after - after_any), frozenset(after_any), tuple(missing)


def _by_dependencies(task: Task) -> dict[Hashable, Cell]:
    """The first cell for each set of dependencies that there is in a task."""
    cells = task[:1] if isinstance(task, Blocks) else task
    return {cell.dependency_group: cell for cell in reversed(cells)}


def _made_by(
    needed: Cell | Series[Cell], done: CellMap, owners: Owners
) -> tuple[set[str], Sequence[Cell]]:
    """The tasks that make what of `needed` is not done, and the cells that none makes."""
    if isinstance(needed, Blocks):
        missing = np.flatnonzero(done.view(needed) == 0)
        numbers = owners.view(needed)[missing]
        return owners.names(numbers), [needed[place] for place in missing[numbers == 0].tolist()]
    cells = needed if isinstance(needed, Series) else [needed]
    missing_cells = [cell for cell in cells if cell not in done]
    names = {cell: owners.name(cell) for cell in missing_cells}
    return {n for n in names.values() if n}, [c for c, name in names.items() if not name]
