"""The kinds of cells, each in a module of its own."""

from trak_dist.cells.catalogue import (
    KINDS,
    STAGE_STEPS,
    STEPS,
    count,
    of_run,
    of_stage,
    of_step,
    parse_cell,
    runs_problem,
)
from trak_dist.cells.cell import Cell
from trak_dist.cells.counterfactual import CounterfactualCell
from trak_dist.cells.evaluate import EvaluateCell
from trak_dist.cells.featurize import FeaturizeCell
from trak_dist.cells.fisher import FisherCell
from trak_dist.cells.gram import GramCell
from trak_dist.cells.gram_part import GramPartCell
from trak_dist.cells.kernel import KernelCell
from trak_dist.cells.margins import MarginsCell
from trak_dist.cells.precondition import PreconditionCell
from trak_dist.cells.report import ReportCell
from trak_dist.cells.score import ScoreCell
from trak_dist.cells.top import TopCell, scored_by
from trak_dist.cells.top_part import TopPartCell
from trak_dist.cells.train import TrainCell

__all__ = [
    "KINDS",
    "STAGE_STEPS",
    "STEPS",
    "Cell",
    "CounterfactualCell",
    "EvaluateCell",
    "FeaturizeCell",
    "FisherCell",
    "GramCell",
    "GramPartCell",
    "KernelCell",
    "MarginsCell",
    "PreconditionCell",
    "ReportCell",
    "ScoreCell",
    "TopCell",
    "TopPartCell",
    "TrainCell",
    "count",
    "of_run",
    "of_stage",
    "of_step",
    "parse_cell",
    "runs_problem",
    "scored_by",
]
