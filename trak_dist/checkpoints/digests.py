"""Digests of checkpoints: each `model_id` has one set of weights, for the whole run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from trak_dist import decoding
from trak_dist.checkpoints import state_dicts
from trak_dist.errors import CheckpointError
from trak_dist.hashing import truncated
from trak_dist.ops.batches import content
from trak_dist.plan_inputs import Checkpoint
from trak_dist.store import atomic
from trak_dist.store.run import Run


def content_digest(state: Mapping[str, Tensor]) -> str:
    """Digest of names, dtypes, shapes and bytes, in order of name."""
    sha = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name]
        sha.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        sha.update(content(tensor))
    return truncated(sha)


def load_into(run: Run, model: nn.Module, checkpoint: Checkpoint, *, publish: bool = True) -> str:
    """Load a checkpoint's weights into `model`; the digest of their content.

    The first worker to load a checkpoint publishes its digest; the others compare.

    Raises
    ------
    CheckpointError
        If the checkpoint can't be read or does not fit, if other weights were planned or seen
        under this `model_id`, or the same weights under another.
    """
    path = run.layout.checkpoint(checkpoint.file)
    fitted = state_dicts.fit_state_dict(state_dicts.read(path), model, where=str(path))
    digest = content_digest(fitted.state)
    check_weights(run, checkpoint.model_id, digest, publish=publish)
    check_distinct_weights(run, ids_by_weights(run), checkpoint.model_id, digest)
    fitted.load_into(model)
    return digest


def check_weights(run: Run, model_id: int, digest: str, *, publish: bool) -> None:
    """Raise `CheckpointError` if other weights were planned, or seen, under `model_id`.

    The first worker to load a checkpoint publishes its digest; all compare.
    """
    planned = run.plan.checkpoint(model_id).digest
    publish = publish and planned in (None, digest)
    if publish:
        content = json.dumps({"digest": digest}).encode()
        atomic.write_once(run.layout.checkpoint_digest(model_id), content)
    first = published(run, model_id)
    if first is None and publish:  # damaged: replaced by the current one
        atomic.write(run.layout.checkpoint_digest(model_id), content)
    for then, when in ((first, "first featurized"), (planned, "planned")):
        if then and then != digest:
            raise CheckpointError(
                f"model_id {model_id} has other weights than those it was {when} with: "
                f"digest {digest} now, {then} then",
                where=_path(run, model_id),
                next="restore the checkpoint, or start a new run with another run_dir",
            )


def ids_by_weights(run: Run) -> dict[str, list[int]]:
    """The ids under which weights are known, by digest: as planned, else as first seen.

    A worker asks after its own digest is published, so that of two concurrent ones at least one
    sees it.
    """
    found: dict[str, list[int]] = {}
    for checkpoint in run.plan.checkpoints:
        if digest := checkpoint.digest or published(run, checkpoint.model_id):
            found.setdefault(digest, []).append(checkpoint.model_id)
    return found


def check_distinct_weights(
    run: Run, known: Mapping[str, Sequence[int]], model_id: int, digest: str
) -> None:
    """Raise `CheckpointError` if these weights are known under another id."""
    for other in known.get(digest, ()):
        if other == model_id:
            continue
        raise CheckpointError(
            f"model_ids {min(other, model_id)} and {max(other, model_id)} have the same "
            f"weights (digest {digest})",
            where=_path(run, model_id),
            next="give each model_id its own checkpoint, in a new run_dir",
        )


def _path(run: Run, model_id: int) -> str:
    path = run.plan.checkpoint(model_id).path
    return f"model_id {model_id}" if path is None else str(run.layout.checkpoint(path))


def published(run: Run, model_id: int) -> str | None:
    """The digest of the weights that were first seen under `model_id`, if any were."""
    try:
        content = atomic.read(run.layout.checkpoint_digest(model_id))
    except FileNotFoundError:
        return None
    try:
        return str(decoding.mapping(content)["digest"])
    except (ValueError, KeyError, TypeError):
        return None
