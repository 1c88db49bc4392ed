"""What a stage hands to the worker once a cell's bytes are on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trak_dist.configuration.config import PROJECTION_VERSION
from trak_dist.plan import Plan


@dataclass(frozen=True)
class CellResult:
    """Digests of what was written, and facts for the receipt."""

    digests: Mapping[str, str]
    facts: Mapping[str, Any] = field(default_factory=dict)


def grads_facts(plan: Plan, checkpoint_digest: str) -> dict[str, Any]:
    """What has to agree between the grads of one checkpoint."""
    spec = plan.spec
    return {
        "checkpoint_digest": checkpoint_digest,
        "projector": spec.projection.kind,
        "projector_seed": spec.projection.seed,
        "projector_dim": plan.store_dim,
        "projector_version": PROJECTION_VERSION,
        "dtype": spec.featurize.dtype,
        "compute": spec.featurize.compute,
        "gradients": plan.gradients,
    }
