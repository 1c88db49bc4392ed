"""The models that dropout masks make of checkpoints, tried before anything is planned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from trak_dist.checkpoints.featurizer import batch_in, model_in
from trak_dist.configuration.config import FeaturizeConfig
from trak_dist.coordinates import TRAIN
from trak_dist.ops.dropout import FixedMask, check_units_left, dropout_modules, thinned
from trak_dist.ops.gradients import outputs
from trak_dist.planning.dry_run import first_batch
from trak_dist.problem import Problem


def featurized_model(model: nn.Module, dropout_seeds: int) -> nn.Module:
    """A model as its gradients are computed: itself, or under its first masks."""
    return thinned(model.eval(), 0) if dropout_seeds else model.eval()


def check_dropout(
    problem: Problem, spec: FeaturizeConfig, dropout_seeds: int, *, notify: Callable[[str], None]
) -> None:
    """Check that masks of each seed leave something of the model; notify of modules not called.

    Raises
    ------
    ConfigError
        If the model has no dropout module that is called, or a mask drops all units of one.
    """
    modules = dropout_modules(problem.model)
    model = thinned(model_in(spec.compute, problem.model.eval()), 0)
    widths: dict[str, int] = {}

    def recorder(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        mask = FixedMask.of(name, modules[name], 0)

        def record(_: nn.Module, __: Any, output: Tensor) -> None:
            widths[name] = output.shape[mask.dimension(output)]

        return record

    for name in modules:
        model.get_submodule(name).register_forward_hook(recorder(name))
    batch = first_batch(problem, problem.dataset(TRAIN), name=TRAIN)
    outputs(model, problem.model_output, batch_in(spec.compute, batch))
    check_units_left(problem.model, dropout_seeds, widths)
    if unused := [name for name in modules if name not in widths]:
        notify(f"dropout modules that are not called in eval(), so not masked: {unused}")
