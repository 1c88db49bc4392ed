"""One chunk's file: its values as Zarr stores them, compressed or not, then a CRC-32C of that.

zarr itself would copy a chunk several times on the way, and make, look up and open more than it
needs. `arrays` says which file is which, and has what zarr says of an array checked.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
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
    descriptor = atomic.retry_stale(lambda: os.open(path, os.O_RDONLY))
    try:
        if spec.compression == "zstd":
            content = np.empty(max(0, os.fstat(descriptor).st_size - _CHECKSUM.size), np.uint8)
            _read_checked(descriptor, content)
            decoded = np.frombuffer(Zstd(level=ZSTD_LEVEL).decode(content), spec.dtype)
            values[...] = decoded.reshape(spec.chunks)
        else:
            _read_checked(descriptor, _bytes_of(values))
    finally:
        os.close(descriptor)
    if not whole:
        into[...] = values[: len(into)]


def _bytes_of(values: NDArray[Any]) -> NDArray[np.uint8]:
    return values.reshape(-1).view(np.uint8)


def _read_checked(descriptor: int, content: NDArray[np.uint8]) -> None:
    """Fill `content`, and check that its checksum and nothing else follows."""
    crc = 0
    for start in range(0, len(content), PIECE_BYTES):
        piece = content[start : start + PIECE_BYTES]
        at = 0
        while at < len(piece):
            found = os.readv(descriptor, [piece[at:].data])
            if not found:
                raise ValueError(f"the file ends after {start + at} of {len(content)} bytes")
            at += found
        crc = google_crc32c.extend(crc, piece)
    if (stored := os.read(descriptor, _CHECKSUM.size + 1)) != _CHECKSUM.pack(crc):
        raise ValueError(f"the checksum is {stored.hex()}, of the content {crc:08x}")
