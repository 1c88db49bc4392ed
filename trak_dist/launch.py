"""The command line: Hydra → invocation → plan → executor. A shell on the Python interface.

    python -m trak_dist.launch [-m] [stage=…] [problem=…] [cluster=…] [run_dir=…] [key=value …]

Exit codes: 0 done, 1 cells failed or are damaged (named), 2 a mistake that the user can fix; of a
sweep (`-m`) the worst one.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import hydra
from omegaconf import DictConfig

from trak_dist import console, settings, sweep
from trak_dist.cells import of_stage
from trak_dist.configuration.config import Config, SlurmConfig
from trak_dist.errors import ConfigError, ProblemError, TrakDistError
from trak_dist.interface import execution, options, preparation
from trak_dist.interface.planned_run import STAGES_WITHOUT_PLANNING
from trak_dist.interface.preparation import Prepared
from trak_dist.store.jobs import JobRecords
from trak_dist.store.run import Run
from trak_dist.sweep import Combination

DONE, FAILED, MISTAKE, INTERRUPTED = 0, 1, 2, 130


def main() -> None:
    """Entry point of `python -m trak_dist.launch` and of `trak-dist`."""
    for ends in (signal.SIGINT, signal.SIGTERM):  # both end local workers too, even under nohup
        signal.signal(ends, signal.default_int_handler)
    try:
        arguments = settings.complete_overrides(sys.argv[1:], Path.cwd())
        overrides = settings.overrides_among(arguments)
        swept = sweep.parse(arguments)
        if all(a in overrides or a in settings.MULTIRUN for a in arguments):
            for sample in swept.samples() if swept else [overrides]:
                settings.check_overrides(sample)
            if swept:
                swept.make_directory()
    except TrakDistError as error:
        console.error(error)
        sys.exit(MISTAKE)
    sys.argv[1:] = arguments

    def launched(config: DictConfig) -> None:
        if swept is None:
            try:
                code = _run_guarded(config, overrides)
            except Exception:
                console.unforeseen()
                code = FAILED
            if code:
                sys.exit(code)
        elif swept.run(lambda one: _run_guarded(config, overrides, one)) == INTERRUPTED:
            raise KeyboardInterrupt

    start = hydra.main(version_base="1.3", config_path=str(options.CONF), config_name="config")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # its errors are reported here, not by Hydra
    try:
        with settings.hydra_errors():
            start(launched)()
    except ConfigError as error:
        console.error(error)
        sys.exit(MISTAKE)
    except KeyboardInterrupt:
        if swept is None:
            raise
        swept.code = INTERRUPTED
    if swept is None:
        return
    console.swept(swept.lines())
    if swept.code:
        sys.exit(swept.code)


def _run_guarded(
    composed: DictConfig, overrides: Sequence[str], combination: Combination | None = None
) -> int:
    try:
        return _launch(composed, overrides, combination)
    except TrakDistError as error:
        console.error(error)
        return MISTAKE
    except SystemExit as error:  # no code of this package does that
        hint = (
            "fix the model, its output or the data: they may raise errors but not exit the process"
        )
        console.error(ProblemError(f"the problem's code raised SystemExit: {error}", next=hint))
        return MISTAKE
    except KeyboardInterrupt:
        console.interrupted()
        return INTERRUPTED


def _launch(composed: DictConfig, overrides: Sequence[str], combination: Combination | None) -> int:
    invocation = settings.invoked(composed, overrides)
    dims = combination.sweep.dims if combination else None
    resolved = preparation.resolve(invocation, console.note, sweep_dims=dims)
    if resolved.config.stage in STAGES_WITHOUT_PLANNING:
        run = preparation.open_existing(resolved, console.note)
        if combination:
            combination.run_dir = run.layout.run_dir
        return _inspect(run, resolved.config)
    prepared = preparation.prepare_run(resolved, console.note)
    if combination:
        combination.run_dir = prepared.run.layout.run_dir
    console.planned(prepared.run)
    return _execute(prepared, combination)


def _execute(prepared: Prepared, combination: Combination | None) -> int:
    run, cluster = prepared.run, prepared.config.cluster
    stages = execution.stages_of(prepared.config)
    if not stages or (isinstance(cluster, SlurmConfig) and cluster.dry_run):
        console.cost(execution.cost_of(prepared))
    if not stages:
        return DONE
    if cluster.kind == "debug":
        logging.basicConfig(level=logging.INFO, format="%(message)s")
    if combination and cluster.kind == "slurm":
        combination.state = "submitted"
    if "train" in stages and cluster.kind != "slurm" and not any(of_stage(run.plan, "train")):
        console.note("train: nothing to do, the problem provides its checkpoints")
    display = console.ProgressDisplay(live=cluster.kind != "debug")
    outcome = execution.execute(prepared, on_progress=display)
    if outcome.submission:
        console.submitted(run, outcome.submission.result, outcome.submission.scripts)
        return DONE
    if not outcome.complete:
        console.failures(outcome)
        return FAILED
    console.results(run)
    return DONE


def _inspect(run: Run, config: Config) -> int:
    if config.stage == "cancel":
        from trak_dist.status.queue import cancel

        console.cancelled(cancel(JobRecords(run)))
        return DONE
    if config.stage == "verify":
        from trak_dist.status.verify import verify_run

        found = verify_run(run, repair=config.repair)
        console.verification(run, found)
        return DONE if found.intact else FAILED
    status = console.watch(run) if config.watch else console.status(run)
    return FAILED if status.failed else DONE


if __name__ == "__main__":
    main()
