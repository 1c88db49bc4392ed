"""Indices of the package bergson become a run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from numpy.typing import NDArray

from trak_dist import import_bergson, open_run, plan_run
from trak_dist.errors import ConfigError, InterchangeError

N, TARGETS, SIZES = 40, 4, {"layer.0": 6, "layer.1": 4}


def index(path: Path, rows: NDArray, kind: str, **info: object) -> NDArray[np.float64]:
    """What bergson builds; the rows as they are in the file."""
    (path / "data.hf").mkdir(parents=True)
    tensor = torch.from_numpy(rows).to(getattr(torch, kind))
    (path / "gradients.bin").write_bytes(tensor.view(torch.uint8).numpy().tobytes())
    about = {"num_grads": len(rows), "grad_sizes": SIZES, "base_dtype": kind}
    described = {"attribute_tokens": False, "num_items": len(rows), **about, **info}
    (path / "info.json").write_text(json.dumps(described))
    return tensor.double().numpy()


def rows(n: int) -> NDArray[np.float64]:
    return np.random.default_rng(n).normal(size=(n, sum(SIZES.values())))


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_scores_are_those_of_the_formula(tmp_path: Path, kind: str) -> None:
    x = index(tmp_path / "train", rows(N), kind)
    g = index(tmp_path / "val", rows(TARGETS), kind)
    import_bergson(tmp_path / "train", tmp_path / "run", targets={"val": tmp_path / "val"})
    planned = plan_run(run_dir=tmp_path / "run", stage="reduce", cluster="debug")
    planned.execute().raise_for_failures()
    gram = x.T @ x
    kernel = np.linalg.inv(gram + np.trace(gram) / len(gram) * np.eye(len(gram)))
    wanted = x @ (kernel / np.abs(kernel).mean()) @ g.T
    found = open_run(tmp_path / "run").scores("val")
    assert oracle.column_errors(found, wanted).max() < 1e-5


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({"attribute_tokens": True}, "not one for each example"),
        ({"num_grads": N + 1}, "not as it is written: 800 bytes, not the 820"),
        ({"grad_sizes": {"layer.0": 10}}, "the modules of 'val' have other gradients"),
        ({"base_dtype": "object"}, "base_dtype 'object' is none of"),
        ({"num_grads": -1}, "num_grads is -1"),
    ],
)
def test_other_indices_are_refused(tmp_path: Path, info: dict[str, object], message: str) -> None:
    index(tmp_path / "train", rows(N), "float16", **info)
    index(tmp_path / "val", rows(TARGETS), "float16")
    with pytest.raises(InterchangeError, match=message):
        import_bergson(tmp_path / "train", tmp_path / "run", targets={"val": tmp_path / "val"})
    assert not (tmp_path / "run").exists()


def test_an_index_that_is_not_finished_is_refused(tmp_path: Path) -> None:
    index(tmp_path / "train", rows(N), "float16")
    (tmp_path / "train/data.hf").rmdir()
    with pytest.raises(InterchangeError, match="it is not finished"):
        import_bergson(tmp_path / "train", tmp_path / "run", targets={})
    with pytest.raises(ConfigError, match="can't be called 'train'"):
        import_bergson(tmp_path / "train", tmp_path / "run", targets={"train": tmp_path})
