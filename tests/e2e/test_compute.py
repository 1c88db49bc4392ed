"""`featurize.compute=bfloat16`: what is computed in it, what is not, and a model that can't be."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import small_cnn
import torch
from command_result import Launch
from torch import Tensor, nn

import trak_dist
from trak_dist import open_run


class Masked(nn.Module):
    """Makes a tensor of one fixed type."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small_cnn.net()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * torch.ones(x.shape, dtype=torch.float32))


def masked(directory: str) -> trak_dist.Problem:
    plain = small_cnn.problem(directory)
    path = Path(directory) / "masked.pt"
    torch.save(Masked().state_dict(), path)
    return trak_dist.Problem(
        model=Masked(),
        model_output=trak_dist.ImageClassification(),
        train=plain.train,
        targets=plain.targets,
        checkpoints=[path],
    )


def overrides(path: Path, *more: str) -> list[str]:
    small_cnn.write_checkpoints(path / "checkpoints", count=2)
    return [
        "problem._target_=small_cnn.problem",
        f"+problem.directory={path / 'checkpoints'}",
        *("cluster=debug", "projection=identity", "featurize.dtype=float32", *more),
    ]


@pytest.mark.parametrize("gradients", ["hooks", "vmap"])
def test_bfloat16_is_close_to_float32_and_says_so(
    gradients: str, launch: Launch, tmp_path: Path
) -> None:
    for compute in ("model", "bfloat16"):
        ended = launch(
            f"run_dir={tmp_path / compute}",
            *overrides(
                tmp_path, f"featurize.compute={compute}", f"featurize.gradients={gradients}"
            ),
        )
        assert ended.code == 0, ended.err
    exact, found = (open_run(tmp_path / compute) for compute in ("model", "bfloat16"))
    wanted, rounded = exact.scores("val"), found.scores("val")
    error = np.linalg.norm(rounded - wanted) / np.linalg.norm(wanted)
    # bfloat16 has 8 bits: 0.4 % each number; the kernel weighs what is left of sums unevenly.
    assert 1e-4 < error < 0.05
    assert {r.facts["compute"] for r in found.receipts("featurize").values()} == {"bfloat16"}


def test_a_model_that_can_not_be_computed_in_bfloat16_is_refused_when_planning(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setitem(sys.modules, "test_compute", sys.modules[__name__])
    arguments = overrides(tmp_path, f"run_dir={tmp_path / 'run'}", "featurize.compute=bfloat16")
    ended = launch(*arguments, "problem._target_=test_compute.masked")
    assert ended.code == 2
    assert "the model output can't be computed on the first examples of 'train'" in ended.err
    assert not (tmp_path / "run").exists()
