"""An explainer of quanda that answers from a finished run: it computes nothing.

A run has the scores of its own targets, by their labels. So each test example is looked up among
them by its content, and one that is not there is an error. Imported by who uses it alone: it needs
quanda.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trak_dist.errors import ConfigError, DatasetError
from trak_dist.ingest.streamed_rows import format_ranges, row_digests
from trak_dist.problem import MapDataset
from trak_dist.store.results import open_run

try:
    from quanda.explainers import Explainer
except ImportError as error:
    raise ConfigError(
        f"quanda can't be imported: {error}",
        where="trak_dist.interchange.quanda",
        next="pip install quanda",
    ) from error


class RunExplainer(Explainer):  # type: ignore[misc]
    """The scores of a run, as quanda's metrics and benchmarks ask for them.

    Parameters
    ----------
    model : torch.nn.Module
        What quanda gives; only its device is used.
    train_dataset : dataset
        The train set of the run.
    run_dir : path
        The run directory.
    targets : str
        The target set.
    test_dataset : dataset of (input tensor, label)
        Its examples, in the order of the run. That these are they is at your word.
    kwargs
        What quanda gives besides, for its own class.

    Raises
    ------
    MissingInputs
        If not all scores are computed yet.
    ConfigError
        If the run has no such target set.
    DatasetError
        If a dataset has another number of rows than the run.
    """

    accepted_tasks = ("image_classification",)

    def __init__(
        self,
        model: nn.Module,
        train_dataset: MapDataset,
        *,
        run_dir: str | Path,
        targets: str,
        test_dataset: MapDataset,
        **kwargs: Any,
    ) -> None:
        super().__init__(model=model, train_dataset=train_dataset, **kwargs)
        self._run, self._targets = open_run(run_dir), targets
        self._scores = torch.from_numpy(self._run.scores(targets))
        for what, dataset, rows in zip(
            ("train_dataset", "test_dataset"),
            (train_dataset, test_dataset),
            self._scores.shape,
            strict=True,
        ):
            if len(dataset) != rows:
                raise DatasetError(
                    f"{what} has {len(dataset)} rows, the run {rows}",
                    where=str(run_dir),
                    next="the dataset of the run, whole: no max_eval_n of quanda",
                )
        examples = (test_dataset[row] for row in range(len(test_dataset)))
        digests = (_digests(x[None], [label])[0].tobytes() for x, label in examples)
        self._rows = {digest: row for row, digest in enumerate(digests)}

    def explain(self, test_data: Tensor, targets: Sequence[int] | Tensor) -> Tensor:
        """The scores (test examples, n_train) of examples, by their own labels.

        Raises
        ------
        DatasetError
            If one of them, with that label, is not among the targets of the run.
        """
        rows = [self._rows.get(d.tobytes(), -1) for d in _digests(test_data, targets)]
        unknown = np.flatnonzero(np.array(rows) < 0)
        if len(unknown):
            raise DatasetError(
                f"{len(unknown)} of {len(rows)} test examples are not among the targets "
                f"{self._targets!r} with that label: {format_ranges(unknown)}",
                where="explain",
                next="the target set of the run, with its labels: use_predictions=False in quanda",
            )
        return self._scores[:, rows].T.to(self.device)

    def self_influence(self, batch_size: int = 32) -> Tensor:  # noqa: ARG002
        """The self-influence (n_train,) of the run.

        Raises
        ------
        MissingInputs, ConfigError
            If it is not computed yet, or the run does not compute it.
        """
        return torch.from_numpy(self._run.self_influence()).to(self.device)


def _digests(inputs: Tensor, labels: Sequence[int] | Tensor) -> NDArray[np.uint8]:
    return row_digests((inputs, torch.as_tensor(labels).long()), len(inputs))
