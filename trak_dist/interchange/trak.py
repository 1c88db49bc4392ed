"""A `save_dir` of the package traker, as a run: what it featurized is scored here.

    save_dir/
      metadata.json, id_<model_id>.json, experiments.json
      <model_id>/grads.mmap                 (n, k), gradients projected and divided by √p
      <model_id>/out_to_loss.mmap           (n, 1)
      <model_id>/_is_featurized.mmap        (n,)
      <model_id>/<experiment>_grads.mmap    (targets, k)

All arrays are `.npy` files, of traker 0.3.2. Its features, (XᵀX + λI)⁻¹ applied with a λ that it
does not keep, are not read: kernels are made here.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trak_dist.coordinates import TRAIN, check_name
from trak_dist.errors import ConfigError, InterchangeError, InterchangeNotFound
from trak_dist.ingest.arguments import traks_kernel
from trak_dist.ingest.streamed_rows import format_ranges
from trak_dist.interchange.foreign_files import ForeignRows, read_array, read_json
from trak_dist.interchange.imported_run import Found, write_run


def import_trak(
    save_dir: str | Path,
    run_dir: str | Path,
    *,
    model_ids: Iterable[int] | None = None,
    experiments: Iterable[str] | None = None,
) -> None:
    """Make a run of what TRAK featurized in `save_dir`, which stays as it is.

    λ of a new run is 0 and in TRAK's units, the kernel (XᵀX + λI)⁻¹, as TRAK's. The same call again
    completes it, or adds checkpoints and experiments.

    Parameters
    ----------
    save_dir : path
        The directory of traker's `TRAKer`.
    run_dir : path
        The run directory, another one.
    model_ids : iterable of int, optional
        The checkpoints to be taken; all where left out.
    experiments : iterable of str, optional
        The experiments, which become target sets; all where left out.

    Raises
    ------
    InterchangeError
        If a file is missing, cut, or not what `metadata.json` says; if rows were never featurized
        or scored.
    NonFiniteGradient
        If a row is not finite.
    ConfigError
        If there is no such checkpoint or experiment.
    PlanMismatch, MixedRun
        If the run in `run_dir` is another one, or rows have changed since.
    """
    directory = Path(save_dir).absolute()
    metadata = read_json(directory / "metadata.json")
    n, dim = (_size(directory, metadata, name) for name in ("train set size", "JL dimension"))
    there = _model_ids(directory)
    chosen = _chosen("model_id", there, model_ids, directory)
    sizes = _experiments(directory)
    names = _chosen("experiment", sorted(sizes), experiments, directory)
    rows = {}
    for model_id in chosen:
        folder = directory / str(model_id)
        rows[model_id] = {
            TRAIN: _train(folder, n, dim),
            **{name: _targets(folder, name, sizes[name], dim) for name in names},
        }
    write_run(
        Path(run_dir),
        Found(
            call="import_trak",
            directory=directory,
            rows=rows,
            reduce=traks_kernel(torch.get_num_threads()),
            facts={"projector": f"{metadata.get('JL matrix type')} of traker"},
        ),
    )


def _size(directory: Path, metadata: dict[str, Any], name: str) -> int:
    found = metadata.get(name)
    if not isinstance(found, int) or found < 1:
        raise InterchangeError(
            f"{name!r} is {found!r}, not a whole number of at least 1",
            where=str(directory / "metadata.json"),
            next="the save_dir of a TRAKer of the package traker",
        )
    return found


def _model_ids(directory: Path) -> list[int]:
    """Those that are registered, one file each."""
    names = (path.stem.removeprefix("id_") for path in directory.glob("id_*.json"))
    found = sorted(int(name) for name in names if name.isdecimal())
    if not found:
        raise InterchangeNotFound(
            "no checkpoint was featurized: there is no id_<model_id>.json",
            where=str(directory),
            next="featurize with TRAK first; model_ids are whole numbers from 0",
        )
    return found


def _experiments(directory: Path) -> dict[str, int]:
    path = directory / "experiments.json"
    try:
        experiments = read_json(path)
    except InterchangeNotFound:  # nothing was scored
        return {}
    found = {}
    for name, described in experiments.items():
        size = described.get("num_targets") if isinstance(described, dict) else None
        if not isinstance(size, int) or size < 1:
            raise InterchangeError(
                f"num_targets of {name!r} is {size!r}",
                where=str(path),
                next="the save_dir of a TRAKer of the package traker",
            )
        found[name] = size
    return found


def _chosen(what: str, there: list[Any], asked: Iterable[Any] | None, directory: Path) -> list[Any]:
    if asked is None:
        return there
    asked = list(dict.fromkeys(asked))
    unknown = [one for one in asked if one not in there]
    if unknown or not (asked or what == "experiment"):
        raise ConfigError(
            f"{what} {unknown[0]!r} is not there" if unknown else f"no {what} is named",
            where=str(directory),
            next=f"of {', '.join(map(str, there)) or 'none'}",
        )
    return [one for one in there if one in asked]


def _train(folder: Path, n: int, dim: int) -> ForeignRows:
    featurized = read_array(folder / "_is_featurized.mmap", (n,), np.int32)
    missing = np.flatnonzero(featurized != 1)
    if len(missing):
        raise InterchangeError(
            f"{len(missing)} of {n} train rows were not featurized: {format_ranges(missing)}",
            where=str(folder),
            next="featurize them with TRAK, or name other checkpoints: model_ids=[…]",
        )
    try:
        grads = read_array(folder / "grads.mmap", (n, dim), np.float16, np.float32)
    except InterchangeNotFound as error:
        raise InterchangeNotFound(
            "the grads are gone: TRAK's finalize_features(del_grads=True) removes them",
            where=error.where,
            next="featurize this checkpoint again, by TRAK or by trak_dist's TRAKer",
            errno=error.errno,
        ) from None
    q = read_array(folder / "out_to_loss.mmap", (n,), np.float16, np.float32)
    return ForeignRows(grads, q, folder / "grads.mmap")


def _targets(folder: Path, name: str, rows: int, dim: int) -> ForeignRows:
    check_name(name, what="the experiment")
    path = folder / f"{name}_grads.mmap"
    grads = read_array(path, (rows, dim), np.float16, np.float32)
    # TRAK keeps no Q of targets, and scores need none
    return ForeignRows(grads, np.zeros(rows, np.float32), path, zeros="so they were never scored")
