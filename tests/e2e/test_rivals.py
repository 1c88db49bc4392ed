"""`benchmarks/rivals.py`: other scores of a run, and their LDS, against float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import oracle
import pytest
import tiny
import tiny_trained
from command_result import Launch
from safetensors.torch import load_file
from scipy import stats

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MODELS, SUBSETS = 2, 8


@pytest.mark.slow
def test_dot_product_and_cosine_are_those_in_float64(
    launch: Launch,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run_dir = tmp_path / "run"
    parameters = sum(p.numel() for p in tiny.net().parameters())
    ended = launch(
        *("problem._target_=tiny_trained.problem", "cluster=debug", f"run_dir={run_dir}"),
        *(f"checkpoints.train={MODELS}", f"ground_truth.subsets={SUBSETS}", "targets=val"),
        *("projection=identity", f"proj_dim={parameters}", "featurize.dtype=float32"),
    )
    assert ended.code == 0, ended.err
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import rivals

    problem = tiny_trained.problem()
    states = [load_file(run_dir / f"checkpoints/full/{m}.safetensors") for m in range(MODELS)]
    members = [
        oracle.member(tiny.net(), state, problem.train, problem.targets["val"]) for state in states
    ]
    run = rivals.Run.open(run_dir)
    truth = rivals.read_ground_truth(run, "val")
    printed = []
    for count, found in enumerate(rivals.similarities(run, "val"), 1):
        q = np.mean([m.out_to_loss for m in members[:count]], axis=0)[:, None]
        dot = np.mean([m.train @ m.targets.T for m in members[:count]], axis=0)
        cosine = np.mean([unit(m.train) @ unit(m.targets).T for m in members[:count]], axis=0)
        wanted = {"dot product": dot * q, "cosine": cosine, "cosine × Q": cosine * q}
        assert found.keys() == wanted.keys()
        for name, scores in wanted.items():
            np.testing.assert_allclose(found[name], scores, atol=1e-5 * np.abs(scores).max())
            predicted, margins = truth.masks @ found[name], truth.margins[:, 0]
            pairs = zip(predicted.T, margins.T, strict=True)
            mean = np.mean([stats.spearmanr(a, b).statistic for a, b in pairs])
            printed.append(f"{name:<16}{count:>3} checkpoints  {mean:.3f}")

    monkeypatch.setattr("sys.argv", ["rivals.py", str(run_dir)])
    monkeypatch.setattr(rivals.importlib.util, "find_spec", lambda name: None)
    rivals.main()
    lines = capfd.readouterr().out
    for line in printed:
        assert line in lines


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
