"""Files of training images: an .npz with indices into the original training set, as RobustLT has them."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lt_adv.data import npz_file

JOINED = ("train_indices", "val_indices")  # the arrays of RobustLT's files


class SplitFile(NamedTuple):
    """The content of a file: `indices` int64 [n] in its order, and the `sha256` of its bytes."""

    path: Path
    indices: np.ndarray
    sha256: str

    @property
    def description(self) -> str:
        return f"{self.path.name}, SHA-256 {self.sha256}"


def read(name: str) -> SplitFile:
    """Reads a file with either `indices`, or `train_indices` and `val_indices`, which are joined in this order.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not readable, or these arrays are not one-dimensional, integer, and without repetitions.
    """
    path = Path(name).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}: set --config.data.split_file to an .npz.")
    arrays = npz_file.read(path, ("indices", *JOINED))
    if set(arrays) not in ({"indices"}, set(JOINED)):
        has = f"it has {' and '.join(arrays)}" if arrays else "it has none of them"
        raise ValueError(f"{path} must have either an array indices, or train_indices and val_indices; {has}.")
    for key, array in arrays.items():
        if array.ndim != 1 or (array.dtype.kind not in "iu" and len(array)):  # numpy's type of an empty list is float
            raise ValueError(
                f"{path}: {key} must be integers [n], positions in the original training set, "
                f"not {array.dtype} {array.shape}."
            )
    indices = np.concatenate([array.astype(np.int64) for array in arrays.values()])
    values, times = np.unique(indices, return_counts=True)
    if not len(indices):
        raise ValueError(f"{path} has no indices.")
    if times.max() > 1:
        raise ValueError(
            f"{path}: {np.sum(times > 1)} indices occur more than once, such as {values[times > 1][0]}: remove the "
            "repetitions."
        )
    return SplitFile(path, indices, hashlib.sha256(path.read_bytes()).hexdigest())


def positions(file: SplitFile, index: np.ndarray) -> np.ndarray:
    """Returns where in a data set the images of a file are, int64 [n], in the order of the file.

    Args:
      file: the file.
      index: `Split.index` of the complete training set.

    Raises:
      ValueError: an index is not one of the training set.
    """
    order = np.argsort(index, kind="stable")
    slots = np.minimum(np.searchsorted(index, file.indices, sorter=order), len(index) - 1)
    found = order[slots]
    unknown = file.indices[index[found] != file.indices]
    if len(unknown):
        raise ValueError(
            f"{file.path}: {len(unknown)} of {len(file.indices)} indices are not in the training set of "
            f"{len(index)} images, whose indices are from {index.min()} to {index.max()}, such as {unknown[0]}."
        )
    return found
