"""Digests as they are stored: the first 32 hexadecimal digits of a SHA-256."""

from __future__ import annotations

import hashlib
from typing import Protocol

DIGITS = 32


class Hash(Protocol):
    """What `hashlib` gives."""

    def hexdigest(self) -> str:
        """All digits."""
        ...


def digest_of(content: bytes | memoryview) -> str:
    """The digest of some bytes."""
    return truncated(hashlib.sha256(content))


def truncated(sha: Hash) -> str:
    """The truncated digest of a SHA-256 object."""
    return sha.hexdigest()[:DIGITS]
