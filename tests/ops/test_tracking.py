"""Rules of following examples, by experiment: what changes with an example must be its own."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from tracked_calls import CALLS, Draw, varied

from trak_dist.ops.example_axis import NO_EXAMPLE, ExampleAxis, Untracked, axis_of, record_axis
from trak_dist.ops.tracking import track_call
from trak_dist.ops.tracking.call import Call, name_of, tensors_in
from trak_dist.ops.tracking.registry import RULES

pytestmark = pytest.mark.slow

# What a machine without accelerators can't call.
ELSEWHERE = {"cuda", "pin_memory"}


def named(function: Any) -> str:
    name = function.__name__
    return function.__self__.__name__ if name in {"__get__", "__set__"} else name


def calls_of(function: Any) -> list[Any]:
    name = named(function)
    return CALLS.get(name) or CALLS.get(name.removesuffix("_"), [])


def called(function: Any, draw: Draw, arguments: Any, vary: int | None) -> tuple[Any, list[Tensor]]:
    """A call with copies of its arguments; one example's values differ if `vary` says so."""
    generator = torch.Generator().manual_seed(7)

    def copied(tensor: Tensor) -> Tensor:
        other = tensor.clone() if vary is None else varied(tensor, draw, vary, generator)
        return record_axis(other, draw.found.get(id(tensor)))

    args, kwargs = pytree.tree_map_only(Tensor, copied, arguments)
    versions = [t._version for t in tensors_in((args, kwargs))]
    torch.manual_seed(3)
    out = function(*args, **kwargs)
    return (args, kwargs, out, versions), Call(function, args, kwargs, out).outs


def changes(before: Tensor, after: Tensor) -> Tensor:
    return (before != after) & ~(before.isnan() & after.isnan())


SAME = (torch.Tensor.retain_grad, torch.Tensor.requires_grad.__set__)
UNSET = {"empty", "empty_like", "new_empty", "new_empty_strided"}


def experiment(function: Any, draw: Draw, arguments: Any) -> list[tuple[Any, list[Any]]]:
    """Where each result has its examples, and by example which entries change with it."""
    given, before = called(function, draw, arguments, None)
    changed: list[list[Any]] = [[] for _ in before]
    ids = {int(i) for found in draw.found.values() for i in found.ids} - {NO_EXAMPLE}
    if function not in SAME and named(function).removesuffix("_") not in UNSET:
        for example in sorted(ids):
            _, after = called(function, draw, arguments, example)
            for noted, one, other in zip(changed, before, after, strict=True):
                noted.append((example, changes(one, other)))
    track_call(function, *given)
    outs = before
    return [(axis_of(t), t, noted) for t, noted in zip(outs, changed, strict=True)]


def sound(found: Any, result: Tensor, changed: list[Any]) -> str | None:
    if isinstance(found, Untracked):
        return None
    if isinstance(found, ExampleAxis):
        size = result.shape[found.dim] if result.ndim else 1
        if len(found.ids) != size:
            return f"{len(found.ids)} ids for {tuple(result.shape)} along {found.dim}"
        own = found.expand_to(result.shape)
    else:
        own = torch.full(result.shape, NO_EXAMPLE)
    wrong = [example for example, entries in changed if (entries & (own != example)).any()]
    return f"entries said to be of {found} change with {wrong}" if wrong else None


def results(function: Any, plain: bool, seeds: int) -> Iterator[tuple[str, Any, Any, Any]]:
    """All results of calls of a function that it takes."""
    for number, make in enumerate(calls_of(function)):
        for seed in range(seeds):
            draw = Draw(seed, plain=plain)
            arguments = make(draw)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    called(function, draw, arguments, None)
                except (TypeError, RuntimeError, ValueError, IndexError, NotImplementedError):
                    break  # a spelling of another kind
                if not draw.found:
                    continue
                for found, result, changed in experiment(function, draw, arguments):
                    yield f"{name_of(function)} ({number}, seed {seed})", found, result, changed


NAMES = sorted({named(function) for function in RULES} - ELSEWHERE)


@functools.cache
def functions(name: str) -> list[Any]:
    return [function for function in RULES if named(function) == name]


@pytest.mark.parametrize("name", NAMES)
def test_entries_that_change_with_an_example_are_its_own_after(name: str) -> None:
    for number, function in enumerate(functions(name)):
        tried = 0
        seeds = 1 if number else 3  # fewer for other spellings of the same
        for told, found, result, changed in results(function, plain=False, seeds=seeds):
            tried += 1
            problem = sound(found, result, changed)
            assert problem is None, f"{told}: {problem}"
        assert tried, f"no call of {name_of(function)} in followed.py"
