"""A new kind of cell is two files, those in `made_up`: what it is, and what computes it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr
from tiny import write_checkpoints

import trak_dist

HERE = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture
def with_kind(tmp_path: Path):
    """Runs Python with a copy of the package that has the kind; what it prints."""
    package = tmp_path / "site/trak_dist"
    shutil.copytree(Path(trak_dist.__file__).parent, package)
    shutil.copytree(HERE / "made_up", package, dirs_exist_ok=True)
    conf = HERE.parent / "conf"
    if conf.exists():
        shutil.copytree(conf, tmp_path / "site/conf")

    def run(*arguments: str, code: int = 0) -> str:
        ended = subprocess.run(
            [sys.executable, *arguments],
            env={**os.environ, "PYTHONPATH": f"{tmp_path / 'site'}:{HERE}"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == code, ended.stderr
        return ended.stdout

    return run


@pytest.mark.long
def test_a_new_kind_runs_resumes_and_is_verified_like_any_other(with_kind, tmp_path: Path) -> None:
    write_checkpoints(tmp_path / "checkpoints", count=2)
    launch = (
        *("-m", "trak_dist.launch", f"run_dir={tmp_path / 'run'}", "cluster=debug"),
        *("problem._target_=tiny.problem", f"+problem.directory={tmp_path / 'checkpoints'}"),
        *("proj_dim=8", "reduce.lambda_reg=1"),
    )
    with_kind(*launch)
    store = zarr.open_group(tmp_path / "run/store.zarr", mode="r")
    (projection,) = store["models/0"].group_keys()
    for model_id in (0, 1):
        made = store[f"models/{model_id}/{projection}"]
        gram = np.tril(made["gram/8-output"][:])
        whole = gram + np.tril(gram, -1).T
        np.testing.assert_allclose(made["spectrum/8"][:], np.linalg.eigvalsh(whole), rtol=1e-12)
    # Its receipts lie with the others; the graph, Slurm's resources and verify know it.
    (receipt,) = (tmp_path / "run/receipts/spectrum").rglob("spectrum_1.json")
    receipt.unlink()
    with_kind(*launch)
    assert receipt.exists()
    chunk = next((tmp_path / f"run/store.zarr/models/0/{projection}/spectrum/8/c").iterdir())
    chunk.write_bytes(b"\0" * chunk.stat().st_size)
    told = with_kind(
        "-m", "trak_dist.launch", "stage=verify", f"run_dir={tmp_path / 'run'}", code=1
    )
    assert "spectrum/0" in told
    assert with_kind("-c", KNOWN, str(tmp_path / "run")).split() == ["gram,kernel,spectrum", "True"]


KNOWN = """
import sys
from pathlib import Path
from trak_dist import graph, resources
from trak_dist.cells import GramCell, STEPS
from trak_dist.cells.spectrum import SpectrumCell
from trak_dist.store.run import Run

plan = Run.open(Path(sys.argv[1])).plan
first, *_ = graph.tasks(plan, "kernel")
print(",".join(cell.kind for cell in first if cell.kind != "precondition"))
print(resources.disk_bytes(plan, [SpectrumCell]) == 2 * (8 * 8 + 4))
"""
