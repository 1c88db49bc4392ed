"""What a shared file system shows a reader: names older than files, files replaced under it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from test_receipts import CELL, FEATURIZE, PLAN, failure, receipt

from trak_dist.errors import StoreError
from trak_dist.store import arrays, atomic
from trak_dist.store.layout import Layout
from trak_dist.store.receipts import Receipts


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "run")


@pytest.fixture
def receipts(layout: Layout) -> Receipts:
    return Receipts(layout, PLAN)


def refusing(monkeypatch: pytest.MonkeyPatch, name: str, code: int, times: int) -> list[Path]:
    """Let `times` calls of a method of `Path` fail; the paths that it was called on."""
    asked: list[Path] = []
    do: Callable[..., object] = getattr(Path, name)

    def refuse(self: Path, *args: object, **kwargs: object) -> object:
        asked.append(self)
        if len(asked) <= times:
            raise OSError(code, os.strerror(code), str(self))
        return do(self, *args, **kwargs)

    monkeypatch.setattr(Path, name, refuse)
    return asked


@pytest.mark.parametrize("name", ["read_bytes", "iterdir", "exists"])
def test_what_was_replaced_while_it_was_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = tmp_path / "receipt.json"
    path.write_bytes(b"{}")
    asked = refusing(monkeypatch, name, errno.ESTALE, times=3)
    if name == "read_bytes":
        assert atomic.read(path) == b"{}"
    elif name == "iterdir":
        assert atomic.names(tmp_path) == {"receipt.json"}
    else:
        assert atomic.exists(path)
    assert len(asked) == 4


def test_a_file_that_stays_stale_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing(monkeypatch, "read_bytes", errno.ESTALE, times=99)
    with pytest.raises(StoreError, match=r"not readable: Stale file handle\n  where: .*receipt"):
        atomic.read(tmp_path / "receipt.json")


def test_receipts_that_are_consolidated_while_they_are_read_are_not_missed(
    receipts: Receipts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A listing from before, of names whose files are gone; and columns replaced under it."""
    cells = [c for c in FEATURIZE if c.model_id == 0]
    for cell in cells:
        receipts.publish(cell, receipt(cell))
    names = atomic.names

    def listed_before(directory: Path) -> set[str]:
        there = names(directory)
        monkeypatch.setattr(atomic, "names", names)
        receipts.consolidate(0)
        refusing(monkeypatch, "read_bytes", errno.ESTALE, times=1)
        return there

    monkeypatch.setattr(atomic, "names", listed_before)
    assert set(receipts.done(cells)) == set(cells)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("name", ["read_bytes", "iterdir"])
def test_receipts_that_cannot_be_read_are_not_taken_for_missing(
    receipts: Receipts, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    receipts.publish(CELL, receipt(CELL))
    receipts.fail(CELL, failure(CELL))
    refusing(monkeypatch, name, code, times=99)
    for ask in (receipts.done, receipts.failures):
        with pytest.raises(StoreError, match=f"not readable: {os.strerror(code)}"):
            ask([CELL])


def test_columns_that_cannot_be_read_are_not_replaced(
    receipts: Receipts, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    receipts.publish(CELL, receipt(CELL))
    receipts.consolidate(0)
    before = layout.consolidated(PLAN, CELL).read_bytes()
    with monkeypatch.context() as patch:
        refusing(patch, "read_bytes", errno.EIO, times=99)
        with pytest.raises(StoreError, match="not readable: Input/output error"):
            receipts.consolidate(0)
    assert layout.consolidated(PLAN, CELL).read_bytes() == before


def test_a_plan_that_the_listing_does_not_show_yet_is_found_by_its_name(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout.run_dir.mkdir()
    for generation in range(3):
        layout.plan(generation).write_bytes(b"")
    monkeypatch.setattr(atomic, "names", lambda _: {"plan.json", "plan.1.json"})
    assert layout.generation() == 2


def test_other_names_beside_plans_and_jobs_are_no_plans_and_no_jobs(layout: Layout) -> None:
    (layout.run_dir / "jobs" / "4").mkdir(parents=True)
    for name in ("plan.json", "plan.2.json", "plan.x.json", "plan.3.json.old", "plan.03.json"):
        (layout.run_dir / name).touch()
    for name in ("1.json", "3.json", "x.json", ".5.json.f00"):
        (layout.run_dir / "jobs" / name).touch()
    assert layout.generation() == 2
    assert layout.jobs() == [1, 3]


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO])
def test_a_run_that_may_not_be_looked_at_is_reported(
    layout: Layout, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    refusing(monkeypatch, "exists", code, times=1)
    with pytest.raises(StoreError, match=f"not readable: {os.strerror(code)}"):
        layout.generation()


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO])
def test_an_array_that_may_not_be_looked_at_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    spec = arrays.ArraySpec(shape=(2,), chunks=(2,), dtype="float32")
    refusing(monkeypatch, "exists", code, times=99)
    for look in (
        lambda: arrays.ensure_group(tmp_path),
        lambda: arrays.ensure(tmp_path / "a", spec),
        lambda: arrays.read_rows(tmp_path / "a", spec, 0, 2),
    ):
        with pytest.raises(StoreError, match=f"not readable: {os.strerror(code)}"):
            look()


def test_a_directory_that_is_made_though_it_is_not_seen_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NFS, whose server says that it exists while the client still believes that not."""
    (tmp_path / "jobs").mkdir()
    monkeypatch.setattr(Path, "is_dir", lambda self: self == tmp_path)
    atomic.write(tmp_path / "jobs" / "1.json", b"{}")
    assert (tmp_path / "jobs" / "1.json").read_bytes() == b"{}"
