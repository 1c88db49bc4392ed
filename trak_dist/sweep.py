"""Sweeps, `-m`: the combinations of one, which grads they can share, and how each of them ended.

Hydra runs the combinations one after the other in this process; what one does is `launch`'s.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hydra.core.hydra_config import HydraConfig

from trak_dist import console, settings
from trak_dist.evaluation import quality
from trak_dist.interface import options
from trak_dist.store import atomic
from trak_dist.store.run import Run


@dataclass
class Combination:
    """One combination: its values, the run it turned out to be, how it ended, its LDS."""

    sweep: Sweep
    what: str
    run_dir: Path | None = None
    state: str = "done"
    lds: list[str] = field(default_factory=list)


@dataclass
class Sweep:
    """What the command line asks for; `values` of each key as written, one if it is not swept.

    `combinations` are those that began, `code` is the worst exit code of those that ended.
    """

    values: Mapping[str, list[str]]
    combinations: list[Combination] = field(default_factory=list)
    code: int = 0

    @property
    def swept(self) -> list[str]:
        """The keys with several values."""
        return [key for key, values in self.values.items() if len(values) > 1]

    @property
    def size(self) -> int:
        """How many combinations there are."""
        return math.prod(map(len, self.values.values()))

    @property
    def dims(self) -> list[int]:
        """Each `proj_dim` that is swept."""
        texts = [override.partition("=")[2] for override in self.values.get("proj_dim", ())]
        return sorted({int(text) for text in texts if text.isdecimal() and int(text)})

    def samples(self) -> list[list[str]]:
        """The overrides of some combinations, which have every option of every group."""
        first = {key: values[0] for key, values in self.values.items()}
        others = [
            {**first, key: value}
            for key in self.swept
            if options.is_group(key)
            for value in self.values[key][1:]
        ]
        return [list(sample.values()) for sample in (first, *others)]

    def make_directory(self) -> None:
        """Make the run directory, where Hydra writes before the first combination begins.

        Raises
        ------
        ConfigError, StoreError
            If it can't be made.
        """
        shared = [values[0] for values in self.values.values() if len(values) == 1]
        run_dir = settings.composed_run_dir(shared)
        with atomic.write_errors(run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)

    def run(self, launch: Callable[[Combination], int]) -> int:
        """Run what Hydra composed; whatever becomes of it, the others have their turn."""
        overrides = HydraConfig.get().overrides.task
        what = " ".join(o for o in overrides if o.partition("=")[0] in self.swept)
        logging.getLogger("hydra").setLevel(logging.WARNING)  # it would announce each again
        combination = Combination(self, what or "the only combination")
        self.combinations.append(combination)
        console.combination(len(self.combinations), self.size, combination.what)
        try:
            code = launch(combination)
        except Exception:  # the boundary of a combination: printed, and in the exit code
            console.unforeseen()
            code = 1
        if code:
            combination.state = "failed"
        if combination.run_dir and Run.exists(combination.run_dir):  # now: the next may change it
            combination.lds = list(quality.lds(Run.open(combination.run_dir)))
        self.code = max(self.code, code)
        return code

    def lines(self) -> Iterator[str]:
        """How each combination ended, and where its run is."""
        width = max((len(one.what) for one in self.combinations), default=0)
        yield f"sweep: {len(self.combinations)} of {self.size} combinations"
        for one in self.combinations:
            yield f"{one.what:<{width}}  {one.state:<9}  {one.run_dir or 'no run'}"
            yield from (f"{'':<{width}}  {line}" for line in one.lds)


def parse(arguments: list[str]) -> Sweep | None:
    """The sweep that the command line asks for, if it does.

    Raises
    ------
    ConfigError
        If an override has no discrete values.
    """
    if not any(a in settings.MULTIRUN for a in arguments):
        return None
    return Sweep(settings.swept_values(settings.overrides_among(arguments)))
