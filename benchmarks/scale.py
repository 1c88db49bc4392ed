"""Time and memory of what looks at receipts, in a run of very many cells.

    python benchmarks/scale.py [CELLS …]

Runs of 100 checkpoints are planned and their receipts forged; no gradient is computed. Each way
runs in a process of its own. Of 10⁶ cells the single receipts need 8 GB of disk.
"""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from trak_dist.cells import Cell, FeaturizeCell, GramCell, KernelCell, PreconditionCell, ScoreCell
from trak_dist.configuration.config import SlurmConfig, Spec
from trak_dist.plan import Plan
from trak_dist.plan_inputs import Checkpoint, ProbedDataset, Source, Split
from trak_dist.runtime.cell_result import grads_facts
from trak_dist.store.record import Receipt, dump
from trak_dist.store.run import Run

CHECKPOINTS, CELLS = 100, (10**4, 10**5)
CELL_ROWS, BATCH_ROWS = 512, 64


def main(sizes: list[int]) -> None:
    print(f"{'cells':>8}  {'what':<26}{'seconds':>9}{'of CPU':>8}{'peak MiB':>10}")
    for cells in sizes or CELLS:
        with tempfile.TemporaryDirectory() as directory:
            run = planned(Path(directory) / "run", cells)
            measure("submit, nothing done", run)
            forge(run, FeaturizeCell.of(run.plan))
            measure("status, single receipts", run)
            for model_id in run.plan.model_ids:
                run.receipts.consolidate(model_id)
            measure("status, consolidated", run)
            for kind in (GramCell, KernelCell, PreconditionCell):
                forge(run, kind.of(run.plan))
            measure("score's check", run)
            for model_id in run.plan.model_ids[::2]:
                forget(run, model_id)
            measure("submit, half done", run)


def planned(run_dir: Path, cells: int) -> Run:
    """A run of so many featurize cells, most of them of train rows."""
    rows = CELL_ROWS * (cells // CHECKPOINTS - 1)
    plan = Plan(
        spec=Spec(problem={"_target_": "nobody.imports_this"}, proj_dim=64, store_dim=64),
        source=Source("file", "model", "/"),
        parameters=1000,
        train=Split("train", rows, CELL_ROWS, ProbedDataset("train rows")),
        checkpoints=tuple(Checkpoint(i, f"/{i}.pt", False) for i in range(CHECKPOINTS)),
        targets=(Split("val", CELL_ROWS, CELL_ROWS, ProbedDataset("targets")),),
    )
    return Run.create(run_dir, plan)


def forge(run: Run, cells: Iterable[Cell]) -> None:
    """Receipts of cells that nobody ran, as a worker would write them but for fsync."""
    directories = set()
    for number, cell in enumerate(cells):
        path = run.layout.receipt(run.plan, cell)
        if path.parent not in directories:
            path.parent.mkdir(parents=True, exist_ok=True)
            directories.add(path.parent)
        path.write_bytes(dump(receipt(run, cell, number)))


def receipt(run: Run, cell: Cell, number: int) -> Receipt:
    """What a Slurm task would have said of a cell."""
    digests, facts = {"what": f"{number:032x}"}, {}
    if isinstance(cell, FeaturizeCell):
        shown = str(cell.rows)
        digests = dict.fromkeys(("grads", "row_scale", "out_to_loss"), f"{number:032x}")
        facts = {
            **grads_facts(run.plan, f"{cell.model_id:032x}"),
            "inputs_digest": f"{cell.rows.start:032x}",
            "batch_digests": f"{hash(shown) % 2**32:08x}" * (CELL_ROWS // BATCH_ROWS),
            "rows": len(cell.rows),
            "audited_rows": 2,
            "audited_batches": 1,
            "slower_batches": 0,
            "largest_difference": 1e-7 + number * 1e-14,
        }
    job = {
        "attempt": 1,
        "host": f"n{number % 40}",
        "job_id": f"12_{number // 50}",
        "process": 1000 + number % 997,
        "log": f"/runs/logs/12_{number // 50}_0_log.out",
        "device": "NVIDIA H100",
        "python": "3.11",
        "torch": "2.13.0",
        "numpy": "2.3.0",
        "started": 1.7e9 + number / 7,
        "seconds": 1.5 + number % 1000 / 1000,
    }
    return Receipt(
        cell=cell.id,
        key=cell.key(run.plan),
        fingerprint=run.plan.fingerprint,
        digests=digests,
        facts=facts,
        job=job,
    )


def forget(run: Run, model_id: int) -> None:
    """Make all cells of a checkpoint missing."""
    first = next(FeaturizeCell.of_split(run.plan, model_id, "train"))
    shutil.rmtree(run.layout.receipts(run.plan, first))
    for cell in (GramCell(model_id), KernelCell(model_id), PreconditionCell(model_id, "val")):
        run.layout.receipt(run.plan, cell).unlink()


# The ways, each in a process of its own -----------------------------------------------------


def measure(way: str, run: Run) -> None:
    """Run a way, and print its seconds and the peak of its memory."""
    command = [sys.executable, __file__, "--way", way, str(run.layout.run_dir)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, cpu, peak = map(float, ended.stdout.split()[-3:])
    cells = FeaturizeCell.count(run.plan)
    print(f"{cells:>8}  {way:<26}{seconds:>9.2f}{cpu:>8.2f}{peak:>10.0f}", flush=True)


def run_way(way: str, run: Run) -> tuple[float, float]:
    """Wall and CPU seconds of a way, without its imports."""
    if way.startswith("status"):
        from trak_dist.status import state, text

        def do() -> None:
            status = state.read_status(run)
            assert text.lines(status)
            assert status.json_line()
    elif way.startswith("submit"):
        from trak_dist.executors import slurm

        def do() -> None:
            cluster, stages = SlurmConfig(device="cpu"), ("featurize", "reduce")
            slurm.dry_run(run, cluster, stages, rate=lambda: 1000.0)
    else:
        from trak_dist.runtime.inputs import check_same_rows

        def do() -> None:
            check_same_rows(run, ("train", "val"), needed_by=next(ScoreCell.of(run.plan)))

    started, cpu = time.perf_counter(), time.process_time()
    do()
    return time.perf_counter() - started, time.process_time() - cpu


if __name__ == "__main__":
    if sys.argv[1:2] == ["--way"]:
        seconds = run_way(sys.argv[2], Run.open(Path(sys.argv[3])))
        print(*seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)
    else:
        main([int(float(size)) for size in sys.argv[1:]])
