"""The errors of trak_dist: one tree, rooted in `TrakDistError`.

Whatever a user can cause derives from `ValueError` and says what is wrong, where (the cell or the
file), and what to do next. Assertions are for our own invariants only.
"""

from __future__ import annotations


class TrakDistError(ValueError):
    """Root of the tree.

    Parameters
    ----------
    what : str
        What is wrong, with both values where two disagree.
    where : str
        The cell, file or key it is about; left out of the message when empty.
    next : str
        What the user can do about it, a command where there is one.
    """

    def __init__(self, what: str, *, where: str = "", next: str = "") -> None:
        self.what, self.where, self.next = what, where, next
        lines = [what]
        if where:
            lines.append(f"  where: {where}")
        if next:
            lines.append(f"  next:  {next}")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.what, self.where, self.next)


def _rebuild(kind: type[TrakDistError], what: str, where: str, next: str) -> TrakDistError:
    return kind(what, where=where, next=next)


class ConfigError(TrakDistError):
    """The configuration has unknown, missing or unfit fields."""


class PlanMismatch(TrakDistError):
    """The run directory belongs to another spec, or the plan was superseded."""


class ProblemError(TrakDistError):
    """The problem can't be built, or its source changed since planning."""


class UntrustedProblem(TrakDistError):
    """The problem's code is somebody else's, and the user has not said that it may be executed."""


class DatasetError(TrakDistError):
    """A dataset is empty, or is not the one that was planned."""


class UnreadableRow(TrakDistError):
    """A row of a dataset can't be read, put into a batch, or shown."""


class CheckpointError(TrakDistError):
    """A checkpoint is missing, unreadable, unfit, or not the one seen before."""


class NonFiniteGradient(TrakDistError):
    """A projected gradient has NaN or infinite entries."""


class NotCovered(TrakDistError):
    """Hooks can't give the per-sample gradients of some parameters."""


class WrongGradient(TrakDistError):
    """An audit found other gradients, or another out-to-loss, than plain autograd gives."""


class SingularGram(TrakDistError):
    """XᵀX + λI is singular to working precision."""


class ModelIDException(TrakDistError):
    """A `model_id` of `TRAKer` is not known, or rows of its checkpoint are missing."""


class CellsFailed(TrakDistError):
    """Cells that `TRAKer` had run did not get done."""


class MemoryRefused(TrakDistError):
    """A cell would need more memory than a worker has."""


class StoreError(TrakDistError):
    """The run directory can't be read or written."""


class CorruptChunk(TrakDistError):
    """What a cell wrote is gone, or is not what was written."""


class MissingInputs(TrakDistError):
    """A cell's upstream cells are not done."""


class EvaluationError(TrakDistError):
    """The ground truth does not fit the run, or nothing can be said from it."""


class MixedRun(TrakDistError):
    """Cells that belong together were made from different inputs."""


class DeviceError(TrakDistError):
    """The device asked for is not there."""


class SlurmError(TrakDistError):
    """A Slurm command is missing, failed, or refused a job."""


class SlurmRefused(SlurmError):
    """Slurm said no to a job, which is surely not in the queue then."""


class QueueFull(SlurmRefused):
    """A limit on submitted jobs leaves no room."""


class WorkerLost(TrakDistError):
    """A task's attempts ended without a word, again and again."""
