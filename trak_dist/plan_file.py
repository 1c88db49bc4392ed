"""The text of a `plan.json`: written from a plan, and read back only as it was written.

The file is flatter than a plan: the digests of a split's dataset are fields of the split, empty
where its rows are streamed, and the imported ground truth is `truth_files` and `truth_of`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields, replace
from typing import Any

from trak_dist import decoding
from trak_dist.cells import count
from trak_dist.configuration.config import UNLIMITED
from trak_dist.configuration.structuring import converter, structure, unstructure
from trak_dist.configuration.validation import spec_conflicts
from trak_dist.errors import ConfigError, PlanMismatch
from trak_dist.plan import SCHEMA, Plan, digest
from trak_dist.plan_inputs import ImportedTruth, ProbedDataset, Split, Streamed

# In earlier versions' plans: the Gram was one sum, the scores of all targets one product.
UNSAID = {
    "reduce": {"curvature": "none", "kernel_form": "primal", "gram_rows": UNLIMITED},
    "scores": {"keep": "all", "block_targets": UNLIMITED},
}
MAX_CELLS = 10**7  # what a command that lists them gets through


def dump(plan: Plan) -> str:
    """The text of `plan.json`."""
    content = {"schema": SCHEMA, "fingerprint": plan.fingerprint, **unstructure(plan)}
    return json.dumps({**content, "digest": digest(content)}, indent=1)


def load(text: bytes, *, where: str) -> Plan:
    """Read the content of a `plan.json`.

    Raises
    ------
    PlanMismatch
        If the text is no plan, is of another schema, or was edited.
    """
    try:
        raw = decoding.mapping(text)
        schema, recorded, found = raw["schema"], raw.pop("digest"), digest(raw)
    except (ValueError, KeyError, RecursionError) as error:
        raise PlanMismatch(
            f"the plan can't be read ({error})",
            where=where,
            next="restore it, or use another run_dir",
        ) from None
    if schema != SCHEMA:
        raise PlanMismatch(
            f"the plan has schema {schema!r}, this version of trak_dist reads {SCHEMA}",
            where=where,
            next="use the version that made it, or another run_dir",
        )
    if recorded != found:
        raise PlanMismatch(
            f"the plan has digest {recorded}, its content has {found}",
            where=where,
            next="restore the file, or use another run_dir: a plan must not be edited",
        )
    try:
        fingerprint, _ = raw.pop("fingerprint"), raw.pop("schema")
        plan = structure(Plan, raw, "the plan is not valid:")
        invalid = [*spec_conflicts(plan.spec), *plan.inconsistencies()]
        if not invalid and (cells := count(plan)) > MAX_CELLS:
            invalid = [f"{cells:.2g} cells are more than the {MAX_CELLS:.0e} that one run may have"]
        if invalid:
            raise ConfigError("\n  ".join(["the plan is not valid:", *invalid]))
    except (ConfigError, KeyError) as error:
        raise PlanMismatch(
            getattr(error, "what", f"the plan can't be read ({error})"),
            where=where,
            next="use the version that made it, or another run_dir",
        ) from None
    if plan.fingerprint != fingerprint:
        raise PlanMismatch(
            f"the plan was made with fingerprint {fingerprint}, this version of "
            f"trak_dist reads {plan.fingerprint} from it",
            where=where,
            next="use the version that made it, or another run_dir",
        )
    return plan


# The form of the file -----------------------------------------------------------------------


@dataclass(frozen=True)
class _FlatSplit:
    name: str
    rows: int = field(metadata={"min": 1})
    cell_rows: int = field(metadata={"min": 1})
    probe: str
    batch: str | None = None


@dataclass(frozen=True)
class _FlatTruth:
    truth_files: str = ""
    truth_of: str = ""


_TRUTH = [name.name for name in fields(_FlatTruth)]


@converter.register_structure_hook
def _split(raw: Any, _: Any) -> Split:
    flat = converter.structure(raw, _FlatSplit)
    source = ProbedDataset(flat.probe, flat.batch) if flat.probe else Streamed()
    return Split(flat.name, flat.rows, flat.cell_rows, source)


@converter.register_unstructure_hook
def _flat_split(split: Split) -> dict[str, Any]:
    source = split.row_source
    digests = (source.alone, source.together) if isinstance(source, ProbedDataset) else ("", None)
    return unstructure(_FlatSplit(split.name, split.rows, split.cell_rows, *digests))


_plan_by_fields = converter.get_structure_hook(Plan)  # now that a split's hooks are there
_fields_of_plan = converter.get_unstructure_hook(Plan)


def _with_unsaid(raw: Any) -> Any:
    match raw:
        case {"spec": {**spec}}:
            said = {
                name: unsaid | section
                for name, unsaid in UNSAID.items()
                if isinstance(section := spec.get(name, {}), dict)
            }
            return {**raw, "spec": {**spec, **said}}
    return raw


@converter.register_structure_hook
def _plan(raw: Any, _: Any) -> Plan:
    raw = _with_unsaid(raw)
    flat = converter.structure({k: raw[k] for k in _TRUTH if k in raw}, _FlatTruth)
    plan: Plan = _plan_by_fields({k: v for k, v in raw.items() if k not in _TRUTH}, Plan)
    if not flat.truth_files:
        return plan
    return replace(plan, imported_truth=ImportedTruth(flat.truth_files, flat.truth_of))


@converter.register_unstructure_hook
def _flat_plan(plan: Plan) -> dict[str, Any]:
    truth = plan.imported_truth
    flat = _FlatTruth(truth.digest, truth.targets) if truth else _FlatTruth()
    content: dict[str, Any] = {}
    for name, value in _fields_of_plan(plan).items():  # in the order of the file
        content |= unstructure(flat) if name == "imported_truth" else {name: value}
    return content
