"""A small file system in memory that can be full or read-only."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

SIZE = "64m"


@contextlib.contextmanager
def mounted(folder: Path) -> Iterator[bool]:
    """Mounts a file system in memory on `folder`. Yields False, and leaves `folder` as it is, without permission."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.path.ismount(folder) and not _mount("-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)):
        yield False
        return
    try:
        yield True
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _mount(*arguments: str) -> bool:
    try:
        return subprocess.run(["mount", *arguments], capture_output=True).returncode == 0
    except OSError:  # there is no command `mount`
        return False


@contextlib.contextmanager
def full(folder: Path, left: int) -> Iterator[None]:
    """Fills the file system up to `left` bytes."""
    filler = folder / "filler"
    with filler.open("wb") as file:
        free = os.statvfs(folder)
        os.posix_fallocate(file.fileno(), 0, max(free.f_bavail * free.f_frsize - left, 1))
    try:
        yield
    finally:
        filler.unlink()


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    if not _mount("-o", "remount,ro", str(folder)):
        raise OSError(f"{folder} cannot be made read-only.")
    try:
        yield
    finally:
        if not _mount("-o", "remount,rw", str(folder)):
            raise OSError(f"{folder} cannot be made writable again.")
