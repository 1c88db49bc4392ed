"""One chunk's file: its values as Zarr stores them, compressed or not, then a CRC-32C of that.

zarr itself would copy a chunk several times on the way, and make, look up and open more than it
needs. `arrays` says which file is which, and has what zarr says of an array checked.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numcodecs import Zstd
from numpy.typing import NDArray

from trak_dist.cells.ownership import ArraySpec
from trak_dist.store import atomic

PIECE_BYTES = 2**20  # read and checked at once: what the processor's cache holds
ZSTD_LEVEL = 1
_CHECKSUM = struct.Struct("<I")


def fill_value(dtype: str) -> float:
    """What Zarr readers find where a chunk was never written; no cell writes it, but for uint8."""
    kind = np.dtype(dtype).kind
    if kind == "i":
        return np.iinfo(dtype).min
    return float("nan") if kind == "f" else 0


def encoded(values: NDArray[Any], spec: ArraySpec) -> Sequence[atomic.Content]:
    """What a chunk's file consists of; the last chunk of an array is filled up."""
    if len(values) < spec.chunks[0]:
        whole = np.full(spec.chunks, fill_value(spec.dtype), spec.dtype)
        whole[: len(values)] = values
        values = whole
    content = _bytes_of(np.ascontiguousarray(values))
    if spec.compression == "zstd":
        content = np.frombuffer(Zstd(level=ZSTD_LEVEL).encode(content), np.uint8)
    return content.data, _CHECKSUM.pack(google_crc32c.value(content))


def read(path: Path, into: NDArray[Any], spec: ArraySpec) -> None:
    """Read a chunk's first rows.

    Raises
    ------
    FileNotFoundError
        If it was never written.
    ValueError, RuntimeError
        If it is not as it was written.
    OSError
        If the file system refuses.
    """
    whole = into.shape == spec.chunks and into.flags.c_contiguous
    values = into if whole else np.empty(spec.chunks, spec.dtype)
    with _opened(path) as file:
        if spec.compression == "zstd":
            content = np.empty(max(0, file.size - _CHECKSUM.size), np.uint8)
            file.fill(content)
            decoded = np.frombuffer(Zstd(level=ZSTD_LEVEL).decode(content), spec.dtype)
            values[...] = decoded.reshape(spec.chunks)
        else:
            file.fill(_bytes_of(values))
    if not whole:
        into[...] = values[: len(into)]


def pieces(path: Path, spec: ArraySpec, rows: int) -> Iterator[NDArray[Any]]:
    """A chunk from its first row on, so many rows at a time, in the same memory.

    Whether they are as they were written is known once all are read; else it fails as `read`.
    """
    if spec.compression != "none":
        whole = np.empty(spec.chunks, spec.dtype)
        read(path, whole, spec)
        for start in range(0, len(whole), rows):
            yield whole[start : start + rows]
        return
    memory = np.empty((rows, *spec.chunks[1:]), spec.dtype)
    with _opened(path) as file:
        for start in range(0, spec.chunks[0], rows):
            piece = memory[: min(rows, spec.chunks[0] - start)]
            file.fill(_bytes_of(piece))
            yield piece


def _bytes_of(values: NDArray[Any]) -> NDArray[np.uint8]:
    return values.reshape(-1).view(np.uint8)


class _File:
    """A chunk's file that is read once, from its beginning on."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._crc = descriptor, 0
        self.size = os.fstat(descriptor).st_size

    def fill(self, content: NDArray[np.uint8]) -> None:
        """Read what is next, in pieces that the checksum finds in the processor's cache."""
        for start in range(0, len(content), PIECE_BYTES):
            piece, at = content[start : start + PIECE_BYTES], 0
            while at < len(piece):
                found = os.readv(self._descriptor, [piece[at:].data])
                if not found:
                    raise ValueError(f"the file ends after {self.size} bytes")
                at += found
            self._crc = google_crc32c.extend(self._crc, piece)

    def check_at_end(self) -> None:
        stored = os.read(self._descriptor, _CHECKSUM.size + 1)
        if stored != _CHECKSUM.pack(self._crc):
            raise ValueError(f"the checksum is {stored.hex()}, of the content {self._crc:08x}")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[_File]:
    """The file, all of which has to be read, and then fits its checksum."""
    descriptor = atomic.retry_stale(lambda: os.open(path, os.O_RDONLY))
    try:
        file = _File(descriptor)
        yield file
        file.check_at_end()
    finally:
        os.close(descriptor)
