"""Whatever goes wrong: the undisturbed run's bytes, or words after which the same command does."""

from __future__ import annotations

import functools
import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fault_injection import Fault, Layer

from trak_dist import open_run, worker
from trak_dist.store import arrays, atomic

HERE = Path(__file__).parent


def campaign(directory: Path, seed: int, count: int) -> None:
    """Cases in a process of its own, which forks."""
    ended = subprocess.run(
        [
            *(sys.executable, str(HERE / "campaign.py"), "--directory", str(directory)),
            *("--seed", str(seed), "--count", str(count)),
        ],
        env={**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    print(ended.stdout[-20_000:])
    assert ended.returncode == 0, ended.stdout[-20_000:] + ended.stderr[-5_000:]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="its processes are forked")
def test_random_faults_lose_nothing(tmp_path: Path) -> None:
    campaign(tmp_path, seed=0, count=12)


@pytest.mark.slow
@pytest.mark.long
def test_five_hundred_random_faults_lose_nothing(tmp_path: Path) -> None:
    campaign(tmp_path, seed=1, count=500)


# What was found, one by one -----------------------------------------------------------------------


def test_after_a_loss_of_power_an_array_can_be_made_and_a_receipt_means_that_its_rows_are_there(
    tmp_path: Path,
) -> None:
    spec = arrays.ArraySpec(shape=(4, 3), chunks=(2, 3), dtype="float32")
    more = replace(spec, shape=(6, 3))
    values = np.arange(6, dtype="float32").reshape(2, 3)

    def work(root: Path) -> None:
        arrays.ensure(root / "run" / "a", spec)
        arrays.write_rows(root / "run" / "a", spec, 2, values)
        atomic.write(root / "run" / "receipts" / "2-4.json", b"{}")
        arrays.grow(root / "run" / "a", more)

    (tmp_path / "counted").mkdir()
    code, counts = below(tmp_path / "counted", Fault(), lambda: work(tmp_path / "counted"))
    assert code == 0
    done = set()
    for at in range(1, sum(counts.values()) + 1):
        root = tmp_path / str(at)
        root.mkdir()
        fault = Fault("power loss", at=at, seed=at)
        code, _ = below(root, fault, functools.partial(work, root))
        assert code == -9
        there = (root / "run" / "receipts" / "2-4.json").exists()
        done.add(there)
        arrays.grow(root / "run" / "a", more)
        if there:
            assert np.array_equal(arrays.read_rows(root / "run" / "a", more, 2, 4), values)
    assert done == {True, False}


def test_a_clock_that_is_set_back_does_not_make_cells_that_took_less_than_no_time(
    command, tiny_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hours = itertools.count(0, -3600)
    monkeypatch.setattr(worker.time, "time", lambda: 1.8e9 + next(hours))
    assert command(*tiny_run, "stage=featurize").code == 0
    receipts = open_run(tmp_path / "run").receipts("featurize").values()
    assert all(0 < r.job["seconds"] < 600 for r in receipts)


# The layer itself ---------------------------------------------------------------------------------


def below(root: Path, fault: Fault, do: object) -> tuple[int, dict[str, int]]:
    """Do something in a forked process above a layer; how that ended, and what it counted."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        layer = Layer(str(root), fault)
        layer.install()
        code = 7
        try:
            do()  # type: ignore[operator]
            code = 0
        finally:
            os.write(write, repr(layer.counts).encode())
            os._exit(code)
    os.close(write)
    _, status = os.waitpid(pid, 0)
    with os.fdopen(read, "rb") as counts:
        text = counts.read().decode()
    return os.waitstatus_to_exitcode(status), eval(text) if text else {}


def left_by_power_losses(tmp_path: Path, publish: object) -> set[bytes | None]:
    """What is at the path that `publish` writes to after a loss at each moment, many times."""
    left: set[bytes | None] = set()
    for seed in range(6):
        for at in itertools.count(1):
            root = tmp_path / f"{seed}-{at}"
            root.mkdir()
            path = root / "plan.json"
            atomic.write(path, b"the first content")
            code, _ = below(root, Fault("power loss", at=at, seed=seed), lambda p=path: publish(p))  # type: ignore[operator]
            left.add(path.read_bytes() if path.exists() else None)
            if code == 0:
                break
            assert code == -9
    return left


def test_a_file_that_is_synced_before_it_is_named_is_never_torn_by_a_loss_of_power(
    tmp_path: Path,
) -> None:
    left = left_by_power_losses(tmp_path, lambda path: atomic.write(path, b"the second content"))
    assert left == {b"the first content", b"the second content"}


def test_a_loss_of_power_tears_what_is_named_before_it_is_synced(tmp_path: Path) -> None:
    def careless(path: Path) -> None:
        path.with_name("aside").write_bytes(b"the second content")
        path.with_name("aside").replace(path)
        path.exists()

    left = left_by_power_losses(tmp_path, careless)
    assert left - {b"the first content", b"the second content"}, "cut short, or zeros"
    assert {b"the first content", b"the second content"} < left


@pytest.mark.parametrize("kind", ["ENOSPC", "EIO", "EACCES"])
def test_a_refusal_comes_at_the_operation_that_was_asked_for(tmp_path: Path, kind: str) -> None:
    """At each in turn: an error of ours, and the old content or the new."""
    root = tmp_path / "root"
    root.mkdir()
    path = root / "plan.json"
    codes = []
    for at in range(1, 40):
        atomic.write(path, b"old")
        code, _ = below(root, Fault(kind, at=at), lambda: atomic.write(path, b"new"))
        codes.append(code)
        assert path.read_bytes() in (b"old", b"new")
        if code == 0:
            break
    assert codes == [7] * (len(codes) - 1) + [0]
    assert len(codes) > 2


def test_the_layer_counts_what_is_done_below_its_root_and_nothing_else(tmp_path: Path) -> None:
    root = tmp_path / "root"
    here = root / "here"
    here.mkdir(parents=True)

    def do() -> None:
        (tmp_path / "elsewhere").write_bytes(b"1")
        (here / "file").write_bytes(b"1")
        (here / "file").read_bytes()
        list(here.iterdir())

    code, counts = below(root, Fault(), do)
    assert code == 0
    assert counts == {"open to write": 1, "write": 1, "open to read": 1, "read": 1, "listdir": 1}
