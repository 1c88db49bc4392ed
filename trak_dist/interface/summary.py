"""What a planned run is, and what is left of it to do: cells, tasks, bytes, minutes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trak_dist import graph, resources
from trak_dist.cells import KINDS, STAGE_STEPS, STEPS, FeaturizeCell, count
from trak_dist.configuration.config import ClusterConfig, SlurmConfig
from trak_dist.plan import Plan
from trak_dist.store.progress import Progress
from trak_dist.store.run import Run


@dataclass(frozen=True)
class StageSummary:
    """Cells of one stage, and what the missing ones take.

    Parameters
    ----------
    done, missing : int
        Cells.
    tasks : int or None
        How many tasks the missing cells make; None where that is decided when they are submitted.
    worker_minutes : float or None
        What one worker needs for them, by the cells that are done; None if no such cell is.
    """

    done: int
    missing: int
    tasks: int | None
    worker_minutes: float | None


@dataclass(frozen=True)
class Summary:
    """A planned run as it was when this was asked for.

    Parameters
    ----------
    run_dir : Path
        The run.
    description : str
        Rows, checkpoints, targets, parameters, how gradients are computed and projected.
    stages : mapping of str to StageSummary
        Those that are to be executed.
    store_bytes : int
        Disk that all arrays take in the end, uncompressed.
    memory_bytes : mapping of str to int
        Memory that the largest cell of each kind holds, apart from the interpreter.
    workers : int or None
        Processes that run cells at once; None on Slurm, which decides.
    """

    run_dir: Path
    description: str
    stages: Mapping[str, StageSummary]
    store_bytes: int
    memory_bytes: Mapping[str, int]
    workers: int | None

    @property
    def done(self) -> int:
        """Cells that are done."""
        return sum(stage.done for stage in self.stages.values())

    @property
    def missing(self) -> int:
        """Cells that are not."""
        return sum(stage.missing for stage in self.stages.values())

    @property
    def minutes(self) -> float | None:
        """Estimated minutes until the missing cells are done; None if that is not known."""
        minutes = [stage.worker_minutes for stage in self.stages.values()]
        known = [m for m in minutes if m is not None]
        return sum(known) / self.workers if self.workers and len(known) == len(minutes) else None

    def __str__(self) -> str:
        heads = f"{'stage':<10}{'done':>8}{'missing':>9}{'tasks':>7}{'minutes':>9}"
        lines = [f"run: {self.run_dir}", self.description, heads]
        for name, stage in self.stages.items():
            tasks, minutes = (_or_unknown(v) for v in (stage.tasks, stage.worker_minutes))
            lines.append(f"{name:<10}{stage.done:>8}{stage.missing:>9}{tasks:>7}{minutes:>9}")
        memory = max(self.memory_bytes.values(), default=0)
        lines.append(f"disk {mebibytes(self.store_bytes)}, memory of a worker {mebibytes(memory)}")
        return "\n".join(lines)


def summarize(
    run: Run, stages: Sequence[str], cluster: ClusterConfig | SlurmConfig, workers: int
) -> Summary:
    """Summarize what is to be executed of a run, by its plan and its receipts."""
    plan = run.plan
    return Summary(
        run_dir=run.layout.run_dir,
        description=description(run),
        stages={name: _stage(run, name, cluster) for name in stages},
        store_bytes=resources.disk_bytes(plan),
        memory_bytes={kind.kind: kind.memory(plan) for kind in KINDS if kind.count(plan)},
        workers=None if isinstance(cluster, SlurmConfig) else workers,
    )


def description(run: Run) -> str:
    """What a run computes, in one line."""
    plan = run.plan
    return (
        f"{plan.train.rows} train rows, {plan.described_ensemble}, "
        f"{', '.join(f'{s.name} {s.rows}' for s in plan.targets)} targets, p {plan.parameters:,}, "
        f"gradients by {plan.gradients}, {plan.spec.projection.kind} to {plan.proj_dim}, "
        f"{_kernel(plan)}"
        f"{count(plan)} cells, {mebibytes(resources.disk_bytes(plan))}"
    )


def _kernel(plan: Plan) -> str:
    """What the kernel inverts, where that is not XᵀX."""
    curvature = "" if plan.curvature == "none" else f"curvature {plan.curvature_id}, "
    parts = f"Gram in {plan.gram_parts} parts, " if plan.gram_parts else ""
    return curvature + (f"dual of {plan.curvature_rows} rows, " if plan.dual else parts)


def mebibytes(size: int) -> str:
    """Bytes as text."""
    return f"{size / 2**20:,.0f} MiB"


def _stage(run: Run, name: str, cluster: ClusterConfig | SlurmConfig) -> StageSummary:
    kinds = [kind for step in STAGE_STEPS[name] for kind in STEPS[step]]
    progress = run.progress(kinds)
    done, missing = (progress.done.where(number, kinds=kinds) for number in (1, 0))
    tasks = _tasks(run, name, cluster, progress) if missing else 0
    return StageSummary(len(done), len(missing), tasks, _worker_minutes(progress))


def _tasks(
    run: Run, stage: str, cluster: ClusterConfig | SlurmConfig, progress: Progress
) -> int | None:
    rows = 1
    if stage == "featurize" and isinstance(cluster, SlurmConfig):
        measured = progress.rows_per_second()
        rows = cluster.rows_per_task or int(60 * cluster.minutes_per_task * measured)
        if not rows:
            return None  # a trial says, when they are submitted
    steps, done = STAGE_STEPS[stage], progress.done
    return sum(len(graph.tasks(run.plan, s, skip=done, rows_per_task=rows)) for s in steps)


def _worker_minutes(progress: Progress) -> float | None:
    """By rows for featurize cells, else by the median cell of each kind."""
    total = 0.0
    for kind, measured in progress.measured.items():
        missing = progress.done.where(0, kinds=[kind])
        if not missing:
            continue
        if kind is FeaturizeCell:
            rate = progress.rows_per_second([kind])
            seconds = missing.rows / rate if rate else None
        else:
            each = measured.median_seconds
            seconds = None if each is None else len(missing) * each
        if seconds is None:
            return None
        total += seconds / 60
    return total


def _or_unknown(value: float | None) -> str:
    return "?" if value is None else f"{value:,.1f}" if isinstance(value, float) else str(value)
