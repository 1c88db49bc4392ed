"""Random faults against small real runs, and a table of what became of them.

    PYTHONPATH=tests python tests/faults/campaign.py --seed 1 --count 500 [--only CASE]

Each case disturbs one command, or the tasks of one graph, then gives the same command again. It has
to end with the bytes of the undisturbed run in every cell; and what was said on the way has to be
our words: exit code 1 or 2, no traceback.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import commands
import tiny
from commands import HUNG, Listings, Process, below, launched, start, tasked
from fault_injection import OF_FILES, REFUSALS, Fault

from trak_dist import graph
from trak_dist.cells import STEPS
from trak_dist.store.run import Run

TASKS = 2
REFUSED = tuple(REFUSALS)
# What happens, and to whom.
LAUNCHER, WORKER, TASK = "launcher", "worker", "task"
KINDS: tuple[tuple[str, str], ...] = (
    *(("kill", who) for who in (LAUNCHER, WORKER, TASK)),
    *((kind, who) for kind in REFUSED for who in (LAUNCHER, WORKER, TASK)),
    *(("power loss", who) for who in (LAUNCHER, TASK)),
    *(("clock steps", who) for who in (LAUNCHER, WORKER, TASK)),
    *(("stale listing", TASK), ("warned", TASK)),
    ("two launchers", LAUNCHER),
    ("launcher killed, workers go on", LAUNCHER),
)
KILLED = (-signal.SIGKILL, -signal.SIGUSR2)  # by a warning that comes before it is listened to
MISSED, THROUGH, TOLD, DIED = (
    "never met",
    "went through",
    "reported, then fixed",
    "died, then fixed",
)


@dataclass(frozen=True)
class Story:
    """Commands, one after the other, that make a run; the last of them is disturbed."""

    name: str
    commands: tuple[tuple[str, ...], ...]


def stories(checkpoints: Path) -> list[Story]:
    """From nothing, planned, grown by targets, with checkpoints and a ground truth to train."""
    first = (
        "problem._target_=tiny.problem",
        f"+problem.directory={checkpoints}",
        *("+problem.rows=20", "targets=val", "proj_dim=16"),
        *("featurize.batch_rows=4", "featurize.cell_rows=8"),
    )
    trained = (
        "problem._target_=tiny_trained.problem",
        *("checkpoints.train=2", "targets=val", "proj_dim=16", "featurize.batch_rows=4"),
        *("featurize.cell_rows=12", "ground_truth.subsets=8", "ground_truth.seeds=1"),
    )
    return [
        Story("whole", (first,)),
        Story("planned", ((*first, "stage=plan"), ())),
        Story("grown", (first, ("targets=[val,test]", "self_influence=true"))),
        Story("trained", ((*trained, "stage=plan"), ())),
        Story("more subsets", ((*trained,), ("ground_truth.subsets=10",))),
    ]


@dataclass
class Prepared:
    """A story up to its last command, and what it comes to undisturbed."""

    story: Story
    before: Path | None
    expected: Mapping[str, Any]
    counts: Mapping[str, int]


class Campaign:
    """Cases in a directory of their own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.cwd = directory / "elsewhere"
        self.cwd.mkdir()
        os.chdir(self.cwd)
        tiny.write_checkpoints(directory / "checkpoints", 2)
        self.stories = stories(directory / "checkpoints")
        warm = directory / "warm"
        warm.mkdir()
        most = self.stories[-1].commands[0]
        commands.import_what_a_command_needs(lambda: _launch((*most, _at(warm))))
        self._made = {(most,): warm / "run"}
        self._prepared: dict[str, Prepared] = {}

    def prepared(self, story: Story) -> Prepared:
        """The story told once without any fault."""
        if story.name not in self._prepared:
            root = self.directory / f"undisturbed {story.name}"
            root.mkdir()
            before = self._run_of(story.commands[:-1])
            if before:
                shutil.copytree(before, root / "run")
            do = functools.partial(_launch, (*story.commands[-1], _at(root)))
            _succeed(root, lambda: commands.counted(root, do, root / "counts"))
            counts = Counter(json.loads((root / "counts").read_text()))
            expected = self.found(root)
            assert not expected["missing"] and not expected["damaged"], expected
            self._prepared[story.name] = Prepared(story, before, expected, counts)
        return self._prepared[story.name]

    def _run_of(self, given: tuple[tuple[str, ...], ...]) -> Path | None:
        """A run that is as some commands leave it."""
        if given and given not in self._made:
            root = self.directory / f"before {len(self._made)}"
            root.mkdir()
            for arguments in given:
                _succeed(root, functools.partial(_launch, (*arguments, _at(root))))
            self._made[given] = root / "run"
        return self._made.get(given)

    def found(self, root: Path) -> Any:
        """What is in a run, looked at by a process of its own."""
        _succeed(root, lambda: commands.found(root / "run", root / "found"))
        return json.loads((root / "found").read_text())

    def case(self, seed: int, number: int) -> Case:
        """The case that follows from a seed; the kinds take turns."""
        chance = random.Random(f"{seed}-{number}")
        kind, who = KINDS[number % len(KINDS)]
        prepared = self.prepared(chance.choice(self.stories))
        root = self.directory / f"case {seed}-{number}"
        root.mkdir()
        if prepared.before:
            shutil.copytree(prepared.before, root / "run")
        return Case(self, prepared, kind, who, root, chance)


