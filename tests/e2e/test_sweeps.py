"""Sweeps, `-m`: members of one run, which share every gradient that they can."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from command_result import Ended, Launch
from sweeping import Command, members, small_runs

from trak_dist import open_run
from trak_dist.cells import ScoreCell
from trak_dist.interface import members as sweep_members
from trak_dist.plan import Plan
from trak_dist.stages import featurize, reduce
from trak_dist.store.run import Run
from trak_dist.sweep import Sweep

pytestmark = pytest.mark.slow


@pytest.fixture
def run(launch: Launch, tiny_run: list[str], tmp_path: Path) -> Command:
    """A command on a run of the tiny problem with 20 rows, 3 checkpoints and one target set."""
    given = [o for o in tiny_run if not o.startswith("proj_dim")]
    return small_runs(launch, given, tmp_path)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Projection and cell of each featurize, gram and kernel cell that is run."""
    found: list[tuple[str, str]] = []

    def counted(module: object, name: str) -> None:
        stage = getattr(module, name)

        def count(session, cell) -> object:
            plan = session.run.plan
            ids = {"gram": f"/{plan.proj_dim}", "kernel": f"/{plan.kernel_id}"}
            found.append((plan.projection_id + ids.get(cell.kind, ""), cell.id))
            return stage(session, cell)

        monkeypatch.setattr(module, name, count)

    for module, name in ((featurize, "featurize"), (reduce, "gram"), (reduce, "factorise")):
        counted(module, name)
    return found


def featurized(computed: list[tuple[str, str]]) -> dict[str, int]:
    """How many featurize cells were run with each projection, none of them twice."""
    cells = [one for one in computed if one[1].startswith("featurize")]
    assert len(cells) == len(set(cells))
    names = [name for name, _ in cells]
    return {name.rsplit("-", 1)[0]: names.count(name) for name in names}


def summary(ended: Ended) -> list[list[str]]:
    """What was swept, how it ended, and the run, of each combination."""
    lines = ended.out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("sweep: "))
    return [line.rsplit(maxsplit=2) for line in lines[start + 1 :]]


def scores(run_dir: Path) -> np.ndarray:
    return open_run(run_dir).scores("val").view(np.uint32)


# Dimensions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", list(itertools.permutations((4, 8, 16)))[::2])
def test_dimensions_in_any_order_cost_one_featurize_pass(
    run, computed, tmp_path: Path, order: tuple[int, ...]
) -> None:
    ended = run("run", "-m", f"proj_dim={','.join(map(str, order))}")
    assert ended.code == 0, ended.err
    assert featurized(computed) == {"sjlt-16": 12}
    there = members(tmp_path / "run")
    assert set(there) == {4, 8, 16}
    assert there[order[0]] == tmp_path / "run", "the first task makes the run itself"
    assert summary(ended) == [[f"proj_dim={k}", "done", str(there[k])] for k in order]


def test_members_have_the_scores_of_separate_runs(run, tmp_path: Path) -> None:
    assert run("run", "-m", "proj_dim=8,16").code == 0
    there = members(tmp_path / "run")
    for k in (8, 16):
        assert run(f"separate-{k}", f"proj_dim={k}", "store_dim=16").code == 0
        np.testing.assert_array_equal(scores(there[k]), scores(tmp_path / f"separate-{k}"))
    assert run("direct", "proj_dim=8", "featurize.dtype=float32").code == 0
    folded, direct = (open_run(p).scores("val") for p in (there[8], tmp_path / "direct"))
    assert np.abs(folded - direct).max() < 5e-3 * np.abs(direct).max(), "float16's rounding"


@pytest.mark.long
def test_a_member_is_a_run_directory_whose_arrays_are_in_the_one_store(run, tmp_path: Path) -> None:
    assert run("run", "-m", "proj_dim=16,8").code == 0
    (name,) = Run.open(tmp_path / "run").layout.members()
    member = tmp_path / "run" / "sweeps" / name
    assert name.startswith("sjlt-8-")
    group = zarr.open_group(tmp_path / "run/store.zarr", mode="r")
    array = group[f"sweeps/{name}/scores/val"]
    np.testing.assert_array_equal(array[:], open_run(member).scores("val"))
    assert array.attrs["proj_dim"] == 8
    assert group["models/0"][open_run(member).plan.projection_id]["gram/8-output"].shape == (8, 8)
    assert (member / "report/val.html").exists()
    assert not (member / "store.zarr").exists()
    assert set(open_run(member).receipts("featurize")) == set(
        open_run(tmp_path / "run").receipts("featurize")
    )
    for stage in ("status", "verify", "reduce", "report", "all"):
        ended = run("run", f"run_dir={member}", f"stage={stage}")
        assert ended.code == 0, ended.err
    status = run("run", f"run_dir={member}", "stage=status").out
    assert f"sweep  a member of the run {tmp_path / 'run'}\n" in status
    assert json.loads(status.splitlines()[-1])["complete"] is True
    of_base = run("run", "stage=status").out
    assert f"sweep  1 members in {tmp_path / 'run/sweeps'}: {name}\n" in of_base


