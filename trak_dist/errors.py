"""The errors of trak_dist: one tree, rooted in `TrakDistError`.

An error says what is wrong, where (the cell or the file), and what to do next. Each class is also
the builtin that a caller who knows nothing of trak_dist would catch:

- `ValueError`: the user's input is invalid, or stored data are damaged, as numpy
  and json say it;
- `OSError`, with the `errno` where there is one: the file system or Slurm failed;
  `FileNotFoundError` and `TimeoutError` where it is that;
- `LookupError`: what is asked for is not known, or not computed yet;
- `ArithmeticError`: numbers came out wrong; `FloatingPointError` where they are not finite;
- `NotImplementedError`: a way to compute gradients that does not cover the model;
- `MemoryError`: more memory would be needed than there is;
- `RuntimeError`: code failed while it ran, or a device is missing, as in torch.

Assertions are for our own invariants only.
"""

from __future__ import annotations

from functools import partial


class TrakDistError(Exception):
    """Root of the tree.

    Parameters
    ----------
    what : str
        What is wrong, with both values where two disagree.
    where : str
        The cell, file or key it is about; left out of the message when empty.
    next : str
        What the user can do about it, a command where there is one.
    errno : int, optional
        Of the `OSError` that it comes from.
    """

    def __init__(
        self, what: str, *, where: str = "", next: str = "", errno: int | None = None
    ) -> None:
        lines = [what]
        if where:
            lines.append(f"  where: {where}")
        if next:
            lines.append(f"  next:  {next}")
        super().__init__("\n".join(lines))
        self.what, self.where, self.next, self.errno = what, where, next, errno

    def __str__(self) -> str:  # OSError's own would begin with the number
        return str(self.args[0])

    def __reduce__(self) -> tuple[object, ...]:
        made = partial(type(self), where=self.where, next=self.next, errno=self.errno)
        return made, (self.what,)


class ConfigError(TrakDistError, ValueError):
    """The configuration has unknown, missing or unfit fields."""


class PlanMismatch(TrakDistError, ValueError):
    """The run directory belongs to another spec, or the plan was superseded."""


class ProblemError(TrakDistError, ValueError):
    """The problem can't be built, or its source changed since planning."""


class UnreadableProblem(ProblemError, OSError):
    """The file system refuses to read the problem's file."""


class UntrustedProblem(TrakDistError, ValueError):
    """Somebody else planned the problem, and the user has not trusted it yet."""


class DatasetError(TrakDistError, ValueError):
    """A dataset is empty, or is not the one that was planned."""


class UnreadableRow(TrakDistError, RuntimeError):
    """A row of a dataset can't be read, put into a batch, or shown: the user's code failed."""


class CheckpointError(TrakDistError, ValueError):
    """A checkpoint is no state dict, unfit, or not the one seen before."""


class UnreadableCheckpoint(CheckpointError, OSError):
    """The file system refuses to read a checkpoint."""


class CheckpointNotFound(UnreadableCheckpoint, FileNotFoundError):
    """A checkpoint is missing."""


class NonFiniteGradient(TrakDistError, FloatingPointError):
    """A projected gradient, or a model output, has NaN or infinite entries."""


class NotCovered(TrakDistError, NotImplementedError):
    """Hooks can't give the per-sample gradients of some parameters."""


class WrongGradient(TrakDistError, ArithmeticError):
    """An audit found gradients, or an out-to-loss, that differ from plain autograd."""


class NonFiniteGram(TrakDistError, FloatingPointError):
    """XᵀX has NaN or infinite entries, whatever λ is."""


class NonFiniteScore(TrakDistError, FloatingPointError):
    """A score is NaN or infinite: too large for float32, for instance."""


class SingularGram(TrakDistError, ArithmeticError):
    """XᵀX + λI is singular to working precision; a larger λ helps."""


class ModelIDException(TrakDistError, LookupError):
    """A `model_id` of `TRAKer` is not known, or rows of its checkpoint are missing."""


class CellsFailed(TrakDistError, RuntimeError):
    """Cells that `TRAKer` or an execution ran are not done."""


class MemoryRefused(TrakDistError, MemoryError):
    """A cell would need more memory than a worker has."""


class StoreError(TrakDistError, OSError):
    """The run directory can't be read or written, or holds what is in the way."""


class RunNotFound(StoreError, FileNotFoundError):
    """There is no run in the directory."""


class ArrayNotFound(StoreError, FileNotFoundError):
    """An array of the run is missing."""


class CorruptChunk(TrakDistError, ValueError):
    """What a cell wrote is gone, or is not what was written."""


class MissingInputs(TrakDistError, LookupError):
    """A cell's upstream cells are not done."""


class EvaluationError(TrakDistError, ValueError):
    """The ground truth does not fit the run, or it can't be used."""


class UnreadableGroundTruth(EvaluationError, OSError):
    """The file system refuses to read the ground truth."""


class GroundTruthNotFound(UnreadableGroundTruth, FileNotFoundError):
    """A file of the ground truth is missing."""


class InterchangeError(TrakDistError, ValueError):
    """What another package wrote is unfinished, damaged, or not what it says it is."""


class UnreadableInterchange(InterchangeError, OSError):
    """The file system refuses to read what another package wrote."""


class InterchangeNotFound(UnreadableInterchange, FileNotFoundError):
    """A file of another package is missing."""


class MixedRun(TrakDistError, ValueError):
    """Cells that belong together were made from different inputs."""


class DeviceError(TrakDistError, RuntimeError):
    """The device asked for is not there."""


class SlurmError(TrakDistError, OSError):
    """A Slurm command is missing, failed, or refused a job."""


class SlurmTimeout(SlurmError, TimeoutError):
    """Slurm does not answer."""


class SlurmRefused(SlurmError):
    """Slurm rejected a job, which is certainly not in the queue."""


class SlurmNotFound(SlurmRefused, FileNotFoundError):
    """Slurm's commands are not on this machine."""


class QueueFull(SlurmRefused):
    """A limit on submitted jobs leaves no room."""


class WorkerLost(TrakDistError, RuntimeError):
    """The attempts at a task keep ending silently."""
