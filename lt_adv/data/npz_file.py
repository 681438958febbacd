"""Reads arrays of an .npz file, without pickled objects."""

from collections.abc import Collection
from pathlib import Path

import numpy as np

from lt_adv.runtime import atomic_io


def read(path: Path, names: Collection[str], required: Collection[str] = ()) -> dict[str, np.ndarray]:
    """Returns the arrays of a file that have one of `names`.

    Raises:
      ValueError: the file is not a readable .npz, one of these is not an array, or a `required` one is missing.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {k: file[k] for k in names if k in file.files}
            names_in_file = ", ".join(sorted(file.files)) or "none"
    except Exception as error:  # numpy raises many types for a damaged .npz
        raise ValueError(f"{path} is not a readable .npz: {atomic_io.reason(path, error, atomic_io.NPZ)}.") from error
    if missing := [k for k in required if k not in arrays]:
        raise ValueError(f"{path} has no array {', '.join(missing)}; it has {names_in_file}.")
    if invalid := [k for k, array in arrays.items() if not isinstance(array, np.ndarray)]:
        raise ValueError(f"{path}: {invalid[0]} is not an array.")
    return arrays


def check_images(image: np.ndarray, where: str) -> np.ndarray:
    """Returns images as uint8 [n, h, w, c]; raises ValueError, which begins with `where`, for other arrays."""
    image = image[..., None] if image.ndim == 3 else image
    if image.dtype != np.uint8 or image.ndim != 4 or image.shape[-1] not in (1, 3) or not image.size:
        raise ValueError(f"{where} must be uint8 [n, h, w] or [n, h, w, 1 or 3], not {image.dtype} {image.shape}.")
    return image
