"""Data sets of which only the sizes are known, for compilation: nothing is read."""

import dataclasses
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np

from lt_adv.data import extra, longtail, sources, split_file
from lt_adv.data.dataset import Dataset, Split
from lt_adv.runtime import registry

# Data set -> images of the training and the test split, image shape, number of classes. All are balanced.
SIZES = {
    "cifar10": (50000, 10000, (32, 32, 3), 10),
    "cifar100": (50000, 10000, (32, 32, 3), 100),
    "tiny_imagenet": (100000, 10000, (64, 64, 3), 200),
}
TEST_IMAGES = 10000  # of a set whose size is given by the config
CHANNELS = 3
log = logging.getLogger(__name__)


@dataclasses.dataclass
class AbstractImages:
    """The shape of uint8 images [n, h, w, c], in the place of the images (`dataset.EncodedImages`)."""

    shape: tuple[int, int, int, int]
    dtype: np.dtype = np.dtype(np.uint8)
    ndim: int = 4

    def __post_init__(self) -> None:
        self.nbytes = math.prod(self.shape)

    @property
    def digest(self) -> str:
        return "no images"

    def __len__(self) -> int:
        return self.shape[0]

    def at(self, rows: np.ndarray) -> "AbstractImages":
        return AbstractImages((len(rows), *self.shape[1:]))

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        raise ValueError("These images have a shape only; they cannot be read.")

    read = __getitem__

    def __array__(self, dtype: object = None, copy: bool | None = None) -> np.ndarray:
        raise ValueError("These images have a shape only; they cannot be read.")


def abstract_dataset(options: registry.Config) -> Dataset:
    """Returns a data set without images: of `SIZES`, or of the config's `class_counts` and `image_size`.

    Args:
      options: config.data.

    Raises:
      ValueError: the size is not known.
    """
    name, side = options["name"], options.get("image_size")
    counts = tuple(options.get("class_counts") or ())
    if name in SIZES:
        num_train, num_test, shape, num_classes = SIZES[name]
        labels = np.arange(num_train) % num_classes
    elif name == "digits":
        return sources.load(options)  # comes with scikit-learn
    elif counts and side:
        labels = np.repeat(np.arange(len(counts)), counts)
        num_test, shape, num_classes = TEST_IMAGES, (side, side, CHANNELS), len(counts)
    else:
        raise ValueError(
            f"config.data.name = {name!r}: its size is not known; set config.data.image_size and "
            "config.data.class_counts for compilation."
        )
    shape = (side, side, shape[2]) if side else shape
    train, test = _split(labels, shape), _split(np.arange(num_test) % num_classes, shape)
    return Dataset(name, train, test, tuple(str(c) for c in range(num_classes)), "no images")


def abstract_extra(data_config: registry.Config, shape: tuple[int, ...]) -> extra.Extra | None:
    """Returns as many extra images as `data_config["extra"]` has, of which only the shape (h, w, c) is known.

    Raises:
      FileNotFoundError: there is no such file or folder.
      ValueError: the file is not readable, or has no labels.
    """
    if not data_config.get("extra"):
        return None
    number = extra.count_images(Path(data_config["extra"]).expanduser())
    return extra.Extra(_split(np.zeros(number, np.int64), (shape[0], shape[1], shape[2])), "no images")


def without_split_file(data_config: registry.Config) -> dict[str, Any]:
    """Returns the config of as many training images as the split file has, without their labels.

    Where neither class counts nor a profile is configured, the images are distributed evenly over the classes. Without
    the file, the class counts or the profile are used alone. Digits are read, and keep the file.
    """
    options = dict(data_config)
    if not options.get("split_file") or options["name"] == "digits":
        return options
    name, options["split_file"] = options["split_file"], ""
    try:
        number = len(split_file.read(name).indices)
    except FileNotFoundError:
        log.warning("config.data.split_file: there is no file %s; the profile gives the number of images.", name)
        return options
    dataset = abstract_dataset(options)
    counts = longtail.long_tailed(dataset, {**options, "validation_per_class": 0, "resample_balanced": 0}).class_counts
    if options.get("imbalance", "none") == "none" and not options.get("class_counts"):
        classes = len(dataset.class_names)
        options["class_counts"] = tuple(len(part) for part in np.array_split(np.arange(number), classes))
    elif sum(counts) != number:
        raise ValueError(
            f"{name} has {number} images, but config.data describes {sum(counts)}: correct the profile, or set "
            "data.imbalance=none."
        )
    return options


def _split(label: np.ndarray, shape: tuple[int, int, int]) -> Split:
    return Split(AbstractImages((len(label), *shape)), label.astype(np.int32), np.arange(len(label), dtype=np.int64))
