"""Keys, ids, paths, arrays and dependencies stay what they were: old runs go on.

Where a difference is meant (it costs every user the cells whose keys change),
`python tests/golden/write.py` takes the values as they are now.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import describe
import pytest
import write


@pytest.mark.parametrize("name", write.PLANS)
def test_what_follows_from_a_plan_is_what_it_was(name: str, tmp_path: Path) -> None:
    expected = json.loads(write.EXPECTED.read_text())[name]
    found = write.golden(name, tmp_path)
    first = list(itertools.islice(write.differences(expected, found), 10))
    assert not first, "\n".join(["the first differences:", *first])


def test_each_plan_is_expected() -> None:
    assert json.loads(write.EXPECTED.read_text()).keys() == write.PLANS.keys()


def test_the_plans_have_every_kind_of_cell() -> None:
    cells = {
        cell for plan in json.loads(write.EXPECTED.read_text()).values() for cell in plan["cells"]
    }
    assert {cell.partition("/")[0] for cell in cells} == {
        *("train", "margins", "featurize", "gram", "kernel", "precondition"),
        *("score", "counterfactual", "evaluate", "report"),
    }


@pytest.mark.parametrize("name", write.PLANS)
def test_a_plan_is_written_as_it_was_but_for_what_joined(name: str) -> None:
    text = write.PLANS[name]
    old, new = json.loads(text), json.loads(describe.rewritten(text))
    del old["digest"]
    assert write.contained(old, new) == old
