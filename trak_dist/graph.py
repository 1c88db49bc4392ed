"""The job graph: which cells form a task, and what a task depends on. Pure: no torch, no Slurm.

A task is a tuple of cells that one process runs in order, or several share. Every executor takes
its tasks from here.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from trak_dist.cells import STEPS, Cell, of_step
from trak_dist.plan import Plan

Task = tuple[Cell, ...]


def tasks(
    plan: Plan, step: str, *, skip: Collection[Cell] = (), rows_per_task: int = 1
) -> list[Task]:
    """The tasks of one step, without the cells to `skip`.

    A task is a chain of cells, or a data shard: neighbouring cells with at most `rows_per_task`
    rows, or one cell.
    """
    chains: dict[Hashable, list[Cell]] = {}
    shards: list[list[Cell]] = []
    for cell in of_step(plan, step):
        if cell in skip:
            continue
        if cell.shard is None:
            chains.setdefault(cell.chain, []).append(cell)
        elif shards and _continues(shards[-1], cell, rows_per_task):
            shards[-1].append(cell)
        else:
            shards.append([cell])
    in_order = (sorted(chain, key=lambda cell: cell.chain_order) for chain in chains.values())
    return [tuple(cells) for cells in (*shards, *in_order)]


def share(task: Task, part: int, parts: int) -> Task:
    """What one of several processes runs of a task that they share: whole chains, neighbours."""
    chains = list(dict.fromkeys(cell.chain for cell in task))
    start, stop = (-(-at * len(chains) // parts) for at in (part, part + 1))
    own = {*chains[start:stop]}
    return tuple(cell for cell in task if cell.chain in own)


def _continues(shard: list[Cell], cell: Cell, rows_per_task: int) -> bool:
    first, last, new = shard[0].shard, shard[-1].shard, cell.shard
    assert first and last and new
    neighbours = new[0] == last[0] and new[1].start == last[1].stop
    return neighbours and new[1].stop - first[1].start <= rows_per_task


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
    owners: Mapping[Cell, str],
    skip: Collection[Cell],
    rows_per_task: int,
) -> Iterator[TaskGroup]:
    """The groups of tasks that are neither done nor owned nor skipped, upstream first.

    Parameters
    ----------
    owners : mapping
        The name of the task that makes a cell. The caller adds the tasks of each group before
        asking for the next.
    """
    for step in steps:
        waiting = tasks(plan, step, skip={*done, *owners, *skip}, rows_per_task=rows_per_task)
        groups: dict[frozenset[Hashable], list[Task]] = {}
        for task in waiting:
            groups.setdefault(frozenset(cell.dependency_group for cell in task), []).append(task)
        by_dependencies: dict[
            tuple[frozenset[str], frozenset[str], tuple[Cell, ...]], list[Task]
        ] = {}
        for group in groups.values():
            representatives = {c.dependency_group: c for c in reversed(group[0])}.values()
            needed = dict.fromkeys(
                c for cell in representatives for c in cell.dependencies(plan, done)
            )
            missing = [c for c in needed if c not in done and c not in group[0]]
            owned = [c for c in missing if c in owners]
            after_any = frozenset(owners[c] for c in owned if type(c) in STEPS[step])
            after = frozenset(owners[c] for c in owned) - after_any
            missing_inputs = tuple(c for c in missing if c not in owners)
            by_dependencies.setdefault((after, after_any, missing_inputs), []).extend(group)
        for (after, after_any, missing_inputs), grouped in by_dependencies.items():
            yield TaskGroup(step, tuple(grouped), after, after_any, missing_inputs)
