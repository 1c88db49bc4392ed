"""table: rows of numbers, a class or a value to predict, and an MLP or a model of your own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from trak_dist.building import is_import_path
from trak_dist.coordinates import TRAIN
from trak_dist.errors import ConfigError
from trak_dist.listing import first_few
from trak_dist.ops.model_outputs import ImageClassification, Regression
from trak_dist.problem import Problem, Rendered
from trak_dist.problems.given import files_of, several
from trak_dist.problems.own_models import own_model
from trak_dist.problems.pretrained import required
from trak_dist.problems.records import Records, read
from trak_dist.problems.training import classifier_trainer, half_squared_error

TASKS = ("classification", "regression")
INDEX = ("", "Unnamed: 0", "__index_level_0__")  # as pandas writes one that has no name
Row = tuple[Tensor, Tensor]


def problem(  # noqa: PLR0913 -- these are settings
    train: str,
    targets: Mapping[str, str | None],
    target: str,
    model: str | None = None,
    checkpoints: Sequence[str] | str | None = None,
    *,
    task: str = "classification",
    columns: Sequence[str] | str | None = None,
    standardise: bool = True,
    hidden: Sequence[int] | int = (64, 64),
    epochs: int = 30,
    batch_size: int = 64,
    learning_rate: float = 0.02,
    weight_decay: float = 1e-3,
) -> Problem:
    """The margin of a row's class, or minus the distance of a value from its prediction.

    Parameters
    ----------
    train, targets : str, mapping of names to str
        Files: .csv, .parquet, .jsonl, or a folder of `datasets`.
    target : str
        The column to predict.
    model : str, optional
        `module:function`, which gets the numbers of features and of outputs and returns a torch
        module of features (batch, features) to logits, or to values (batch, 1). An MLP where left
        out.
    checkpoints : sequence of str, optional
        State dicts of that model; where left out, `checkpoints.train` of them are trained by SGD.
    task : str
        `classification`, or `regression` by the squared error.
    columns : sequence of str, optional
        The features; where left out all other columns, but for an index without a name.
    standardise : bool
        Whether mean and deviation of the train rows are taken out of features, and of the values
        of a regression.
    hidden, epochs, batch_size, learning_rate, weight_decay
        Of the MLP's layers and of the training.

    Raises
    ------
    ConfigError, ProblemError, DatasetError
        If settings do not fit, or files do not hold what they say.
    """
    required(train=train, target=target)
    if task not in TASKS:
        raise ConfigError(
            f"{task!r} is not one of {', '.join(TASKS)}", where="problem.task", next=TASKS[0]
        )
    if model and not is_import_path(model):
        raise ConfigError(
            f"{model!r} is not of the form module:function",
            where="problem.model",
            next="problem.model=my_module:make_model, importable from where you launch",
        )
    files, chosen = files_of(train, targets), several(columns)
    if target in chosen:
        raise ConfigError(
            f"{target} is a feature and what is predicted",
            where="problem.columns, problem.target",
            next=f"leave {target} out of problem.columns",
        )
    wanted = [*chosen, target] if chosen else []
    records = {n: read(path, wanted, setting=setting) for n, (path, setting) in files.items()}
    _column(records[TRAIN], target)
    names = chosen or [n for n in records[TRAIN].columns if n not in (target, *INDEX)]
    features = {name: _numbers(one, names) for name, one in records.items()}
    classes: list[str] = []
    if task == "classification":
        _check_not_continuous(records[TRAIN], target)
        classes = _classes(_column(records[TRAIN], target))
        values = {name: _class_numbers(one, target, classes) for name, one in records.items()}
    else:
        values = {name: _numbers(one, [target]) for name, one in records.items()}
    center, scale = _moments(features[TRAIN])
    value_center, value_scale = _moments(values[TRAIN]) if not classes else (0.0, 1.0)

    def dataset(name: str) -> TensorDataset:
        x, y = features[name], values[name]
        if standardise:
            x = (x - center) / scale
            y = y if classes else (y - value_center) / value_scale
        return TensorDataset(x.float(), y if classes else y.float())

    widths = several(hidden)

    def made() -> nn.Module:
        outputs = len(classes) or 1
        return own_model(model, len(names), outputs) if model else _mlp(len(names), widths, outputs)

    datasets = {name: dataset(name) for name in records}

    def notes() -> Iterator[str]:
        yield f"table: {len(names)} features, {first_few(names)}; {target} is predicted" + (
            f", of {len(classes)} classes" if classes else ""
        )
        unused = records[TRAIN].columns.keys() - {*names, target}
        for name in (name for name in INDEX if name in unused):
            yield f"table: column {name!r} is left out, as an index: problem.columns may name it"

    return Problem(
        model=made(),
        model_output=ImageClassification() if classes else Regression(),
        train=datasets.pop(TRAIN),
        targets=datasets,
        checkpoints=several(checkpoints),
        render=_renderer(names, target, classes),
        train_checkpoint=classifier_trainer(
            made,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            loss=nn.functional.cross_entropy if classes else half_squared_error,
        ),
        notes=notes,
    )


def _column(records: Records, name: str) -> Sequence[object]:
    if name not in records.columns:
        raise records.error(
            f"there is no column {name}; there are {first_few(list(records.columns), 30)}",
            "the same columns in all files, as problem.target and problem.columns name them",
        )
    return records.columns[name]


def _numbers(records: Records, names: Sequence[str]) -> Tensor:
    """Columns of finite numbers (rows, columns) float64."""
    found = []
    for name in names:
        values = [_number(value) for value in _column(records, name)]
        bad = [row for row, value in enumerate(values) if not math.isfinite(value)]
        if bad:
            raise records.error(
                f"column {name!r} holds {repr(records.columns[name][bad[0]])[:60]}, which is no "
                f"finite number, in row{'s' if len(bad) > 1 else ''} {first_few(bad)}",
                "fill it in or leave the rows out; or leave the column out: "
                "'problem.columns=[NAME,…]'",
            )
        found.append(torch.tensor(values, dtype=torch.float64))
    if not found:
        raise records.error("there are no features beside the target", "see problem.columns")
    return torch.stack(found, dim=1)


def _number(value: object) -> float:
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _check_not_continuous(records: Records, target: str) -> None:
    """Raise `DatasetError` if a column of classes holds numbers, some of which are not whole."""
    values = [_number(value) for value in records.columns[target] if _name(value)]
    broken = [value for value in values if not value.is_integer()]
    if broken and all(map(math.isfinite, values)):
        raise records.error(
            f"column {target!r} holds numbers that are not whole, such as {broken[0]:g}: values, "
            "not classes",
            "problem.task=regression; or, of classes, names that are no numbers",
        )


def _classes(values: Sequence[object]) -> list[str]:
    """The names of classes: whole numbers in their order, before other texts in theirs."""
    names = {_name(value) for value in values} - {""}
    return sorted(names, key=lambda n: (0, int(n), n) if _is_whole(n) else (1, 0, n))


def _name(value: object) -> str:
    missing = value is None or value != value  # noqa: PLR0124 -- as NaN alone does
    return "" if missing else str(value).strip()


def _is_whole(text: str) -> bool:
    return text.removeprefix("-").isdecimal()


def _class_numbers(records: Records, target: str, classes: Sequence[str]) -> Tensor:
    numbers = {name: number for number, name in enumerate(classes)}
    values = [_name(value) for value in _column(records, target)]
    bad = [row for row, value in enumerate(values) if value not in numbers]
    if bad or len(classes) < 2:
        raise records.error(
            f"column {target!r} holds {values[bad[0]]!r} in row {bad[0]}, no class of the train set"
            if bad
            else f"column {target!r} has one class",
            f"classes: {first_few(list(classes), 20)}; problem.task=regression for values",
        )
    return torch.tensor([numbers[value] for value in values])


def _moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of columns; 1 of those that are constant."""
    center, deviation = values.mean(0), values.std(0, correction=0)
    return center, torch.where(deviation > 1e-12 * values.abs().amax(0), deviation, 1.0)


def _mlp(features: int, hidden: Sequence[int], outputs: int) -> nn.Module:
    widths = [features, *hidden]
    layers = [m for a, b in zip(widths, hidden, strict=False) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(widths[-1], outputs)).eval()


def _renderer(
    names: Sequence[str], target: str, classes: Sequence[str]
) -> Callable[[Row], Rendered]:
    """A `render`: the features as the model sees them, the class or the value."""

    def render(row: Row) -> Rendered:
        features, value = row
        pairs = zip(names, features.tolist(), strict=True)
        text = ", ".join(f"{name} {number:.3g}" for name, number in pairs)
        label = classes[int(value)] if classes else f"{float(value):.3g}"
        return Rendered(text, f"{target} {label}")

    return render
