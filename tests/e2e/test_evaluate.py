"""`stage=evaluate` against an LDS recomputed in float64, and ground truths that are brought."""

from __future__ import annotations

import base64
import gc
import hashlib
import json
import pickle
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import tiny
import tiny_trained
import torch
import zarr
from command_result import Ended
from scipy import stats
from torch.utils.data import Subset

from trak_dist import open_run
from trak_dist.evaluation.datamodeling import LAMBDAS
from trak_dist.launch import main
from trak_dist.ops import lds
from trak_dist.stages import report

pytestmark = pytest.mark.slow

OWN = 11  # this run's λ is the one at this place of the curves
SUBSETS, SEEDS, TARGETS, ROWS, DIM = 8, 2, 6, 24, 128
MODULE = ("problem._target_=tiny_trained.problem", "cluster=debug", "targets=val")
SPEC = (
    *(*MODULE, f"reduce.lambda_reg={LAMBDAS[OWN]}", "featurize.dtype=float32"),
    *("featurize.batch_rows=4", "featurize.cell_rows=8"),
)
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three checkpoints with a ground truth of eight subsets, two seeds each."""
    root = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lds, "RESAMPLES", 199)
        truth = (f"ground_truth.subsets={SUBSETS}", f"ground_truth.seeds={SEEDS}")
        given = [*SPEC, *truth, f"run_dir={root}", f"proj_dim={DIM}", "checkpoints.train=3"]
        patch.setattr("sys.argv", ["trak-dist", *given])
        main()
    return root


@pytest.fixture
def command(
    launch: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Ended]:
    """A command on `tmp_path / "run"`, as if in a fresh process; its pictures are stand-ins."""
    monkeypatch.setattr(lds, "RESAMPLES", 199)
    monkeypatch.setattr(report, "lds_picture", lambda found, title: PNG)

    def run(*overrides: str) -> Ended:
        return launch(*overrides, f"run_dir={tmp_path / 'run'}")

    return run


def evaluation(run_dir: Path, targets: str = "val") -> dict[str, Any]:
    return json.loads((run_dir / f"report/{targets}.json").read_bytes())


def retrained_margins(masks: np.ndarray) -> np.ndarray:
    """(subsets, seeds, targets) float64: models trained here, their outputs by the oracle."""
    torch.set_num_threads(1)
    problem = tiny_trained.problem()
    targets = [problem.targets["val"][row] for row in range(TARGETS)]
    margins = np.empty((SUBSETS, SEEDS, TARGETS))
    for subset, seed in np.ndindex(SUBSETS, SEEDS):
        name = repr((1, "retrain", str(subset), seed)).encode()
        digest = hashlib.blake2b(name, digest_size=8).digest()
        seeded = int.from_bytes(digest, "little") % 2**31
        rows = Subset(problem.train, np.flatnonzero(masks[subset]).tolist())
        state = tiny_trained.train_checkpoint(rows, seeded, torch.device("cpu"))
        net = tiny.net()
        net.load_state_dict(state)
        net = net.double()
        with torch.no_grad():
            margins[subset, seed] = [
                float(oracle.margin_and_out_to_loss(net(x.double()[None])[0], int(y))[0])
                for x, y in targets
            ]
    return margins


@pytest.fixture(scope="module")
def truth(made: Path) -> tuple[np.ndarray, np.ndarray]:
    """Masks as published, and margins (subsets, seeds, targets) of models trained here."""
    masks = np.load(made / "ground_truth/masks.npy")
    return masks, retrained_margins(masks)


def lds_of(scores: np.ndarray, masks: np.ndarray, margins: np.ndarray) -> list[float]:
    predicted = masks.astype(np.float64) @ scores.astype(np.float64)
    pairs = zip(predicted.T, margins.T, strict=True)
    return [float(stats.spearmanr(a, b).statistic) for a, b in pairs]


# Against the oracle -----------------------------------------------------------------------------


def test_the_lds_is_that_of_an_oracle_in_float64(made: Path, truth) -> None:
    masks, margins = truth
    wanted = lds_of(open_run(made).scores("val"), masks, margins.mean(axis=1))
    found = evaluation(made)
    np.testing.assert_allclose(found["lds_per_target"], wanted, atol=5.1e-5)  # four digits
    assert found["lds"]["mean"] == pytest.approx(np.mean(wanted), abs=1e-12)
    assert found["lds"]["low"] < found["lds"]["mean"] < found["lds"]["high"]
    assert found["lds"]["mean"] > 0.5  # the scores do predict retraining
    counts = [found[name] for name in ("targets", "model_ids", "subsets", "seeds", "share")]
    assert counts == ["val", [0, 1, 2], SUBSETS, SEEDS, 0.5]


def test_what_is_shown_are_sums_of_scores_and_mean_margins(made: Path, truth) -> None:
    masks, margins = truth
    scores = open_run(made).scores("val").astype(np.float64)
    shown = evaluation(made)["shown"]
    assert [one["target"] for one in shown] == [0, 2, 3, 5]
    for one in shown:
        target = one["target"]
        np.testing.assert_allclose(one["predicted"], masks @ scores[:, target], rtol=1e-9)
        wanted = margins.mean(axis=1)[:, target]
        np.testing.assert_allclose(one["margins"], wanted, rtol=1e-5, atol=1e-5)
        assert one["lds"] == pytest.approx(evaluation(made)["lds_per_target"][target], abs=1e-4)


def test_the_reliability_is_that_of_either_seed(made: Path, truth) -> None:
    _, margins = truth
    pairs = zip(margins[:, 0].T, margins[:, 1].T, strict=True)
    halves = np.mean([stats.spearmanr(a, b).statistic for a, b in pairs])
    found = evaluation(made)["reliability"]
    assert found["halves"]["mean"] == pytest.approx(halves)
    assert found["of_mean"] == pytest.approx(2 * halves / (1 + halves))
    assert found["bound"] == pytest.approx(found["of_mean"] ** 0.5)


def whole(found: dict[str, Any]) -> dict[str, Any]:
    return next(c for c in found["curves"] if (c["checkpoints"], c["proj_dim"]) == (3, DIM))


def test_the_curve_at_the_runs_own_lambda_is_the_lds_of_its_scores(made: Path) -> None:
    found = evaluation(made)
    assert found["lambdas"] == list(LAMBDAS)
    assert found["own_lambda"] == pytest.approx([LAMBDAS[OWN]] * 3, rel=1e-9)
    at_own = whole(found)["by_lambda"][OWN]
    assert at_own == pytest.approx(found["lds"], abs=1e-3)
    sizes = [(c["checkpoints"], c["proj_dim"]) for c in found["curves"]]
    assert sizes == [(1, DIM), (2, DIM), (3, DIM), (3, DIM // 2)]


def test_lambda_is_chosen_from_the_curve_of_the_whole_ensemble(made: Path) -> None:
    found, curve = evaluation(made), whole(evaluation(made))
    assert found["chosen"] == {"lds": curve["chosen"], "lambdas": curve["chosen_lambdas"]}
    assert set(curve["chosen_lambdas"]) <= set(LAMBDAS)
    assert curve["chosen"]["low"] <= curve["chosen"]["mean"] <= curve["chosen"]["high"]


# Brought, and smaller runs ------------------------------------------------------------------------


@pytest.fixture
def bring(made: Path, tmp_path: Path) -> Callable[..., tuple[str, str]]:
    """The overrides that bring the made run's own ground truth, or another one."""

    def files(masks: Any = None, margins: Any = None) -> tuple[str, str]:
        masks_file, margins_file = tmp_path / "masks.npy", tmp_path / "margins.npy"
        if masks is None:
            shutil.copy(made / "ground_truth/masks.npy", masks_file)
        else:
            np.save(masks_file, masks)
        np.save(margins_file, own_margins(made) if margins is None else margins)
        return f"ground_truth.masks={masks_file}", f"ground_truth.margins={margins_file}"

    return files


