"""Nested settings by dotted key: those not at their defaults, and where two mappings differ."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from trak_dist.configuration.config import Spec


def non_default_settings(spec: Spec) -> dict[str, Any]:
    """The dotted settings that are not at their defaults.

    Keys contain only these, so that a new setting of a later version, at its default, keeps earlier
    results valid.
    """
    defaults = flatten(asdict(Spec(problem={})))
    return {k: v for k, v in flatten(asdict(spec)).items() if k not in defaults or v != defaults[k]}


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mapping to dotted keys: `{"a": {"b": 1}}` becomes `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for name, value in mapping.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The dotted keys whose values differ, each with its old and its new value."""
    a, b = (json.loads(json.dumps(flatten(m))) for m in (old, new))
    return {k: (a.get(k), b.get(k)) for k in sorted({*a, *b}) if a.get(k) != b.get(k)}
