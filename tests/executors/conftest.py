"""A Slurm whose commands are faked, and the tiny run to submit to it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from fake_slurm import USER, FakeSlurm

from trak_dist.executors import batch

HIDDEN = ("SLURM", "SBATCH", "SRUN_", "SQUEUE_", "SACCT_", "SCANCEL_", "SUBMITIT_", "TRAK_DIST_")


@pytest.fixture
def fake_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """Fake commands, and no others to be found; nothing pauses."""
    for name in [name for name in os.environ if name.startswith(HIDDEN)]:
        monkeypatch.delenv(name)
    fake = FakeSlurm(tmp_path / "slurm")
    monkeypatch.setenv("PATH", str(fake.home / "bin"))
    monkeypatch.setenv("LOGNAME", USER)
    monkeypatch.setattr(batch, "PAUSE_SECONDS", 0.0)
    return fake


@pytest.fixture
def slurm_run(fake_slurm: FakeSlurm, tiny_run: list[str]) -> list[str]:
    """Overrides that submit the tiny run: 9 cells and 3 tasks of featurize for each checkpoint."""
    others = [o for o in tiny_run if not o.startswith("cluster")]
    return [*others, "cluster=slurm", "cluster.rows_per_task=50", "cluster.memory_gb=1"]
