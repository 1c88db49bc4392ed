"""Every shipped model output through the launcher and through TRAKer, against a float64 loop."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from outputs import CASES, Case, case
from torch.utils.data import default_collate

import trak_dist
from trak_dist.ingest.arguments import TASKS

TARGETS, LAMBDA = 3, 0.3


def member(made: Case, state: dict[str, torch.Tensor]) -> oracle.Member:
    net = copy.deepcopy(made.model).double()
    net.load_state_dict({k: v.double() for k, v in state.items()})
    rows, q = [], []
    for example in made.examples:
        f = made.f(net, example)
        grads = torch.autograd.grad(
            f, [*net.parameters()], allow_unused=True, materialize_grads=True
        )
        rows.append(torch.cat([g.flatten() for g in grads]).numpy())
        alone = f.detach().requires_grad_()
        q.append(-float(torch.autograd.grad(made.loss(alone), alone)[0]))
    x = np.array(rows) / np.sqrt(len(rows[0]))
    return oracle.Member(x, x[:TARGETS], np.array(q))


def states(made: Case) -> list[dict[str, torch.Tensor]]:
    found = []
    for seed in range(2):
        noise = torch.Generator().manual_seed(seed)
        weights = made.model.state_dict()
        found.append(
            {k: v + 0.3 * torch.randn(v.shape, generator=noise) for k, v in weights.items()}
        )
    return found


def wanted(made: Case, unit: str) -> np.ndarray:
    members = [member(made, state) for state in states(made)]
    reduce = {"lambda_reg": LAMBDA, "lambda_unit": unit, "kernel_scale": "mean_abs"}
    return oracle.scores(members, **reduce)[0]


@pytest.mark.parametrize("name", CASES)
def test_scores_of_a_planned_run(name: str, tmp_path: Path) -> None:
    made = case(name)
    paths = []
    for i, state in enumerate(states(made)):
        paths.append(tmp_path / f"{i}.pt")
        torch.save(state, paths[-1])
    problem = trak_dist.Problem(
        model=made.model,
        model_output=made.output,
        train=made.examples,
        targets={"val": made.examples[:TARGETS]},
        checkpoints=paths,
    )
    settings = {
        "projection": "identity",
        "featurize.dtype": "float32",
        "featurize.batch_rows": 5,
        "reduce.curvature": "none",
        "reduce.kernel_form": "primal",
        "reduce.lambda_reg": LAMBDA,
    }
    run = trak_dist.plan_run(problem=problem, run_dir=tmp_path / "run", cluster="debug", **settings)
    run.execute()
    found = trak_dist.open_run(tmp_path / "run").scores("val")
    assert oracle.column_errors(found, wanted(made, "mean_diagonal")).max() < 1e-4
    # With the curvature that the output offers it runs too; its rows are tested by themselves.
    offered = trak_dist.plan_run(
        problem=problem, run_dir=tmp_path / "offered", cluster="debug", proj_dim=16
    )
    offered.execute()
    assert np.isfinite(trak_dist.open_run(tmp_path / "offered").scores("val")).all()


TASK_OF = {
    "causal": "language_modeling",
    "masked": "masked_language_modeling",
    "sequence": "sequence_to_sequence",
    "regression": "regression",
    "many labels": "multi_label_classification",
    "diffusion": "diffusion",
}


def test_every_task_makes_its_output() -> None:
    for name, task in TASK_OF.items():
        assert TASKS[task] is type(case(name).output)


@pytest.mark.parametrize("name", ["causal", "regression", "preference", "segmentation", "loss"])
def test_scores_of_a_traker(name: str, tmp_path: Path) -> None:
    made = case(name)
    checkpoints = states(made)  # first: TRAKer loads weights into the model
    rows = len(made.examples)
    traker = trak_dist.TRAKer(
        model=made.model,
        task=TASK_OF.get(name, made.output),
        train_set_size=rows,
        save_dir=str(tmp_path / "run"),
        device="cpu",
        projector=trak_dist.NoOpProjector(),
        lambda_reg=LAMBDA,
        use_half_precision=False,
    )

    def batch(start: int, stop: int) -> object:
        found = default_collate(list(made.examples[start:stop]))
        return (found,) if isinstance(found, dict) else found

    for model_id, state in enumerate(checkpoints):
        traker.load_checkpoint(state, model_id=model_id)
        for start in range(0, rows, 3):
            traker.featurize(batch(start, start + 3), num_samples=min(3, rows - start))
    traker.finalize_features()
    for model_id, state in enumerate(checkpoints):
        traker.start_scoring_checkpoint("val", state, model_id, num_targets=TARGETS)
        traker.score(batch(0, TARGETS), num_samples=TARGETS)
    found = traker.finalize_scores("val")
    assert oracle.column_errors(found, wanted(case(name), "absolute")).max() < 1e-3


@pytest.mark.parametrize("form", ["mapping", "tuple"])
def test_the_padding_of_a_batch_is_no_other_data(form: str, tmp_path: Path) -> None:
    """−100 and 0 to the longest of each batch, which the second checkpoint has in other batches."""
    made = case("causal")
    checkpoints = states(made)
    rows = len(made.examples)
    traker = trak_dist.TRAKer(
        model=made.model,
        task="language_modeling",
        train_set_size=rows,
        save_dir=str(tmp_path / "run"),
        device="cpu",
        proj_dim=16,
        lambda_reg=1.0,
    )

    def batch(inds: list[int]) -> object:
        chosen = [made.examples[i] for i in inds]
        longest = max(int(text["attention_mask"].sum()) for text in chosen)
        found = {k: torch.stack([t[k][:longest] for t in chosen]) for k in chosen[0]}
        return (found,) if form == "mapping" else tuple(found.values())

    for model_id, (state, size) in enumerate(zip(checkpoints, (3, 1), strict=True)):
        traker.load_checkpoint(state, model_id=model_id)
        for start in range(0, rows, size):
            inds = list(range(start, min(start + size, rows)))
            traker.featurize(batch(inds), inds=inds)
    traker.finalize_features()
    for model_id, (state, size) in enumerate(zip(checkpoints, (3, 1), strict=True)):
        traker.start_scoring_checkpoint("val", state, model_id, num_targets=TARGETS)
        for start in range(0, TARGETS, size):
            inds = list(range(start, min(start + size, TARGETS)))
            traker.score(batch(inds), inds=inds)
    assert np.isfinite(traker.finalize_scores("val")).all()