@dataclass
class Case:
    """One fault, at one moment of one story."""

    campaign: Campaign
    prepared: Prepared
    kind: str
    who: str
    root: Path
    chance: random.Random
    said: str = ""

    def run(self) -> str:
        """What became of it, one of `MISSED`, `THROUGH`, `TOLD`, `DIED`.

        Raises
        ------
        AssertionError
            If it came to anything else.
        """
        disturb = {
            "two launchers": self._two,
            "launcher killed, workers go on": self._orphans,
        }.get(
            self.kind,
            {LAUNCHER: self._launcher, WORKER: self._workers, TASK: self._tasks}[self.who],
        )
        codes = disturb()
        self._hold("Traceback" not in self.said, "a traceback")
        self._hold(HUNG not in codes, "hung")
        self._hold(all(code in (0, 1, 2, 85, *KILLED) for code in codes), f"exit codes {codes}")
        if any(code in (1, 2) for code in codes):
            self._hold(
                "error: " in self.said or " ERROR " in self.said or "failed: " in self.said,
                "no word",
            )
        process = start(self._again, self.root / "again")
        code = process.wait()
        self.said += process.said
        self._hold(code == 0, f"the same command again: exit code {code}")
        self._hold("Traceback" not in process.said, "a traceback, again")
        found = self.campaign.found(self.root)
        self._hold(not found["missing"], f"missing: {found['missing']}")
        self._hold(not found["damaged"], f"damaged: {found['damaged']}")
        self._hold(found["done"] == self.prepared.expected["done"], "other bytes")
        self._hold(not list(self.campaign.cwd.iterdir()), "files elsewhere")
        if self.kind in OF_FILES and not self.root.with_name(f"{self.root.name}.happened").exists():
            return MISSED
        if all(code in (0, 85) for code in codes):
            return THROUGH
        return DIED if set(codes) & {*KILLED} else TOLD

    def _hold(self, true: bool, what: str) -> None:
        if not true:
            raise AssertionError(what)

    @property
    def _arguments(self) -> tuple[str, ...]:
        return (*self.prepared.story.commands[-1], _at(self.root))

    def _again(self) -> int:
        return _launch(self._arguments)

    def _fault(self, share: float = 1.0) -> Fault:
        seed = self.chance.getrandbits(32)
        fault = Fault(self.kind, seed=seed)
        total = sum(self.prepared.counts.get(name, 0) for name in fault.operations)
        at = self.chance.randint(1, max(1, int(total * share)))
        return replace(fault, at=at, lasts=self.chance.choice([1, 1, 1, 10, 10**9]))

    def _wait(self, process: Process) -> int | str:
        code = process.wait()
        self.said += f"--- {code}\n{process.said}\n"
        return code

    def _launcher(self) -> list[int | str]:
        fault = self._fault()

        def do() -> int:
            below(self.root, fault, {})
            return _launch(self._arguments)

        return [self._wait(start(do, self.root / "said"))]

    def _workers(self) -> list[int | str]:
        fault, unlucky = self._fault(0.2), self.chance.randrange(2)

        def of_worker(number: int) -> None:
            if number == unlucky:
                below(self.root, fault, {})

        def do() -> int:
            return launched(self._arguments, workers=2, of_worker=of_worker)

        return [self._wait(start(do, self.root / "said"))]

    def _two(self) -> list[int | str]:
        first = start(self._again, self.root / "first")
        time.sleep(self.chance.choice([0.0, 0.0, self.chance.uniform(0, 1.5)]))
        second = start(self._again, self.root / "second")
        return [self._wait(second), self._wait(first)]

    def _orphans(self) -> list[int | str]:
        """A launcher is killed; its workers work on beside those of the next one."""

        def do() -> int:
            return launched(self._arguments, workers=2, of_worker=lambda _: os.setpgid(0, 0))

        first = start(do, self.root / "said")
        time.sleep(self.chance.uniform(0.3, 2.0))
        first.kill()
        return [self._wait(first)]

    def _tasks(self) -> list[int | str]:
        """The graph as arrays of one's own, one task after the other; requeued as on Slurm."""
        _succeed(self.root, lambda: _launch((*self._arguments, "stage=plan")))
        plan = Run.open(self.root / "run").plan
        steps = [step for step in STEPS if graph.tasks(plan, step)]
        unlucky = self.chance.choice(steps), self.chance.randrange(TASKS)
        codes: list[int | str] = []
        listings: Listings = {}
        for step in steps:
            seen = _listings(self.root / "run") if self.kind == "stale listing" else {}
            for index in range(TASKS):
                fault = self._fault(0.03) if (step, index) == unlucky else Fault()
                codes.append(self._task(step, index, fault, listings))
                if codes[-1] in (85, *KILLED):  # the batch script has it requeued
                    codes.append(self._task(step, index, Fault(), {}))
            listings = {d: (self.chance.uniform(0, 0.6), names) for d, names in seen.items()}
        return codes

    def _task(self, step: str, index: int, fault: Fault, listings: Listings) -> int | str:
        def do() -> int:
            below(self.root, fault, listings)
            return tasked(self.root / "run", step, index, TASKS)

        process = start(do, self.root / "said")
        if fault.kind == "warned":
            time.sleep(self.chance.uniform(0, 0.4))
            process.kill(signal.SIGUSR2)
        return self._wait(process)


