"""Files that others read while they are written, or after a kill."""

import os
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


def write_atomically(path: epath.PathLike, content: str | bytes) -> None:
    """All of `content` or nothing: written under another name, then renamed. Makes the folder where it is missing.

    Errors: OSError where it cannot be written, ValueError where a folder stands there; an old file of that name stays,
    and nothing else is left behind.
    """
    path = epath.Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder, and a file is to be written there: move it elsewhere.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        temporary.replace(path)
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
        new.mkdir(parents=True)
        for name, content in contents.items():
            (new / name).write_bytes(content)
        if path.exists():
            path.rename(old)  # a folder cannot be renamed to one that is there
        new.rename(path)
    except BaseException:  # an interruption, too
        new.rmtree(missing_ok=True)
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    old.rmtree(missing_ok=True)