def own_margins(run_dir: Path) -> np.ndarray:
    store = run_dir / "store.zarr/ground_truth/margins/val"
    seeds = [np.asarray(zarr.open_array(store / str(s), mode="r")[:]) for s in range(SEEDS)]
    return np.mean(np.array(seeds, np.float64), axis=0)


def test_a_trained_ground_truth_brought_to_another_run_gives_the_same_lds(
    made: Path, command, bring, tmp_path: Path
) -> None:
    given = (*SPEC, f"proj_dim={DIM}", "checkpoints.train=3", *bring())
    ended = command(*given)
    assert ended.code == 0, ended.err
    assert f"ground truth: {SUBSETS} subsets, margins of 'val'\n" in ended.out
    assert "transposed" not in ended.out
    found, wanted = evaluation(tmp_path / "run"), evaluation(made)
    for name in ("lds", "lds_per_target", "curves", "chosen", "shown", "subsets", "share"):
        assert found[name] == wanted[name], name
    assert (found["seeds"], found["reliability"]) == (1, None)
    assert {p.name for p in (tmp_path / "run/checkpoints").iterdir()} == {"full"}
    assert not list((tmp_path / "run/receipts").glob("margins/*"))


def test_the_curve_of_one_checkpoint_is_that_of_a_run_of_one(
    made: Path, command, bring, tmp_path: Path
) -> None:
    given = (*SPEC, f"proj_dim={DIM}", "checkpoints.train=1")
    assert command(*given, *bring()).code == 0
    found, wanted = evaluation(tmp_path / "run"), evaluation(made)
    of_one = wanted["curves"][0]
    assert found["curves"][0] == of_one
    assert found["lds"] == pytest.approx(of_one["by_lambda"][OWN], abs=1e-3)


