"""Commands in messages can be pasted, whatever the run directory is called."""

from __future__ import annotations

import ast
import itertools
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from command_result import Ended, Launch

import trak_dist
from trak_dist import commands, open_run, settings, trust
from trak_dist.cells import FeaturizeCell, GramCell, KernelCell
from trak_dist.errors import TrakDistError
from trak_dist.interface import members
from trak_dist.runtime import inputs
from trak_dist.runtime.session import Session
from trak_dist.stages import reduce
from trak_dist.store import contents
from trak_dist.store.run import Run

PACKAGE = Path(trak_dist.__file__).parent


def typed(text: str) -> list[list[str]]:
    """The arguments of each command in `text`, up to the run directory, as a shell reads them."""
    found = []
    for part in text.split(commands.LAUNCHER)[1:]:
        words = shlex.shlex(part, posix=True)
        words.whitespace_split, words.commenters = True, ""
        arguments = []
        for word in words:
            arguments.append(word.rstrip(",:;)"))
            if word.startswith("run_dir="):
                break
        found.append(arguments)
    return found


def hinted(text: str) -> list[str]:
    """The arguments of the one command in `text`, which Hydra reads."""
    (arguments,) = typed(text)
    settings.check_overrides([a for a in arguments if not a.startswith("-")])
    return arguments


class Place:
    """Where the run is, relative to the directory that commands are typed in."""

    def __init__(self, launch: Launch, at: Path) -> None:
        self._launch, self.run_dir = launch, at / "my runs" / "a b"
        self._given = [
            "problem._target_=tiny.problem",
            f"+problem.directory={at / 'checkpoints'}",
            "+problem.rows=20",
            "run_dir='my runs/a b'",
            "cluster=debug",
            "proj_dim=8",
            "targets=val",
        ]

    def __call__(self, *overrides: str) -> Ended:
        return self._launch(*self._given, *overrides)

    def names(self, arguments: list[str], run_dir: Path | None = None) -> bool:
        overrides = [a for a in arguments if not a.startswith("-")]
        return settings.composed_run_dir(overrides) == (run_dir or self.run_dir)


