"""What a stage hands to the worker once a cell's bytes are on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """Digests of what was written, and facts for the receipt."""

    digests: Mapping[str, str]
    facts: Mapping[str, Any] = field(default_factory=dict)
