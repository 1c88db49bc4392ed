"""A layer below all that this process does with the files of one directory: where faults come from.

It takes the place of the functions of `os` and of `open` themselves, so that what a library does is
met as well as what we do. One fault for a process; the product knows nothing of it.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import os
import random
import shutil
import signal
import stat
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

OF_ONE, OF_TWO = (
    ("stat", "scandir", "listdir", "mkdir", "unlink", "rmdir"),
    ("replace", "rename", "link"),
)
# What there is without the layer.
REAL = SimpleNamespace(
    file=io.open, **{name: getattr(os, name) for name in ("open", "fsync", *OF_ONE, *OF_TWO)}
)

READS = ("stat", "scandir", "listdir", "open to read", "read")
WRITES = ("open to write", "write", "fsync", "mkdir", "replace", "rename", "link")
REMOVALS = ("unlink", "rmdir")
# Where a file system may give such an answer.
REFUSALS = {
    "ENOSPC": WRITES,
    "EIO": (*READS, *WRITES, *REMOVALS),
    "EACCES": (*(set(READS) - {"read"}), *(set(WRITES) - {"write", "fsync"}), *REMOVALS),
    "ESTALE": READS,
}
OF_FILES = (*REFUSALS, "kill", "power loss")


@dataclass
class Fault:
    """What happens, and at which of the file operations that it can happen at.

    `kind` is one of `OF_FILES`, or nothing of a layer's; `lasts` says how many operations a refusal
    lasts for.
    """

    kind: str = "none"
    at: int = 0
    lasts: int = 1
    seed: int = 0

    @property
    def operations(self) -> tuple[str, ...]:
        """Those that count."""
        return REFUSALS.get(self.kind, (*READS, *WRITES, *REMOVALS))


@dataclass
class Layer:
    """The files below `root`, as this process sees them."""

    root: str
    fault: Fault
    counts: dict[str, int] = field(default_factory=dict)
    listings: dict[str, tuple[float, frozenset[str]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._met = 0
        self._lock = threading.RLock()
        lost = Path(f"{self.root}.lost") if self.fault.kind == "power loss" else None
        self._disk = Disk(lost, random.Random(self.fault.seed))

    def install(self) -> None:
        """Put it below this process, for good."""
        for name in OF_ONE:
            setattr(os, name, self._of_one(name))
        for name in OF_TWO:
            setattr(os, name, self._of_two(name))
        os.remove = os.unlink
        os.fsync = self._fsync
        os.open = self._descriptor
        io.open = builtins.open = self._file  # type: ignore[assignment]
        shutil._use_fd_functions = False  # type: ignore[attr-defined]  # by paths, which tell

    def meet(self, operation: str, path: str) -> None:
        """An operation is about to happen: count it, and let the fault happen if it is its turn."""
        with self._lock:
            self.counts[operation] = self.counts.get(operation, 0) + 1
            if self.fault.kind not in OF_FILES or operation not in self.fault.operations:
                return
            self._met += 1
            if not self.fault.at <= self._met < self.fault.at + self.fault.lasts:
                return
            happened = f"{self.fault.kind} at {operation} {path[len(self.root) + 1 :]}"
            note(self.root, happened)
            if self.fault.kind == "power loss":
                self._disk.lose()
            if self.fault.kind in ("power loss", "kill"):
                os.kill(os.getpid(), signal.SIGKILL)
            code = getattr(errno, self.fault.kind)
            raise OSError(code, os.strerror(code), path)

    def ours(self, path: Any) -> str:
        """The absolute path of what lies below the root, else nothing."""
        if isinstance(path, int):
            return ""
        absolute = os.path.abspath(os.fspath(path))  # noqa: PTH100
        return (
            absolute if isinstance(absolute, str) and absolute.startswith(self.root + "/") else ""
        )

    def _of_one(self, name: str) -> Callable[..., Any]:
        do = getattr(REAL, name)

        def call(path: Any = ".", *args: Any, **kwargs: Any) -> Any:
            ours = "" if kwargs.get("dir_fd") is not None else self.ours(path)
            if not ours:
                return do(path, *args, **kwargs)
            with self._lock:
                self.meet(name, ours)
                if name in ("unlink", "rmdir", "mkdir"):
                    return self._changing(name, ours, lambda: do(path, *args, **kwargs))
                self._refuse_unseen(ours)
                seen = self._seen_before(ours)
                if seen is None or name == "stat":
                    return do(path, *args, **kwargs)
                return sorted(seen) if name == "listdir" else Entries(ours, sorted(seen))

        return call

    def _of_two(self, name: str) -> Callable[..., Any]:
        do = getattr(REAL, name)

        def call(source: Any, target: Any, **kwargs: Any) -> Any:
            ours = self.ours(target)
            if not ours:
                return do(source, target, **kwargs)
            with self._lock:
                self.meet(name, ours)
                made = lambda: do(source, target, **kwargs)  # noqa: E731
                return self._changing(name, ours, made, source=self.ours(source))

        return call

    def _fsync(self, descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")  # noqa: PTH115
        with self._lock:
            if self.ours(path):
                self.meet("fsync", path)
            REAL.fsync(descriptor)
            self._disk.synced(descriptor, path)

    def _descriptor(self, path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        ours = "" if kwargs.get("dir_fd") is not None else self.ours(path)
        if ours:
            self.meet(
                "open to write" if flags & (os.O_WRONLY | os.O_RDWR) else "open to read", ours
            )
        return REAL.open(path, flags, *args, **kwargs)

    def _file(self, file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        ours = self.ours(file)
        if not ours:
            return REAL.file(file, mode, *args, **kwargs)
        unbuffered = kwargs.get("buffering", *args[:1] or (-1,)) == 0
        with self._lock:
            if set(mode) & set("wax+"):
                self.meet("open to write", ours)
                make = lambda: Raw(self, ours, mode.replace("b", "").replace("t", ""))  # noqa: E731
                raw = make() if _is_file(ours) else self._changing("create", ours, make)
                if unbuffered:
                    return raw
                buffered: Any = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            else:
                self.meet("open to read", ours)
                self._refuse_unseen(ours)
                buffered = io.BufferedReader(Raw(self, ours, "r"))
        kwargs.pop("buffering", None)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *args[1:], **kwargs)

    def _changing(self, name: str, path: str, do: Callable[[], Any], *, source: str = "") -> Any:
        result = self._disk.changing(name, path, do, source=source)
        self.listings.pop(os.path.dirname(path), None)  # noqa: PTH120  # one sees one's own changes
        return result

    def _seen_before(self, path: str) -> frozenset[str] | None:
        until, names = self.listings.get(path, (0.0, frozenset()))
        return names if time.monotonic() < until else None

    def _refuse_unseen(self, path: str) -> None:
        """Raise `FileNotFoundError` if this node still believes that there is no such thing."""
        parts = path[len(self.root) + 1 :].split("/") if self.listings else []
        for depth, part in enumerate(parts):
            seen = self._seen_before("/".join((self.root, *parts[:depth])))
            if seen is not None and part not in seen:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)


class Raw(io.FileIO):
    """A file whose reads and writes are operations of a layer."""

    def __init__(self, layer: Layer, path: str, mode: str) -> None:
        self._layer, self._path = layer, path
        super().__init__(path, mode)

    def write(self, content: Any) -> int:
        with self._layer._lock:
            self._layer.meet("write", self._path)
            self._layer._disk.dirty(self.fileno())
            return super().write(content) or 0

    def readinto(self, buffer: Any) -> int:
        self._layer.meet("read", self._path)
        return super().readinto(buffer) or 0

    def readall(self) -> bytes:
        self._layer.meet("read", self._path)
        return super().readall()


class Entries:
    """What `os.scandir` gives: the names of a listing that is no longer true, maybe."""

    def __init__(self, directory: str, names: list[str]) -> None:
        self._entries = iter([Entry(directory, name) for name in names])

    def __iter__(self) -> Entries:
        return self

    def __next__(self) -> Entry:
        return next(self._entries)

    def __enter__(self) -> Entries:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def close(self) -> None:
        pass


class Entry:
    """One name of it; all else is asked of the file."""

    def __init__(self, directory: str, name: str) -> None:
        self.name, self.path = name, f"{directory}/{name}"

    def __fspath__(self) -> str:
        return self.path

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        return os.path.isdir(self.path)  # noqa: PTH112

    def is_file(self, *, follow_symlinks: bool = True) -> bool:
        return os.path.isfile(self.path)  # noqa: PTH113

    def is_symlink(self) -> bool:
        return False


class Disk:
    """What is only in memory yet: content that was not synced, names whose directory was not.

    `lose` is the loss of power. Of a file that was not synced any part may be there, or zeros; of
    the names of a directory those up to some moment since it was last synced. What POSIX does not
    promise is taken away, more than most file systems would.
    """

    def __init__(self, stash: Path | None, chance: random.Random) -> None:
        self._stash, self._random = stash, chance
        self._files: dict[tuple[int, int], int] = {}
        self._undo: dict[str, list[Callable[[], None]]] = {}

    def dirty(self, descriptor: int) -> None:
        """A file is written to."""
        there = os.fstat(descriptor)
        if self._stash and (there.st_dev, there.st_ino) not in self._files:
            self._files[there.st_dev, there.st_ino] = os.dup(descriptor)

    def synced(self, descriptor: int, path: str) -> None:
        """A file's content, or a directory's names, are on disk."""
        there = os.fstat(descriptor)
        kept = self._files.pop((there.st_dev, there.st_ino), None)
        if kept is not None:
            os.close(kept)
        self._undo.pop(path, None)

    def changing(self, name: str, path: str, do: Callable[[], Any], *, source: str = "") -> Any:
        """Do what changes the names of a directory, and remember how it was."""
        if not self._stash:
            return do()
        undo = getattr(self, f"_{name}")(path, source)
        result = do()
        self._undo.setdefault(os.path.dirname(path), []).append(undo)  # noqa: PTH120
        return result

    def lose(self) -> None:
        """Lose what is not on disk, more or less of it."""
        for descriptor in self._files.values():
            size = os.fstat(descriptor).st_size
            there = self._random.choice([0, size, self._random.randint(0, size)])
            os.ftruncate(descriptor, there)
            if self._random.random() < 0.5:  # the length is on disk, what is in it is not
                os.ftruncate(descriptor, size)
        for undos in self._undo.values():
            kept = self._random.choice([0, len(undos), self._random.randint(0, len(undos))])
            for undo in reversed(undos[kept:]):
                undo()

    def _kept(self, path: str) -> str:
        """Another name for the file at `path`, which stays; nothing if there is none."""
        if not _is_file(path):
            return ""
        REAL.link(path, name := self._name())
        return name

    def _name(self) -> str:
        assert self._stash
        with contextlib.suppress(FileExistsError):
            REAL.mkdir(self._stash)
        return f"{self._stash}/{uuid.uuid4().hex}"

    def _away(self, path: str, _: str = "") -> Callable[[], None]:
        return lambda: _move(path, self._name())

    _create = _mkdir = _link = _away

    def _unlink(self, path: str, _: str) -> Callable[[], None]:
        kept = self._kept(path)
        return lambda: _move(kept, path) if kept else None

    def _rmdir(self, path: str, _: str) -> Callable[[], None]:
        return lambda: REAL.mkdir(path)

    def _replace(self, path: str, source: str) -> Callable[[], None]:
        kept = self._kept(path)

        def undo() -> None:
            _move(path, source)
            if kept:
                _move(kept, path)

        return undo

    _rename = _replace


def _is_file(path: str) -> bool:
    try:
        return stat.S_ISREG(REAL.stat(path).st_mode)
    except OSError:
        return False


def _move(source: str, target: str) -> None:
    with contextlib.suppress(OSError):  # gone with its directory
        REAL.replace(source, target)


def note(root: str, text: str) -> None:
    """Tell the campaign what happened, in a file beside the root."""
    descriptor = REAL.open(f"{root}.happened", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(descriptor, f"{text}\n".encode())
    os.close(descriptor)


def step_clock(seed: int) -> None:
    """Let the wall clock jump by up to hours, to and fro, now and then."""
    chance, real = random.Random(seed), time.time
    offset = 0.0

    def jumping() -> float:
        nonlocal offset
        if chance.random() < 0.3:
            offset = chance.uniform(-7200, 7200)
        return real() + offset

    time.time = jumping
