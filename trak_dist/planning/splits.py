"""The splits of a plan: a problem's datasets, probed and tried."""

from __future__ import annotations

from collections.abc import Sequence

from trak_dist.configuration.config import Spec
from trak_dist.coordinates import TRAIN, check_name
from trak_dist.datasets import apply_limit, probe
from trak_dist.errors import ConfigError, DatasetError
from trak_dist.plan_inputs import Split, planned_cell_rows
from trak_dist.planning.dry_run import dry_run
from trak_dist.problem import Problem


def planned_split(name: str, problem: Problem, spec: Spec, dim: int) -> Split:
    """A dataset of the problem as a split, whose grads have `dim` columns.

    Raises
    ------
    DatasetError, UnreadableRow
        If it is empty, can't be read, or gives another example when it is read again.
    ProblemError
        If gradients of its first examples can't be computed.
    """
    found = probe(problem, name, spec)
    if probe(problem, name, spec) != found:
        raise DatasetError(
            f"an example of {name!r} differs when it is read again",
            where="problem",
            next="switch random augmentation off: an example must be the same every time",
        )
    rows, source = found
    dry_run(problem, name, apply_limit(problem.dataset(name), spec.limit), spec.featurize)
    return Split(name, rows, planned_cell_rows(rows, spec, dim), source)


def target_names(problem: Problem, targets: Sequence[str]) -> list[str]:
    """The target sets asked for: of the problem, `all` or some.

    Raises
    ------
    ConfigError
        If one is unknown, its name is taken, or there are none.
    """
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
