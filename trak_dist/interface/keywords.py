"""From the arguments of a Python call to an `Invocation`; the command line's is by Hydra."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from trak_dist import in_process
from trak_dist.configuration.config import Config, Spec
from trak_dist.errors import ConfigError, ProblemError
from trak_dist.interface import options
from trak_dist.interface.invocation import MISSING, Invocation
from trak_dist.problem import Problem

ProblemLike = str | Mapping[str, Any] | Problem | Callable[..., Problem]


def invocation(settings: Mapping[str, Any]) -> Invocation:
    """What a call asks for.

    Parameters
    ----------
    settings : mapping
        Settings as they are nested in the configuration, or by dotted keys, or both. `problem`,
        `projection` and `cluster` may be the name of an option; `problem` an import path too.

    Raises
    ------
    ConfigError
        If a section is no mapping, an option is unknown, or a value can't be kept in a plan.
    """
    chosen = {group: settings[group] for group in options.IDENTITY if _is_name(settings, group)}
    named = _nested({key: value for key, value in settings.items() if key not in chosen})
    mapping = _defaults()
    for group, name in {"cluster": _cluster_kind(named), **chosen}.items():
        mapping[group] = _option(group, name)
    for name, value in named.items():
        section = mapping.get(name)
        if isinstance(section, dict) and not isinstance(value, dict):
            raise ConfigError(
                f"{name}: {value!r} is not a section of settings",
                where=name,
                next=f"{name}={{'NAME': value}}, or the dotted key '{name}.NAME'",
            )
        mapping[name] = _joined(section, value)
    keys = {options.IDENTITY[group] for group in chosen} | set(_keys(named))
    if "store_dim" not in keys:
        mapping["store_dim"] = mapping["proj_dim"]
    return Invocation.of(mapping, keys)


def problem_setting(problem: ProblemLike) -> tuple[str | Mapping[str, Any], Problem | None]:
    """What the configuration holds of a problem; and the object, where no path leads to it.

    Raises
    ------
    ProblemError
        If it is no problem, or a function that returns none.
    """
    if isinstance(problem, str | Mapping):
        return problem, None
    if isinstance(problem, Problem):
        return {"_target_": in_process.TARGET}, problem
    function, arguments = problem, {}
    if isinstance(problem, functools.partial) and not problem.args:
        function, arguments = problem.func, problem.keywords
    if path := _import_path(function):
        return {"_target_": path, **arguments}, None
    made = problem() if callable(problem) else problem
    if not isinstance(made, Problem):
        raise ProblemError(
            f"a problem can't be {type(made).__name__}",
            where="problem",
            next="problem='module:function', a function, or a trak_dist.Problem",
        )
    return {"_target_": in_process.TARGET}, made


def _import_path(function: object) -> str:
    """The path by which another process imports a function; empty if there is none."""
    module = getattr(function, "__module__", None) or "__main__"
    name = getattr(function, "__qualname__", "")
    found = getattr(sys.modules.get(module), name, None)
    return f"{module}.{name}" if found is function and module != "__main__" else ""


def _is_name(settings: Mapping[str, Any], group: str) -> bool:
    return isinstance(settings.get(group), str)


def _cluster_kind(named: Mapping[str, Any]) -> str:
    """The option whose settings are the defaults of the section `cluster`."""
    section = named.get("cluster")
    kind = section.get("kind", "local") if isinstance(section, dict) else "local"
    if not isinstance(kind, str):
        raise ConfigError(
            f"cluster.kind: {kind!r} is not the name of an option",
            where="cluster",
            next=f"one of {', '.join(options.names('cluster'))}",
        )
    return kind


def _option(group: str, name: str) -> dict[str, Any]:
    if group == "problem" and ("." in name or ":" in name):
        return {"_target_": name.replace(":", ".")}
    return options.read(group, name)


def _defaults() -> dict[str, Any]:
    spec = Spec(problem={"_target_": MISSING})
    settings = asdict(Config(spec=spec, run_dir=MISSING))
    return {**settings.pop("spec"), **settings}


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as sections; values as JSON has them."""
    nested: dict[str, Any] = {}
    for key, value in settings.items():
        first, *inner = key.split(".")
        plain = _plain(key, value)
        for name in reversed(inner):
            plain = {name: plain}
        nested[first] = _joined(nested.get(first), plain)
    return nested


def _joined(existing: Any, value: Any) -> Any:
    """`value` over what is there, section by section."""
    if not (isinstance(existing, dict) and isinstance(value, dict)):
        return value
    return {
        **existing,
        **{name: _joined(existing.get(name), inner) for name, inner in value.items()},
    }


def _keys(nested: Mapping[str, Any]) -> list[str]:
    """The dotted keys, two names at most."""
    return [
        f"{name}.{inner}" if inner else name
        for name, value in nested.items()
        for inner in (value if isinstance(value, dict) else ("",))
    ]


def _plain(key: str, value: Any) -> Any:
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Integral):  # numpy's too
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(f"{key}.{name}", inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(key, inner) for inner in value]
    raise ConfigError(
        f"{key}: {type(value).__name__} can't be kept in a plan",
        where=key,
        next="numbers, strings, paths, lists and mappings can",
    )
