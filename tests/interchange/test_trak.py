"""A `save_dir` of the package traker becomes a run, with the scores that traker has."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import oracle
import pytest
from numpy.typing import NDArray

from trak_dist import import_trak, open_run, plan_run
from trak_dist.errors import (
    ConfigError,
    InterchangeError,
    InterchangeNotFound,
    MixedRun,
    NonFiniteGradient,
    PlanMismatch,
)

N, K, TARGETS, MODELS, LAMBDA = 90, 12, 5, 2, 0.3


def save(path: Path, values: NDArray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path.with_suffix(".npy"), values)
    path.with_suffix(".npy").rename(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What traker leaves, with numbers of ours."""
    root, random = tmp_path_factory.mktemp("trak") / "save dir", np.random.default_rng(0)
    for model_id in range(MODELS):
        folder = root / str(model_id)
        save(folder / "grads.mmap", random.normal(size=(N, K)).astype(np.float32))
        save(folder / "out_to_loss.mmap", random.uniform(size=(N, 1)).astype(np.float32))
        save(folder / "_is_featurized.mmap", np.ones((N, 1), np.int32))
        save(folder / "val_grads.mmap", random.normal(size=(TARGETS, K)).astype(np.float32))
        described = {str(model_id): {"is_featurized": 1, "is_finalized": 0}}
        (root / f"id_{model_id}.json").write_text(json.dumps(described))
    metadata = {"JL dimension": K, "JL matrix type": "normal", "train set size": N}
    (root / "metadata.json").write_text(json.dumps(metadata))
    (root / "experiments.json").write_text(json.dumps({"val": {"num_targets": TARGETS}}))
    return root


@pytest.fixture
def save_dir(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "save dir"))


def formula(save_dir: Path, reg: float) -> NDArray[np.float64]:
    """TRAK's scores in float64, from its files."""
    products, weights = [], []
    for folder in sorted(p for p in save_dir.iterdir() if p.name.isdecimal()):
        x, g, q = (
            np.load(folder / f"{name}.mmap").astype(np.float64)
            for name in ("grads", "val_grads", "out_to_loss")
        )
        kernel = np.linalg.inv(x.T @ x + reg * np.eye(x.shape[1]))
        products.append(x @ (kernel / np.abs(kernel).mean()) @ g.T)
        weights.append(q.reshape(-1, 1))
    return np.mean(products, 0) * np.mean(weights, 0)


def scores(run_dir: Path, reg: float) -> NDArray[np.float32]:
    planned = plan_run(run_dir=run_dir, stage="reduce", cluster="debug", reduce={"lambda_reg": reg})
    planned.execute().raise_for_failures()
    return open_run(run_dir).scores("val")


def assert_equal(ours: NDArray, theirs: NDArray, tolerance: float) -> None:
    assert ours.shape == theirs.shape
    errors = oracle.column_errors(ours, theirs.astype(np.float64))
    print(f"relative errors: {errors}")
    assert errors.max() <= tolerance


def test_scores_are_those_of_the_formula(save_dir: Path, tmp_path: Path) -> None:
    import_trak(save_dir, tmp_path / "run")
    assert_equal(scores(tmp_path / "run", LAMBDA), formula(save_dir, LAMBDA), 1e-6)
    facts = [r.facts for r in open_run(tmp_path / "run").receipts("featurize").values()]
    assert {f["imported_from"] for f in facts} == {str(save_dir)}
    assert {(f["imported_by"], f["projector"]) for f in facts} == {
        ("import_trak", "normal of traker")
    }
    assert len({f["imported_digest"] for f in facts}) == 2 * MODELS


@pytest.mark.filterwarnings("ignore:::trak")
def test_scores_are_those_of_the_package(tmp_path: Path) -> None:
    import torch
    from torch import nn
    from trak import TRAKer
    from trak.gradient_computers import IterativeGradientComputer

    torch.manual_seed(0)
    states = [nn.Linear(6, 3).state_dict() for _ in range(MODELS)]
    train, targets = ((torch.randn(n, 6), torch.randint(3, (n,))) for n in (N, TARGETS))
    traker = TRAKer(
        nn.Linear(6, 3),
        "iterative_image_classification",
        N,
        str(tmp_path / "trak"),
        device="cpu",
        gradient_computer=IterativeGradientComputer,
        proj_dim=16,
        use_half_precision=False,
        lambda_reg=LAMBDA,
        logging_level=logging.ERROR,
    )
    for model_id, state in enumerate(states):
        traker.load_checkpoint(state, model_id=model_id)
        traker.featurize(batch=train, num_samples=N)
    traker.finalize_features()
    for model_id, state in enumerate(states):
        traker.start_scoring_checkpoint("val", state, model_id, num_targets=TARGETS)
        traker.score(batch=targets, num_samples=TARGETS)
    theirs = np.array(traker.finalize_scores(exp_name="val"))
    import_trak(tmp_path / "trak", tmp_path / "run")
    assert_equal(scores(tmp_path / "run", LAMBDA), theirs, 1e-4)


