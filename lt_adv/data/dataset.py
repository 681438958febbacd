"""Data set types: uint8 images, labels, original indices, class names and a digest."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol, TypedDict

import numpy as np
import numpy.typing as npt

ARRAYS = ("image", "label", "index")


class EncodedImages(Protocol):
    """Images [n, h, w, c] that are decoded at each access; `images.LazyImages` implements it."""

    shape: tuple[int, int, int, int]
    dtype: np.dtype
    ndim: int
    nbytes: int

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """Returns uint8 [k, h, w, c], decoded by a thread pool."""

    def __array__(self, dtype: object = None, copy: bool | None = None) -> np.ndarray: ...

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Returns uint8 [k, h, w, c], decoded in the caller's thread."""

    def at(self, rows: np.ndarray) -> "EncodedImages":
        """Returns the images at these positions without decoding them."""

    @property
    def digest(self) -> str:
        """A hash of the files and of the selected rows."""


Images = np.ndarray | EncodedImages


class ArrayInfo(TypedDict):
    """Description of an array, a part of the digest of a data set."""

    shape: Sequence[int]
    dtype: str
    sha256: str


@dataclasses.dataclass(frozen=True)
class Split:
    """The images of a split.

    Attributes:
      image: uint8 [n, h, w, c]; an `images.LazyImages` if the set is too large to be decoded.
      label: int32 [n].
      index: int64 [n], positions in the original data.
    """

    image: Images
    label: np.ndarray
    index: np.ndarray

    def __len__(self) -> int:
        return len(self.label)

    def take(self, positions: np.ndarray) -> "Split":
        """Returns the examples at `positions`, in that order; encoded images stay encoded."""
        image = self.image[positions] if isinstance(self.image, np.ndarray) else self.image.at(positions)
        return Split(image, self.label[positions], self.index[positions])