@pytest.fixture
def place(launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    tiny.write_checkpoints(tmp_path / "checkpoints", 2)
    monkeypatch.chdir(tmp_path)
    return Place(launch, tmp_path)


def test_of_commands_that_did_what_they_should(place: Place) -> None:
    ended = place()
    assert ended.code == 0, ended.err
    arguments = hinted(ended.out)
    assert arguments[0] == "stage=status"
    assert place.names(arguments)
    ended = place(*arguments)
    assert ended.code == 0
    assert f"run    {place.run_dir}\n" in ended.out


def test_of_commands_that_are_refused(place: Place) -> None:
    for overrides, expected in (
        (["stage=status"], "problem=mnist"),
        (["stage=reduce"], "stage=featurize"),
        (["stage=reduce", "checkpoints.allow_missing=true"], "stage=featurize"),
    ):
        ended = place(*overrides)
        assert ended.code == 2
        arguments = hinted(ended.err)
        assert arguments[0] == expected
        assert place.names(arguments)


def test_of_members_of_a_sweep(place: Place) -> None:
    assert place().code == 0
    ended = place("proj_dim=4", "-m")
    assert ended.code == 0, ended.err
    (name,) = Run.open(place.run_dir).layout.members()
    member = place.run_dir / "sweeps" / name
    ended = place("proj_dim=4")
    assert ended.code == 2
    (override,) = shlex.split(
        re.findall(r"next:  (.*) is the run with these settings", ended.err)[0]
    )
    assert settings.composed_run_dir([override]) == member
    with pytest.raises(TrakDistError) as raised:
        members.check_not_nested(member)
    assert hinted(raised.value.next)[0] == "-m"
    assert place.names(hinted(raised.value.next))


def flip(path: Path) -> None:
    chunk = next(
        f for f in sorted(path.rglob("*")) if f.is_file() and "c" in f.parts[len(path.parts) :]
    )
    content = bytearray(chunk.read_bytes())
    content[3] ^= 1
    chunk.write_bytes(content)


def test_of_damage(place: Place) -> None:
    assert place().code == 0
    run = Run.open(place.run_dir)
    path = run.layout.store / "scores" / "val"
    flip(path)
    with pytest.raises(TrakDistError) as raised:
        open_run(place.run_dir).scores("val")
    ended = place("stage=verify")
    assert ended.code == 1
    for text in (raised.value.next, ended.out):
        arguments = hinted(text)
        assert arguments[:2] == ["stage=verify", "repair=true"]
        assert place.names(arguments)
    shutil.rmtree(path)
    with pytest.raises(TrakDistError) as raised:
        open_run(place.run_dir).scores("val")
    arguments = hinted(raised.value.next)
    assert arguments[0] == "stage=plan"
    assert place.names(arguments)
    assert place(*arguments).code == 0
    assert path.exists()


def test_of_what_is_not_there(place: Place) -> None:
    assert place("stage=plan").code == 0
    found, run = open_run(place.run_dir), Run.open(place.run_dir)
    for ask in (
        lambda: found.scores("val"),
        lambda: found.evaluation("val"),
        found.self_influence,
        lambda: inputs.require(run, [GramCell(0)], needed_by=KernelCell(0)),
    ):
        with pytest.raises(TrakDistError) as raised:
            ask()
        assert place.names(hinted(raised.value.next))


def test_of_cells_of_other_rows_and_of_a_gram_that_is_not_finite(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert place().code == 0
    run = Run.open(place.run_dir)
    first = next(FeaturizeCell.of(run.plan))
    receipt = run.receipts.done([first])[first]
    run.receipts.publish(first, replace(receipt, facts={"inputs_digest": "another"}))
    with pytest.raises(TrakDistError) as raised:
        inputs.check_same_rows(run, ["train"], needed_by=first)
    assert place.names(hinted(raised.value.next))
    monkeypatch.setattr(contents, "read", lambda *_: torch.full((8, 8), torch.nan).double().numpy())
    with pytest.raises(TrakDistError, match="not finite") as raised:
        reduce.factorise(Session(run, torch.device("cpu")), KernelCell(0))
    assert place.names(hinted(raised.value.next))


def test_of_changed_rows(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    assert place("stage=featurize").code == 0
    run = Run.open(place.run_dir)
    for cell in list(FeaturizeCell.of_split(run.plan, 1, "train")):
        run.receipts.revoke(cell, why="a test")
    other = {"inputs_digest": "another", "batch_digests": "another"}
    monkeypatch.setattr("trak_dist.runtime.reread._read_digests", lambda *_: other)
    ended = place("stage=featurize")
    assert ended.code == 1
    assert "were computed from other rows than the dataset has now" in ended.err
    assert place.names(hinted(ended.err))


def test_of_a_problem_that_is_not_trusted(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    assert place("stage=plan").code == 0
    plan = Run.open(place.run_dir).plan
    monkeypatch.setattr(trust, "_is_recorded", lambda *_: False)
    with pytest.raises(TrakDistError) as raised:
        trust.check_trusted(plan, place.run_dir)
    arguments = hinted(raised.value.next)
    assert arguments[:2] == ["stage=plan", "trust=true"]
    assert place.names(arguments)


# All of them come from one place ---------------------------------------------------------------


def by_hand(path: Path) -> Iterator[str]:
    """Texts in a module that spell a command, but for documentation."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    documented = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if "trak_dist.launch" in node.value and id(node) not in documented:
                yield f"{path}:{node.lineno}: {node.value}"
        elif isinstance(node, ast.JoinedStr):
            for before, after in itertools.pairwise(node.values):
                value = isinstance(before, ast.Constant) and isinstance(after, ast.FormattedValue)
                if value and str(before.value).endswith("run_dir="):
                    yield f"{path}:{node.lineno}: {before.value}"


def test_no_command_is_spelt_by_hand() -> None:
    in_python = {PACKAGE / "in_process.py"}  # calls, no commands of a shell
    modules = {*PACKAGE.rglob("*.py")} - {PACKAGE / "commands.py"} - in_python
    assert not [text for path in sorted(modules) for text in by_hand(path)]
