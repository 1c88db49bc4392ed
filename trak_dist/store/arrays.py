"""Chunked arrays on Zarr v3: made aside and renamed into place, written by whole chunks.

The only module that imports zarr. Every chunk carries a CRC-32C; a chunk that was never written
reads as NaN, or 0 of whole numbers; a writer owns whole chunks and never touches metadata.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import shutil
import tempfile
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.storage import LocalStore

from trak_dist.errors import CorruptChunk, StoreError
from trak_dist.store import atomic

# Passed to open_array it is silently ignored (zarr 3.1.6), so it is set for the whole process.
zarr.config.set({"array.write_empty_chunks": True})


@dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """What an array is: shape, chunks, dtype, compression and attributes."""

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: str
    compression: str = "none"
    attributes: Mapping[str, Any] = field(default_factory=dict)


def ensure_group(path: Path) -> None:
    """Make `path` a Zarr group if it is none yet."""
    if not (path / "zarr.json").exists():
        atomic.write_once(path / "zarr.json", b'{"zarr_format": 3, "node_type": "group"}')


def ensure(path: Path, spec: ArraySpec) -> None:
    """Make the array at `path`, or verify that the one there is as `spec` says.

    Raises
    ------
    StoreError
        If another array is there, or the file system refuses.
    """
    if not _there(path) and atomic.publish_directory(path, lambda at: _create(at, spec)):
        return
    if not _there(path):  # chunks that lost their metadata get it back
        with tempfile.TemporaryDirectory() as scratch:
            _create(Path(scratch) / "array", spec)
            atomic.write_once(path / "zarr.json", (Path(scratch) / "array/zarr.json").read_bytes())
    there = _described(_open(path, mode="r"), spec.compression)
    if there != spec:
        raise StoreError(
            f"an array of another kind is in the way: {there}, planned {spec}",
            where=str(path),
            next="use another run_dir",
        )


def grow(path: Path, spec: ArraySpec) -> None:
    """Make the array at `path`, or give the one that is there more rows; its chunks stay.

    One that has more rows already, for another plan, keeps them.
    """
    if _there(path):
        there = _described(_open(path, mode="r"), spec.compression)
        if there.shape[0] < spec.shape[0]:
            with atomic.told(path):
                _open(path, mode="r+").resize((spec.shape[0], *there.shape[1:]))
        rows = max(there.shape[0], spec.shape[0])
        spec = dataclasses.replace(spec, shape=(rows, *spec.shape[1:]))
    ensure(path, spec)


def replace(path: Path, spec: ArraySpec) -> None:
    """Put an empty array at `path`; one of another kind that is there is discarded."""
    if _there(path):
        if _described(_open(path, mode="r"), spec.compression) == spec:
            return
        discarded = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        with atomic.told(path), contextlib.suppress(FileNotFoundError):  # by another process
            path.rename(discarded)
        shutil.rmtree(discarded, ignore_errors=True)
    ensure(path, spec)


def write_rows(path: Path, start: int, values: NDArray[Any]) -> str:
    """Write whole chunks from row `start` on, to disk; return the digest of their content.

    Raises
    ------
    StoreError
        If the file system refuses.
    """
    array = _open(path, mode="r+")
    step = array.chunks[0]
    assert start % step == 0 and (len(values) % step == 0 or start + len(values) == array.shape[0])
    assert values.dtype == array.dtype and values.shape[1:] == array.shape[1:]
    with atomic.told(path), ThreadPoolExecutor(max_workers=1) as beside:
        array[start : start + len(values)] = values
        digest = beside.submit(content_digest, values)  # while the disk writes
        for block in range(start // step, -(-(start + len(values)) // step)):
            for file in _chunk_files(path, array, block):
                atomic.fsync_file(file)
    return digest.result()


def read_rows(path: Path, start: int, stop: int) -> NDArray[Any]:
    """Rows `start` to `stop` of the array at `path`.

    Raises
    ------
    CorruptChunk
        If a checksum does not match or a chunk is cut short.
    StoreError
        If there is no such array.
    """
    array = _open(path, mode="r")
    try:
        return np.asarray(array[start:stop])
    except (ValueError, RuntimeError, OSError) as error:
        raise CorruptChunk(
            f"rows {start}-{stop} can't be read: {error}",
            where=str(path),
            next="stage=verify repair=true, then the same command again",
        ) from error


def content_digest(values: NDArray[Any]) -> str:
    """Digest of the values as C-ordered bytes, whatever the codec."""
    return hashlib.sha256(np.ascontiguousarray(values).data).hexdigest()[:32]


def _there(path: Path) -> bool:
    return (path / "zarr.json").exists()


def _create(path: Path, spec: ArraySpec) -> None:
    codecs = [ZstdCodec(level=1)] if spec.compression == "zstd" else []
    zarr.create_array(
        store=LocalStore(path),
        shape=spec.shape,
        chunks=spec.chunks,
        dtype=spec.dtype,
        fill_value=float("nan") if np.dtype(spec.dtype).kind == "f" else 0,
        filters=None,
        compressors=[*codecs, Crc32cCodec()],
        attributes=dict(spec.attributes),
    )


def _open(path: Path, *, mode: Any) -> Any:
    try:
        if not _there(path):  # asked first, since zarr makes a directory for what it then misses
            raise FileNotFoundError(path)
        return zarr.open_array(LocalStore(path, read_only=mode == "r"), mode=mode)
    except (OSError, ValueError, KeyError) as error:
        raise StoreError(
            f"no readable array ({error})",
            where=str(path),
            next="stage=plan makes what is missing; if zarr.json is damaged, remove it first",
        ) from error


def _described(array: Any, compression: str) -> ArraySpec:
    codecs = [codec.to_dict()["name"] for codec in array.compressors]
    return ArraySpec(
        shape=tuple(array.shape),
        chunks=tuple(array.chunks),
        dtype=str(array.dtype),
        compression=compression if codecs == _codec_names(compression) else str(codecs),
        attributes=dict(array.attrs),
    )


def _codec_names(compression: str) -> list[str]:
    return ["zstd", "crc32c"] if compression == "zstd" else ["crc32c"]


def _chunk_files(path: Path, array: Any, block: int) -> list[Path]:
    columns = [range(-(-n // c)) for n, c in zip(array.shape[1:], array.chunks[1:], strict=True)]
    keys: list[tuple[int, ...]] = [(block,)]
    for column in columns:
        keys = [(*key, i) for key in keys for i in column]
    return [path / array.metadata.encode_chunk_key(key) for key in keys]
