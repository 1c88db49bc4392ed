"""An invocation: what one command, or one call, asks for, merged with a run's plan once. Pure.

A setting that the user did not name comes from the run's plan or, without a run, from the defaults.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trak_dist.configuration.config import UNLIMITED, Config, Spec
from trak_dist.configuration.dotted import differences, flatten
from trak_dist.configuration.field_checks import control_character
from trak_dist.configuration.validation import config_from_mapping
from trak_dist.errors import ConfigError
from trak_dist.plan import Plan

MISSING = "???"  # a default that says: to be named by the user
_SPEC_KEYS = frozenset(Spec.__dataclass_fields__)


@dataclass(frozen=True)
class Invocation:
    """Settings by key, `reduce.lambda_reg` for instance; one of a problem's is `problem.NAME`.

    Parameters
    ----------
    explicit : mapping of str
        What the user named.
    composed : mapping of str
        All settings as they are without a plan: those, and what the configuration's files and the
        options that were chosen say.
    """

    explicit: Mapping[str, Any]
    composed: Mapping[str, Any]

    @classmethod
    def of(cls, mapping: Mapping[str, Any], named: Collection[str]) -> Invocation:
        """From a nested mapping of all settings, and the dotted keys of those that were named.

        A key also names what is within it, and the problem's argument that it is within.
        """
        composed = dict(_settings(mapping))
        explicit = {
            key: value
            for key, value in composed.items()
            if value != MISSING and any(_overlap(key, name) for name in named)
        }
        return cls(explicit, composed)

    def with_explicit(self, key: str, value: Any) -> Invocation:
        """The same, as if the user had named `key` too."""
        return replace(self, explicit={**self.explicit, key: value})

    def names(self, key: str) -> bool:
        """Whether the user named a setting."""
        return key in self.explicit

    def names_in(self, section: str) -> list[str]:
        """The names in a section of settings that the user named."""
        before = f"{section}."
        return [key.removeprefix(before) for key in self.explicit if key.startswith(before)]

    def values(self, plan: Plan | None) -> dict[str, Any]:
        """All settings by key: those named, else the plan's, else the defaults."""
        if plan is None:
            return {**self.composed, **self.explicit}
        defaults = {k: v for k, v in self.composed.items() if not _is_frozen(k)}
        return {**defaults, **dict(_settings(plan.settings)), **self.explicit}

    @property
    def problem(self) -> Mapping[str, Any]:
        """The problem that the user and the defaults say, without any plan."""
        problem: Mapping[str, Any] = _nested(self.values(None)).get("problem", {})
        return problem

    @property
    def run_dir(self) -> Path:
        """The run directory as an absolute path.

        Raises
        ------
        ConfigError
            If it can't be one.
        """
        return run_dir(self.values(None).get("run_dir"))

    def from_plan(self, plan: Plan) -> list[str]:
        """As `key=value`, what the plan says otherwise than the defaults do."""
        found = differences(plan.settings, _nested(self.values(None)))
        return [
            f"{key}={old}"
            for key, (old, _) in found.items()
            if old not in (None, UNLIMITED)
            and not any(_overlap(key, name) for name in self.explicit)
        ]

    def merged(self, plan: Plan | None) -> Config:
        """The configuration of a run with this plan, or of a new one.

        Raises
        ------
        ConfigError
            Naming every setting that is still to be named, or every bad field.
        """
        nested = _nested({**self.values(plan), "run_dir": str(self.run_dir)})
        missing = [key for key, value in flatten(nested).items() if value == MISSING]
        if missing:
            raise ConfigError(
                f"not given: {', '.join(missing)}",
                where="the settings",
                next=" ".join(f"{key}=…" for key in missing),
            )
        return config_from_mapping(nested)


def run_dir(value: object) -> Path:
    """A run directory as an absolute path.

    Raises
    ------
    ConfigError
        If it can't be one.
    """
    requirement = ""
    text = str(value) if isinstance(value, str | Path) else ""
    if not text:
        requirement = "it must be a path"
    elif "%" in text:
        requirement = "a path without '%', which submitit and Slurm replace by a job's number"
    elif control := control_character(text):
        requirement = (
            f"a path without the control character {control!r}, which may be a command's end"
        )
    try:
        found = Path("" if requirement else text).expanduser().absolute()
    except RuntimeError as error:
        requirement = str(error)
    if requirement:
        raise ConfigError(
            f"run_dir {value!r} is not usable: {requirement}",
            where="run_dir",
            next="run_dir=runs/…",
        )
    return found


def _settings(mapping: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Settings by key: one or two names, so that a problem's arguments stay as they are."""
    for name, value in mapping.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}.{inner}", of_inner) for inner, of_inner in value.items())
        else:
            yield name, value


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in values.items():
        section, _, name = key.partition(".")
        if name:
            nested.setdefault(section, {})[name] = value
        else:
            nested[section] = value
    return nested


def _is_frozen(key: str) -> bool:
    """Whether a setting is the plan's, where there is one."""
    return key.partition(".")[0] in _SPEC_KEYS


def _overlap(key: str, other: str) -> bool:
    return key == other or key.startswith(f"{other}.") or other.startswith(f"{key}.")
