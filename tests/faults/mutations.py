"""Seeded mutations of bytes, of JSON and of command lines, and what came of them."""

from __future__ import annotations

import contextlib
import json
import random
import re
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trak_dist import plan_file
from trak_dist.errors import PlanMismatch, TrakDistError
from trak_dist.plan import digest

SECONDS = 30  # more is a hang
ODD: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2**31, 2**63, 10**40, -(10**400), 0.5, 1e308, float("nan")),
    *("", "x", "../../x", "/etc/passwd", "a\nb", "\0", "train", "9" * 50, "\u2028", "x" * 5000),
    *([], {}, [[]], {"": ""}, [None], ["../x"], {"a": {"b": [1]}}, float("inf")),
)
Json = Any


def mutated_bytes(draw: random.Random, whole: bytes) -> bytes:
    """One bit flipped, a piece cut out, doubled, or overwritten, or the end cut off."""
    content = bytearray(whole)
    at, length = draw.randrange(len(content)), draw.randrange(1, 20)
    match draw.randrange(6):
        case 0 | 1:
            content[at] ^= 1 << draw.randrange(8)
        case 2:
            del content[at:]
        case 3:
            del content[at : at + length]
        case 4:
            content[at:at] = content[at : at + length]
        case 5:
            content[at : at + length] = draw.randbytes(length)
    return bytes(content)


def mutated_json(draw: random.Random, content: Json) -> Json:
    """One node replaced, taken out, renamed, doubled, nested or exchanged for another."""
    content = json.loads(json.dumps(content))
    nodes = list(_nodes(content))
    inner, key = draw.choice(nodes)
    match draw.randrange(7):
        case 0 | 1 | 2:
            inner[key] = draw.choice(ODD)
        case 3:
            del inner[key]
        case 4 if isinstance(inner, dict):
            inner[draw.choice(["", "../x", "a\nb", f"{key}_", key.upper()])] = inner.pop(key)
        case 5:
            for _ in range(draw.choice([1, 50, 400])):
                inner[key] = draw.choice([[inner[key]], {"a": inner[key]}])
        case _:
            other, name = draw.choice(nodes)
            inner[key] = json.loads(json.dumps(other[name]))
    return content


def _nodes(value: Json) -> Iterator[tuple[Json, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield value, key
        if isinstance(inner, dict | list):
            yield from _nodes(inner)


def mutated_text(draw: random.Random, whole: bytes, seal: Callable[[Json], Json]) -> bytes:
    """Of JSON: its bytes, its nodes, or its nodes with digests that are right again."""
    kind = draw.randrange(4)
    if kind == 0:
        return mutated_bytes(draw, whole)
    with contextlib.suppress(RecursionError):
        content = mutated_json(draw, json.loads(whole))
        return json.dumps(seal(content) if kind > 1 else content).encode()
    return b"[" * 10**5


def sealed(content: Json) -> Json:
    """A record of a cell with the digest of what it holds now."""
    if isinstance(content, dict):
        content.pop("digest", None)
        content["digest"] = digest(content)
    return content


def sealed_plan(content: Json) -> Json:
    """A plan with digest and fingerprint of what it holds now, as far as it is a plan."""
    sealed(content)
    try:
        plan_file.load(json.dumps(content).encode(), where="")
    except PlanMismatch as error:
        if found := re.search(r"reads (\w{32}) from it", error.what):
            content["fingerprint"] = found[1]
            sealed(content)
    return content


def mutated_line(draw: random.Random, arguments: list[str]) -> list[str]:
    """A command line with an argument changed, taken out, doubled, or another beside them."""
    arguments = list(arguments)
    at = draw.randrange(len(arguments))
    key, _, value = arguments[at].partition("=")
    odd = (
        *("0", "[0,0]", "null", "{}", "{a: b}", "${x}", "${run_dir}", "???", "", "'", "[", "a,b"),
        *("1e999", "9" * 400, "../../x", "'a\nb'", "-1", "true", "range(3)", "glob(*)", "nan"),
    )
    match draw.randrange(7):
        case 0 | 1:
            arguments[at] = f"{key}={draw.choice(odd)}"
        case 2:
            arguments[at] = draw.choice("+~") + draw.choice([key, arguments[at]])
        case 3:
            arguments.append(f"{key}{draw.choice(['.x', '/x', '@x', '[0]', ' '])}={value}")
        case 4:
            arguments.append(
                draw.choice(["-m", "~problem", "~reduce", "reduce=3", "-x", "hydra=0"])
            )
        case 5:
            text = mutated_bytes(draw, arguments[at].encode())
            arguments[at] = text.decode(errors="surrogateescape")
        case 6:
            del arguments[at]
    return arguments


class Mutations:
    """Counts of what came of each kind of mutation; a defect names its seed."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter[str]] = {}
        self.defects: list[str] = []

    def check(self, kind: str, seed: int, look: Callable[[], str], within: Path) -> None:
        """Do `look`, which tells `correct` or raises; nothing beside the run may change."""
        before = _beside(within)
        signal.signal(signal.SIGALRM, _too_long)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            outcome = look()
        except TrakDistError:
            outcome = "told"
        except Exception as error:
            outcome = "hang" if isinstance(error, TimeoutError) else "raw"
            self.defects.append(f"{kind} {seed}: {type(error).__name__}: {error!s:.300}")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if outcome == "wrong":
            self.defects.append(f"{kind} {seed}: other scores, no word")
        if _beside(within) != before:
            outcome = "outside"
            self.defects.append(f"{kind} {seed}: it wrote beside the run directory")
        self.counts.setdefault(kind, Counter())[outcome] += 1

    def table(self) -> str:
        """Kinds by outcomes."""
        heads = ("correct", "told", "wrong", "raw", "hang", "outside")
        lines = [f"{'mutations of':<16}" + "".join(f"{head:>9}" for head in heads)]
        lines += [
            f"{kind:<16}" + "".join(f"{counts[head]:>9}" for head in heads)
            for kind, counts in self.counts.items()
        ]
        return "\n".join(lines)


def _too_long(*_: object) -> None:
    raise TimeoutError(f"no answer in {SECONDS} s")


def _beside(run_dir: Path) -> list[tuple[str, int]]:
    """What lies beside the run directory, and changed when."""
    return sorted(
        (str(path), path.stat().st_mtime_ns)
        for path in run_dir.parent.rglob("*")
        if path.is_file() and not path.is_relative_to(run_dir)
    )
