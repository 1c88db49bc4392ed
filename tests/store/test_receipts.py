"""Receipts: done means a receipt with the cell's key, whatever else happened to the files."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import threading
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from trak_dist.cells import Cell, FeaturizeCell, KernelCell, ScoreCell, of_stage
from trak_dist.configuration.config import Spec
from trak_dist.coordinates import Rows
from trak_dist.plan import Plan, digest
from trak_dist.plan_inputs import Checkpoint, ProbedDataset, Source, Split
from trak_dist.store.layout import Layout
from trak_dist.store.receipts import Receipts
from trak_dist.store.record import Failure, Receipt, dump

PLAN = Plan(
    spec=Spec(problem={"_target_": "a.b"}, proj_dim=4, store_dim=4),
    source=Source("s", "m", "/"),
    parameters=10,
    train=Split("train", 10, 4, ProbedDataset("p")),
    checkpoints=(Checkpoint(0, "0.pt", False), Checkpoint(1, "1.pt", False)),
    targets=(Split("val", 3, 4, ProbedDataset("q")),),
)
FEATURIZE = list(of_stage(PLAN, "featurize"))
CELLS: list[Cell] = [*FEATURIZE, *of_stage(PLAN, "reduce"), *of_stage(PLAN, "report")]
CELL = FeaturizeCell(0, "train", Rows(0, 4))


def receipt(cell: Cell, attempt: int = 1) -> Receipt:
    return Receipt(
        cell=cell.id,
        key=cell.key(PLAN),
        fingerprint=PLAN.fingerprint,
        digests={"grads": "d1", "row_scale": "d2"},
        facts={"rows": 4, "projector": "sjlt", "scale": 0.25, "model_ids": [0, 1]},
        job={"attempt": attempt, "host": "n'ö\u2028", "seconds": 1.5, "log": ""},
    )


def failure(cell: Cell, error: str = "no") -> Failure:
    return Failure(
        cell=cell.id,
        key=cell.key(PLAN),
        error=error,
        traceback="",
        expected=True,
        job={"attempt": 1},
    )


@pytest.fixture
def receipts(tmp_path: Path) -> Receipts:
    return Receipts(Layout(tmp_path), PLAN)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path)


def test_a_cell_is_done_only_if_its_receipt_has_its_key(receipts: Receipts) -> None:
    assert receipts.done(CELLS) == {}
    for cell in CELLS:
        receipts.publish(cell, replace(receipt(cell), key="of another plan"))
        assert not bool(receipts.done([cell]))
    assert receipts.done(CELLS) == {}
    for cell in CELLS:
        receipts.publish(cell, receipt(cell))
        assert bool(receipts.done([cell]))
    assert receipts.done(CELLS) == {cell: receipt(cell) for cell in CELLS}


def test_receipts_of_another_seed_count_for_nothing(receipts: Receipts, layout: Layout) -> None:
    receipts.publish(CELL, receipt(CELL))
    projection = replace(PLAN.spec.projection, seed=1)
    other = Receipts(layout, replace(PLAN, spec=replace(PLAN.spec, projection=projection)))
    assert bool(receipts.done([CELL]))
    assert not bool(other.done([CELL]))
    assert other.done(CELLS) == {}


def test_done_tells_only_of_the_cells_that_were_asked_for(receipts: Receipts) -> None:
    for cell in FEATURIZE:
        receipts.publish(cell, receipt(cell))
    assert set(receipts.done([CELL])) == {CELL}


def test_consolidating_keeps_every_receipt_in_one_file(receipts: Receipts, layout: Layout) -> None:
    for cell in CELLS:
        receipts.publish(cell, receipt(cell))
    receipts.consolidate(0)
    assert receipts.done(CELLS) == {cell: receipt(cell) for cell in CELLS}
    assert all(bool(receipts.done([cell])) for cell in CELLS)
    directory = layout.receipts(PLAN, CELL)
    assert [p.name for p in directory.iterdir()] == ["consolidated.npz"]
    assert len(list(layout.receipts(PLAN, FeaturizeCell(1, "train", Rows(0, 4))).iterdir())) == 4


def test_consolidating_again_adds_what_came_since(receipts: Receipts) -> None:
    for cell in FEATURIZE[:2]:
        receipts.publish(cell, receipt(cell))
    receipts.consolidate(0)
    for cell in FEATURIZE[1:3]:
        receipts.publish(cell, receipt(cell, attempt=2))
    receipts.consolidate(0)
    assert {c: r.job["attempt"] for c, r in receipts.done(FEATURIZE).items()} == {
        FEATURIZE[0]: 1,
        FEATURIZE[1]: 2,
        FEATURIZE[2]: 2,
    }


def test_a_revoked_cell_is_missing_though_it_was_consolidated(receipts: Receipts) -> None:
    for cell in FEATURIZE:
        receipts.publish(cell, receipt(cell))
    receipts.consolidate(0)
    receipts.revoke(CELL, why="grads: a flipped bit")
    assert not bool(receipts.done([CELL]))
    assert set(receipts.done(FEATURIZE)) == set(FEATURIZE) - {CELL}
    receipts.consolidate(0)
    assert not bool(receipts.done([CELL]))
    assert set(receipts.done(FEATURIZE)) == set(FEATURIZE) - {CELL}
    receipts.publish(CELL, receipt(CELL, attempt=2))
    receipts.consolidate(0)
    assert receipts.done([CELL]) == {CELL: receipt(CELL, attempt=2)}


def test_what_all_cells_were_shown_is_said_of_those_that_are_consolidated_and_done(
    receipts: Receipts, layout: Layout
) -> None:
    train, val = FEATURIZE[:3], FEATURIZE[3:4]
    shown = {c: replace(receipt(c), facts={"inputs_digest": f"of {c.rows}"}) for c in FEATURIZE}
    for cell in (*train, *val):
        receipts.publish(cell, shown[cell])
    assert receipts.inputs_digest(0, "train") is None
    receipts.consolidate(0)
    assert receipts.inputs_digest(0, "train") == digest(["of 0-4", "of 4-8", "of 8-10"])
    assert receipts.inputs_digest(0, "val") == digest(["of 0-3"])
    assert receipts.inputs_digest(1, "train") is None
    other = Receipts(layout, replace(PLAN, train=replace(PLAN.train, cell_rows=5)))
    assert other.inputs_digest(0, "train") is None
    receipts.revoke(CELL, why="damaged")
    assert receipts.inputs_digest(0, "train") is None
    receipts.consolidate(0)
    assert receipts.inputs_digest(0, "train") is None
    assert receipts.inputs_digest(0, "val") == digest(["of 0-3"])
    receipts.publish(CELL, replace(shown[CELL], facts={"inputs_digest": "other"}))
    assert receipts.inputs_digest(0, "train") is None
    receipts.consolidate(0)
    assert receipts.inputs_digest(0, "train") == digest(["other", "of 4-8", "of 8-10"])


def test_columns_of_an_earlier_version_are_read_and_written_anew(
    receipts: Receipts, layout: Layout
) -> None:
    mine = [c for c in FEATURIZE if c.model_id == 0]
    path = layout.consolidated(PLAN, CELL)
    path.parent.mkdir(parents=True)
    texts = {"cell": [c.id for c in mine], "receipt": [dump(receipt(c)) for c in mine]}
    with path.open("wb") as file:
        np.savez_compressed(file, **{name: np.array(v, dtype=bytes) for name, v in texts.items()})
    assert receipts.done(FEATURIZE) == {c: receipt(c) for c in mine}
    assert receipts.inputs_digest(0, "train") is None
    receipts.consolidate(0)
    assert receipts.done(FEATURIZE) == {c: receipt(c) for c in mine}
    assert receipts.inputs_digest(0, "train")


def test_a_reader_misses_no_receipt_while_they_are_consolidated(receipts: Receipts) -> None:
    mine = [c for c in FEATURIZE if c.model_id == 0]
    counts: list[int] = []
    single: list[bool] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            counts.append(len(receipts.done(mine)))
            single.append(bool(receipts.done([CELL])))

    for cell in mine:
        receipts.publish(cell, receipt(cell))
    reader = threading.Thread(target=read)
    reader.start()
    for attempt in range(2, 30):
        receipts.consolidate(0)
        for cell in mine:
            receipts.publish(cell, receipt(cell, attempt))
    stop.set()
    reader.join()
    assert len(counts) > 5
    assert set(counts) == {len(mine)}
    assert all(single)


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"{",
        b"null",
        b"[1, 2]",
        b"{}",
        b"\xff\xfe\x00",
        b"\x00" * 400,
        b'{"cell": {}, "key": [], "fingerprint": 0}',
        json.dumps({**asdict(receipt(CELL)), "surprise": 1}).encode(),
        json.dumps(asdict(receipt(CELL))).encode()[:-30],
    ],
)
def test_a_receipt_that_is_no_receipt_counts_as_missing(
    receipts: Receipts, layout: Layout, garbage: bytes
) -> None:
    for cell in FEATURIZE:
        receipts.publish(cell, receipt(cell))
    receipts.fail(KernelCell(0), failure(KernelCell(0)))
    layout.receipt(PLAN, CELL).write_bytes(garbage)
    layout.failure(PLAN, KernelCell(1)).write_bytes(garbage)
    assert not bool(receipts.done([CELL]))
    assert set(receipts.done(FEATURIZE)) == set(FEATURIZE) - {CELL}
    assert set(receipts.failures(CELLS)) == {KernelCell(0)}


def test_damage_to_the_consolidated_file_loses_cells_and_raises_nothing(
    receipts: Receipts, layout: Layout, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, logger="trak_dist.store.receipts")
    for cell in FEATURIZE:
        receipts.publish(cell, receipt(cell))
    receipts.consolidate(0)
    file = layout.consolidated(PLAN, CELL)
    whole = file.read_bytes()
    cut = [whole[:n] for n in (0, 1, 4, 30, len(whole) // 2, len(whole) - 1)]
    flips = [
        whole[:i] + bytes([whole[i] ^ bit]) + whole[i + 1 :]
        for i in range(0, len(whole), 11)
        for bit in (1, 128)
    ]
    raised = {}
    for damaged in (*cut, b"\x00" * 100, *flips):
        file.write_bytes(damaged)
        try:
            done = receipts.done(FEATURIZE)
        except Exception as error:
            raised[type(error).__name__] = f"{error}, at length {len(damaged)}"
        else:
            assert all(done[cell] == receipt(cell) for cell in done)
            assert all(cell in done for cell in FEATURIZE if cell.model_id == 1)
    assert raised == {}


def test_a_stale_cell_stays_done_until_it_is_revoked(receipts: Receipts) -> None:
    receipts.publish(CELL, receipt(CELL))
    receipts.fail(KernelCell(0), failure(KernelCell(0)))
    receipts.mark_stale(CELL, "shown other rows")
    assert receipts.stale(CELLS) == {CELL: "shown other rows"}
    assert CELL in receipts.done([CELL])
    receipts.revoke(CELL, why="shown other rows")
    assert receipts.stale(CELLS) == {}
    assert set(receipts.failures(CELLS)) == {KernelCell(0)}
    receipts.mark_stale(CELL, "again")
    receipts.clear_failure(CELL)
    assert receipts.stale(CELLS) == {}


def test_a_failure_is_on_record_until_the_cell_succeeds(receipts: Receipts) -> None:
    cell = ScoreCell("val", Rows(0, 10))
    assert receipts.failures(CELLS) == {}
    receipts.fail(cell, failure(cell, "first"))
    receipts.fail(cell, failure(cell, "second"))
    assert receipts.failures(CELLS) == {cell: failure(cell, "second")}
    assert receipts.failures([KernelCell(0)]) == {}
    receipts.publish(cell, receipt(cell))
    assert receipts.failures(CELLS) == {}


class Sequences(RuleBasedStateMachine):
    """Any order of attempts, repairs and consolidations leaves what a plain dict would."""

    cells = st.sampled_from([*FEATURIZE[:2], KernelCell(0)])  # few, so that events meet

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.receipts = Receipts(Layout(self.directory), PLAN)
        self.done: dict[Cell, Receipt] = {}
        self.failed: dict[Cell, Failure] = {}

    def teardown(self) -> None:
        shutil.rmtree(self.directory)

    @rule(cell=cells, attempt=st.integers(1, 3))
    def publish(self, cell: Cell, attempt: int) -> None:
        self.receipts.publish(cell, receipt(cell, attempt))
        self.done[cell] = receipt(cell, attempt)
        self.failed.pop(cell, None)

    @rule(cell=cells)
    def publish_of_an_old_plan(self, cell: Cell) -> None:
        self.receipts.publish(cell, replace(receipt(cell), key="old"))
        self.done.pop(cell, None)
        self.failed.pop(cell, None)

    @rule(cell=cells)
    def revoke(self, cell: Cell) -> None:
        self.receipts.revoke(cell, why="damaged")
        self.done.pop(cell, None)

    @rule(cell=cells, error=st.text(max_size=5))
    def fail(self, cell: Cell, error: str) -> None:
        self.receipts.fail(cell, failure(cell, error))
        self.failed[cell] = failure(cell, error)

    @rule()
    def consolidate(self) -> None:
        self.receipts.consolidate(0)

    @invariant()
    def receipts_agree_with_the_model(self) -> None:
        assert self.receipts.done(CELLS) == self.done
        assert {c for c in CELLS if bool(self.receipts.done([c]))} == set(self.done)
        assert self.receipts.failures(CELLS) == self.failed


TestSequences = Sequences.TestCase
TestSequences.settings = settings(max_examples=30, stateful_step_count=12, deadline=None)


def test_a_failure_keeps_the_class_of_its_error(receipts: Receipts, layout: Layout) -> None:
    told = replace(failure(CELLS[0]), error_class="SomeErrorOfALaterVersion")
    receipts.fail(CELLS[0], told)
    assert receipts.failure(CELLS[0]) == told


@pytest.mark.parametrize("digested", [True, False])
def test_a_failure_of_an_earlier_version_has_no_class(
    receipts: Receipts, layout: Layout, digested: bool
) -> None:
    earlier = asdict(failure(CELLS[0]))
    del earlier["error_class"]
    content = {**earlier, "digest": digest(earlier)} if digested else earlier
    path = layout.failure(PLAN, CELLS[0])
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(content))
    assert receipts.failure(CELLS[0]) == replace(failure(CELLS[0]), error_class="")
