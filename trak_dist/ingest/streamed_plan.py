"""The plan of a run that is fed (`TRAKer`): checkpoints and target sets join as they come."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trak_dist.compat import (
    BasicProjector,
    FunctionalGradientComputer,
    IterativeGradientComputer,
    NoOpProjector,
)
from trak_dist.config import FeaturizeConfig, ReduceConfig, Spec
from trak_dist.coordinates import TRAIN, check_name
from trak_dist.dotted import differences
from trak_dist.errors import ConfigError, PlanMismatch
from trak_dist.ops.model_outputs import (
    ImageClassification,
    ModelOutput,
    OfBatches,
    TextClassification,
)
from trak_dist.plan import Checkpoint, Plan, Source, Split, Streamed, planned_cell_rows
from trak_dist.store.run import Run

PROBLEM = {"_target_": "trak_dist.TRAKer"}
TASKS: Mapping[str, type[Any]] = {
    "image_classification": ImageClassification,
    "iterative_image_classification": ImageClassification,
    "text_classification": TextClassification,
}


def whole_number(name: str, value: Any, *, least: int | None = None) -> int:
    """`value`, numpy's too, as an int.

    Raises
    ------
    ConfigError
        If it is none, or smaller than `least`.
    """
    whole = hasattr(value, "__index__") and not isinstance(value, bool | np.bool_)
    if not whole or (least is not None and operator.index(value) < least):
        of = "" if least is None else f" of at least {least}"
        raise ConfigError(f"{name} {value!r} is not a whole number{of}", where=name)
    return operator.index(value)


def model_output(task: str | ModelOutput, gradient_computer: type[Any]) -> ModelOutput:
    """The model output that `TRAKer(task=…)` names, or is.

    With `IterativeGradientComputer` one without a form for batches is taken as TRAK takes it there.

    Raises
    ------
    ConfigError
        If it is neither.
    """
    if isinstance(task, str) and task in TASKS:
        output: ModelOutput = TASKS[task]()
        return output
    methods = ("get_output", "get_out_to_loss_grad")
    if isinstance(task, type) or not all(hasattr(task, name) for name in methods):
        raise ConfigError(
            f"task {task!r} is none of {', '.join(TASKS)}, and no model output",
            where="task",
            next="an object with get_output and get_out_to_loss_grad, as in docs/your-problem.md; "
            "not its class",
        )
    assert not isinstance(task, str)
    iterative = gradient_computer is IterativeGradientComputer
    return OfBatches(task) if iterative and not hasattr(task, "get_batch_output") else task


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the arguments of a `TRAKer` say of a run; those that are None say nothing."""

    gradient_computer: type[Any] = FunctionalGradientComputer
    projector: Any = None
    unsupported: Mapping[str, Any]
    proj_dim: int | None = None
    use_half_precision: bool | None = None
    projector_seed: int | None = None
    grad_wrt: Iterable[str] | None = None
    lambda_reg: float | None = None

    def __post_init__(self) -> None:
        given = [name for name, value in self.unsupported.items() if value is not None]
        if given:
            raise ConfigError(
                f"{', '.join(given)} can't be replaced: the store and its kernels are the run's",
                where="TRAKer",
                next="leave them out",
            )
        computers = (FunctionalGradientComputer, IterativeGradientComputer)
        if self.gradient_computer not in computers:
            raise ConfigError(
                f"gradient_computer {self.gradient_computer!r} is not one of trak_dist's",
                where="gradient_computer",
                next="trak_dist.FunctionalGradientComputer, or IterativeGradientComputer for a "
                "model that torch.func can't trace",
            )
        if not isinstance(self.projector, BasicProjector | NoOpProjector | None):
            raise ConfigError(
                f"projector {type(self.projector).__qualname__} is not one of trak_dist's",
                where="projector",
                next="leave it out, or an object of the BasicProjector or NoOpProjector that "
                "trak_dist exports",
            )
        self.spec()  # refuses numbers that are none

    def spec(self, planned: Spec | None = None) -> Spec:
        """The spec of a new run; or of one that is planned, with what is said otherwise."""
        threads = torch.get_num_threads()
        spec = planned or Spec(
            problem=PROBLEM,
            featurize=FeaturizeConfig(threads=threads),
            reduce=ReduceConfig(lambda_reg=0.0, lambda_unit="absolute", threads=threads),
        )
        kind, seed = spec.projection.kind, spec.projection.seed
        featurize, dim = spec.featurize, spec.proj_dim
        if isinstance(self.projector, NoOpProjector):
            kind = "identity"
        elif isinstance(self.projector, BasicProjector):
            kind, dim, seed = self.projector.kind, self.projector.proj_dim, self.projector.seed
        else:
            dim = dim if self.proj_dim is None else self.proj_dim
            seed = seed if self.projector_seed is None else self.projector_seed
        dim = whole_number("proj_dim", dim, least=1)
        seed = whole_number("projector_seed", seed)
        projection = replace(spec.projection, kind=kind, seed=seed)
        if self.grad_wrt is not None and set(self.grad_wrt) != set(featurize.params):
            featurize = replace(featurize, params=tuple(self.grad_wrt))
        if self.use_half_precision is not None:
            dtype = "float16" if self.use_half_precision else "float32"
            featurize = replace(featurize, dtype=dtype)
        if not planned or self.gradient_computer is IterativeGradientComputer:
            featurize = replace(featurize, gradients=self.gradient_computer.gradients)
        stored = spec.store_dim if planned and dim == spec.proj_dim else dim
        return self._with_lambda(
            replace(
                spec, projection=projection, featurize=featurize, proj_dim=dim, store_dim=stored
            )
        )

    def with_lambda(self, plan: Plan) -> Plan:
        """`plan` with our λ; its checkpoints stay."""
        return replace(plan, spec=self._with_lambda(plan.spec))

    def refuse_other(self, run: Run, rows: int, parameters: int, model: str) -> None:
        """Raise `PlanMismatch` if the run is not one that these arguments belong to."""
        plan = run.plan
        found = differences(asdict(plan.spec), asdict(self.spec(plan.spec)))
        told = {k: v for k, v in found.items() if not k.startswith("reduce.lambda_")}
        if rows != plan.train.rows:
            told["train_set_size"] = (plan.train.rows, rows)
        if parameters != plan.parameters:
            told["parameters that require gradients"] = (plan.parameters, parameters)
        if model != plan.source.model:
            told["the model, or the model output"] = (plan.source.model, model)
        if told:
            listed = "\n".join(
                f"  {k}: {old!r} in the run, {new!r} now" for k, (old, new) in told.items()
            )
            raise PlanMismatch(
                f"the run in save_dir is another one:\n{listed}",
                where=str(run.layout.run_dir),
                next="the same arguments as before, or another save_dir",
            )

    def _with_lambda(self, spec: Spec) -> Spec:
        if self.lambda_reg is None:
            return spec
        absolute = self.lambda_reg / units_of_lambda(spec)
        return replace(
            spec, reduce=replace(spec.reduce, lambda_reg=absolute, lambda_unit="absolute")
        )


