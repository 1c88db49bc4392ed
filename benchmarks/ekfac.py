"""Scores by EK-FAC (Grosse et al. 2023, "Studying Large Language Model Generalization with
Influence Functions"), as kronfluence computes them, of the checkpoints of a run.

The loss is minus the log-likelihood of the problem's model output, whose own labels are drawn for
the factors (the true Fisher); what is attributed is f. Layers are those that kronfluence has: the
model's `nn.Linear` and `nn.Conv2d`; a table that is also the output is left out. Not in `bench`,
since it asks for torchvision, which it does not use:

    pip install --no-deps kronfluence==1.0.1 accelerate einops einconv opt-einsum tqdm
"""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from numpy.typing import NDArray
from torch import Tensor, nn

from trak_dist.checkpoints import state_dicts
from trak_dist.coordinates import TRAIN
from trak_dist.datasets import as_batch
from trak_dist.ops.batches import examples_in
from trak_dist.runtime.session import Session

ROWS = 64  # of a batch
DAMPING = None  # the paper's: a tenth of the mean eigenvalue of each layer


class OfModelOutput(Task):
    """The loss and the measurement that a model output says, summed over a batch.

    Labels are drawn with `model`: what the tracked one computes counts.
    """

    def __init__(self, output: Any, model: nn.Module) -> None:
        self._output, self._model = output, model.eval()

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        examples: Sequence[Any] = as_batch(batch)
        if sample:
            rows = examples_in(examples)
            examples = self._output.draw_labels(
                self._model, {}, {}, examples, lambda count: torch.rand(rows, count)
            )
        return -self._output.get_batch_log_likelihood(model, {}, {}, examples).sum()

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        """Minus f, as a loss is: then what is positive is helpful."""
        return -self._output.get_batch_output(model, {}, {}, as_batch(batch)).sum()


def scores(session: Session, model_id: int, targets: str) -> NDArray[np.float64]:
    """The scores of one checkpoint (n_train, n_targets); positive ones are helpful."""
    logging.disable(logging.WARNING)
    plan, problem = session.run.plan, session.problem
    path = session.run.layout.checkpoint(plan.checkpoint(model_id).file)
    model = copy.deepcopy(problem.model)
    state_dicts.fit_state_dict(state_dicts.read(path), model, where=str(path)).load_into(model)
    task = OfModelOutput(problem.model_output, copy.deepcopy(model))
    torch.manual_seed(0)  # the labels that are drawn
    with tempfile.TemporaryDirectory() as directory:
        analyzer = Analyzer(
            "scores",
            prepare_model(model, task),
            task,
            cpu=session.device.type == "cpu",
            disable_tqdm=True,
            output_dir=directory,
        )
        analyzer.fit_all_factors(
            "ekfac",
            session.dataset(TRAIN),
            per_device_batch_size=ROWS,
            factor_args=FactorArguments(strategy="ekfac"),
        )
        analyzer.compute_pairwise_scores(
            "val",
            "ekfac",
            query_dataset=session.dataset(targets),
            train_dataset=session.dataset(TRAIN),
            per_device_query_batch_size=ROWS,
            per_device_train_batch_size=ROWS,
            score_args=ScoreArguments(damping_factor=DAMPING),
        )
        found = analyzer.load_pairwise_scores("val")["all_modules"]
    return found.T.double().numpy()
