"""From command-line overrides to an `Invocation`, by Hydra's composition.

With `launch` and `sweep` the only modules that import hydra.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trak_dist import commands
from trak_dist.configuration.dotted import flatten
from trak_dist.configuration.structuring import did_you_mean
from trak_dist.configuration.validation import check_sections
from trak_dist.errors import ConfigError, TrakDistError
from trak_dist.interface import invocation, options
from trak_dist.interface.invocation import Invocation
from trak_dist.interface.options import CONF, is_group

# Hydra takes its other defaults from its own package first, these from a user's directory first.
_HYDRA_DEFAULTS = ("hydra/config.yaml", "hydra/launcher/basic.yaml", "hydra/sweeper/basic.yaml")
MULTIRUN = ("-m", "--multirun", "hydra.mode=MULTIRUN")


def complete_overrides(arguments: Sequence[str], cwd: Path) -> list[str]:
    """The user's arguments, completed.

    A problem named by `problem._target_` alone is `problem=custom`, so that the default problem's
    settings do not leak into it; a directory `conf` in the working directory is searched too.

    Raises
    ------
    ConfigError
        If that directory would replace Hydra's own defaults.
    """
    completed = list(arguments)
    keys = {_key(o) for o in overrides_among(arguments)}
    if "problem._target_" in keys and "problem" not in keys:
        completed.append("problem=custom")
    own = cwd / "conf"
    if own.is_dir() and own.resolve() != CONF.resolve() and "hydra.searchpath" not in keys:
        unasked = [name for name in _HYDRA_DEFAULTS if (own / name).exists()]
        if unasked:
            raise ConfigError(
                f"{', '.join(unasked)} would be read although nothing selects it",
                where=str(own),
                next="launch in another directory, or set hydra.searchpath=[] to leave this one "
                "out",
            )
        completed.append(f"hydra.searchpath=[{commands.hydra_value(f'file://{own}')}]")
    # Hydra does not accept -m between overrides.
    return sorted(completed, key=lambda argument: argument not in MULTIRUN)


def overrides_among(arguments: Sequence[str]) -> list[str]:
    """The arguments that are overrides, without Hydra's flags and their values."""
    arguments = [a for a in arguments if a not in MULTIRUN]
    has_flags = any(a.startswith("-") for a in arguments)
    return [a for a in arguments if not a.startswith("-") and not (has_flags and "=" not in a)]


def check_overrides(overrides: Sequence[str]) -> None:
    """Compose once, so that what Hydra rejects becomes an error of this package.

    Raises
    ------
    ConfigError
        Naming every unknown key with the nearest valid one, or the bad group.
    """
    _check_group_options(overrides)
    with _composing():
        try:
            config = _composed(overrides)
        except (HydraException, OmegaConfBaseException):
            groups = [o for o in overrides if is_group(_key(o))]
            groups += [o for o in overrides if _key(o) == "hydra.searchpath"]
            _check_known_keys(overrides, compose(config_name="config", overrides=groups))
            raise
    to_mapping(OmegaConf.masked_copy(config, [str(k) for k in config if k != "hydra"]))


@contextlib.contextmanager
def hydra_errors() -> Iterator[None]:
    """Turn whatever Hydra raises into a `ConfigError`.

    Raises
    ------
    ConfigError
        For whatever is raised within: Hydra, OmegaConf and their parser raise many types for a
        malformed value.
    """
    try:
        yield
    except TrakDistError:
        raise
    except Exception as error:
        what = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, RecursionError):
            what = "it is nested too deeply"
        elif key := getattr(error, "full_key", None):
            what = f"{key}: {str(error).splitlines()[0]}"
        raise ConfigError(
            f"the configuration can't be composed: {what}",
            where="the command line",
            next=f"{commands.HELP} shows groups, options and defaults",
        ) from None


@contextlib.contextmanager
def _composing() -> Iterator[None]:
    with hydra_errors(), initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        yield


