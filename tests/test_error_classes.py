"""The tree of errors: each is the builtin that a caller expects, says all, and travels whole."""

from __future__ import annotations

import copy
import errno
import os
import pickle
from pathlib import Path

import pytest

from trak_dist import errors
from trak_dist.errors import StoreError, TrakDistError
from trak_dist.store import atomic
from trak_dist.store.run import Run

BUILTINS: dict[str, set[type[Exception]]] = {
    "ConfigError": {ValueError},
    "PlanMismatch": {ValueError},
    "ProblemError": {ValueError},
    "UnreadableProblem": {ValueError, OSError},
    "UntrustedProblem": {ValueError},
    "DatasetError": {ValueError},
    "UnreadableRow": {RuntimeError},
    "CheckpointError": {ValueError},
    "UnreadableCheckpoint": {ValueError, OSError},
    "CheckpointNotFound": {ValueError, FileNotFoundError},
    "NonFiniteGradient": {FloatingPointError},
    "NotCovered": {NotImplementedError},
    "WrongGradient": {ArithmeticError},
    "NonFiniteGram": {FloatingPointError},
    "NonFiniteScore": {FloatingPointError},
    "SingularGram": {ArithmeticError},
    "ModelIDException": {LookupError},
    "CellsFailed": {RuntimeError},
    "MemoryRefused": {MemoryError},
    "StoreError": {OSError},
    "RunNotFound": {FileNotFoundError},
    "ArrayNotFound": {FileNotFoundError},
    "CorruptChunk": {ValueError},
    "MissingInputs": {LookupError},
    "EvaluationError": {ValueError},
    "UnreadableGroundTruth": {ValueError, OSError},
    "GroundTruthNotFound": {ValueError, FileNotFoundError},
    "InterchangeError": {ValueError},
    "UnreadableInterchange": {ValueError, OSError},
    "InterchangeNotFound": {ValueError, FileNotFoundError},
    "MixedRun": {ValueError},
    "DeviceError": {RuntimeError},
    "SlurmError": {OSError},
    "SlurmTimeout": {TimeoutError},
    "SlurmRefused": {OSError},
    "SlurmNotFound": {FileNotFoundError},
    "QueueFull": {OSError},
    "WorkerLost": {RuntimeError},
}


def tree(root: type[TrakDistError] = TrakDistError) -> dict[str, type[TrakDistError]]:
    found = {one.__name__: one for one in root.__subclasses__()}
    return found | {n: k for one in found.values() for n, k in tree(one).items()}


def nearest(kind: type[TrakDistError]) -> set[type]:
    """The builtins that it is, without those that these are."""
    found = {k for k in kind.__mro__ if k.__module__ == "builtins"} - {object, BaseException}
    return {k for k in found if not any(k in other.__mro__ for other in found - {k})}


def test_each_error_is_the_builtin_that_a_caller_expects() -> None:
    assert {name: nearest(kind) for name, kind in tree().items()} == BUILTINS
    defined = {n for n, k in vars(errors).items() if isinstance(k, type) and n != "partial"}
    assert defined == {*BUILTINS, "TrakDistError"}


@pytest.mark.parametrize("kind", tree().values())
def test_an_error_travels_whole(kind: type[TrakDistError]) -> None:
    error = kind("what", where="where", next="next", errno=errno.EIO)
    text = "what\n  where: where\n  next:  next"
    for found in (error, pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(found) is kind
        assert str(found) == text
        assert (found.what, found.where, found.next) == ("what", "where", "next")
        assert found.errno == errno.EIO
    assert kind("what").errno is None


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EIO])
def test_a_full_disk_is_an_oserror_with_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=os.strerror(code)) as raised:
        atomic.write(tmp_path / "file", b"content")
    assert isinstance(raised.value, StoreError)
    assert not isinstance(raised.value, ValueError)
    assert raised.value.errno == code


def test_a_refusal_is_reported_once(tmp_path: Path) -> None:
    refused = StoreError("no disk space", errno=errno.ENOSPC)
    for wrapped in (atomic.write_errors, atomic.read_errors):
        with pytest.raises(StoreError) as raised, wrapped(tmp_path):
            raise refused
        assert raised.value is refused


def test_a_run_that_is_not_there_is_a_file_that_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no run here"):
        Run.open(tmp_path / "run")
