"""Whatever goes wrong: the undisturbed run's bytes, or words after which the same command does."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
from injecting import Fault, Layer

from trak_dist.store import atomic

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
    campaign(tmp_path, seed=0, count=24)


@pytest.mark.slow
@pytest.mark.long
def test_five_hundred_random_faults_lose_nothing(tmp_path: Path) -> None:
    campaign(tmp_path, seed=1, count=500)


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
    assert len(codes) > 3


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
