"""The command line: Hydra → config → plan → executor. Wiring only; nothing a job runs lives here.

    python -m trak_dist.launch [stage=…] [problem=…] [cluster=…] [run_dir=…] [key=value …]

Exit codes: 0 done, 1 cells failed or are damaged (named), 2 a mistake that the user can mend.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from omegaconf import DictConfig
from rich.console import Console

from trak_dist import machine, settings
from trak_dist.cells import STAGE_CELLS, Cell
from trak_dist.config import ClusterConfig, Config
from trak_dist.errors import ConfigError, MissingInputs, StoreError, TrakDistError
from trak_dist.progress import Progress
from trak_dist.stages import status
from trak_dist.store import atomic
from trak_dist.store.run import Run

if TYPE_CHECKING:
    from trak_dist.executors.protocol import Executor
    from trak_dist.plan import Plan

DONE, FAILED, MISTAKE = 0, 1, 2
out = Console(soft_wrap=True, highlight=False, markup=False)


def main() -> None:
    """Entry point of `python -m trak_dist.launch` and of `trak-dist`."""
    try:
        overrides = settings.complete_overrides(sys.argv[1:], Path.cwd())
        if not any(o.startswith("-") for o in overrides):
            settings.check_overrides(overrides)
    except TrakDistError as error:
        _tell(error)
        sys.exit(MISTAKE)
    sys.argv[1:] = overrides
    given = settings.given_keys(overrides)

    def task(config: DictConfig) -> None:
        code = _guarded(config, given)
        if code:
            sys.exit(code)

    hydra.main(version_base="1.3", config_path=str(settings.CONF), config_name="config")(task)()


def _guarded(composed: DictConfig, given: frozenset[str]) -> int:
    try:
        return _launch(composed, given)
    except TrakDistError as error:
        _tell(error)
        return MISTAKE


def _tell(error: TrakDistError) -> None:
    print(f"error: {error}", file=sys.stderr)


def _launch(composed: DictConfig, given: frozenset[str]) -> int:
    mapping = settings.to_mapping(composed)
    run_dir = Path(mapping["run_dir"]).expanduser()
    if "%" in str(run_dir):
        raise ConfigError(
            "run_dir has a '%', which submitit and Slurm take for a job's number",
            where=str(run_dir),
            next="use a run_dir without one",
        )
    with atomic.told(run_dir):
        run = Run.open(run_dir) if Run.exists(run_dir) else None
    if run:
        mapping, kept = settings.merge_with_plan(mapping, asdict(run.plan.spec), given)
        if kept and mapping["stage"] != "status":
            out.print(f"from the plan: {', '.join(kept)}")
    settings.refuse_missing(mapping)
    config = Config.from_mapping(mapping)
    if config.stage in ("status", "verify"):
        run = run or Run.open(run_dir)  # raises, and says how to begin
        settings.refuse_other_spec(
            asdict(run.plan.spec), asdict(config.spec), where=str(run.layout.plan)
        )
        return _status(run) if config.stage == "status" else _verify(run, repair=config.repair)
    run, workers = _planned(config, run)
    executor = _executor(run, config.cluster, workers)
    if config.stage == "plan":
        return DONE
    stages = [s for s in STAGE_CELLS if config.stage in ("all", s)]
    _refuse_missing_upstream(run, config.stage)
    for stage in stages:
        if not _run_stage(run, stage, config.cluster, executor):
            return FAILED
    _tell_what_next(run)
    return DONE


# Plan ---------------------------------------------------------------------------------------


def _planned(config: Config, run: Run | None) -> tuple[Run, int]:
    """The run, made or extended, and how many workers fit; refuses before it writes."""
    from trak_dist import problem as problems
    from trak_dist.stages import planning
    from trak_dist.store.prepare import prepare

    plan = run and run.plan
    if run and settings.refuse_other_spec(
        asdict(run.plan.spec), asdict(config.spec), where=str(run.layout.plan)
    ):
        plan = planning.with_reduce(run, config.spec)
    import_root = plan.source.import_root if plan else str(Path.cwd())
    problem, source = problems.build(config.spec.problem, import_root=import_root)
    if plan:
        plan = planning.extend_plan(plan, problem, source, config.targets)
    else:
        plan = planning.make_plan(config.spec, problem, source, config.targets)
    planning.check_checkpoints(plan, problem)
    workers = _fit_workers(plan, config.cluster)
    _refuse_full_disk(Path(config.run_dir).expanduser(), 0 if run else plan.store_bytes())
    if run is None:
        run = Run.create(Path(config.run_dir).expanduser(), plan)
    elif plan != run.plan:
        run = run.extend(plan)
    prepare(run)
    cells = sum(1 for stage in STAGE_CELLS for _ in plan.cells(stage))
    out.print(
        f"plan: {plan.train.rows} train rows, {len(plan.checkpoints)} checkpoints, "
        f"{', '.join(f'{s.name} {s.rows}' for s in plan.targets)} targets, p {plan.parameters:,}, "
        f"{plan.spec.projection.kind} to {plan.proj_dim}, {cells} cells, "
        f"{plan.store_bytes() / 2**20:,.0f} MiB, in {run.layout.run_dir}"
    )
    return run, workers


def _refuse_full_disk(run_dir: Path, needed: int) -> None:
    with atomic.told(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
    free = atomic.free_bytes(run_dir.absolute())
    if free < needed:
        raise StoreError(
            f"no disk space: the run needs {needed / 2**20:,.0f} MiB, "
            f"{free / 2**20:,.0f} MiB are free",
            where=str(run_dir),
            next="free some space, use another run_dir, or a smaller proj_dim",
        )


# Run ----------------------------------------------------------------------------------------


def _fit_workers(plan: Plan, cluster: ClusterConfig) -> int:
    threads = max(plan.spec.featurize.threads, plan.spec.reduce.threads)
    return machine.fit_workers(
        wanted=cluster.workers or _gpus(cluster) or max(1, machine.cores() // threads),
        needed=plan.reduce_memory(),
        memory=int(cluster.memory_gb * 2**30) or machine.memory_bytes(),
        what=f"a kernel of proj_dim {plan.proj_dim}",
    )


def _gpus(cluster: ClusterConfig) -> int:
    import torch

    from trak_dist.stages.session import open_device

    return torch.cuda.device_count() if open_device(cluster.device).type == "cuda" else 0


def _executor(run: Run, cluster: ClusterConfig, workers: int) -> Executor:
    if cluster.kind == "debug":
        from trak_dist.executors.debug import DebugExecutor

        logging.basicConfig(level=logging.INFO, format="%(message)s")
        return DebugExecutor()
    from trak_dist.executors.local import LocalExecutor
    from trak_dist.worker import LOG_VARIABLE

    return LocalExecutor(
        logs=run.layout.logs, workers=workers, gpus=_gpus(cluster), log_variable=LOG_VARIABLE
    )


def _refuse_missing_upstream(run: Run, stage: str) -> None:
    order = list(STAGE_CELLS)
    if stage == "all" or order.index(stage) == 0:
        return
    for upstream in order[: order.index(stage)]:
        cells = list(run.plan.cells(upstream))
        done = run.receipts.done(cells)
        if len(done) < len(cells):
            raise MissingInputs(
                f"stage={stage} needs {upstream}, of which {len(cells) - len(done)} of "
                f"{len(cells)} cells are missing",
                where=str(run.layout.run_dir),
                next=f"python -m trak_dist.launch stage={upstream} run_dir={run.layout.run_dir}",
            )


def _run_stage(run: Run, stage: str, cluster: ClusterConfig, executor: Executor) -> bool:
    from trak_dist import worker

    job = functools.partial(
        worker.run_cells, str(run.layout.run_dir), run.plan.fingerprint, cluster.device
    )
    phases = list(run.plan.phases(stage))
    for number, phase in enumerate(phases, 1):
        done = run.receipts.done([c for task in phase for c in task])
        tasks = [tuple(c for c in task if c not in done) for task in phase]
        waiting = [c for task in tasks for c in task]
        if not waiting:
            continue
        label = stage if len(phases) == 1 else f"{stage} {number}/{len(phases)}"
        live = out.is_terminal and cluster.kind != "debug"
        with Progress(run, waiting, label=label, console=out, live=live) as progress:
            executor.run(job, [tuple(c.id for c in t) for t in tasks if t], progress.tick)
        if not _all_done(run, stage, waiting):
            return False
    return True


def _all_done(run: Run, stage: str, cells: Sequence[Cell]) -> bool:
    done = run.receipts.done(cells)
    missing = [c for c in cells if c not in done]
    if not missing:
        return True
    failures = run.receipts.failures(missing)
    print(f"error: {stage}: {len(missing)} of {len(cells)} cells are not done", file=sys.stderr)
    for cell, failure in failures.items():
        text = failure.error if failure.expected else failure.traceback
        log = f" (log: {failure.job['log']})" if failure.job.get("log") else ""
        print(f"\n{cell.id}{log}:\n{text.rstrip()}", file=sys.stderr)
    others = [c.id for c in missing if c not in failures]
    if others:
        shown = ", ".join(others[:10]) + (", …" if len(others) > 10 else "")
        print(f"\nnot run, or ended without a word (killed?): {shown}", file=sys.stderr)
    print(
        "\nnext: mend the cause, then run the same command again; finished cells are kept",
        file=sys.stderr,
    )
    return False


# Read ---------------------------------------------------------------------------------------


def _status(run: Run) -> int:
    found = status.read_status(run)
    for line in (*status.lines(found), "", found.json_line()):
        print(line)
    return DONE


def _verify(run: Run, *, repair: bool) -> int:
    from trak_dist.stages.verify import damaged_cells

    damaged = list(damaged_cells(run))
    for cell, reasons in damaged:
        print(f"damaged {cell.id}: {'; '.join(reasons)}")
        if repair:
            run.receipts.revoke(cell, why="; ".join(reasons))
    command = f"python -m trak_dist.launch run_dir={run.layout.run_dir}"
    if not damaged:
        print("verify: all that done cells wrote is as their receipts say")
        return DONE
    if repair:
        print(f"verify: {len(damaged)} cells are queued again\nnext: {command}")
        return DONE
    print(f"verify: {len(damaged)} cells are damaged\nnext: {command} stage=verify repair=true")
    return FAILED


def _tell_what_next(run: Run) -> None:
    for split in run.plan.targets:
        if run.layout.report(split.name).exists():
            print(f"scores: {run.layout.scores(split.name)}")
            print(f"report: {run.layout.report(split.name)}")
    where = run.layout.run_dir
    if os.path.commonpath([where, Path.cwd()]) == str(Path.cwd()):
        where = where.relative_to(Path.cwd())
    print(f"next:   python -m trak_dist.launch stage=status run_dir={where}")


if __name__ == "__main__":
    main()
