"""Extra training images, such as generated ones with the labels of a classifier, from `config.data.extra`.

Gowal et al., "Improving Robustness using Generated Data", NeurIPS 2021: a fixed share of each batch is drawn from them.
"""

import dataclasses
import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from lt_adv.data import cache, folder, images, npz_file
from lt_adv.data.dataset import Dataset, Source, Split, SplitReader, array_reader, check_labels
from lt_adv.runtime import registry

PRIORS = ("real", "mixture")
ARRAYS = ("image", "label")
BLOCK_BYTES = 16 << 20  # of images that are compared at once
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Extra:
    """Extra training images.

    Attributes:
      split: the images. The `index` of image i is -1 - i: it is negative, unlike that of an image of the data set.
      digest: sha256 over pixels and labels; over the files, if they are not decoded.
      copies: name of a held-out split -> number of extra images that have the pixels of one of its images, or None if
        images of either are not decoded.
    """

    split: Split
    digest: str
    copies: Mapping[str, int | None] = dataclasses.field(default_factory=dict)


def load(dataset: Dataset, data_config: registry.Config, held_out: Mapping[str, Split] | None = None) -> Extra | None:
    """Returns the extra images of a config, memory-mapped from their cache, or None.

    A warning says how many of them are images of a held-out split.

    Args:
      dataset: the data set, with whose images and classes they must agree.
      data_config: extra (file or folder), and data_dir, image_size, max_device_gib as for `sources.load`.
      held_out: name -> split of the data set that is not for training.

    Raises:
      ValueError, FileNotFoundError: in one line, for missing or unreadable data, images of another shape than those of
        the data set, and labels that are not its classes.
    """
    if not data_config.get("extra"):
        return None
    path = Path(data_config["extra"]).expanduser()
    size, limit = data_config.get("image_size"), data_config.get("max_device_gib")
    shape = tuple(dataset.train.image.shape[1:])
    source = images_npz(path, size, shape, dataset) if path.is_file() else images_folder(path, size, shape, dataset)
    directory = data_config.get("data_dir") or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    data_dir = Path(directory).expanduser()
    _, splits, digest = cache.load_splits(data_dir, "extra", source, float("inf") if limit is None else limit * 2**30)
    copies = {}
    for name, split in (held_out or {}).items():
        copies[name] = _cached_number_of_copies(splits["extra"], split, data_dir, [digest, dataset.digest])
        if copies[name]:
            log.warning(
                "%s: %d of %d images are also %s images: remove them, because the network would be evaluated on images "
                "of its training.",
                path,
                copies[name],
                len(splits["extra"]),
                name,
            )
    return Extra(splits["extra"], digest, copies)


def _cached_number_of_copies(split: Split, held_out: Split, data_dir: Path, digests: list[str]) -> int | None:
    """Returns `number_of_copies`, from a cache if there is one: the comparison reads every extra image."""
    image, known = split.image, held_out.image
    if not isinstance(image, np.ndarray) or not isinstance(known, np.ndarray):
        return None
    rows = hashlib.sha256(np.ascontiguousarray(held_out.index, np.int64).tobytes()).hexdigest()

    def compute() -> dict[str, np.ndarray]:
        return {"copies": np.array(number_of_copies(image, known))}

    return int(cache.cached_arrays(data_dir, "extra-copies", [*digests, rows], compute)["copies"])


def number_of_copies(image: np.ndarray, held_out: np.ndarray) -> int:
    """Returns how many images have the same pixels as a held-out one; both uint8 [n, h, w, c].

    Of the held-out images only their digests are kept.
    """
    known = set(_digests(held_out))
    return sum(digest in known for digest in _digests(image))


