"""The arguments of `TRAKer` and of its calls: checked, and what they say of a run."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
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
from trak_dist.configuration.config import FeaturizeConfig, ReduceConfig, Spec
from trak_dist.configuration.dotted import differences
from trak_dist.errors import ConfigError, PlanMismatch
from trak_dist.ops.model_outputs import (
    Diffusion,
    ImageClassification,
    LanguageModeling,
    MaskedLanguageModeling,
    ModelOutput,
    MultiLabelClassification,
    Preference,
    Regression,
    Segmentation,
    SequenceToSequence,
    TextClassification,
)
from trak_dist.ops.wrapped_outputs import SingleExampleBatches
from trak_dist.plan import Plan
from trak_dist.plan_inputs import Split
from trak_dist.store.run import Run

PROBLEM = {"_target_": "trak_dist.TRAKer"}
TASKS: Mapping[str, type[Any]] = {
    "image_classification": ImageClassification,
    "iterative_image_classification": ImageClassification,
    "text_classification": TextClassification,
    "language_modeling": LanguageModeling,
    "masked_language_modeling": MaskedLanguageModeling,
    "sequence_to_sequence": SequenceToSequence,
    "regression": Regression,
    "multi_label_classification": MultiLabelClassification,
    "segmentation": Segmentation,
    "preference": Preference,
    "diffusion": Diffusion,
}


def check_whole_number(name: str, value: Any, *, minimum: int | None = None) -> int:
    """`value`, numpy's too, as an int.

    Raises
    ------
    ConfigError
        If it is none, or smaller than `minimum`.
    """
    whole = hasattr(value, "__index__") and not isinstance(value, bool | np.bool_)
    if not whole or (minimum is not None and operator.index(value) < minimum):
        of = "" if minimum is None else f" of at least {minimum}"
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
    if task == "clip":
        raise ConfigError(
            "task 'clip' does not say which pairs an example is contrasted with",
            where="task",
            next="task=trak_dist.CLIP(contrast=loader), a DataLoader of other pairs, in place of "
            "task.get_embeddings (docs/migration.md)",
        )
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
    return (
        SingleExampleBatches(task) if iterative and not hasattr(task, "get_batch_output") else task
    )


@dataclass(frozen=True, kw_only=True)
class TRAKerArguments:
    """The arguments of a `TRAKer` that determine its run; None means not given."""

    gradient_computer: type[Any] = FunctionalGradientComputer
    projector: Any = None
    unsupported: Mapping[str, Any]
    proj_dim: int | None = None
    use_half_precision: bool | None = None
    projector_seed: int | None = None
    grad_wrt: Iterable[str] | None = None
    lambda_reg: float | None = None
    curvature: str | None = None

    def __post_init__(self) -> None:
        unsupported = [name for name, value in self.unsupported.items() if value is not None]
        if unsupported:
            raise ConfigError(
                f"{', '.join(unsupported)} can't be replaced: the store and its kernels are the "
                "run's",
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
        """The spec of a new run; or of a planned one, with the arguments that are given."""
        threads = torch.get_num_threads()
        spec = planned or Spec(
            problem=PROBLEM,
            featurize=FeaturizeConfig(threads=threads),
            reduce=traks_kernel(threads),
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
        dim = check_whole_number("proj_dim", dim, minimum=1)
        seed = check_whole_number("projector_seed", seed)
        projection = replace(spec.projection, kind=kind, seed=seed)
        if self.grad_wrt is not None and set(self.grad_wrt) != set(featurize.params):
            featurize = replace(featurize, params=tuple(self.grad_wrt))
        if self.use_half_precision is not None:
            dtype = "float16" if self.use_half_precision else "float32"
            featurize = replace(featurize, dtype=dtype)
        if not planned or self.gradient_computer is IterativeGradientComputer:
            featurize = replace(featurize, gradients=self.gradient_computer.gradients)
        stored = spec.store_dim if planned and dim == spec.proj_dim else dim
        return self._with_reduce(
            replace(
                spec, projection=projection, featurize=featurize, proj_dim=dim, store_dim=stored
            )
        )

    def with_reduce(self, plan: Plan) -> Plan:
        """`plan` with our λ and curvature; its checkpoints stay."""
        return replace(plan, spec=self._with_reduce(plan.spec))

    def check_curvature(self, offered: Collection[str]) -> None:
        """Raise `ConfigError` if the curvature asked for is not one that streamed rows offer."""
        if self.curvature in (None, *offered):
            return
        raise ConfigError(
            f"curvature {self.curvature!r} is not one of {', '.join(offered)}, which the task "
            "offers here",
            where="curvature",
            next="fisher, for which labels are drawn, needs a problem and the launcher"
            if self.curvature == "fisher"
            else "a task that declares loss = 'logistic', where it is log(1 + exp(−f))",
        )

    def check_matches(self, run: Run, rows: int, parameters: int, model: str) -> None:
        """Raise `PlanMismatch` if the run is not one that these arguments belong to."""
        plan = run.plan
        found = differences(asdict(plan.spec), asdict(self.spec(plan.spec)))
        free = ("reduce.lambda_", "reduce.curvature")
        changed = {k: v for k, v in found.items() if not k.startswith(free)}
        if rows != plan.train.rows:
            changed["train_set_size"] = (plan.train.rows, rows)
        if parameters != plan.parameters:
            changed["parameters that require gradients"] = (plan.parameters, parameters)
        if model != plan.source.model:
            changed["the model, or the model output"] = (plan.source.model, model)
        if changed:
            listed = "\n".join(
                f"  {k}: {old!r} in the run, {new!r} now" for k, (old, new) in changed.items()
            )
            raise PlanMismatch(
                f"the run in save_dir is another one:\n{listed}",
                where=str(run.layout.run_dir),
                next="the same arguments as before, or another save_dir",
            )

    def _with_reduce(self, spec: Spec) -> Spec:
        if self.curvature is not None:
            spec = replace(spec, reduce=replace(spec.reduce, curvature=self.curvature))
        if self.lambda_reg is None:
            return spec
        lambda_absolute = self.lambda_reg / lambda_unit_factor(spec)
        return replace(
            spec, reduce=replace(spec.reduce, lambda_reg=lambda_absolute, lambda_unit="absolute")
        )


def lambda_unit_factor(spec: Spec) -> int:
    """How much larger λ is in TRAK's units: its dense projections have no factor 1/√k."""
    return 1 if spec.projection.kind == "identity" else spec.proj_dim


