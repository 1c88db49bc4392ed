"""What the package makes of a plan, as plain values: all calls of the golden tests into it.

Where functions move, this module follows them; `expected.json` stays as it is.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from trak_dist import cells, graph, plan_file, worker
from trak_dist.cell_map import Owners
from trak_dist.cells import KINDS, STAGE_STEPS, Cell, of_run, of_stage, of_step, parse_cell
from trak_dist.cells.score import halves_targets
from trak_dist.executors import batch
from trak_dist.store import contents, prepare
from trak_dist.store.run import Run

STEPS = [step for step in cells.STEPS if step not in ("gram", "top")]  # which they had not
MEMORY = ("featurize", "gram", "kernel", "precondition", "score", "evaluate")  # others had none
GPU = ("train", "featurize", "kernel", "score", "evaluate", "report")  # of counterfactual: wrong


def planned(run_dir: Path, text: str, base: str | None = None) -> Run:
    """A run with the plan of that text, and its arrays; the member of the run of plan `base`."""
    plan = plan_file.load(text.encode(), where=str(run_dir))
    if base:
        run_dir = planned(run_dir, base).layout.sweeps / plan.reduce_id
    run = Run.create(run_dir, plan)
    prepare.prepare(run)
    return run


def numbers(run: Run) -> dict[str, Any]:
    plan = run.plan
    names = ("fingerprint", "projection_id", "kernel_id", "reduce_id", "precondition_dtype")
    found = {name: getattr(plan, name) for name in (*names, "store_dim", "proj_dim", "model_ids")}
    found |= {"memory": {kind.kind: kind.memory(plan) for kind in KINDS if kind.kind in MEMORY}}
    found |= {"cpus": {step: batch._threads(plan, step) for step in STEPS}}
    found |= {"gpu": {step: batch.on_gpu(step) for step in GPU}}
    return found | {"halves": {name: halves_targets(plan, name) for name in plan.scored_names()}}


def everything(run: Run) -> list[Cell]:
    return list(of_run(run.plan))


def order(run: Run) -> dict[str, list[str]]:
    """The ids of the cells that each stage, and each step, runs."""
    stages = {f"stage {s}": [c.id for c in of_stage(run.plan, s)] for s in STAGE_STEPS}
    return stages | {f"step {s}": [c.id for c in of_step(run.plan, s)] for s in STEPS}


def cell(run: Run, one: Cell) -> dict[str, Any]:
    """What a cell is called, where its records and results are, and what it needs."""
    plan, layout = run.plan, run.layout
    assert parse_cell(one.id) == one
    paths = {"receipt": layout.receipt(plan, one), "failure": layout.failure(plan, one)}
    if one.kind == "featurize":
        paths["consolidated"] = layout.consolidated(plan, one)
        paths["parts"] = layout.parts(plan, one.model_id, one.split)
    for name in one.files():
        paths.setdefault("file", layout.file(one, name))
    waits = {
        name: sorted({c.id for c in one.dependencies(plan, done)})
        for name, done in (("none", ()), ("all", everything(run)))
    }
    owned = contents.array_regions(run, one).items()
    key = {} if one.kind == "report" else {"key": one.key(plan)}  # a report's may change
    return {
        **key,
        **{name: str(path.relative_to(layout.base)) for name, path in paths.items()},
        "needs": waits,
        "owns": {n: [str(s.path.relative_to(layout.store)), s.start, s.stop] for n, s in owned},
    }


def arrays(run: Run) -> dict[str, Any]:
    """Each array, by its path in the store, as on disk; and what the cells that own it take it for.

    Groups are only named.
    """
    found: dict[str, Any] = {}
    for path in run.layout.store.rglob("zarr.json"):
        meta = json.loads(path.read_text())
        names = ("shape", "data_type", "fill_value", "attributes")
        found[str(path.parent.relative_to(run.layout.store))] = (
            {
                **{name: meta[name] for name in names if meta[name] != {}},
                "chunks": meta["chunk_grid"]["configuration"]["chunk_shape"],
                "codecs": "+".join(codec["name"] for codec in meta["codecs"]),
            }
            if meta["node_type"] == "array"
            else "group"
        )
    for slab in (s for c in everything(run) for s in contents.array_regions(run, c).values()):
        spec = slab.spec
        taken_for = [spec.shape, spec.chunks, spec.dtype, spec.compression]
        taken_for.append(spec.if_changed == "grow")
        array = found[str(slab.path.relative_to(run.layout.store))]
        assert array.setdefault("owned as", taken_for) == taken_for
    return found


def threads(run: Run) -> dict[str, int]:
    """torch's threads in each kind of cell."""
    found, device = {}, torch.device("cpu")
    for one in everything(run):
        if one.kind not in found:
            with worker.cell_numerics(device):
                worker._fix_numerics(SimpleNamespace(run=run, device=device), one)
                found[one.kind] = torch.get_num_threads()
    return found


def alike(run: Run) -> dict[str, list[list[str]]]:
    """The cells of each step, those together that need the same of earlier steps."""
    found: dict[str, list[list[str]]] = {}
    for step in STEPS:
        groups: dict[object, list[str]] = {}
        for one in of_step(run.plan, step):
            groups.setdefault(one.dependency_group, []).append(one.id)
        found[step] = sorted(map(sorted, groups.values()))
    return found


def tasks(run: Run, rows_per_task: int) -> dict[str, list[list[str]]]:
    found = {s: graph.tasks(run.plan, s, rows_per_task=rows_per_task) for s in STEPS}
    return {step: [[c.id for c in task] for task in made] for step, made in found.items()}


def graph_arrays(
    run: Run,
    *,
    done: Collection[Cell] = (),
    skip: Collection[Cell] = (),
    owners: Collection[Cell] = (),
) -> Iterator[Any]:
    """The arrays of the job graph, if tasks of others own some cells.

    Arrays that lack a cell are not submitted.
    """
    owned = Owners(run.plan)
    for cell in owners:
        owned.take([cell], f"other.{cell.id}")
    asked = {"done": done, "owners": owned, "skip": skip, "rows_per_task": 16}
    for number, array in enumerate(graph.task_groups(run.plan, list(STEPS), **asked)):
        for index, task in enumerate(() if array.missing_inputs else array.tasks):
            owned.take(task, f"{array.step}.{number}.{index}")
        yield {
            "step": array.step,
            "tasks": ["+".join(c.id for c in task) for task in array.tasks],
            "after": sorted(array.after),
            "beside": sorted(array.after_any),
            "lacks": sorted(c.id for c in array.missing_inputs),
        }


def rewritten(text: str) -> str:
    """The plan of that text, as a file of today has it."""
    return plan_file.dump(plan_file.load(text.encode(), where=""))
