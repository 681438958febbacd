"""Image folders as a `Source`: `<path>/train/<class>/...` and `<path>/test/<class>/...`."""

import hashlib
import json
import logging
import os
import stat
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np

from lt_adv.data import images
from lt_adv.data.dataset import Source, SplitReader

SPLITS = ("train", "test")
HIDDEN = (".", "__MACOSX")  # macOS adds the second to zip archives
log = logging.getLogger(__name__)


def image_folder(path: Path, size: int | None = None) -> Source:
    """Returns the source of `<path>/train/<class>/**` and `<path>/test/<class>/**`, with classes in alphabetical order.

    Images are files with one of `images.SUFFIXES`, in a class folder or in folders below it. The original index of an
    image is its position in its split, sorted by class and then by its path in the class folder. Grey images are
    converted to colour if the set has any colour image; only the first frame of an animated image is read; EXIF
    orientation is ignored. A warning counts the other files by suffix, without hidden ones.
    """
    skipped: Counter[str] = Counter()
    listing = {split: list_images(path / split, skipped) for split in SPLITS}
    classes = {split: sorted(by_class) for split, by_class in listing.items()}
    for split, other in (SPLITS, SPLITS[::-1]):
        if missing := sorted(set(classes[split]) - set(classes[other])):
            raise ValueError(f"The class {missing[0]!r} of {path / split} has no images in {path / other}.")
    if skipped:
        log.warning("%s: %d files are not read: %s.", path, skipped.total(), format_counts(skipped))

    files = {s: [(c, *f) for c in classes[s] for f in listing[s][c]] for s in SPLITS}

    def read() -> tuple[tuple[str, ...], dict[str, SplitReader]]:
        ids = {c: i for i, c in enumerate(classes["train"])}
        encoded = {}
        for split in SPLITS:
            paths = [str(path / split / c / name) for c, name, *_ in files[split]]
            label = np.array([ids[c] for c, *_ in files[split]])
            sizes = json.dumps([(c, name, size) for c, name, size, _ in files[split]])
            identity = hashlib.sha256(sizes.encode()).hexdigest()
            encoded[split] = images.Encoded(paths, partial(read_files, paths), label, np.arange(len(paths)), identity)
        return tuple(classes["train"]), images.split_readers(encoded, size)

    return Source([files, size], read)


def read_files(paths: list[str], positions: Sequence[int]) -> list[bytes]:
    contents = []
    for position in positions:
        try:
            contents.append(Path(paths[position]).read_bytes())
        except OSError as error:
            raise images.BadImage(f"{paths[position]} cannot be read ({error.strerror}).") from error
    return contents


def list_images(folder: Path, skipped: Counter[str]) -> dict[str, list[tuple[str, int, int]]]:
    """Returns {class: sorted (path in its folder, bytes, modification time in ns) of its images}; adds to `skipped`."""
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}; an image folder has train/<class>/ and test/<class>/.")
    listing = {}
    for entry in os.scandir(folder):
        if entry.name.startswith(HIDDEN):
            continue
        if not entry.is_dir():
            skipped["images outside class folders" if _is_image(entry) else _suffix(entry)] += 1
            continue
        others: Counter[str] = Counter()
        members = _images_in(entry.path, "", (), others)
        if not members:
            more = f", but {others.total()} other files: {format_counts(others)}" if others else ""
            raise ValueError(f"The class folder {folder / entry.name} has no images{more}.")
        listing[entry.name] = sorted(members)
        skipped += others
    if not listing:
        raise ValueError(f"The folder {folder} has no class folders.")
    return listing


def _images_in(
    folder: str, prefix: str, parents: tuple[tuple[int, int], ...], skipped: Counter[str]
) -> list[tuple[str, int, int]]:
    """Returns the images in and below a folder; `parents` are the (device, inode) pairs of the folders above it."""
    status = os.stat(folder)
    inode = (status.st_dev, status.st_ino)
    if inode in parents:
        skipped["links to a folder above"] += 1
        return []
    members = []
    for entry in os.scandir(folder):
        if entry.name.startswith(HIDDEN):
            continue
        if _is_image(entry):
            members.append((prefix + entry.name, *_size_and_time(entry)))
        elif entry.is_dir():
            members += _images_in(entry.path, f"{prefix}{entry.name}/", (*parents, inode), skipped)
        else:
            skipped[_suffix(entry)] += 1
    return members


def _suffix(file: os.DirEntry) -> str:
    return PurePosixPath(file.name).suffix.lower() or "without suffix"


def _is_image(file: os.DirEntry) -> bool:
    return _suffix(file) in images.SUFFIXES


def format_counts(skipped: Counter[str], limit: int = 8) -> str:
    """Returns "3 .txt, 2 .heic", the most frequent first."""
    ranked = sorted(skipped.items(), key=lambda item: (-item[1], item[0]))
    more = f" and {sum(n for _, n in ranked[limit:])} of other kinds" if len(ranked) > limit else ""
    return ", ".join(f"{n} {ascii(kind)[1:-1]}" for kind, n in ranked[:limit]) + more


def _size_and_time(file: os.DirEntry) -> tuple[int, int]:
    """Returns (bytes, modification time in ns); raises ValueError for pipes and devices, whose reads may never end."""
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{file.path} is not a regular file: in an image folder such names must be image files.")
    return status.st_size, status.st_mtime_ns
