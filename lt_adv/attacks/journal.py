"""What AutoAttack has done so far, on disk: one file for every batch of images that are done."""

import contextlib
import errno
import hashlib
import io
import itertools
import os
import pathlib
import re
from typing import Any

import numpy as np

from lt_adv.attacks.continuous_batching import Done

FIELDS = Done._fields


def digest(*facts: Any) -> str:
    """Stands for all that the result depends on."""
    total = hashlib.sha256()
    for fact in facts:
        array = np.ascontiguousarray(fact) if not isinstance(fact, tuple) else None
        total.update(repr(fact).encode() if array is None else f"{array.dtype} {array.shape}".encode())
        if array is not None:
            total.update(array.view(np.uint8).data)
    return total.hexdigest()


def open_(directory: Any, digest: str, logits: np.ndarray) -> "Journal":
    """The journal in `directory`, made if absent; ValueError where it is of another call. None keeps nothing.

    `logits` of the clean images stand for the network: another number of devices, or another batch, rounds otherwise.
    """
    if directory is None:
        return Journal(None)
    where = pathlib.Path(directory) if isinstance(directory, str) else directory
    missing = list(itertools.takewhile(lambda folder: not folder.exists(), (where, *where.parents)))
    where.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        _sync(folder.parent)
    name, network = where / "call.txt", where / "logits.npy"
    try:
        known = np.load(io.BytesIO(network.read_bytes()), allow_pickle=False) if network.exists() else logits
        scale = np.abs(logits[np.isfinite(logits)]).max(initial=0)
        same = known.shape == logits.shape and np.allclose(known, logits, 1e-3, 1e-3 * scale, equal_nan=True)
    except ValueError:  # damaged
        same = False
    if name.exists() and (name.read_text() != digest or not same):
        raise ValueError(f"{where} holds another AutoAttack (other images, weights, key or options): choose another.")
    buffer = io.BytesIO()
    np.save(buffer, logits)
    _write(network, buffer.getvalue())
    _write(name, digest.encode())
    return Journal(where)


class Journal:
    """Files `<attack's number>-<file's number>.npz`; a damaged one counts as absent, its images are attacked again."""

    def __init__(self, where: Any) -> None:
        self.where = where
        self.waiting: list[Done] = []
        names = [path.name for path in where.iterdir()] if where is not None else []
        numbers = [int(found[1]) for found in map(re.compile(r"\d+-(\d+)\.npz").fullmatch, names) if found]
        self.files = max(numbers, default=-1) + 1

    def add(self, number: int, done: Done, least: int) -> None:
        """Keeps what is done; written as soon as it is `least` images."""
        self.waiting.append(done)
        if sum(len(done.rows) for done in self.waiting) >= least:
            self.flush(number)

    def flush(self, number: int) -> None:
        """Writes what waits."""
        if self.waiting and self.where is not None:
            buffer = io.BytesIO()
            columns: Any = dict(zip(FIELDS, zip(*self.waiting, strict=True), strict=True))
            np.savez(buffer, **{name: np.concatenate(parts) for name, parts in columns.items()})  # type: ignore[arg-type]
            _write(self.where / f"{number}-{self.files:06d}.npz", buffer.getvalue())
            self.files += 1
        self.waiting = []

    def read(self, number: int) -> list[Done]:
        """All that is known of one attack."""
        found = []
        for path in sorted(self.where.glob(f"{number}-*.npz")) if self.where is not None else ():
            with contextlib.suppress(Exception):  # a zip file carries checksums, and fails in many ways
                file = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
                found.append(Done(*(file[name] for name in FIELDS)))
        return found


def _write(path: Any, content: bytes) -> None:
    """All of the content or nothing, after a power cut too: it is on the disk before its name."""
    new = path.parent / f"{path.name}.{os.getpid()}.new"
    new.write_bytes(content)
    _sync(new)
    new.replace(path)
    _sync(path.parent)


def _sync(path: Any) -> None:
    """Until a file, or of a folder the names in it, is on the disk; a bucket's store sees to that by itself."""
    if "://" in os.fspath(path):
        return
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        # Folders that may not be read, or file systems that have no such call for folders.
        if error.errno not in (errno.EACCES, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP) or not os.path.isdir(path):
            raise
