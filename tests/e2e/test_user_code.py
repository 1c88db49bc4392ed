"""What a problem's own code raises, while planning and in a worker, is told with row and split."""

from __future__ import annotations

import dataclasses
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from command_result import Ended
from torch import nn

from trak_dist import ImageClassification

ROWS = 40


class Raising(tiny.Rows):
    """A dataset of which one row can't be read."""

    def __init__(self, row: int, error: BaseException) -> None:
        super().__init__(ROWS, seed=1)
        self.row, self.error = row, error

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if index == self.row:
            raise self.error
        return super().__getitem__(index)


class AtOnce(Raising):
    def __getitems__(self, rows: list[int]) -> list[Any]:
        return [self[row] for row in rows]


class Endless(tiny.Rows):
    def __len__(self) -> int:
        raise OSError("gone")


@pytest.fixture
def run_problem(
    launch: Callable, tiny_run: list[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Ended]:
    """Run the tiny problem with some fields replaced, as if in a fresh process."""
    real = tiny.problem

    def run(*overrides: str, **changes: Any) -> Ended:
        def problem(directory: str) -> Any:
            if error := changes.get("error"):
                raise error
            return dataclasses.replace(real(directory), **changes)

        monkeypatch.setattr(tiny, "problem", problem)
        return launch(*tiny_run, "targets=val", *overrides)

    return run


def raises(error: BaseException) -> Callable:
    def function(*_: object) -> None:
        raise error

    return function


class Ending(ImageClassification):
    def get_batch_output(self, *_: object) -> torch.Tensor:
        raise SystemExit(0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"error": SystemExit(0)}, "tiny.problem raised SystemExit: 0"),
        ({"error": OSError("gone")}, "tiny.problem raised OSError: gone"),
        ({"train": Raising(39, OSError("gone"))}, "reading row 39 of 'train' raised OSError: gone"),
        ({"train": Raising(0, SystemExit(0))}, "reading row 0 of 'train' raised SystemExit: 0"),
        ({"train": Endless(5, 0)}, "len() of the dataset 'train' raised OSError: gone"),
        ({"collate": raises(KeyError("x"))}, "collate of row 0 of 'train' raised KeyError: 'x'"),
        ({"collate": iter}, "a batch holds builtins.list_iterator, not tensors"),
        ({"collate": iter}, "where: problem.collate, row 0 of 'train'"),
        ({"render": raises(KeyError("x"))}, "render of row 0 of 'train' raised KeyError: 'x'"),
        ({"model_output": Ending()}, "the problem's code raised SystemExit: 0"),
    ],
)
def test_what_raises_while_planning_is_reported_and_nothing_is_planned(
    run_problem, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    ended = run_problem(**changes)
    assert ended.code == 2, ended.err
    assert said in ended.err
    assert "Traceback" not in ended.err
    assert not (tmp_path / "run").exists()


def test_an_interrupted_problem_function_interrupts(run_problem) -> None:
    assert run_problem(error=KeyboardInterrupt()).code == 130


@pytest.mark.parametrize("kind", [Raising, AtOnce])
def test_a_row_that_a_worker_can_not_read_is_named_and_fails_its_cell_alone(
    run_problem, kind: type[Raising]
) -> None:
    ended = run_problem("stage=featurize", train=kind(20, OSError("gone")))
    assert ended.code == 1
    assert "3 of 18 cells are not done" in ended.err
    assert "featurize/0/train/16-24, and 2 more with the same error" in ended.err
    assert "reading row 20 of 'train' raised OSError: gone" in ended.err
    assert "Traceback" not in ended.err


def test_a_worker_whose_model_ends_the_process_fails_its_cell(run_problem) -> None:
    class Ends(ImageClassification):
        def get_batch_output(self, model, weights, buffers, batch) -> torch.Tensor:
            if len(batch[0]) == 3:  # the only such batch is the last one of val
                raise SystemExit(0)
            return super().get_batch_output(model, weights, buffers, batch)

    ended = run_problem("stage=featurize", model_output=Ends())
    assert ended.code == 1
    assert "featurize/0/val/0-7" in ended.err
    assert "SystemExit: 0" in ended.err


class Database(tiny.Rows):
    """Rows whose labels are in a database that only the thread that opened it may read."""

    def __init__(self, path: Path) -> None:
        super().__init__(ROWS, seed=1)
        self._path = path / "rows.db"
        self._db = sqlite3.connect(self._path)
        self._db.execute("create table if not exists labels (id integer primary key, label int)")
        listed = list(enumerate(self.labels.tolist()))
        self._db.executemany("insert or replace into labels values (?, ?)", listed)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        found = self._db.execute("select label from labels where id = ?", (index,)).fetchone()
        return self.features[index], found[0]


def test_a_dataset_is_read_in_the_thread_that_made_it(run_problem, tmp_path: Path) -> None:
    database = Database(tmp_path)
    ended = run_problem("stage=featurize", train=database)
    database._db.close()
    assert ended.code == 0, ended.err


def test_a_layer_that_prints_its_address_is_the_same_in_each_process(run_problem) -> None:
    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.function = lambda x: x.tanh()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.function(x)

        def extra_repr(self) -> str:
            return str(self.function)

    def model() -> nn.Module:
        first, _, last = tiny.net()
        return nn.Sequential(first, Calls(), last)

    assert run_problem("stage=plan", model=model()).code == 0
    ended = run_problem("stage=featurize", model=model())
    assert ended.code == 0, ended.err


def test_notes_are_told_when_a_run_is_planned_and_what_they_raise_is_an_error(
    run_problem: Callable[..., Ended],
) -> None:
    def raising() -> list[str]:
        raise KeyError("gone")

    ended = run_problem("stage=plan", notes=raising)
    assert ended.code == 2
    assert "error: the problem's notes raised KeyError: 'gone'" in ended.err
    ended = run_problem("stage=plan", notes=lambda: ["5 texts are cut"])
    assert ended.out.startswith("5 texts are cut\n")
    assert "cut" not in run_problem("stage=plan", notes=lambda: ["5 texts are cut"]).out