def test_the_curve_of_a_smaller_dimension_is_that_of_a_run_folded_to_it(
    made: Path, command, bring, tmp_path: Path
) -> None:
    given = (f"proj_dim={DIM // 2}", f"store_dim={DIM}", "checkpoints.train=3")
    assert command(*SPEC, *given, *bring()).code == 0
    found = evaluation(tmp_path / "run")
    (smaller,) = (c for c in evaluation(made)["curves"] if c["proj_dim"] == DIM // 2)
    (own,) = (c for c in found["curves"] if c["checkpoints"] == 3)
    assert own["proj_dim"] == DIM // 2
    for name in ("mean", "low", "high"):
        ours, theirs = ([i[name] for i in c["by_lambda"]] for c in (own, smaller))
        np.testing.assert_allclose(ours, theirs, atol=1e-3)
    assert found["lds"] == pytest.approx(smaller["by_lambda"][OWN], abs=1e-3)


def test_files_with_a_column_per_subset_are_read_transposed_and_said_so(
    made: Path, command, bring, tmp_path: Path
) -> None:
    small = (*SPEC, "proj_dim=16", "checkpoints.train=1")
    masks = np.load(made / "ground_truth/masks.npy")
    ended = command(*small, *bring(masks.T.astype(np.float32), own_margins(made).T))
    assert ended.code == 0, ended.err
    for what in ("masks", "margins"):
        assert f"ground truth: {what} have a column per subset, read transposed\n" in ended.out
    turned = evaluation(tmp_path / "run")
    assert command(*bring()).code == 0  # the same ground truth, the usual way round
    assert evaluation(tmp_path / "run") == turned


PLANNED = (*MODULE, "stage=plan", "proj_dim=16", "checkpoints.train=1")
RANDOM = np.random.default_rng(0)
MASKS, MARGINS = RANDOM.integers(0, 2, (SUBSETS, ROWS)), RANDOM.normal(size=(SUBSETS, TARGETS))
TAIL = "  next:  a run with targets=… of the one set that the margins are of\n"
NO_NUMBERS = "masks must hold 0 and 1, or False and True, margins finite numbers\n"


def with_value(array: np.ndarray, value: float) -> np.ndarray:
    changed = array.astype(np.float64)
    changed[1, 2] = value
    return changed


@pytest.mark.parametrize(
    ("masks", "margins", "said"),
    [
        (
            *(MASKS, RANDOM.normal(size=(SUBSETS, TARGETS + 1))),
            (
                "the ground truth fits no target set: masks (8, 24), margins (8, 7), 8 subsets, "
                f"target sets val 6\n  where: {{files}}\n{TAIL}"
            ),
        ),
        (
            *(MASKS, MARGINS[:-1]),
            (
                "the ground truth fits no target set: masks (8, 24), margins (7, 6), 8 subsets, "
                f"target sets val 6\n  where: {{files}}\n{TAIL}"
            ),
        ),
        (
            *(MASKS[:, 1:], MARGINS),
            (
                "the ground truth does not fit: masks (8, 23), margins (8, 6); wanted "
                "(subsets, 24) and (subsets, targets)\n  where: {files}\n"
                "  next:  masks over the rows of the train set that the run uses\n"
            ),
        ),
        (
            *(MASKS, MARGINS[:, 0]),
            ("the ground truth does not fit: masks (8, 24), margins (8,); wanted (subsets, 24)"),
        ),
        (with_value(MASKS, 2), MARGINS, f"{NO_NUMBERS}  where: {{files}}\n"),
        (with_value(MASKS, 0.5), MARGINS, NO_NUMBERS),
        (with_value(MASKS, np.nan), MARGINS, NO_NUMBERS),
        (MASKS, with_value(MARGINS, np.nan), NO_NUMBERS),
        (MASKS, with_value(MARGINS, np.inf), NO_NUMBERS),
        (MASKS[:2], MARGINS[:2], "2 subsets are too few for a correlation\n"),
        (
            *(MASKS, MARGINS.astype(str)),
            (
                "not one array of numbers: <U32\n  where: {margins}\n"
                "  next:  numpy.save a plain array\n"
            ),
        ),
    ],
    ids=[
        *("targets", "subsets", "rows", "vector", "mask-2", "mask-half", "mask-nan"),
        *("nan", "inf", "few", "text"),
    ],
)
def test_files_that_do_not_fit_are_refused_before_anything_is_planned(
    command, bring, tmp_path: Path, masks, margins, said: str
) -> None:
    ended = command(*PLANNED, *bring(masks, margins))
    files = f"{tmp_path / 'masks.npy'}, {tmp_path / 'margins.npy'}"
    assert ended.code == 2
    assert "error: " + said.format(files=files, margins=tmp_path / "margins.npy") in ended.err
    assert not (tmp_path / "run/plan.json").exists()


def test_margins_that_fit_several_target_sets_are_refused(command, bring) -> None:
    ended = command(*PLANNED, "targets=all", f"+problem.extra={TARGETS}", *bring(MASKS, MARGINS))
    assert ended.code == 2
    assert (
        "error: the ground truth fits several target sets: masks (8, 24), margins (8, 6), "
        "8 subsets, target sets val 6, test 6\n"
    ) in ended.err
    assert TAIL in ended.err


class Attack:
    """Leaves a trace if it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self._path,)


@pytest.mark.parametrize("way", ["object array", "pickle", "text", "empty", "zip", "missing"])
def test_what_is_no_plain_array_is_refused_and_not_unpickled(
    command, bring, tmp_path: Path, way: str
) -> None:
    given, file = bring(MASKS, MARGINS), tmp_path / "margins.npy"
    attack = Attack(tmp_path / "touched")
    if way == "object array":
        np.save(file, np.array([[attack] * TARGETS] * SUBSETS, dtype=object), allow_pickle=True)
    elif way == "zip":
        np.savez(tmp_path / "margins.npz", MARGINS)
        shutil.move(tmp_path / "margins.npz", file)
    elif way == "missing":
        file.unlink()
    else:
        file.write_bytes({"pickle": pickle.dumps(attack), "text": b"1 2 3"}.get(way, b""))
    ended = command(*PLANNED, *given)
    assert ended.code == 2
    what = "not one array of numbers: NpzFile" if way == "zip" else "not a readable array: "
    assert ended.err.startswith(f"error: {what}")
    hint = "see that it is there" if way == "missing" else "numpy.save a plain array\n"
    assert f"  where: {file}\n  next:  {hint}" in ended.err
    assert not (tmp_path / "touched").exists()
    assert not (tmp_path / "run/plan.json").exists()


def test_a_zip_cut_short_is_refused_like_any_other_garbage(command, bring, tmp_path) -> None:
    given = bring(MASKS, MARGINS)
    (tmp_path / "margins.npy").write_bytes(b"PK\x03\x04 and no more")
    ended = command(*PLANNED, *given)
    gc.collect()  # a file left open belongs to this test
    assert ended.err.startswith("error: not a readable array: ")


def test_files_that_changed_since_planning_are_refused_until_they_are_brought_again(
    command, bring, tmp_path: Path
) -> None:
    small = (*MODULE, "proj_dim=16", "checkpoints.train=1")
    assert command(*small, *bring(MASKS, MARGINS), "stage=plan").code == 0
    then = json.loads((tmp_path / "run/plan.json").read_bytes())["truth_files"]
    given = bring(MASKS, with_value(MARGINS, 7.0))
    ended = command(*MODULE)
    assert ended.code == 1
    found = re.search(
        r"the ground truth changed since planning: digest (\w+) then, (\w+) now\n"
        r"  where: (.*)\n  next:  restore the files, or use another run_dir\n",
        ended.err,
    )
    assert found
    assert (found[1], found[3]) == (then, str(tmp_path / "margins.npy"))
    assert found[2] != then
    assert command(*MODULE, *given).code == 0
    assert "lds" in evaluation(tmp_path / "run")


def test_a_target_set_of_as_many_rows_may_join_a_run_with_imported_margins(
    command, bring, tmp_path: Path
) -> None:
    small = ("proj_dim=16", "checkpoints.train=1", f"+problem.extra={TARGETS}")
    assert command(*MODULE, *small, *bring(MASKS, MARGINS)).code == 0
    ended = command("cluster=debug", "targets=test")
    assert ended.code == 0, ended.err
    assert not (tmp_path / "run/report/test.json").exists()


def test_a_target_set_without_margins_has_a_report_without_an_lds(
    command, bring, tmp_path: Path
) -> None:
    small = ("problem._target_=tiny_trained.problem", "cluster=debug", "proj_dim=16")
    ended = command(*small, "checkpoints.train=1", *bring(MASKS, MARGINS))
    assert ended.code == 0, ended.err
    assert "lds" in evaluation(tmp_path / "run", "val")
    assert not (tmp_path / "run/report/test.json").exists()
    assert [line.split()[1] for line in ended.out.splitlines() if line.startswith("LDS:")] == [
        "val"
    ]
    assert "LDS" not in (tmp_path / "run/report/test.html").read_text()
    assert not (tmp_path / "run/report/test.lds.png").exists()


def test_a_target_with_constant_margins_is_left_out_and_that_is_reported(
    command, bring, tmp_path: Path
) -> None:
    margins = MARGINS.copy()
    margins[:, 4] = 1.5
    ended = command(*MODULE, "proj_dim=16", "checkpoints.train=1", *bring(MASKS, margins))
    assert ended.code == 0, ended.err
    assert ended.out.splitlines()[-1].endswith("; 1 constant targets left out")
    (page,) = tmp_path.rglob("report/val.json")
    found = json.loads(page.read_bytes())
    assert found["lds_targets"] == [0, 1, 2, 3, 5] and len(found["lds_per_target"]) == 5
    assert found["left_out"] == 1


# Report, and what is said ---------------------------------------------------------------------


class Page(HTMLParser):
    """The cells of a page's tables, row by row, and its pictures' descriptions."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.pictures: list[str] = []
        self._open = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._open = True
        if tag == "img":
            self.pictures.append(dict(attrs)["alt"])

    def handle_endtag(self, tag: str) -> None:
        self._open = self._open and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._open:
            self.rows[-1][-1] += data


def shown(found: dict[str, float]) -> str:
    return f"{found['mean']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def test_the_page_holds_the_lds_and_its_picture(made: Path) -> None:
    found, text = evaluation(made), (made / "report/val.html").read_text()
    page = Page(text)
    table = {row[0]: row[1] for row in page.rows if len(row) == 2}
    assert table["LDS of these scores, mean over targets [95 %]"] == shown(found["lds"])
    (chosen,) = (v for k, v in table.items() if k.startswith("LDS with λ chosen on other targets"))
    assert chosen == shown(found["chosen"]["lds"])
    assert table["ground truth"] == "8 subsets of 50 %, 2 models each"
    (bound,) = (v for k, v in table.items() if k.startswith("agreement between halves"))
    reliable = found["reliability"]
    assert bound == f"{shown(reliable['halves'])}; {reliable['bound']:.3f}"
    assert len(page.pictures) == 1
    assert page.pictures[0].startswith("LDS against λ, checkpoints and dimension")
    picture = (made / "report/val.lds.png").read_bytes()
    assert picture.startswith(PNG)
    assert len(picture) > 10_000
    assert base64.b64encode(picture).decode() in text


def test_the_last_lines_of_a_command_say_the_lds(made: Path, command, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "run")
    ended = command("cluster=debug")
    found = evaluation(made)
    assert ended.code == 0, ended.err
    assert ended.out.endswith(
        f"LDS:    val {shown(found['lds'])} (95 %), with λ chosen on other targets "
        f"{shown(found['chosen']['lds'])}\n"
    )
    assert f"report: {tmp_path / 'run/report/val.lds.png'}\n" in ended.out


def test_without_a_ground_truth_nothing_is_said_of_any(command, tmp_path: Path) -> None:
    ended = command(*MODULE, "proj_dim=16", "checkpoints.train=1")
    assert ended.code == 0, ended.err
    assert "LDS" not in ended.out
    assert "evaluate: nothing to do, the problem provides its checkpoints" not in ended.out
    asked = command("stage=evaluate", "cluster=debug")
    assert asked.code == 2
    assert "error: there is no ground truth to compare the scores with\n" in asked.err
    assert {p.name for p in (tmp_path / "run/report").iterdir()} == {"val.html"}
    assert "LDS" not in (tmp_path / "run/report/val.html").read_text()
    assert not (tmp_path / "run/ground_truth").exists()
    assert not (tmp_path / "run/receipts/evaluate").exists()
    assert open_run(tmp_path / "run").receipts("evaluate") == {}
    last = command("stage=status", "cluster=debug").out.splitlines()[-1]
    wanted = {"done": 0, "total": 0, "failed": 0, "running": 0, "queued": 0}
    assert json.loads(last)["stage"]["evaluate"] == wanted
    assert json.loads(last)["complete"]


def test_a_ground_truth_may_join_a_finished_run(command, bring, tmp_path: Path) -> None:
    assert command(*MODULE, "proj_dim=16", "checkpoints.train=1").code == 0
    before = open_run(tmp_path / "run")
    old = {s: before.receipts(s) for s in ("train", "featurize", "reduce")}
    ended = command("cluster=debug", *bring(MASKS, MARGINS))
    assert ended.code == 0, ended.err
    after = open_run(tmp_path / "run")
    assert {s: after.receipts(s) for s in old} == old
    assert "LDS:    val " in ended.out
    assert "LDS of these scores" in (tmp_path / "run/report/val.html").read_text()


def test_the_figures_of_a_single_target_are_json(command, bring, tmp_path: Path) -> None:
    given = (*MODULE, "proj_dim=16", "checkpoints.train=1", "+problem.targets=1")
    assert command(*given, *bring(MASKS, MARGINS[:, :1])).code == 0

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    text = (tmp_path / "run/report/val.json").read_text()
    assert json.loads(text, parse_constant=refuse)["lds"]["mean"] <= 1


def test_a_imported_ground_truth_may_be_taken_away(command, bring, tmp_path: Path) -> None:
    small = ("proj_dim=16", "checkpoints.train=1")
    assert command(*MODULE, *small, *bring(MASKS, MARGINS)).code == 0
    ended = command("cluster=debug", "ground_truth.masks=''", "ground_truth.margins=''")
    assert ended.code == 0, ended.err
    assert "LDS" not in ended.out
    assert "LDS" not in (tmp_path / "run/report/val.html").read_text()
