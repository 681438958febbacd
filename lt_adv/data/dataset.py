"""What a data source hands over: uint8 images, labels, original indices, class names and a digest."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

ARRAYS = ("image", "label", "index")


@dataclasses.dataclass(frozen=True)
class Split:
    """`image` uint8 [n, h, w, c], `label` int32 [n], `index` int64 [n]: the position in the original data.

    Of a set that is too large to be kept decoded, `image` is an `images.LazyImages` in place of an array.
    """

    image: np.ndarray
    label: np.ndarray
    index: np.ndarray

    def __len__(self) -> int:
        return len(self.label)

    def take(self, positions: np.ndarray) -> "Split":
        """The examples at `positions`, in that order; images that are not decoded yet stay so."""
        image = self.image[positions] if isinstance(self.image, np.ndarray) else self.image.at(positions)
        return Split(image, self.label[positions], self.index[positions])


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A whole image classification set; `digest` (sha256) identifies every pixel, label, index and class name."""

    name: str
    train: Split
    test: Split
    class_names: tuple[str, ...]
    digest: str

    def __post_init__(self) -> None:
        for name, split in (("train", self.train), ("test", self.test)):
            labels(split.label, len(split.image), len(self.class_names), f"{self.name}, split {name}")


@dataclasses.dataclass(frozen=True)
class LongTailed:
    """A `Dataset` cut to a long tail; `class_counts` are those of `train`, after validation images were taken out
    (and it was equalised, where that was asked for: then an image may be in it more than once).

    `digest` (sha256) identifies the data set and which of its images were chosen for training and validation.
    """

    train: Split
    validation: Split | None
    test: Split
    class_names: tuple[str, ...]
    class_counts: tuple[int, ...]
    class_counts_before: tuple[int, ...]
    digest: str


@dataclasses.dataclass(frozen=True)
class SplitReader:
    """A split about to be decoded: `blocks()` yields its images in order, uint8 [k, h, w, c], of `shape` in all.

    `image`: an `images.LazyImages` of the same, where they can be decoded one by one.
    """

    shape: tuple[int, int, int, int]
    label: np.ndarray
    index: np.ndarray
    blocks: Callable[[], Iterator[np.ndarray]]
    image: Any = None


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a set comes from: `identity` is cheap and changes with the data, `read()` does the work.

    `identity`: anything JSON can write. `read() -> (class names, {"train": SplitReader, "test": SplitReader})`.
    """

    identity: object
    read: Callable[[], tuple[tuple[str, ...], dict[str, SplitReader]]]


def labels(label: Any, images: int, classes: float, where: str, advice: str = "") -> np.ndarray:
    """The labels that a source has for so many `images`, as they are, once they are known to be classes.

    ValueError, which begins with `where` and ends with `advice`, unless they are integers in [0, `classes`), one for
    each image; it has the first that is not, and how many there are.
    """
    label = np.asarray(label)
    if not images:
        raise ValueError(f"{where}: there are no images.")
    wanted = f"{where}: the labels must be {images} whole numbers from 0"
    if label.shape != (images,):
        hint = ": of one-hot labels, take argmax(axis=-1)" if label.ndim == 2 and label.shape[1] > 1 else ""
        raise ValueError(f"{wanted}, one for each image, not {label.dtype} {label.shape}{hint}.{advice}")
    if label.dtype.kind not in "iu":
        broken = label[~np.isfinite(label) | (label != np.trunc(label))] if label.dtype.kind == "f" else label
        shown = f" ({len(broken)} of which are not integers, such as {broken[0]})" if len(broken) else ""
        raise ValueError(f"{wanted}, of an integer type, not {label.dtype}{shown}.{advice}")
    wrong = label[(label < 0) | (label >= classes)]
    if len(wrong):
        if wrong.min() < 0:
            advice = advice or " Leave out images without a label, or choose a split that has labels."
        to = f" to {classes - 1}" if classes < float("inf") else ""
        raise ValueError(
            f"{where}: {len(wrong)} of {images} labels are not whole numbers from 0{to}, such as {wrong[0]}.{advice}"
        )
    return label


def listed(classes: Sequence[int], names: Sequence[str], most: int = 5) -> str:
    """class 1 ('cat'), class 7 ('dog') and 3 more: for an error of one line."""
    more = f" and {len(classes) - most} more" if len(classes) > most else ""
    return ", ".join(f"class {c} ({names[c]!r})" for c in classes[:most]) + more


def decoding(image: np.ndarray, label: np.ndarray, index: np.ndarray) -> SplitReader:
    """A split whose images are in memory already."""
    return SplitReader(image.shape, label.astype(np.int32), index.astype(np.int64), lambda: iter([image]))


def sha256(array: Any) -> str:
    """The sha256 of an array's bytes in C order; of images that are not decoded, what identifies them."""
    if not isinstance(array, np.ndarray):
        return array.digest
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8)).hexdigest()


def digest_of(class_names: tuple[str, ...], arrays: dict[str, dict]) -> str:
    """The digest of a set: sha256 over its class names and each array's shape, dtype and sha256."""
    text = json.dumps({"class_names": class_names, "arrays": arrays}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def in_memory(name: str, source: Source) -> Dataset:
    """A `Dataset` without a cache, for sets small enough to be read at every start."""
    class_names, decodings = source.read()
    splits = {k: Split(np.concatenate(list(d.blocks())), d.label, d.index) for k, d in decodings.items()}
    return make_dataset(name, class_names, splits)


def make_dataset(name: str, class_names: tuple[str, ...], splits: dict[str, Split]) -> Dataset:
    """The `Dataset` of these splits."""
    arrays = {}
    for split_name, split in splits.items():
        for field in ARRAYS:
            array = getattr(split, field)
            if isinstance(array, np.ndarray):
                array.flags.writeable = False  # as the memory-mapped arrays of the cache
            arrays[f"{split_name}_{field}"] = {"shape": array.shape, "dtype": str(array.dtype), "sha256": sha256(array)}
    return Dataset(name, splits["train"], splits["test"], class_names, digest_of(class_names, arrays))
