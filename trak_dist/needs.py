"""What the cells of a plan need, known before anything runs: memory and disk. Pure: no torch."""

from __future__ import annotations

from dataclasses import replace

from trak_dist.config import CACHE_BYTES
from trak_dist.plan import CHUNK_BYTES, Plan

PREDICTIONS = 20 * 16  # values of λ, and ensembles and dimensions, of an evaluation


def memory(plan: Plan) -> dict[str, int]:
    """Bytes that the largest cell of each kind holds at once, apart from the interpreter."""
    spec, k, p = plan.spec, plan.proj_dim, plan.parameters
    rows = max(min(s.cell_rows, s.rows) for s in (plan.train, *plan.targets)) * plan.store_dim
    targets = max((s.rows for s in plan.targets), default=0)
    subsets, n = plan.ground_truth.subsets, plan.train.rows
    drawn = {"sjlt": 8 * p, "identity": 0}.get(spec.projection.kind, 4 * p * plan.store_dim)
    # by vmap a whole batch's at once; by hooks one parameter's, of a few examples or, for a dense
    # projection, of all; by loop one example's
    sparse = spec.projection.kind in ("sjlt", "identity")
    few = plan.gradients == "loop" or (plan.gradients == "hooks" and sparse)
    examples = 1 if few else spec.featurize.batch_rows
    return {
        # weights; activations, and half as much for what comes and goes; per-sample gradients
        # twice; the cell's rows in two types; what is drawn (cached)
        "featurize": 4 * p
        + plan.activations * spec.featurize.batch_rows * 3 // 2
        + 8 * examples * p
        + 8 * rows
        + min(drawn, CACHE_BYTES),
        # XᵀX; a cell's rows as stored, in float32 and in float64
        "gram": 8 * k * k + 16 * rows,
        # XᵀX, its factor, its inverse and a temporary
        "kernel": 4 * 8 * k * k,
        # the factor; the targets' grads and their solutions
        "precondition": 8 * k * k + 24 * k * targets,
        # or the factor, and a chunk's rows solved
        "score": max(8 * k * targets, 8 * k * k * plan.self_influence) + 6 * CHUNK_BYTES,
        # XᵀX, its vectors, temporaries; masks; predictions by λ and ensemble
        "evaluate": (6 * 8 * k * k + subsets * (n + PREDICTIONS * 8 * targets)) if subsets else 0,
    }


def batch_rows_within(plan: Plan, limit: int) -> int:
    """The half, quarter, … of the planned batch with which featurize cells fit; 0 if none."""
    rows = plan.spec.featurize.batch_rows // 2
    while rows:
        featurize = replace(plan.spec.featurize, batch_rows=rows)
        smaller = replace(plan, spec=replace(plan.spec, featurize=featurize))
        if memory(smaller)["featurize"] <= limit:
            break
        rows //= 2
    return rows


def store_bytes(plan: Plan) -> int:
    """Bytes that the whole run's arrays take, uncompressed."""
    return grads_bytes(plan) + reduced_bytes(plan) + truth_bytes(plan)


def grads_bytes(plan: Plan) -> int:
    """Bytes of the stored grads."""
    item = 2 if plan.spec.featurize.dtype == "float16" else 4
    rows = plan.train.rows + sum(s.rows for s in plan.targets)
    return len(plan.model_ids) * rows * (plan.store_dim * item + 8)


def truth_bytes(plan: Plan) -> int:
    """Bytes of the retrained models and their outputs."""
    per_model = 4 * plan.parameters + 4 * sum(s.rows for s in plan.targets)
    return plan.ground_truth.subsets * plan.ground_truth.seeds * per_model


def reduced_bytes(plan: Plan) -> int:
    """Bytes of what is made of the grads."""
    k = plan.proj_dim
    reduce = 2 * k * k * 8 + sum(s.rows for s in plan.targets) * k * 8
    scores = plan.train.rows * sum(s.rows for s in plan.targets) * 4
    return len(plan.model_ids) * reduce + scores
