"""Models retrained on subsets: what they are, that nothing is made twice, and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import oracle
import pytest
import safetensors.torch
import tiny
import tiny_trained
import torch
from command_result import Ended
from killing import Killed, kill_at
from torch.utils.data import Subset

from trak_dist.cells import of_stage, parse_cell
from trak_dist.launch import main
from trak_dist.ops import draws, lds
from trak_dist.stages import report
from trak_dist.store import atomic, contents
from trak_dist.store.receipts import Receipts
from trak_dist.store.run import Run

pytestmark = pytest.mark.slow

SUBSETS, SEEDS, ROWS = 5, 2, 24
TRUTH = (f"ground_truth.subsets={SUBSETS}", f"ground_truth.seeds={SEEDS}")
MODELS = [(subset, seed) for subset in range(SUBSETS) for seed in range(SEEDS)]


def spec(run_dir: Path) -> list[str]:
    return [
        *("problem._target_=tiny_trained.problem", f"run_dir={run_dir}", "cluster=debug"),
        *("proj_dim=16", "featurize.batch_rows=4", "featurize.cell_rows=8"),
    ]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Intervals and pictures are tested elsewhere."""
    monkeypatch.setattr(lds, "RESAMPLES", 49)
    monkeypatch.setattr(report, "lds_picture", lambda found, title: b"picture")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of one checkpoint, as planned and undisturbed to its end, with a ground truth."""
    root = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lds, "RESAMPLES", 49)
        patch.setattr(report, "lds_picture", lambda found, title: b"picture")
        runs = {}
        for stage in ("plan", "all"):
            given = [*spec(root / "run"), *TRUTH, "targets=val", "checkpoints.train=1"]
            patch.setattr("sys.argv", ["trak-dist", *given, f"stage={stage}"])
            main()
            runs[stage] = shutil.copytree(root / "run", root / stage)
    return runs


@pytest.fixture
def command(launch: Callable[..., Ended], tmp_path: Path) -> Callable[..., Ended]:
    """A command on `tmp_path / "run"`, as if in a fresh process."""

    def run(*overrides: str) -> Ended:
        return launch(*overrides, f"run_dir={tmp_path / 'run'}", "cluster=debug")

    return run


def fork(template: Path, tmp_path: Path) -> Run:
    return Run.open(shutil.copytree(template, tmp_path / "run"))


def made_files(run_dir: Path) -> dict[str, bytes]:
    """Every checkpoint and every chunk of margins, by path."""
    chunks = (run_dir / "store.zarr/ground_truth").rglob("c/*/*")
    files = [*(run_dir / "checkpoints").rglob("*.safetensors"), *chunks]
    return {str(f.relative_to(run_dir)): f.read_bytes() for f in files if f.is_file()}


def margins(run_dir: Path, subset: int, seed: int, targets: str = "val") -> np.ndarray:
    run = Run.open(run_dir)
    return contents.read(run, parse_cell(f"margins/{subset}/{seed}/{targets}"), "margins")[0]


def seed_of(subset: int, seed: int) -> int:
    """What a retrained model is seeded with: no other model of the run has the same."""
    name = repr((1, "retrain", str(subset), seed)).encode()
    digest = hashlib.blake2b(name, digest_size=8).digest()
    return int.from_bytes(digest, "little") % 2**31


# What is made ---------------------------------------------------------------------------------


def test_each_model_is_what_training_gives_on_the_rows_of_its_mask(made) -> None:
    torch.set_num_threads(1)
    problem = tiny_trained.problem()
    masks = np.load(made["all"] / "ground_truth/masks.npy")
    assert (masks.shape, masks.dtype) == ((SUBSETS, ROWS), bool)
    assert (masks.sum(axis=1) == ROWS // 2).all()
    for subset, seed in MODELS:
        rows = np.flatnonzero(masks[subset])
        assert rows.tolist() == draws.subset(subset, ROWS, 0.5).tolist()
        chosen = Subset(problem.train, rows.tolist())
        wanted = tiny_trained.train_checkpoint(chosen, seed_of(subset, seed), torch.device("cpu"))
        file = made["all"] / f"checkpoints/{subset}/{seed}.safetensors"
        found = safetensors.torch.load_file(file)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    seeds = {0, *(seed_of(*model) for model in MODELS)}
    assert len(seeds) == len(MODELS) + 1


def test_margins_are_the_model_outputs_of_the_retrained_models(made) -> None:
    targets = tiny_trained.problem().targets["val"]
    for subset, seed in MODELS:
        net = tiny.net().double()
        file = made["all"] / f"checkpoints/{subset}/{seed}.safetensors"
        net.load_state_dict(safetensors.torch.load_file(file))
        examples = [targets[row] for row in range(len(targets))]
        with torch.no_grad():
            wanted = [
                float(oracle.margin_and_out_to_loss(net(x.double()[None])[0], int(y))[0])
                for x, y in examples
            ]
        found = margins(made["all"], subset, seed)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_the_ensemble_is_trained_on_all_rows_from_seeds_of_its_own(made) -> None:
    torch.set_num_threads(1)
    wanted = tiny_trained.train_checkpoint(tiny_trained.problem().train, 0, torch.device("cpu"))
    found = safetensors.torch.load_file(made["all"] / "checkpoints/full/0.safetensors")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_limit_and_alpha_say_which_rows_there_are_to_choose_from(command, tmp_path: Path) -> None:
    given = [*spec(tmp_path / "run"), "limit=15", "ground_truth.alpha=0.3"]
    assert command(*given, "ground_truth.subsets=4", "stage=plan").code == 0
    masks = np.load(tmp_path / "run/ground_truth/masks.npy")
    assert masks.shape == (4, 15)
    assert masks.sum(axis=1).tolist() == [round(0.3 * 15)] * 4


# Killed, damaged ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "death",
    [
        pytest.param((contents, "write", 4), id="margins"),
        pytest.param((Receipts, "publish", 8), id="receipt", marks=pytest.mark.slow),
        pytest.param((atomic, "write", 9), id="file", marks=pytest.mark.slow),
    ],
)
def test_killed_amid_retraining_the_same_command_makes_what_is_missing_to_the_same_bytes(
    made, tmp_path: Path, command, attempts: list[str], death: tuple
) -> None:
    run = fork(made["plan"], tmp_path)
    owner, name, at = death
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, at, (owner, name))
        with pytest.raises(Killed):
            command("stage=train")
    cells = list(of_stage(run.plan, "train"))
    left = {c.id for c in cells} - {c.id for c in run.receipts.done(cells)}
    assert 5 < len(left) < len(cells)
    attempts.clear()
    assert command("stage=train").code == 0
    assert sorted(attempts) == sorted(left)
    assert made_files(tmp_path / "run") == made_files(made["all"])


def test_a_killed_run_ends_with_the_evaluation_of_one_that_nothing_happened_to(
    made, tmp_path: Path, command, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork(made["plan"], tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_trained, "train_checkpoint", _killed_at(seed_of(2, 1)))
        with pytest.raises(Killed):
            command()
    assert command().code == 0
    assert made_files(tmp_path / "run") == made_files(made["all"])
    found, wanted = (d / "report/val.json" for d in (tmp_path / "run", made["all"]))
    assert found.read_bytes() == wanted.read_bytes()


def _killed_at(seed_to_die: int) -> Callable[..., object]:
    real = tiny_trained.train_checkpoint

    def train_checkpoint(dataset, seed: int, device) -> object:
        if seed == seed_to_die:
            raise Killed
        return real(dataset, seed, device)

    return train_checkpoint


def test_lost_receipts_cost_their_own_cells_alone(
    made, tmp_path: Path, command, attempts: list[str]
) -> None:
    fork(made["all"], tmp_path)
    before = made_files(tmp_path / "run")
    for name in ("train/train_3_1", "margins/margins_1_0_val"):
        (tmp_path / f"run/receipts/{name}.json").unlink()
    assert command().code == 0
    assert sorted(attempts) == ["margins/1/0/val", "train/3/1"]
    assert made_files(tmp_path / "run") == before


def test_damaged_margins_are_found_and_repaired(made, tmp_path: Path, command, attempts) -> None:
    fork(made["all"], tmp_path)
    before = made_files(tmp_path / "run")
    (tmp_path / "run/store.zarr/ground_truth/margins/val/1/c/2/0").unlink()
    found = command("stage=verify", "repair=true")
    assert "damaged margins/2/1/val: margins: " in found.out
    assert command().code == 0
    assert attempts == ["margins/2/1/val"]
    assert made_files(tmp_path / "run") == before


def test_the_evaluation_of_margins_lost_since_names_their_cell(
    made, tmp_path: Path, command
) -> None:
    fork(made["all"], tmp_path)
    (tmp_path / "run/store.zarr/ground_truth/margins/val/1/c/2/0").unlink()
    (tmp_path / "run/receipts/evaluate/evaluate_val.json").unlink()
    ended = command()
    assert ended.code == 1
    assert "margins of margins/2/1/val is damaged: a chunk is missing" in ended.err


# Grown ----------------------------------------------------------------------------------------


def test_more_subsets_and_seeds_cost_their_own_models_alone(
    made, tmp_path: Path, command, attempts: list[str]
) -> None:
    fork(made["all"], tmp_path)
    before = made_files(tmp_path / "run")
    masks = np.load(tmp_path / "run/ground_truth/masks.npy")
    ended = command(f"ground_truth.subsets={SUBSETS + 2}", f"ground_truth.seeds={SEEDS + 1}")
    assert ended.code == 0, ended.err
    models = {f"{s}/{m}" for s in range(SUBSETS + 2) for m in range(SEEDS + 1)}
    new = models - {f"{s}/{m}" for s, m in MODELS}
    assert sorted(attempts) == sorted(
        [
            *(f"train/{m}" for m in new),
            *(f"margins/{m}/val" for m in new),
            *("evaluate/val", "report/val"),
        ]
    )
    after = made_files(tmp_path / "run")
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 2 * len(new)
    grown = np.load(tmp_path / "run/ground_truth/masks.npy")
    np.testing.assert_array_equal(grown[:SUBSETS], masks)
    assert grown.shape == (SUBSETS + 2, ROWS)
    found = json.loads((tmp_path / "run/report/val.json").read_bytes())
    assert (found["subsets"], found["seeds"]) == (SUBSETS + 2, SEEDS + 1)
    attempts.clear()
    assert command().code == 0
    assert attempts == []


REFUSED = (
    "error: the run has another ground truth: 5 subsets, 2 seeds, alpha 0.5, masks ''\n"
    "  where: ground_truth\n"
    "  next:  ground_truth.alpha=0.5 and no masks, or use another run_dir\n"
)


@pytest.mark.parametrize(
    "asked",
    [
        (*TRUTH, "ground_truth.alpha=0.4"),
        ("ground_truth.masks=m.npy", "ground_truth.margins=g.npy"),
    ],
    ids=lambda asked: asked[0] if len(asked) == 1 else asked[-1],
)
def test_another_ground_truth_is_refused(made, tmp_path: Path, command, asked: tuple) -> None:
    run = fork(made["plan"], tmp_path)
    ended = command(*asked)
    assert (ended.code, ended.err) == (2, REFUSED)
    assert Run.open(tmp_path / "run").plan == run.plan


def test_what_of_the_ground_truth_is_not_given_stays(tmp_path: Path, command) -> None:
    first = ("ground_truth.subsets=4", "ground_truth.seeds=2", "ground_truth.alpha=0.3")
    assert command(*spec(tmp_path / "run"), *first, "stage=plan").code == 0
    assert command("ground_truth.subsets=6", "stage=plan").code == 0
    assert command("ground_truth.seeds=3", "stage=plan").code == 0
    truth = Run.open(tmp_path / "run").plan.ground_truth
    assert (truth.subsets, truth.seeds, truth.alpha) == (6, 3, 0.3)


def test_a_target_set_that_joins_costs_its_margins_and_no_training(
    made, tmp_path: Path, command, attempts: list[str]
) -> None:
    fork(made["all"], tmp_path)
    before = made_files(tmp_path / "run")
    ended = command("targets=test")
    assert ended.code == 0, ended.err
    assert not [i for i in attempts if i.startswith("train/") or "val" in i.split("/")]
    wanted = sorted(f"margins/{subset}/{seed}/test" for subset, seed in MODELS)
    assert sorted(i for i in attempts if i.startswith("margins/")) == wanted
    assert attempts[-2:] == ["evaluate/test", "report/test"]
    after = made_files(tmp_path / "run")
    assert {name: after[name] for name in before} == before


# What goes wrong, and what is said --------------------------------------------------------------


def test_non_finite_outputs_of_a_retrained_model_name_its_cell(
    made, tmp_path: Path, command, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fork(made["plan"], tmp_path)
    real = tiny_trained.train_checkpoint

    def diverging(dataset, seed: int, device) -> object:
        state = dict(real(dataset, seed, device))
        if seed == seed_of(3, 1):
            state["2.bias"] = torch.tensor([torch.inf, 0, 0])
        return state

    monkeypatch.setattr(tiny_trained, "train_checkpoint", diverging)
    ended = command()
    assert ended.code == 1
    assert (
        "margins/3/1/val:\nnon-finite model output for 6 of 6 targets of 'val'\n"
        "  where: margins/3/1/val\n"
        "  next:  see that training on a share of the rows converges, and that labels are classes; "
        "ground_truth.seeds or .subsets of what is finished evaluates without this model\n"
    ) in ended.err
    cells = list(of_stage(run.plan, "train"))
    missing = [c.id for c in cells if c not in run.receipts.done(cells)]
    assert missing == ["margins/3/1/val"]


def test_a_stage_says_which_upstream_cells_it_lacks(made, tmp_path: Path, command) -> None:
    fork(made["all"], tmp_path)
    (tmp_path / "run/receipts/margins/margins_1_0_val.json").unlink()
    ended = command("stage=evaluate")
    assert ended.code == 2
    assert "error: stage=evaluate needs train, of which 1 of " in ended.err
    (tmp_path / "run/receipts/evaluate/evaluate_val.json").unlink()
    assert command("stage=train").code == 0
    ended = command("stage=report")
    assert ended.code == 2
    assert "error: stage=report needs evaluate, of which 1 of 1 cells are missing\n" in ended.err
    assert f"  next:  python -m trak_dist.launch stage=evaluate run_dir={tmp_path}" in ended.err


def test_status_counts_retrained_models_and_the_evaluation(made, tmp_path, command) -> None:
    def counted() -> dict:
        return json.loads(command("stage=status").out.splitlines()[-1])

    fork(made["plan"], tmp_path)
    nothing = {"failed": 0, "running": 0, "queued": 0}
    found = counted()
    assert list(found["stage"]) == ["train", "featurize", "reduce", "evaluate", "report"]
    assert found["stage"]["train"] == {"done": 0, "total": 1 + 2 * len(MODELS), **nothing}
    assert found["stage"]["evaluate"] == {"done": 0, "total": 1, **nothing}
    shutil.rmtree(tmp_path / "run")
    fork(made["all"], tmp_path)
    found = counted()
    assert found["stage"]["train"] == {**nothing, "done": 21, "total": 21}
    assert found["stage"]["evaluate"] == {"done": 1, "total": 1, **nothing}
    assert found["complete"]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("ground_truth.subsets=-1",), "ground_truth.subsets: -1 is not a finite number of at"),
        (("ground_truth.seeds=0",), "ground_truth.seeds: 0 is not a finite number of at least 1"),
        ((*TRUTH, "ground_truth.alpha=1"), "ground_truth.alpha: 1.0 is not between 0 and 1"),
        ((*TRUTH, "ground_truth.alpha=0"), "ground_truth.alpha: 0.0 is not between 0 and 1"),
        (("ground_truth.masks=m.npy",), "masks and margins belong together, one of them is"),
        (
            (*TRUTH, "ground_truth.masks=m.npy", "ground_truth.margins=g.npy"),
            "ground_truth: either subsets to train, or masks and margins of trained models",
        ),
    ],
)
def test_settings_that_make_no_ground_truth_are_named(tmp_path, command, asked, said) -> None:
    ended = command(*spec(tmp_path / "run"), *asked)
    assert ended.code == 2
    assert said in ended.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "asked",
    [
        ("ground_truth.subsets=1",),
        ("ground_truth.subsets=2",),
        (*TRUTH, "ground_truth.alpha=0.01"),  # no row
        (*TRUTH, "ground_truth.alpha=0.99"),  # every row
    ],
    ids=lambda asked: asked[-1],
)
def test_a_ground_truth_that_can_tell_nothing_is_refused(tmp_path, command, asked: tuple) -> None:
    assert command(*spec(tmp_path / "run"), *asked, "stage=plan").code == 2


def test_retraining_without_train_checkpoint_is_refused_before_it_is_planned(
    launch, tmp_path: Path
) -> None:
    tiny.write_checkpoints(tmp_path / "checkpoints", 1)
    given = [*spec(tmp_path / "run"), f"+problem.directory={tmp_path / 'checkpoints'}", *TRUTH]
    ended = launch(*given, "problem._target_=tiny.problem", "stage=plan")
    assert ended.code == 2
    assert "train_checkpoint" in ended.err
    assert not (tmp_path / "run/plan.json").exists()
