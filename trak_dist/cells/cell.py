"""What every kind of cell says of itself. Pure: no torch, no I/O.

A kind is a frozen dataclass whose fields are its coordinates, in a module of its own in this
package, where `catalogue` finds it. The graph, the store, the worker, Slurm jobs and `verify` ask
it, and keep no table of kinds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Hashable, Iterator, Mapping
from dataclasses import fields
from itertools import groupby
from typing import ClassVar, Literal, Self

from trak_dist.cells.ownership import OwnedFile, OwnedRows
from trak_dist.cells.series import Listed, Series
from trak_dist.coordinates import Rows
from trak_dist.hashing import digest_of
from trak_dist.plan import Plan

# Rows through the model; multiplications in float64; rows of a set to train on; pages.
WorkUnit = Literal["rows", "products", "train_rows", "pages"]


class Cell(ABC):
    """The unit of work, ownership and recovery.

    Attributes
    ----------
    kind : str
        Its kind's name: the first part of its id, and a directory of receipts.
    step : str
        The step of the job graph (`catalogue.STEPS`) whose tasks run it.
    depends_on : tuple of kinds
        The kinds of cells that `dependencies` names.
    run : str
        `module:function`, called with the worker's session and the cell, returning a `CellResult`.
        Imported when a cell of the kind runs.
    gpu : bool
        Whether it computes on the device that is asked for; others get no GPU from Slurm.
    runs_problem : bool
        Whether it executes the user's code, which has to be trusted then.
    memory_is_bound : bool
        Whether `memory` is an upper bound. An estimate is asked of Slurm, and refuses nothing.
    threads_from : str
        The section of settings that says how many threads torch may use: they set how sums round.
    if_too_large : str
        What to set so that its memory is less.
    if_too_long : str
        What to set so that it takes less time; empty if nothing does.
    work_unit : str
        What `work` counts: kinds that count the same take their time from one rate.
    """

    kind: ClassVar[str]
    step: ClassVar[str]
    depends_on: ClassVar[tuple[type[Cell], ...]]
    run: ClassVar[str]
    gpu: ClassVar[bool]
    runs_problem: ClassVar[bool]
    memory_is_bound: ClassVar[bool]
    threads_from: ClassVar[Literal["featurize", "reduce"]]
    if_too_large: ClassVar[str]
    if_too_long: ClassVar[str]
    work_unit: ClassVar[WorkUnit]

    @property
    def id(self) -> str:
        """The cell's name, for instance `featurize/3/train/0-512`.

        It names the cell in logs, receipts, job arguments and errors.
        """
        coordinates = (str(getattr(self, f.name)) for f in fields(self))  # type: ignore[arg-type]
        return "/".join([self.kind, *coordinates])

    # Which there are ------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def of(cls, plan: Plan) -> Iterator[Self]:
        """The cells of this kind, in order."""

    @classmethod
    @abstractmethod
    def count(cls, plan: Plan) -> int:
        """How many there are, without listing them."""

    @classmethod
    def series(cls, plan: Plan) -> Iterator[Series[Cell]]:
        """The same cells in the same order: neighbours whose receipts lie in one directory.

        A kind with a `shard` makes them of blocks, without an object for each cell.
        """
        for _, cells in groupby(cls.of(plan), lambda c: (c.per_member, c.receipt_group(plan))):
            yield Listed(tuple(cells))

    # What makes one done --------------------------------------------------------------------

    @abstractmethod
    def identity(self, plan: Plan) -> str:
        """Digest of what determines its bytes, apart from its coordinates; see `cached_on_plan`."""

    def key(self, plan: Plan) -> str:
        """Hash of everything that determines its bytes; a receipt with this key makes it done."""
        return digest_of(f"{self.identity(plan)}|{self.id}".encode())

    @abstractmethod
    def receipt_group(self, plan: Plan) -> tuple[str, ...]:
        """The directories of its receipt, below `receipts/<kind>`.

        Runs of a sweep for which they are the same share it, unless it is `per_member`.
        """

    @property
    @abstractmethod
    def per_member(self) -> bool:
        """Whether each member of a sweep has its own, which no other can use."""

    # The job graph --------------------------------------------------------------------------

    @abstractmethod
    def needs(self, plan: Plan, done: Collection[Cell]) -> Iterator[Cell | Series[Cell]]:
        """The cells whose outputs it reads, done or not; of many that are alike, their series.

        Dependencies of a dependency may be left out until that one is done.
        """

    def dependencies(self, plan: Plan, done: Collection[Cell]) -> Iterator[Cell]:
        """The same, cell by cell."""
        for needed in self.needs(plan, done):
            yield from needed if isinstance(needed, Series) else (needed,)

    def checkpoint(self, plan: Plan) -> int | None:
        """The number of the one checkpoint that it is of; None if there is no such one."""
        model_id = getattr(self, "model_id", None)
        return None if model_id is None else plan.train_seed(model_id)

    @property
    def dependency_group(self) -> Hashable:
        """Cells of one step with equal values have the same dependencies in earlier steps."""
        return self.chain

    @property
    def chain(self) -> Hashable:
        """Cells of one step with equal values form one task, unless they have a shard."""
        return self

    @property
    def chain_order(self) -> int:
        """Its place in its chain; cells with equal places stay in the plan's order."""
        return 0

    @property
    def shard(self) -> tuple[Hashable, Rows] | None:
        """What it has which rows of, if a task is a number of neighbouring cells."""
        return None

    # What it writes -------------------------------------------------------------------------

    def arrays(self, plan: Plan) -> Mapping[str, OwnedRows]:
        """The rows of arrays that it owns, by name; whole chunks."""
        return {}

    @classmethod
    def one_per_array(cls, plan: Plan) -> Iterator[Self]:
        """One cell for each array of the kind."""
        yield from ()

    def files(self) -> Mapping[str, OwnedFile]:
        """The files that it owns, by the name that their digest has in the receipt."""
        return {}

    @classmethod
    def disk_bytes(cls, plan: Plan) -> int:
        """Bytes of what all cells of this kind write, uncompressed."""
        owned = (rows for cell in cls.one_per_array(plan) for rows in cell.arrays(plan).values())
        return sum(rows.spec.nbytes for rows in owned)

    # What it needs to run -------------------------------------------------------------------

    @abstractmethod
    def work(self, plan: Plan) -> int:
        """How much of its `work_unit` it does, by which its time is estimated."""

    @classmethod
    @abstractmethod
    def memory(cls, plan: Plan) -> int:
        """Bytes that the largest cell of this kind holds at once, apart from the interpreter."""

    @classmethod
    def threads(cls, plan: Plan) -> int:
        """Threads that torch may use."""
        section = plan.spec.featurize if cls.threads_from == "featurize" else plan.spec.reduce
        return section.threads