def test_an_import_goes_on_where_it_ended(
    save_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trak_dist.store import contents

    write, written = contents.write, []

    def failing(run, cell, values):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(cell)
        return write(run, cell, values)

    monkeypatch.setattr(contents, "write", failing)
    with pytest.raises(KeyboardInterrupt):
        import_trak(save_dir, tmp_path / "run")
    monkeypatch.undo()
    ended = plan_run(run_dir=tmp_path / "run", cluster="debug").execute()
    assert "import them again" in next(iter(ended.failed.values())).error
    import_trak(save_dir, tmp_path / "run", model_ids=[1])
    import_trak(save_dir, tmp_path / "run")
    assert_equal(scores(tmp_path / "run", LAMBDA), formula(save_dir, LAMBDA), 1e-6)


def test_float16_rows_are_taken_bit_by_bit(save_dir: Path, tmp_path: Path) -> None:
    rows = {}
    for path in save_dir.glob("*/*grads.mmap"):
        rows[path.parent.name, path.name] = values = np.load(path).astype(np.float16)
        save(path, values)
    import_trak(save_dir, tmp_path / "run")
    (stored,) = (tmp_path / "run/store.zarr/models/1").glob("*/train/grads")
    import zarr

    assert np.array_equal(zarr.open_array(stored, mode="r")[:], rows["1", "grads.mmap"])


def edited(path: Path, change: object) -> None:
    values = np.load(path)
    change(values)
    save(path, values)


def nan(values: NDArray) -> None:
    values[3, 1] = np.nan


def zero(values: NDArray) -> None:
    values[1:3] = 0


def unfinished(values: NDArray) -> None:
    values[40:] = 0


@pytest.mark.parametrize(
    ("name", "change", "kind", "message"),
    [
        ("1/grads.mmap", nan, NonFiniteGradient, "in 1 of 90 rows: 3"),
        ("1/val_grads.mmap", zero, InterchangeError, "2 of 5 rows are zero, so they were never"),
        ("0/_is_featurized.mmap", unfinished, InterchangeError, "50 of 90 train rows were not"),
    ],
)
def test_rows_that_are_not_there_are_refused(
    save_dir: Path, tmp_path: Path, name: str, change: object, kind: type[Exception], message: str
) -> None:
    edited(save_dir / name, change)
    with pytest.raises(kind, match=message):
        import_trak(save_dir, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-64])


def other_dimension(path: Path) -> None:
    save(path, np.ones((N, K + 1), np.float32))


def objects(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.array([{"a": 1}] * N, dtype=object), allow_pickle=True)


def integers(path: Path) -> None:
    save(path, np.ones((N, K), np.int64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut, "not as it is written: "),
        (other_dimension, r"an array \(90, 13\) of float32, not \(90, 12\)"),
        (objects, "not as it is written: "),
        (integers, "of int64, not"),
        (Path.unlink, "del_grads=True"),
    ],
)
def test_files_that_are_others_are_refused(
    save_dir: Path, tmp_path: Path, change: object, message: str
) -> None:
    change(save_dir / "1/grads.mmap")
    with pytest.raises(InterchangeError, match=message):
        import_trak(save_dir, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_directory_that_is_no_save_dir_is_refused(save_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(InterchangeNotFound, match=r"metadata\.json"):
        import_trak(tmp_path, tmp_path / "run")
    (save_dir / "metadata.json").write_text("{}")
    with pytest.raises(InterchangeError, match="'train set size' is None"):
        import_trak(save_dir, tmp_path / "run")


def test_what_is_not_there_is_refused_by_name(save_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model_id 7 is not there"):
        import_trak(save_dir, tmp_path / "run", model_ids=[7])
    with pytest.raises(ConfigError, match="experiment 'test' is not there"):
        import_trak(save_dir, tmp_path / "run", experiments=["test"])
    shutil.rmtree(save_dir / "1")
    shutil.copytree(save_dir / "0", save_dir / "1")
    with pytest.raises(InterchangeError, match="model_ids 0 and 1 have the same train grads"):
        import_trak(save_dir, tmp_path / "run")


def test_another_save_dir_is_not_mixed_in(save_dir: Path, tmp_path: Path) -> None:
    import_trak(save_dir, tmp_path / "run", model_ids=[0])
    edited(save_dir / "0/grads.mmap", lambda values: np.negative(values, out=values))
    with pytest.raises(MixedRun, match="'train' of model_id 0 has changed since it was imported"):
        import_trak(save_dir, tmp_path / "run")
    metadata = {"JL dimension": K, "JL matrix type": "rademacher", "train set size": N}
    (save_dir / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(PlanMismatch, match="another one"):
        import_trak(save_dir, tmp_path / "run")
