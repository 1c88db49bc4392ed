"""Parts: streamed rows of grads, from any process in any order, until they are gathered.

A part is one file, published atomically and never changed: the rows, what was computed of them, and
how. Parts sort by when they were written.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from trak_dist import decoding
from trak_dist.cells.featurize import INPUT_DIGEST_BYTES
from trak_dist.errors import CorruptChunk, StoreError
from trak_dist.hashing import truncated
from trak_dist.plan import digest
from trak_dist.store import atomic

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Part:
    """Some rows: `arrays` has a line for each.

    Among them are their numbers, `rows`, and digests of what they were computed from, `inputs`.
    """

    arrays: Arrays
    facts: Mapping[str, Any]


def write(directory: Path, part: Part) -> Path:
    """Publish a part.

    Raises
    ------
    StoreError
        If the file system refuses.
    """
    facts = json.dumps(dict(part.facts))
    metadata = {"facts": facts, "digest": _digest(part.arrays), "facts_digest": digest(facts)}
    content = safetensors.numpy.save(dict(part.arrays), metadata)
    path = directory / f"{time.time_ns():020d}-{uuid.uuid4().hex}.safetensors"
    try:
        atomic.write(path, content)
    except StoreError:
        if directory.exists():
            raise
        atomic.write(path, content)  # all rows were done, and the directory was discarded just now
    return path


def listed(directory: Path) -> list[Path]:
    """The parts in `directory`, the earliest first."""
    return sorted(directory.glob("*.safetensors"))


def rows_of(path: Path) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Which rows are in a part, and the digests of their inputs; the rest of it is not read.

    Raises
    ------
    CorruptChunk
        If it can't be read.
    FileNotFoundError
        If it was discarded.
    """
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            rows, inputs = file.get_tensor("rows"), file.get_tensor("inputs")
        if rows.dtype != np.int64 or inputs.dtype != np.uint8 or (rows < 0).any():
            raise ValueError("its rows are no numbers of rows")
        if rows.ndim != 1 or inputs.shape != (len(rows), INPUT_DIGEST_BYTES):
            raise ValueError(f"{inputs.shape} digests of {rows.shape} rows")
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged header has its own ways to fail
        raise _damaged(path, error) from error
    return rows, inputs


def read(path: Path) -> Part:
    """A part, if it is as it was written.

    Raises
    ------
    CorruptChunk
        If it is not.
    FileNotFoundError
        If it was discarded.
    """
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
        facts = metadata["facts"]
        # earlier ones have none
        whole = digest(facts) == metadata.get("facts_digest", digest(facts))
        if not whole or _digest(arrays) != metadata["digest"]:
            raise ValueError("its content is not what was written")
        return Part(arrays, decoding.mapping(facts))
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged header has its own ways to fail
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> CorruptChunk:
    return CorruptChunk(
        f"a part is damaged: {error}",
        where=str(path),
        next="remove it, and featurize its rows again",
    )


def discard(directory: Path) -> None:
    """Remove all parts at once, so that no reader sees only some of them."""
    hidden = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}")
    try:
        directory.rename(hidden)
    except FileNotFoundError:
        return
    shutil.rmtree(hidden, ignore_errors=True)


def _digest(arrays: Arrays) -> str:
    sha = hashlib.sha256()
    for name in sorted(arrays):
        sha.update(name.encode())
        sha.update(np.ascontiguousarray(arrays[name]).data)
    return truncated(sha)
