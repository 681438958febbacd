"""Working directories: the config that a run was started with, and a lock for the process that writes."""

import contextlib
import fcntl
import itertools
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from lt_adv.cli import entries, schema
from lt_adv.runtime import atomic_io, distributed

LOCK = ".lock"
# Entries that may change between two starts in a working directory, except READ_BY_TRAINING while it is trained.
MUTABLE = (
    "eval.",
    "data.data_dir",
    "data.download",
    "data.test_split",
    "data.max_device_gib",
    "cpu_devices",
    "sharded",
)
READ_BY_TRAINING = ("eval.adjustment.", "eval.dtype")


@contextlib.contextmanager
def locked(workdir: epath.PathLike) -> Iterator[None]:
    """Locks an existing working directory for this process.

    The lock is `flock` on the file `.lock`: it ends with the process, also after a kill. It works between processes
    that share a file system (on network file systems, if they support `flock`). Buckets ("://") have no such lock and
    are not locked. Of the processes of one run, the primary process holds the lock for all. Files that a killed
    process left half written are removed.

    Raises:
      ValueError: another process holds the lock.
      OSError: the file cannot be written.
    """
    with contextlib.ExitStack() as stack:
        distributed.on_primary(lambda: _lock(epath.Path(workdir), stack))
        yield


def _lock(workdir: epath.Path, stack: contextlib.ExitStack) -> None:
    """Takes the lock; closing `stack` releases it."""
    if "://" in os.fspath(workdir):
        return
    file = stack.enter_context((workdir / LOCK).open("a"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"Another process uses {workdir}: wait until it ends, or use another --workdir.") from None
    atomic_io.remove_partial_writes(workdir)


def require_same_config(config: ConfigDict, workdir: epath.Path, *, training: bool = False) -> None:
    """Raises ValueError, with the difference, if the working directory was started with another config."""
    path = workdir / "config.json"
    if not path.exists():
        return
    try:
        content = json.loads(path.read_text())
        stored = immutable_entries(content, training=training)
        changes = entries.describe_renamed(schema.flatten(content))
    except (ValueError, AssertionError, RecursionError) as error:  # not JSON, or not a dict
        why = atomic_io.reason(path, error, atomic_io.JSON)
        raise ValueError(f"{path} is damaged ({why}): restore it, or use another --workdir.") from error
    if changes:
        raise ValueError(f"{path} has old names ({changes}): change them in the file, or use another --workdir.")
    current = immutable_entries(config.to_dict(), training=training)
    # A run by a version without an entry has its default.
    stored = {path: json.dumps(entries.ENTRIES[path].default) for path in current if path in entries.ENTRIES} | stored
    changed = [name for name in sorted({*stored, *current}) if stored.get(name) != current.get(name)]
    if changed:
        shown = "; ".join(f"{name}: {stored.get(name, 'absent')} -> {current.get(name, 'absent')}" for name in changed)
        raise ValueError(
            f"{workdir} was started with another config ({shown}): use another --workdir, or the old values."
        )


@contextlib.contextmanager
def claim(config: ConfigDict, workdir: epath.Path) -> Iterator[None]:
    """Creates the working directory if it is missing, locks it, and stores the config in it.

    Raises:
      ValueError: another process holds it, or it cannot be written; nothing is left behind then.
    """
    new = list(itertools.takewhile(lambda folder: not folder.exists(), (workdir, *workdir.parents)))
    if (workdir / "checkpoints").exists() and not (workdir / "config.json").exists():
        raise ValueError(f"{workdir} has checkpoints but no config.json: use another --workdir.")
    with contextlib.ExitStack() as stack:

        def create_and_lock() -> None:
            try:
                atomic_io.make_folder(workdir)
                _lock(workdir, stack)
                training = not schema.uses_external_weights(config)
                require_same_config(config, workdir, training=training)  # another process may have created it
                content = json.dumps(config.to_dict(), indent=1, sort_keys=True) + "\n"
                atomic_io.write_atomically(workdir / "config.json", content)
            except OSError as error:
                if workdir in new and workdir.exists():
                    workdir.rmtree()
                with contextlib.suppress(OSError):  # missing, or not empty any more
                    for folder in new[1:]:
                        folder.rmdir()
                reason = f"{workdir} cannot be written ({error.strerror or error})"
                raise ValueError(f"{reason}: change that, or use another --workdir.") from error

        distributed.on_primary(create_and_lock)
        yield


def immutable_entries(config: Mapping[str, Any], *, training: bool = False) -> dict[str, str]:
    """Returns {"optim.epochs": "80", ...} for the entries that must not change between two starts."""
    fixed = {
        name: value
        for name, value in schema.flatten(config).items()
        if not name.startswith(MUTABLE) or (training and name.startswith(READ_BY_TRAINING))
    }
    return {name: json.dumps(value) for name, value in fixed.items()}
