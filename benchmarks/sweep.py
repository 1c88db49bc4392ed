"""A sweep over four dimensions against one featurize pass, and against four separate runs.

    python benchmarks/sweep.py [LIMIT]

MNIST, its first LIMIT examples or all, checkpoints trained before the clock starts. The three ways
alternate, each as commands of their own with `cluster=debug`; the medians' ratios count.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROUNDS = 3
DIMS = (256, 512, 1024, 2048)
LIMIT = sys.argv[1] if len(sys.argv) > 1 else "0"


def launch(run_dir: Path, *arguments: str) -> None:
    """Run the command line on the MNIST problem."""
    command = [sys.executable, "-m", "trak_dist.launch", *arguments]
    given = ("problem=mnist", f"limit={LIMIT}", "cluster=debug", f"run_dir={run_dir}")
    ended = subprocess.run([*command, *given], capture_output=True, text=True, check=False)
    if ended.returncode:
        sys.exit(ended.stderr)


def trained(path: Path, name: str) -> Path:
    """The checkpoints alone, which a new run takes over by their receipts."""
    if not (path / "trained").exists():
        launch(path / "trained", "stage=train", "checkpoints.train=2", f"proj_dim={DIMS[-1]}")
    for part in ("checkpoints", "receipts/train"):
        shutil.copytree(path / "trained" / part, path / name / part)
    return path / name


def one_pass(path: Path, name: str) -> float:
    """Seconds of featurizing at the largest dimension."""
    run_dir = trained(path, name)
    started = time.perf_counter()
    launch(run_dir, "stage=featurize", "checkpoints.train=2", f"proj_dim={DIMS[-1]}")
    return time.perf_counter() - started


def multirun(path: Path, name: str) -> float:
    """Seconds of a sweep over the dimensions, reports and all."""
    run_dir = trained(path, name)
    started = time.perf_counter()
    launch(run_dir, "-m", "checkpoints.train=2", f"proj_dim={','.join(map(str, DIMS))}")
    return time.perf_counter() - started


def separate(path: Path, name: str) -> float:
    """Seconds of a run for each dimension, reports and all."""
    run_dirs = {dim: trained(path, f"{name}-{dim}") for dim in DIMS}
    started = time.perf_counter()
    for dim, run_dir in run_dirs.items():
        launch(run_dir, "checkpoints.train=2", f"proj_dim={dim}")
    return time.perf_counter() - started


def main() -> None:
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as directory:
        for i in range(ROUNDS):
            for way in (one_pass, multirun, separate):
                took = way(Path(directory), f"{way.__name__}-{i}")
                seconds.setdefault(way.__name__, []).append(took)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, median in medians.items():
        rounds = ", ".join(f"{s:.1f}" for s in seconds[name])
        print(
            f"{name:<9} {median:7.1f} s   ÷ one pass {median / medians['one_pass']:.2f}   {rounds}"
        )
    print(f"separate ÷ multirun: {medians['separate'] / medians['multirun']:.2f}")


if __name__ == "__main__":
    main()
