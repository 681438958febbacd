"""Folders of images as a `Source`: `<path>/train/<class>/...` and `<path>/test/<class>/...`."""

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
HIDDEN = (".", "__MACOSX")  # the second is what macOS puts into zip archives
log = logging.getLogger(__name__)


def image_folder(path: Path, size: int | None = None) -> Source:
    """`<path>/train/<class>/**` and `<path>/test/<class>/**`: classes in alphabetical order.

    Images are files with one of `images.SUFFIXES`, in a class folder or in folders inside it. The original index of an
    image is its position among all images of its split, sorted by class, then by its path in the class folder. Grey
    images become colour where the set has any colour image; of an animated image the first frame is read; EXIF
    orientation is ignored. A warning counts the files that are not read, by suffix; hidden files do not count.
    """
    skipped: Counter[str] = Counter()
    listing = {split: _list_images(path / split, skipped) for split in SPLITS}
    classes = {split: sorted(by_class) for split, by_class in listing.items()}
    for split, other in (SPLITS, SPLITS[::-1]):
        if odd := sorted(set(classes[split]) - set(classes[other])):
            raise ValueError(f"The class {odd[0]!r} of {path / split} has no images in {path / other}.")
    if skipped:
        log.warning("%s: %d files are not read: %s.", path, skipped.total(), _counted(skipped))

    files = {s: [(c, *f) for c in classes[s] for f in listing[s][c]] for s in SPLITS}

    def read() -> tuple[tuple[str, ...], dict[str, SplitReader]]:
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


def _list_images(folder: Path, skipped: Counter[str]) -> dict[str, list[tuple[str, int, int]]]:
    """Per class, the sorted (path in its folder, bytes, modification time in ns) of its images; adds to `skipped`."""
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}; an image folder has train/<class>/, test/<class>/.")
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
            more = f", but {others.total()} files of other kinds: {_counted(others)}" if others else ""
            raise ValueError(f"The class folder {folder / entry.name} has no JPEG or PNG, nor any other image{more}.")
        listing[entry.name] = sorted(members)
        skipped += others
    if not listing:
        raise ValueError(f"The folder {folder} has no class folders.")
    return listing


def _images_in(
    folder: str, prefix: str, above: tuple[tuple[int, int], ...], skipped: Counter[str]
) -> list[tuple[str, int, int]]:
    """The images in a folder, and in those inside it; `above` are the folders that this one is in."""
    about = os.stat(folder)
    here = (about.st_dev, about.st_ino)
    if here in above:
        skipped["links to a folder above"] += 1
        return []
    members = []
    for entry in os.scandir(folder):
        if entry.name.startswith(HIDDEN):
            continue
        if _is_image(entry):
            members.append((prefix + entry.name, *_size_and_time(entry)))
        elif entry.is_dir():
            members += _images_in(entry.path, f"{prefix}{entry.name}/", (*above, here), skipped)
        else:
            skipped[_suffix(entry)] += 1
    return members


def _suffix(file: os.DirEntry) -> str:
    return PurePosixPath(file.name).suffix.lower() or "without suffix"


def _is_image(file: os.DirEntry) -> bool:
    return _suffix(file) in images.SUFFIXES


def _counted(skipped: Counter[str], most: int = 8) -> str:
    """3 .txt, 2 .heic: the most frequent first."""
    ranked = sorted(skipped.items(), key=lambda item: (-item[1], item[0]))
    more = f" and {sum(n for _, n in ranked[most:])} of other kinds" if len(ranked) > most else ""
    return ", ".join(f"{n} {ascii(kind)[1:-1]}" for kind, n in ranked[:most]) + more


def _size_and_time(file: os.DirEntry) -> tuple[int, int]:
    """Bytes, and modification time in ns; a pipe or a device could be read forever."""
    about = file.stat()
    if not stat.S_ISREG(about.st_mode):
        raise ValueError(f"{file.path} is no file: an image folder has images and nothing else under such names.")
    return about.st_size, about.st_mtime_ns