@pytest.mark.long
def test_dimensions_that_do_not_divide_share_what_they_can(run, computed, tmp_path: Path) -> None:
    ended = run("run", "-m", "proj_dim=12,3,5,10,8")
    assert ended.code == 0, ended.err
    assert featurized(computed) == {"sjlt-12": 12, "sjlt-10": 12, "sjlt-8": 12}
    assert [line for line in ended.out.splitlines() if "by themselves" in line] == [
        "10 does not divide 12: grads of dimension 10 are made by themselves",
        "8 does not divide 12: grads of dimension 8 are made by themselves",
    ]


@pytest.mark.long
def test_a_finished_run_lends_its_grads(run, computed, tmp_path: Path) -> None:
    assert run("run", "proj_dim=16").code == 0
    before = scores(tmp_path / "run")
    computed.clear()
    ended = run("run", "-m", "proj_dim=4,8,32")
    assert ended.code == 0, ended.err
    assert featurized(computed) == {"sjlt-32": 12}
    assert set(members(tmp_path / "run")) == {4, 8, 16, 32}
    np.testing.assert_array_equal(scores(tmp_path / "run"), before)


@pytest.mark.long
def test_projections_that_do_not_fold(run, computed, tmp_path: Path) -> None:
    ended = run("run", "-m", "projection=gaussian,sjlt,identity", "proj_dim=4,8")
    assert ended.code == 0, ended.err
    assert featurized(computed) == {
        "gaussian-4": 12,
        "gaussian-8": 12,
        "sjlt-8": 12,
        "identity-53": 12,
    }
    assert (
        "gaussian projections do not fold: grads of dimension 8 are made by themselves\n"
        in ended.out
    )
    assert len(summary(ended)) == 6
    assert len(Run.open(tmp_path / "run").layout.members()) == 4, "identity has one dimension"


def test_a_store_dim_that_is_given_is_taken(run, computed) -> None:
    assert run("run", "-m", "proj_dim=4,8", "store_dim=32").code == 0
    assert featurized(computed) == {"sjlt-32": 12}


# Reduce and ensembles ---------------------------------------------------------------------------


@pytest.mark.long
def test_other_lambdas_and_scales_cost_no_gradient_and_no_gram(
    run, computed, tmp_path: Path
) -> None:
    assert run("run", "proj_dim=8").code == 0
    computed.clear()
    both = ("reduce.lambda_reg=0.5,1.0", "reduce.kernel_scale=mean_abs,none")
    ended = run("run", "-m", *both)
    assert ended.code == 0, ended.err
    assert {cell.split("/")[0] for _, cell in computed} == {"kernel"}
    assert len(computed) == 9, "the run itself is one of the four"
    assert [row[0] for row in summary(ended)] == [
        "reduce.lambda_reg=0.5 reduce.kernel_scale=mean_abs",
        "reduce.lambda_reg=0.5 reduce.kernel_scale=none",
        "reduce.lambda_reg=1.0 reduce.kernel_scale=mean_abs",
        "reduce.lambda_reg=1.0 reduce.kernel_scale=none",
    ]
    assert summary(ended)[2][2] == str(tmp_path / "run")
    assert len({scores(Path(row[2])).tobytes() for row in summary(ended)}) == 4


@pytest.mark.long
def test_ensembles_compute_each_checkpoint_once(run, computed, tmp_path: Path) -> None:
    ended = run("run", "-m", "checkpoints.use=[0],[0,2],[2,0]", "proj_dim=8")
    assert ended.code == 0, ended.err
    assert featurized(computed) == {"sjlt-8": 8}
    assert len(computed) == len(set(computed)) == 12
    first, second, same = (Path(row[2]) for row in summary(ended))
    assert second == same
    assert open_run(first).plan.model_ids == (0,)
    assert open_run(second).plan.model_ids == (0, 2)
    assert run("separate", "checkpoints.use=[0,2]", "proj_dim=8").code == 0
    np.testing.assert_array_equal(scores(second), scores(tmp_path / "separate"))


