"""Which problems may be executed: those that this user planned, or trusted with `trust=true`.

Looking at a run directory runs nothing of it. Executing a run does: it imports the file that the
plan names, as this user. So a run that somebody else planned asks once. The answer is stored in the
user's state directory, one small file for each problem.
"""

from __future__ import annotations

import json
import os
import pwd
import sys
from collections.abc import Mapping
from dataclasses import replace
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from trak_dist import building, commands, in_process
from trak_dist import source as sources
from trak_dist.errors import UnreadableProblem, UntrustedProblem
from trak_dist.plan import Plan, digest
from trak_dist.plan_inputs import Source
from trak_dist.store import atomic

# of a run whose rows are streamed or imported: nothing is built from it
WITHOUT_PROBLEM = [
    {"_target_": f"trak_dist.{name}"} for name in ("TRAKer", "import_trak", "import_bergson")
]


def is_planned_here(spec: Mapping[str, Any], plan: Plan) -> bool:
    """Whether `spec`, composed from the user's command line alone, is the plan's problem here."""
    here = str(Path.cwd()) == plan.source.import_root
    return here and digest(spec) == digest(dict(plan.spec.problem))


def record_trust(spec: Mapping[str, Any], import_root: str) -> str:
    """Record that this user trusts the problem; returns why that failed, if it did."""
    if is_always_trusted(spec):
        return ""
    file = find(building.code(spec), import_root)
    record = {"problem": dict(spec), "import_root": import_root, "file": str(file)}
    content = _digest(file)
    try:
        path = _record(spec, import_root, content)
        if not path.exists():
            atomic.write(path, json.dumps(record, indent=1).encode())
    except (OSError, RuntimeError) as error:  # no home, or not a writable one
        why = " ".join(str(error).split())
        return (
            f"that you planned {spec['_target_']} can't be recorded: commands that do not name it "
            f"will ask for trust=true; XDG_STATE_HOME=… a directory of yours helps ({why})"
        )
    return ""


def check_trusted(plan: Plan, run_dir: Path) -> None:
    """Called before anything that a plan names is imported.

    Raises
    ------
    UntrustedProblem
        If this user has neither planned nor accepted the problem as it is now.
    ProblemError
        If the user has, and the file was edited since.
    """
    spec, source = plan.spec.problem, plan.source
    if is_always_trusted(spec):
        return
    file = find(building.code(spec), source.import_root)
    now = _digest(file)
    if _is_recorded(spec, source, now):
        return
    if any(_is_recorded(spec, source, then) for then in (source.file, *source.accepted)):
        sources.check_unchanged(spec, source, replace(source, file=now))
    origin = f"{file} of {_owner(file)}, digest {now}" if file else "there is no file of it here"
    command = commands.launch(run_dir, "stage=plan", "trust=true")
    raise UntrustedProblem(
        f"resuming this run executes {building.code(spec)} as you, a problem that you have not "
        f"planned: {origin}, imported from {source.import_root}",
        where=f"{run_dir} of {_owner(run_dir)}",
        next=f"read the file and what it imports; if you trust them: {command} (recorded until the "
        "file changes). stage=status, stage=verify and open_run execute none of it",
    )


def is_always_trusted(spec: Mapping[str, Any]) -> bool:
    """Whether a problem is shipped with the package, or is not executed at all."""
    if spec["_target_"] == in_process.TARGET or dict(spec) in WITHOUT_PROBLEM:
        return True
    return building.is_shipped(building.code(spec))


def find(target: str, import_root: str) -> Path | None:
    """The file of the function that `target` names, found as `import` does but running none of it.

    None if there is none: a package that makes its modules while it is imported has none.
    """
    module = target.rpartition(".")[0]
    loaded = getattr(sys.modules.get(module), "__file__", None)
    if loaded:
        return Path(loaded)
    first, *names = module.split(".")
    paths = sys.path if import_root in sys.path else [import_root, *sys.path]
    try:
        spec = PathFinder.find_spec(first, paths)
        if spec is None:  # packages that are installed to be edited have finders of their own
            spec = next((s for f in sys.meta_path if (s := f.find_spec(first, None))), None)
        for name in names:  # without its parents' names, by which Python would look for them loaded
            inside = spec.submodule_search_locations if spec else None
            spec = PathFinder.find_spec(name, list(inside)) if inside else None
    except (ImportError, ValueError):  # of names that are none
        return None
    return Path(spec.origin) if spec and spec.has_location and spec.origin else None


def _is_recorded(spec: Mapping[str, Any], source: Source, file: str) -> bool:
    try:
        return _record(spec, source.import_root, file).exists()
    except (OSError, RuntimeError):  # no home directory, or not readable: nothing was recorded
        return False


def _record(spec: Mapping[str, Any], import_root: str, file: str) -> Path:
    """The file that records the user's trust in a problem, its arguments and its import root."""
    state = Path(os.environ.get("XDG_STATE_HOME", ""))
    if not state.is_absolute():  # as its specification says
        state = Path.home() / ".local" / "state"
    name = digest([dict(spec), import_root, file])
    return state / "trak_dist" / "planned" / f"{name}.json"


def _digest(file: Path | None) -> str:
    try:
        return sources.file_digest(file) if file else ""
    except OSError as error:
        raise UnreadableProblem(
            f"the problem's file can't be read: {error.strerror}",
            where=str(file),
            next="see that it is there and that you may read it",
            errno=error.errno,
        ) from None


def _owner(path: Path) -> str:
    try:
        uid = path.stat().st_uid
        return pwd.getpwuid(uid).pw_name
    except OSError:
        return "unknown"
    except KeyError:
        return f"user {uid}"
