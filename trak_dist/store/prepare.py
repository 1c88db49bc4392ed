"""Make the arrays that a plan calls for. The planner does so; workers only fill them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from trak_dist.plan import CHUNK_BYTES, Plan, Split
from trak_dist.store import arrays
from trak_dist.store.arrays import ArraySpec
from trak_dist.store.parts import DIGEST_BYTES
from trak_dist.store.run import Run


def prepare(run: Run) -> None:
    """Make whatever array of `run` is not there yet; those that are there are verified.

    Raises
    ------
    StoreError
        If an array of another kind is in the way, or the file system refuses.
    """
    plan, layout = run.plan, run.layout
    for model_id in plan.model_ids:
        prepare_checkpoint(run, model_id)
    prepare_scores(run, run.plan.scored())
    for split in plan.targets:
        for seed in range(plan.ground_truth.seeds if plan.ground_truth.subsets else 0):
            path = layout.margins(split.name, seed)
            arrays.grow(path, _margins(plan, split))
            _ensure_groups(run, path)


def prepare_checkpoint(run: Run, model_id: int) -> None:
    """The same for the arrays of one checkpoint."""
    for path, spec in _checkpoint_arrays(run, model_id):
        arrays.ensure(path, spec)
        _ensure_groups(run, path)


def prepare_scores(run: Run, names: Iterable[str]) -> None:
    """The same for scores of target sets; those of another ensemble are replaced."""
    for path, spec in _score_arrays(run, names):
        arrays.replace(path, spec)
        _ensure_groups(run, path)


def _ensure_groups(run: Run, path: Path) -> None:
    for group in path.parents:
        if group.is_relative_to(run.layout.store):
            arrays.ensure_group(group)


def _checkpoint_arrays(run: Run, model_id: int) -> Iterator[tuple[Path, ArraySpec]]:
    plan, layout = run.plan, run.layout
    for split in (plan.train, *plan.targets):
        group = layout.grads(plan, model_id, split.name)
        for name, spec in _grads_specs(plan, split).items():
            yield group / name, spec
    yield layout.gram(plan, model_id), _square(plan)
    kernel = layout.kernel(plan, model_id)
    yield kernel / "kernel", _square(plan)
    for split in plan.targets:
        yield kernel / "precond" / split.name, _preconditioned(plan, split)


def _grads_specs(plan: Plan, split: Split) -> dict[str, ArraySpec]:
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


def _square(plan: Plan) -> ArraySpec:
    k = plan.proj_dim
    chunk = max(1, min(k, CHUNK_BYTES // (8 * k)))
    return ArraySpec(shape=(k, k), chunks=(chunk, k), dtype="float64")


def _preconditioned(plan: Plan, split: Split) -> ArraySpec:
    shape = (plan.proj_dim, split.rows)
    chunk = max(1, min(shape[0], CHUNK_BYTES // (8 * split.rows)))
    return ArraySpec(shape=shape, chunks=(chunk, split.rows), dtype=plan.precondition_dtype)


def _margins(plan: Plan, split: Split) -> ArraySpec:
    shape = (plan.ground_truth.subsets, split.rows)
    return ArraySpec(shape=shape, chunks=(1, split.rows), dtype="float32")


def _score_arrays(run: Run, names: Iterable[str]) -> Iterator[tuple[Path, ArraySpec]]:
    """`scores` (n_train, targets); `halves` (n_train, 2, some targets); both cut alike."""
    plan, layout = run.plan, run.layout
    for name in names:
        yield layout.scores(name), _scores(plan, name, plan.score_columns(name))
        if shown := plan.halves(name):
            yield layout.halves(name), _scores(plan, name, 2, len(shown))


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
