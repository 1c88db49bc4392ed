"""Memory of reduce is set by the block size, not by the number of train rows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

# Small chunks, so that few rows already fill one; the rest is the command line as it is.
SCRIPT = """
import pathlib
import trak_dist.plan_inputs
trak_dist.plan_inputs.CHUNK_BYTES = 2**22
from trak_dist.launch import main
main()
# Not getrusage: its peak may be that of the process this one was forked from.
status = pathlib.Path("/proc/self/status").read_text()
print("peak KiB", status.split("VmHWM:")[1].split()[0])
"""
ROWS = 6000


def peak(path: Path, rows: int, stage: str) -> int:
    command = [
        *(sys.executable, "-c", SCRIPT, "problem._target_=tiny.problem", f"stage={stage}"),
        *(f"+problem.directory={path / 'checkpoints'}", f"+problem.rows={rows}"),
        *("+problem.targets=300", "targets=val", "proj_dim=512", "cluster=debug"),
        *(f"run_dir={path / str(rows)}", "featurize.batch_rows=512", "featurize.dtype=float32"),
        "featurize.cell_rows=2048",
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(tiny.__file__).parent)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return int(ended.stdout.split()[-1])


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads its peak in /proc")
def test_ten_times_the_rows_take_the_same_memory(tmp_path: Path) -> None:
    tiny.write_checkpoints(tmp_path / "checkpoints", count=2)
    peaks = {}
    for rows in (ROWS, 10 * ROWS):
        peak(tmp_path, rows, "featurize")
        peaks[rows] = peak(tmp_path, rows, "reduce")
    grads = 10 * ROWS * 512 * 4 / 1024
    print(f"peak KiB of reduce: {peaks}; all grads of the larger run: {grads:.0f} KiB")
    assert grads > 0.2 * peaks[ROWS], "holding all grads would have shown"
    assert peaks[10 * ROWS] <= 1.1 * peaks[ROWS]
