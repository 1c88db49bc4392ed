"""Progress, read in arrays, says what the receipts say one by one, whatever became of the files."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from test_receipts import CELL, CELLS, FEATURIZE, PLAN, failure, receipt

from trak_dist.cells import Cell, FeaturizeCell, KernelCell, of_run
from trak_dist.plan import digest
from trak_dist.store.layout import Layout
from trak_dist.store.progress import read_progress, with_failure
from trak_dist.store.receipts import Receipts
from trak_dist.store.record import Receipt, dump

AUDIT = {"audited_rows": 2, "audited_batches": 1, "slower_batches": 1}


def said(cell: Cell, seconds: float = 2.0) -> Receipt:
    rows = len(cell.rows) if isinstance(cell, FeaturizeCell) else None
    return replace(receipt(cell), facts={"rows": rows}, job={"seconds": seconds})


class Histories(RuleBasedStateMachine):
    """Any order of attempts, repairs, consolidations and damages."""

    cells = st.sampled_from([*FEATURIZE[:4], KernelCell(0)])  # few, so that events meet

    def __init__(self) -> None:
        super().__init__()
        logging.disable(logging.WARNING)
        self.layout = Layout(Path(tempfile.mkdtemp()))
        self.receipts = Receipts(self.layout, PLAN)

    def teardown(self) -> None:
        logging.disable(logging.NOTSET)
        shutil.rmtree(self.layout.run_dir)

    @rule(cell=cells, seconds=st.floats(1, 9))
    def publish(self, cell: Cell, seconds: float) -> None:
        self.receipts.publish(cell, said(cell, seconds))

    @rule(cell=cells)
    def publish_of_an_old_plan(self, cell: Cell) -> None:
        self.receipts.publish(cell, replace(said(cell), key="old"))

    @rule(cell=cells, digested=st.booleans())
    def publish_by_an_earlier_version(self, cell: Cell, digested: bool) -> None:
        path, fields = self.layout.receipt(PLAN, cell), asdict(said(cell))
        path.parent.mkdir(parents=True, exist_ok=True)
        written = {**fields, "digest": digest(fields)} if digested else fields
        path.write_text(json.dumps(written))

    @rule(cell=cells)
    def revoke(self, cell: Cell) -> None:
        self.receipts.revoke(cell, why="damaged")

    @rule(cell=cells)
    def fail(self, cell: Cell) -> None:
        self.receipts.fail(cell, failure(cell))

    @rule()
    def consolidate(self) -> None:
        self.receipts.consolidate(0)

    @rule(cell=st.sampled_from([*FEATURIZE[:2], None]), at=st.floats(0, 0.999), cut=st.booleans())
    def damage(self, cell: Cell | None, at: float, cut: bool) -> None:
        columns = self.layout.consolidated(PLAN, CELL)
        path = self.layout.receipt(PLAN, cell) if cell else columns
        if path.exists() and (whole := path.read_bytes()):
            place = int(at * len(whole))
            flipped = bytes([whole[place] ^ 1])
            path.write_bytes(whole[:place] + (b"" if cut else flipped + whole[place + 1 :]))

    @invariant()
    def progress_agrees_with_the_receipts(self) -> None:
        done = self.receipts.done(CELLS)
        progress = read_progress(self.layout, PLAN)
        assert [*progress.done] == [cell for cell in of_run(PLAN) if cell in done]
        assert all((cell in progress.done) == (cell in done) for cell in CELLS)
        rates = [r.facts["rows"] / r.job["seconds"] for r in done.values() if r.facts["rows"]]
        assert progress.rows_per_second() == median(rates or [0.0])
        failed = self.receipts.failures(with_failure(self.layout, PLAN))
        assert failed == self.receipts.failures(CELLS)


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=12, stateful_step_count=10, deadline=None)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path)


def test_a_receipt_under_another_cells_name(layout: Layout) -> None:
    receipts, (first, second, *_) = Receipts(layout, PLAN), FEATURIZE
    receipts.publish(first, said(second))
    done = read_progress(layout, PLAN).done
    assert [*done] == [*receipts.done(CELLS)] == [second]


@pytest.mark.parametrize(
    "fields",
    [
        {"cell": [], "key": "k", "facts": {}, "job": {}},
        {"cell": CELL.id, "key": CELL.key(PLAN), "facts": {}, "job": {}},
        {**asdict(receipt(CELL)), "facts": None},
        {**asdict(receipt(CELL)), "of a later version": 1},
    ],
)
def test_a_whole_text_of_another_form_is_no_receipt(
    layout: Layout, fields: dict[str, object]
) -> None:
    path = layout.receipt(PLAN, CELL)
    path.parent.mkdir(parents=True)
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    path.write_text(f'{text[:-1]},"digest":"{digest(fields)}"}}')
    assert not Receipts(layout, PLAN).done([CELL])
    assert not read_progress(layout, PLAN).done


def test_the_text_of_a_receipt_is_read_by_earlier_versions() -> None:
    """They compare the digest with that of the other fields, however they are spelled."""
    fields = json.loads(dump(receipt(CELL)))
    assert fields.pop("digest") == digest(fields)
    assert fields == json.loads(json.dumps(asdict(receipt(CELL))))


@pytest.mark.parametrize("consolidated", [False, True])
def test_audits_of_all_cells_are_summed(layout: Layout, consolidated: bool) -> None:
    receipts = Receipts(layout, PLAN)
    assert read_progress(layout, PLAN).audit_summary() == ""
    for number, cell in enumerate(FEATURIZE[:4]):
        facts = {"rows": 4, **AUDIT, "largest_difference": number * 1e-3}
        receipts.publish(cell, replace(said(cell), facts=facts))
    if consolidated:
        receipts.consolidate(0)
    progress = read_progress(layout, PLAN, [FeaturizeCell])
    assert progress.audit_summary() == (
        "8 rows and 4 batches computed again by autograd, largest difference 3.0e-03, "
        "4 batches computed one by one"
    )
    assert progress.measured[FeaturizeCell].median_seconds == 2.0
