"""The files of a Hugging Face model's directory, and of what its training wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trak_dist import decoding
from trak_dist.errors import CheckpointError


def config_file(model: str) -> Path:
    """The config.json of a directory, or the file itself."""
    path = Path(model).expanduser()
    return path / "config.json" if path.is_dir() else path


def files_named(name: str, checkpoints: Sequence[str]) -> list[Path]:
    """Files of a name in checkpoints, or in what `Trainer` wrote below them."""
    paths = [Path(c).expanduser() for c in checkpoints]
    return [f for p in paths for at in ("", "checkpoint-*/") for f in sorted(p.glob(at + name))]


def read_json(file: Path) -> Mapping[str, Any]:
    """A file of one JSON object.

    Raises
    ------
    CheckpointError
        If it is none.
    """
    try:
        return decoding.mapping(file.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"not readable as JSON: {error}", where=str(file), next="save the checkpoint anew"
        ) from None
