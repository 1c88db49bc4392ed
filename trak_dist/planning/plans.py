"""planning: from a problem and a spec to a plan, or from a plan to one with more in it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from trak_dist import commands, datasets
from trak_dist import problem as problems
from trak_dist.cells import TRAIN, ScoreCell, check_name
from trak_dist.checkpoints import fit, state_dicts
from trak_dist.checkpoints.digests import (
    content_digest,
    published,
    refuse_other_weights,
    refuse_twins,
)
from trak_dist.checkpoints.featurizer import adding, batch_in, gradients, model_in, projector
from trak_dist.checks import pinned_model
from trak_dist.config import Config, FeaturizeConfig, Spec
from trak_dist.datasets import check_split, limited, probe
from trak_dist.errors import (
    CheckpointError,
    ConfigError,
    DatasetError,
    MissingInputs,
    PlanMismatch,
    ProblemError,
)
from trak_dist.ops import kernel
from trak_dist.ops.batches import Batch, examples_in
from trak_dist.ops.gradients import (
    LoopGradients,
    activation_bytes,
    select_params,
)
from trak_dist.plan import Checkpoint, Plan, Source, Split, planned_cell_rows
from trak_dist.planning import gradient_method
from trak_dist.problem import MapDataset, Problem
from trak_dist.runtime.session import as_batch, as_built
from trak_dist.source import accepting, refuse_changed
from trak_dist.store.layout import Layout
from trak_dist.store.receipts import Receipts
from trak_dist.store.run import Run

PLANNING_BYTES = 2**30  # of activations that are kept where a run is planned


def make_plan(
    config: Config, problem: Problem, source: Source, *, tell: Callable[[str], None]
) -> Plan:
    """Plan a new run; `tell` gets why gradients are not by hooks, where that was left open.

    Raises
    ------
    DatasetError, CheckpointError, ConfigError
        If a dataset is empty, a checkpoint is missing or unfit, or a target set is unknown.
    """
    spec = config.spec
    shapes = select_params(problem.model, spec.featurize.params)
    parameters = sum(shape.numel() for shape in shapes.values())
    identity = spec.projection.kind == "identity"
    dim = parameters if identity else spec.store_dim
    checkpoints = _checkpoints(problem, config.checkpoints.train, source.import_root)
    # First: a forward pass may leave things in the model.
    unsaved = pinned_model.unsaved(problem.model, _held(problem, checkpoints))
    train = _split(TRAIN, problem, spec, dim)
    targets = tuple(_split(n, problem, spec, dim) for n in _target_names(problem, config.targets))
    chosen = _chosen_gradients(problem, spec, (train, *targets), spec.featurize.gradients)
    if chosen[1]:
        tell(f"gradients by {chosen[0]}, {chosen[1]}")
    return Plan(
        spec=spec,
        source=replace(source, unsaved=unsaved, built=_as_built(problem, spec, unsaved)),
        parameters=parameters,
        train=train,
        checkpoints=checkpoints,
        targets=targets,
        use=config.checkpoints.ensemble,
        self_influence=config.self_influence,
        gradients=chosen[0],
        activations=activation_bytes(
            model_in(spec.featurize.compute, problem.model.eval()),
            problem.model_output,
            batch_in(spec.featurize.compute, _first_batch(problem, problem.dataset(TRAIN))),
        ),
    )


def extend_plan(
    plan: Plan,
    problem: Problem,
    source: Source,
    *,
    targets: Sequence[str],
    train: int,
    accept_source: bool,
) -> Plan:
    """`plan` with the checkpoints that were added to the problem, and the target sets asked for.

    Parameters
    ----------
    targets : sequence of str
        Target sets asked for; those that are planned stay.
    train : int
        How many checkpoints `stage=train` is to make, if it makes them.
    accept_source : bool
        Whether the user says that an edited file computes the same as the planned one.

    Raises
    ------
    ProblemError, DatasetError, PlanMismatch
        If anything that was planned changed.
    """
    if accept_source:
        plan = replace(plan, source=accepting(plan.source, source))
    refuse_changed(plan.spec.problem, plan.source, source)
    what = plan.spec.problem["_target_"]
    pinned_model.refuse_other_unsaved(plan.source, problem.model, what=what)
    for split in (plan.train, *plan.targets):
        check_split(problem, split, plan.spec)
    if plan.source.built:
        now = _as_built(problem, plan.spec, plan.source.unsaved)
        pinned_model.refuse_other_built(plan.source, now, what=what)
    known = {s.name for s in plan.targets}
    added = [n for n in _target_names(problem, targets) if n not in known] if targets else []
    checkpoints = _checkpoints(problem, train, plan.source.import_root)
    for old, new in zip_longest(plan.checkpoints, checkpoints):
        if old is not None and (new is None or replace(new, digest=old.digest) != old):
            raise PlanMismatch(
                f"checkpoint {old.model_id} was {old.path} when planned, "
                f"{'it is missing' if new is None else f'it is {new.path}'} now",
                where="the problem's checkpoints",
                next="append checkpoints after those that are planned, or use another run_dir",
            )
    splits = tuple(_split(n, problem, plan.spec, plan.store_dim) for n in added)
    _chosen_gradients(problem, plan.spec, splits, plan.gradients)
    joined = (*plan.checkpoints, *checkpoints[len(plan.checkpoints) :])
    return replace(plan, checkpoints=joined, targets=(*plan.targets, *splits))


def with_gradients(plan: Plan, problem: Problem) -> Plan:
    """`plan` whose gradients are computed as `featurize.gradients` says now: all of them anew.

    Raises
    ------
    ConfigError
        If they can't be.
    """
    splits = (plan.train, *plan.targets)
    way, _ = _chosen_gradients(problem, plan.spec, splits, plan.spec.featurize.gradients)
    return replace(plan, gradients=way)


def refuse_rank_deficient(plan: Plan) -> None:
    """Raise `SingularGram` where λ = 0 can't work, before any gradient is computed."""
    if plan.spec.reduce.lambda_reg == 0 and plan.proj_dim > plan.train.rows:
        raise kernel.rank_deficient(plan.proj_dim, plan.train.rows)


