"""Files that another package wrote: read without unpickling, checked against what they say."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trak_dist import decoding
from trak_dist.errors import (
    InterchangeError,
    InterchangeNotFound,
    NonFiniteGradient,
    UnreadableInterchange,
)
from trak_dist.hashing import truncated
from trak_dist.ingest.streamed_rows import format_ranges

BLOCK_BYTES = 2**24


@dataclass(frozen=True)
class ForeignRows:
    """The grads and out-to-loss of one checkpoint's split.

    `grads` (n, k) is memory-mapped: floats, or bfloat16 as the 16-bit numbers that it is made of;
    `where` is its file. `zeros` says what a row of zeros means, if it can't be a gradient.
    """

    grads: NDArray[Any]
    out_to_loss: NDArray[Any]
    where: Path
    zeros: str = ""

    @property
    def dtype(self) -> str:
        """The type that holds them without loss: `float16` or `float32`."""
        return "float16" if self.grads.dtype == np.float16 else "float32"

    def block(self, start: int, stop: int) -> NDArray[Any]:
        """Some rows of the grads, of `dtype`."""
        rows = self.grads[start:stop]
        if rows.dtype == np.uint16:
            return (rows.astype(np.uint32) << 16).view(np.float32)
        with np.errstate(over="ignore"):  # what does not fit is not finite, which is refused
            return np.ascontiguousarray(rows, self.dtype)

    def checked_digest(self) -> str:
        """The digest of all rows, each of which is looked at.

        Raises
        ------
        NonFiniteGradient
            If a gradient or an out-to-loss is not finite, naming the rows.
        InterchangeError
            If a row of zeros stands for one that was never computed.
        """
        sha = hashlib.sha256(repr((self.grads.shape, str(self.grads.dtype))).encode())
        sha.update(np.ascontiguousarray(self.out_to_loss, np.float32).data)
        finite, zero = np.isfinite(self.out_to_loss), np.zeros(len(self.grads), bool)
        step = max(1, BLOCK_BYTES // (4 * self.grads.shape[1]))
        for start in range(0, len(self.grads), step):
            block = self.block(start, start + step)
            finite[start : start + step] &= np.isfinite(block).all(1)
            zero[start : start + step] = ~block.any(1)
            sha.update(block.data)
        if not finite.all():
            raise NonFiniteGradient(
                f"non-finite gradient or out-to-loss in {(~finite).sum()} of {len(finite)} rows: "
                f"{format_ranges(np.flatnonzero(~finite))}",
                where=str(self.where),
                next="compute them again there: float16 overflows above 65504",
            )
        if self.zeros and zero.any():
            raise InterchangeError(
                f"{zero.sum()} of {len(zero)} rows are zero, {self.zeros}: "
                f"{format_ranges(np.flatnonzero(zero))}",
                where=str(self.where),
                next="finish them there, or import without them",
            )
        return truncated(sha)


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a file.

    Raises
    ------
    InterchangeError
        If it can't be read, or holds none.
    """
    with _readable(path):
        return decoding.mapping(path.read_bytes())


def read_array(path: Path, shape: Sequence[int], *kinds: type[np.generic]) -> NDArray[Any]:
    """The array in a `.npy` file, memory-mapped, of a shape and one of some types.

    Raises
    ------
    InterchangeError
        If it can't be read, is cut, or another one.
    """
    with _readable(path):
        found: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    types = [np.dtype(kind) for kind in kinds]
    if found.size != np.prod(shape) or found.shape[:1] != (shape[0],) or found.dtype not in types:
        raise InterchangeError(
            f"an array {found.shape} of {found.dtype}, not {tuple(shape)} of "
            f"{' or '.join(map(str, types))}",
            where=str(path),
            next="import the directory that belongs to it, as it was written",
        )
    return found.reshape(shape)


def map_raw(path: Path, shape: tuple[int, int], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Numbers without a header, memory-mapped.

    Raises
    ------
    InterchangeError
        If the file can't be read, or has another size.
    """
    with _readable(path):
        size, expected = path.stat().st_size, dtype.itemsize * shape[0] * shape[1]
        if size != expected:
            raise ValueError(f"{size} bytes, not the {expected} of {shape} of {dtype}")
        return np.memmap(path, dtype, "r", shape=shape)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        gone = isinstance(error, FileNotFoundError)
        raise (InterchangeNotFound if gone else UnreadableInterchange)(
            f"not readable: {error.strerror or error}",
            where=str(path),
            next="see that it is there and that you may read it",
            errno=error.errno,
        ) from None
    except (ValueError, EOFError) as error:
        raise InterchangeError(
            f"not as it is written: {error}",
            where=str(path),
            next="copy it again from where it was written",
        ) from None
