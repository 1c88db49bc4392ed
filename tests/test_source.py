"""What a problem is made of: how its model prints, and the files that it comes from."""

from __future__ import annotations

import importlib
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from torch import nn
from torch.utils.data import Subset

from trak_dist import ImageClassification, building
from trak_dist import problem as problems
from trak_dist.errors import ProblemError, UnreadableRow
from trak_dist.plan import digest
from trak_dist.plan_inputs import Source
from trak_dist.source import accept_changes, check_unchanged, model_digest, modules

SPEC = {"_target_": "made.problem"}


class Calls(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def extra_repr(self) -> str:
        return f"{self.function}, mask=0xff00"


def test_a_model_that_prints_an_address_is_the_same_in_every_process() -> None:
    one, same = (Calls(lambda x: x) for _ in range(2))
    assert repr(one) != repr(same)
    output = ImageClassification()
    assert model_digest(one, output) == model_digest(same, output)
    assert model_digest(one, output) != model_digest(Calls(torch.relu), output)


def test_models_without_addresses_have_the_digests_of_earlier_versions() -> None:
    assert model_digest(tiny.net(), ImageClassification()) == digest(
        [repr(tiny.net()), "ImageClassification", "[]"]
    )


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A problem whose dataset is in one module, which imports another inside of a package."""
    files = {
        "made.py": "import tiny, rows_of\ndef problem():\n    return rows_of.Rows(3, 0)\n",
        "rows_of.py": "import tiny\nfrom inner.scale import scaled\nclass Rows(tiny.Rows): pass\n",
        "inner/__init__.py": "",
        "inner/scale.py": "def scaled(x):\n    return x\n",
        "inner/other.py": "",
    }
    (tmp_path / "inner").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("made", "rows_of", "inner", "inner.scale"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def test_the_users_own_files_are_digested_and_no_installed_ones(package: Path) -> None:
    made = importlib.import_module("made")
    found = modules(made.problem, [made.problem(), nn.Linear(1, 1)])
    assert found.keys() == {"made", "rows_of", "inner.scale", "tiny"}
    (package / "inner/scale.py").write_text("def scaled(x):\n    return 2 * x\n")
    again = modules(made.problem, [made.problem()])
    assert {n for n in found if found[n] != again[n]} == {"inner.scale"}


def test_a_dataset_inside_of_a_subset_counts(package: Path) -> None:
    rows = importlib.import_module("rows_of").Rows(3, 0)
    assert "rows_of" in modules(tiny.problem, [Subset(rows, [0])])


def test_changed_files_are_named_and_may_be_accepted() -> None:
    planned = Source("f", "m", "/", modules={"made": "f", "inner.scale": "a"})
    now = replace(planned, modules={"made": "f", "inner.scale": "b", "later": "c"})
    with pytest.raises(
        ProblemError, match=r"the file of its module inner\.scale has digest a then"
    ):
        check_unchanged(SPEC, planned, now)
    accepted = accept_changes(planned, now)
    check_unchanged(SPEC, accepted, now)
    check_unchanged(SPEC, accepted, planned)  # and back
    with pytest.raises(ProblemError, match="module later"):
        check_unchanged(SPEC, accepted, replace(now, modules={"later": "d"}))


def test_plans_of_earlier_versions_resume_without_their_files_pinned() -> None:
    old = Source("f", "m", "/")
    check_unchanged(SPEC, old, replace(old, modules={"made": "f"}))
    assert accept_changes(old, replace(old, file="g", modules={"made": "g"})).modules == {}


DRAWS = """
import random, numpy, tiny, torch, trak_dist
from dataclasses import replace
DRAWN = torch.randn(2)
def problem(directory):
    made = tiny.problem(directory)
    made.model.drawn = [torch.randn(3), numpy.random.rand(2), torch.tensor(random.random()), DRAWN]
    return made
"""


def numpys() -> list[int]:
    return np.random.get_state()[1].tolist()  # noqa: NPY002


def test_what_is_drawn_when_a_problem_is_built_is_the_same_in_every_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "draws.py").write_text(DRAWS)
    drawn = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        before = torch.get_rng_state(), random.getstate(), numpys()
        sys.modules.pop("draws", None)
        spec = {"_target_": "draws.problem", "directory": str(tmp_path)}
        problem, _ = building.build(spec, import_root=str(tmp_path))
        drawn.append([np.asarray(d).tolist() for d in problem.model.drawn])
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (random.getstate(), numpys()) == before[1:]
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": nn.Linear}, "model is type"),
        ({"model_output": ImageClassification}, "model_output is "),
        ({"checkpoints": [3]}, "checkpoints is list"),
        ({"targets": {0: tiny.Rows(3, 0)}}, "targets is dict"),
        ({"collate": 3, "render": "x"}, "collate is int, render is str"),
    ],
)
def test_fields_that_can_not_be_a_problems_are_refused(changes: dict, said: str) -> None:
    with pytest.raises(ProblemError, match=f"unfit fields of a problem: {said}"):
        replace(tiny.problem("."), **changes)


@pytest.mark.parametrize("content", [3, np.zeros(5), np.zeros((2, 2, 4)), torch.zeros(2, 2)])
def test_what_can_not_be_shown_is_refused(content: object) -> None:
    with pytest.raises(ProblemError, match="can't be shown"):
        problems.Rendered(content, "label")


@pytest.mark.parametrize("ends", [SystemExit(0), KeyError("x")])
def test_what_the_users_code_raises_is_reported_with_its_place(ends: BaseException) -> None:
    with (
        pytest.raises(UnreadableRow, match=f"reading row 3 raised {type(ends).__name__}") as caught,
        problems.user_code_errors("reading row 3", UnreadableRow),
    ):
        raise ends
    assert caught.value.where.startswith(__file__)


def test_an_interrupt_is_none_of_the_users_code() -> None:
    with pytest.raises(KeyboardInterrupt), problems.user_code_errors("reading row 3"):
        raise KeyboardInterrupt
