"""Locks of working directories, by which several processes or machines run one study in shared folders."""

import contextlib
import fcntl
import json
import os
import socket
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path


def _path(workdirs: Path, name: str) -> Path:
    return workdirs / f"{name}.lock"


@contextlib.contextmanager
def lock(workdirs: Path, name: str, job: str) -> Iterator[int | None]:
    """Locks a working directory for a job; yields a file descriptor, or None if another process has the lock.

    A lock is `flock` on `<workdirs>/<name>.lock`. It lasts until every process that has inherited the descriptor has
    ended, also by a kill, and no clock decides that a process is dead. The file holds host, process and job. Network
    file systems need support for `flock`.
    """
    workdirs.mkdir(parents=True, exist_ok=True)
    with _path(workdirs, name).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        file.truncate(0)
        json.dump({"host": socket.gethostname(), "process": os.getpid(), "job": job}, file)
        file.flush()
        yield file.fileno()
        file.truncate(0)


def wait_for_any(workdirs: Path, names: Iterable[str]) -> None:
    """Waits until one of the working directories is not locked.

    A thread waits for each. Threads that are still waiting afterwards end with their lock, or with the process.
    """
    one_is_free = threading.Event()

    def wait(name: str) -> None:
        with _path(workdirs, name).open("a") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
        one_is_free.set()

    for name in names:
        threading.Thread(target=wait, args=(name,), daemon=True).start()
    one_is_free.wait()


def holder(workdirs: Path, name: str) -> dict[str, str] | None:
    """Returns host, process and job of the lock of a working directory; None if it is not locked."""
    path = _path(workdirs, name)
    if not path.exists():
        return None
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
        except BlockingIOError:
            file.seek(0)
            content = file.read()
    try:
        return json.loads(content)
    except ValueError:  # it is being written
        return {"host": "?", "process": "?", "job": "?"}