def refuse_unknown_ids(plan: Plan) -> None:
    """Raise `ConfigError` if the ensemble names a checkpoint twice, or one that is not there."""
    there = range(len(plan.checkpoints))
    bad = [f"{i} is unknown" for i in dict.fromkeys(plan.use) if i not in there]
    bad += [f"{i} is there {n} times" for i, n in Counter(plan.use).items() if n > 1]
    if bad:
        raise ConfigError(
            f"checkpoints.use={list(plan.use)} is no ensemble: {', '.join(bad)}",
            where="checkpoints.use",
            next=f"name each checkpoint once; there are 0 to {there[-1]}",
        )


def without_missing(run: Run, plan: Plan) -> Plan:
    """`plan` whose ensemble are those of its checkpoints that are featurized.

    Raises
    ------
    MissingInputs
        If there are none.
    ConfigError
        If the run is a member of a sweep, whose name is that of its ensemble.
    """
    if run.layout.member:
        raise ConfigError(
            "a member of a sweep keeps its ensemble",
            where="checkpoints.allow_missing",
            next=f"the same with -m {commands.on(run.layout.base)}",
        )
    refuse_unknown_ids(plan)
    receipts, left = Receipts(run.layout, plan), []
    for model_id in plan.model_ids:
        splits = (plan.train, *plan.targets)
        cells = [c for s in splits for c in plan.featurize_cells(model_id, s.name)]
        if len(receipts.done(cells)) == len(cells):
            left.append(model_id)
    if not left:
        raise MissingInputs(
            f"checkpoints.allow_missing leaves no ensemble: none of the {len(plan.model_ids)} "
            "checkpoints is featurized",
            where=str(run.layout.run_dir),
            next=commands.launch(run.layout.run_dir, "stage=featurize"),
        )
    return plan if len(left) == len(plan.model_ids) else replace(plan, use=tuple(left))


def refuse_scored(run: Run, plan: Plan) -> None:
    """Raise `PlanMismatch` if `run` has scores that `plan`, of another reduce, would replace.

    A member of a sweep keeps them both.
    """
    other_grads = plan.spec.featurize != run.plan.spec.featurize
    same_kernels = plan.model_ids == run.plan.model_ids and plan.kernel_id == run.plan.kernel_id
    if same_kernels and not other_grads:
        return
    if other_grads and run.receipts.done(run.plan.cells_of(ScoreCell)):
        raise PlanMismatch(
            f"the run has scores, whose gradients are by {run.plan.gradients}",
            where=str(run.layout.run_dir),
            next="another run_dir, with this featurize.gradients",
        )
    if run.receipts.done(run.plan.cells_of(ScoreCell)):
        member = run.layout.sweeps / plan.reduce_id
        there = plan.reduce_id in run.layout.members()
        raise PlanMismatch(
            "the run has scores made with another proj_dim, reduce or ensemble",
            where=str(run.layout.run_dir),
            next=f"{commands.on(member)} is the run with these settings"
            if there
            else f"the same command with -m, which keeps both: these go to {member}",
        )


