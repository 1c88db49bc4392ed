"""A run whose grads are another package's: its rows become what featurize cells would have written.

The rows are taken as they are, bit by bit where their type is float16 or float32, so that what
kernels and scores are made of is what the other package has. A receipt names the directory, and
digests what was read. The same call again writes the cells that are missing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trak_dist import machine
from trak_dist.cells import FeaturizeCell
from trak_dist.cells.featurize import INPUT_DIGEST_BYTES
from trak_dist.configuration.config import (
    FeaturizeConfig,
    ProjectionConfig,
    ReduceConfig,
    Spec,
)
from trak_dist.configuration.dotted import differences
from trak_dist.coordinates import TRAIN
from trak_dist.errors import InterchangeError, MixedRun, PlanMismatch
from trak_dist.hashing import digest_of
from trak_dist.ingest import streamed_plan
from trak_dist.interchange.foreign_files import ForeignRows
from trak_dist.plan import Plan
from trak_dist.store import contents
from trak_dist.store.prepare import prepare_checkpoint
from trak_dist.store.run import Run


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a directory of another package holds.

    `call` is the function of `trak_dist` that imports it, `rows` are of each `model_id` by split,
    `reduce` is the kernel that a new run has, `facts` are what receipts say besides.
    """

    call: str
    directory: Path
    rows: Mapping[int, Mapping[str, ForeignRows]]
    reduce: ReduceConfig
    facts: Mapping[str, Any]


def write_run(run_dir: Path, found: Found) -> None:
    """Write the rows as the grads of a run, which is made, or completed.

    Raises
    ------
    NonFiniteGradient, InterchangeError
        If rows are not finite, or two checkpoints have the same; nothing is written then.
    PlanMismatch
        If the run that is there is another one.
    MixedRun
        If rows that were imported before have changed.
    """
    digests = {
        (model_id, split): rows.checked_digest()
        for model_id, splits in found.rows.items()
        for split, rows in splits.items()
    }
    _check_distinct(found, {m: digests[m, TRAIN] for m in found.rows})
    plan = _plan(found)
    if not Run.exists(run_dir):
        streamed_plan.create_run(run_dir, plan)
    run = Run.open(run_dir)
    _check_same(run, plan)
    run = streamed_plan.extend_run(run, lambda current: _extended(current, found))
    for model_id, splits in found.rows.items():
        prepare_checkpoint(run, model_id)
        for split, rows in splits.items():
            facts = {
                "checkpoint_digest": digests[model_id, TRAIN],
                "imported_digest": digests[model_id, split],
                "imported_from": str(found.directory),
                "imported_by": found.call,
                "projector_dim": run.plan.store_dim,
                "dtype": run.plan.spec.featurize.dtype,
                **found.facts,
            }
            _write(run, model_id, split, rows, facts)


def _plan(found: Found) -> Plan:
    n, dim = next(iter(found.rows.values()))[TRAIN].grads.shape
    dtypes = {rows.dtype for splits in found.rows.values() for rows in splits.values()}
    threads = torch.get_num_threads()
    spec = Spec(
        problem={"_target_": f"trak_dist.{found.call}"},
        proj_dim=dim,
        store_dim=dim,
        projection=ProjectionConfig(kind="identity"),  # here: whatever it was there
        featurize=FeaturizeConfig(dtype=max(dtypes), threads=threads),
        reduce=found.reduce,
    )
    what = digest_of(repr(sorted(found.facts.items())).encode())
    return streamed_plan.new_plan(spec, rows=n, parameters=dim, model=what, gradients="vmap")


def _extended(plan: Plan, found: Found) -> Plan:
    for model_id, splits in found.rows.items():
        plan = streamed_plan.with_checkpoint(plan, model_id, None)
        for split, rows in splits.items():
            if split != TRAIN:
                plan = streamed_plan.with_targets(plan, split, len(rows.grads))
    return plan


def _check_distinct(found: Found, digests: Mapping[int, str]) -> None:
    first: dict[str, int] = {}
    for model_id, digest in digests.items():
        other = first.setdefault(digest, model_id)
        if other != model_id:
            raise InterchangeError(
                f"model_ids {other} and {model_id} have the same train grads (digest {digest})",
                where=str(found.directory),
                next="import one of them: a copy is no further model of the ensemble",
            )


def _check_same(run: Run, plan: Plan) -> None:
    changed = {
        k: v
        for k, v in differences(asdict(run.plan.spec), asdict(plan.spec)).items()
        if not k.startswith("reduce.") and k != "featurize.threads"
    }
    if run.plan.train.rows != plan.train.rows:
        changed["train rows"] = run.plan.train.rows, plan.train.rows
    if run.plan.source.model != plan.source.model:
        changed["what is said of how the rows were made"] = run.plan.source.model, plan.source.model
    if changed:
        listed = [f"  {k}: {old!r} in the run, {new!r} now" for k, (old, new) in changed.items()]
        raise PlanMismatch(
            "\n".join(["the run in run_dir is another one:", *listed]),
            where=str(run.layout.run_dir),
            next="another run_dir",
        )


def _write(
    run: Run, model_id: int, split: str, rows: ForeignRows, facts: Mapping[str, Any]
) -> None:
    cells = list(FeaturizeCell.of_split(run.plan, model_id, split))
    done = run.receipts.done(cells)
    for cell, receipt in done.items():
        if (then := receipt.facts.get("imported_digest")) != facts["imported_digest"]:
            raise MixedRun(
                f"{split!r} of model_id {model_id} has changed since it was imported: digest "
                f"{then} then, {facts['imported_digest']} now",
                where=f"{rows.where}, {cell.id}",
                next="restore the file, or import into another run_dir",
            )
    for cell in cells:
        if cell in done:
            continue
        started, clock = time.time(), time.perf_counter()
        start, stop, size = cell.rows.start, cell.rows.stop, len(cell.rows)
        unknown = np.zeros((size, INPUT_DIGEST_BYTES), np.uint8)  # what they were computed from
        digests = contents.write(
            run,
            cell,
            {
                "grads": rows.block(start, stop).astype(run.plan.spec.featurize.dtype, copy=False),
                "row_scale": np.ones(size, np.float32),
                "out_to_loss": rows.out_to_loss[start:stop].astype(np.float32),
                "inputs": unknown,
            },
        )
        seconds = round(time.perf_counter() - clock, 3)
        made = {"inputs_digest": digest_of(unknown.data), "rows": size, "non_finite_rows": 0}
        job = {**machine.process(), "started": started, "seconds": seconds}
        run.publish(cell, digests, facts={**facts, **made}, job=job)
