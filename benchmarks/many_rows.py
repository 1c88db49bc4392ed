"""A whole run of very many rows and targets that keeps the strongest scores only.

    python benchmarks/many_rows.py [ROWS TARGETS [SETTING …]]

Two checkpoints of a small network on random examples, k = 256. Each stage is a command of its own,
in one process (`cluster=debug`): its seconds, the peak of its memory, and what it left on disk.
Then the peak of reading the strongest scores of ten targets.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import trak_dist

FEATURES, CLASSES, CHECKPOINTS, DIM = 32, 4, 2, 256
STAGES = ("plan", "featurize", "reduce", "report", "status")
READ = "import sys, trak_dist; trak_dist.open_run(sys.argv[1]).top('val', range(10), 100)"


def problem(rows: int, targets: int, checkpoints: str) -> trak_dist.Problem:
    """Random examples, and a network that knows nothing of them."""
    return trak_dist.Problem(
        model=network(),
        model_output=trak_dist.ImageClassification(),
        train=examples(rows, seed=1),
        targets={"val": examples(targets, seed=2)},
        checkpoints=sorted(Path(checkpoints).glob("*.pt")),
    )


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 64), nn.ReLU(), nn.Linear(64, CLASSES))


def examples(rows: int, *, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    features: Tensor = torch.randn(rows, FEATURES, generator=generator)
    return TensorDataset(features, torch.randint(CLASSES, (rows,), generator=generator))


def main(rows: int, targets: int, settings: list[str]) -> None:
    print(f"{rows:,} rows × {CHECKPOINTS} checkpoints × {targets:,} targets, k = {DIM}")
    print(f"{'':<12}{'seconds':>9}{'peak MiB':>10}{'files':>8}{'MiB on disk':>13}")
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        for seed in range(CHECKPOINTS):
            torch.manual_seed(seed)
            torch.save(network().state_dict(), root / f"{seed}.pt")
        run_dir = root / "run"
        given = [
            "problem._target_=many_rows.problem",
            *(f"+problem.rows={rows}", f"+problem.targets={targets}"),
            *(f"+problem.checkpoints={root}", f"proj_dim={DIM}", "featurize.batch_rows=512"),
            *("scores.keep=top", "cluster=debug", f"run_dir={run_dir}", *settings),
        ]
        for stage in STAGES:
            command = ["-m", "trak_dist.launch", f"stage={stage}", *given]
            measure(stage, command, run_dir)
        measure("top", ["-c", READ, str(run_dir)], run_dir)


def measure(what: str, command: list[str], run_dir: Path) -> None:
    """Run it; print its time, its memory, and what the run has on disk afterwards."""
    started = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", *command],
        cwd=Path(__file__).parent,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as child:
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"{what} failed")
    seconds = time.perf_counter() - started
    files = [path for path in run_dir.rglob("*") if path.is_file()]
    disk = sum(path.stat().st_size for path in files) / 2**20
    peak = usage.ru_maxrss / 2**10
    print(f"{what:<12}{seconds:>9.1f}{peak:>10,.0f}{len(files):>8}{disk:>13,.0f}", flush=True)


if __name__ == "__main__":
    sizes = [int(float(size)) for size in sys.argv[1:3]] or [2 * 10**6, 2000]
    main(sizes[0], sizes[1], sys.argv[3:])