def units_of_lambda(spec: Spec) -> int:
    """How much larger λ is in TRAK's units: its dense projections have no factor 1/√k."""
    return 1 if spec.projection.kind == "identity" else spec.proj_dim


def new_plan(spec: Spec, *, rows: int, parameters: int, model: str, gradients: str) -> Plan:
    """A plan without checkpoints and target sets, for a train split whose rows are streamed."""
    dim = parameters if spec.projection.kind == "identity" else spec.store_dim
    return Plan(
        spec=spec,
        source=Source(file="", model=model, import_root=""),
        parameters=parameters,
        train=Split(TRAIN, rows, planned_cell_rows(rows, spec, dim), Streamed()),
        checkpoints=(),
        targets=(),
        gradients=gradients,
    )


def with_checkpoint(plan: Plan, model_id: int, path: str | None) -> Plan:
    """`plan` with a checkpoint, in order of `model_id`; the ensemble is all of them again.

    Raises
    ------
    ConfigError
        If it is the plan of a problem, which brings its checkpoints itself.
    """
    if any(c.model_id == model_id for c in plan.checkpoints):
        return plan
    if plan.has_problem:
        raise ConfigError(
            f"model_id {model_id} is not of this run, whose problem brings its checkpoints: "
            f"{[c.model_id for c in plan.checkpoints]}",
            where="model_id",
            next="launch the run with that checkpoint in its problem, or feed another save_dir",
        )
    joined = [*plan.checkpoints, Checkpoint(model_id, path, trained=False)]
    return replace(plan, checkpoints=tuple(sorted(joined, key=lambda c: c.model_id)), use=())


def with_ensemble(plan: Plan, model_ids: Sequence[int]) -> Plan:
    """`plan` whose ensemble are these checkpoints."""
    all_of_them = len(model_ids) == len(plan.checkpoints)
    return replace(plan, use=() if all_of_them else tuple(model_ids))


def with_targets(plan: Plan, name: str, rows: int) -> Plan:
    """`plan` with a target set.

    Raises
    ------
    ConfigError
        If it is there with another number of targets, or the name can't be one.
    """
    check_name(name, what="the experiment")
    if name == TRAIN:
        raise ConfigError(
            f"an experiment can't be called {TRAIN!r}", where="exp_name", next="another name"
        )
    there = next((s for s in plan.targets if s.name == name), None)
    if there and there.rows != rows:
        raise ConfigError(
            f"experiment {name!r} has {there.rows} targets, not {rows}",
            where="num_targets",
            next=f"num_targets={there.rows}, or another exp_name",
        )
    if there:
        return plan
    split = Split(name, rows, planned_cell_rows(rows, plan.spec, plan.store_dim), Streamed())
    return replace(plan, targets=(*plan.targets, split))


def created(run_dir: Path, plan: Plan) -> None:
    """Publish the plan of a new run, unless another process was first."""
    with contextlib.suppress(PlanMismatch):
        Run.create(run_dir, plan)


def extended(run: Run, change: Callable[[Plan], Plan]) -> Run:
    """`run` with its plan changed, whatever other processes change meanwhile."""
    while True:
        run = Run.open(run.layout.run_dir)
        plan = change(run.plan)
        if plan == run.plan:
            return run
        with contextlib.suppress(PlanMismatch):  # another was first: on top of its plan, then
            return run.extend(plan)


def refuse_rows(rows: NDArray[np.int64], size: int, split: Split) -> None:
    """Raise `ConfigError` if rows are not those of a batch of `size` examples of a split."""
    outside = rows[(rows < 0) | (rows >= split.rows)]
    what = ""
    if len(rows) != size:
        what = f"{len(rows)} rows for a batch of {size} examples"
    elif len(outside):
        what = f"row {outside[0]} is none of the {split.rows} of {split.name!r}"
    elif len(np.unique(rows)) < len(rows):
        what = "a row is there twice in one batch"
    if what:
        raise ConfigError(
            what,
            where="inds, num_samples",
            next="a row for each example, each from 0 to the number of rows (train_set_size, "
            "num_targets) − 1, and load_checkpoint before the first batch of a pass",
        )
