"""From a problem and a spec to a plan, and from a plan to one with more in it.

`plans` makes and extends plans, of what `checkpoints`, `splits`, `dry_run`, `dropout` and
`gradient_method` find out. `curvature`, `ensemble` and `reduction` check that kernels and scores
can be made, `ground_truth` and `counterfactuals` say what scores are evaluated by,
`lambda_selection` which λ is best.
"""

from trak_dist.planning.checkpoints import check_checkpoints
from trak_dist.planning.counterfactuals import with_counterfactuals
from trak_dist.planning.curvature import check_curvature
from trak_dist.planning.dry_run import trial_rate
from trak_dist.planning.ensemble import check_ensemble, without_missing
from trak_dist.planning.ground_truth import with_ground_truth
from trak_dist.planning.plans import extend_plan, make_plan, with_gradients
from trak_dist.planning.reduction import check_full_rank, check_no_scores

__all__ = [
    "check_checkpoints",
    "check_curvature",
    "check_ensemble",
    "check_full_rank",
    "check_no_scores",
    "extend_plan",
    "make_plan",
    "trial_rate",
    "with_counterfactuals",
    "with_gradients",
    "with_ground_truth",
    "without_missing",
]
