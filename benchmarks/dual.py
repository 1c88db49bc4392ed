"""Kernels of r curvature rows with k columns: seconds and memory of the primal and the dual form.

    python benchmarks/dual.py

Each case runs in a process of its own with one thread: Gram, factor and 100 preconditioned targets,
from rows as they come from the store (float16 with a scale each), in cells of 64 MiB at most. The
peak is that above a process which only imports and holds the rows; next to it what planning
foresees. At k = 32,768 the primal form is left out: 34 GB.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from trak_dist.cells import GramCell, KernelCell, PreconditionCell
from trak_dist.configuration.config import ReduceConfig, Spec
from trak_dist.ops import dual, kernel, rows
from trak_dist.plan import Plan
from trak_dist.plan_inputs import Source, Split, Streamed, planned_cell_rows

TARGETS = 100
CASES = [("primal", 2048, 1024), ("dual", 2048, 1024), ("primal", 8192, 4096)]
CASES += [("dual", 8192, 4096), ("dual", 32768, 1024), ("dual", 32768, 4096)]
REDUCE = {"lambda_reg": 1.0, "lambda_unit": "mean_diagonal", "kernel_scale": "mean_abs"}


class Stored:
    """Random rows as the store has them, decoded when they are asked for."""

    def __init__(self, k: int, r: int, cell_rows: int) -> None:
        torch.manual_seed(0)
        whole = [min(cell_rows, r - start) for start in range(0, r, cell_rows)]
        self._cells = [rows.encode(torch.randn(n, k), "float16") for n in whole]

    def __len__(self) -> int:
        return len(self._cells)

    def __getitem__(self, index: int) -> Tensor:
        return rows.decode(*self._cells[index])

    def __iter__(self) -> Iterator[Tensor]:
        return map(self.__getitem__, range(len(self)))


def planned(form: str, k: int, r: int) -> Plan:
    """The plan of a run with r train rows."""
    spec = Spec(problem={}, proj_dim=k, store_dim=k, reduce=ReduceConfig(kernel_form=form))

    def split(name: str, n: int) -> Split:
        return Split(name, n, min(n, planned_cell_rows(n, spec, k)), Streamed())

    return Plan(
        spec=spec,
        source=Source(file="", model="", import_root=""),
        parameters=10**6,
        train=split("train", r),
        checkpoints=(),
        targets=(split("val", TARGETS),),
    )


def peak() -> int:
    """Bytes that this process held at most."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def run(form: str, k: int, r: int) -> None:
    torch.set_num_threads(1)
    plan = planned(form, k, r)
    stored, device = Stored(k, r, plan.train.cell_rows), torch.device("cpu")
    targets, before = torch.randn(TARGETS, k), peak()
    clock = [time.perf_counter()]
    if form == "dual":
        gram = dual.sum_gram(stored, r, device)
        clock.append(time.perf_counter())
        found = dual.factorise(gram, stored, dim=k, **REDUCE)  # type: ignore[arg-type]
        opened: dual.Dual | kernel.Primal = dual.Dual(
            found.factor, found.scale, found.lambda_absolute, stored
        )
    else:
        gram = kernel.sum_gram(stored, k, device)
        clock.append(time.perf_counter())
        found = kernel.factorise(gram, rows=r, **REDUCE)  # type: ignore[arg-type]
        opened = kernel.Primal(found.factor, found.scale)
    clock.append(time.perf_counter())
    del gram
    opened.precondition(targets)
    clock.append(time.perf_counter())
    foreseen = max(cell.memory(plan) for cell in (GramCell, KernelCell, PreconditionCell))
    print(*(b - a for a, b in itertools.pairwise(clock)), peak() - before, foreseen)


def main() -> dict[str, list[float]]:
    print(f"{'':<8}{'k':>7}{'r':>7}{'Gram s':>9}{'factor s':>10}{'solve s':>9}", end="")
    print(f"{'peak MiB':>10}{'foreseen':>10}")
    found = {}
    for case in CASES:
        command = [sys.executable, __file__, *map(str, case)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        numbers = [float(word) for word in text.split()]
        form, k, r = case
        line = f"{form:<8}{k:>7}{r:>7}{numbers[0]:>9.1f}{numbers[1]:>10.1f}{numbers[2]:>9.1f}"
        print(f"{line}{numbers[3] / 2**20:>10,.0f}{numbers[4] / 2**20:>10,.0f}", flush=True)
        found[f"{form} {k} {r}"] = numbers
    return found


if __name__ == "__main__":
    run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])) if len(sys.argv) > 1 else main()
