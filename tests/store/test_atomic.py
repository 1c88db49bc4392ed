"""Files appear whole or not at all, whoever writes at once and wherever the writing stops."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from trak_dist.errors import StoreError
from trak_dist.store import atomic

Write = Callable[[Path, bytes], object]
RACERS = 8

_RACE = """
import sys, time
from pathlib import Path
from trak_dist.store import atomic
gate, target, mine = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3].encode()
print("ready", flush=True)
while not gate.exists():
    time.sleep(0.001)
sys.stdout.buffer.write(atomic.write_once(target, mine * 5000))
"""

_NO_LINKS = """
import errno, os
def refuses(*_):
    raise OSError(errno.EPERM, "")
os.link = refuses
"""


def failing(code: int) -> Callable[..., None]:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


def test_write_replaces_what_was_there_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "plan.json"
    atomic.write(path, b"old")
    atomic.write(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_old_content_survives_a_write_that_fails_in_the_middle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "plan.json"
    atomic.write(path, b"old")
    monkeypatch.setattr(*((os, "fsync") if step == "fsync" else (Path, "replace")), failing(5))
    with pytest.raises(StoreError):
        atomic.write(path, b"new and longer")
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_refused_write_leaves_no_temporary_file_to_fill_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    target = (os, "fsync") if step == "fsync" else (Path, "replace")
    monkeypatch.setattr(*target, failing(errno.ENOSPC))
    with pytest.raises(StoreError):
        atomic.write(tmp_path / "plan.json", b"new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("write", [atomic.write, atomic.write_once])
def test_what_a_killed_writer_leaves_does_not_look_like_a_receipt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Write
) -> None:
    seen: list[Path] = []
    publish = os.link if write is atomic.write_once else Path.replace

    def look(source: Path, target: Path) -> object:
        seen.extend(tmp_path.iterdir())
        return publish(source, target)

    monkeypatch.setattr(os, "link", look)
    monkeypatch.setattr(Path, "replace", look)
    write(tmp_path / "kernel_0.json", b"{}")
    (temporary,) = seen
    assert temporary.name.startswith(".")
    assert not temporary.match("*.json")
    assert not temporary.match("*.npz")
    assert list(tmp_path.iterdir()) == [tmp_path / "kernel_0.json"]


@pytest.mark.parametrize("write", [atomic.write, atomic.write_once])
def test_nothing_is_there_until_all_of_it_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Write
) -> None:
    path = tmp_path / "receipt.json"
    there: list[bool] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        there.append(path.exists())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    write(path, b"content")
    assert there == [False, True], (
        "fsync of the file, then publication, then fsync of its directory"
    )


def test_write_once_keeps_the_first_content_and_returns_it(tmp_path: Path) -> None:
    path = tmp_path / "digest.json"
    assert atomic.write_once(path, b"first") == b"first"
    assert atomic.write_once(path, b"second") == b"first"
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_write_once_publishes_nothing_when_it_fails_in_the_middle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "digest.json"
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing(errno.EIO))
        with pytest.raises(StoreError):
            atomic.write_once(path, b"first")
    assert not path.exists()
    assert atomic.write_once(path, b"second") == b"second"


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS])
def test_write_once_where_there_are_no_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(os, "link", failing(code))
    path = tmp_path / "plan 'é'.json"
    assert [atomic.write_once(path, content) for content in (b"one", b"two")] == [b"one"] * 2
    assert path.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [path]


def test_without_hard_links_a_refusal_of_the_rename_is_reported_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", failing(errno.EPERM))
    for code, told in (
        (
            errno.EINVAL,
            (
                "the file system has neither hard links nor a rename that replaces nothing "
                "(renameat2, RENAME_NOREPLACE: Invalid argument)\n"
                f"  where: {tmp_path / 'plan.json'}\n"
                "  next:  run_dir=… on another file system: by one of them two processes can't "
                "both publish a plan"
            ),
        ),
        (
            errno.EPERM,
            (
                "not writable: Operation not permitted\n"
                f"  where: {tmp_path / 'plan.json'}\n"
                "  next:  run_dir=… a directory that you may write to"
            ),
        ),
    ):

        def refuses(*_: object, code: int = code) -> int:
            ctypes.set_errno(code)
            return -1

        libc = SimpleNamespace(renameat2=refuses)
        monkeypatch.setattr(ctypes, "CDLL", lambda *_, libc=libc, **__: libc)
        with pytest.raises(StoreError) as caught:
            atomic.write_once(tmp_path / "plan.json", b"one")
        assert str(caught.value) == told
        assert caught.value.errno == code
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: SimpleNamespace())
    with pytest.raises(StoreError, match="RENAME_NOREPLACE: Function not implemented"):
        atomic.write_once(tmp_path / "plan.json", b"one")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_directory_that_takes_no_fsync_is_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    if code == errno.EIO:
        with pytest.raises(StoreError, match=r"the file system refused: .* Input/output error"):
            atomic.write(tmp_path / "a" / "plan.json", b"one")
        return
    atomic.write(tmp_path / "a" / "plan.json", b"one")
    assert atomic.write_once(tmp_path / "b" / "plan.json", b"two") == b"two"
    assert atomic.publish_directory(tmp_path / "c", lambda path: path.mkdir())


@pytest.mark.parametrize("links", ["", _NO_LINKS], ids=["links", "renames"])
def test_every_process_of_a_race_gets_the_winners_content(tmp_path: Path, links: str) -> None:
    gate, path = tmp_path / "gate", tmp_path / "digest.json"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", links + _RACE, gate, path, str(i)], stdout=subprocess.PIPE
        )
        for i in range(RACERS)
    ]
    for process in processes:
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
    gate.touch()
    got = {process.communicate(timeout=60)[0] for process in processes}
    assert [process.returncode for process in processes] == [0] * RACERS
    assert got == {path.read_bytes()}
    assert len(path.read_bytes()) == 5000


def test_readers_see_whole_content_while_many_threads_write(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    contents = [bytes([65 + i]) * (1000 + i) for i in range(RACERS)]
    atomic.write(path, contents[0])

    def keep_writing(content: bytes) -> None:
        for _ in range(10):
            atomic.write(path, content)

    threads = [threading.Thread(target=keep_writing, args=(c,)) for c in contents]
    for thread in threads:
        thread.start()
    seen = set()
    while any(thread.is_alive() for thread in threads):
        seen.add(path.read_bytes())
    seen.add(path.read_bytes())
    assert seen <= set(contents)
    assert list(tmp_path.iterdir()) == [path]


def _build(content: str) -> Callable[[Path], None]:
    def build(at: Path) -> None:
        at.mkdir()
        (at / "content").write_text(content)

    return build


def test_a_directory_is_published_once_and_the_second_builder_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "models" / "grads"
    assert atomic.publish_directory(path, _build("first")) is True
    assert atomic.publish_directory(path, _build("second")) is False
    assert (path / "content").read_text() == "first"
    assert list(path.parent.iterdir()) == [path]


def test_of_many_threads_exactly_one_publishes_the_directory(tmp_path: Path) -> None:
    path = tmp_path / "grads"
    barrier = threading.Barrier(RACERS)
    won: list[str] = []

    def race(name: str) -> None:
        barrier.wait()
        if atomic.publish_directory(path, _build(name)):
            won.append(name)

    threads = [threading.Thread(target=race, args=(str(i),)) for i in range(RACERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won == [(path / "content").read_text()]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_a_directory_whose_building_fails_is_not_there_nor_its_remains(
    tmp_path: Path, error: BaseException
) -> None:
    def build(at: Path) -> None:
        _build("half")(at)
        raise error

    with pytest.raises((StoreError, KeyboardInterrupt)):
        atomic.publish_directory(tmp_path / "grads", build)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_the_builder_finds_in_its_way_is_not_taken_for_another_winner(
    tmp_path: Path,
) -> None:
    def build(at: Path) -> None:
        at.mkdir()
        at.mkdir()

    with pytest.raises(StoreError):
        atomic.publish_directory(tmp_path / "grads", build)


def test_a_full_disk_says_how_much_is_free_and_that_finished_cells_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", failing(errno.ENOSPC))
    monkeypatch.setattr(atomic, "free_bytes", lambda _: 1536 * 1024)
    with pytest.raises(StoreError) as raised:
        atomic.write(tmp_path / "receipt.json", b"{}")
    assert str(raised.value) == (
        "no disk space: No space left on device (1.5 MiB free)\n"
        f"  where: {tmp_path / 'receipt.json'}\n"
        "  next:  free some space, then run the same command again: finished cells are kept"
    )


def test_a_missing_permission_says_to_use_another_run_dir(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "replace", failing(errno.EACCES))
    with pytest.raises(StoreError) as raised:
        atomic.write(tmp_path / "receipt.json", b"{}")
    assert str(raised.value) == (
        "not writable: Permission denied\n"
        f"  where: {tmp_path / 'receipt.json'}\n"
        "  next:  run_dir=… a directory that you may write to"
    )


def test_free_space_is_that_of_the_nearest_parent_that_exists(tmp_path: Path) -> None:
    assert atomic.free_bytes(tmp_path / "not" / "yet") > 0
