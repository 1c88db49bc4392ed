"""A real Slurm for the tests of this directory, started once; and runs on it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import tiny
from on_slurm import Lab, overrides, scores

HERE = Path(__file__).parent
SCRIPT = HERE.parent.parent / "launch" / "slurm-lab"
HOW = "the Slurm tests need root and, on Debian or Ubuntu, `launch/slurm-lab install`"


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.slurm)


@contextlib.contextmanager
def running_lab(base: int, *options: str) -> Iterator[Lab]:
    if os.geteuid() or not shutil.which("slurmctld", path="/usr/sbin:/usr/bin:/sbin"):
        if os.environ.get("CI") == "true":
            pytest.fail(HOW)
        pytest.skip(HOW)
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    port = base + 20 * worker  # a lab for each of pytest's processes
    # munged wants every directory above its socket open to all, which pytest's own are not.
    with tempfile.TemporaryDirectory(prefix="slurm-lab-") as directory:
        lab = Lab(Path(directory), ("--port", str(port), *options))
        try:
            lab("start")
            yield lab
        finally:
            lab("stop")


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    with running_lab(18800) as lab:
        yield lab


@pytest.fixture(scope="session")
def small_lab() -> Iterator[Lab]:
    """Arrays of at most 11 tasks, as indices below 11."""
    with running_lab(19800, "--max-array-size", "11") as lab:
        yield lab


@pytest.fixture(autouse=True)
def _slurm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm's commands, and the jobs' Python, find the lab and the tests' modules."""
    name = "small_lab" if "small_lab" in request.fixturenames else "lab"
    lab = request.getfixturevalue(name)
    monkeypatch.setenv("SLURM_CONF", str(lab.directory / "etc" / "slurm.conf"))
    monkeypatch.setenv("PYTHONPATH", f"{HERE}:{HERE.parent}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A directory with two checkpoints."""
    tiny.write_checkpoints(tmp_path / "checkpoints", 2)
    return tmp_path


@pytest.fixture(scope="session")
def expected(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """The scores of the undisturbed run, computed in one process without Slurm."""
    path = tmp_path_factory.mktemp("expected")
    tiny.write_checkpoints(path / "checkpoints", 2)
    environment = {**os.environ, "PYTHONPATH": f"{HERE}:{HERE.parent}"}
    command = [sys.executable, "-m", "trak_dist.launch", *overrides(path, "run"), "cluster=debug"]
    subprocess.run(command, check=True, capture_output=True, env=environment)
    return scores(path / "run")
