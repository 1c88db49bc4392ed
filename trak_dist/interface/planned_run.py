"""The Python interface of the distributed path: plan a run, look at it, execute it.

What is done is returned, nothing is printed; the command line is a shell on the same parts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trak_dist import in_process
from trak_dist.cells import STAGE_STEPS
from trak_dist.configuration.config import STAGES
from trak_dist.errors import ConfigError
from trak_dist.interface import execution, keywords, preparation, summary
from trak_dist.interface.cost import Cost
from trak_dist.interface.execution import Outcome
from trak_dist.interface.keywords import ProblemLike
from trak_dist.interface.preparation import Prepared
from trak_dist.interface.progress import OnProgress
from trak_dist.interface.summary import Summary
from trak_dist.problem import Problem
from trak_dist.status.state import Status, read_status

if TYPE_CHECKING:
    from trak_dist.store.results import Results

STAGES_WITHOUT_PLANNING = ("status", "verify", "cancel")


@dataclass(frozen=True)
class PlannedRun:
    """A run that is planned: its arrays are on disk, its cells are to be executed.

    `notes` say what planning found worth saying, in the order of their finding.
    """

    prepared: Prepared
    notes: tuple[str, ...]
    problem: Problem | None = None

    @property
    def run_dir(self) -> Path:
        """The run directory; a member of a sweep has its own."""
        return self.prepared.run.layout.run_dir

    @cached_property
    def summary(self) -> Summary:
        """Cells, tasks, bytes and minutes, as they were when first asked for."""
        config = self.prepared.config
        stages = execution.stages_of(config) or list(STAGE_STEPS)
        return summary.summarize(self.prepared.run, stages, config.cluster, self.prepared.workers)

    @cached_property
    def cost(self) -> Cost:
        """Tasks, hours, wall time, bytes and files of what is left, as estimated when first asked.

        Where no receipt says how fast rows are, a trial of some is computed.
        """
        with in_process.holding(self.problem):
            return execution.cost_of(self.prepared)

    def execute(self, *, on_progress: OnProgress | None = None, wait: bool = False) -> Outcome:
        """Run the cells that are missing. A failed cell is in the outcome, not raised.

        Parameters
        ----------
        on_progress : callable, optional
            Gets a `Progress` now and then.
        wait : bool
            On Slurm, return when the queue holds nothing of the run, not after submitting.

        Raises
        ------
        MissingInputs
            If a single stage was asked for, and those before it are not complete.
        SlurmError
            If Slurm is not there or refuses a job.
        """
        with in_process.holding(self.problem):
            return execution.execute(self.prepared, on_progress=on_progress, wait=wait)

    def status(self) -> Status:
        """What is done, failed, running and queued now."""
        return read_status(self.prepared.run)

    def results(self) -> Results:
        """The run for reading, as `open_run` gives it."""
        from trak_dist.store.results import Results
        from trak_dist.store.run import Run

        return Results(Run.open(self.run_dir), self.problem)


def plan_run(
    *,
    run_dir: str | Path,
    problem: ProblemLike | None = None,
    sweep: bool = False,
    on_note: Callable[[str], None] | None = None,
    **settings: Any,
) -> PlannedRun:
    """Plan a run, or resume the one in `run_dir`: settings not named come from its plan.

    Parameters
    ----------
    run_dir : path
        The run directory.
    problem : str, mapping, function or Problem, optional
        An import path (`package.module:function`), the name of one that is shipped, a mapping with
        `_target_` and its arguments, a function, or a `Problem`; a `Problem`, or a function that no
        other process can import, for `cluster="debug"`. Of a run that is there it may be left out.
    sweep : bool
        Settings in which the combinations of a sweep may differ make a member of the run, as `-m`
        does.
    on_note : callable, optional
        Gets each note when it is found, too.
    **settings
        The keys of `conf/config.yaml`: `proj_dim=512`, `stage="featurize"`, `cluster="slurm"`,
        `reduce={"lambda_reg": 0.1}`, or `**{"reduce.lambda_reg": 0.1}`.

    Raises
    ------
    ConfigError
        If settings are unknown or not valid, naming all of them.
    PlanMismatch
        If they are not those of the run in `run_dir`.
    ProblemError, DatasetError, CheckpointError, SingularGram, MemoryRefused
        If the run could not work; nothing is written then.
    """
    notes: list[str] = []

    def note(text: str) -> None:
        notes.append(text)
        if on_note:
            on_note(text)

    held = None
    if problem is not None:
        setting, held = keywords.problem_setting(problem)
        settings["problem"] = setting
    invocation = keywords.invocation({**settings, "run_dir": run_dir})
    resolved = preparation.resolve(invocation, note, sweep_dims=() if sweep else None)
    config = resolved.config
    if config.stage in STAGES_WITHOUT_PLANNING:
        others = ", ".join(stage for stage in STAGES if stage not in STAGES_WITHOUT_PLANNING)
        raise ConfigError(
            f"stage={config.stage!r} plans nothing",
            where="stage",
            next=f"one of {others}; PlannedRun.status() shows what is done",
        )
    if held and config.cluster.kind != "debug":
        raise ConfigError(
            f"the workers of cluster={config.cluster.kind!r} can't import the problem: it is an "
            "object of this process",
            where="problem",
            next="problem='module:function' of a file, or cluster='debug'",
        )
    with in_process.holding(held):
        return PlannedRun(preparation.prepare_run(resolved, note), tuple(notes), held)
