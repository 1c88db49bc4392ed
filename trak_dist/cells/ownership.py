"""What a cell owns on disk: rows of arrays, and files. Nobody else writes them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from string import ascii_lowercase
from typing import Any, Literal

CHECKSUM_BYTES = 4  # of each chunk


@dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """What an array is: shape, chunks, dtype, compression and attributes.

    `if_changed` is what happens to an array of another spec: it is refused, gets more rows
    (`grow`), or is replaced by an empty one (`replace`).
    """

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: str
    compression: str = "none"
    attributes: Mapping[str, Any] = field(default_factory=dict)
    if_changed: Literal["refuse", "grow", "replace"] = "refuse"

    @property
    def nbytes(self) -> int:
        """Bytes of its chunks, uncompressed: the last ones are as large as the others."""
        entry = int(self.dtype.lstrip(ascii_lowercase)) // 8
        return self.chunk_files * (math.prod(self.chunks) * entry + CHECKSUM_BYTES)

    @property
    def chunk_files(self) -> int:
        """How many chunks it has, each a file."""
        return math.prod(-(-n // c) for n, c in zip(self.shape, self.chunks, strict=True))


@dataclass(frozen=True)
class OwnedRows:
    """Rows `start` to `stop` of an array.

    `path` is relative to the store, or to the part of it that a member of a sweep has to itself
    if the cell is `per_member`.
    """

    path: str
    spec: ArraySpec
    start: int
    stop: int


@dataclass(frozen=True)
class OwnedFile:
    """A file of the run directory, or of the member's if the cell is `per_member`.

    The receipt has a digest of its bytes or, of `tensors`, of what they hold. One that is not
    `always` written has none where it was not.
    """

    path: str
    tensors: bool = False
    always: bool = True
