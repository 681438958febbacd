"""A process of `lt_adv.main` that injects faults into itself.

It writes a trace: the number of each step with a digest of the state before it, and the step of each save. The process
is forked from one that has imported all modules, which saves seconds per start.
"""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import importlib
import itertools
import json
import logging
import os
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot  # noqa: F401 (imported before the fork)
import orbax.checkpoint as ocp
import safetensors.numpy  # noqa: F401 (imported before the fork)
from etils import epath

from lt_adv import main
from lt_adv.data import cache
from lt_adv.training import checkpoint, checksums
from lt_adv.training.hooks import Hook

LocalPath = type(epath.Path("/"))
evaluate = importlib.import_module("lt_adv.evaluation._evaluate")


@dataclasses.dataclass(frozen=True)
class Injection:
    """An action at a place of the run.

    Attributes:
      site: step, before_save, saving (`count` files of a checkpoint exist), saved (the checkpoint is complete), restore
        (within `amount` seconds, or right after it), write (in the middle of a file), rename (before a file or folder
        is renamed), attack (of the evaluation) or cache (before and after an array of decoded images is written).
      action: kill, term, wait, limit (no file larger than `amount` KiB), or the name of an errno.
      count: the action happens when the run reaches the site for the `count`-th time.
      pattern: regular expression; only files whose path matches it are counted.
      amount: see above.
      process: number of the process that performs the action.
    """

    site: str
    action: str
    count: int = 1
    pattern: str = ""
    amount: float = 0.0
    process: int = 0


def run(
    argv: Sequence[str],
    injections: Sequence[Injection],
    files: Path,
    environment: Mapping[str, str],
    *,
    delay: float = 0.0,
    digest: bool = True,
) -> None:
    """Runs `main.main(argv)` with the injections.

    Output and trace are written to `files`.out, .err and .trace; the file .waits exists while the process waits.

    Args:
      argv: the command line.
      injections: the faults of this process.
      files: prefix of the written files.
      environment: additional environment variables.
      delay: seconds by which writes, renames and saves are delayed.
      digest: whether the digests of checkpoints are verified.
    """
    os.environ.update(environment)
    for number, ending in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{files}.{ending}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    logging.getLogger().handlers.clear()  # added by imports; `python -m lt_adv.main` starts without them
    _trace(Path(f"{files}.trace"))
    if not digest:
        checkpoint.mismatches = lambda *_: []
    if delay:
        for owner, name in (
            (LocalPath, "write_bytes"),
            (os, "rename"),
            (os, "replace"),
            (ocp.CheckpointManager, "save"),
        ):
            _wrap(owner, name, before=lambda *_: time.sleep(delay))
    for injection in injections:
        SITES[injection.site](injection, functools.partial(_perform, injection, files))
    sys.exit(main.main(["lt_adv.main", *argv], HOOKS))


def _perform(injection: Injection, files: Path) -> None:
    if injection.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif injection.action == "term":
        os.kill(os.getpid(), signal.SIGTERM)
    elif injection.action == "wait":
        Path(f"{files}.waits").touch()
        time.sleep(600)
    elif injection.action == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(injection.amount * 1024), resource.RLIM_INFINITY))
    else:
        number = getattr(errno, injection.action)
        raise OSError(number, os.strerror(number), "a file of the run")


def _do_nothing(*_: Any) -> None:
    pass


def _wrap(
    owner: Any, name: str, *, before: Callable[..., None] = _do_nothing, after: Callable[..., None] = _do_nothing
) -> None:
    """Replaces a function or method by one that also calls `before` and `after` with its positional arguments."""
    original = getattr(owner, name)

    def wrapper(*args: Any, **options: Any) -> Any:
        before(*args)
        result = original(*args, **options)
        after(*args)
        return result

    setattr(owner, name, wrapper)


