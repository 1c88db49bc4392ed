"""Runs of an earlier version go on: nothing that is there is computed again, and what is lost is.

`stored.py` tells how they were made. Where the processor or torch is another one than theirs, what
is computed again is close, for each rounds sums and products otherwise; grads are float16.
"""

from __future__ import annotations

import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import matplotlib.figure
import numpy as np
import oracle
import pytest
import stored
from command_result import Ended, Launch

from trak_dist import open_run

pytestmark = pytest.mark.slow

# Receipts, of the run or its member, and the cells that they are of; a kernel's are of both.
LOST = {
    "receipts/train/train_full_0.json": ["train/full/0"],
    "receipts/train/train_3_0.json": ["train/3/0"],
    "receipts/margins/margins_2_0_val.json": ["margins/2/0/val"],
    "receipts/featurize/*/1/consolidated.npz": [
        *(f"featurize/1/train/{rows}" for rows in ("0-8", "8-16", "16-24")),
        "featurize/1/val/0-6",
    ],
    "receipts/featurize/*/0/featurize_0_test_0-4.json": ["featurize/0/test/0-4"],
    "receipts/gram/*/*/gram_0.json": ["gram/0"],
    "receipts/kernel/*/*/kernel_1.json": ["kernel/1", "kernel/1"],
    "receipts/precondition/*/*/precondition_0_val.json": ["precondition/0/val"] * 2,
    "receipts/score/score_val_0-24.json": ["score/val/0-24"],
    "sweeps/*/receipts/score/score_train_0-24.json": ["score/train/0-24"],
    "receipts/counterfactual/counterfactual_val_5_2_0.json": ["counterfactual/val/5/2/0"],
    "receipts/counterfactual/counterfactual_test_random_2_0.json": [
        "counterfactual/test/random/2/0"
    ],
    "receipts/evaluate/evaluate_val.json": ["evaluate/val"],
}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each stored run in `tmp_path`, which is where commands are typed."""
    for name in ("launched", "traker"):
        with tarfile.open(stored.STORED / f"{name}.tar.gz") as archive:
            archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", stored.tiny_picture)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return (tmp_path / "launched").rename(tmp_path / "run")


def again(command: Launch) -> None:
    """The last of the commands that made the run, and the one that made its member."""
    for overrides in stored.COMMANDS[-2:]:
        ended = command(*overrides, "trust=true")
        assert ended.code == 0, ended.err


def files(directory: Path) -> dict[str, tuple[bytes, int]]:
    """Content, and when it was written, of all files but logs and what report cells made."""
    return {
        str(path.relative_to(directory)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in directory.rglob("*")
        if path.is_file()
        and "logs" not in path.parts
        and "receipts/report/" not in str(path)
        and path.suffix not in (".html", ".png")
    }


def computed(attempts: list[str]) -> list[str]:
    """The cells that were run, but for reports: another template draws them again."""
    return sorted(cell for cell in attempts if not cell.startswith("report/"))


def scores(run_dir: Path) -> Iterator[np.ndarray]:
    """Those of the run, then those of its member."""
    for home in (run_dir, *run_dir.glob("sweeps/*")):
        found = open_run(home)
        yield from (found.scores("val"), found.scores("test"))
        if found.plan.self_influence:
            yield found.self_influence()[:, None]


def assert_same(found: list[np.ndarray], expected: list[np.ndarray], made_on: Path) -> None:
    same = json.loads(made_on.read_text()) == stored.processor()
    for now, then in zip(found, expected, strict=True):
        if same:
            np.testing.assert_array_equal(now, then)
        else:
            assert oracle.column_errors(now, then.astype(np.float64)).max() < 5e-3


def complete(ended: Ended) -> bool:
    return bool(json.loads(ended.out.splitlines()[-1])["complete"])


def test_a_run_that_is_done_computes_nothing(
    run: Path, command: Launch, attempts: list[str]
) -> None:
    before = files(run)
    again(command)
    assert computed(attempts) == []
    assert files(run) == before
    assert complete(command("stage=status"))
    assert command("stage=verify").code == 0


def test_what_is_lost_is_computed_again_and_nothing_else(
    run: Path, command: Launch, attempts: list[str]
) -> None:
    before, expected = files(run), list(scores(run))
    lost = [path for pattern in LOST for path in sorted(run.glob(pattern))]
    assert len(lost) == len(LOST) + 2
    for path in (*lost, run / "receipts/report/report_test.json"):
        path.unlink()
    again(command)
    assert computed(attempts) == sorted(cell for cells in LOST.values() for cell in cells)
    assert "report/test" in attempts
    after = files(run)
    written = {str(path.relative_to(run)) for path in lost}
    written |= {name for name in before if name.endswith("/0/consolidated.npz")}  # by its Gram
    for name in before.keys() - written:
        assert after[name] == before[name] or "receipts/" not in name, name
    assert_same(list(scores(run)), expected, run / "processor.json")
    assert complete(command("stage=status"))


def test_traks_calls_on_a_run_that_is_done_compute_nothing(
    tmp_path: Path, attempts: list[str]
) -> None:
    before, expected = files(tmp_path / "traker"), list(scores(tmp_path / "traker"))
    found = stored.traker(tmp_path / "traker")
    assert attempts == []
    assert files(tmp_path / "traker") == before
    for name, then in zip(("val", "test"), expected, strict=True):
        np.testing.assert_array_equal(found[name], then)


def test_traks_calls_compute_what_is_lost(tmp_path: Path, attempts: list[str]) -> None:
    run_dir = tmp_path / "traker"
    expected = list(scores(run_dir))
    for pattern in ("featurize/*/1/*.*", "gram/*/*/gram_0.json", "score/score_val_0-24.json"):
        for path in list(run_dir.glob(f"receipts/{pattern}")):
            path.unlink()
    found = stored.traker(run_dir)
    assert sorted(attempts) == [
        *("featurize/1/test/0-4", "featurize/1/train/0-24", "featurize/1/val/0-6"),
        *("gram/0", "score/val/0-24"),
    ]
    assert_same([found["val"], found["test"]], expected, run_dir / "processor.json")