@pytest.mark.long
def test_a_new_checkpoint_joins_only_the_runs_that_are_asked_for(
    run, computed, tmp_path: Path
) -> None:
    import tiny
    import torch

    assert run("run", "-m", "proj_dim=8,4").code == 0
    computed.clear()
    torch.save(tiny.state(3), tmp_path / "checkpoints" / "3.pt")
    assert run("run", "-m", "proj_dim=4").code == 0
    there = members(tmp_path / "run")
    assert open_run(there[4]).plan.model_ids == (0, 1, 2, 3)
    assert open_run(there[8]).plan.model_ids == (0, 1, 2)
    assert featurized(computed) == {"sjlt-8": 4}
    assert run("run", "-m", "proj_dim=8,4").code == 0
    assert featurized(computed) == {"sjlt-8": 4}


# What goes wrong --------------------------------------------------------------------------------


def test_a_task_that_fails_does_not_stop_the_others(run, tmp_path: Path) -> None:
    ended = run("run", "-m", "reduce.lambda_reg=0,1", "proj_dim=64,32")
    assert ended.code == 2
    assert "error: λ = 0 with proj_dim 64 > 20 train rows" in ended.err
    assert [[row[0], row[1]] for row in summary(ended)[2:]] == [
        ["reduce.lambda_reg=1 proj_dim=64", "done"],
        ["reduce.lambda_reg=1 proj_dim=32", "done"],
    ]
    assert [line.split(maxsplit=2)[2] for line in ended.out.splitlines() if " failed " in line] == [
        "failed     no run",
        "failed     no run",
    ]


def test_an_unforeseen_error_is_reported_and_the_others_run(run, monkeypatch) -> None:
    directory, calls = sweep_members.directory, itertools.count()

    def breaks(base: Run, plan: Plan) -> Path:
        if next(calls) == 0:
            raise RuntimeError("unforeseen")
        return directory(base, plan)

    monkeypatch.setattr(sweep_members, "directory", breaks)
    ended = run("run", "-m", "proj_dim=4,8,16")
    assert ended.code == 1
    assert "RuntimeError: unforeseen" in ended.err
    assert [row[1] for row in summary(ended)][::2] == ["done", "done"]


def test_failed_cells_give_the_exit_code(run, monkeypatch) -> None:
    def fails(session, cell) -> None:
        raise ValueError("bad luck")

    monkeypatch.setattr(reduce, "gram", fails)
    ended = run("run", "-m", "proj_dim=4,8")
    assert ended.code == 1
    assert [row[1] for row in summary(ended)] == ["failed", "failed"]


def test_a_sweep_that_was_ended_is_completed_by_the_same_command(
    run, computed, tmp_path: Path, monkeypatch
) -> None:
    works = reduce.gram

    def killed(session, cell) -> object:
        if session.run.plan.proj_dim == 8 and cell.model_id == 1:
            raise KeyboardInterrupt
        return works(session, cell)

    monkeypatch.setattr(reduce, "gram", killed)
    command = ("run", "-m", "proj_dim=4,8,16")
    ended = run(*command)
    assert ended.code == 130
    assert [row[1] for row in summary(ended)] == ["done", "failed"]
    assert "sweep: 2 of 3 combinations\n" in ended.out
    monkeypatch.setattr(reduce, "gram", works)
    ended = run(*command)
    assert ended.code == 0, ended.err
    assert featurized(computed) == {"sjlt-16": 12}
    assert len(computed) == len(set(computed))
    assert set(members(tmp_path / "run")) == {4, 8, 16}
    done = {k: scores(path) for k, path in members(tmp_path / "run").items()}
    count = len(computed)
    assert run(*command).code == 0
    assert len(computed) == count
    for k, path in members(tmp_path / "run").items():
        np.testing.assert_array_equal(scores(path), done[k])


def test_hydras_directories_never_meet(run, tmp_path: Path) -> None:
    for _ in range(2):
        assert run("run", "-m", "proj_dim=4,8", "stage=plan").code == 0
    found = list((tmp_path / "run/logs/multirun").iterdir())
    assert len(found) == 2
    for path in found:
        assert sorted(p.name for p in path.iterdir()) == ["0", "1", "multirun.yaml"]
    assert not (tmp_path / "run/multirun.yaml").exists()


