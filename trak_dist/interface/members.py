"""Members of a sweep: runs inside another run's directory, whose gradients they share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trak_dist import commands
from trak_dist.errors import ConfigError
from trak_dist.plan import Plan
from trak_dist.store.layout import Layout
from trak_dist.store.run import Run


def directory(base: Run, plan: Plan) -> Path:
    """The run directory of `plan`: that of `base` if it is its plan, else of a member."""
    if plan.reduce_id == base.plan.reduce_id:
        return base.layout.run_dir
    return base.layout.sweeps / plan.reduce_id


def open_member(base: Run, plan: Plan) -> Run:
    """The run of `plan`, `base` or a member that was made before.

    Raises
    ------
    ConfigError
        If there is none.
    """
    run_dir = directory(base, plan)
    if not Run.exists(run_dir):
        raise ConfigError(
            "the sweep has no member with these settings",
            where=str(run_dir),
            next="the same command without stage=… makes it",
        )
    return Run.open(run_dir)


def check_not_nested(run_dir: Path) -> None:
    """Raise `ConfigError` if `run_dir` is a place for a member, which only its base run makes."""
    layout = Layout(run_dir)
    if layout.member:
        raise ConfigError(
            "this is a place for members of a sweep, which are made from their run",
            where=str(run_dir),
            next=f"{commands.launch(layout.base, '-m')}, and the settings of this one",
        )


def store_dim(
    values: Mapping[str, Any], dims: Sequence[int], planned: Plan | None
) -> tuple[int, str]:
    """The dimension to store for a run that names none, and why it shares no other's grads.

    That of the run that is there, if `proj_dim` divides it, else the largest of the sweep that
    `proj_dim` divides: it does not depend on the order of runs, and no smaller one is ever needed.

    Parameters
    ----------
    values : mapping
        The settings by key.
    dims : sequence of int
        Each `proj_dim` of the sweep.
    planned : Plan, optional
        That of the run that is there.
    """
    k, kind = values["proj_dim"], values.get("projection.kind")
    of_run = planned.spec.store_dim if planned else 0
    if not isinstance(k, int) or k < 1 or kind == "identity":
        dim: int = values["store_dim"]
        return dim, ""
    others = {*dims, of_run} - {0, k}
    if kind != "sjlt":
        alone = f"{kind} projections do not fold: grads of dimension {k} are made by themselves"
        return k, alone if others else ""
    if planned and planned.spec.projection.kind == kind and of_run % k == 0:
        return of_run, ""
    chosen = max(dim for dim in {*dims, k} if dim % k == 0)
    larger = of_run or max({*dims, k})
    if chosen > k or larger == k:
        return chosen, ""
    return k, f"{k} does not divide {larger}: grads of dimension {k} are made by themselves"
