"""How fast grads go to disk and back, by compression, against a plain file.

    python benchmarks/store.py [directory]

The values are random-like, as projected gradients are: float16 rows of 2048 columns in chunks of
64 MiB. Ratios are within one run, medians over rounds that take the ways in turn; the floor is
`numpy.tofile` and fsync, with no checksum.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from trak_dist.cells.ownership import ArraySpec
from trak_dist.plan_inputs import CHUNK_BYTES
from trak_dist.store import arrays

ROUNDS, CHUNKS, COLUMNS = 7, 4, 2048
FLOOR = "tofile + fsync"
ROWS = CHUNK_BYTES // (2 * COLUMNS)

Way = tuple[Callable[[], None], Callable[[], None]]  # write, read


def main(directory: str | None = None) -> dict:
    values = np.random.default_rng(0).standard_normal((ROWS, COLUMNS)).astype(np.float16)
    with tempfile.TemporaryDirectory(dir=directory) as name:
        at = Path(name)
        ways = {FLOOR: plain_file(at, values)}
        for compression in ("none", "zstd"):
            ways[f"store, {compression}"] = store(at, values, compression)
        seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        for _ in range(ROUNDS):
            for way, (write, read) in ways.items():
                seconds[way].append((timed(write), timed(read)))
        sizes = {way: size(at / way.replace(" ", "_")) for way in ways}
    return report(seconds, sizes, values.nbytes * CHUNKS)


def plain_file(directory: Path, values: np.ndarray) -> Way:
    at = directory / "tofile_+_fsync"
    at.mkdir()

    def write() -> None:
        for i in range(CHUNKS):
            with (at / str(i)).open("wb") as file:
                values.tofile(file)
                file.flush()
                os.fsync(file.fileno())

    def read() -> None:
        for i in range(CHUNKS):
            np.fromfile(at / str(i), values.dtype)

    return write, read


def store(directory: Path, values: np.ndarray, compression: str) -> Way:
    at = directory / f"store,_{compression}"
    shape = (CHUNKS * ROWS, COLUMNS)
    spec = ArraySpec(shape=shape, chunks=values.shape, dtype="float16", compression=compression)
    arrays.ensure(at, spec)

    def write() -> None:
        for i in range(CHUNKS):
            arrays.write_rows(at, spec, i * ROWS, values)

    def read() -> None:
        for i in range(CHUNKS):
            arrays.read_rows(at, spec, i * ROWS, (i + 1) * ROWS)

    return write, read


def timed(action: Callable[[], None]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def report(
    seconds: dict[str, list[tuple[float, float]]], sizes: dict[str, int], nbytes: int
) -> dict:
    medians = {
        way: [statistics.median(s) for s in zip(*times, strict=True)]
        for way, times in seconds.items()
    }
    floor = medians[FLOOR]
    print(f"{'way':<16}{'write GB/s':>12}{'÷ floor':>9}{'read GB/s':>12}{'÷ floor':>9}{'size':>7}")
    for way, (write, read) in medians.items():
        print(
            f"{way:<16}{nbytes / write / 1e9:>12.2f}{floor[0] / write:>9.2f}"
            f"{nbytes / read / 1e9:>12.2f}{floor[1] / read:>9.2f}{sizes[way] / nbytes:>7.2f}"
        )
    return {"bytes": nbytes, "seconds": medians, "sizes": sizes}


if __name__ == "__main__":
    main(*sys.argv[1:])
