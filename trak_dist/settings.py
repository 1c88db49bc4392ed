"""From command-line overrides to a `Config`: Hydra's composition, and the plan's say in it.

The only module but `launch` that imports hydra.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trak_dist.config import Spec, flatten, nearest
from trak_dist.errors import ConfigError, PlanMismatch
from trak_dist.plan import REDUCE_KEYS, differences

PACKAGE = Path(__file__).parent
CONF = next(p for p in (PACKAGE / "conf", PACKAGE.parent / "conf") if p.is_dir())

# What choosing an option of a group says about the spec; the rest of the group are defaults.
_GROUP_IDENTITY = {"problem": "problem._target_", "projection": "projection.kind"}
_SPEC_KEYS = frozenset(Spec.__dataclass_fields__)
_MISSING = "???"


def complete_overrides(overrides: Sequence[str], cwd: Path) -> list[str]:
    """The user's overrides, and what follows from them.

    A problem named by `problem._target_` alone is `problem=custom`, so that the default problem's
    settings do not leak into it; a directory `conf` where the user is adds to ours.
    """
    completed = list(overrides)
    keys = {_key(o) for o in overrides if not o.startswith("-")}
    if "problem._target_" in keys and "problem" not in keys:
        completed.append("problem=custom")
    own = cwd / "conf"
    if own.is_dir() and own.resolve() != CONF.resolve() and "hydra.searchpath" not in keys:
        quoted = str(own).replace("\\", "\\\\").replace("'", "\\'")
        completed.append(f"hydra.searchpath=['file://{quoted}']")
    return completed


def check_overrides(overrides: Sequence[str]) -> None:
    """Compose once, so that what Hydra would refuse is told in our words.

    Raises
    ------
    ConfigError
        Naming every unknown key with the nearest valid one, or the bad group.
    """
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            groups = [o for o in overrides if "." not in _key(o) and (CONF / _key(o)).is_dir()]
            groups += [o for o in overrides if _key(o) == "hydra.searchpath"]
            known = compose(config_name="config", overrides=groups)
            _refuse_unknown(overrides, known)
            compose(config_name="config", overrides=list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        text = str(error).splitlines()
        raise ConfigError(
            "the configuration can't be composed: " + " ".join(line.strip() for line in text),
            where="the command line",
            next="python -m trak_dist.launch --help shows groups, options and defaults",
        ) from None


def given_keys(overrides: Sequence[str]) -> frozenset[str]:
    """The dotted spec keys that the command line gives."""
    keys = (_key(o) for o in overrides if not o.startswith("-"))
    return frozenset(_GROUP_IDENTITY.get(k, k) for k in keys)


def to_mapping(config: DictConfig) -> dict[str, Any]:
    """What Hydra composed as plain containers, interpolations resolved."""
    mapping = OmegaConf.to_container(config, resolve=True)
    assert isinstance(mapping, dict)
    return {str(k): v for k, v in mapping.items()}


def merge_with_plan(
    mapping: Mapping[str, Any], planned: Mapping[str, Any], given: frozenset[str]
) -> tuple[dict[str, Any], list[str]]:
    """`mapping` with the plan's spec wherever the command line does not give a key.

    Also, as `key=value`, what the plan says otherwise than the defaults do.
    """
    composed = flatten({k: mapping[k] for k in _SPEC_KEYS})
    ours = {
        k: v
        for k, v in composed.items()
        if v != _MISSING and any(k == g or k.startswith(f"{g}.") for g in given)
    }
    kept = [
        f"{k}={old}"
        for k, (old, new) in differences(planned, composed).items()
        if k not in ours and old is not None and old != new
    ]
    merged: dict[str, Any] = {}
    for key, value in {**flatten(planned), **ours}.items():
        *sections, name = key.split(".")
        section = merged
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = value
    return {**mapping, **merged}, kept


def refuse_missing(mapping: Mapping[str, Any]) -> None:
    """Raise `ConfigError` naming each setting that is still to be given."""
    missing = [k for k, v in flatten(mapping).items() if v == _MISSING]
    if missing:
        raise ConfigError(
            f"not given: {', '.join(missing)}",
            where="the command line",
            next=" ".join(f"{key}=…" for key in missing),
        )


def refuse_other_spec(planned: Mapping[str, Any], wanted: Mapping[str, Any], *, where: str) -> bool:
    """Whether `wanted` differs from `planned`, but only in what reduce may change.

    Raises
    ------
    PlanMismatch
        Naming each differing field with both values, if it differs in anything else.
    """
    found = differences(planned, wanted)
    if all(key.startswith(REDUCE_KEYS) for key in found):
        return bool(found)
    listed = "\n".join(
        f"  {k}: {old!r} in the plan, {new!r} now" for k, (old, new) in found.items()
    )
    raise PlanMismatch(
        f"the run directory belongs to another spec:\n{listed}",
        where=where,
        next="leave these settings out to go on with this run, or use another run_dir",
    )


def _refuse_unknown(overrides: Sequence[str], known: DictConfig) -> None:
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
            bad.append(f"  {key}: unknown; {nearest(key, near)}")
    if bad:
        raise ConfigError(
            "\n".join(["unknown keys:", *bad]),
            where="the command line",
            next="+key=value adds an argument to a problem of your own",
        )


def _key(override: str) -> str:
    try:
        return OverridesParser.create().parse_override(override).key_or_group
    except HydraException as error:
        raise ConfigError(
            f"{override!r} is not of the form key=value: {str(error).splitlines()[0]}",
            where="the command line",
            next="quote the value: 'key=\"value\"'",
        ) from None
