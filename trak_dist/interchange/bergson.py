"""Indices of the package bergson, as a run: one of the train set, one of each target set.

    index/
      info.json         num_grads, grad_sizes by module, base_dtype, attribute_tokens
      gradients.bin     (num_grads, sum of grad_sizes), without a header
      data.hf/          the examples, written last

as of bergson 2.5.1. Its rows are gradients of the loss: with f = −loss Q is 1, the signs of both
sides cancel, and positive scores are helpful.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from trak_dist.configuration.config import ReduceConfig
from trak_dist.coordinates import TRAIN, check_name
from trak_dist.errors import ConfigError, InterchangeError
from trak_dist.interchange.foreign_files import ForeignRows, map_raw, read_json
from trak_dist.interchange.imported_run import Found, write_run

TYPES = {"float16": np.float16, "float32": np.float32, "bfloat16": np.uint16}


def import_bergson(
    index: str | Path, run_dir: str | Path, *, targets: Mapping[str, str | Path]
) -> None:
    """Make a run of gradients that bergson collected of one model.

    The kernel of a new run is (XᵀX + λI)⁻¹, with the launcher's λ = 1 of the mean diagonal. The
    same call again completes it, or adds target sets.

    Parameters
    ----------
    index : path
        The index of the train set, a row for each example.
    run_dir : path
        The run directory.
    targets : mapping of names to paths
        The indices of the target sets, by the same model, modules and projection.

    Raises
    ------
    InterchangeError
        If a file is missing or cut, an index is not finished or one of tokens, or they differ in
        their modules.
    NonFiniteGradient
        If a row is not finite.
    ConfigError
        If the name of a target set can't be one.
    PlanMismatch, MixedRun
        If the run in `run_dir` is another one, or rows have changed since.
    """
    for name in targets:
        check_name(name, what="the target set")
    if TRAIN in targets:
        raise ConfigError(
            f"a target set can't be called {TRAIN!r}", where="targets", next="another name"
        )
    directories = {TRAIN: Path(index).absolute()}
    directories |= {name: Path(path).absolute() for name, path in targets.items()}
    sizes = {name: _sizes(path) for name, path in directories.items()}
    for name, found in sizes.items():
        if list(found.items()) != list(sizes[TRAIN].items()):
            raise InterchangeError(
                f"the modules of {name!r} have other gradients than those of the train set: "
                f"{sum(found.values())} numbers of {len(found)}, "
                f"{sum(sizes[TRAIN].values())} of {len(sizes[TRAIN])}",
                where=str(directories[name]),
                next="build both indices with the same settings",
            )
    dim = sum(sizes[TRAIN].values())
    write_run(
        Path(run_dir),
        Found(
            call="import_bergson",
            directory=directories[TRAIN],
            rows={0: {name: _rows(path, dim) for name, path in directories.items()}},
            reduce=ReduceConfig(curvature="none", threads=torch.get_num_threads()),
            facts={"projector": "bergson's"},
        ),
    )


def _sizes(directory: Path) -> dict[str, int]:
    """Numbers of a row by module, in their order."""
    found = read_json(directory / "info.json").get("grad_sizes")
    if not isinstance(found, dict) or not found or not all(_is_size(v) for v in found.values()):
        raise _unfit(directory, "grad_sizes are no numbers by module")
    return found


def _rows(directory: Path, dim: int) -> ForeignRows:
    info = read_json(directory / "info.json")
    rows, kind = info.get("num_grads"), str(info.get("base_dtype"))
    if not isinstance(rows, int) or not _is_size(rows):
        raise _unfit(directory, f"num_grads is {rows!r}")
    if info.get("attribute_tokens") is not False:
        raise _unfit(directory, "its rows are not one for each example (attribute_tokens)")
    if kind not in TYPES:
        raise _unfit(directory, f"base_dtype {kind!r} is none of {', '.join(TYPES)}")
    if not (directory / "data.hf").is_dir():
        raise _unfit(directory, "there is no data.hf, which is written last: it is not finished")
    path = directory / "gradients.bin"
    grads = map_raw(path, (rows, dim), np.dtype(TYPES[kind]))
    return ForeignRows(grads, np.ones(rows, np.float32), path)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _unfit(directory: Path, what: str) -> InterchangeError:
    return InterchangeError(
        what, where=str(directory), next="an index that `bergson build` has finished, by example"
    )
