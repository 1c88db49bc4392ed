"""The plan: its cells, when their keys change, and that its file is taken only as it was."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trak_dist import plan_file
from trak_dist.cells import (
    Cell,
    FeaturizeCell,
    GramCell,
    GramPartCell,
    KernelCell,
    TrainCell,
    of_run,
)
from trak_dist.configuration.config import ReduceConfig, Spec
from trak_dist.configuration.dotted import differences
from trak_dist.coordinates import Rows
from trak_dist.errors import PlanMismatch
from trak_dist.plan import GRAM_PRODUCTS, Plan, digest
from trak_dist.plan_inputs import (
    CHUNK_BYTES,
    Checkpoint,
    ProbedDataset,
    Source,
    Split,
    Streamed,
    cell_rows,
)
from trak_dist.store.layout import Layout

PLAN = Plan(
    spec=Spec(problem={"_target_": "a.b", "rows": 10}, proj_dim=4, store_dim=8),
    source=Source("s", "m", "/root"),
    parameters=100,
    train=Split("train", 10, 4, ProbedDataset("p")),
    checkpoints=(Checkpoint(0, "/c/0.pt", False), Checkpoint(1, "checkpoints/1.st", True)),
    targets=(Split("val", 3, 4, ProbedDataset("q")), Split("test", 9, 4, ProbedDataset("r"))),
)
texts = st.text(min_size=1, max_size=4)
row_sources = st.builds(Streamed) | st.builds(ProbedDataset, texts, st.none() | texts)
names = st.from_regex(r"[a-z0-9_][A-Za-z0-9_.-]{0,20}", fullmatch=True).filter(
    lambda name: name != "train"
)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    def split(name: str) -> Split:
        rows, per_cell = draw(st.integers(1, 40)), draw(st.integers(1, 50))
        return Split(name, rows, per_cell, draw(row_sources))

    dim = draw(st.integers(1, 10**5))
    count, train = draw(st.integers(1, 3)), split("train")
    seeds = 0 if train.streamed else draw(st.integers(0, 3))
    ids = range(0, count * max(1, seeds), max(1, seeds))
    reduce = ReduceConfig(
        curvature=draw(st.sampled_from(["none", "output", "fisher"])),
        fisher_draws=draw(st.integers(1, 3)),
        fisher_rows=draw(st.integers(0, train.rows)),
        kernel_form=draw(st.sampled_from(["auto", "primal", "dual"])),
        gram_rows=draw(st.sampled_from([0, 7, 100])),
    )
    stored = dim * draw(st.integers(1, 3))
    return replace(
        PLAN,
        spec=replace(PLAN.spec, proj_dim=dim, store_dim=stored, reduce=reduce),
        train=train,
        dropout_seeds=seeds,
        checkpoints=tuple(Checkpoint(i, draw(texts), i > 0) for i in ids),
        targets=tuple(split(n) for n in draw(st.lists(names, max_size=3, unique=True))),
    )


def cells(plan: Plan) -> list[Cell]:
    return list(of_run(plan))


def with_spec(section: str, **changes: Any) -> Plan:
    inner = replace(getattr(PLAN.spec, section), **changes)
    return replace(PLAN, spec=replace(PLAN.spec, **{section: inner}))


def with_masks(seeds: int) -> Plan:
    """`PLAN` with models of each checkpoint by dropout masks."""
    first, second = PLAN.checkpoints
    return replace(PLAN, dropout_seeds=seeds, checkpoints=(first, replace(second, model_id=seeds)))


def changed(other: Plan) -> set[str]:
    """The stages of the cells of `PLAN` whose keys differ in `other`; all of one stage, or none."""
    differs: dict[str, set[bool]] = {}
    for cell in set(cells(PLAN)) & set(cells(other)):
        differs.setdefault(cell.kind, set()).add(cell.key(PLAN) != cell.key(other))
    assert all(len(answers) == 1 for answers in differs.values())
    return {stage for stage, answers in differs.items() if True in answers}


EVERYTHING = {c.kind for c in cells(PLAN)}
FROM_FEATURIZE = EVERYTHING - {"train"}
FROM_GRAM = {"gram", "kernel", "precondition", "score", "report"}
FROM_KERNEL = FROM_GRAM - {"gram"}
ENSEMBLE = {"score", "report"}


@given(plans())
def test_the_blocks_of_a_split_partition_its_rows_exactly(plan: Plan) -> None:
    for split in plan.splits:
        blocks = list(split.blocks())
        assert [row for b in blocks for row in range(b.start, b.stop)] == list(range(split.rows))
        assert all(len(b) == split.cell_rows for b in blocks[:-1])
        assert 0 < len(blocks[-1]) <= split.cell_rows


@given(rows=st.integers(1, 10**7), row_bytes=st.integers(1, 10**9), batch=st.integers(1, 4096))
def test_cells_hold_whole_batches_and_chunks_stay_small(
    rows: int, row_bytes: int, batch: int
) -> None:
    chosen = cell_rows(rows, row_bytes=row_bytes, batch_rows=batch)
    assert chosen >= batch
    assert chosen % batch == 0
    assert chosen == batch or chosen * row_bytes <= CHUNK_BYTES


@given(plans())
def test_every_cell_has_its_own_id_key_and_receipt(plan: Plan) -> None:
    all_cells = cells(plan)
    layout = Layout(Path("/run"))
    for name in ("id", "key", "receipt", "failure"):
        of: Callable[[Cell], object] = {
            "id": lambda cell: cell.id,
            "key": lambda cell: cell.key(plan),
            "receipt": lambda cell: layout.receipt(plan, cell),
            "failure": lambda cell: layout.failure(plan, cell),
        }[name]
        assert len({of(cell) for cell in all_cells}) == len(all_cells), name


@given(plans())
def test_every_path_stays_inside_the_run_directory(plan: Plan) -> None:
    layout = Layout(Path("/run"))
    paths = [layout.plan(0), layout.plan(7), layout.store, layout.logs]
    for cell in cells(plan):
        paths += [layout.receipt(plan, cell), layout.failure(plan, cell)]
        paths += [layout.array(cell, owned) for owned in cell.arrays(plan).values()]
        paths += [layout.file(cell, name) for name in cell.files()]
    paths += [layout.checkpoint_digest(model_id) for model_id in plan.model_ids]
    for path in paths:
        assert path.is_relative_to("/run")
        assert ".." not in path.parts


@pytest.mark.parametrize(
    ("other", "stages"),
    [
        (PLAN, set()),
        (with_spec("projection", seed=1), FROM_FEATURIZE),
        (with_spec("projection", kind="gaussian"), FROM_FEATURIZE),
        (with_spec("featurize", dtype="float32"), FROM_FEATURIZE),
        (with_spec("featurize", threads=2), EVERYTHING),
        (with_spec("featurize", batch_rows=4), FROM_FEATURIZE),
        (with_spec("featurize", params=("0.*",)), FROM_FEATURIZE),
        (replace(PLAN, spec=replace(PLAN.spec, problem={"_target_": "a.b"})), EVERYTHING),
        (replace(PLAN, spec=replace(PLAN.spec, store_dim=16)), FROM_FEATURIZE),
        (replace(PLAN, source=Source("other", "m", "/root")), EVERYTHING),
        (replace(PLAN, parameters=101), FROM_FEATURIZE),
        (replace(PLAN, train=replace(PLAN.train, row_source=ProbedDataset("other"))), EVERYTHING),
        (replace(PLAN, source=Source("s", "m", "/elsewhere", ("t",))), set()),
        (replace(PLAN, spec=replace(PLAN.spec, proj_dim=2)), FROM_GRAM),
        (with_spec("reduce", threads=2), FROM_GRAM),
        (with_spec("reduce", lambda_reg=0.5), FROM_KERNEL),
        (with_spec("reduce", lambda_unit="absolute"), FROM_KERNEL),
        (with_spec("reduce", kernel_scale="none"), FROM_KERNEL),
        (replace(PLAN, checkpoints=(*PLAN.checkpoints, Checkpoint(2, "2.pt", False))), ENSEMBLE),
        (replace(PLAN, targets=(*PLAN.targets, Split("more", 5, 4, ProbedDataset("t")))), set()),
        (replace(PLAN, targets=PLAN.targets[::-1]), set()),
        (with_masks(1), FROM_FEATURIZE),
        (with_masks(3), FROM_FEATURIZE),
    ],
)
def test_a_key_changes_exactly_when_what_sets_its_cells_bytes_does(
    other: Plan, stages: set[str]
) -> None:
    assert changed(other) == stages
    assert (other.fingerprint != PLAN.fingerprint) == (stages >= FROM_FEATURIZE)


def test_models_by_masks_share_the_training_of_their_checkpoint() -> None:
    plan = with_masks(3)
    assert plan.model_ids == tuple(range(6))
    first, second = plan.checkpoints
    assert [plan.checkpoint(m) for m in plan.model_ids] == [first] * 3 + [second] * 3
    assert [plan.dropout_seed(m) for m in plan.model_ids] == [0, 1, 2] * 2
    assert PLAN.dropout_seed(1) is None
    trained = TrainCell("full", 1)
    assert list(TrainCell.of(plan)) == [trained]
    for model_id in plan.model_ids:
        for cell in FeaturizeCell.of_split(plan, model_id, "train"):
            assert list(cell.dependencies(plan, ())) == ([trained] if model_id > 2 else [])
    assert trained.key(plan) == trained.key(PLAN)
    assert plan.described_ensemble == "2 checkpoints x 3 dropout masks"
    assert PLAN.described_ensemble == "2 checkpoints"
    some = replace(plan, use=(1, 2, 5))
    assert some.described_ensemble == "3 models of 2 checkpoints x 3 dropout masks"
    moved = replace(plan, checkpoints=(first, replace(second, model_id=4)))
    assert list(moved.inconsistencies()) == [
        "checkpoints: a model_id is no multiple of dropout_seeds 3"
    ]


def test_a_changed_target_set_changes_the_keys_of_its_own_cells_only() -> None:
    other = replace(
        PLAN, targets=(replace(PLAN.targets[0], row_source=ProbedDataset("other")), PLAN.targets[1])
    )
    differing = {c.id for c in cells(PLAN) if c.key(other) != c.key(PLAN)}
    assert differing == {
        *("featurize/0/val/0-3", "featurize/1/val/0-3", "score/val/0-10", "report/val"),
        *("precondition/0/val", "precondition/1/val"),
    }


@given(plans())
def test_a_plan_comes_back_from_its_file(plan: Plan) -> None:
    back = plan_file.load(plan_file.dump(plan).encode(), where="plan.json")
    assert back == plan
    assert [c.key(back) for c in cells(back)] == [c.key(plan) for c in cells(plan)]


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        if isinstance(inner, dict | list):
            yield from leaves(inner, (*path, key))
        else:
            yield (*path, key)


def _other(inner: Any, key: Any) -> None:
    old = inner[key]
    numeric = isinstance(old, int | float) and not isinstance(old, bool)
    inner[key] = (not old) if isinstance(old, bool) else old + 1 if numeric else old + "x"


def _without(inner: Any, key: Any) -> None:
    del inner[key]


@pytest.mark.parametrize("edit", [_other, _without])
def test_a_plan_edited_anywhere_is_refused(edit: Callable[[Any, Any], None]) -> None:
    answers: dict[str, str] = {}
    wheres: set[str] = set()
    for path in leaves(json.loads(plan_file.dump(PLAN))):
        if edit is _without and path[0] == "spec":  # its fields have defaults
            continue
        raw = json.loads(plan_file.dump(PLAN))
        edit(functools.reduce(lambda inner, key: inner[key], path[:-1], raw), path[-1])
        try:
            plan_file.load(json.dumps(raw).encode(), where="/run/plan.json")
        except PlanMismatch as error:
            wheres.add(error.where)
        except Exception as error:
            answers[".".join(map(str, path))] = repr(error)
        else:
            answers[".".join(map(str, path))] = "accepted"
    assert answers == {}
    assert wheres == {"/run/plan.json"}


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", plan_file.dump(PLAN)[:-40]])
def test_a_file_that_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(PlanMismatch, match="the plan can't be read"):
        plan_file.load(text.encode(), where="plan.json")


def test_plans_are_compared_by_dotted_field() -> None:
    old, new = {"a": {"b": 1, "c": (1, 2)}, "d": 0}, {"a": {"b": 2, "c": [1, 2]}, "e": None}
    assert differences(old, new) == {"a.b": (1, 2), "d": (0, None)}
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1})


def test_a_kernel_of_a_large_dimension_needs_memory_for_its_square() -> None:
    primal = ReduceConfig(kernel_form="primal")
    large = replace(PLAN, spec=replace(PLAN.spec, proj_dim=2**14, store_dim=2**14, reduce=primal))
    assert KernelCell.memory(large) >= 4 * 8 * 2**28
    dual = replace(large, spec=replace(large.spec, reduce=ReduceConfig()))
    assert dual.dual
    assert KernelCell.memory(dual) < 2**28
    assert Rows(0, 4) < Rows(4, 8)


@pytest.mark.parametrize("dim", [2048, 4096, 16384])
def test_the_gram_of_ten_million_rows_is_summed_in_parts(dim: int) -> None:
    train = Split("train", 10**7, 2048, ProbedDataset("d"))
    plan = replace(PLAN, spec=replace(PLAN.spec, proj_dim=dim, store_dim=dim), train=train)
    parts = list(GramPartCell.of_checkpoint(plan, 0))
    covered = [row for part in parts for row in part.sources(plan)]
    assert covered == (list(range(train.cells)) if parts else [])
    most = max((len(part.sources(plan)) for part in parts), default=train.cells)
    assert most * train.cell_rows * dim**2 <= 1.1 * GRAM_PRODUCTS
    assert set(GramCell(0).dependencies(plan, ())) >= set(parts)
    earlier = json.loads(plan_file.dump(plan))
    del earlier["spec"]["reduce"]["gram_rows"], earlier["digest"]
    text = json.dumps({**earlier, "digest": digest(earlier)}).encode()
    assert plan_file.load(text, where="").gram_parts == 0


def test_other_settings_cut_cells_only_where_grads_are_others() -> None:
    plan = replace(
        PLAN, spec=replace(PLAN.spec, store_dim=64), train=Split("train", 10**6, 64, Streamed())
    )
    folded = plan.with_settings(replace(plan.spec, proj_dim=2), (1,))
    assert (folded.train, folded.targets) == (plan.train, plan.targets)
    assert folded.fingerprint == plan.fingerprint
    assert folded.reduce_id != plan.reduce_id
    wide = plan.with_settings(replace(plan.spec, store_dim=2**20), ())
    rows = cell_rows(10**6, row_bytes=2 * 2**20, batch_rows=wide.spec.featurize.batch_rows)
    assert wide.train.cell_rows == rows
    assert wide.targets[0].cell_rows == 64


@pytest.mark.parametrize(
    "other",
    [
        {"spec": replace(PLAN.spec, proj_dim=2)},
        {"spec": replace(PLAN.spec, store_dim=16)},
        {"spec": replace(PLAN.spec, reduce=replace(PLAN.spec.reduce, lambda_reg=2.0))},
        {"spec": replace(PLAN.spec, reduce=replace(PLAN.spec.reduce, kernel_scale="none"))},
        {"spec": replace(PLAN.spec, projection=replace(PLAN.spec.projection, seed=1))},
        {"use": (0, 1)},
    ],
)
def test_what_names_a_member_of_a_sweep(other: dict[str, Any]) -> None:
    assert replace(PLAN, **other).reduce_id != PLAN.reduce_id
    grown = replace(PLAN, checkpoints=PLAN.checkpoints[:1], targets=PLAN.targets[:1])
    assert grown.reduce_id == PLAN.reduce_id


def test_curvatures_name_directories_so_only_known_ones_are_taken() -> None:
    for name in ("../elsewhere", "a\0b"):
        (found,) = replace(PLAN, curvatures=(name,)).inconsistencies()
        assert found.startswith("curvatures: ")
    assert not list(replace(PLAN, curvatures=("output", "fisher")).inconsistencies())
