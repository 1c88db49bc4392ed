"""The kinds of cells, found in this package, and the steps and stages that run them, in order."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from inspect import get_annotations
from pathlib import Path
from typing import get_type_hints

from trak_dist.cells.cell import Cell
from trak_dist.coordinates import AtRandom, HelpfulTo, Rows, Selection, check_name
from trak_dist.errors import ConfigError
from trak_dist.plan import Plan

# The stages that a user names, and the steps of the job graph that each runs, in this order.
STAGE_STEPS: dict[str, tuple[str, ...]] = {
    "train": ("train",),
    "featurize": ("featurize",),
    "reduce": ("gram", "kernel", "score", "top"),
    "evaluate": ("counterfactual", "evaluate"),
    "report": ("report",),
}


def check_kind(kind: type[Cell]) -> None:
    """Raise `TypeError` if a kind of cell leaves something out, naming it."""
    name = f"{kind.__module__}.{kind.__name__}"
    missing = [a for a in get_annotations(Cell) if not hasattr(kind, a)]
    missing += sorted(kind.__abstractmethods__)
    if missing:
        raise TypeError(f"{name} leaves out {', '.join(missing)}")
    if not any(kind.step in steps for steps in STAGE_STEPS.values()):
        raise TypeError(f"{name} belongs to step {kind.step!r}, which no stage has")
    if ("arrays" in vars(kind)) != ("one_per_array" in vars(kind)):
        raise TypeError(f"{name} defines one of arrays and one_per_array without the other")
    if ("shard" in vars(kind)) != ("series" in vars(kind)):
        raise TypeError(f"{name} defines one of shard and series without the other")
    for coordinate, hint in _coordinates(kind).items():
        if hint not in _READERS:
            raise TypeError(f"{name}.{coordinate} is no str, int, Rows or Selection")


def _found() -> Iterator[type[Cell]]:
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        members = vars(importlib.import_module(f"trak_dist.cells.{module.name}")).values()
        for kind in members:
            own = inspect.isclass(kind) and kind.__module__ == f"trak_dist.cells.{module.name}"
            if own and issubclass(kind, Cell) and kind is not Cell:
                yield kind


def in_order(kinds: list[type[Cell]]) -> tuple[type[Cell], ...]:
    """Kinds by step, and within a step each after those that it depends on.

    Raises
    ------
    TypeError
        If a kind leaves something out, or depends on one of a later step.
    """
    steps = [step for steps in STAGE_STEPS.values() for step in steps]
    names = [kind.kind for kind in kinds if hasattr(kind, "kind")]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise TypeError(f"two kinds of cells are called {', '.join(twice)}")
    for kind in kinds:
        check_kind(kind)
        late = [a.kind for a in kind.depends_on if steps.index(a.step) > steps.index(kind.step)]
        if late:
            raise TypeError(f"{kind.kind} cells depend on {', '.join(late)}, which come later")

    def depth(kind: type[Cell]) -> int:
        return max((1 + depth(a) for a in kind.depends_on if a.step == kind.step), default=0)

    return tuple(sorted(kinds, key=lambda k: (steps.index(k.step), depth(k), k.kind)))


def of_step(plan: Plan, step: str) -> Iterator[Cell]:
    """The cells of one step, each after those that it depends on."""
    for kind in STEPS[step]:
        yield from kind.of(plan)


def of_stage(plan: Plan, stage: str) -> Iterator[Cell]:
    """The cells that `stage` runs, each after those that it depends on."""
    for step in STAGE_STEPS[stage]:
        yield from of_step(plan, step)


def of_run(plan: Plan) -> Iterator[Cell]:
    """All cells, each after those that it depends on."""
    for stage in STAGE_STEPS:
        yield from of_stage(plan, stage)


def runs_problem(steps: Iterable[str]) -> bool:
    """Whether a cell of some steps executes the user's code."""
    return any(kind.runs_problem for step in steps for kind in STEPS[step])


def count(plan: Plan) -> int:
    """How many cells a run has."""
    return sum(kind.count(plan) for kind in KINDS)


def parse_cell(cell_id: str) -> Cell:
    """The cell that `cell_id` names.

    Raises
    ------
    ConfigError
        If it names none.
    """
    name, *parts = cell_id.split("/")
    kind = _BY_NAME.get(name)
    hints = _COORDINATES[kind] if kind else {}
    if kind and len(parts) == len(hints):
        try:
            coordinates = [_READERS[h](p) for h, p in zip(hints.values(), parts, strict=True)]
        except ValueError:
            pass
        else:
            cell = kind(*coordinates)
            if cell.id == cell_id:  # one spelling per cell
                return cell
    raise ConfigError(f"{cell_id!r} is not a cell id", next="use the id of a cell of the run")


def _number(text: str) -> int:
    number = int(text)
    if number < 0:
        raise ValueError(text)
    return number


def _rows(text: str) -> Rows:
    start, stop = map(_number, text.split("-"))
    if start >= stop:
        raise ValueError(text)
    return Rows(start, stop)


def _selection(text: str) -> Selection:
    return AtRandom() if text == str(AtRandom()) else HelpfulTo(_number(text))


def _name(text: str) -> str:
    return check_name(text, what="the cell coordinate")


def _coordinates(kind: type[Cell]) -> dict[str, type]:
    hints = get_type_hints(kind)
    return {f.name: hints[f.name] for f in fields(kind)}  # type: ignore[arg-type]


_READERS: dict[object, Callable[[str], object]] = {
    int: _number,
    str: _name,
    Rows: _rows,
    Selection: _selection,
}
KINDS = in_order(list(_found()))
STEPS = {
    step: tuple(kind for kind in KINDS if kind.step == step)
    for steps in STAGE_STEPS.values()
    for step in steps
}
_BY_NAME = {kind.kind: kind for kind in KINDS}
_COORDINATES = {kind: _coordinates(kind) for kind in KINDS}
