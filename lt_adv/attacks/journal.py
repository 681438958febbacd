"""Journal of AutoAttack on disk, for resuming: one file for every batch of finished images."""

import contextlib
import errno
import hashlib
import io
import itertools
import os
import re
from pathlib import Path

import numpy as np
from jax.typing import ArrayLike

from lt_adv.attacks.continuous_batching import Done

FIELDS = Done._fields


def digest(*inputs: ArrayLike | tuple) -> str:
    """Returns a hash of arrays and tuples of options."""
    total = hashlib.sha256()
    for value in inputs:
        if isinstance(value, tuple):
            total.update(repr(value).encode())
        else:
            array = np.ascontiguousarray(value)
            total.update(f"{array.dtype} {array.shape}".encode())
            total.update(array.view(np.uint8).data)
    return total.hexdigest()


def open_journal(directory: str | Path | None, digest: str, logits: np.ndarray) -> "Journal":
    """Opens the journal in `directory`, creating it if it is absent; ValueError if it belongs to another call.

    None writes nothing. The clean `logits` identify the network; they are compared with a tolerance, because the number
    of devices and the batch size change their rounding.
    """
    if directory is None:
        return Journal(None)
    folder = Path(directory) if isinstance(directory, str) else directory
    missing = list(itertools.takewhile(lambda path: not path.exists(), (folder, *folder.parents)))
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        _sync(path.parent)
    digest_file, logits_file = folder / "call.txt", folder / "logits.npy"
    try:
        saved = np.load(io.BytesIO(logits_file.read_bytes()), allow_pickle=False) if logits_file.exists() else logits
        scale = np.abs(logits[np.isfinite(logits)]).max(initial=0)
        same = saved.shape == logits.shape and np.allclose(saved, logits, 1e-3, 1e-3 * scale, equal_nan=True)
    except ValueError:  # damaged
        same = False
    if digest_file.exists() and (digest_file.read_text() != digest or not same):
        raise ValueError(
            f"{folder} holds another AutoAttack (other images, weights, key or options): choose another directory."
        )
    buffer = io.BytesIO()
    np.save(buffer, logits)
    _write(logits_file, buffer.getvalue())
    _write(digest_file, digest.encode())
    return Journal(folder)


class Journal:
    """Files `<index of the attack>-<index of the file>.npz`.

    A damaged file counts as absent: its images are attacked again.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.waiting: list[Done] = []
        names = [path.name for path in folder.iterdir()] if folder is not None else []
        numbers = [int(match[1]) for match in map(re.compile(r"\d+-(\d+)\.npz").fullmatch, names) if match]
        self.files = max(numbers, default=-1) + 1

    def add(self, attack: int, done: Done, minimum: int) -> None:
        """Adds finished images, and writes a file once `minimum` of them are waiting."""
        self.waiting.append(done)
        if sum(len(done.rows) for done in self.waiting) >= minimum:
            self.flush(attack)

    def flush(self, attack: int) -> None:
        """Writes the waiting images."""
        if self.waiting and self.folder is not None:
            buffer = io.BytesIO()
            columns = {name: np.concatenate([getattr(done, name) for done in self.waiting]) for name in FIELDS}
            np.savez(buffer, **columns)  # type: ignore[arg-type]
            _write(self.folder / f"{attack}-{self.files:06d}.npz", buffer.getvalue())
            self.files += 1
        self.waiting = []

    def read(self, attack: int) -> list[Done]:
        """Returns the finished images of one attack."""
        records = []
        for path in sorted(self.folder.glob(f"{attack}-*.npz")) if self.folder is not None else ():
            with contextlib.suppress(Exception):  # damaged zip files fail with many types of errors
                file = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
                records.append(Done(*(file[name] for name in FIELDS)))
        return records


def _write(path: Path, content: bytes) -> None:
    """Writes a file atomically, also with respect to power cuts: the content is on disk before the name."""
    new = path.parent / f"{path.name}.{os.getpid()}.new"
    new.write_bytes(content)
    _sync(new)
    new.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Flushes a file, or the names in a folder, to the disk; does nothing for buckets."""
    if "://" in os.fspath(path):
        return
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        # Unreadable folders, or file systems without fsync for folders.
        if error.errno not in (errno.EACCES, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP) or not os.path.isdir(path):
            raise
