"""The job graph: which cells make a task, and what a task needs. Pure: no torch, no Slurm.

A task is a tuple of cells that one process runs in order. Every executor takes its tasks from here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from trak_dist.cells import (
    FULL,
    RANDOM,
    STEPS,
    TRAIN,
    Cell,
    CounterfactualCell,
    EvaluateCell,
    FeaturizeCell,
    GramCell,
    KernelCell,
    MarginsCell,
    PreconditionCell,
    ReportCell,
    ScoreCell,
    TrainCell,
)
from trak_dist.plan import Plan

Task = tuple[Cell, ...]


def cells(plan: Plan, step: str) -> Iterator[Cell]:
    """The cells of one step."""
    for kind in STEPS[step]:
        yield from plan.cells_of(kind)


def tasks(
    plan: Plan, step: str, *, skip: Collection[Cell] = (), rows_per_task: int = 1
) -> list[Task]:
    """The tasks of one step, without the cells to `skip`.

    A featurize task is one data shard of one checkpoint: neighbouring cells with at most
    `rows_per_task` rows, or one cell. A kernel task is the chain of one checkpoint; a train task is
    one checkpoint, or those of one subset and their margins; a counterfactual task is one target.
    """
    todo = [cell for cell in cells(plan, step) if cell not in skip]
    if step == "featurize":
        return list(_data_shards(todo, rows_per_task))
    chains: dict[object, list[Cell]] = {}
    for cell in todo:
        chains.setdefault(_chain(cell), []).append(cell)
    return [tuple(sorted(chain, key=_within_subset)) for chain in chains.values()]


def _chain(cell: Cell) -> object:
    match cell:
        case TrainCell(subset=subset) | MarginsCell(subset=subset) if subset != FULL:
            return subset
        case GramCell(model_id) | KernelCell(model_id) | PreconditionCell(model_id):
            return model_id
        case CounterfactualCell(targets, whose):
            return targets, whose
    return cell


def _within_subset(cell: Cell) -> int:
    """A model's margins come right after its training."""
    return cell.seed if isinstance(cell, TrainCell | MarginsCell) else 0


def _data_shards(todo: list[Cell], rows_per_task: int) -> Iterator[Task]:
    shard: list[FeaturizeCell] = []
    for cell in todo:
        assert isinstance(cell, FeaturizeCell)
        if shard and not _continues(shard, cell, rows_per_task):
            yield tuple(shard)
            shard = []
        shard.append(cell)
    if shard:
        yield tuple(shard)


def _continues(shard: list[FeaturizeCell], cell: FeaturizeCell, rows_per_task: int) -> bool:
    first, last = shard[0], shard[-1]
    neighbours = (cell.model_id, cell.split, cell.rows.start) == (
        *(last.model_id, last.split),
        last.rows.stop,
    )
    return neighbours and cell.rows.stop - first.rows.start <= rows_per_task


def shares_needs(cell: Cell) -> object:
    """What cells of one step have in common if they need the same cells of earlier steps."""
    match cell:
        case FeaturizeCell() | GramCell() | KernelCell() | PreconditionCell():
            return cell.model_id
        case CounterfactualCell(targets=targets, whose=whose):
            return targets if whose != RANDOM else None
        case ScoreCell() | EvaluateCell() | ReportCell():
            return cell.targets
        case MarginsCell(subset, seed):
            return subset, seed
        case TrainCell():
            return None


def needs(plan: Plan, cell: Cell, done: Collection[Cell]) -> Iterator[Cell]:
    """The cells of other tasks that the task whose first cell is `cell` needs, done or not.

    Those that a cell named here needs itself are left out as long as that one is not done.
    """
    yield from _before(cell)
    match cell:
        case FeaturizeCell(model_id=model_id):
            if plan.checkpoint(model_id).trained:
                yield TrainCell(FULL, model_id)
        case GramCell(model_id) | KernelCell(model_id) | PreconditionCell(model_id):
            yield from _grads(plan, model_id, *(s.name for s in plan.targets))
        case ScoreCell(targets=targets):
            yield from _for_scores(plan, targets, done)
        case CounterfactualCell(targets=targets, whose=whose) if whose != RANDOM:
            yield from plan.score_cells(targets)
        case EvaluateCell(targets=targets):
            yield from _for_evaluation(plan, targets, done)
        case ReportCell(targets=targets):
            evaluated = [EvaluateCell(targets)] if plan.evaluated(targets) else []
            yield from evaluated
            if all(cell in done for cell in evaluated):
                yield from plan.score_cells(targets)


