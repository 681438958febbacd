"""Files that others read while they are written, or after a kill or a power cut.

A file system may put a new name on the disk before what it stands for. So whatever gets its name here has reached the
disk before, and the name has when the function returns. A bucket's store sees to that by itself.
"""

import errno
import itertools
import os
import pathlib
import shutil
from collections.abc import Mapping

from etils import epath


def place(text: str, named: str) -> epath.Path:
    """The path that `text` says; ValueError, which begins with how it is `named`, for one that no file can have."""
    try:
        text.encode()
        if "\0" not in text:
            return epath.Path(text)
        reason = "there is a byte 0 in it"
    except UnicodeEncodeError:
        reason = "it is no UTF-8"
    except KeyError as error:  # epath's, for a store that it does not know
        reason = f"nothing is known of {error.args[0]}, where a bucket is gs://... or s3://..."
    raise ValueError(f"{named} {text!r} is no path: {reason}.")


def sync(path: epath.PathLike) -> None:
    """Wait until a file, or of a folder the names in it, has reached the disk. OSError where it cannot."""
    if "://" in os.fspath(path):
        return
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        # Folders that may not be read, or file systems that have no such call for folders: they write when they will.
        if error.errno not in (errno.EACCES, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP) or not os.path.isdir(path):
            raise


def sync_tree(folder: epath.PathLike) -> None:
    """`sync` for the folder and all that is in it."""
    for parent, _, names in os.walk(folder, topdown=False):
        for path in (*(os.path.join(parent, name) for name in names), parent):
            sync(path)


def make_folder(path: epath.PathLike) -> None:
    """The folder, and those above it that are missing."""
    path = epath.Path(path)
    above = (path, *path.parents) if "://" not in os.fspath(path) else ()
    new = list(itertools.takewhile(lambda folder: not folder.exists(), above))
    path.mkdir(parents=True, exist_ok=True)
    for folder in new:
        sync(folder.parent)


def write_atomically(path: epath.PathLike, content: str | bytes) -> None:
    """All of `content` or nothing: written under another name, then renamed. Makes the folder where it is missing.

    Errors: OSError where it cannot be written, ValueError where a folder stands there; an old file of that name stays,
    and nothing else is left behind.
    """
    path = epath.Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder, and a file is to be written there: move it elsewhere.")
    make_folder(path.parent)
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except BaseException:  # an interruption, too
        temporary.unlink(missing_ok=True)
        raise


def replace_folder(path: epath.PathLike, contents: Mapping[str, bytes]) -> None:
    """The folder `path` with these files and no others, whole or not at all: what was there before goes.

    Errors: ValueError where it holds what would not be written again, so that nothing of somebody else's is lost;
    OSError where it cannot be written; the old folder then stays, and nothing else is left behind.
    """
    path = epath.Path(path)
    strange = sorted({file.name for file in path.iterdir()} - set(contents)) if path.exists() else []
    if strange:
        raise ValueError(f"{path} holds {strange[0]}, which would be lost: move it, or the folder, elsewhere.")
    new, old = (path.parent / f".{path.name}.{os.getpid()}.{which}" for which in ("tmp", "old"))
    try:
        make_folder(path.parent)
        new.mkdir()
        for name, content in contents.items():
            (new / name).write_bytes(content)
        sync_tree(new)
        if path.exists():
            path.rename(old)  # a folder cannot be renamed to one that is there
        new.rename(path)
        sync(path.parent)
    except BaseException:  # an interruption, too
        new.rmtree(missing_ok=True)
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    old.rmtree(missing_ok=True)


def clear(folder: epath.PathLike) -> None:
    """Remove below `folder`, which is no bucket's, what killed processes were writing with the functions above.

    A folder that was taken away for a new one, which then did not come, is put back. Nobody may be writing there now.
    """
    folder = pathlib.Path(folder)
    for path in list(folder.rglob(".*.old")):
        place = path.parent / path.name[1:].rsplit(".", 2)[0]
        shutil.rmtree(path) if place.exists() else path.rename(place)
    for path in list(folder.rglob(".*.tmp")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
