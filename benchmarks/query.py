"""How long a query takes over many stored train rows, beside reading their bytes.

    python benchmarks/query.py [directory] [dtype]

Rows are forged: 200,000 of k = 512 of one checkpoint, in chunks as planned. `plain` is reading the
files of the grads, one after the other, into new memory (numpy's fromfile) or into the same
(readinto); all come from the page cache. `query` is what `Results.query` does once the gradients
and kernels of its ten targets are solved: reading, checksums, decoding, products, the strongest.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from trak_dist.cells import FeaturizeCell
from trak_dist.configuration.config import FeaturizeConfig, Spec
from trak_dist.coordinates import TRAIN
from trak_dist.interface import query
from trak_dist.plan import Plan
from trak_dist.plan_inputs import Checkpoint, ProbedDataset, Source, Split, planned_cell_rows
from trak_dist.store import arrays, contents
from trak_dist.store.run import Run

ROUNDS, ROWS, DIM, TARGETS = 7, 200_000, 512, 10


def main(directory: str | None = None, dtype: str = "float16") -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=directory) as name:
        run = forged(Path(name) / "run", dtype)
        cells = list(FeaturizeCell.of_split(run.plan, 0, TRAIN))
        files = list(grads_files(run, cells))
        torch.manual_seed(0)
        b = {0: torch.randn(DIM, TARGETS, dtype=getattr(torch, run.plan.precondition_dtype))}
        memory = np.empty(max(file.stat().st_size for file in files), np.uint8)
        ways: dict[str, Callable[[], object]] = {
            "plain, new memory": lambda: [np.fromfile(file, np.uint8) for file in files],
            "plain, same memory": lambda: [read_into(file, memory) for file in files],
            "store": lambda: [contents.read(run, cell, "grads") for cell in cells],
            "query": lambda: query.ranked(run, b, 10),
        }
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(ROUNDS):
            for way, do in ways.items():
                started = time.perf_counter()
                do()
                seconds[way].append(time.perf_counter() - started)
        nbytes = sum(file.stat().st_size for file in files)
    return report({way: statistics.median(s) for way, s in seconds.items()}, nbytes)


def forged(run_dir: Path, dtype: str) -> Run:
    """A run whose train grads are random numbers; nothing else of it is there."""
    spec = Spec(
        problem={"_target_": "forged"},
        proj_dim=DIM,
        store_dim=DIM,
        featurize=FeaturizeConfig(dtype=dtype),
    )
    cell_rows = planned_cell_rows(ROWS, spec, DIM)
    train = Split(TRAIN, ROWS, cell_rows=cell_rows, row_source=ProbedDataset("forged"))
    plan = Plan(
        spec=spec,
        source=Source(file="", model="", import_root=""),
        parameters=DIM,
        train=train,
        checkpoints=(Checkpoint(0, "forged.pt", trained=False),),
        targets=(replace(train, name="val", rows=TARGETS),),
    )
    run = Run.create(run_dir, plan)
    random = np.random.default_rng(0)
    for cell in FeaturizeCell.of_split(plan, 0, TRAIN):
        grads = random.standard_normal((len(cell.rows), DIM), np.float32)
        grads = (30 * grads).round().clip(-127, 127) if dtype == "int8" else grads
        ones = np.ones(len(cell.rows), np.float32)
        for region in contents.array_regions(run, cell).values():
            arrays.prepare(region.path, region.spec)
        values = {"grads": grads.astype(dtype), "row_scale": ones, "out_to_loss": ones}
        contents.write(run, cell, values)
    return run


def grads_files(run: Run, cells: list[FeaturizeCell]) -> Iterator[Path]:
    for cell in cells:
        region = contents.array_regions(run, cell)["grads"]
        yield arrays.chunk_file(region.path, region.spec, region.start)


def read_into(path: Path, memory: np.ndarray) -> None:
    with path.open("rb", buffering=0) as file:
        file.readinto(memory)


def report(seconds: dict[str, float], nbytes: int) -> dict[str, float]:
    fastest = seconds["plain, same memory"]
    print(f"{nbytes / 1e6:,.0f} MB{'seconds':>20}{'GB/s':>8}{'÷ new':>8}{'÷ same':>8}")
    for way, took in seconds.items():
        print(
            f"{way:<20}{took:>11.3f}{nbytes / took / 1e9:>8.2f}"
            f"{seconds['plain, new memory'] / took:>8.2f}{fastest / took:>8.2f}"
        )
    return seconds


if __name__ == "__main__":
    main(*sys.argv[1:])
