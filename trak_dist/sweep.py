"""Sweeps, `-m`: the tasks of one, which grads they can share, and which run each of them is.

Hydra runs the tasks one after the other in this process; what a task does is `launch`'s.
"""

from __future__ import annotations

import logging
import math
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from rich.console import Console

from trak_dist import commands, settings, telling
from trak_dist.errors import ConfigError
from trak_dist.plan import Plan
from trak_dist.store import atomic
from trak_dist.store.layout import Layout
from trak_dist.store.run import Run


@dataclass
class Task:
    """One task: what of the sweep it is, the run it turned out to be, how it ended, its LDS."""

    sweep: Sweep
    what: str
    run_dir: Path | None = None
    state: str = "done"
    lds: list[str] = field(default_factory=list)


@dataclass
class Sweep:
    """What the command line asks for; `values` of each key as written, one if it is not swept.

    `tasks` are those that began, `code` is the worst exit code of those that ended.
    """

    values: Mapping[str, list[str]]
    tasks: list[Task] = field(default_factory=list)
    code: int = 0

    @property
    def swept(self) -> list[str]:
        """The keys with several values."""
        return [key for key, values in self.values.items() if len(values) > 1]

    @property
    def size(self) -> int:
        """How many tasks there are."""
        return math.prod(map(len, self.values.values()))

    def samples(self) -> list[list[str]]:
        """The overrides of some tasks, which between them have every option of every group."""
        first = {key: values[0] for key, values in self.values.items()}
        others = [
            {**first, key: value}
            for key in self.swept
            if settings.is_group(key)
            for value in self.values[key][1:]
        ]
        return [list(sample.values()) for sample in (first, *others)]

    def make_directory(self) -> None:
        """Make the run directory, where Hydra writes before the first task begins.

        Raises
        ------
        ConfigError, StoreError
            If it can't be made.
        """
        shared = [values[0] for values in self.values.values() if len(values) == 1]
        run_dir = settings.composed_run_dir(shared)
        with atomic.told(run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)

    def run(self, launch: Callable[[Task], int], out: Console) -> int:
        """Run the task that Hydra composed; whatever becomes of it, the others have their turn."""
        given = HydraConfig.get().overrides.task
        what = " ".join(o for o in given if o.partition("=")[0] in self.swept)
        logging.getLogger("hydra").setLevel(logging.WARNING)  # it would announce each task again
        task = Task(self, what or "the only task")
        self.tasks.append(task)
        out.print(f"\ntask {len(self.tasks)} of {self.size}: {task.what}")
        try:
            code = launch(task)
        except Exception:  # the boundary of a task: told, and in the exit code
            traceback.print_exc(file=sys.stderr)
            code = 1
        if code:
            task.state = "failed"
        if task.run_dir and Run.exists(task.run_dir):  # now: the next task may change the run
            task.lds = list(telling.lds(Run.open(task.run_dir)))
        self.code = max(self.code, code)
        return code

    def lines(self) -> Iterator[str]:
        """How each task ended, and where its run is."""
        width = max((len(task.what) for task in self.tasks), default=0)
        yield f"sweep: {len(self.tasks)} of {self.size} tasks"
        for task in self.tasks:
            yield f"{task.what:<{width}}  {task.state:<9}  {task.run_dir or 'no run'}"
            yield from (f"{'':<{width}}  {line}" for line in task.lds)

    def store_dim(self, spec: Mapping[str, Any], planned: Plan | None) -> tuple[int, str]:
        """The dimension to store for a task that gives none, and why it shares no other's grads.

        That of the run, if `proj_dim` divides it, else the largest of the sweep that `proj_dim`
        divides: it does not depend on the order of tasks, and no smaller one is ever needed.
        """
        k, kind = spec["proj_dim"], spec["projection"]["kind"]
        swept = (override.partition("=")[2] for override in self.values.get("proj_dim", ()))
        dims = {int(text) for text in swept if text.isdecimal() and int(text)}
        of_run = planned.spec.store_dim if planned else 0
        others = {*dims, of_run} - {0, k}
        if not isinstance(k, int) or k < 1 or kind == "identity":
            return spec["store_dim"], ""
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


def parse(arguments: list[str]) -> Sweep | None:
    """The sweep that the command line asks for, if it does.

    Raises
    ------
    ConfigError
        If an override has no values that could be run one by one.
    """
    if not any(a in settings.MULTIRUN for a in arguments):
        return None
    return Sweep(settings.swept_values(settings.overrides_among(arguments)))


def home(base: Run, plan: Plan) -> Path:
    """The run directory of `plan`: that of `base` if it is its plan, else of a member."""
    if plan.reduce_id == base.plan.reduce_id:
        return base.layout.run_dir
    return base.layout.sweeps / plan.reduce_id


def member(base: Run, plan: Plan) -> Run:
    """The run of `plan`, `base` or a member that was made before.

    Raises
    ------
    ConfigError
        If there is none.
    """
    run_dir = home(base, plan)
    if not Run.exists(run_dir):
        raise ConfigError(
            "the sweep has no member with these settings",
            where=str(run_dir),
            next="the same command without stage=… makes it",
        )
    return Run.open(run_dir)


def refuse_nested(run_dir: Path) -> None:
    """Raise `ConfigError` if `run_dir` is a place for a member, which only its base run makes."""
    layout = Layout(run_dir)
    if layout.member:
        raise ConfigError(
            "this is a place for members of a sweep, which are made from their run",
            where=str(run_dir),
            next=f"{commands.launch(layout.base, '-m')}, and the settings of this one",
        )
