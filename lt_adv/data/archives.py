"""Downloads, checks and reads the official archives of CIFAR-10, CIFAR-100 and Tiny-ImageNet.

Members are read in memory; nothing is extracted to disk.
"""

import dataclasses
import hashlib
import io
import os
import re
import shutil
import tarfile
import tempfile
import urllib.request
import zipfile
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, TypedDict

import numpy as np
from PIL import Image

from lt_adv.runtime import atomic_io


class Example(TypedDict):
    """One image as TensorFlow-Datasets stores it."""

    image: BinaryIO  # encoded
    label: int
    index: int  # in the original data


Examples = Iterator[tuple[int, Example]]  # yields (key, example); the key is the original index
Splits = dict[str, Examples]
VERSION = "1.0.0"  # of our TensorFlow-Datasets builders
MAX_MEMBER_BYTES = 200 << 20  # the largest official member has 154 million
IMAGE_NAME = re.compile(r".*_([0-9]{1,9})\.JPEG")  # file name of an image of Tiny-ImageNet
ARCHIVE_FORMATS = (atomic_io.GZIP, atomic_io.ZIP, atomic_io.DAMAGED_ZIP)
OFFLINE = "python -m lt_adv.main --config=configs/robal.py:dataset=digits"


@dataclasses.dataclass(frozen=True)
class Archive:
    """A published archive; `size` is in bytes."""

    file: str
    url: str
    size: int
    sha256: str


CIFAR10 = Archive(
    "cifar-10-binary.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    170052171,
    "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
)
CIFAR100 = Archive(
    "cifar-100-binary.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
    168513733,
    "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
)
TINY_IMAGENET = Archive(
    "tiny-imagenet-200.zip",
    "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    248100043,
    "6198c8ae015e2b3e007c7841da39ec069199b9aa3bfa943a462022fe5e43c821",
)


def ensure_downloaded(archive: Archive, folder: Path, download: bool) -> Path:
    """Returns the archive's path in `folder`; downloads it if it is missing and `download` is true.

    Raises:
      FileNotFoundError: the archive is missing, or the download failed; the message says what to put where.
    """
    path = folder / archive.file
    if path.is_file():
        return path
    if not download:
        raise FileNotFoundError(
            f"{archive.file} is not in {folder}: put it there (sha256 {archive.sha256}), or let "
            f"--config.data.download=True fetch it from {archive.url}; without any download: {OFFLINE}"
        )
    temporary = None
    try:
        atomic_io.make_folder(folder)
        handle, temporary = tempfile.mkstemp(prefix=f".{archive.file}.", dir=folder)
        with os.fdopen(handle, "wb") as file, urllib.request.urlopen(archive.url, timeout=60) as response:
            shutil.copyfileobj(response, file)
        check(archive, Path(temporary))
        atomic_io.sync(temporary)
        os.replace(temporary, path)
        atomic_io.sync(folder)
    except OSError as error:
        reason = getattr(error, "reason", None) or error.strerror or error
        raise FileNotFoundError(
            f"{archive.url} could not be downloaded to {folder} ({reason}): put {archive.file} there yourself "
            f"(sha256 {archive.sha256}); without any download: {OFFLINE}"
        ) from error
    finally:
        if temporary and os.path.exists(temporary):
            os.remove(temporary)
    return path


def check(archive: Archive, path: Path) -> None:
    """Raises ValueError unless the file at `path` has the size and sha256 of the published archive."""
    size, file_format = path.stat().st_size, atomic_io.format_of(path)
    if size != archive.size and file_format not in (None, *ARCHIVE_FORMATS):
        raise ValueError(f"{path} is {file_format}. Put the published archive there, from {archive.url}.")
    if size != archive.size:
        raise ValueError(
            f"{path} has {size} bytes, {archive.file} has {archive.size}: delete it and download it again."
        )
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != archive.sha256:
        raise ValueError(f"{path} has sha256 {digest}, not {archive.sha256}: delete it and download it again.")


def _safe_name(name: str) -> str:
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or "\\" in name:
        raise ValueError(f"it has a member outside its folder, {name!r}")
    return str(parts)


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} is not a readable archive ({atomic_io.reason(path, error, *ARCHIVE_FORMATS)}).")


def _check_size(name: str, size: int) -> None:
    if size > MAX_MEMBER_BYTES:
        raise ValueError(f"{name} declares {size} bytes, more than the maximum of {MAX_MEMBER_BYTES}")


def _tar_members(path: Path, names: Collection[str]) -> dict[str, bytes]:
    """Returns {file name: content} of a .tar.gz, for `names` in any folder; raises ValueError if one is missing."""
    members = {}
    try:
        with tarfile.open(path, "r:gz") as tar:
            for member in tar:
                name = PurePosixPath(_safe_name(member.name)).name
                if name in names and (file := tar.extractfile(member) if member.isreg() else None):
                    _check_size(name, member.size)
                    members[name] = file.read()
    except Exception as error:  # tarfile and gzip raise many types for a damaged archive
        raise _unreadable(path, error) from error
    if missing := [name for name in names if name not in members]:
        raise ValueError(f"{path} has no {', '.join(missing)}.")
    return members