def check_checkpoints(
    plan: Plan, problem: Problem, run: Run | None, tell: Callable[[str], None]
) -> Plan:
    """Read every checkpoint of the ensemble that is not ours to train, before anything is queued.

    The plan that is given back holds the digests of those of which nothing was known before.

    Raises
    ------
    CheckpointError
        If one is missing, unreadable, unfit, not the one featurized before, or there twice.
    """
    seen: dict[str, int] = {}
    new: dict[int, str] = {}
    told = set[str]()
    absent: frozenset[str] | None = None
    for checkpoint in plan.checkpoints:
        if checkpoint.trained or checkpoint.model_id not in plan.model_ids:
            continue
        state = state_dicts.read(Path(checkpoint.path))
        fitted = state_dicts.fitted(state, problem.model, where=checkpoint.path)
        absent = fitted.absent if absent is None else absent
        state_dicts.refuse_otherwise_absent(fitted, absent, where=checkpoint.path)
        if fitted.said:
            told.add(fitted.said)
        digest = content_digest(fitted.state)
        if digest in seen:
            raise CheckpointError(
                f"model_ids {seen[digest]} and {checkpoint.model_id} have the same weights "
                f"(digest {digest})",
                where=checkpoint.path,
                next="give each model_id its own checkpoint",
            )
        seen[digest] = checkpoint.model_id
        before = checkpoint.digest
        if run and checkpoint in run.plan.checkpoints:
            refuse_other_weights(run, checkpoint.model_id, digest, publish=False)
            refuse_twins(run, checkpoint.model_id, digest)
            before = before or published(run, checkpoint.model_id) or ""
        if not before:
            new[checkpoint.model_id] = digest
    for said in sorted(told):
        tell(f"checkpoints: {said}")
    digested = (replace(c, digest=new.get(c.model_id, c.digest)) for c in plan.checkpoints)
    return replace(plan, checkpoints=tuple(digested))


def _chosen_gradients(
    problem: Problem, spec: Spec, splits: Sequence[Split], asked: str
) -> tuple[str, str]:
    batches = {n: b for s in splits for n, b in _whole_batches(problem, s, spec).items()}
    params = spec.featurize.params
    return gradient_method.choose(
        problem.model, problem.model_output, batches, params=params, asked=asked
    )


