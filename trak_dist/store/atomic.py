"""Files that appear completely or not at all: temporary file, fsync, rename, fsync of directory."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, TypeVar

from trak_dist.errors import StoreError

STALE_TRIES = 5
UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
_AT_FDCWD, _RENAME_NOREPLACE = -100, 1  # Linux's
Found = TypeVar("Found")
Content = bytes | memoryview


@contextlib.contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn an `OSError` on `path` into a `StoreError` that says what the user can do.

    Raises
    ------
    StoreError
        For a full disk or quota, a missing permission, or any other failure of the file system.
    """
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        raise _write_error(path, error) from error


def _write_error(path: Path, error: OSError) -> StoreError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreError(
            f"no disk space: {error.strerror} ({free_bytes(path) / 2**20:,.1f} MiB free)",
            where=str(path),
            next="free some space, then run the same command again: finished cells are kept",
            errno=error.errno,
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StoreError(
            f"not writable: {error.strerror}",
            where=str(path),
            next="run_dir=… a directory that you may write to",
            errno=error.errno,
        )
    return StoreError(
        f"the file system refused: {error}",
        where=str(path),
        next="check the path and the file system, then run the same command again",
        errno=error.errno,
    )


def free_bytes(path: Path) -> int:
    """Free bytes of the file system that holds `path` or its nearest existing parent."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def read(path: Path) -> bytes:
    """The content of the file at `path`.

    Raises
    ------
    FileNotFoundError
        If there is none.
    StoreError
        If the file system refuses to read it.
    """
    try:
        return path.read_bytes()  # what follows would take as long again
    except FileNotFoundError:
        raise
    except OSError:
        with read_errors(path):
            return retry_stale(path.read_bytes)


def read_some(path: Path, read: Callable[[BinaryIO], Found]) -> Found:
    """What `read` takes of the file at `path`; otherwise as `read`."""

    def opened() -> Found:
        with path.open("rb") as file:
            return read(file)

    with read_errors(path):
        return retry_stale(opened)


def names(directory: Path) -> set[str]:
    """The names in `directory`, which may be missing.

    Raises
    ------
    StoreError
        If the file system refuses to list it.
    """
    try:
        with read_errors(directory):
            return retry_stale(lambda: {path.name for path in directory.iterdir()})
    except FileNotFoundError:
        return set()


def exists(path: Path) -> bool:
    """Whether there is something at `path`.

    Raises
    ------
    StoreError
        If the file system refuses to say.
    """
    with read_errors(path):
        return retry_stale(path.exists)


def retry_stale(look: Callable[[], Found]) -> Found:
    """What `look` finds, asked again where NFS says that a file was replaced meanwhile."""
    for _ in range(STALE_TRIES - 1):
        try:
            return look()
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
    return look()


@contextlib.contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Turn an `OSError` on `path`, which is there, into a `StoreError`.

    Raises
    ------
    StoreError
        For a missing permission, or any other failure of the file system.
    """
    try:
        yield
    except (FileNotFoundError, StoreError):
        raise
    except OSError as error:
        raise StoreError(
            f"not readable: {error.strerror or error}",
            where=str(path),
            next="check permissions and the file system, then run the same command again",
            errno=error.errno,
        ) from error


def write(path: Path, content: bytes) -> None:
    """Publish `content` at `path`, over what was there.

    Raises
    ------
    StoreError
        If the file system refuses.
    """
    with write_errors(path):
        try:
            _replace(path, [content])
        except FileNotFoundError:
            _ensure_directory(path.parent)
            _replace(path, [content])
        fsync_directory(path.parent)


def write_files(files: Iterable[tuple[Path, Sequence[Content]]], *, below: Path) -> None:
    """Publish files, each of several parts, with the names of their directories in `below`.

    Raises
    ------
    StoreError
        If the file system refuses.
    """
    written = []
    for path, content in files:
        with write_errors(path):
            try:
                _replace(path, content)
            except FileNotFoundError:
                path.parent.mkdir(parents=True, exist_ok=True)
                _replace(path, content)
        written.append(path)
    with write_errors(below):
        _fsync_directories(written, below=below)


def _replace(path: Path, content: Sequence[Content]) -> None:
    """Write a file to disk and give it its name, over what was there."""
    temporary = _temporary_name(path)
    try:
        _write(temporary, content)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_once(path: Path, content: bytes) -> bytes:
    """Publish `content` at `path` unless something is there; return what is there in the end."""
    with write_errors(path), _temporary(path) as temporary:
        _write(temporary, [content])
        try:
            _name_once(temporary, path)
        except FileExistsError:
            return read(path)
        fsync_directory(path.parent)
        return content


def _name_once(temporary: Path, path: Path) -> None:
    """Give a file its name, in one step that fails if the name is taken.

    By a hard link or, where there are none, by Linux's rename that replaces nothing. Without either
    nothing else is sound: a name that is created first is empty for a while, and for ever if its
    process is killed.
    """
    try:
        return os.link(temporary, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, *UNSUPPORTED):
            raise
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    names = os.fsencode(temporary), os.fsencode(path)
    if rename and not rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_NOREPLACE):
        return None
    code = ctypes.get_errno() if rename else errno.ENOSYS
    if code in UNSUPPORTED:
        raise StoreError(
            "the file system has neither hard links nor a rename that replaces nothing "
            f"(renameat2, RENAME_NOREPLACE: {os.strerror(code)})",
            where=str(path),
            next="run_dir=… on another file system: by one of them two processes can't both "
            "publish a plan",
            errno=code,
        )
    raise OSError(code, os.strerror(code), str(path))


def publish_directory(path: Path, build: Callable[[Path], None]) -> bool:
    """Build a directory aside and rename it to `path`; False if another process was first.

    Raises
    ------
    StoreError
        If the file system refuses.
    """
    with write_errors(path), _temporary(path) as temporary:
        build(temporary)
        files = [file for file in temporary.rglob("*") if file.is_file()]
        for path_inside in files:
            with path_inside.open("rb") as file:
                os.fsync(file.fileno())
        _fsync_directories(files, below=temporary)
        try:
            temporary.rename(path)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                return False
            raise
        fsync_directory(path.parent)
        return True


def _fsync_directories(files: Iterable[Path], *, below: Path) -> None:
    """Force the names of files to disk, and those of their directories in `below`."""
    parents = {parent for path in files for parent in path.parents}
    for directory in sorted(p for p in parents if p.is_relative_to(below)):
        fsync_directory(directory)


def fsync_directory(path: Path) -> None:
    """Force a directory's entries to disk, where the file system can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Where a directory takes no fsync its entries last as the file system makes them last: what
        # a loss of power takes is missing, or does not fit the digest in its receipt.
        if error.errno not in UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A temporary name next to `path`, removed in the end."""
    _ensure_directory(path.parent)
    temporary = _temporary_name(path)
    try:
        yield temporary
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def _ensure_directory(path: Path) -> None:
    if not path.is_dir():
        _ensure_directory(path.parent)
        with contextlib.suppress(FileExistsError):  # which NFS may say of what it does not show
            path.mkdir()
        fsync_directory(path.parent)


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")


def _write(path: Path, content: Sequence[Content]) -> None:
    with path.open("wb", buffering=0) as file:
        for part in content:
            view = memoryview(part)
            while view:
                view = view[file.write(view) :]
        os.fsync(file.fileno())
