"""Labels, and logits, that do not go together: refused when planning, with the row and both."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

import trak_dist
from trak_dist.errors import DatasetError, NonFiniteGradient, ProblemError

BAD = 3  # the row with a label that is none


def problem(tmp_path: Path, **other: Any) -> trak_dist.Problem:
    tiny.write_checkpoints(tmp_path, 1)
    return replace(tiny.problem(str(tmp_path)), **other)


def planned(made: trak_dist.Problem, tmp_path: Path, **settings: Any) -> Any:
    run_dir = tmp_path / "run"
    return trak_dist.plan_run(problem=made, run_dir=run_dir, cluster="debug", **settings)


def mislabelled(label: int) -> tiny.Rows:
    rows = tiny.Rows(20, seed=1)
    rows.labels[BAD] = label
    return rows


class Squeezed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(tiny.FEATURES, 1)

    def forward(self, features: Tensor) -> Tensor:
        return self.out(features).squeeze(-1)


@pytest.mark.parametrize("model", [nn.Linear(tiny.FEATURES, 1), Squeezed()], ids=["one", "none"])
def test_a_classifier_with_one_logit_is_refused_when_planning(
    model: nn.Module, tmp_path: Path
) -> None:
    torch.save(model.state_dict(), tmp_path / "one.pt")
    made = problem(tmp_path, model=model, checkpoints=[tmp_path / "one.pt"])
    with pytest.raises(ProblemError) as raised:
        planned(made, tmp_path)
    shape = (1, 1) if isinstance(model, nn.Linear) else (1,)
    assert str(raised.value) == (
        f"logits of shape {shape}: the margin of a class needs (batch, classes), two classes or "
        "more\n"
        "  where: the model, the first examples of 'train'\n"
        "  next:  of one logit for each example, MultiLabelClassification and labels (batch, 1) of "
        "0 and 1; of a value, Regression; or a model with a logit for each class"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("label", [tiny.CLASSES, 12, -1])
def test_a_label_that_is_no_class_is_named_when_planning(label: int, tmp_path: Path) -> None:
    with pytest.raises(DatasetError) as raised:
        planned(problem(tmp_path, train=mislabelled(label)), tmp_path)
    assert str(raised.value) == (
        f"label {label} of row 3 of 'train', the model has 3 logits\n"
        "  where: problem\n"
        "  next:  correct the label, leave the row out, or give the model that it is for"
    )


def test_one_that_planning_did_not_see_is_named_by_its_cell(tmp_path: Path) -> None:
    run = planned(
        problem(tmp_path, train=mislabelled(12)), tmp_path, featurize={"batch_rows": 2}, proj_dim=8
    )
    (failure,) = {f.error for f in run.execute().failed.values()}
    assert failure.startswith(
        "non-finite gradient or out-to-loss in 1 of 4 rows of 'train': 3; label 12 of row 3 of "
        f"'train', the model has 3 logits; checkpoint 0 ({tmp_path / '0.pt'})"
    )


def test_traker_names_it(tmp_path: Path) -> None:
    rows = mislabelled(12)
    traker = trak_dist.TRAKer(
        model=tiny.net(), task="image_classification", train_set_size=20, save_dir=tmp_path / "run"
    )
    traker.load_checkpoint(tiny.state(0), model_id=0)
    traker.featurize((rows.features[:2], rows.labels[:2]), num_samples=2)
    with pytest.raises(NonFiniteGradient) as raised:
        traker.featurize((rows.features[2:4], rows.labels[2:4]), num_samples=2)
    assert "label 12 of row 3 of 'train', the model has 3 logits; " in str(raised.value)
