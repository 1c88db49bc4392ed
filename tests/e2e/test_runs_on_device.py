"""TRAKer and the launcher on the device: the CPU's scores, and the same bits each time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import oracle
import pytest
import small_cnn
import streaming_process
import torch
from command_result import Launch
from devices import DEVICE

from trak_dist import BasicProjector, NoOpProjector, ProjectionType, TRAKer, open_run

CLOSE = 1e-4
TRAIN, TARGETS, CHECKPOINTS, SUBSETS = streaming_process.TRAIN, 7, 2, 6

pytestmark = [
    pytest.mark.device,
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
]


@pytest.fixture
def checkpoints(tmp_path: Path) -> str:
    small_cnn.write_checkpoints(tmp_path / "checkpoints", count=CHECKPOINTS)
    return str(tmp_path / "checkpoints")


def assert_as_on_the_cpu(wanted: np.ndarray, first: np.ndarray, second: np.ndarray) -> None:
    assert first.shape == wanted.shape
    assert oracle.column_errors(first, wanted.astype(np.float64)).max() < CLOSE
    assert np.array_equal(first, second)


# TRAKer ---------------------------------------------------------------------------------------

PROJECTORS = {
    "left out": lambda: None,
    "rademacher": lambda: BasicProjector(
        grad_dim=9, proj_dim=64, seed=1, proj_type=ProjectionType.rademacher
    ),
    "normal": lambda: BasicProjector(
        grad_dim=9, proj_dim=64, seed=1, proj_type=ProjectionType.normal
    ),
    "none": NoOpProjector,
}


def fed(checkpoints: str, save_dir: Path, device: str, projector: object) -> np.ndarray:
    """Scores, of batches that the script has on the CPU or on the device already."""
    problem = small_cnn.problem(checkpoints)
    made: TRAKer = streaming_process.traker(
        checkpoints, str(save_dir), device=device, projector=projector, lambda_reg=5.0
    )
    states = [torch.load(path, weights_only=True) for path in problem.checkpoints]
    for model_id, state in enumerate(states):
        made.load_checkpoint(state, model_id=model_id)
        for rows in np.array_split(np.arange(TRAIN), 4):
            images, labels = streaming_process.batch(problem.train, rows)
            there = (images.to(device), labels.to(device)) if rows[0] else (images, labels)
            made.featurize(there, inds=torch.from_numpy(rows))
    made.finalize_features()
    for model_id, state in enumerate(states):
        made.start_scoring_checkpoint("val", state, model_id, TARGETS)
        targets = streaming_process.batch(problem.targets["val"], np.arange(TARGETS))
        made.score(targets, num_samples=TARGETS)
    return made.finalize_scores("val")


@pytest.mark.parametrize("projector", PROJECTORS)
def test_traker(projector: str, checkpoints: str, tmp_path: Path) -> None:
    runs = [("wanted", "cpu"), ("first", str(DEVICE)), ("second", str(DEVICE))]
    assert_as_on_the_cpu(
        *(
            fed(checkpoints, tmp_path / name, device, PROJECTORS[projector]())
            for name, device in runs
        )
    )


# The launcher ---------------------------------------------------------------------------------


def launched(launch: Launch, checkpoints: str, run_dir: Path, device: str, *more: str) -> None:
    ended = launch(
        f"run_dir={run_dir}",
        "problem._target_=small_cnn.problem",
        f"+problem.directory={checkpoints}",
        *("cluster=debug", f"cluster.device={device}", "proj_dim=64", "self_influence=true"),
        *("featurize.dtype=float32", "featurize.batch_rows=16", "featurize.cell_rows=32"),
        *more,
    )
    assert ended.code == 0, ended.err


def truth(directory: Path) -> list[str]:
    """A ground truth, so that all that there is to compute is computed on the device."""
    random = np.random.default_rng(0)
    np.save(directory / "masks.npy", random.random((SUBSETS, TRAIN)) < 0.5)
    np.save(directory / "margins.npy", random.standard_normal((SUBSETS, TARGETS)))
    return [f"ground_truth.{name}={directory / name}.npy" for name in ("masks", "margins")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ["featurize.gradients=hooks"],
        ["featurize.gradients=vmap", "projection=rademacher"],
        ["featurize.gradients=loop", "projection=gaussian", "reduce.kernel_scale=none"],
    ],
    ids=" ".join,
)
def test_launcher(settings: list[str], launch: Launch, checkpoints: str, tmp_path: Path) -> None:
    more = [*settings, *truth(tmp_path)]
    for name, device in [("wanted", "cpu"), ("first", DEVICE), ("second", DEVICE)]:
        launched(launch, checkpoints, tmp_path / name, str(device), *more)
    runs = [open_run(tmp_path / name) for name in ("wanted", "first", "second")]
    assert_as_on_the_cpu(*(run.scores("val") for run in runs))
    assert_as_on_the_cpu(*(run.self_influence()[:, None] for run in runs))
    receipts = runs[1].receipts("featurize").values()
    computed = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"
    assert {receipt.job["device"] for receipt in receipts} == {computed}


def test_launcher_in_bfloat16(launch: Launch, checkpoints: str, tmp_path: Path) -> None:
    for name in ("first", "second"):
        launched(launch, checkpoints, tmp_path / name, str(DEVICE), "featurize.compute=bfloat16")
    first, second = (open_run(tmp_path / name).scores("val") for name in ("first", "second"))
    assert np.array_equal(first, second)


@pytest.mark.long
def test_worker_processes_compute_what_one_does(
    launch: Launch, checkpoints: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    for cluster in ("debug", "local"):
        more = (f"cluster={cluster}", f"cluster.device={DEVICE}")
        launched(launch, checkpoints, tmp_path / cluster, str(DEVICE), *more)
    one, several = (open_run(tmp_path / name).scores("val") for name in ("debug", "local"))
    assert np.array_equal(one, several)
