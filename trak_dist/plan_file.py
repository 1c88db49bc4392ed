"""The text of a `plan.json`: written from a plan, and read back only as it was written."""

from __future__ import annotations

import json

from trak_dist import decoding
from trak_dist.cells import count
from trak_dist.errors import ConfigError, PlanMismatch
from trak_dist.plan import SCHEMA, Plan, digest
from trak_dist.structuring import structure, unstructure
from trak_dist.validation import spec_conflicts

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
        schema, said, found = raw["schema"], raw.pop("digest"), digest(raw)
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
    if said != found:
        raise PlanMismatch(
            f"the plan says digest {said}, its content has {found}",
            where=where,
            next="restore the file, or use another run_dir: a plan is never edited by hand",
        )
    try:
        fingerprint, _ = raw.pop("fingerprint"), raw.pop("schema")
        plan = structure(Plan, raw, "the plan is not valid:")
        odd = [*spec_conflicts(plan.spec), *plan.oddities()]
        if not odd and (cells := count(plan)) > MAX_CELLS:
            odd = [f"{cells:.2g} cells are more than the {MAX_CELLS:.0e} that one run may have"]
        if odd:
            raise ConfigError("\n  ".join(["the plan is not valid:", *odd]))
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
