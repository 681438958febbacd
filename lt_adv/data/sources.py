"""Data sets by name: `load(data_config)`.

`digits` and `npz` are read directly, `image_folder` is decoded, `cifar10` and `cifar100` are read from their archives
or from sets prepared by the builders of this package, `tiny_imagenet` is prepared by its builder, and any other name is
looked up in TensorFlow-Datasets.
"""

import logging
import os
from collections import Counter
from pathlib import Path

import numpy as np

from lt_adv.data import cache, images, npz_file
from lt_adv.data.dataset import Dataset, Source, SplitReader, array_reader, check_labels, format_classes, in_memory
from lt_adv.data.folder import SPLITS, image_folder
from lt_adv.runtime import registry

ARRAYS = ("train_image", "train_label", "test_image", "test_label", "class_names")  # in an .npz; the last is optional
log = logging.getLogger(__name__)


def load(data_config: registry.Config) -> Dataset:
    """Returns the data set `data_config["name"]`, memory-mapped from its cache in `data_dir` (digits: in memory).

    A warning names classes without a test image.

    Args:
      data_config: a mapping with these keys, of which only the name is required.
        name: of the data set.
        data_dir: default $TFDS_DATA_DIR or ~/tensorflow_datasets.
        path: of an image_folder or npz.
        image_size: side that images are scaled and cropped to; default unchanged.
        download: whether missing data may be downloaded; default False.
        max_device_gib: if the training images would take more GiB, and there is no cache yet, images are decoded at
          each access; default no limit.
        test_split: of a set of TensorFlow-Datasets; default test, or validation if there is no test split.

    Raises:
      ValueError, FileNotFoundError: in one line, for missing, unknown or unreadable data, and for labels that are not
        classes, in either split.
    """
    dataset = _load(data_config)
    missing = np.flatnonzero(np.bincount(dataset.test.label, minlength=len(dataset.class_names)) == 0)
    if len(missing):
        classes = format_classes(missing, dataset.class_names)
        log.warning("%s: no test image of %s: not evaluated.", dataset.name, classes)
    return dataset


def _load(data_config: registry.Config) -> Dataset:
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
        # Takes half a second; not needed for the sets above.
        from lt_adv.data import tfds_source

        source = tfds_source.source(name, data_dir, size, bool(data_config.get("download", False)), test_split)
    limit = data_config.get("max_device_gib")
    return cache.load(data_dir, name, source, float("inf") if limit is None else limit * 2**30)


def digits(size: int | None = None) -> Source:
    """Returns scikit-learn's handwritten digits: 1797 images 8 x 8 x 1 of ten classes, levels 0..16 scaled to 0..255.

    The split is stratified and fixed: a generator seeded with 0 draws int(0.7 n) images of each class for training.
    """

    def read() -> tuple[tuple[str, ...], dict[str, SplitReader]]:
        from sklearn.datasets import load_digits

        raw = load_digits()
        image = np.round(raw.images * (255 / 16)).astype(np.uint8)[..., None]
        rng, train = np.random.RandomState(0), np.zeros(len(image), bool)
        for c in range(10):
            members = rng.permutation(np.flatnonzero(raw.target == c))
            train[members[: int(0.7 * len(members))]] = True
        positions = {"train": np.flatnonzero(train), "test": np.flatnonzero(~train)}
        names = tuple(str(c) for c in range(10))
        return names, {k: array_reader(images.resize(image[i], size), raw.target[i], i) for k, i in positions.items()}

    return Source("digits", read)


def npz(path: Path, size: int | None = None) -> Source:
    """Returns the source of an .npz file; the original index is the position.

    Its arrays are train_image and test_image, uint8 [n, h, w] or [n, h, w, c]; train_label and test_label, integers [n]
    from 0 to C - 1; and optionally class_names [C].
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}: set --config.data.path to an .npz.")
    status = path.stat()

    def read() -> tuple[tuple[str, ...], dict[str, SplitReader]]:
        arrays = npz_file.read(path, ARRAYS, required=ARRAYS[:-1])
        splits, largest = {}, {}
        for split in SPLITS:
            label = arrays[f"{split}_label"]
            image = npz_file.check_images(arrays[f"{split}_image"], f"{path}: {split}_image")
            check_labels(label, len(image), float("inf"), f"{path}, {split}_label")
            splits[split] = array_reader(images.resize(image, size), label, np.arange(len(label)))
            largest[split] = int(label.max())
        if splits["train"].shape[1:] != splits["test"].shape[1:]:
            shapes = " and ".join(f"{s} images are {d.shape[1:]}" for s, d in splits.items())
            raise ValueError(f"{path}: {shapes}.")
        split = max(SPLITS, key=lambda s: largest[s])
        label, max_label = arrays[f"{split}_label"], largest[split]
        if max_label >= (limit := len(splits["train"].label)):
            raise ValueError(
                f"{path}: the labels go up to {max_label}, but each class needs a training image: "
                f"{np.sum(label >= limit)} of {split}_label are not below {limit}, the number of training images."
            )
        names = _class_names(arrays.get("class_names", np.arange(max_label + 1)), path)
        if len(names) <= max_label:
            raise ValueError(
                f"{path}: class_names has {len(names)} entries, but the labels go up to {max_label}: "
                f"{np.sum(label >= len(names))} of {split}_label have no name."
            )
        return names, splits

    # The last entry is a version of the conversion of names.
    return Source([str(path.resolve()), status.st_size, status.st_mtime_ns, size, "names are text"], read)


def _class_names(names: np.ndarray, path: Path) -> tuple[str, ...]:
    """Returns the names in an array of texts, bytes or numbers; empty and repeated ones get the number of the class."""
    if names.ndim > 1:
        raise ValueError(f"{path}: class_names must be one name for each class, not {names.dtype} {names.shape}.")
    try:
        texts = [n.decode() if isinstance(n, bytes) else str(n) for n in np.atleast_1d(names).tolist()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: class_names has {error.object!r}, which is not UTF-8.") from error
    count = Counter(texts)
    return tuple(n if n and count[n] == 1 else f"{n} ({i})".strip() for i, n in enumerate(texts))
