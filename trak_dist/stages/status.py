"""status: what is done, from receipts alone. Loads neither torch nor zarr."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass

from trak_dist.cells import STAGE_CELLS, Cell, FeaturizeCell, sort_key
from trak_dist.store.receipts import Failure, Receipt
from trak_dist.store.run import Run


@dataclass(frozen=True)
class StageStatus:
    """The cells of one stage: how many there are, which are done, which failed last."""

    total: int
    done: dict[Cell, Receipt]
    failed: dict[Cell, Failure]


@dataclass(frozen=True)
class Status:
    """The state of a run."""

    run: Run
    stages: dict[str, StageStatus]

    @property
    def complete(self) -> bool:
        """Whether every cell of the plan is done."""
        return all(s.total == len(s.done) for s in self.stages.values())

    def json_line(self) -> str:
        """The machine-readable last line of `stage=status`."""
        counts = {
            name: {"done": len(s.done), "total": s.total, "failed": len(s.failed)}
            for name, s in self.stages.items()
        }
        return json.dumps({"stage": counts, "complete": self.complete})


def read_status(run: Run) -> Status:
    """Read the receipts of `run`."""
    stages = {}
    for name in STAGE_CELLS:
        cells = list(run.plan.cells(name))
        done = run.receipts.done(cells)
        failed = run.receipts.failures(c for c in cells if c not in done)
        stages[name] = StageStatus(len(cells), done, failed)
    return Status(run, stages)


def lines(status: Status) -> list[str]:
    """The report for people: stages, the checkpoint × split grid, failures."""
    run = status.run
    out = [f"run    {run.layout.run_dir}", f"plan   {run.plan.fingerprint}", ""]
    out.append(f"{'stage':<12}{'done':>9}{'total':>9}{'failed':>9}{'rows/s':>10}")
    for name, stage in status.stages.items():
        out.append(
            f"{name:<12}{len(stage.done):>9}{stage.total:>9}{len(stage.failed):>9}{_rate(stage):>10}"
        )
    out += ["", *_grid(status)]
    failures = {c: f for s in status.stages.values() for c, f in s.failed.items()}
    for cell in sorted(failures, key=sort_key):
        failure = failures[cell]
        host, log = failure.job.get("host", "?"), failure.job.get("log", "")
        out += ["", f"failed {cell.id} on {host} {log}".rstrip(), _indent(failure.error)]
        if not failure.expected:
            out.append(_indent("\n".join(failure.traceback.splitlines()[-12:])))
    return out


def _grid(status: Status) -> list[str]:
    plan = status.run.plan
    done = Counter(
        (c.model_id, c.split)
        for c in status.stages["featurize"].done
        if isinstance(c, FeaturizeCell)
    )
    splits = (plan.train, *plan.targets)
    width = max(12, *(len(s.name) + 2 for s in splits))
    out = ["checkpoint" + "".join(f"{s.name:>{width}}" for s in splits) + "   (featurize cells)"]
    for model_id in plan.model_ids:
        counts = (f"{done[model_id, s.name]}/{len(list(s.blocks()))}" for s in splits)
        out.append(f"{model_id:<10}" + "".join(f"{count:>{width}}" for count in counts))
    return out


def _rate(stage: StageStatus) -> str:
    """Rows per second of one worker, over the cells done."""
    timed = [r for r in stage.done.values() if "rows" in r.facts and r.job.get("seconds")]
    seconds = sum(float(r.job["seconds"]) for r in timed)
    return f"{sum(r.facts['rows'] for r in timed) / seconds:,.0f}" if seconds else ""


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