def _digests(image: np.ndarray) -> Iterator[bytes]:
    rows = max(1, BLOCK_BYTES // image[:1].nbytes)
    for start in range(0, len(image), rows):
        for pixels in np.ascontiguousarray(image[start : start + rows]):
            yield hashlib.sha256(pixels).digest()


def images_npz(path: Path, size: int | None, shape: tuple[int, ...], dataset: Dataset) -> Source:
    """Returns the source of a file with `image`, uint8 [n, h, w] or [n, h, w, c], and `label`, integers [n]."""
    status = path.stat()

    def read() -> tuple[tuple[str, ...], dict[str, SplitReader]]:
        arrays = npz_file.read(path, ARRAYS, required=ARRAYS)
        image = npz_file.check_images(arrays["image"], f"{path}: image")
        check_labels(arrays["label"], len(image), len(dataset.class_names), f"{path}, label")
        image = images.resize(image, size)
        _check_shape(path, image.shape[1:], shape, dataset.name)
        return dataset.class_names, {"extra": array_reader(image, arrays["label"], _index(len(image)))}

    identity = [str(path.resolve()), status.st_size, status.st_mtime_ns]
    return Source([*identity, size, shape, dataset.class_names], read)


def images_folder(path: Path, size: int | None, shape: tuple[int, ...], dataset: Dataset) -> Source:
    """Returns the source of a folder with `<class>/**`; a class of the data set may have no images there.

    Images and their order are those of `folder.image_folder`.
    """
    files = _list_files(path)
    ids = {name: i for i, name in enumerate(dataset.class_names)}
    if unknown := sorted({c for c, *_ in files} - set(ids)):
        raise ValueError(
            f"{path} has a folder {unknown[0]!r}, which is not a class of {dataset.name}: its classes are "
            f"{', '.join(map(repr, dataset.class_names[:5]))}{', ...' if len(ids) > 5 else ''}."
        )

    def read() -> tuple[tuple[str, ...], dict[str, SplitReader]]:
        paths = [str(path / c / name) for c, name, *_ in files]
        label = np.array([ids[c] for c, *_ in files])
        sizes = json.dumps([(c, name, number) for c, name, number, _ in files])
        identity = hashlib.sha256(sizes.encode()).hexdigest()
        encoded = images.Encoded(paths, partial(folder.read_files, paths), label, _index(len(paths)), identity)
        readers = images.split_readers({"extra": encoded}, size)
        actual = readers["extra"].shape[1:]
        if actual[2] < shape[2]:  # grey images become colour images, as in an image folder
            actual = (*actual[:2], shape[2])
        _check_shape(path, actual, shape, dataset.name)
        return dataset.class_names, images.split_readers({"extra": encoded}, size, actual)

    return Source([files, size, shape, dataset.class_names], read)


def count_images(path: Path) -> int:
    """Returns the number of images in a file or folder, of which no image is read.

    Raises:
      ValueError: the file is not readable, or has no labels [n].
    """
    if not path.is_file():
        return len(_list_files(path))
    label = npz_file.read(path, ("label",), required=("label",))["label"]
    if label.ndim != 1:
        raise ValueError(f"{path}: label must be integers [n], not of shape {label.shape}.")
    return len(label)


def mixed_counts(
    class_counts: Sequence[int] | np.ndarray, extra: Extra, extra_per_batch: int, batch_size: int
) -> np.ndarray:
    """Returns the class counts n of the real images plus those m of extra images in the proportion of a batch.

        n_c + N E / (B - E) m_c / M,    N = sum n, M = sum m, E of B images of a batch are extra

    The prior of class c is then (B - E) / B n_c / N + E / B m_c / M. No count is less than without extra images.
    """
    n = np.asarray(class_counts)
    share = np.bincount(extra.split.label, minlength=len(n)) / len(extra.split)
    return n + n.sum() * extra_per_batch / (batch_size - extra_per_batch) * share


def _index(number: int) -> np.ndarray:
    return -1 - np.arange(number, dtype=np.int64)


def _list_files(path: Path) -> list[tuple[str, str, int, int]]:
    """Returns (class, path in its folder, bytes, modification time) of the images of a folder, sorted."""
    if not path.is_dir():
        raise FileNotFoundError(f"There is no file or folder {path}: set --config.data.extra to an .npz or a folder.")
    skipped: Counter[str] = Counter()
    listing = folder.list_images(path, skipped)
    if skipped:
        log.warning("%s: %d files are not read: %s.", path, skipped.total(), folder.format_counts(skipped))
    return [(c, *f) for c in sorted(listing) for f in listing[c]]


def _check_shape(path: Path, actual: Sequence[int], expected: Sequence[int], name: str) -> None:
    if tuple(actual) != tuple(expected):
        raise ValueError(
            f"The images of {path} are {_format(actual)} (height x width x channels), those of {name} are "
            f"{_format(expected)}; --config.data.image_size=N resizes both."
        )


def _format(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
