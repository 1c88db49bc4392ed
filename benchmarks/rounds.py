"""Ways of doing the same, timed in turns within one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

Seconds = Mapping[str, Sequence[float]]


def take_turns(
    ways: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, list[float]]:
    """Seconds of each way in each round, after a first time that is not counted."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for way in ways.values():
        way()
    for _ in range(rounds):
        for name, way in ways.items():
            started = clock()
            way()
            seconds[name].append(clock() - started)
    return seconds


def medians(seconds: Seconds) -> dict[str, float]:
    return {way: statistics.median(times) for way, times in seconds.items()}


def ratios(seconds: Seconds, unit: str) -> dict[str, float]:
    """Medians of the ratios within a round: what slows a whole round is lost in them."""
    return {
        way: statistics.median(t / f for t, f in zip(times, seconds[unit], strict=True))
        for way, times in seconds.items()
    }
