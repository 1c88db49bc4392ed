"""Looking at somebody else's run directory runs none of its code; executing it asks for a word."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from command_result import Ended, Launch

from trak_dist import TRAKer, building, trust, worker
from trak_dist import source as sources
from trak_dist.cells import FeaturizeCell, of_stage
from trak_dist.errors import UntrustedProblem
from trak_dist.plan import Plan
from trak_dist.plan_inputs import Streamed
from trak_dist.store.run import Run

MODULE = "problem_of_theirs"
CODE = """
from pathlib import Path
import tiny
with Path(__file__).with_name("ran").open("a") as file:
    file.write("imported\\n")

def problem(directory):
    return tiny.problem(directory)
"""


class Place:
    """Where a user launches: `theirs` has the problem, each has a record of what was planned."""

    def __init__(self, path: Path, launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path, self._launch, self._patch = path, launch, monkeypatch
        path.mkdir()

    def __call__(self, *overrides: str) -> Ended:
        """A command typed here, in a fresh process as far as the problem can tell."""
        self._patch.chdir(self.path)
        self._patch.setenv("XDG_STATE_HOME", str(self.path / "state"))
        self._patch.delitem(sys.modules, MODULE, raising=False)
        self._patch.setattr(sys, "path", [p for p in sys.path if "theirs" not in p])
        return self._launch("cluster=debug", *overrides)


@pytest.fixture
def theirs(tmp_path: Path, launch: Launch, monkeypatch: pytest.MonkeyPatch) -> Place:
    place = Place(tmp_path / "theirs", launch, monkeypatch)
    (place.path / f"{MODULE}.py").write_text(CODE)
    tiny.write_checkpoints(place.path / "checkpoints", 2)
    return place


@pytest.fixture
def mine(tmp_path: Path, launch: Launch, monkeypatch: pytest.MonkeyPatch) -> Place:
    return Place(tmp_path / "mine", launch, monkeypatch)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def named(theirs: Place, run_dir: Path) -> list[str]:
    """How the problem is named where it lies."""
    return [
        f"problem._target_={MODULE}.problem",
        f"+problem.directory={theirs.path / 'checkpoints'}",
        *(f"run_dir={run_dir}", "proj_dim=16", "featurize.cell_rows=32", "featurize.batch_rows=16"),
    ]


@pytest.fixture
def imported(theirs: Place) -> Callable[[], bool]:
    """Whether the problem's file was imported since this was asked last."""

    def asked() -> bool:
        ran = theirs.path / "ran"
        there = ran.exists()
        ran.unlink(missing_ok=True)
        return there

    return asked


def files(directory: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in directory.rglob("*") if p.is_file()}


def asks(ended: Ended) -> bool:
    return ended.code == 2 and "a problem that you have not planned" in ended.err


LOOK = """
import os, sys
from pathlib import Path
theirs, run_dir, names = Path(sys.argv[1]), Path(sys.argv[2]), ["val", "test"]
told = []
def hook(event, arguments):
    if event == "import" and str(theirs) in str(arguments[1]) or event == "pickle.find_class":
        told.append((event, *map(str, arguments[:2])))
    if event == "import" and arguments[0] in ("problem_of_theirs", "torch.utils.data"):
        told.append((event, arguments[0]))
    if event == "exec" and str(theirs) in getattr(arguments[0], "co_filename", ""):
        told.append((event, arguments[0].co_filename))
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        if not Path(os.fsdecode(arguments[0])).is_relative_to(run_dir):
            told.append((event, str(arguments[0])))
    if event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn"):
        if not str(arguments[0]).endswith(("squeue", "scancel", "sacct")):
            told.append((event, str(arguments[0])))
sys.dont_write_bytecode = True
from trak_dist import launch, open_run
import trak_dist.status.state, trak_dist.status.verify  # not what is in question
sys.addaudithook(hook)
for look in ("status", "status watch=true", "verify", "verify repair=true", "cancel"):
    sys.argv = ["trak-dist", f"run_dir={run_dir}", *f"stage={look}".split()]
    try:
        launch.main()
    except SystemExit as ended:
        print(look, ended.code, file=sys.stderr)
run = open_run(run_dir)
for name in names:
    run.scores(name), run.halves(name), run.top(name, [0, 1])
    try:
        run.evaluation(name)
    except trak_dist.errors.TrakDistError as error:
        assert "is not evaluated" in str(error)
run.self_influence()
for stage in ("train", "featurize", "reduce", "evaluate", "report"):
    run.receipts(stage)
run.plan
assert not told, told
print("looked")
"""


