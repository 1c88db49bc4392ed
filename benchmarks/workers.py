"""Two local workers against two bare copies of the same loop: what does sharing the work cost?

    python benchmarks/workers.py

Each kind runs with one process and with two, alternating; the speed-ups' ratio counts. The bare
copies call the same loop on halves of the same cells, without launcher, submitit or progress.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from trak_dist.cells import of_stage
from trak_dist.store.run import Run

ROUNDS = 3
LOOP = """
import sys
from trak_dist.worker import run_cells
run_dir, fingerprint, *cells = sys.argv[1:]
assert run_cells(run_dir, fingerprint, "cpu", cells)
"""


def launch(run_dir: Path, *overrides: str) -> None:
    """Run the command line on the MNIST problem."""
    command = [sys.executable, "-m", "trak_dist.launch", "problem=mnist", f"run_dir={run_dir}"]
    subprocess.run([*command, *overrides], check=True, stdout=subprocess.DEVNULL)


def trained(path: Path, name: str) -> Path:
    """A run whose checkpoints are trained and nothing else."""
    if not (path / "trained").exists():
        launch(path / "trained", "stage=train", "checkpoints.train=6", "cluster=local")
    shutil.copytree(path / "trained", path / name)
    return path / name


def local(path: Path, name: str, workers: int) -> float:
    """Seconds of `stage=featurize` with so many workers."""
    run_dir = trained(path, name)
    started = time.perf_counter()
    launch(run_dir, "stage=featurize", "cluster=local", f"cluster.workers={workers}")
    return time.perf_counter() - started


def bare(path: Path, name: str, workers: int) -> float:
    """Seconds of so many bare copies of the loop."""
    run = Run.open(trained(path, name))
    cells = [cell.id for cell in of_stage(run.plan, "featurize")]
    started = time.perf_counter()
    share = -(-len(cells) // workers)
    base = [sys.executable, "-c", LOOP, str(run.layout.run_dir), run.plan.fingerprint]
    processes = [
        subprocess.Popen([*base, *cells[i : i + share]]) for i in range(0, len(cells), share)
    ]
    codes = [process.wait() for process in processes]
    assert not any(codes)
    return time.perf_counter() - started


def main() -> None:
    seconds: dict[tuple[str, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as directory:
        for i in range(ROUNDS):
            for kind in (local, bare):
                for workers in (1, 2):
                    name = f"{kind.__name__}-{workers}-{i}"
                    took = kind(Path(directory), name, workers)
                    seconds.setdefault((kind.__name__, workers), []).append(took)
    medians = {key: statistics.median(times) for key, times in seconds.items()}
    for kind in ("local", "bare"):
        one, two = medians[kind, 1], medians[kind, 2]
        print(
            f"{kind:<6} 1 worker {one:6.1f} s   2 workers {two:6.1f} s   speed-up {one / two:.2f}"
        )
    ours, theirs = (medians[k, 1] / medians[k, 2] for k in ("local", "bare"))
    print(f"ratio of the speed-ups: {ours / theirs:.2f}")


if __name__ == "__main__":
    main()
