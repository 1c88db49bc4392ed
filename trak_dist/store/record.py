"""What is recorded of a cell, and its text: a receipt, or why the last attempt failed."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from trak_dist import decoding
from trak_dist.configuration.structuring import structure, unstructure
from trak_dist.errors import CorruptChunk
from trak_dist.hashing import canonical, digest_of
from trak_dist.plan import digest
from trak_dist.store import atomic

Fact = TypeVar("Fact")
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What one cell did.

    `digests` are those of what it wrote, by array name; `facts` are compared between cells that
    belong together; `job` says who did it, where, when and how fast.
    """

    cell: str
    key: str
    fingerprint: str
    digests: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    job: Mapping[str, Any] = field(default_factory=dict)

    def fact(self, name: str, kind: type[Fact] | tuple[type[Fact], ...]) -> Fact:
        """One of the facts.

        Raises
        ------
        CorruptChunk
            If it is not there, or not of that kind.
        """
        found = self.facts.get(name)
        if not isinstance(found, kind):
            raise CorruptChunk(
                f"the receipt's {name} is {found!r}",
                where=self.cell,
                next="remove the cell's receipt, then the same command again",
            )
        return found


@dataclass(frozen=True, kw_only=True)
class Failure:
    """The last failed attempt of a cell; `expected` errors need no traceback to be understood.

    `error_class` is the name of the error's class; empty in records of earlier versions. `doubted`
    ones are not attempts: the cell is done, but its inputs have changed since.
    """

    cell: str
    key: str
    error: str
    traceback: str
    expected: bool
    job: Mapping[str, Any] = field(default_factory=dict)
    doubted: bool = False
    error_class: str = ""


_FORM = {
    **dict.fromkeys(("cell", "key", "fingerprint", "digest"), str),
    **dict.fromkeys(("digests", "facts", "job"), dict),
}
_DIGEST = b',"digest":"'
Kind = TypeVar("Kind", Receipt, Failure)


def dump(value: Receipt | Failure) -> bytes:
    """Its text, with a digest of it at the end."""
    text = canonical(json.loads(json.dumps(unstructure(value))))
    return text[:-1] + _DIGEST + digest_of(text).encode() + b'"}'


def _is_whole(text: bytes) -> bool:
    """Whether it is a text of `dump`, as it was written."""
    content, _, end = text.rpartition(_DIGEST)
    return end == digest_of(content + b"}").encode() + b'"}'


def read_fields(path: Path) -> Mapping[str, Any] | None:
    """The fields of the receipt at `path`, as `read` gives them, in less time."""
    try:
        text = atomic.read(path)
    except FileNotFoundError:
        return None
    if _is_whole(text):
        fields: dict[str, Any] = json.loads(text.decode())
        if {name: type(value) for name, value in fields.items()} == _FORM:
            return fields
    receipt = read(path, Receipt)
    return None if receipt is None else vars(receipt)


def read(path: Path, kind: type[Kind]) -> Kind | None:
    """What is at `path`; None if there is nothing, or nothing whole."""
    try:
        return parsed(atomic.read(path), kind)
    except FileNotFoundError:
        return None
    except ValueError as error:
        # Receipts are published atomically, so the file is damaged: its cell counts as missing and
        # runs again.
        log.warning("unreadable, counted as missing: %s (%s)", path, " ".join(str(error).split()))
        return None


def parsed(text: bytes, kind: type[Kind]) -> Kind:
    """What a text says; a `ValueError` if it is not as it was written.

    Of a receipt of an earlier version, which has no digest, only the form is checked.
    """
    raw = decoding.mapping(text)
    recorded = raw.pop("digest", None)
    if recorded not in (None, digest(raw)):
        raise ValueError("its content is not what was written")
    return structure(kind, raw, "it is no record of a cell:")
