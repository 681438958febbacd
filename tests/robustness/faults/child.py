"""A run in its own process, as `python -m lt_adv.main` starts it, that injects faults into itself.

`Injection` says what and where. Every step leaves a line in a trace: its number and the digest of the state before it.
The process is a fork of one that has imported everything and computed nothing, or each start would take seconds longer.
"""

import contextlib
import dataclasses
import errno
import hashlib
import importlib
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
import matplotlib.pyplot  # noqa: F401  the rest of what a run imports on its way
import orbax.checkpoint as ocp
import safetensors.numpy  # noqa: F401
from etils import epath

from lt_adv import main
from lt_adv.data import cache
from lt_adv.training import checkpoint, checksums
from lt_adv.training.hooks import Hook

LOCAL = type(epath.Path("/"))
evaluate = importlib.import_module("lt_adv.evaluation._evaluate")


@dataclasses.dataclass(frozen=True)
class Injection:
    """`act` at the `count`-th time that the run comes by `site`; of files, counted are those whose path has `pattern`.

    site: step, before_save, saving (`count` files of a checkpoint are there), saved (it is complete), restore (within
    `amount` seconds, or right after it), write (in the middle of a file), rename (a file or folder is written, and not
    yet in place), attack (of the evaluation), cache (an array of decoded images).
    act: kill, term, wait, limit (no file larger than `amount` KiB), or the name of an errno.
    process: of several, the one that does it.
    """

    site: str
    act: str
    count: int = 1
    pattern: str = ""
    amount: float = 0.0
    process: int = 0


def enter(
    argv: Sequence[str],
    injections: Sequence[Injection],
    files: Path,
    environment: Mapping[str, str],
    *,
    slow: float = 0.0,
    digest: bool = True,
) -> None:
    """Runs the process. Output and trace go to `files`.out, .err, .trace and, while it waits, .waits."""
    os.environ.update(environment)
    for number, ending in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{files}.{ending}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    logging.getLogger().handlers.clear()  # those of the imports, which `python -m lt_adv.main` would not have
    _trace(Path(f"{files}.trace"))
    if not digest:
        checkpoint.mismatches = lambda *_: []
    if slow:
        for owner, name in ((LOCAL, "write_bytes"), (os, "rename"), (os, "replace"), (ocp.CheckpointManager, "save")):
            _before(owner, name, lambda *_: time.sleep(slow))
    for injection in injections:
        SITES[injection.site](injection, lambda act=injection: _act(act, files))
    sys.exit(main.main(["lt_adv.main", *argv], HOOKS))


def _act(injection: Injection, files: Path) -> None:
    if injection.act == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif injection.act == "term":
        os.kill(os.getpid(), signal.SIGTERM)
    elif injection.act == "wait":
        Path(f"{files}.waits").touch()
        time.sleep(600)
    elif injection.act == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(injection.amount * 1024), resource.RLIM_INFINITY))
    else:
        number = getattr(errno, injection.act)
        raise OSError(number, os.strerror(number), "a file of the run")


def _before(owner: Any, name: str, act: Callable[..., None], after: Callable[..., None] | None = None) -> None:
    """`act` with the arguments of each call of a function or method, before it; `after` likewise."""
    original = getattr(owner, name)

    def around(*args: Any, **options: Any) -> Any:
        act(*args)
        result = original(*args, **options)
        if after:
            after(*args)
        return result

    setattr(owner, name, around)


def _counted(injection: Injection, act: Callable[[], None]) -> Callable[..., None]:
    """`act` at the right one of the calls for which a path among the arguments has the pattern."""
    left = [injection.count]

    def come_by(*args: Any) -> None:
        paths = [os.fspath(arg) for arg in args if isinstance(arg, str | os.PathLike)]
        if injection.pattern and not any(re.search(injection.pattern, path) for path in paths):
            return
        left[0] -= 1
        if left[0] == 0:
            act()

    return come_by


class BeforeStep(Hook):
    """Calls a function of the state before each step."""

    def __init__(self, function: Callable[[Any], None]):
        self._function = function

    def on_step(self, stage: Any, state: Any) -> None:
        self._function(state)


HOOKS: list[Hook] = []  # of the training loop


def _trace(path: Path) -> None:
    """A line before each step, and one after each save: orbax writes it then, and the one before it has ended."""
    file = path.open("w", buffering=1)

    def step(state: Any) -> None:
        with jax.transfer_guard("allow"):
            text = json.dumps(checksums.digest(state), sort_keys=True)
            number = int(jax.device_get(state.step))
        file.write(json.dumps({"step": number, "digest": hashlib.sha256(text.encode()).hexdigest()[:16]}) + "\n")

    HOOKS.append(BeforeStep(step))

    def saving(_: Any, number: int, *rest: Any) -> None:
        file.write(json.dumps({"save": number}) + "\n")

    _before(checkpoint.Checkpoints, "save", lambda *_: None, saving)


def _at_step(injection: Injection, act: Callable[[], None]) -> None:
    HOOKS.append(BeforeStep(_counted(injection, act)))


def _before_save(injection: Injection, act: Callable[[], None]) -> None:
    _before(checkpoint.Checkpoints, "save", _counted(injection, act))


def _saving(injection: Injection, act: Callable[[], None]) -> None:
    """As soon as the folder of the checkpoint that is written has so many files, or as soon as it is in place."""

    def watch(checkpoints: Any, number: int, *_: Any) -> None:
        folder = Path(checkpoints.directory)

        def look() -> None:
            while not (folder / str(number)).exists():
                with contextlib.suppress(FileNotFoundError):  # it moves while one looks
                    parts = [p for p in folder.glob(f"{number}.*") for p in p.rglob("*") if p.is_file()]
                    if len(parts) >= injection.count:
                        break
            act()

        threading.Thread(target=look, daemon=True).start()

    _before(checkpoint.Checkpoints, "save", watch)


def _saved(injection: Injection, act: Callable[[], None]) -> None:
    come_by = _counted(injection, act)

    def wait(checkpoints: Any, *_: Any) -> None:
        checkpoints.wait()
        come_by()

    _before(checkpoint.Checkpoints, "save", lambda *_: None, wait)


def _restore(injection: Injection, act: Callable[[], None]) -> None:
    def later(*_: Any) -> None:
        threading.Timer(injection.amount, act).start()

    _before(ocp.CheckpointManager, "restore", later, lambda *_: act())


def _write(injection: Injection, act: Callable[[], None]) -> None:
    original = LOCAL.write_bytes
    come_by = _counted(injection, act)

    def halfway(path: Any, content: bytes) -> Any:
        original(path, content[: len(content) // 2])
        come_by(re.sub(r"/\.([^/]+)\.\d+\.tmp$", r"/\1", os.fspath(path)))  # by the name that it will have
        return original(path, content)

    LOCAL.write_bytes = halfway


def _rename(injection: Injection, act: Callable[[], None]) -> None:
    come_by = _counted(injection, act)
    for name in ("rename", "replace"):
        _before(os, name, come_by)


def _attack(injection: Injection, act: Callable[[], None]) -> None:
    _before(evaluate._Runner, "attack", _counted(injection, act))


def _cache(injection: Injection, act: Callable[[], None]) -> None:
    come_by = _counted(injection, act)
    _before(cache, "_write_array", lambda *_: come_by(), lambda *_: come_by())


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
