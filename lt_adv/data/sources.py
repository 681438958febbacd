"""Where the images come from: `load(data_config)` answers every data set by name.

`digits` and `npz` are read as they are, `image_folder` is decoded, `cifar10`, `cifar100` and `tiny_imagenet` are
prepared by our own TensorFlow-Datasets builders, and any other name is looked up in TensorFlow-Datasets.
"""

import logging
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lt_adv.data import cache, images
from lt_adv.data.dataset import Dataset, Source, SplitReader, decoding, in_memory, labels, listed
from lt_adv.data.folder import SPLITS, image_folder
from lt_adv.runtime import atomic_io

ARRAYS = ("train_image", "train_label", "test_image", "test_label", "class_names")  # of an .npz; the last is optional
log = logging.getLogger(__name__)


def load(data_config: Mapping[str, Any]) -> Dataset:
    """The data set called `data_config["name"]`, memory-mapped from the cache in `data_dir` where it is not embedded.

    Keys: name; data_dir (None: $TFDS_DATA_DIR or ~/tensorflow_datasets); path (image_folder, npz); image_size (None: as
    it is); download (False); resident_gib (None: any): where the training images would take more, and there is no cache
    yet, they are not decoded now but when they are used; test_split (None: test, else validation): of a set of
    TensorFlow-Datasets. ValueError or FileNotFoundError, in one line, for anything missing, unknown or unreadable, and
    for labels that are not classes, in either split. A warning names classes without a test image.
    """
    dataset = _load(data_config)
    missing = np.flatnonzero(np.bincount(dataset.test.label, minlength=len(dataset.class_names)) == 0)
    if len(missing):
        log.warning("%s: no test image of %s: not evaluated.", dataset.name, listed(missing, dataset.class_names))
    return dataset


def _load(data_config: Mapping[str, Any]) -> Dataset:
    name, size = data_config["name"], data_config.get("image_size")
    if size is not None and (size != int(size) or not 1 <= size <= images.LARGEST):
        raise ValueError(f"image_size must be a whole number of pixels in [1, {images.LARGEST}], not {size}.")
    test_split = data_config.get("test_split") or None
    if test_split and name in ("digits", "image_folder", "npz"):
        raise ValueError(f"config.data.test_split is for sets of TensorFlow-Datasets: {name} has one test split.")
    if name == "digits":
        return in_memory(name, digits(size))
    directory = data_config.get("data_dir") or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    data_dir = Path(directory).expanduser()
    if name in ("image_folder", "npz"):
        if not data_config.get("path"):
            raise ValueError(f"The data set {name} needs --config.data.path.")
        path = Path(data_config["path"]).expanduser()
        source = image_folder(path, size) if name == "image_folder" else npz(path, size)
    else:
        # Not needed, and half a second, for the sets above.
        from lt_adv.data import tfds_source

        source = tfds_source.source(name, data_dir, size, bool(data_config.get("download", False)), test_split)
    limit = data_config.get("resident_gib")
    return cache.load(data_dir, name, source, float("inf") if limit is None else limit * 2**30)


def digits(size: int | None = None) -> Source:
    """scikit-learn's handwritten digits: 1797 images 8 x 8 x 1, ten classes, grey levels 0..16 scaled to 0..255.

    Stratified 70/30 split, always the same: of each class, int(0.7 n) images drawn by a generator seeded with 0 are for
    training.
    """

    def read() -> tuple[tuple[str, ...], dict[str, SplitReader]]:
        from sklearn.datasets import load_digits

        raw = load_digits()
        image = np.round(raw.images * (255 / 16)).astype(np.uint8)[..., None]
        rng, train = np.random.RandomState(0), np.zeros(len(image), bool)
        for c in range(10):
            members = rng.permutation(np.flatnonzero(raw.target == c))
            train[members[: int(0.7 * len(members))]] = True
        chosen = {"train": np.flatnonzero(train), "test": np.flatnonzero(~train)}
        names = tuple(str(c) for c in range(10))
        return names, {k: decoding(images.resize(image[i], size), raw.target[i], i) for k, i in chosen.items()}

    return Source("digits", read)


def npz(path: Path, size: int | None = None) -> Source:
    """An .npz with train_image, test_image uint8 [n, h, w] or [n, h, w, c] and train_label, test_label [n], 0 .. C - 1.

    An array class_names [C] is optional. The original index is the position.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}: --config.data.path must name an .npz.")
    about = path.stat()

    def read() -> tuple[tuple[str, ...], dict[str, SplitReader]]:
        try:
            with np.load(path, allow_pickle=False) as file:
                there = sorted(file.files)
                arrays = {k: file[k] for k in ARRAYS if k in there}
        except Exception as error:  # a damaged zip fails in many ways
            raise ValueError(
                f"{path} is not a readable .npz: {atomic_io.reason(path, error, atomic_io.NPZ)}."
            ) from error
        if missing := [k for k in ARRAYS[:-1] if k not in arrays]:
            raise ValueError(f"{path} has no array {', '.join(missing)}; it has {', '.join(there) or 'none'}.")
        if other := [k for k, array in arrays.items() if not isinstance(array, np.ndarray)]:
            raise ValueError(f"{path}: {other[0]} is no array.")
        splits, largest = {}, {}
        for split in SPLITS:
            image, label = arrays[f"{split}_image"], arrays[f"{split}_label"]
            image = image[..., None] if image.ndim == 3 else image
            if image.dtype != np.uint8 or image.ndim != 4 or image.shape[-1] not in (1, 3) or not image.size:
                raise ValueError(
                    f"{path}: {split}_image must be uint8 [n, h, w] or [n, h, w, 1 or 3], "
                    f"not {image.dtype} {image.shape}."
                )
            labels(label, len(image), float("inf"), f"{path}, {split}_label")
            splits[split] = decoding(images.resize(image, size), label, np.arange(len(label)))
            largest[split] = int(label.max())
        if splits["train"].shape[1:] != splits["test"].shape[1:]:
            shapes = " and ".join(f"{s} images are {d.shape[1:]}" for s, d in splits.items())
            raise ValueError(f"{path}: {shapes}.")
        split = max(SPLITS, key=lambda s: largest[s])
        label, up_to = arrays[f"{split}_label"], largest[split]
        if up_to >= (most := len(splits["train"].label)):
            raise ValueError(
                f"{path}: the labels go up to {up_to}, and each class needs an image to train on: "
                f"{np.sum(label >= most)} of {split}_label are not below {most}, the number of training images."
            )
        names = _class_names(arrays.get("class_names", np.arange(up_to + 1)), path)
        if len(names) <= up_to:
            raise ValueError(
                f"{path}: class_names has {len(names)} entries, the labels go up to {up_to}: "
                f"{np.sum(label >= len(names))} of {split}_label have no name."
            )
        return names, splits

    # The last: how names are read.
    return Source([str(path.resolve()), about.st_size, about.st_mtime_ns, size, "names are text"], read)


def _class_names(names: np.ndarray, path: Path) -> tuple[str, ...]:
    """Of an array of texts, bytes or numbers; a name that is empty, or there twice, gets the number of its class."""
    if names.ndim > 1:
        raise ValueError(f"{path}: class_names must be one name for each class, not {names.dtype} {names.shape}.")
    try:
        texts = [n.decode() if isinstance(n, bytes) else str(n) for n in np.atleast_1d(names).tolist()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: class_names has {error.object!r}, which is not UTF-8.") from error
    count = Counter(texts)
    return tuple(n if n and count[n] == 1 else f"{n} ({i})".strip() for i, n in enumerate(texts))
