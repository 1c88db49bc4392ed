"""Peak memory of one task of each step, on a run that is small: what a task needs at least.

    python benchmarks/memory_of_tasks.py [problem=mnist limit=1000 …]

What a user gives goes to the launcher; without it the problem is the tests' tiny one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).parent.parent / "tests"
sys.path.insert(0, str(TESTS))

import tiny  # noqa: E402 -- the tests' problem

from trak_dist.cells import STEPS  # noqa: E402
from trak_dist.store.run import Run  # noqa: E402

# Not getrusage: its peak may be that of the process this one was forked from.
TASK = """
import atexit, runpy, sys

def peak():
    print("peak", open("/proc/self/status").read().split("VmHWM:")[1].split()[0], file=sys.stderr)

atexit.register(peak)
runpy.run_module("trak_dist.task", run_name="__main__")
"""


def main(overrides: list[str]) -> None:
    os.environ["PYTHONPATH"] = str(TESTS)
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        tiny.write_checkpoints(path / "checkpoints", 2)
        tiny_problem = ["problem._target_=tiny.problem", "proj_dim=16"]
        tiny_problem.append(f"+problem.directory={path / 'checkpoints'}")
        command = [sys.executable, "-m", "trak_dist.launch", *(overrides or tiny_problem)]
        command += ["stage=plan", "cluster=debug", f"run_dir={path / 'run'}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        plan = Run.open(path / "run").plan
        print(f"{'step':<15}{'MiB at its peak':>16}{'of its cells':>14}")
        for step, kinds in STEPS.items():
            if any(kind.count(plan) for kind in kinds):
                cells = max(kind.memory(plan) for kind in kinds) / 2**20
                print(f"{step:<15}{measured(path / 'run', step):>16.0f}{cells:>14.0f}", flush=True)


def measured(run_dir: Path, step: str) -> float:
    """MiB that the task holds at its peak."""
    command = [sys.executable, "-c", TASK, str(run_dir), step, "--device", "cpu"]
    ended = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(ended.stderr.split("peak ")[-1]) / 1024


if __name__ == "__main__":
    main(sys.argv[1:])