def _at_count(injection: Injection, act: Callable[[], None]) -> Callable[..., None]:
    """Returns a function that calls `act` in its `count`-th call with a path that matches the pattern."""
    calls = itertools.count(1)

    def call(*args: Any) -> None:
        paths = [os.fspath(arg) for arg in args if isinstance(arg, str | os.PathLike)]
        if injection.pattern and not any(re.search(injection.pattern, path) for path in paths):
            return
        if next(calls) == injection.count:
            act()

    return call


class BeforeStep(Hook):
    """Calls a function of the state before each step."""

    def __init__(self, function: Callable[[Any], None]):
        self._function = function

    def on_step(self, stage: Any, state: Any) -> None:
        self._function(state)


HOOKS: list[Hook] = []  # of the training loop


def _trace(path: Path) -> None:
    """Writes a line before each step, and one after each call of `save`, when Orbax has finished the save before it."""
    file = path.open("w", buffering=1)

    def step(state: Any) -> None:
        with jax.transfer_guard("allow"):
            text = json.dumps(checksums.digest(state), sort_keys=True)
            number = int(jax.device_get(state.step))
        file.write(json.dumps({"step": number, "digest": hashlib.sha256(text.encode()).hexdigest()[:16]}) + "\n")

    HOOKS.append(BeforeStep(step))

    def save(_: Any, number: int, *rest: Any) -> None:
        file.write(json.dumps({"save": number}) + "\n")

    _wrap(checkpoint.Checkpoints, "save", after=save)


def _at_step(injection: Injection, act: Callable[[], None]) -> None:
    HOOKS.append(BeforeStep(_at_count(injection, act)))


def _before_save(injection: Injection, act: Callable[[], None]) -> None:
    _wrap(checkpoint.Checkpoints, "save", before=_at_count(injection, act))


def _saving(injection: Injection, act: Callable[[], None]) -> None:
    """Acts when the temporary folder of the checkpoint has `count` files, or when the checkpoint is complete."""

    def watch(checkpoints: Any, number: int, *_: Any) -> None:
        folder = Path(checkpoints.directory)

        def poll() -> None:
            while not (folder / str(number)).exists():
                with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
                    parts = [p for p in folder.glob(f"{number}.*") for p in p.rglob("*") if p.is_file()]
                    if len(parts) >= injection.count:
                        break
            act()

        threading.Thread(target=poll, daemon=True).start()

    _wrap(checkpoint.Checkpoints, "save", before=watch)


def _saved(injection: Injection, act: Callable[[], None]) -> None:
    count = _at_count(injection, act)

    def wait(checkpoints: Any, *_: Any) -> None:
        checkpoints.wait()
        count()

    _wrap(checkpoint.Checkpoints, "save", after=wait)


def _restore(injection: Injection, act: Callable[[], None]) -> None:
    def later(*_: Any) -> None:
        threading.Timer(injection.amount, act).start()

    _wrap(ocp.CheckpointManager, "restore", before=later, after=lambda *_: act())


def _write(injection: Injection, act: Callable[[], None]) -> None:
    original = LocalPath.write_bytes
    count = _at_count(injection, act)

    def halfway(path: Any, content: bytes) -> Any:
        original(path, content[: len(content) // 2])
        count(re.sub(r"/\.([^/]+)\.\d+\.tmp$", r"/\1", os.fspath(path)))  # the final name
        return original(path, content)

    LocalPath.write_bytes = halfway


def _rename(injection: Injection, act: Callable[[], None]) -> None:
    count = _at_count(injection, act)
    for name in ("rename", "replace"):
        _wrap(os, name, before=count)


def _attack(injection: Injection, act: Callable[[], None]) -> None:
    _wrap(evaluate._Runner, "attack", before=_at_count(injection, act))


def _cache(injection: Injection, act: Callable[[], None]) -> None:
    count = _at_count(injection, act)
    _wrap(cache, "_write_array", before=lambda *_: count(), after=lambda *_: count())


SITES: dict[str, Callable[[Injection, Callable[[], None]], None]] = {
    "step": _at_step,
    "before_save": _before_save,
    "saving": _saving,
    "saved": _saved,
    "restore": _restore,
    "write": _write,
    "rename": _rename,
    "attack": _attack,
    "cache": _cache,
}
