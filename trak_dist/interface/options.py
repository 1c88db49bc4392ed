"""The options of the groups `problem`, `projection` and `cluster`: YAML files in `conf/`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trak_dist.configuration.structuring import did_you_mean
from trak_dist.errors import ConfigError

_PACKAGE = Path(__file__).parents[1]
CONF = next(p for p in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if p.is_dir())
# What choosing an option says about the run; the rest of the file are defaults.
IDENTITY = {"problem": "problem._target_", "projection": "projection.kind", "cluster": "cluster"}


def is_group(key: str) -> bool:
    """Whether `key` chooses an option of one of our groups."""
    return key.isidentifier() and (CONF / key).is_dir()


def names(group: str, *searched: Path) -> list[str]:
    """The options of a group, those in the configuration directories `searched` too."""
    return sorted(
        {path.stem for conf in (CONF, *searched) for path in conf.glob(f"{group}/*.yaml")}
    )


def read(group: str, name: str) -> dict[str, Any]:
    """The settings of one option, from a directory `conf` of the current one too.

    Raises
    ------
    ConfigError
        If there is no such option, or it can't be read without the command line.
    """
    from omegaconf import OmegaConf

    own = Path.cwd() / "conf"
    path = next((p for c in (CONF, own) if (p := c / group / f"{name}.yaml").is_file()), None)
    if path is None:
        valid = names(group, own)
        raise ConfigError(
            f"{group}: {name!r} is not the name of an option; {did_you_mean(name, valid)}",
            where=group,
            next=f"one of {', '.join(valid)}",
        )
    try:
        settings = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except Exception as error:  # whatever the parser and its interpolations raise
        raise ConfigError(
            f"the option can't be read: {' '.join(str(error).split())}", where=str(path)
        ) from None
    if not isinstance(settings, dict) or "defaults" in settings:
        raise ConfigError(
            "the option is no plain mapping of settings: only the command line composes it",
            where=str(path),
            next="name its settings in the call",
        )
    return {str(key): value for key, value in settings.items()}