def rows_of_call(inds: Any, num_samples: int | None, *, first: int) -> NDArray[np.int64]:
    """The rows (batch,) that `inds` names, or `num_samples` of them from `first` on.

    Raises
    ------
    ConfigError
        If not exactly one is given, or they are no whole numbers.
    """
    if (inds is None) == (num_samples is None):
        raise ConfigError(
            "exactly one of inds and num_samples is to be given",
            where="featurize, score",
            next="inds: the batch's rows; num_samples: how many there are, in order",
        )
    if num_samples is not None:
        num_samples = check_whole_number("num_samples", num_samples, minimum=0)
        return np.arange(first, first + num_samples)
    rows = np.asarray(inds.cpu() if isinstance(inds, torch.Tensor) else inds).reshape(-1)
    if rows.size and rows.dtype.kind not in "iu":
        raise ConfigError(
            f"inds of dtype {rows.dtype} are not whole numbers",
            where="featurize, score",
            next="inds: the batch's rows in the train set, or among the targets",
        )
    return rows.astype(np.int64)


def check_rows(rows: NDArray[np.int64], size: int, split: Split) -> None:
    """Raise `ConfigError` if rows are not those of a batch of `size` examples of a split."""
    outside = rows[(rows < 0) | (rows >= split.rows)]
    what = ""
    if len(rows) != size:
        what = f"{len(rows)} rows for a batch of {size} examples"
    elif len(outside):
        what = f"row {outside[0]} is not one of the {split.rows} of {split.name!r}"
    elif len(np.unique(rows)) < len(rows):
        what = "a row is there twice in one batch"
    if what:
        raise ConfigError(
            what,
            where="inds, num_samples",
            next="a row for each example, each from 0 to the number of rows (train_set_size, "
            "num_targets) − 1, and load_checkpoint before the first batch of a pass",
        )


def traks_kernel(threads: int) -> ReduceConfig:
    """The kernel that the reference implementation has by default."""
    return ReduceConfig(
        curvature="none",
        lambda_reg=0.0,
        lambda_unit="absolute",
        kernel_form="primal",
        threads=threads,
    )
