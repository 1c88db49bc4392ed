"""Whether a plan's kernels can be factorised, and its scores be where others are."""

from __future__ import annotations

from trak_dist import commands
from trak_dist.cells import ScoreCell, TopCell
from trak_dist.errors import PlanMismatch
from trak_dist.ops import dual
from trak_dist.plan import Plan
from trak_dist.store.run import Run


def check_full_rank(plan: Plan) -> None:
    """Raise `SingularGram` where λ = 0 can't work, before any gradient is computed."""
    k, rows = plan.proj_dim, plan.curvature_rows
    if plan.spec.reduce.lambda_reg == 0 and (plan.dual or k > rows):
        raise dual.no_kernel(k, rows)


def check_no_scores(run: Run, plan: Plan) -> None:
    """Raise `PlanMismatch` if `run` has scores that `plan`, of another reduce, would replace.

    A member of a sweep keeps them both.
    """
    other_grads = plan.spec.featurize != run.plan.spec.featurize
    same_kernels = plan.model_ids == run.plan.model_ids and plan.kernel_id == run.plan.kernel_id
    if same_kernels and not other_grads:
        return
    scored = run.receipts.done([*ScoreCell.of(run.plan), *TopCell.of(run.plan)])
    if other_grads and scored:
        raise PlanMismatch(
            f"the run has scores, whose gradients are by {run.plan.gradients}",
            where=str(run.layout.run_dir),
            next="another run_dir, with this featurize.gradients",
        )
    if scored:
        member = run.layout.sweeps / plan.reduce_id
        exists = plan.reduce_id in run.layout.members()
        raise PlanMismatch(
            "the run has scores made with another proj_dim, reduce or ensemble",
            where=str(run.layout.run_dir),
            next=f"{commands.on(member)} is the run with these settings"
            if exists
            else f"the same command with -m, which keeps both: these go to {member}",
        )