def _listings(run_dir: Path) -> dict[str, frozenset[str]]:
    """What a node sees of receipts and attempts just now, and may believe for some time."""
    there = [d for name in ("receipts", "jobs") for d in run_dir.glob(f"{name}/**") if d.is_dir()]
    return {str(d): frozenset(p.name for p in d.iterdir()) for d in there}


def _launch(arguments: Sequence[str]) -> int:
    return launched(arguments, of_worker=lambda _: None)


def _at(root: Path) -> str:
    return f"run_dir='{root / 'run'}'"


def _succeed(root: Path, do: Callable[[], int]) -> None:
    process = start(do, root / "output")
    code = process.wait()
    if code != 0:
        raise AssertionError(f"undisturbed: exit code {code}\n{process.said}")


def table(outcomes: Mapping[str, Counter[str]]) -> str:
    """Counts of each fault by what became of it."""
    columns = [MISSED, THROUGH, TOLD, DIED, "LOST"]
    lines = [f"{'fault':<42}" + "".join(f"{c:>20}" for c in columns)]
    total = Counter[str]()
    for kind, counts in sorted(outcomes.items()):
        total += counts
        lines.append(f"{kind:<42}" + "".join(f"{counts[c] or '':>20}" for c in columns))
    lines.append(f"{f'all {total.total()}':<42}" + "".join(f"{total[c]:>20}" for c in columns))
    return "\n".join(lines)


def main() -> int:
    """Run a campaign; 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--only", type=int, help="one case of them")
    parser.add_argument("--directory", type=Path)
    given = parser.parse_args()
    directory = given.directory or Path(tempfile.mkdtemp(prefix="faults-"))
    campaign = Campaign(directory.absolute())
    outcomes: dict[str, Counter[str]] = {}
    begun, lost = time.monotonic(), 0
    for number in range(given.count) if given.only is None else [given.only]:
        case = campaign.case(given.seed, number)
        name = f"{case.kind}, {case.who}"
        try:
            outcome, why = case.run(), ""
            shutil.rmtree(case.root)
        except AssertionError as error:
            outcome, why, lost = "LOST", f" ({error})", lost + 1
        print(f"case {number}: {name}, {case.prepared.story.name}: {outcome}{why}", flush=True)
        at = case.root.with_name(f"{case.root.name}.happened")
        if why or given.only is not None:
            print(at.read_text() if at.exists() else "", case.said, sep="", flush=True)
        at.unlink(missing_ok=True)
        shutil.rmtree(f"{case.root}.lost", ignore_errors=True)
        outcomes.setdefault(name, Counter())[outcome] += 1
    seconds = time.monotonic() - begun
    print(f"seed {given.seed}, {seconds:.0f} s\n{table(outcomes)}")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
