"""The checkpoints of a plan: which there are, and that they fit the model and those before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from trak_dist.cells.train import checkpoint_path
from trak_dist.checkpoints import fit, folders, state_dicts
from trak_dist.checkpoints.digests import (
    check_distinct_weights,
    check_weights,
    content_digest,
    ids_by_weights,
    published,
)
from trak_dist.errors import CheckpointError
from trak_dist.plan import Plan
from trak_dist.plan_inputs import Checkpoint
from trak_dist.problem import Problem
from trak_dist.store.run import Run


def planned_checkpoints(
    problem: Problem,
    train: int,
    import_root: str,
    *,
    dropout_seeds: int,
    notify: Callable[[str], None],
) -> tuple[Checkpoint, ...]:
    """The problem's checkpoints; if it has none, `train` ones that `stage=train` makes.

    Raises
    ------
    CheckpointError
        If it can't train any, or a folder of them can't be put in order.
    """
    each = max(1, dropout_seeds)
    if problem.checkpoints:
        given = folders.expanded((Path(import_root, p) for p in problem.checkpoints), notify)
        return tuple(Checkpoint(i * each, str(p), False) for i, p in enumerate(given))
    if problem.train_checkpoint is None:
        raise CheckpointError(
            "no checkpoint found: the problem gives none, and no train_checkpoint to make them",
            where="problem",
            next="see that the paths that the problem looks for exist",
        )
    seeds = range(train)
    return tuple(Checkpoint(s * each, checkpoint_path("full", s), True) for s in seeds)


def held_names(problem: Problem, checkpoints: Sequence[Checkpoint]) -> set[str]:
    """The names of the model's tensors that checkpoints hold; of those yet to train, most."""
    model, first = problem.model, checkpoints[0]
    own = model.state_dict(keep_vars=True)
    if first.trained:
        return {name for name, tensor in own.items() if not fit.is_frozen(tensor)}
    state = state_dicts.read(Path(first.file))
    return own.keys() - state_dicts.fit_state_dict(state, model, where=first.file).absent


def check_checkpoints(
    plan: Plan, problem: Problem, run: Run | None, notify: Callable[[str], None]
) -> Plan:
    """Read every provided checkpoint of the ensemble, before anything is queued.

    The plan that is given back holds the digests of those of which nothing was known before.

    Raises
    ------
    CheckpointError
        If one is missing, unreadable, unfit, not the one featurized before, or there twice.
    """
    ensemble = frozenset(plan.model_ids)
    earlier = frozenset(run.plan.checkpoints) if run else frozenset()
    known = ids_by_weights(run) if run else {}
    seen: dict[str, int] = {}
    new: dict[int, str] = {}
    notes = set[str]()
    absent: frozenset[str] | None = None
    for checkpoint in plan.checkpoints:
        if checkpoint.trained or ensemble.isdisjoint(plan.models_of(checkpoint)):
            continue
        where = checkpoint.file
        state = state_dicts.read(Path(where))
        fitted = state_dicts.fit_state_dict(state, problem.model, where=where)
        absent = fitted.absent if absent is None else absent
        state_dicts.check_same_absent(fitted, absent, where=where)
        if fitted.notes:
            notes.add(fitted.notes)
        digest = content_digest(fitted.state)
        if digest in seen:
            raise CheckpointError(
                f"model_ids {seen[digest]} and {checkpoint.model_id} have the same weights "
                f"(digest {digest})",
                where=where,
                next="give each model_id its own checkpoint",
            )
        seen[digest] = checkpoint.model_id
        before = checkpoint.digest
        if run and checkpoint in earlier:
            check_weights(run, checkpoint.model_id, digest, publish=False)
            check_distinct_weights(run, known, checkpoint.model_id, digest)
            before = before or published(run, checkpoint.model_id)
        if not before:
            new[checkpoint.model_id] = digest
    for note in sorted(notes):
        notify(f"checkpoints: {note}")
    digested = (replace(c, digest=new.get(c.model_id, c.digest)) for c in plan.checkpoints)
    return replace(plan, checkpoints=tuple(digested))
