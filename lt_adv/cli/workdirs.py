"""Whose a working directory is: the config it was begun with, and the one process that writes in it."""

import contextlib
import fcntl
import itertools
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections
from etils import epath

from lt_adv.cli import schema
from lt_adv.runtime import atomic_io, distributed

LOCK = ".lock"
# What may change between two starts in a working directory. Training watches itself through the adjustment.
FREE = ("eval.", "data.data_dir", "data.download", "data.test_split", "data.resident_gib", "cpu_devices", "sharded")
WATCHED = ("eval.adjustment.", "eval.dtype")


@contextlib.contextmanager
def locked(workdir: epath.PathLike) -> Iterator[None]:
    """The working directory, which must be there, for this process alone; ValueError at once if another one has it.

    The lock is the kernel's, on the file `.lock`, and goes with the process: a kill leaves none behind. It holds among
    processes that share a file system (on a network file system, as far as that keeps `flock`). A bucket ("://") has no
    such lock: there nothing is held, and starting two runs in one place is up to the user. Of the processes of one run
    the first holds it for all. What a killed process left half written is removed: nobody writes it any more.

    Errors: OSError where the file cannot be written.
    """
    with contextlib.ExitStack() as stack:
        distributed.on_primary(lambda: _lock(epath.Path(workdir), stack))
        yield


def _lock(workdir: epath.Path, stack: contextlib.ExitStack) -> None:
    """Held until `stack` ends."""
    if "://" in os.fspath(workdir):
        return
    file = stack.enter_context((workdir / LOCK).open("a"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"Another process works in {workdir}: wait until it ends, or use another --workdir.") from None
    atomic_io.remove_partial_writes(workdir)


def compare(config: ml_collections.ConfigDict, workdir: epath.Path, *, training: bool = False) -> None:
    """ValueError, with the difference, if the working directory was started with another config."""
    path = workdir / "config.json"
    if not path.exists():
        return
    try:
        theirs = immutable_entries(json.loads(path.read_text()), training=training)
    except (ValueError, AssertionError, RecursionError) as error:  # no JSON, or no dict
        why = atomic_io.reason(path, error, atomic_io.JSON)
        raise ValueError(f"{path} is damaged ({why}): put it back as it was, or use another --workdir.") from error
    mine = immutable_entries(config.to_dict(), training=training)
    changed = [name for name in sorted({*theirs, *mine}) if theirs.get(name) != mine.get(name)]
    if changed:
        shown = "; ".join(f"{name}: {theirs.get(name, 'absent')} -> {mine.get(name, 'absent')}" for name in changed)
        raise ValueError(f"{workdir} began with another config ({shown}): use another --workdir, or the old values.")


@contextlib.contextmanager
def claim(config: ml_collections.ConfigDict, workdir: epath.Path) -> Iterator[None]:
    """The working directory with the config stored in it, for this run alone.

    ValueError if another process has it, and if it cannot be written; then nothing is left behind.
    """
    new = list(itertools.takewhile(lambda folder: not folder.exists(), (workdir, *workdir.parents)))
    if (workdir / "checkpoints").exists() and not (workdir / "config.json").exists():
        raise ValueError(f"{workdir} has checkpoints and no config.json that says of what: use another --workdir.")
    with contextlib.ExitStack() as stack:

        def begin() -> None:
            try:
                atomic_io.make_folder(workdir)
                _lock(workdir, stack)
                compare(config, workdir, training=not schema.imports(config))  # it may be another's by now
                content = json.dumps(config.to_dict(), indent=1, sort_keys=True) + "\n"
                atomic_io.write_atomically(workdir / "config.json", content)
            except OSError as error:
                if workdir in new and workdir.exists():
                    workdir.rmtree()
                with contextlib.suppress(OSError):  # not there either, or no longer empty
                    for folder in new[1:]:
                        folder.rmdir()
                reason = f"{workdir} cannot be written ({error.strerror or error})"
                raise ValueError(f"{reason}: change that, or use another --workdir.") from error

        distributed.on_primary(begin)
        yield


def immutable_entries(config: Mapping[str, Any], *, training: bool = False) -> dict[str, str]:
    """{"optim.epochs": "80", ...}, of the entries that must not change."""
    fixed = {
        k: v for k, v in schema.flat(config).items() if not k.startswith(FREE) or training and k.startswith(WATCHED)
    }
    return {name: json.dumps(value) for name, value in fixed.items()}
