"""Digests of a problem's source files and of how its model prints, checked against the plan.

Whether it builds the same model is checked by `checks.pinned_model`.
"""

from __future__ import annotations

import re
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

from trak_dist.errors import ProblemError
from trak_dist.plan import digest
from trak_dist.plan_inputs import Source

if TYPE_CHECKING:
    import torch

    from trak_dist.ops.model_outputs import ModelOutput

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_INSTALLED = ("site-packages", "dist-packages")
_STANDARD = tuple(Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib"))


def model_digest(model: torch.nn.Module, model_output: ModelOutput) -> str:
    """Digest of a model's layers, of a model output's class and of its settings.

    Its settings are its attributes that are numbers or strings. Addresses in the text are left out.
    """
    settings = {
        name: value
        for name, value in getattr(model_output, "__dict__", {}).items()
        if isinstance(value, bool | int | float | str | None)
    }
    layers = _ADDRESS.sub("", repr(model))
    return digest([layers, type(model_output).__qualname__, repr(sorted(settings.items()))])


def file_digest(path: Path) -> str:
    """Digest of a source file."""
    return digest(path.read_bytes().decode(errors="replace"))


def modules(function: Any, parts: list[Any]) -> dict[str, str]:
    """Digests of the user's own files, by the names of their modules.

    They are those of the problem's function, of the classes of its `parts` (layers, model output,
    datasets, what these hold, collate) and of whatever these modules import, but for what is
    installed: packages, the standard library and trak_dist itself.
    """
    found: dict[str, str] = {}
    seen: set[str] = set()
    first = getattr(function, "__module__", "")  # of a problem that is an object there is none
    waiting = [first, *(name for part in _within(parts) for name in _names(part))]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        module = sys.modules.get(name)
        path = _own_file(module)
        if module and path:
            found[name] = file_digest(path)
            waiting += _imported(module)
    return dict(sorted(found.items()))


def _within(parts: list[Any]) -> Iterator[Any]:
    """The parts, and the objects that are their attributes: the dataset in a `Subset`, say."""
    seen: dict[int, Any] = {}
    waiting = list(parts)
    while waiting:
        part = waiting.pop()
        if id(part) in seen or isinstance(part, type | ModuleType):
            continue
        seen[id(part)] = part
        yield part
        if _own_file(sys.modules.get(type(part).__module__)) or type(part).__module__.startswith(
            "torch.utils.data"
        ):
            waiting += vars(part).values() if hasattr(part, "__dict__") else ()
        if isinstance(part, partial):
            waiting.append(part.func)


def _names(part: Any) -> Iterator[str]:
    if isinstance(part, FunctionType):
        yield part.__module__
    yield from (kind.__module__ for kind in type(part).__mro__)


def _imported(module: ModuleType) -> Iterator[str]:
    for value in list(vars(module).values()):
        if isinstance(value, ModuleType):
            yield value.__name__
        elif isinstance(value, type | FunctionType):
            yield value.__module__


def _own_file(module: ModuleType | None) -> Path | None:
    """The file of a module that is the user's own."""
    file = getattr(module, "__file__", None)
    if module is None or not file or module.__name__.partition(".")[0] in ("trak_dist", "__main__"):
        return None
    path = Path(file)
    if any(part in _INSTALLED for part in path.parts) or any(map(path.is_relative_to, _STANDARD)):
        return None
    return path if path.is_file() else None


def accept_changes(planned: Source, now: Source) -> Source:
    """`planned`, with the current files accepted in addition to those of the plan."""
    known = {planned.file, *planned.modules.values(), *planned.accepted}
    new = [d for d in dict.fromkeys([now.file, *now.modules.values()]) if d not in known]
    joined = {**now.modules, **planned.modules} if planned.modules else {}
    return replace(planned, accepted=(*planned.accepted, *new), modules=joined)


def check_unchanged(spec: Mapping[str, Any], planned: Source, now: Source) -> None:
    """Raise `ProblemError` if the problem's source is not the planned one."""
    if now.model != planned.model:
        raise ProblemError(
            f"the model or the model output of {spec['_target_']} changed since planning",
            where="problem._target_",
            next="restore them, or start a new run with another run_dir",
        )
    difference = ""
    if now.file not in (planned.file, *planned.accepted):
        difference = f"digest {planned.file} then, {now.file} now"
    # A new module was imported by a changed file, or lazily by earlier code.
    for name, then in planned.modules.items():
        found = now.modules.get(name, then)
        if found not in (then, *planned.accepted):
            difference = (
                difference or f"the file of its module {name} has digest {then} then, {found} now"
            )
    if difference:
        raise ProblemError(
            f"the source of {spec['_target_']} changed since planning: {difference}",
            where="problem._target_",
            next="accept_source=true if it computes the same gradients as before (a fixed render, "
            "an added target set); else restore the file, or use another run_dir",
        )
