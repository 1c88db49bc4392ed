"""What trak_dist costs on Slurm: an array of 50 tiny cells against bare arrays, and 2,000 tasks.

    launch/slurm-lab start && eval "$(launch/slurm-lab env)" && python benchmarks/slurm.py

Rounds of both kinds alternate in one run on the Slurm that is there; the medians' ratio counts.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).parent.parent / "tests"
sys.path.insert(0, str(TESTS))

import tiny  # noqa: E402 -- the tests' problem

ROUNDS, TASKS = 2, 50  # a round takes four minutes on two cores
# What a featurize task imports: the worker, its stage, the problem, and what torch.func does.
IMPORTS = "import trak_dist.worker, trak_dist.stages.featurize, tiny, torch._dynamo"


def launch(path: Path, name: str, *overrides: str) -> float:
    """Seconds that a launch takes."""
    command = [
        *(sys.executable, "-m", "trak_dist.launch", "problem._target_=tiny.problem"),
        *(f"+problem.directory={path / 'checkpoints'}", f"run_dir={path / name}", "proj_dim=16"),
        *("featurize.batch_rows=1", "featurize.cell_rows=1", "targets=val"),
        *("cluster=slurm", "cluster.device=cpu", "cluster.rows_per_task=1", "cluster.memory_gb=1"),
        *overrides,
    ]
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def empty_queue() -> None:
    """Wait until nothing of the user's is in the queue."""
    command = ["squeue", "-h", "-u", str(os.geteuid())]
    while subprocess.run(command, capture_output=True, text=True, check=True).stdout:
        time.sleep(0.05)


def ours(path: Path, name: str) -> float:
    """Seconds of an array of 50 tasks with a cell of one row each."""
    launch(path, name, "+problem.rows=48", "+problem.targets=2", "stage=plan")
    started = time.perf_counter()
    seconds = launch(path, name, "stage=featurize")
    empty_queue()
    return time.perf_counter() - started - seconds


def bare(path: Path) -> float:
    """Seconds of an array of 50 tasks that import the same and do nothing."""
    command = ["sbatch", f"--array=0-{TASKS - 1}", "--cpus-per-task=2", "--mem=1024M"]
    wrap = f"--wrap={sys.executable} -c '{IMPORTS}'"
    subprocess.run([*command, f"--output={path}/bare.out", wrap], check=True, capture_output=True)
    started = time.perf_counter()
    empty_queue()
    return time.perf_counter() - started


def main() -> None:
    os.environ["PYTHONPATH"] = str(TESTS)
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        tiny.write_checkpoints(path / "checkpoints", 1)
        times = []
        for i in range(ROUNDS):
            times.append((ours(path, f"run{i}"), bare(path)))
            print(f"round {i + 1}: {times[-1][0]:.1f} s, bare {times[-1][1]:.1f} s", flush=True)
        mine, theirs = (statistics.median(column) for column in zip(*times, strict=True))
        print(
            f"array of {TASKS} tiny cells: {mine:.1f} s, bare array of the same imports: ", end=""
        )
        print(f"{theirs:.1f} s, ratio {mine / theirs:.2f}")
        planned = launch(path, "many", "+problem.rows=1998", "+problem.targets=2", "stage=plan")
        seconds = launch(path, "many", "stage=featurize")
        print(f"launch of 2,000 tasks: {seconds:.1f} s (planning them before: {planned:.1f} s)")
        launch(path, "many", "stage=cancel")
        empty_queue()


if __name__ == "__main__":
    main()