def _whole_batches(problem: Problem, split: Split, spec: Spec) -> dict[str, Batch]:
    """Two batches of rows from all over a split, which have each other's in another order.

    As many rows as a worker's batches have, unless their activations are too large to keep here.
    """
    dataset = limited(problem.dataset(split.name), spec.limit)
    held = activation_bytes(
        problem.model.eval(), problem.model_output, _first_batch(problem, dataset)
    )
    rows = split.spread(min(spec.featurize.batch_rows, max(2, PLANNING_BYTES // max(1, held))))
    others = [row if i % 2 else min(row + 1, split.rows - 1) for i, row in enumerate(rows)]
    return {
        name: as_batch(datasets.collated(problem, dataset, some, name=split.name))
        for name, some in ((split.name, rows), (f"{split.name}, turned", others[::-1]))
    }


def _first_batch(problem: Problem, dataset: MapDataset) -> tuple[Any, ...]:
    """The first examples, as many as it takes to see that each is kept apart: two."""
    examples = [dataset[row] for row in range(min(2, len(dataset)))]
    return as_batch((problem.collate or torch.utils.data.default_collate)(examples))


def _held(problem: Problem, checkpoints: Sequence[Checkpoint]) -> set[str]:
    """The names of the model's tensors that checkpoints hold; of those yet to train, most."""
    model, first = problem.model, checkpoints[0]
    own = model.state_dict(keep_vars=True)
    if first.trained:
        return {name for name, tensor in own.items() if not fit.is_frozen(tensor)}
    state = state_dicts.read(Path(first.path))
    return own.keys() - state_dicts.fitted(state, model, where=first.path).absent


def _as_built(
    problem: Problem, spec: Spec, unsaved: Collection[str]
) -> dict[str, pinned_model.Numbers]:
    return as_built(problem, spec, unsaved, torch.device("cpu"))


def _split(name: str, problem: Problem, spec: Spec, dim: int) -> Split:
    found = probe(problem, name, spec)
    if probe(problem, name, spec) != found:
        raise DatasetError(
            f"an example of {name!r} is another one when it is read again",
            where="problem",
            next="switch random augmentation off: an example must be the same every time",
        )
    rows, alone, together = found
    dry_run(problem, name, limited(problem.dataset(name), spec.limit), spec.featurize)
    return Split(name, rows, planned_cell_rows(rows, spec, dim), alone, together)


def dry_run(problem: Problem, name: str, dataset: MapDataset, spec: FeaturizeConfig) -> None:
    """Compute the first examples' gradients and out-to-loss, before anything is planned.

    Raises
    ------
    ProblemError
        If that fails, with what the user's code said.
    UnreadableRow
        If the first example can't be shown.
    """
    rows = range(min(2, len(dataset)))
    collated = datasets.collated(problem, dataset, rows, name=name)
    model = model_in(spec.compute, problem.model.eval())
    weights, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    try:
        batch = batch_in(spec.compute, as_batch(collated))
        LoopGradients(model, problem.model_output, spec.params)(batch, lambda *_: None)
        with torch.no_grad():
            q = problem.model_output.get_out_to_loss_grad(model, weights, buffers, batch)
    except Exception as error:  # whatever the user's model and output do
        text = " ".join(str(error).split())
        raise ProblemError(
            f"the model output can't be computed on the first examples of {name!r}: "
            f"{type(error).__name__}: {text[:500]}",
            where=f"{type(problem.model_output).__qualname__}, {type(model).__qualname__}",
            next="see docs/your-problem.md on what a batch holds and what a model output gives",
        ) from error
    if q.numel() != len(rows):
        raise ProblemError(
            f"get_out_to_loss_grad gave {tuple(q.shape)} for {len(rows)} examples of {name!r}",
            where=type(problem.model_output).__qualname__,
            next="it must give one value for each example: no mean over the batch",
        )
    datasets.rendered(problem, name, 0)


def trial_rate(plan: Plan) -> float:
    """Rows per second of two examples' grads on this CPU: about what a worker does at least.

    The first pass, which also allocates and draws, is not counted.
    """
    problem = problems.rebuild(plan.spec.problem, plan.source)
    problem = problems.drawing(problem, plan.spec.featurize.random)
    torch.set_num_threads(plan.spec.featurize.threads)
    compute_in = plan.spec.featurize.compute
    batch = batch_in(compute_in, _first_batch(problem, problem.dataset(TRAIN)))
    size = examples_in(batch)
    project = projector(plan, 0, problem.model)
    model = model_in(compute_in, problem.model.eval())
    compute = gradients(plan, plan.gradients, model, problem.model_output, project)
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        into = torch.zeros(size, plan.store_dim)
        compute(batch, adding(project, into))
        seconds = time.perf_counter() - started
    return size / seconds


def _checkpoints(problem: Problem, train: int, import_root: str) -> tuple[Checkpoint, ...]:
    if problem.checkpoints:
        paths = enumerate(problem.checkpoints)
        return tuple(Checkpoint(i, str(Path(import_root, p)), False) for i, p in paths)
    if problem.train_checkpoint is None:
        raise CheckpointError(
            "no checkpoint found: the problem gives none, and no train_checkpoint to make them",
            where="problem",
            next="see that the paths that the problem looks for exist",
        )
    return tuple(
        Checkpoint(seed, Layout.trained_checkpoint("full", seed), True) for seed in range(train)
    )


def _target_names(problem: Problem, targets: Sequence[str]) -> list[str]:
    names = list(problem.targets) if tuple(targets) == ("all",) else list(targets)
    for name in names:
        check_name(name, what="the target set")
        if name in (TRAIN, "all"):
            raise ConfigError(
                f"a target set can't be called {name!r}: the name is taken",
                where="the problem's targets",
                next="give it another name",
            )
        if name not in problem.targets:
            raise ConfigError(
                f"the problem has no target set {name!r}",
                where="targets",
                next=f"targets=all, or of {', '.join(problem.targets)}",
            )
    if not names:
        raise ConfigError("the problem has no target sets", where="problem", next="give it some")
    return names
