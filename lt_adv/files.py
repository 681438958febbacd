"""Files that others read while they are written, or after a kill."""

import os

from etils import epath


def write_atomically(path: epath.PathLike, content: str | bytes) -> None:
    """All of `content` or nothing: written under another name, then renamed. Makes the folder where it is missing.

    Errors: OSError where it cannot be written; an old file of that name stays, and nothing else is left behind.
    """
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        temporary.replace(path)
    except BaseException:  # an interruption, too
        temporary.unlink(missing_ok=True)
        raise
