"""Commands to type next, to be pasted: quoted for the shell, and for Hydra's overrides.

The one place that spells them; a message that names a command has it from here.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

LAUNCHER = "python -m trak_dist.launch"
HELP = f"{LAUNCHER} --help"
# What Hydra reads unquoted.
_PLAIN = re.compile(r"[\w/.][\w/.-]*", re.ASCII)


def launch(run_dir: Path, *arguments: str) -> str:
    """The launcher's command on a run, with flags and overrides as Hydra reads them."""
    return " ".join([LAUNCHER, *map(shlex.quote, arguments), on(run_dir)])


def on(run_dir: Path) -> str:
    """The override that names a run directory."""
    text = str(run_dir)
    if not re.match(r"/|\w[^/]*/", text):  # else a number, `null`, `???` or a home directory
        text = str(run_dir.absolute())
    return shlex.quote(f"run_dir={hydra_value(text)}")


def hydra_value(text: str) -> str:
    """`text` as the value of an override, in quotes where Hydra needs them."""
    if _PLAIN.fullmatch(text):
        return text
    literal = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)  # no interpolation
    quoted = re.sub(r"(\\*)'", r"\1\1\\'", literal)
    return "'" + re.sub(r"(\\+)\Z", r"\1\1", quoted) + "'"
