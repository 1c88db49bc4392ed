"""CIFAR-10's python batches, read without running whatever a pickle may ask for.

The files are pickles of a dict of lists, strings and one numpy array. An unpickler that knows only
how to rebuild a numpy array refuses anything else.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trak_dist.errors import DatasetError

_RECONSTRUCT = np.empty(0).__reduce__()[0]
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,  # as numpy 2 writes it
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    # How pickles of Python 2 strings arrive under protocol 2.
    ("_codecs", "encode"): lambda text, encoding: text.encode(encoding),
}


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in it") from None


def read_batch(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images (n, 3, 32, 32) and labels (n,) of one CIFAR-10 batch.

    Raises
    ------
    DatasetError
        If the file is not there, or holds anything but images and labels.
    """
    try:
        with path.open("rb") as file:
            content = _ArraysOnly(file, encoding="bytes").load()
        images = np.asarray(content[b"data"], dtype=np.uint8).reshape(-1, 3, 32, 32)
        return images, np.asarray(content[b"labels"], dtype=np.int64)
    except FileNotFoundError:
        raise DatasetError(
            "the python batches of CIFAR-10 are not there",
            where=str(path),
            next="problem.root=… the directory cifar-10-batches-py of CIFAR-10's python version",
        ) from None
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError) as error:
        raise DatasetError(
            f"not a python batch of CIFAR-10: {error}", where=str(path), next="fetch it anew"
        ) from error
