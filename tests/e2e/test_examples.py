"""The examples run: the quickstart on few images, with fewer of everything else."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from trak_dist import open_run

EXAMPLES = Path(__file__).parents[2] / "examples"
IMAGES = 60


def write_idx(path: Path, values: np.ndarray) -> None:
    sizes = b"".join(n.to_bytes(4, "big") for n in values.shape)
    path.write_bytes(bytes([0, 0, 8, values.ndim]) + sizes + values.tobytes())


@pytest.mark.slow
def test_the_quickstart_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import quickstart

    random = np.random.default_rng(0)
    for name in ("train", "t10k"):
        images = random.integers(0, 256, (IMAGES, 28, 28), dtype=np.uint8)
        write_idx(tmp_path / f"{name}-images-idx3-ubyte", images)
        labels = np.array([quickstart.PULLOVER, quickstart.COAT, 7], np.uint8)
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte", labels[np.arange(IMAGES) % 3])
    monkeypatch.setattr(quickstart, "ROOT", str(tmp_path))
    monkeypatch.setattr(quickstart, "CHECKPOINTS", 2)
    monkeypatch.setattr(quickstart, "TARGETS", 6)
    quickstart.main(tmp_path / "run", train=20, epochs=1, subsets=3)
    assert "over 6 targets, from 3 retrained models" in capsys.readouterr().out
    assert (tmp_path / "run/quickstart.png").stat().st_size > 10_000
    assert open_run(tmp_path / "run/trak_results").scores("quickstart").shape == (20, 6)
    assert sys.modules["quickstart"].__file__ == str(EXAMPLES / "quickstart.py")
