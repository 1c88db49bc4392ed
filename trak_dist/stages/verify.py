"""verify: re-read all that done cells wrote, and hold it against their receipts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from trak_dist.cells import STAGE_CELLS, Cell, EvaluateCell, ReportCell, TrainCell
from trak_dist.errors import CheckpointError, StoreError
from trak_dist.stages.checkpoints import content_digest
from trak_dist.stages.state_dicts import read
from trak_dist.store import contents
from trak_dist.store.receipts import Receipt
from trak_dist.store.run import Run


def damaged_cells(run: Run) -> Iterator[tuple[Cell, list[str]]]:
    """Each done cell whose bytes are missing or not what its receipt says, with the reasons."""
    for stage in STAGE_CELLS:
        for cell, receipt in run.receipts.done(run.plan.cells(stage)).items():
            try:
                reasons = list(_damages(run, cell, receipt))
            except (StoreError, CheckpointError) as error:
                reasons = [error.what]
            if reasons:
                yield cell, reasons


def _damages(run: Run, cell: Cell, receipt: Receipt) -> Iterator[str]:
    if isinstance(cell, TrainCell):
        path = run.layout.checkpoint(run.layout.trained_checkpoint(cell.subset, cell.seed))
        found = content_digest(read(path))
        if found != receipt.digests.get("checkpoint"):
            written = receipt.digests.get("checkpoint")
            yield f"checkpoint: digest {found}, the receipt says {written}"
    elif isinstance(cell, EvaluateCell):
        path = run.layout.evaluation(cell.targets)
        found = hashlib.sha256(path.read_bytes()).hexdigest()[:32] if path.exists() else "none"
        if found != receipt.digests.get("figures"):
            yield f"figures: digest {found}, the receipt says {receipt.digests.get('figures')}"
    elif isinstance(cell, ReportCell):
        page = run.layout.report(cell.targets)
        pictures = [
            page.parent / f"{page.stem}{name}.png" for name in receipt.fact("pictures", list)
        ]
        for path in (page, *pictures):
            if not path.exists():
                yield f"report: {path.name} is missing"
    else:
        yield from contents.damages(run, cell, receipt)
