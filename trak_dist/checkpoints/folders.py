"""Folders that a training wrote, as the checkpoints in them, in the order of their steps.

What Hugging Face's `Trainer` writes to `output_dir`, and Lightning's `ModelCheckpoint` to its
folder. A path that is a checkpoint itself stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from trak_dist.checkpoints.state_dicts import FILES
from trak_dist.errors import CheckpointError, UnreadableCheckpoint
from trak_dist.listing import first_few

_OF_TRAINER = re.compile(r"checkpoint-(\d+)")
_OF_LIGHTNING = re.compile(r"(?:.*[-_])?step=(\d+)\b.*\.ckpt")
_COPY_OF_LATEST = re.compile(r"last(-v\d+)?\.ckpt")


def expanded(paths: Iterable[Path], notify: Callable[[str], None]) -> list[Path]:
    """The checkpoints that `paths` name; `notify` gets what a folder holds and is left out.

    Raises
    ------
    CheckpointError
        If a file of Lightning's does not say its step.
    UnreadableCheckpoint
        If a folder can't be listed.
    """
    return [found for path in paths for found in _within(path, notify)]


def _within(path: Path, notify: Callable[[str], None]) -> Sequence[Path]:
    try:
        inside = list(path.iterdir()) if path.is_dir() else []
    except OSError as error:
        raise UnreadableCheckpoint(
            f"not readable: {error.strerror or error}",
            where=str(path),
            next="check permissions and the file system, then run it again",
            errno=error.errno,
        ) from error
    steps = {p: int(m[1]) for p in inside if (m := _OF_TRAINER.fullmatch(p.name)) and p.is_dir()}
    of_trainer = sorted(steps, key=lambda p: (steps[p], p.name))
    if any(p.name in FILES for p in inside):
        if of_trainer:
            names = first_few([p.name for p in of_trainer])
            notify(
                f"checkpoints: {path} has weights itself and is taken as one checkpoint; {names} "
                "in it are not: name them one by one to use them"
            )
        return [path]
    return of_trainer or _of_lightning(path, inside, notify) or [path]


def _of_lightning(path: Path, inside: list[Path], notify: Callable[[str], None]) -> list[Path]:
    files = sorted(p for p in inside if p.suffix == ".ckpt")
    steps = {p: int(m[1]) for p in files if (m := _OF_LIGHTNING.fullmatch(p.name))}
    copies = [p for p in files if steps and _COPY_OF_LATEST.fullmatch(p.name)]
    others = [p.name for p in files if p not in steps and p not in copies]
    if others and len(files) > 1:
        raise CheckpointError(
            f"which step {first_few(others)} is of can't be told from its name",
            where=str(path),
            next="list the files in the order of their steps; or ModelCheckpoint's own names, "
            "'{epoch}-{step}'",
        )
    if copies:
        names = first_few([p.name for p in copies])
        notify(f"checkpoints: {names} in {path} is left out, a copy of the latest")
    return sorted(steps, key=lambda p: (steps[p], p.name)) or files
