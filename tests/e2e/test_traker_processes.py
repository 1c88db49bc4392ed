"""Many TRAKers, one `save_dir`: no coordinator, no first process, and some are killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import oracle
import pytest
import small_cnn
import streaming_process
import torch
from streaming_process import batch, traker

from trak_dist import open_run

PROCESSES, ROUNDS, KILLED, TARGETS = 8, 20, 3, 7
FINALIZE = """
import sys
from streaming_process import traker
fed = traker(sys.argv[1], sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
fed.finalize_features()
fed.finalize_scores("val")
"""


@pytest.fixture
def checkpoints(tmp_path: Path) -> str:
    small_cnn.write_checkpoints(tmp_path / "checkpoints")
    return str(tmp_path / "checkpoints")


def started(*command: str) -> subprocess.Popen[str]:
    homes = [str(Path(module.__file__).parent) for module in (streaming_process, small_cnn)]
    environment = {**os.environ, "PYTHONPATH": ":".join(homes), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *command],
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def complete(checkpoints: str, save_dir: Path) -> None:
    """All train rows that are not there yet, and all targets."""
    fed, problem = traker(checkpoints, str(save_dir)), small_cnn.problem(checkpoints)
    for model_id, path in enumerate(problem.checkpoints):
        state = torch.load(path, weights_only=True)
        fed.load_checkpoint(state, model_id)
        rows = np.arange(streaming_process.TRAIN)
        fed.featurize(batch(problem.train, rows), num_samples=len(rows))
    for model_id, path in enumerate(problem.checkpoints):
        state = torch.load(path, weights_only=True)
        fed.start_scoring_checkpoint("val", state, model_id, TARGETS)
        fed.score(batch(problem.targets["val"], np.arange(TARGETS)), num_samples=TARGETS)


@pytest.mark.slow
def test_processes_feed_overlapping_rows_and_some_are_killed(
    checkpoints: str, tmp_path: Path
) -> None:
    save_dir = tmp_path / "run"
    script = streaming_process.__file__
    workers = [
        started(script, checkpoints, str(save_dir), str(seed), str(ROUNDS))
        for seed in range(PROCESSES)
    ]
    for worker in workers:
        assert worker.stdout.readline() == "ready\n"
    chance = random.Random(0)
    for worker in chance.sample(workers, KILLED):
        time.sleep(chance.uniform(0.2, 1.5))
        worker.send_signal(signal.SIGKILL)
    killed = 0
    for worker in workers:
        _, error = worker.communicate(timeout=300)
        assert worker.returncode in (0, -signal.SIGKILL), error
        killed += worker.returncode != 0
    assert killed, "the processes ended before they could be killed"
    parts = list((save_dir / "parts").rglob("*.safetensors"))
    assert len(parts) > PROCESSES
    complete(checkpoints, save_dir)
    finalizers = [started("-c", FINALIZE, checkpoints, str(save_dir)) for _ in range(3)]
    for process in finalizers:
        assert process.stdout.readline() == "ready\n"
    for process in finalizers:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in finalizers:
        _, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
    found = open_run(save_dir).scores("val")
    complete(checkpoints, tmp_path / "alone")
    alone = traker(checkpoints, str(tmp_path / "alone")).finalize_scores("val")
    assert oracle.column_errors(found, alone.astype(np.float64)).max() < 1e-4
    assert not list((save_dir / "parts").rglob("*.safetensors"))
