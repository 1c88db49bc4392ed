"""Digests as they are stored, the first 32 hexadecimal digits of a SHA-256; what they are of."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Protocol

DIGITS = 32


class Hash(Protocol):
    """What `hashlib` gives."""

    def hexdigest(self) -> str:
        """All digits."""
        ...


def digest_of(content: bytes | memoryview) -> str:
    """The digest of some bytes."""
    return truncated(hashlib.sha256(content))


def canonical(value: Any) -> bytes:
    """The one JSON text of a value, independent of the order of its keys."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def truncated(sha: Hash) -> str:
    """The truncated digest of a SHA-256 object."""
    return sha.hexdigest()[:DIGITS]
