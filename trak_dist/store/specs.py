"""What each array of a run is, as its plan says: for those that make, write and read it."""

from __future__ import annotations

from trak_dist.plan import CHUNK_BYTES, Plan, Split
from trak_dist.store.arrays import ArraySpec
from trak_dist.store.parts import DIGEST_BYTES


def of_split(plan: Plan, split: Split) -> dict[str, ArraySpec]:
    """`grads` (n, k), `row_scale` (n,) and `out_to_loss` (n,), chunked alike.

    Where rows are fed also `inputs` (n, 16), digests of what each was computed from.
    """
    rows, chunk = split.rows, min(split.cell_rows, split.rows)
    compression = plan.spec.store.compression

    def row_array(dtype: str, *columns: int) -> ArraySpec:
        return ArraySpec(
            shape=(rows, *columns), chunks=(chunk, *columns), dtype=dtype, compression=compression
        )

    specs = {
        "grads": row_array(plan.spec.featurize.dtype, plan.store_dim),
        "row_scale": row_array("float32"),
        "out_to_loss": row_array("float32"),
    }
    if split.fed:
        specs["inputs"] = row_array("uint8", DIGEST_BYTES)
    return specs


def square(plan: Plan) -> ArraySpec:
    """Gram or kernel (k, k)."""
    k = plan.proj_dim
    chunk = max(1, min(k, CHUNK_BYTES // (8 * k)))
    return ArraySpec(shape=(k, k), chunks=(chunk, k), dtype="float64")


def preconditioned(plan: Plan, split: Split) -> ArraySpec:
    """B (k, t)."""
    shape = (plan.proj_dim, split.rows)
    chunk = max(1, min(shape[0], CHUNK_BYTES // (8 * split.rows)))
    return ArraySpec(shape=shape, chunks=(chunk, split.rows), dtype=plan.precondition_dtype)


def margins(plan: Plan, split: Split) -> ArraySpec:
    """Outputs (subsets, t); members of one sweep may ask for different numbers of subsets."""
    shape = (plan.ground_truth.subsets, split.rows)
    return ArraySpec(shape=shape, chunks=(1, split.rows), dtype="float32", grows=True)


def scores(plan: Plan, targets: str) -> ArraySpec:
    """Scores (n_train, t)."""
    return _scores(plan, targets, plan.score_columns(targets))


def halves(plan: Plan, targets: str) -> ArraySpec:
    """Scores of either half of the ensemble (n_train, 2, some t), cut as the scores are."""
    return _scores(plan, targets, 2, len(plan.halves(targets)))


def _scores(plan: Plan, targets: str, *columns: int) -> ArraySpec:
    train = plan.score_split(targets)
    return ArraySpec(
        shape=(train.rows, *columns),
        chunks=(train.cell_rows, *columns),
        dtype="float32",
        attributes={
            "model_ids": list(plan.model_ids),
            "proj_dim": plan.proj_dim,
            "lambda_reg": plan.spec.reduce.lambda_reg,
            "lambda_unit": plan.spec.reduce.lambda_unit,
            "kernel_scale": plan.spec.reduce.kernel_scale,
        },
    )
