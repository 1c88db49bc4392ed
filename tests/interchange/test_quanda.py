"""quanda's explainer of a finished run; of its interface alone, since quanda installs much."""

from __future__ import annotations

import abc
import importlib
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from trak_dist import TRAKer, open_run
from trak_dist.errors import ConfigError, DatasetError

N, TARGETS = 20, 6


class Explainer(abc.ABC):
    """As in quanda 0.5.0."""

    def __init__(
        self,
        model: nn.Module,
        train_dataset: Any,
        task: str = "image_classification",
        checkpoints: Any = None,
        checkpoints_load_func: Any = None,
        **kwargs: Any,
    ) -> None:
        assert task in self.accepted_tasks
        self.model, self.train_dataset, self.device = model, train_dataset, "cpu"

    @abc.abstractmethod
    def explain(self, test_data: torch.Tensor, targets: Any) -> torch.Tensor: ...


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    monkeypatch.setitem(sys.modules, "quanda", types.ModuleType("quanda"))
    explainers = types.ModuleType("quanda.explainers")
    explainers.Explainer = Explainer
    monkeypatch.setitem(sys.modules, "quanda.explainers", explainers)
    yield importlib.import_module("trak_dist.interchange.quanda")
    del sys.modules["trak_dist.interchange.quanda"]


def test_a_finished_run_answers(module: types.ModuleType, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    train, test = ((torch.randn(n, 6), torch.randint(3, (n,))) for n in (N, TARGETS))
    traker = TRAKer(model, "image_classification", N, tmp_path / "run", proj_dim=8, lambda_reg=0.1)
    traker.load_checkpoint(model.state_dict(), model_id=0)
    traker.featurize(train, num_samples=N)
    traker.finalize_features()
    traker.start_scoring_checkpoint("val", model.state_dict(), 0, num_targets=TARGETS)
    traker.score(test, num_samples=TARGETS)
    traker.finalize_scores("val")
    sets = {"train_dataset": TensorDataset(*train), "test_dataset": TensorDataset(*test)}
    asked = {"model": model, "run_dir": tmp_path / "run", "targets": "val", **sets}
    explainer = module.RunExplainer(**asked, checkpoints=["x"], checkpoints_load_func=None)
    some = [4, 1]
    found = explainer.explain(test[0][some], test[1][some].tolist())
    assert np.array_equal(found.numpy(), open_run(tmp_path / "run").scores("val")[:, some].T)
    with pytest.raises(DatasetError, match=r"1 of 2 test examples are not .* with that label: 0"):
        explainer.explain(test[0][:2], [(int(test[1][0]) + 1) % 3, int(test[1][1])])
    with pytest.raises(ConfigError, match="does not compute self-influence"):
        explainer.self_influence(batch_size=8)
    with pytest.raises(DatasetError, match="train_dataset has 6 rows, the run 20"):
        module.RunExplainer(**asked | {"train_dataset": TensorDataset(*test)})


def test_quanda_is_named_where_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "quanda", None)
    with pytest.raises(ConfigError, match="pip install quanda"):
        importlib.import_module("trak_dist.interchange.quanda")
