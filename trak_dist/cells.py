"""Cells: the units of work, ownership and recovery. Pure values; what they mean is in the plan.

A cell's `id` is its stage and its coordinates joined by slashes, `featurize/3/train/0-512` for
instance. It names the cell in logs, receipts, job arguments and errors.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import ClassVar

from trak_dist.errors import ConfigError

TRAIN = "train"
FULL = "full"
RANDOM = "random"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")


def check_name(name: str, *, what: str) -> str:
    """Return `name` if it is fit to be a path component and a part of a cell id.

    Raises
    ------
    ConfigError
        If it is not.
    """
    if not _NAME.fullmatch(name) or name == "zarr.json":
        raise ConfigError(
            f"{what} {name!r} is not usable as a name",
            next="at most 100 letters, digits, '_', '-' and '.', not beginning with '-' or '.'",
        )
    return name


@dataclass(frozen=True, order=True)
class Rows:
    """The rows `start` to `stop`, the last one excluded."""

    start: int
    stop: int

    def __str__(self) -> str:
        return f"{self.start}-{self.stop}"

    def __len__(self) -> int:
        return self.stop - self.start


class _Id:
    stage: ClassVar[str]

    @property
    def id(self) -> str:
        """The cell's name, for instance `featurize/3/train/0-512`."""
        coordinates = (str(getattr(self, f.name)) for f in fields(self))  # type: ignore[arg-type]
        return "/".join([self.stage, *coordinates])


@dataclass(frozen=True)
class TrainCell(_Id):
    """Trains the checkpoint of one seed on one subset of the train set (`full`: all of it)."""

    stage: ClassVar[str] = "train"
    subset: str
    seed: int


@dataclass(frozen=True)
class MarginsCell(_Id):
    """The model outputs on one target set of a checkpoint that was trained on a subset."""

    stage: ClassVar[str] = "margins"
    subset: str
    seed: int
    targets: str


@dataclass(frozen=True)
class FeaturizeCell(_Id):
    """Writes one chunk of grads: some rows of one split, for one checkpoint."""

    stage: ClassVar[str] = "featurize"
    model_id: int
    split: str
    rows: Rows


@dataclass(frozen=True)
class GramCell(_Id):
    """Sums one checkpoint's XᵀX, which every λ and kernel scale shares."""

    stage: ClassVar[str] = "gram"
    model_id: int


@dataclass(frozen=True)
class KernelCell(_Id):
    """Factorises one checkpoint's XᵀX + λI."""

    stage: ClassVar[str] = "kernel"
    model_id: int


@dataclass(frozen=True)
class PreconditionCell(_Id):
    """Solves one checkpoint's kernel for the grads of one target set."""

    stage: ClassVar[str] = "precondition"
    model_id: int
    targets: str


@dataclass(frozen=True)
class ScoreCell(_Id):
    """Writes one chunk of scores: some train rows against one target set, over the ensemble.

    Of `train` it is their self-influence, the score of each against itself.
    """

    stage: ClassVar[str] = "score"
    targets: str
    rows: Rows


@dataclass(frozen=True)
class CounterfactualCell(_Id):
    """The model outputs on some targets after training without `removed` rows of the train set.

    `whose` most helpful rows they are: a target's row number, or `random` ones.
    """

    stage: ClassVar[str] = "counterfactual"
    targets: str
    whose: str
    removed: int
    seed: int


@dataclass(frozen=True)
class EvaluateCell(_Id):
    """Holds the scores of one target set, or self-influence, against what is known better."""

    stage: ClassVar[str] = "evaluate"
    targets: str


@dataclass(frozen=True)
class ReportCell(_Id):
    """Draws the report of one target set."""

    stage: ClassVar[str] = "report"
    targets: str


Cell = (
    TrainCell
    | MarginsCell
    | FeaturizeCell
    | GramCell
    | KernelCell
    | PreconditionCell
    | ScoreCell
    | CounterfactualCell
    | EvaluateCell
    | ReportCell
)

# The steps of the job graph, in order, and the kinds of cells that a task of each runs.
STEPS: dict[str, tuple[type[Cell], ...]] = {
    "train": (TrainCell, MarginsCell),
    "featurize": (FeaturizeCell,),
    "kernel": (GramCell, KernelCell, PreconditionCell),
    "score": (ScoreCell,),
    "counterfactual": (CounterfactualCell,),
    "evaluate": (EvaluateCell,),
    "report": (ReportCell,),
}
# The stages that a user names, and the steps that each runs, in this order.
STAGE_STEPS: dict[str, tuple[str, ...]] = {
    "train": ("train",),
    "featurize": ("featurize",),
    "reduce": ("kernel", "score"),
    "evaluate": ("counterfactual", "evaluate"),
    "report": ("report",),
}
STAGE_CELLS: dict[str, tuple[type[Cell], ...]] = {
    stage: tuple(kind for step in steps for kind in STEPS[step])
    for stage, steps in STAGE_STEPS.items()
}


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


def _name(text: str) -> str:
    return check_name(text, what="the cell coordinate")


_FORMS: dict[str, tuple[type[Cell], tuple[Callable[[str], object], ...]]] = {
    "train": (TrainCell, (_name, _number)),
    "margins": (MarginsCell, (_name, _number, _name)),
    "featurize": (FeaturizeCell, (_number, _name, _rows)),
    "gram": (GramCell, (_number,)),
    "kernel": (KernelCell, (_number,)),
    "precondition": (PreconditionCell, (_number, _name)),
    "score": (ScoreCell, (_name, _rows)),
    "counterfactual": (CounterfactualCell, (_name, _name, _number, _number)),
    "evaluate": (EvaluateCell, (_name,)),
    "report": (ReportCell, (_name,)),
}


def parse_cell(cell_id: str) -> Cell:
    """The cell that `cell_id` names.

    Raises
    ------
    ConfigError
        If it names none.
    """
    stage, *parts = cell_id.split("/")
    form = _FORMS.get(stage)
    if form is not None and len(parts) == len(form[1]):
        try:
            coordinates = [read(part) for read, part in zip(form[1], parts, strict=True)]
        except ValueError:
            pass
        else:
            cell = form[0](*coordinates)  # type: ignore[arg-type]
            if cell.id == cell_id:  # one spelling per cell
                return cell
    raise ConfigError(f"{cell_id!r} names no cell", next="use the id of a cell of the run")