@pytest.mark.slow
def test_looking_imports_and_unpickles_nothing_and_writes_nothing_outside(
    theirs: Place, named: list[str], run_dir: Path, tmp_path: Path, imported: Callable[[], bool]
) -> None:
    assert theirs(*named, "self_influence=true").code == 0
    assert imported()
    (tmp_path / "me").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(Path(tiny.__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-c", LOOK, str(theirs.path), str(run_dir)],
        cwd=tmp_path / "me",
        env={**environment, "XDG_STATE_HOME": str(tmp_path / "me"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.endswith("looked\n"), done.stdout + done.stderr
    assert not imported()
    assert not any((tmp_path / "me").iterdir())


def test_whatever_executes_a_run_that_somebody_else_planned_asks_first(
    theirs: Place, mine: Place, named: list[str], run_dir: Path, imported: Callable[[], bool]
) -> None:
    assert theirs(*named, "stage=plan").code == 0
    assert imported()
    before = files(run_dir)
    for stage in ("all", "plan", "train", "featurize", "evaluate", "report"):
        ended = mine(f"run_dir={run_dir}", f"stage={stage}")
        assert asks(ended), (stage, ended)
    for more in (["targets=val"], ["checkpoints.use=[0]", "-m"], ["ground_truth.subsets=3"]):
        assert asks(mine(f"run_dir={run_dir}", *more))
    assert not imported()
    there = {p: t for p, t in files(run_dir).items() if "multirun" not in str(p)}
    assert there == before
    digest = sources.file_digest(theirs.path / f"{MODULE}.py")
    assert f"executes {MODULE}.problem as you" in ended.err
    assert f"{theirs.path / MODULE}.py of " in ended.err
    assert f"digest {digest}, imported from {theirs.path}\n" in ended.err
    assert f"python -m trak_dist.launch stage=plan trust=true run_dir={run_dir} (" in ended.err


def test_reducing_needs_no_trust_since_it_runs_no_code_of_theirs(
    theirs: Place, mine: Place, named: list[str], run_dir: Path, imported: Callable[[], bool]
) -> None:
    assert theirs(*named, "stage=featurize").code == 0
    assert imported()
    ended = mine(f"run_dir={run_dir}", "stage=reduce")
    assert ended.code == 0, ended.err
    assert not imported()


def test_trust_is_recorded_once_and_holds_until_the_file_is_edited(
    theirs: Place, mine: Place, named: list[str], run_dir: Path, imported: Callable[[], bool]
) -> None:
    theirs(*named, "stage=plan")
    assert mine(f"run_dir={run_dir}", "stage=plan", "trust=true").code == 0
    assert mine(f"run_dir={run_dir}").code == 0
    assert imported()
    with (theirs.path / f"{MODULE}.py").open("a") as file:
        file.write("# edited\n")
    ended = mine(f"run_dir={run_dir}")
    assert ended.code == 2
    assert f"the source of {MODULE}.problem changed since planning" in ended.err
    assert not imported()
    assert mine(f"run_dir={run_dir}", "accept_source=true").code == 0
    assert mine(f"run_dir={run_dir}").code == 0


def test_what_somebody_else_accepted_asks_again(
    theirs: Place, mine: Place, named: list[str], run_dir: Path, imported: Callable[[], bool]
) -> None:
    theirs(*named, "stage=plan")
    assert mine(f"run_dir={run_dir}", "stage=plan", "trust=true").code == 0
    with (theirs.path / f"{MODULE}.py").open("a") as file:
        file.write("# edited\n")
    assert theirs(f"run_dir={run_dir}", "stage=plan", "accept_source=true").code == 0
    imported()
    assert asks(mine(f"run_dir={run_dir}"))
    assert not imported()


def test_a_problem_that_the_command_line_names_where_it_was_planned_needs_no_record(
    theirs: Place, named: list[str], run_dir: Path, imported: Callable[[], bool]
) -> None:
    theirs(*named, "stage=plan")
    for record in (theirs.path / "state").rglob("*.json"):
        record.unlink()  # as of a run that an earlier version planned
    assert asks(theirs(f"run_dir={run_dir}", "stage=plan"))
    assert asks(
        theirs(*named[:1], f"run_dir={run_dir}", "stage=plan")
    )  # its arguments are not named
    imported()
    assert theirs(*named, "stage=plan").code == 0
    assert theirs(f"run_dir={run_dir}", "stage=plan").code == 0
    assert imported()


def test_ones_own_run_resumes_from_anywhere(
    theirs: Place, mine: Place, named: list[str], run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs(*named, "stage=plan")
    (mine.path / "state").symlink_to(theirs.path / "state")
    assert mine(f"run_dir={run_dir}", "stage=plan").code == 0


def test_where_nothing_can_be_remembered_it_is_reported_and_the_run_resumes(
    theirs: Place, named: list[str], run_dir: Path
) -> None:
    (theirs.path / "state").write_text("no directory")
    ended = theirs(*named, "stage=plan")
    assert ended.code == 0
    assert f"that you planned {MODULE}.problem can't be recorded" in ended.out
    assert asks(theirs(f"run_dir={run_dir}"))
    assert theirs(f"run_dir={run_dir}", "stage=plan", "trust=true").code == 0


def forged(run_dir: Path, at: Path, change: Callable[[Plan], Plan]) -> None:
    Run.create(at, change(Run.open(run_dir).plan))


def test_a_plan_that_says_its_rows_were_streamed_is_asked_about_all_the_same(
    theirs: Place, mine: Place, named: list[str], run_dir: Path, imported: Callable[[], bool]
) -> None:
    theirs(*named, "stage=plan")
    imported()

    def fed(plan: Plan) -> Plan:
        return replace(plan, train=replace(plan.train, row_source=Streamed()))

    at = run_dir.with_name("fed")
    forged(run_dir, at, fed)
    assert asks(mine(f"run_dir={at}"))
    # TRAKer asks nothing, and its workers are those of the launcher.
    plan = Run.open(at).plan
    cells = [cell.id for cell in FeaturizeCell.of_split(plan, 0, "val")]
    assert not worker.run_cells(str(at), plan.fingerprint, "cpu", cells)
    assert not imported()


def test_a_member_is_asked_about_by_its_own_plan(
    theirs: Place, mine: Place, run_dir: Path, imported: Callable[[], bool]
) -> None:
    (mine.path / f"{MODULE}.py").write_text("from tiny import problem\n")
    tiny.write_checkpoints(mine.path / "checkpoints", 2)
    own = [
        *(f"problem._target_={MODULE}.problem", "+problem.directory=checkpoints"),
        *(f"run_dir={run_dir}", "proj_dim=16"),
    ]
    assert mine(*own, "stage=plan").code == 0

    def moved(plan: Plan) -> Plan:
        return replace(plan, use=(0,), source=replace(plan.source, import_root=str(theirs.path)))

    sweeps = Run.open(run_dir).layout.sweeps
    forged(run_dir, sweeps / moved(Run.open(run_dir).plan).reduce_id, moved)
    ended = mine(*own, "checkpoints.use=[0]", "-m")
    assert asks(ended), ended
    assert not imported()


def test_a_shipped_problem_needs_no_trust_and_imports_nothing_from_where_it_was_planned(
    mine: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = "trak_dist.problems.mnist.problem"
    assert trust.is_always_trusted({"_target_": target, "model": "mlp"})
    assert not trust.is_always_trusted({"_target_": "trak_dist.problems.mnist.mnist_data"})
    assert not trust.is_always_trusted({"_target_": "trak_dist.TRAKer", "save_dir": "x"})
    monkeypatch.setattr(sys, "path", [*sys.path])
    building.locate(target, import_root=str(tmp_path / "theirs"))
    assert str(tmp_path / "theirs") not in sys.path


@pytest.mark.slow
def test_an_array_of_ones_own_asks_too(
    theirs: Place, mine: Place, named: list[str], run_dir: Path, imported: Callable[[], bool]
) -> None:
    theirs(*named, "stage=plan")
    imported()
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(tiny.__file__).parent),
        "XDG_STATE_HOME": str(mine.path),
        "OMP_NUM_THREADS": "1",
    }

    def task(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "trak_dist.task", str(run_dir), *arguments],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )

    ended = task("featurize")
    assert ended.returncode == 1
    assert "a problem that you have not planned" in ended.stderr
    assert not imported()
    assert task("featurize", "--trust").returncode == 0
    assert imported()
    assert task("kernel").returncode == 0
    assert not imported()


def test_a_file_is_found_as_import_finds_it_and_nothing_runs(tmp_path: Path) -> None:
    for name in ("pkg_a/__init__.py", "pkg_a/inner.py", "space/deep/inner.py", "pkg_a/sub/x.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("raise SystemExit('run')\n")
    root, before = str(tmp_path), [*sys.path]
    assert trust.find("pkg_a.inner.problem", root) == tmp_path / "pkg_a/inner.py"
    assert trust.find("pkg_a.problem", root) == tmp_path / "pkg_a/__init__.py"
    assert trust.find("pkg_a.sub.x.problem", root) == tmp_path / "pkg_a/sub/x.py"
    assert trust.find("space.deep.inner.problem", root) == tmp_path / "space/deep/inner.py"
    assert trust.find("tiny.problem", root) == Path(tiny.__file__)
    for missing in (
        "space.deep.problem",
        "..problem",
        "problem",
        "a\0b.problem",
        "pkg_a.none.problem",
        "none.at_all.problem",
        "sys.exit",
    ):
        assert trust.find(missing, root) is None
    assert sys.path == before
    assert not {"pkg_a", "space"} & {*sys.modules}


def settings_of_theirs(theirs: Place, *names: str) -> None:
    calls = f"_target_: {MODULE}.problem"
    for name in names:
        path = theirs.path / "conf" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{calls}\nhydra:\n  callbacks:\n    theirs:\n      {calls}\n")


def test_a_directory_of_settings_runs_nothing_that_is_not_chosen(
    theirs: Place, named: list[str], run_dir: Path, imported: Callable[[], bool]
) -> None:
    theirs(*named, "stage=plan")
    imported()
    settings_of_theirs(
        *(theirs, "config", "problem/mnist", "cluster/local", "hydra/env/default"),
        *("hydra/callbacks/theirs", "hydra/job_logging/none"),
    )
    assert theirs(f"run_dir={run_dir}", "stage=status").code == 0
    assert theirs(f"run_dir={run_dir}", "stage=status", "checkpoints.use=[]", "-m").code == 0
    assert not imported()


@pytest.mark.parametrize("name", ["hydra/config", "hydra/launcher/basic", "hydra/sweeper/basic"])
def test_a_directory_of_settings_adds_nothing_to_what_was_typed(theirs: Place, name: str) -> None:
    settings_of_theirs(theirs, name)
    ended = theirs("stage=status", "-m")
    assert ended.code == 2
    assert f"error: {name}.yaml would be read although nothing selects it\n" in ended.err
    ended = theirs("stage=status", "run_dir=none", "hydra.searchpath=[]")
    assert "there is no run here" in ended.err


def test_what_a_run_directory_says_moves_no_cursor(
    theirs: Place, mine: Place, named: list[str], run_dir: Path
) -> None:
    assert theirs(*named, "stage=featurize").code == 0
    run = Run.open(run_dir)
    cell = next(iter(of_stage(run.plan, "reduce")))
    path = run.layout.failure(run.plan, cell)
    path.parent.mkdir(parents=True)
    failure = {"cell": cell.id, "key": cell.key(run.plan), "error": "a\x1b]0;title\x07b\rc"}
    path.write_text(json.dumps({**failure, "traceback": "", "expected": True, "job": {}}))
    ended = mine(f"run_dir={run_dir}", "stage=status")
    assert "  a\\x1b]0;title\\x07b" in ended.out
    assert "\x1b" not in ended.out
    assert "\r" not in ended.out


def test_repairing_writes_nothing_where_a_link_leads(
    theirs: Place, mine: Place, named: list[str], run_dir: Path
) -> None:
    assert theirs(*named, "stage=featurize").code == 0
    outside = mine.path / "precious"
    (run_dir / "receipts").rename(outside)
    (run_dir / "receipts").symlink_to(outside)
    for chunk in (run_dir / "store.zarr").rglob("c/0/0"):
        chunk.unlink()
    before = files(outside)
    ended = mine(f"run_dir={run_dir}", "stage=verify", "repair=true")
    assert ended.code == 2
    assert f"the receipts lie outside of the run directory, in {outside}" in ended.err
    assert files(outside) == before


def test_traker_executes_no_problem_that_somebody_else_planned(
    theirs: Place, mine: Place, named: list[str], run_dir: Path, imported: Callable[[], bool]
) -> None:
    settings = "featurize.dtype=float32", "reduce.lambda_unit=absolute", "reduce.lambda_reg=0.5"
    assert theirs(*named, *settings, "stage=plan").code == 0
    assert asks(mine(f"run_dir={run_dir}"))  # as me from here on
    imported()
    fed = TRAKer(tiny.net(), "image_classification", 50, run_dir, device="cpu")
    fed.load_checkpoint(tiny.state(0), model_id=0)
    rows = tiny.Rows(50, seed=1)
    fed.featurize((rows.features, rows.labels), num_samples=50)
    with pytest.raises(UntrustedProblem, match="a problem that you have not planned"):
        fed.finalize_features(model_ids=[0])
    assert not imported()