def read_rows(splits: Sequence[Split], rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (image, label, index) at `rows` of the concatenated splits; decodes images in the caller's thread."""
    if len(splits) == 1:
        (split,) = splits
        image = split.image[rows] if isinstance(split.image, np.ndarray) else split.image.read(rows)
        return image, split.label[rows], split.index[rows]
    image = np.empty((len(rows), *splits[0].image.shape[1:]), np.uint8)
    label, index = np.empty(len(rows), np.int32), np.empty(len(rows), np.int64)
    first = 0
    for split in splits:
        member = (rows >= first) & (rows < first + len(split))
        if member.any():
            image[member], label[member], index[member] = read_rows([split], rows[member] - first)
        first += len(split)
    return image, label, index


@dataclasses.dataclass(frozen=True)
class Dataset:
    """An image classification set; `digest` (sha256) covers every pixel, label, index and class name."""

    name: str
    train: Split
    test: Split
    class_names: tuple[str, ...]
    digest: str

    def __post_init__(self) -> None:
        for name, split in (("train", self.train), ("test", self.test)):
            check_labels(split.label, len(split.image), len(self.class_names), f"{self.name}, split {name}")


@dataclasses.dataclass(frozen=True)
class LongTailed:
    """A long-tailed subset of a `Dataset`.

    Attributes:
      train: the training images; after `resample_balanced` an image may be repeated.
      validation: a balanced validation split, or None.
      test: the complete test split.
      class_names: one per class.
      class_counts: images per class of `train`.
      class_counts_before: images per class before the validation split and `resample_balanced`.
      digest: sha256 of the data set's digest and the selected images.
      split_file: name and sha256 of the file that selects the images, or "".
    """

    train: Split
    validation: Split | None
    test: Split
    class_names: tuple[str, ...]
    class_counts: tuple[int, ...]
    class_counts_before: tuple[int, ...]
    digest: str
    split_file: str = ""


@dataclasses.dataclass(frozen=True)
class SplitReader:
    """A split of a data set that has not been decoded yet.

    Attributes:
      shape: shape of all images, [n, h, w, c].
      label: int32 [n].
      index: int64 [n].
      blocks: function that yields the images in order, in arrays uint8 [k, h, w, c].
      image: an `images.LazyImages` of the same images if they can be decoded one by one, else None.
    """

    shape: tuple[int, int, int, int]
    label: np.ndarray
    index: np.ndarray
    blocks: Callable[[], Iterator[np.ndarray]]
    image: EncodedImages | None = None


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a data set is read from.

    Attributes:
      identity: a JSON-serializable value that changes with the data and is cheap to compute.
      read: function that returns (class names, {"train": SplitReader, "test": SplitReader}).
    """

    identity: object
    read: Callable[[], tuple[tuple[str, ...], dict[str, SplitReader]]]


def check_labels(label: npt.ArrayLike, images: int, classes: float, where: str, advice: str = "") -> np.ndarray:
    """Returns the labels unchanged if they are integers in [0, `classes`), one for each of `images` images.

    Raises:
      ValueError: otherwise. The message begins with `where`, gives the number of invalid labels and the first of them,
        and ends with `advice`.
    """
    label = np.asarray(label)
    if not images:
        raise ValueError(f"{where}: there are no images.")
    rule = f"{where}: the labels must be {images} whole numbers from 0"
    if label.shape != (images,):
        hint = ": convert one-hot labels with argmax(axis=-1)" if label.ndim == 2 and label.shape[1] > 1 else ""
        raise ValueError(f"{rule}, one for each image, not {label.dtype} {label.shape}{hint}.{advice}")
    if label.dtype.kind not in "iu":
        fractions = label[~np.isfinite(label) | (label != np.trunc(label))] if label.dtype.kind == "f" else label
        example = f" ({len(fractions)} of which are not integers, such as {fractions[0]})" if len(fractions) else ""
        raise ValueError(f"{rule}, of an integer type, not {label.dtype}{example}.{advice}")
    invalid = label[(label < 0) | (label >= classes)]
    if len(invalid):
        if invalid.min() < 0:
            advice = advice or " Remove images without a label, or choose a split that has labels."
        upper = f" to {classes - 1}" if classes < float("inf") else ""
        raise ValueError(
            f"{where}: {len(invalid)} of {images} labels are not whole numbers from 0{upper}, such as {invalid[0]}."
            f"{advice}"
        )
    return label


def format_classes(classes: Sequence[int] | np.ndarray, names: Sequence[str], limit: int = 5) -> str:
    """Returns the classes in one line for an error message: "class 1 ('cat'), class 7 ('dog') and 3 more"."""
    more = f" and {len(classes) - limit} more" if len(classes) > limit else ""
    return ", ".join(f"class {c} ({names[c]!r})" for c in classes[:limit]) + more


def array_reader(image: np.ndarray, label: np.ndarray, index: np.ndarray) -> SplitReader:
    """Returns a reader of images that are in memory."""
    return SplitReader(image.shape, label.astype(np.int32), index.astype(np.int64), lambda: iter([image]))


def sha256(array: Images) -> str:
    """Returns the sha256 of an array's bytes in C order, or the digest of `images.LazyImages`."""
    if not isinstance(array, np.ndarray):
        return array.digest
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()


def digest_of(class_names: Sequence[str], arrays: Mapping[str, ArrayInfo]) -> str:
    """Returns the digest of a data set: sha256 over its class names and each array's shape, dtype and sha256."""
    text = json.dumps({"class_names": class_names, "arrays": arrays}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def in_memory(name: str, source: Source) -> Dataset:
    """Reads a `Dataset` without a cache, for sets that are small enough to be read at every start."""
    class_names, readers = source.read()
    splits = {k: Split(np.concatenate(list(r.blocks())), r.label, r.index) for k, r in readers.items()}
    return make_dataset(name, class_names, splits)


def make_dataset(name: str, class_names: tuple[str, ...], splits: dict[str, Split]) -> Dataset:
    """Returns the `Dataset` of these splits; makes their arrays read-only and computes the digest."""
    return Dataset(name, splits["train"], splits["test"], class_names, digest_splits(class_names, splits))


def digest_splits(class_names: tuple[str, ...], splits: Mapping[str, Split]) -> str:
    """Returns the digest of a data set with these splits, and makes their arrays read-only."""
    arrays: dict[str, ArrayInfo] = {}
    for split_name, split in splits.items():
        for field in ARRAYS:
            array = getattr(split, field)
            if isinstance(array, np.ndarray):
                array.flags.writeable = False  # like the memory-mapped arrays of the cache
            arrays[f"{split_name}_{field}"] = {"shape": array.shape, "dtype": str(array.dtype), "sha256": sha256(array)}
    return digest_of(class_names, arrays)