# What is refused --------------------------------------------------------------------------------


@pytest.mark.long
def test_another_reduce_is_refused_and_reported_how_to_keep_both(run, tmp_path: Path) -> None:
    assert run("run", "proj_dim=8").code == 0
    base = Run.open(tmp_path / "run")
    spec = replace(base.plan.spec, proj_dim=4)
    member = base.layout.sweeps / base.plan.with_settings(spec, ()).reduce_id
    error = (
        "error: the run has scores made with another proj_dim, reduce or ensemble\n"
        f"  where: {tmp_path / 'run'}\n"
        "  next:  {}\n"
    )
    ended = run("run", "proj_dim=4")
    keeps = f"the same command with -m, which keeps both: these go to {member}"
    assert (ended.code, ended.err) == (2, error.format(keeps))
    assert run("run", "-m", "proj_dim=4").code == 0
    assert members(tmp_path / "run")[4] == member
    ended = run("run", "proj_dim=4")
    assert ended.err == error.format(f"run_dir={member} is the run with these settings")


def test_another_projection_is_reported_how_to_keep_both(run) -> None:
    assert run("run", "proj_dim=8", "stage=plan").code == 0
    ended = run("run", "projection.seed=1")
    assert ended.code == 2
    assert (
        "  next:  leave these settings out to resume this run, add -m to compute with these too, "
        "or use another run_dir\n"
    ) in ended.err


def test_what_members_can_not_differ_in(run) -> None:
    assert run("run", "proj_dim=8", "stage=plan").code == 0
    ended = run("run", "-m", "proj_dim=4,8", "featurize.dtype=float32")
    assert ended.code == 2
    assert ended.err.startswith(
        "error: the run directory belongs to another spec:\n"
        "  featurize.dtype: 'float16' in the plan, 'float32' now\n"
        "  proj_dim: 8 in the plan, 4 now\n"
        "  where: "
    )
    ended = run("run", "-m", "reduce.threads=2")
    assert "  reduce.threads: 1 in the plan, 2 now\n" in ended.err


UNKNOWN = (
    "unknown keys:\n  proj_dmi: unknown; did you mean 'proj_dim'?\n"
    "  where: the command line\n"
    "  next:  python -m trak_dist.launch --help lists the keys"
)
NO_VALUES = (
    "'reduce.lambda_reg={}' has no discrete values\n"
    "  where: the command line\n"
    "  next:  reduce.lambda_reg=…,… or choice(…), range(…), or for a group glob(*)"
)
NO_PATH = (
    "run_dir 'runs/%j' is not usable: a path without '%', which submitit and Slurm replace by a "
    "job's number\n"
    "  where: run_dir\n"
    "  next:  run_dir=runs/…"
)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("proj_dmi=4,8",), UNKNOWN),
        (("reduce.lambda_reg=interval(0,1)",), NO_VALUES.format("interval(0,1)")),
        (("reduce.lambda_reg=range(3,3)",), NO_VALUES.format("range(3,3)")),
        (("proj_dim=4,8", "run_dir=runs/%j"), NO_PATH),
    ],
)
def test_what_hydra_never_sees(run, tmp_path, arguments: tuple[str, ...], error: str) -> None:
    ended = run("run", "-m", *arguments)
    assert ended.err == f"error: {error}\n"
    assert ended.code == 2
    assert not (tmp_path / "run").exists()


def test_each_option_of_a_swept_group_is_looked_at(run, tmp_path: Path) -> None:
    ended = run("run", "-m", "projection=sjlt,gausian")
    assert ended.code == 2
    assert "error: the configuration can't be composed: " in ended.err
    assert "gausian" in ended.err
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_all_ways_to_write_a_sweep(run, tmp_path: Path) -> None:
    ended = run("run", "--multirun", "proj_dim=range(4,13,4)", "stage=plan")
    assert ended.code == 0, ended.err
    assert set(members(tmp_path / "run")) == {4, 8, 12}
    assert run("run", "hydra.mode=MULTIRUN", "proj_dim=choice(4,24)", "stage=plan").code == 0
    assert set(members(tmp_path / "run")) == {4, 8, 12, 24}
    ended = run("two", "-m", "projection=glob(*)", "proj_dim=4", "stage=plan")
    assert [row[0] for row in summary(ended)] == [
        f"projection={kind}" for kind in ("gaussian", "identity", "rademacher", "sjlt")
    ]


