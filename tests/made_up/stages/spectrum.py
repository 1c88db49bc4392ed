"""spectrum: the eigenvalues of one checkpoint's XᵀX."""

from __future__ import annotations

import numpy as np
from trak_dist.cells.spectrum import SpectrumCell

from trak_dist.cells.gram import GramCell
from trak_dist.runtime.cell_result import CellResult
from trak_dist.runtime.inputs import require
from trak_dist.runtime.session import Session
from trak_dist.store import contents


def spectrum(session: Session, cell: SpectrumCell) -> CellResult:
    """Write the eigenvalues (k,) float64, ascending.

    Raises
    ------
    MissingInputs
        If the Gram is not done.
    """
    source = GramCell(cell.model_id)
    require(session.run, [source], needed_by=cell)
    gram = np.tril(contents.read(session.run, source, "gram"))  # the upper triangle is not summed
    values = np.linalg.eigvalsh(gram)
    return CellResult(contents.write(session.run, cell, {"spectrum": values}))