def _composed(overrides: Sequence[str]) -> DictConfig:
    """The configuration with Hydra's own, which `${hydra:…}` refers to."""
    config = compose("config", overrides=list(overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    return config


def swept_values(overrides: Sequence[str]) -> dict[str, list[str]]:
    """The overrides of a sweep by key, one for each value; the last of several for a key.

    Raises
    ------
    ConfigError
        If one has no discrete values.
    """
    values: dict[str, list[str]] = {}
    with _composing():
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        for text, override in zip(overrides, parser.parse_overrides([*overrides]), strict=True):
            key = override.get_key_element()
            values[key] = [text]
            if override.is_sweep_override():
                found = override.sweep_string_iterator() if override.is_discrete_sweep() else ()
                values[key] = [f"{key}={value}" for value in found]
            if not values[key]:
                raise ConfigError(
                    f"{text!r} has no discrete values",
                    where="the command line",
                    next=f"{key}=…,… or choice(…), range(…), or for a group glob(*)",
                )
    return values


def composed_run_dir(overrides: Sequence[str]) -> Path:
    """The run directory that Hydra composes."""
    with _composing():
        return invocation.run_dir(OmegaConf.select(_composed(overrides), "run_dir"))


def invoked(config: DictConfig, overrides: Sequence[str]) -> Invocation:
    """What the command line asks for; `config` is what Hydra composed of it.

    Raises
    ------
    ConfigError
        If that is no configuration.
    """
    keys = (_key(override) for override in overrides)
    return Invocation.of(to_mapping(config), {options.IDENTITY.get(key, key) for key in keys})


def to_mapping(config: DictConfig) -> dict[str, Any]:
    """What Hydra composed as plain containers, interpolations resolved.

    Raises
    ------
    ConfigError
        If one can't be, a section is taken out, or is no section.
    """
    with hydra_errors():
        mapping = OmegaConf.to_container(config, resolve=True)
    assert isinstance(mapping, dict)
    named = {str(k): v for k, v in mapping.items()}
    check_sections(named)
    return named


def _check_group_options(overrides: Sequence[str]) -> None:
    """Raise `ConfigError` for an unknown option of a group; Hydra's own message names none."""
    for text in overrides:
        override = _parsed(text)
        group, value = override.key_or_group, override.value()
        if override.is_add() or override.is_delete() or not is_group(group):
            continue
        names = value if isinstance(value, list) and value else [value]
        if not override.is_sweep_override() and not all(isinstance(n, str) and n for n in names):
            valid = ", ".join(options.names(group))
            raise ConfigError(
                f"{group}: {text.partition('=')[2]} is not the name of an option",
                where="the command line",
                next=f"{group}=… one of {valid}",
            )


def _check_known_keys(overrides: Sequence[str], known: DictConfig) -> None:
    plain = OmegaConf.to_container(known, resolve=False)
    assert isinstance(plain, dict)
    mapping = {str(k): v for k, v in plain.items()}
    sections = {k for k, v in mapping.items() if isinstance(v, dict)}
    valid = {*flatten(mapping), *mapping}
    bad = []
    for override in overrides:
        key = _key(override)
        if override[0] in "+~" or key.startswith("hydra.") or "/" in key:
            continue
        if key not in valid:
            section = key.split(".")[0]
            near = (
                {v for v in valid if v.startswith(f"{section}.")} if section in sections else valid
            )
            bad.append(f"  {key}: unknown; {did_you_mean(key, near)}")
    if bad:
        raise ConfigError(
            "\n".join(["unknown keys:", *bad]),
            where="the command line",
            next=f"{commands.HELP} lists the keys"
            + (
                "; +problem.NAME=VALUE is for arguments of your own"
                if any("problem." in b for b in bad)
                else ""
            ),
        )


def _key(override: str) -> str:
    return _parsed(override).key_or_group


def _parsed(override: str) -> Override:
    try:
        parsed = OverridesParser.create().parse_override(override)
        if not parsed.key_or_group:
            raise HydraException("it has no key")
    except (HydraException, RecursionError, ValueError) as error:
        raise ConfigError(
            f"{override!r} is not of the form key=value: {str(error).splitlines()[0]}",
            where="the command line",
            next="key=value, without dashes; a value with special characters in quotes: "
            "key=\"'value'\"",
        ) from None
    return parsed
