"""Chunked arrays on Zarr v3: created under a temporary name and renamed, written by whole chunks.

The only module that imports zarr. Every chunk carries a CRC-32C; a chunk that was never written
reads as NaN, of int8 as -128, of uint8 as 0; a writer owns whole chunks and never touches metadata,
which is checked against what is planned whenever an array is opened.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import shlex
import shutil
import tempfile
import uuid
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
from trak_dist.store import atomic

# Passed to open_array it is silently ignored (zarr 3.1.6), so it is set for the whole process.
zarr.config.set({"array.write_empty_chunks": True})

log = logging.getLogger(__name__)


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
    array = _checked(path, spec, mode="r+", plan=plan)
    step = array.chunks[0]
    assert start % step == 0 and (len(values) % step == 0 or start + len(values) == array.shape[0])
    assert values.dtype == array.dtype and values.shape[1:] == array.shape[1:]
    with atomic.write_errors(path), ThreadPoolExecutor(max_workers=1) as pool:
        array[start : start + len(values)] = values
        digest = pool.submit(content_digest, values)  # while the disk writes
        blocks = range(start // step, -(-(start + len(values)) // step))
        files = [file for block in blocks for file in _chunk_files(path, array, block)]
        atomic.fsync_files(files, below=path)
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
        If a checksum does not match or a chunk is cut short.
    StoreError
        If there is no such array, or it is not as `spec` says.
    """
    array = _checked(path, spec, mode="r", plan=plan)
    try:
        return np.asarray(array[start:stop])
    except (ValueError, RuntimeError, OSError) as error:
        raise CorruptChunk(
            f"rows {start}-{stop} can't be read: {error}",
            where=str(path),
        ) from error


def was_written(values: NDArray[Any]) -> bool:
    """Whether no entry is the one of a chunk that is missing; of uint8 that can't be told."""
    if values.dtype.kind == "i":
        return bool((values != np.iinfo(values.dtype).min).all())
    return bool(np.isfinite(values).all())


def content_digest(values: NDArray[Any]) -> str:
    """Digest of the values as C-ordered bytes, whatever the codec."""
    return digest_of(np.ascontiguousarray(values).data)


def _fill_value(dtype: np.dtype[Any]) -> float:
    """What nobody writes."""
    if dtype.kind == "i":
        return np.iinfo(dtype).min
    return float("nan") if dtype.kind == "f" else 0


def _there(path: Path) -> bool:
    return atomic.exists(path / "zarr.json")


def _serialised(spec: ArraySpec) -> bytes:
    """The metadata of a new array, as a file has it."""
    with tempfile.TemporaryDirectory() as scratch:
        _create(LocalStore(Path(scratch)), spec)
        return (Path(scratch) / "zarr.json").read_bytes()


def _create(store: LocalStore | MemoryStore, spec: ArraySpec) -> Any:
    codecs = [ZstdCodec(level=1)] if spec.compression == "zstd" else []
    return zarr.create_array(
        store=store,
        shape=spec.shape,
        chunks=spec.chunks,
        dtype=spec.dtype,
        fill_value=_fill_value(np.dtype(spec.dtype)),
        filters=None,
        compressors=[*codecs, Crc32cCodec()],
        attributes=dict(spec.attributes),
    )


def _checked(path: Path, spec: ArraySpec, *, mode: Any, plan: str) -> Any:
    """The array at `path`, if it is as `spec` says."""
    array = _array(path, mode=mode, plan=plan)
    if differences := _differences(array, spec):
        raise StoreError(
            f"the array's metadata is not what is planned: {differences}",
            where=str(path / "zarr.json"),
            next=f"{_removal_command(path)}, then {plan}, which makes it anew; the chunks stay",
        )
    return array


def _array(path: Path, *, mode: Any = "r", plan: str = "stage=plan") -> Any:
    next_step = f"{plan} makes what is missing, and metadata that can't be read"
    if not _there(path):  # first, since zarr would create a directory
        raise ArrayNotFound("no readable array: it is missing", where=str(path), next=next_step)
    try:
        return zarr.open_array(LocalStore(path, read_only=mode == "r"), mode=mode)
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


def _chunk_files(path: Path, array: Any, block: int) -> list[Path]:
    columns = [range(-(-n // c)) for n, c in zip(array.shape[1:], array.chunks[1:], strict=True)]
    keys: list[tuple[int, ...]] = [(block,)]
    for column in columns:
        keys = [(*key, i) for key in keys for i in column]
    return [path / array.metadata.encode_chunk_key(key) for key in keys]
