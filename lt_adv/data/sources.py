"""Where the images come from: `load(data_config)` answers every data set by name.

`digits` and `npz` are read as they are, `image_folder` is decoded, `cifar10`, `cifar100` and `tiny_imagenet` are
prepared by our own TensorFlow-Datasets builders, and any other name is looked up in TensorFlow-Datasets.
"""

import hashlib
import json
import os
import stat
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lt_adv.data import cache, images
from lt_adv.data.dataset import Dataset, Decoding, Source, decoding, in_memory

SPLITS = ("train", "test")
ARRAYS = ("train_image", "train_label", "test_image", "test_label", "class_names")  # of an .npz; the last is optional


def load(data_config: Mapping[str, Any]) -> Dataset:
    """The data set called `data_config["name"]`, memory-mapped from the cache in `data_dir` where it is not embedded.

    Keys: name; data_dir (None: $TFDS_DATA_DIR or ~/tensorflow_datasets); path (image_folder, npz); image_size (None: as
    it is); download (False); resident_gib (None: any): where the training images would take more, and there is no cache
    yet, they are not decoded now but when they are used. ValueError or FileNotFoundError, in one line, for anything
    missing, unknown or unreadable.
    """
    name, size = data_config["name"], data_config.get("image_size")
    if size is not None and (size != int(size) or not 1 <= size <= images.LARGEST):
        raise ValueError(f"image_size must be a whole number of pixels in [1, {images.LARGEST}], not {size}.")
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

        source = tfds_source.source(name, data_dir, size, bool(data_config.get("download", False)))
    limit = data_config.get("resident_gib")
    return cache.load(data_dir, name, source, float("inf") if limit is None else limit * 2**30)


def digits(size: int | None = None) -> Source:
    """scikit-learn's handwritten digits: 1797 images 8 x 8 x 1, ten classes, grey levels 0..16 scaled to 0..255.

    Stratified 70/30 split, always the same: of each class, int(0.7 n) images drawn by a generator seeded with 0 are for
    training.
    """

    def read() -> tuple[tuple[str, ...], dict[str, Decoding]]:
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

    def read() -> tuple[tuple[str, ...], dict[str, Decoding]]:
        try:
            with np.load(path, allow_pickle=False) as file:
                there = sorted(file.files)
                arrays = {k: file[k] for k in ARRAYS if k in there}
        except Exception as error:  # a damaged zip fails in many ways
            raise ValueError(f"{path} is not a readable .npz without pickled objects ({error}).") from error
        if missing := [k for k in ARRAYS[:-1] if k not in arrays]:
            raise ValueError(f"{path} has no array {', '.join(missing)}; it has {', '.join(there) or 'none'}.")
        if other := [k for k, array in arrays.items() if not isinstance(array, np.ndarray)]:
            raise ValueError(f"{path}: {other[0]} is no array.")
        splits, largest = {}, 0
        for split in SPLITS:
            image, label = arrays[f"{split}_image"], arrays[f"{split}_label"]
            image = image[..., None] if image.ndim == 3 else image
            if image.dtype != np.uint8 or image.ndim != 4 or image.shape[-1] not in (1, 3) or not image.size:
                raise ValueError(
                    f"{path}: {split}_image must be uint8 [n, h, w] or [n, h, w, 1 or 3], "
                    f"not {image.dtype} {image.shape}."
                )
            if label.shape != image.shape[:1] or label.dtype.kind not in "iu" or label.min() < 0:
                raise ValueError(
                    f"{path}: {split}_label must be {len(image)} whole numbers from 0, not {label.dtype} {label.shape}."
                )
            splits[split] = decoding(images.resize(image, size), label, np.arange(len(label)))
            largest = max(largest, int(label.max()))
        if splits["train"].shape[1:] != splits["test"].shape[1:]:
            shapes = " and ".join(f"{s} images are {d.shape[1:]}" for s, d in splits.items())
            raise ValueError(f"{path}: {shapes}.")
        if largest >= len(splits["train"].label):
            raise ValueError(
                f"{path}: the labels go up to {largest}, and each class needs an image of its own to train on."
            )
        names = tuple(str(n) for n in np.atleast_1d(arrays.get("class_names", np.arange(largest + 1))))
        if len(names) <= largest:
            raise ValueError(f"{path}: class_names has {len(names)} entries, the labels go up to {largest}.")
        return names, splits

    return Source([str(path.resolve()), about.st_size, about.st_mtime_ns, size], read)


def image_folder(path: Path, size: int | None = None) -> Source:
    """`<path>/train/<class>/*` and `<path>/test/<class>/*`, JPEG or PNG: classes in alphabetical order.

    The original index of an image is its position among all images of its split, sorted by class, then by name. Grey
    images become colour where the set has any colour image; EXIF orientation is ignored.
    """
    listing = {split: _list_images(path / split) for split in SPLITS}
    classes = {split: sorted(found) for split, found in listing.items()}
    for split, other in (SPLITS, SPLITS[::-1]):
        if odd := sorted(set(classes[split]) - set(classes[other])):
            raise ValueError(f"The class {odd[0]!r} of {path / split} has no images in {path / other}.")

    files = {s: [(c, *f) for c in classes[s] for f in listing[s][c]] for s in SPLITS}

    def read() -> tuple[tuple[str, ...], dict[str, Decoding]]:
        ids = {c: i for i, c in enumerate(classes["train"])}
        encoded = {}
        for split in SPLITS:
            paths = [str(path / split / c / name) for c, name, *_ in files[split]]
            label = np.array([ids[c] for c, *_ in files[split]])
            sizes = json.dumps([(c, name, size) for c, name, size, _ in files[split]])
            identity = hashlib.sha256(sizes.encode()).hexdigest()
            encoded[split] = images.Encoded(paths, partial(_read_files, paths), label, np.arange(len(paths)), identity)
        return tuple(classes["train"]), images.decodings(encoded, size)

    return Source([files, size], read)


def _read_files(paths: list[str], positions: Sequence[int]) -> list[bytes]:
    contents = []
    for position in positions:
        try:
            contents.append(Path(paths[position]).read_bytes())
        except OSError as error:
            raise images.BadImage(f"{paths[position]} cannot be read ({error.strerror}).") from error
    return contents


def _list_images(folder: Path) -> dict[str, list[tuple[str, int, int]]]:
    """Per class, the sorted (name, bytes, modification time in ns) of its images; hidden files do not count."""
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}; an image folder has train/<class>/, test/<class>/.")
    listing = {}
    for entry in os.scandir(folder):
        if entry.is_dir() and not entry.name.startswith("."):
            found = [
                (file.name, *_size_and_time(file))
                for file in os.scandir(entry)
                if file.name.lower().endswith((".jpg", ".jpeg", ".png")) and not file.name.startswith(".")
            ]
            if not found:
                raise ValueError(f"The class folder {folder / entry.name} has no JPEG or PNG image.")
            listing[entry.name] = sorted(found)
    if not listing:
        raise ValueError(f"The folder {folder} has no class folders.")
    return listing


def _size_and_time(file: os.DirEntry) -> tuple[int, int]:
    """Bytes, and modification time in ns; a pipe or a device could be read forever."""
    about = file.stat()
    if not stat.S_ISREG(about.st_mode):
        raise ValueError(f"{file.path} is no file: an image folder has images and nothing else under such names.")
    return about.st_size, about.st_mtime_ns
