"""Files that appear whole or not at all: temporary file, fsync, rename, fsync of the directory."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from trak_dist.errors import StoreError


@contextlib.contextmanager
def told(path: Path) -> Iterator[None]:
    """Turn an `OSError` on `path` into a `StoreError` that says what the user can do.

    Raises
    ------
    StoreError
        For a full disk or quota, a missing permission, or any other failure of the file system.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreError(
                f"no disk space: {error.strerror} ({free_bytes(path) / 2**20:,.1f} MiB free)",
                where=str(path),
                next="free some space, then run the same command again: finished cells are kept",
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise StoreError(
                f"not writable: {error.strerror}",
                where=str(path),
                next="run_dir=… a directory that you may write to",
            ) from error
        raise StoreError(
            f"the file system refused: {error}",
            where=str(path),
            next="see that path and file system are right, then run the same command again",
        ) from error


def read(path: Path) -> bytes:
    """What is at `path`.

    Raises
    ------
    FileNotFoundError
        If there is nothing.
    StoreError
        If it can't be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StoreError(
            f"not readable: {error.strerror}",
            where=str(path),
            next="see the permissions of the file, then run the same command again",
        ) from error


def free_bytes(path: Path) -> int:
    """Free bytes of the file system that holds `path` or its nearest existing parent."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def write(path: Path, content: bytes) -> None:
    """Publish `content` at `path`, over what was there.

    Raises
    ------
    StoreError
        If the file system refuses.
    """
    with told(path), _temporary(path) as temporary:
        _write(temporary, content)
        temporary.replace(path)
        fsync_directory(path.parent)


def write_once(path: Path, content: bytes) -> bytes:
    """Publish `content` at `path` unless something is there; return what is there in the end."""
    with told(path), _temporary(path) as temporary:
        _write(temporary, content)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return path.read_bytes()
        fsync_directory(path.parent)
        return content


def publish_directory(path: Path, build: Callable[[Path], None]) -> bool:
    """Build a directory aside and rename it to `path`; False if another process was first.

    Raises
    ------
    StoreError
        If the file system refuses.
    """
    with told(path), _temporary(path) as temporary:
        build(temporary)
        try:
            temporary.rename(path)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                return False
            raise
        fsync_directory(path.parent)
        return True


def fsync_file(path: Path) -> None:
    """Force a written file, and its directory entry, to disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    fsync_directory(path.parent)


def fsync_directory(path: Path) -> None:
    """Force a directory's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A name beside `path`, of which nothing is left behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
