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
    """The digest of what a SHA-256 was fed, piece by piece."""
    return sha.hexdigest()[:DIGITS]
