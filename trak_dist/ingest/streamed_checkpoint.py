"""The checkpoint whose rows a process streams: in the model, with its featurizer."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from trak_dist.checkpoints import digests, state_dicts
from trak_dist.checkpoints.featurizer import CheckpointFeaturizer
from trak_dist.errors import CheckpointError
from trak_dist.ingest.streamed_rows import RowStream
from trak_dist.ops.model_outputs import ModelOutput
from trak_dist.plan import Plan

log = logging.getLogger("trak_dist")


class StreamedCheckpoint:
    """The checkpoint in the model, until another is loaded into it."""

    def __init__(
        self,
        model: nn.Module,
        checkpoint: Mapping[str, Tensor] | str | Path,
        model_id: int,
        before: StreamedCheckpoint | None,
    ) -> None:
        if isinstance(checkpoint, str | Path):
            self.path: str | None = (where := str(Path(checkpoint).absolute()))
            state = state_dicts.read(Path(checkpoint))
        else:
            self.path, where = None, f"model_id {model_id}"
            state = state_dicts.named(checkpoint, where=where)
        fitted = state_dicts.fit_state_dict(state, model, where=where)
        if before is not None:
            state_dicts.check_same_absent(fitted, before.absent, where=where)
        elif fitted.notes:
            log.info("checkpoints: %s", fitted.notes)
        self.model_id = model_id
        self.absent: frozenset[str] = fitted.absent
        self.digest = digests.content_digest(fitted.state)
        fitted.load_into(model)
        self._model = model.eval()
        self._weights = self._versions()
        self.streams: dict[str, RowStream] = {}
        self._featurizer: CheckpointFeaturizer | None = None

    def make_ready(self) -> None:
        """Put the model in evaluation mode: a script may have trained it since.

        Raises
        ------
        CheckpointError
            If its weights are no longer those that were loaded.
        """
        self._model.eval()
        if self._versions() != self._weights:
            raise CheckpointError(
                "the model's weights were changed since load_checkpoint",
                where=f"model_id {self.model_id}",
                next="load_checkpoint again, and give TRAKer a model that nothing else changes",
            )

    def note_weights(self) -> None:
        """Take the weights for those that were loaded: passes put back what they change."""
        self._weights = self._versions()

    def _versions(self) -> list[tuple[int, int]]:
        tensors = (*self._model.parameters(), *self._model.buffers())
        return [(t.data_ptr(), t._version) for t in tensors]  # noqa: SLF001

    def featurizer(self, plan: Plan, model_output: ModelOutput) -> CheckpointFeaturizer:
        """The same with what computes its grads, which there is once there is a plan."""
        if self._featurizer is None:
            self._featurizer = CheckpointFeaturizer(
                plan, self.model_id, self.digest, self._model, model_output
            )
        return self._featurizer
