"""Tables: what is read of them, standardised, trained, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pyarrow as pa
import pytest
import safetensors.torch
import torch
from command_result import Launch
from pyarrow import parquet

from trak_dist import open_run
from trak_dist.errors import ConfigError, DatasetError
from trak_dist.problem import Problem
from trak_dist.problems import table

ROWS, TARGETS = 60, 6
NO = "which is no finite number"
EXACT = (
    *("projection=identity", "featurize.dtype=float32", "reduce.curvature=none"),
    *("reduce.lambda_reg=0.1", "reduce.kernel_scale=none", "cluster=debug", "checkpoints.train=2"),
    *("problem.hidden=[5]", "problem.epochs=5"),
)
LAMBDA = {"lambda_reg": 0.1, "lambda_unit": "mean_diagonal", "kernel_scale": "none"}


def columns(count: int, seed: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    a, b = draw.normal(1e9, 3, count), draw.normal(0, 0.01, count)
    value = (a - 1e9) + 100 * b + draw.normal(0, 0.1, count)
    return {"a": a, "b": b, "value": value, "kind": np.where(value > 0, "up", "down")}


def write(path: Path, count: int, seed: int, *names: str) -> Path:
    chosen = {n: v for n, v in columns(count, seed).items() if n in names}
    if path.suffix == ".parquet":
        parquet.write_table(pa.table(chosen), path)
        return path
    lines = [
        ",".join(chosen),
        *(",".join(map(str, row)) for row in zip(*chosen.values(), strict=True)),
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def standardised(count: int, seed: int) -> np.ndarray:
    train, rows = columns(ROWS, 1), columns(count, seed)
    return np.stack([(rows[n] - train[n].mean()) / train[n].std() for n in ("a", "b")], axis=1)


def members(directory: Path, train: Any, targets: Any, outputs: int) -> list[oracle.Member]:
    net = torch.nn.Sequential(torch.nn.Linear(2, 5), torch.nn.ReLU(), torch.nn.Linear(5, outputs))
    files = (directory / f"run/checkpoints/full/{seed}.safetensors" for seed in range(2))
    states = [safetensors.torch.load_file(file) for file in files]
    if outputs > 1:
        return [oracle.member(net, state, train, targets) for state in states]
    made = []
    for state in states:
        net.load_state_dict(state)
        exact = net.double()

        def rows(of: Any, exact: torch.nn.Module = exact) -> tuple[np.ndarray, np.ndarray]:
            grads, q = [], []
            for x, y in of:
                f = -(y - exact(x[None])[0, 0]).abs()
                found = torch.autograd.grad(f, list(exact.parameters()))
                grads.append(np.concatenate([g.numpy().ravel() for g in found]))
                q.append(-float(f.detach()))
            return np.array(grads) / math.sqrt(len(grads[0])), np.array(q)

        (x, q), (g, _) = rows(train), rows(targets)
        made.append(oracle.Member(x, g, q))
        net.float()
    return made


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_table_of_classes_is_trained_and_scored_as_in_float64(
    kind: str, launch: Launch, tmp_path: Path
) -> None:
    names = ("a", "b", "kind")
    ended = launch(
        *("problem=table", "problem.target=kind", *EXACT, f"run_dir={tmp_path / 'run'}"),
        f"problem.train={write(tmp_path / f'train.{kind}', ROWS, 1, *names)}",
        f"problem.targets.val={write(tmp_path / f'val.{kind}', TARGETS, 2, *names)}",
    )
    assert ended.code == 0, ended.err
    assert "table: 2 features, a, b; kind is predicted, of 2 classes" in ended.out
    train, val = (
        [
            (torch.tensor(x), int(k == "up"))
            for x, k in zip(standardised(*of), columns(*of)["kind"], strict=True)
        ]
        for of in ((ROWS, 1), (TARGETS, 2))
    )
    wanted, _ = oracle.scores(members(tmp_path, train, val, 2), **LAMBDA)
    assert oracle.column_errors(open_run(tmp_path / "run").scores("val"), wanted).max() < 2e-4


def test_a_regression_is_trained_and_scored_as_in_float64(launch: Launch, tmp_path: Path) -> None:
    names = ("a", "b", "value")
    ended = launch(
        *("problem=table", "problem.target=value", *EXACT, f"run_dir={tmp_path / 'run'}"),
        "problem.task=regression",
        f"problem.train={write(tmp_path / 'train.csv', ROWS, 1, *names)}",
        f"problem.targets.val={write(tmp_path / 'val.csv', TARGETS, 2, *names)}",
    )
    assert ended.code == 0, ended.err
    values = columns(ROWS, 1)["value"]
    train, val = (
        [
            (torch.tensor(x), (y - values.mean()) / values.std())
            for x, y in zip(standardised(*of), columns(*of)["value"], strict=True)
        ]
        for of in ((ROWS, 1), (TARGETS, 2))
    )
    wanted, _ = oracle.scores(members(tmp_path, train, val, 1), **LAMBDA)
    assert oracle.column_errors(open_run(tmp_path / "run").scores("val"), wanted).max() < 2e-4


def test_what_is_trained_predicts(tmp_path: Path) -> None:
    train = write(tmp_path / "train.csv", 400, 1, "a", "b", "value")
    val = write(tmp_path / "val.csv", 50, 2, "a", "b", "value")
    problem = table.problem(str(train), {"val": str(val)}, "value", task="regression")
    assert problem.train_checkpoint
    problem.model.load_state_dict(problem.train_checkpoint(problem.train, 0, torch.device("cpu")))
    rows, values = (
        torch.stack(column)
        for column in zip(*(problem.targets["val"][i] for i in range(50)), strict=True)
    )
    assert values.shape == (50, 1)
    assert (problem.model(rows) - values).square().mean() < 0.1 * values.var()


def made(tmp_path: Path, text: str, **settings: Any) -> Problem:
    (tmp_path / "train.csv").write_text(text)
    given = {"train": str(tmp_path / "train.csv"), "targets": {}, "target": "y"}
    return table.problem(**{**given, **settings})


def test_whole_numbers_are_classes_in_their_order_and_a_constant_column_stays(
    tmp_path: Path,
) -> None:
    problem = made(tmp_path, "x,c,y\n1,7,10\n2,7,9\n3,7,-2\n4,7,10\n")
    assert [int(problem.train[row][1]) for row in range(4)] == [2, 1, 0, 2]
    assert [float(problem.train[row][0][1]) for row in range(4)] == [0.0] * 4
    assert problem.render
    assert problem.render(problem.train[2]).label == "y -2"
    raw = made(tmp_path, "x,c,y\n1,7,10\n2,7,9\n", standardise=False)
    assert raw.train[1][0].tolist() == [2.0, 7.0]


@pytest.mark.parametrize(
    ("text", "settings", "kind", "what"),
    [
        ("x,y\n1,a\n,b\nnan,a\n", {}, DatasetError, f"column 'x' holds '', {NO}, in rows 1, 2"),
        ("x,city,y\n1,Rome,a\n2,Oslo,b\n", {}, DatasetError, "column 'city' holds 'Rome', which"),
        ("x,y\n1,a\n2,\n3,b\n", {}, DatasetError, "column 'y' holds '' in row 1, no class of"),
        ("x,y\n1,a\n2,a\n", {}, DatasetError, "column 'y' has one class"),
        ("x,z\n1,3\n2,4\n", {}, DatasetError, "there is no column y; there are x, z"),
        ("x,y\n1,a\n2,b\n", {"columns": ["w"]}, DatasetError, "there is no column w"),
        ("y\na\nb\n", {}, DatasetError, "there are no features beside the target"),
        ("x,y\n1,a\n2,b\n", {"task": "ranking"}, ConfigError, "'ranking' is not one of classi"),
        ("x,y\n1,a\n2,b\n", {"task": "regression"}, DatasetError, "column 'y' holds 'a', which"),
        ("x,y\n1,a\n2,b\n", {"model": "net"}, ConfigError, "'net' is not of the form module:f"),
        ("x,y\n1,a\n2,b\n", {"target": None}, ConfigError, "not given: problem.target"),
        ("x,x,y\n1,1,a\n2,2,b\n", {}, DatasetError, "two columns have one name"),
        ("x,y\n1,3\n2,4\n", {"columns": ["x", "y"]}, ConfigError, "y is a feature and what is p"),
        ("x,y\n1,a\n2,b\n", {"target": "z"}, DatasetError, "there is no column z; there are x, y"),
        ("x,y\n1,a\n2,b\n", {"targets": {"train": "val.csv"}}, ConfigError, "a target set"),
        ("x,y\n1,a\n2,b\n", {"targets": "val.csv"}, ConfigError, "target sets have names, and "),
    ],
)  # fmt: skip
def test_tables_that_do_not_fit_are_refused(
    text: str, settings: dict[str, Any], kind: type[Exception], what: str, tmp_path: Path
) -> None:
    with pytest.raises(kind) as raised:
        made(tmp_path, text, **settings)
    assert str(raised.value).startswith(what)


def test_one_column_one_width_and_one_checkpoint_need_no_list(tmp_path: Path) -> None:
    text = "area,y,z\n1,a,5\n2,b,5\n"
    problem = made(tmp_path, text, columns="area", hidden=3, checkpoints="net.pt")
    assert problem.train[0][0].shape == (1,)
    assert problem.model[0].out_features == 3
    assert list(problem.checkpoints) == ["net.pt"]


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        (
            '{"x": 1, "y": 0}\n{"x": 2, "y": 1}\n{"x": 3, "y": NaN}\n',
            "column 'y' holds '' in row 2",
        ),
        (f'{{"x": 1{"0" * 400}, "y": 0}}\n{{"x": 2, "y": 1}}\n', f"column 'x' holds 1{'0' * 59}, "),
    ],
    ids=["a class that is NaN", "a number that no float holds"],
)
def test_numbers_of_json_that_are_none_are_refused(rows: str, what: str, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(rows)
    with pytest.raises(DatasetError) as raised:
        table.problem(train=str(tmp_path / "train.jsonl"), targets={}, target="y")
    assert str(raised.value).startswith(what)


def test_a_target_of_a_class_that_is_not_trained_on_is_refused(tmp_path: Path) -> None:
    (tmp_path / "val.csv").write_text("x,y\n1,c\n")
    with pytest.raises(DatasetError, match="column 'y' holds 'c' in row 0, no class of the train"):
        made(tmp_path, "x,y\n1,a\n2,b\n", targets={"val": str(tmp_path / "val.csv")})


def test_numbers_that_are_not_whole_are_no_classes(tmp_path: Path) -> None:
    with pytest.raises(DatasetError) as raised:
        made(tmp_path, "x,y\n1,2\n2,0.25\n3,1\n")
    assert str(raised.value) == (
        "column 'y' holds numbers that are not whole, such as 0.25: values, not classes\n"
        f"  where: {tmp_path / 'train.csv'}\n"
        "  next:  problem.task=regression; or, of classes, names that are no numbers"
    )
    assert len(made(tmp_path, "x,y\n1,2.0\n2,1.0\n").targets) == 0
    assert made(tmp_path, "x,y\n1,0.5\n2,half\n").model[-1].out_features == 2
    assert made(tmp_path, "x,y\n1,2\n2,0.25\n", task="regression").model[-1].out_features == 1


@pytest.mark.parametrize("index", ["", "Unnamed: 0", "__index_level_0__"])
def test_an_index_without_a_name_is_no_feature_unless_it_is_named(
    index: str, tmp_path: Path
) -> None:
    text = f"{index},x,y\n0,5,a\n1,6,b\n"
    problem = made(tmp_path, text)
    assert problem.train[0][0].shape == (1,)
    assert problem.notes
    assert list(problem.notes()) == [
        "table: 1 features, x; y is predicted, of 2 classes",
        f"table: column {index!r} is left out, as an index: problem.columns may name it",
    ]
    both = made(tmp_path, text, columns=[index, "x"])
    assert both.train[0][0].shape == (2,)
    assert both.notes
    assert len(list(both.notes())) == 1