def read_cifar(path: Path, coarse: bool) -> tuple[list[str], dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Returns (class names, {"train": (images, labels), "test": (images, labels)}) of a CIFAR binary archive.

    Images are uint8 [n, 32, 32, 3], labels int64 [n]. A record of CIFAR-10 is one label byte and 3072 bytes of pixels,
    the red, green and blue planes [32, 32]; CIFAR-100 (`coarse`) has the superclass before the label. The original
    index of an image is its position: it counts the records of all batches in order.
    """
    header, num_classes = (2, 100) if coarse else (1, 10)
    train = ["train.bin"] if coarse else [f"data_batch_{i}.bin" for i in range(1, 6)]
    test, names = ("test.bin", "fine_label_names.txt") if coarse else ("test_batch.bin", "batches.meta.txt")
    members = _tar_members(path, (*train, test, names))
    classes = _text(members[names], path, names).split()
    for file in (*train, test):
        labels = np.frombuffer(members[file], np.uint8)[header - 1 :: header + 3072]
        if not members[file] or len(members[file]) % (header + 3072) or labels.max() >= len(classes):
            raise ValueError(
                f"{path}: {file} must hold images of {len(classes)} classes with {header + 3072} bytes each "
                f"(it has {len(members[file])} bytes, labels up to {max(labels, default=0)})."
            )
    check_classes(path, classes, num_classes)

    def arrays(files: list[str]) -> tuple[np.ndarray, np.ndarray]:
        records = np.frombuffer(b"".join(members[file] for file in files), np.uint8).reshape(-1, header + 3072)
        pixels = records[:, header:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return np.ascontiguousarray(pixels), records[:, header - 1].astype(np.int64)

    return classes, {"train": arrays(train), "test": arrays([test])}


def encoded_examples(image: np.ndarray, label: np.ndarray) -> Examples:
    """Yields the images as PNG streams, with their labels and positions."""
    for index, (pixels, class_id) in enumerate(zip(image, label, strict=True)):
        yield index, {"image": _png(pixels), "label": int(class_id), "index": index}


def check_classes(path: Path, names: Collection[str], num_classes: int) -> None:
    """Raises ValueError unless there are `num_classes` names."""
    if len(names) != num_classes:
        raise ValueError(f"{path} names {len(names)} classes instead of {num_classes}.")


def _text(content: bytes, path: Path, name: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: {name} is not UTF-8 text ({error}).") from error


def _png(pixels: np.ndarray) -> io.BytesIO:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", compress_level=1)
    stream.seek(0)
    return stream


def read_tiny_imagenet(path: Path) -> tuple[list[str], Splits]:
    """Returns (class names, {"train": examples, "test": examples}) of tiny-imagenet-200.zip.

    Labels are the positions of the WordNet ids in sorted order; class names are the first words. "test" is the
    published validation set, because the published test set has no labels. The original index of the training image
    `<wnid>_<k>.JPEG` is (label x images per class) + k, that of `val_<k>.JPEG` is k. JPEG streams are unchanged.
    """
    try:
        zipped = zipfile.ZipFile(path)
        members = {PurePosixPath(_safe_name(name)).parts[1:]: name for name in zipped.namelist()}
    except Exception as error:  # zipfile raises many types for a damaged archive
        raise _unreadable(path, error) from error

    def content(*parts: str) -> bytes:
        if parts not in members:
            raise ValueError(f"{path} has no {'/'.join(parts)}.")
        try:
            _check_size(parts[-1], zipped.getinfo(members[parts]).file_size)
            return zipped.read(members[parts])
        except Exception as error:
            raise _unreadable(path, error) from error

    def lines(*parts: str) -> list[str]:
        return [line for line in _text(content(*parts), path, parts[-1]).splitlines() if line]

    wnids = sorted(" ".join(lines("wnids.txt")).split())
    label = {wnid: i for i, wnid in enumerate(wnids)}
    words = {wnid: text for wnid, _, text in (line.partition("\t") for line in lines("words.txt"))}
    names = [(words.get(wnid) or wnid).split("\t")[0].split(",")[0].strip() for wnid in wnids]
    repeated = {name for name, count in Counter(names).items() if count > 1}
    names = [f"{name} ({wnid})" if name in repeated else name for name, wnid in zip(names, wnids, strict=True)]

    numbers: dict[str, list[tuple[int, tuple[str, ...]]]] = {wnid: [] for wnid in wnids}
    for parts in members:
        if len(parts) == 4 and parts[0] == "train" and parts[1] in label and (match := IMAGE_NAME.fullmatch(parts[3])):
            numbers[parts[1]].append((int(match[1]), parts))
    annotations = [line.split("\t")[:2] for line in lines("val", "val_annotations.txt")]

    def is_valid(row: list[str]) -> bool:
        return len(row) == 2 and row[1] in label and IMAGE_NAME.fullmatch(row[0]) is not None

    if invalid := [row for row in annotations if not is_valid(row)]:
        raise ValueError(f"{path}: the row {invalid[0]} of val_annotations.txt is not an image and its class.")
    if not annotations or not any(numbers.values()):
        raise ValueError(f"{path} has no images of its classes.")
    per_class = max(number for members_of_class in numbers.values() for number, _ in members_of_class) + 1

    def train() -> Examples:
        for wnid, members_of_class in numbers.items():
            for number, parts in sorted(members_of_class):
                index = label[wnid] * per_class + number
                yield index, {"image": io.BytesIO(content(*parts)), "label": label[wnid], "index": index}

    def test() -> Examples:
        for file, wnid in annotations:
            index = int(IMAGE_NAME.sub(r"\1", file))
            image = io.BytesIO(content("val", "images", file))
            yield index, {"image": image, "label": label[wnid], "index": index}

    return names, {"train": train(), "test": test()}


CIFAR = ("cifar10", "cifar100")
ARCHIVES = {"cifar10": CIFAR10, "cifar100": CIFAR100, "tiny_imagenet": TINY_IMAGENET}
