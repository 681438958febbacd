"""The official archives of CIFAR-10, CIFAR-100 and Tiny-ImageNet: found, checked and read.

Members are read in memory, nothing is ever extracted to disk.
"""

import dataclasses
import hashlib
import io
import os
import shutil
import tarfile
import tempfile
import urllib.request
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

Examples = Iterator[tuple[int, dict[str, Any]]]
"""(original index, the fields image (an encoded stream), label and index) of each image."""
VERSION = "1.0.0"  # of our TensorFlow-Datasets builders
OFFLINE = "python -m lt_adv.main --config=configs/robal.py:dataset=digits"


@dataclasses.dataclass(frozen=True)
class Archive:
    """An archive as its authors publish it; `size` in bytes."""

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


def obtain(archive: Archive, folder: Path, download: bool) -> Path:
    """The archive's path in `folder`, downloaded first where it is missing and `download` allows it.

    FileNotFoundError that says what to put where, or why the download failed.
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
        folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{archive.file}.", dir=folder)
        with os.fdopen(handle, "wb") as file, urllib.request.urlopen(archive.url, timeout=60) as response:
            shutil.copyfileobj(response, file)
        check(archive, Path(temporary))
        os.replace(temporary, path)
    except OSError as error:
        reason = getattr(error, "reason", None) or error.strerror or error
        raise FileNotFoundError(
            f"{archive.url} could not be downloaded to {folder} ({reason}): put {archive.file} there by hand "
            f"(sha256 {archive.sha256}); without any download: {OFFLINE}"
        ) from error
    finally:
        if temporary and os.path.exists(temporary):
            os.remove(temporary)
    return path


def check(archive: Archive, path: Path) -> None:
    """ValueError unless the file at `path` has the size and sha256 of the published archive."""
    size = path.stat().st_size
    if size != archive.size:
        raise ValueError(f"{path} has {size} bytes, {archive.file} has {archive.size}: delete it and fetch it again.")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != archive.sha256:
        raise ValueError(f"{path} has sha256 {digest}, not {archive.sha256}: delete it and fetch it again.")


def _safe(name: str, path: Path) -> str:
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or "\\" in name:
        raise ValueError(f"{path} has a member outside its own folder ({name!r}): it is refused.")
    return str(parts)


def _tar_members(path: Path) -> dict[str, bytes]:
    """The regular files of a .tar.gz, by their name without the folder."""
    try:
        with tarfile.open(path, "r:gz") as tar:
            return {
                PurePosixPath(_safe(member.name, path)).name: tar.extractfile(member).read()
                for member in tar
                if _safe(member.name, path) and member.isreg()
            }
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{path} is not a readable .tar.gz ({error}).") from error


def read_cifar(path: Path, coarse: bool) -> tuple[list[str], dict[str, Examples]]:
    """(class names, {"train": examples, "test": examples}) of a CIFAR binary archive.

    CIFAR-10: one label byte, then 3072 of pixels, red, green and blue planes [32, 32]. CIFAR-100 (`coarse`) has the
    superclass before the label. The original index counts through the batches in order. Images become PNG streams.
    """
    members = _tar_members(path)
    header = 2 if coarse else 1
    train = ["train.bin"] if coarse else [f"data_batch_{i}.bin" for i in range(1, 6)]
    test, names = ("test.bin", "fine_label_names.txt") if coarse else ("test_batch.bin", "batches.meta.txt")
    if missing := [name for name in (*train, test, names) if name not in members]:
        raise ValueError(f"{path} has no {', '.join(missing)}.")

    def examples(files: list[str]) -> Examples:
        records = np.frombuffer(b"".join(members[file] for file in files), np.uint8).reshape(-1, header + 3072)
        for index, record in enumerate(records):
            pixels = record[header:].reshape(3, 32, 32).transpose(1, 2, 0)
            yield index, {"image": _png(pixels), "label": int(record[header - 1]), "index": index}

    return members[names].decode().split(), {"train": examples(train), "test": examples([test])}


def _png(pixels: np.ndarray) -> io.BytesIO:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", compress_level=1)
    stream.seek(0)
    return stream


def read_tiny_imagenet(path: Path) -> tuple[list[str], dict[str, Examples]]:
    """(class names, {"train": examples, "test": examples}) of tiny-imagenet-200.zip.

    Labels are the positions of the WordNet ids in sorted order, names the first word of each. "test" is the published
    validation set, since the published test set has no labels. The original index of training image `<wnid>_<k>.JPEG`
    is (label x images per class) + k, that of `val_<k>.JPEG` is k. JPEG streams pass through unchanged.
    """
    try:
        zipped = zipfile.ZipFile(path)
        members = {PurePosixPath(_safe(name, path)).parts[1:]: name for name in zipped.namelist()}
        text = {name: zipped.read(members[(name,)]).decode() for name in ("wnids.txt", "words.txt")}
        annotations = zipped.read(members[("val", "val_annotations.txt")]).decode()
    except KeyError as error:
        raise ValueError(f"{path} has no {error}.") from error
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"{path} is not a readable .zip ({error}).") from error
    wnids = sorted(text["wnids.txt"].split())
    label = {wnid: i for i, wnid in enumerate(wnids)}

    words = dict(line.split("\t")[:2] for line in text["words.txt"].splitlines() if line)
    names = [words.get(wnid, wnid).split(",")[0].strip() for wnid in wnids]
    twice = {name for name, count in Counter(names).items() if count > 1}
    names = [f"{name} ({wnid})" if name in twice else name for name, wnid in zip(names, wnids, strict=True)]

    numbers: dict[str, list[tuple[int, str]]] = {wnid: [] for wnid in wnids}
    for parts, member in members.items():
        if len(parts) == 4 and parts[0] == "train" and parts[1] in label and parts[3].endswith(".JPEG"):
            numbers[parts[1]].append((int(parts[3].removesuffix(".JPEG").rsplit("_", 1)[1]), member))
    per_class = max(number for found in numbers.values() for number, _ in found) + 1

    def train() -> Examples:
        for wnid, found in numbers.items():
            for number, member in sorted(found):
                index = label[wnid] * per_class + number
                yield index, {"image": io.BytesIO(zipped.read(member)), "label": label[wnid], "index": index}

    def test() -> Examples:
        for line in annotations.splitlines():
            file, wnid = line.split("\t")[:2]
            index = int(file.removesuffix(".JPEG").rsplit("_", 1)[1])
            image = io.BytesIO(zipped.read(members[("val", "images", file)]))
            yield index, {"image": image, "label": label[wnid], "index": index}

    return names, {"train": train(), "test": test()}


ARCHIVES = {"cifar10": CIFAR10, "cifar100": CIFAR100, "tiny_imagenet": TINY_IMAGENET}
