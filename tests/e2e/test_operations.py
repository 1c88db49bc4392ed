"""What one featurize cell asks of the file system, which may be a shared and slow one."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from command_result import Launch

from trak_dist import worker
from trak_dist.runtime.session import Sessions
from trak_dist.store.run import Run

LIMITS = {
    "open": 14,  # 4 files, one of them twice, and 5 directories; plan; 3 records, if there
    "stat": 5,  # metadata of 3 arrays; the plan, and the one that would follow it
    "fsync": 9,  # 4 files, 4 directories in which they are new, and that of a new directory
    "mkdir": 1,  # of a chunk with columns
    "replace": 4,
    "unlink": 2,  # of a failure that there may be
    "listdir": 1,  # is there another plan?
}


def counted(patch: pytest.MonkeyPatch, below: Path) -> Counter[str]:
    """How often each operation is asked for, on files and directories below a path."""
    calls: Counter[str] = Counter()

    def count(owner: object, name: str, called: str) -> None:
        do: Callable[..., object] = getattr(owner, name)

        def wrapped(at: object, *args: object, **kwargs: object) -> object:
            if name == "fsync" or (not isinstance(at, int) and str(at).startswith(str(below))):
                calls[called] += 1
            return do(at, *args, **kwargs)

        patch.setattr(owner, name, wrapped)

    for name in ("stat", "fsync", "mkdir", "unlink", "listdir"):
        count(os, name, name)
    for name in ("replace", "rename"):
        count(os, name, "replace")
    for owner in (os, io):
        count(owner, "open", "open")
    return calls


def test_a_featurize_cell_asks_for_no_more_than_it_needs(
    launch: Launch, tiny_run: list[str], tmp_path: Path
) -> None:
    assert launch(*tiny_run, "stage=plan").code == 0
    run, sessions = Run.open(tmp_path / "run"), Sessions()
    for metadata in run.layout.store.rglob("zarr.json"):
        os.utime(metadata, (10**9, 10**9))  # made long ago
    cells = [f"featurize/0/train/{at}-{at + 8}" for at in (0, 8, 16)]

    def run_cells(*ids: str) -> bool:
        return worker.run_cells(
            str(tmp_path / "run"), run.plan.fingerprint, "cpu", ids, sessions=sessions
        )

    assert run_cells(*cells[:2])
    session = sessions.open(run, "cpu")
    with pytest.MonkeyPatch.context() as patch:
        calls = counted(patch, tmp_path / "run")
        worker._run_cell(session, worker.parse_cell(cells[2]))
    assert all(calls[name] <= most for name, most in LIMITS.items()), calls
    assert calls.keys() == LIMITS.keys(), calls
    assert run_cells(*cells)