def upstream(plan: Plan, cells: Collection[Cell], done: Collection[Cell]) -> set[Cell]:
    """All that `cells` need; what of it is not done needs others in its turn."""
    found, asking = set[Cell](), set(cells)
    while asking:
        new = {needed for cell in asking for needed in needs(plan, cell, done)} - found
        found |= new
        asking = new.difference(done)
    return found


def _for_scores(plan: Plan, targets: str, done: Collection[Cell]) -> Iterator[Cell]:
    itself = targets == TRAIN
    for model_id in plan.model_ids:
        solved = KernelCell(model_id) if itself else PreconditionCell(model_id, targets)
        yield solved
        if solved in done:
            yield from _grads(plan, model_id, *(() if itself else (targets,)))


def _for_evaluation(plan: Plan, targets: str, done: Collection[Cell]) -> Iterator[Cell]:
    scores = list(plan.score_cells(targets))
    yield from scores
    if targets == TRAIN:
        for model_id in plan.model_ids if scores[0] in done else ():
            yield from plan.featurize_cells(model_id, TRAIN)
        return
    yield from plan.counterfactual_cells(targets)
    yield from (MarginsCell(*model, targets) for model in plan.retrained())
    for model_id in plan.model_ids if plan.has_truth(targets) and scores[0] in done else ():
        kernel = KernelCell(model_id)
        yield kernel
        if kernel in done:
            yield GramCell(model_id)
            yield from _grads(plan, model_id, targets)


def _before(cell: Cell) -> Iterator[Cell]:
    """The cell before it in the chain, which another task makes where this one is first of its."""
    match cell:
        case MarginsCell(subset, seed):
            yield TrainCell(subset, seed)
        case KernelCell(model_id):
            yield GramCell(model_id)
        case PreconditionCell(model_id):
            yield KernelCell(model_id)


def _grads(plan: Plan, model_id: int, *targets: str) -> Iterator[Cell]:
    for split_name in (TRAIN, *targets):
        yield from plan.featurize_cells(model_id, split_name)


@dataclass(frozen=True)
class Array:
    """Tasks of one step that wait for the same tasks of earlier ones.

    `after` are the names of those tasks; `beside` are those of tasks of this step, of another run
    of the same sweep, that make a Gram or a kernel first, and may fail at what comes next; `lacks`
    are cells that the array needs and nobody makes.
    """

    step: str
    tasks: tuple[Task, ...]
    after: frozenset[str]
    beside: frozenset[str]
    lacks: tuple[Cell, ...]


def arrays(
    plan: Plan,
    steps: Sequence[str],
    *,
    done: Collection[Cell],
    owners: Mapping[Cell, str],
    skip: Collection[Cell],
    rows_per_task: int,
) -> Iterator[Array]:
    """The arrays that make what is neither done nor owned nor to be skipped, upstream first.

    Parameters
    ----------
    owners : mapping
        The name of the task that makes a cell. Who asks for the next array has entered those of the
        last one, or it is as if nobody made them.
    """
    for step in steps:
        waiting = tasks(plan, step, skip={*done, *owners, *skip}, rows_per_task=rows_per_task)
        groups: dict[frozenset[object], list[Task]] = {}
        for task in waiting:
            groups.setdefault(frozenset(map(shares_needs, task)), []).append(task)
        alike: dict[tuple[frozenset[str], frozenset[str], tuple[Cell, ...]], list[Task]] = {}
        for group in groups.values():
            unlike = {shares_needs(cell): cell for cell in reversed(group[0])}.values()
            needed = dict.fromkeys(c for cell in unlike for c in needs(plan, cell, done))
            missing = [c for c in needed if c not in done and c not in group[0]]
            owned = [c for c in missing if c in owners]
            beside = frozenset(owners[c] for c in owned if type(c) in STEPS[step])
            after = frozenset(owners[c] for c in owned) - beside
            lacks = tuple(c for c in missing if c not in owners)
            alike.setdefault((after, beside, lacks), []).extend(group)
        for (after, beside, lacks), grouped in alike.items():
            yield Array(step, tuple(grouped), after, beside, lacks)