def test_a_member_is_no_place_to_begin(run, tmp_path: Path) -> None:
    assert run("run", "-m", "proj_dim=8,4", "stage=plan").code == 0
    member = members(tmp_path / "run")[4]
    error = (
        "error: this is a place for members of a sweep, which are made from their run\n"
        "  where: {}\n"
        f"  next:  python -m trak_dist.launch -m run_dir={tmp_path / 'run'}, and the settings of "
        "this one\n"
    )
    assert run("run", "-m", f"run_dir={member}", "proj_dim=2").err == error.format(member)
    other = member.parent / "other"
    assert run("run", f"run_dir={other}", "proj_dim=2").err == error.format(other)
    ended = run("run", f"run_dir={member}", "reduce.lambda_reg=2")
    assert ended.err.startswith("error: the run directory belongs to another spec:\n")


def test_a_missing_checkpoint_is_left_out_by_every_member(run, tmp_path: Path, monkeypatch) -> None:
    works = featurize.featurize

    def fails(session, cell) -> object:
        if cell.model_id == 1:
            raise ValueError("bad luck")
        return works(session, cell)

    monkeypatch.setattr(featurize, "featurize", fails)
    assert run("run", "proj_dim=8").code == 1
    asked = ("stage=reduce", "checkpoints.allow_missing=true", "reduce.lambda_reg=1,2")
    ended = run("run", "-m", *asked)
    assert ended.code == 0, ended.err
    found = [Path(row[2]) for row in summary(ended)]
    assert all(path.parent == tmp_path / "run/sweeps" for path in found)
    assert all(open_run(path).plan.use == (0, 2) for path in found)
    assert all(Run.open(p).receipts.done(ScoreCell.of(open_run(p).plan)) for p in found)


@pytest.mark.long
def test_stages_that_look_find_each_member(run, tmp_path: Path) -> None:
    assert run("run", "-m", "proj_dim=8,4").code == 0
    ended = run("run", "-m", "proj_dim=8,2,4", "stage=verify")
    there = members(tmp_path / "run")
    assert ended.out.count("verify: 23 cells done, 0 of them damaged, 0 cells not done yet") == 2
    assert [row[2] for row in summary(ended)][::2] == [str(there[8]), str(there[4])]
    assert ended.code == 2
    assert "error: the sweep has no member with these settings\n  where: " in ended.err
    assert "  next:  the same command without stage=… makes it\n" in ended.err


def test_run_directories_with_special_names(run, odd_path: Path) -> None:
    quoted = str(odd_path / "run").replace("'", "\\'").replace("\n", "_")
    ended = run("run", "-m", "proj_dim=8,4", f"run_dir='{quoted}'")
    assert ended.code == 0, ended.err
    assert set(members(Path(quoted.replace("\\'", "'")))) == {4, 8}


@pytest.mark.long
def test_local_workers_make_the_same(run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    for name in ("debug", "local"):
        ended = run(name, "-m", "proj_dim=8,4", f"cluster={name}")
        assert ended.code == 0, ended.err
    ours, theirs = (members(tmp_path / name) for name in ("debug", "local"))
    for k in (4, 8):
        np.testing.assert_array_equal(scores(ours[k]), scores(theirs[k]))


# The dimension to store -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "swept", "of_run", "chosen"),
    [
        (256, "256,512,1024", 0, 1024),
        (512, "256,512,768,1024", 0, 1024),
        (768, "256,512,768,1024", 0, 768),
        (3, "3,5,6,10", 0, 6),
        (5, "3,5,6,10", 0, 10),
        (1024, "1024,1536,2048", 1536, 2048),
        (512, "512", 2048, 2048),
        (4096, "512,4096", 2048, 4096),
        (2048, "", 0, 2048),
    ],
)
def test_the_dimension_to_store(tmp_path, k: int, swept: str, of_run: int, chosen: int) -> None:
    from test_plan import PLAN

    dims = Sweep({"proj_dim": [f"proj_dim={v}" for v in swept.split(",") if v]}).dims
    spec = PLAN.spec.__class__(problem={}, store_dim=of_run or 1, proj_dim=1)
    planned = PLAN.with_settings(spec, ()) if of_run else None
    values = {"proj_dim": k, "store_dim": k, "projection.kind": "sjlt"}
    assert sweep_members.store_dim(values, dims, planned)[0] == chosen
