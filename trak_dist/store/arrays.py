"""Chunked arrays on Zarr v3: created under a temporary name and renamed, written by whole chunks.

The only module that imports zarr; `chunks` has the files of chunks. A chunk that was never written
is an error here; for other readers it holds NaN, of int8 -128, of uint8 0. A writer owns whole
chunks and never touches metadata, which is checked against what is planned whenever an array is
read or written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import shlex
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.storage import LocalStore, MemoryStore

from trak_dist.cells.ownership import ArraySpec
from trak_dist.errors import ArrayNotFound, CorruptChunk, StoreError
from trak_dist.hashing import digest_of
from trak_dist.store import atomic, chunks

SETTLED_NS = 2 * 10**9  # a file that has not changed for so long has another time when it does

log = logging.getLogger(__name__)
_checked: dict[Path, tuple[tuple[int, ...], ArraySpec]] = {}


def ensure_group(path: Path) -> None:
    """Make `path` a Zarr group if it is none yet."""
    if not _there(path):
        atomic.write_once(path / "zarr.json", b'{"zarr_format": 3, "node_type": "group"}')


def ensure(path: Path, spec: ArraySpec) -> None:
    """Make the array at `path`, or verify that the one there is as `spec` says.

    Metadata that is lost or damaged is written again; the chunks stay.

    Raises
    ------
    StoreError
        If a different array exists, or the file system refuses.
    """
    if not _there(path) and atomic.publish_directory(
        path, lambda at: _create(LocalStore(at), spec)
    ):
        return
    if _opened(path) is None:
        if _there(path):
            log.warning(
                "metadata is damaged, and written again from the plan: %s", path / "zarr.json"
            )
            atomic.write(path / "zarr.json", _serialised(spec))
        else:  # chunks without metadata
            atomic.write_once(path / "zarr.json", _serialised(spec))
    if differences := _differences(_array(path), spec):
        raise StoreError(
            f"a different array exists, or its metadata is damaged: {differences}",
            where=str(path),
            next=f"use another run_dir; or if zarr.json was damaged: {_removal_command(path)}, "
            "then the same command again, which creates it again; the chunks stay",
        )


def grow(path: Path, spec: ArraySpec) -> None:
    """Create the array at `path`, or add rows to the existing one; its chunks stay.

    Existing rows beyond that, of another plan, stay.
    """
    existing = _opened(path)
    if existing is not None and existing.shape[0] < spec.shape[0]:
        as_it_is = dataclasses.replace(spec, shape=(existing.shape[0], *spec.shape[1:]))
        if not _differences(existing, as_it_is):
            atomic.write(path / "zarr.json", _serialised(spec))
    ensure(path, spec)


def is_other(path: Path, spec: ArraySpec) -> bool:
    """Whether there is an array at `path` that is not as `spec` says, or damaged."""
    existing = _opened(path)
    return _there(path) and (existing is None or bool(_differences(existing, spec)))


def replace(path: Path, spec: ArraySpec) -> None:
    """Create an empty array at `path`; a different one is discarded."""
    if is_other(path, spec):
        discarded = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        # by another process
        with atomic.write_errors(path), contextlib.suppress(FileNotFoundError):
            path.rename(discarded)
        shutil.rmtree(discarded, ignore_errors=True)
    ensure(path, spec)


def prepare(path: Path, spec: ArraySpec) -> None:
    """Make the array at `path`, or do with the one that is there as `spec` says.

    Raises
    ------
    StoreError
        As `ensure` does.
    """
    {"refuse": ensure, "grow": grow, "replace": replace}[spec.if_changed](path, spec)


def write_rows(
    path: Path, spec: ArraySpec, start: int, values: NDArray[Any], *, plan: str = "stage=plan"
) -> str:
    """Write whole chunks from row `start` on, to disk; return the digest of their content.

    Parameters
    ----------
    plan : str
        The command that makes the array where it is missing, for the message.

    Raises
    ------
    StoreError
        If the array is not as `spec` says, or the file system refuses.
    """
    first = _check(path, spec, plan=plan)
    step = spec.chunks[0]
    assert start % step == 0 and (len(values) % step == 0 or start + len(values) == spec.shape[0])
    assert values.dtype == spec.dtype and values.shape[1:] == spec.shape[1:]
    with ThreadPoolExecutor(max_workers=1) as pool:
        digest = pool.submit(content_digest, values)  # while the disk writes
        files = (
            (chunk_file(path, spec, start + at), chunks.encoded(values[at : at + step], spec))
            for at in range(0, len(values), step)
        )
        # The array's own directory names `c`, once and for all.
        atomic.write_files(files, below=path if first else path / "c")
    return digest.result()


def read_rows(
    path: Path, spec: ArraySpec, start: int, stop: int, *, plan: str = "stage=plan"
) -> NDArray[Any]:
    """Rows `start` to `stop` of the array at `path`.

    Parameters
    ----------
    plan : str
        The command that makes the array where it is missing, for the message.

    Raises
    ------
    CorruptChunk
        If a chunk is missing or cut short, or its checksum does not match.
    StoreError
        If there is no such array, or it is not as `spec` says.
    """
    _check(path, spec, plan=plan)
    found, step = np.empty((stop - start, *spec.shape[1:]), spec.dtype), spec.chunks[0]
    with _damage(path, start, stop):
        for first in range(start - start % step, stop, step):
            begin, end = max(start, first), min(stop, first + step)
            part = found[begin - start : end - start]
            if begin == first:
                chunks.read(chunk_file(path, spec, first), part, spec)
            else:
                above = np.empty((end - first, *spec.shape[1:]), spec.dtype)
                chunks.read(chunk_file(path, spec, first), above, spec)
                part[...] = above[begin - first :]
    return found


def read_pieces(
    path: Path, spec: ArraySpec, start: int, stop: int, *, rows: int, plan: str = "stage=plan"
) -> Iterator[NDArray[Any]]:
    """The rows of one chunk, some at a time in the same memory; fails as `read_rows`.

    That they are as they were written is known once all are read.
    """
    assert start % spec.chunks[0] == 0 and stop - start <= spec.chunks[0]
    _check(path, spec, plan=plan)
    left = stop - start
    with _damage(path, start, stop):
        for piece in chunks.pieces(chunk_file(path, spec, start), spec, rows):
            yield piece[: max(0, left)]  # the last chunk is filled up
            left -= rows


@contextlib.contextmanager
def _damage(path: Path, start: int, stop: int) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise CorruptChunk("a chunk is missing", where=str(path)) from error
    except (ValueError, RuntimeError, OSError) as error:
        raise CorruptChunk(
            f"rows {start}-{stop} can't be read: {error}",
            where=str(path),
        ) from error


def chunk_file(path: Path, spec: ArraySpec, row: int) -> Path:
    """The file of the chunk that begins with a row; a chunk has all columns."""
    assert spec.chunks[1:] == spec.shape[1:]
    return path.joinpath("c", str(row // spec.chunks[0]), *["0"] * len(spec.shape[1:]))


def content_digest(values: NDArray[Any]) -> str:
    """Digest of the values as C-ordered bytes, whatever the codec."""
    return digest_of(np.ascontiguousarray(values).data)


def _there(path: Path) -> bool:
    return atomic.exists(path / "zarr.json")


def _serialised(spec: ArraySpec) -> bytes:
    """The metadata of a new array, as a file has it."""
    with tempfile.TemporaryDirectory() as scratch:
        _create(LocalStore(Path(scratch)), spec)
        return (Path(scratch) / "zarr.json").read_bytes()


def _create(store: LocalStore | MemoryStore, spec: ArraySpec) -> Any:
    codecs = [ZstdCodec(level=chunks.ZSTD_LEVEL)] if spec.compression == "zstd" else []
    return zarr.create_array(
        store=store,
        shape=spec.shape,
        chunks=spec.chunks,
        dtype=spec.dtype,
        fill_value=chunks.fill_value(spec.dtype),
        filters=None,
        compressors=[*codecs, Crc32cCodec()],
        attributes=dict(spec.attributes),
    )


def _check(path: Path, spec: ArraySpec, *, plan: str) -> bool:
    """Check that the array at `path` is as `spec` says; whether this process had not yet.

    Metadata that was read before is read again if its file has changed.
    """
    stamp = _stamp(path)
    if stamp and _checked.get(path) == (stamp, spec):
        return False
    if differences := _differences(_array(path, plan=plan), spec):
        raise StoreError(
            f"the array's metadata is not what is planned: {differences}",
            where=str(path / "zarr.json"),
            next=f"{_removal_command(path)}, then {plan}, which makes it anew; the chunks stay",
        )
    if stamp and time.time_ns() - stamp[-1] > SETTLED_NS:
        _checked[path] = stamp, spec
    return True


def _stamp(path: Path) -> tuple[int, ...] | None:
    """What changes whenever metadata is written; None if there is none."""
    file = path / "zarr.json"
    try:
        with atomic.read_errors(file):
            found = atomic.retry_stale(file.stat)
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _array(path: Path, *, plan: str = "stage=plan") -> Any:
    next_step = f"{plan} makes what is missing, and metadata that can't be read"
    if not _there(path):  # first, since zarr would create a directory
        raise ArrayNotFound("no readable array: it is missing", where=str(path), next=next_step)
    try:
        return zarr.open_array(LocalStore(path, read_only=True), mode="r")
    except Exception as error:  # for damaged metadata zarr raises many types
        raise StoreError(
            f"no readable array ({type(error).__name__}: {error})",
            where=str(path),
            next=next_step,
            errno=getattr(error, "errno", None),
        ) from error


def _opened(path: Path) -> Any | None:
    """The array at `path`; None if there is none, or its metadata can't be read."""
    try:
        return _array(path)
    except StoreError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError):
            raise
        return None


def _differences(array: Any, spec: ArraySpec) -> str:
    """How an array's metadata differs from `spec`, as text; empty if it does not."""
    actual, planned = _metadata(array), _metadata(_create(MemoryStore(), spec))
    rows = array.shape[:1]
    if spec.if_changed == "grow" and rows > spec.shape[:1]:
        planned["shape"] = [*rows, *planned["shape"][1:]]
    return "; ".join(
        f"{name} {actual.get(name)}, planned {planned.get(name)}"
        for name in sorted({*actual, *planned})
        if actual.get(name) != planned.get(name)
    )


def _metadata(array: Any) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(json.dumps(array.metadata.to_dict()))
    return content


def _removal_command(path: Path) -> str:
    return f"rm {shlex.quote(str(path / 'zarr.json'))}"
