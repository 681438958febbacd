"""The folder that one input may touch, and what must hold of it afterwards."""

import contextlib
import hashlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
# The events of Python's audit hooks, and which of their arguments are paths that change.
CHANGES = {"os.mkdir": (0,), "os.rename": (0, 1), "os.remove": (0,), "os.rmdir": (0,), "os.link": (1,)}
CHANGES["os.symlink"] = (1,)
RUNS = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "pickle.find_class", "ctypes.dlopen", "subprocess.Popen")
OUR_OWN = re.compile(r"git|uname|nvidia-smi|\S*\.so[.\d]*")  # programs and libraries that the project itself asks for
LEFT_OVER = re.compile(r"\..*\.(tmp|old|new)|\.lt_adv.*|\..*-[0-9a-f]{16}\..*|.*incomplete.*")


class Box:
    """`given`: the input, which stays as it is; `run`: the working directory; `data`: data sets and caches; `start`:
    where the program is started. `canary` is what hidden code would write; nothing else may appear under `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.given, self.run, self.data, self.start = (root / name for name in ("given", "run", "data", "start"))
        self.canary = root / "canary"
        for folder in (self.given, self.data, self.start):
            folder.mkdir(parents=True)

    def code(self) -> str:
        """A line of Python that hidden code would run."""
        return f"open({str(self.canary)!r}, 'w')"

    def state(self) -> dict[str, str]:
        """{path below root: what stands there}, links not followed."""
        found = {}
        for folder, folders, files in os.walk(self.root):
            for name in [*folders, *files]:
                path = os.path.join(folder, name)
                if os.path.islink(path):
                    found[os.path.relpath(path, self.root)] = f"link to {os.readlink(path)}"
                elif os.path.isdir(path):
                    found[os.path.relpath(path, self.root)] = "folder"
                elif not os.path.isfile(path):
                    found[os.path.relpath(path, self.root)] = "a pipe or a device"
                else:
                    with open(path, "rb") as file:
                        found[os.path.relpath(path, self.root)] = hashlib.file_digest(file, "sha256").hexdigest()
        return found

    def wrong(self, before: dict[str, str], refused: bool) -> str | None:
        """What must not be, in words, if there is anything: code that ran, something changed that was given, a file
        left half written or somewhere else; after a refusal, a working directory."""
        after = self.state()
        if "canary" in after:
            return "the code in the input was run"
        for path in sorted({*before, *after}):
            part, name = path.partition(os.sep)[0], os.path.basename(path)
            if part in ("given", "canary") and before.get(path) != after.get(path):
                return f"{path} was changed"
            if path not in before and LEFT_OVER.fullmatch(name):
                return f"{path} is left half written"
            if part not in ("given", "run", "data", "start"):
                return f"{path} was written outside"
            if path in before and path not in after and part == "data":
                return f"{path} is gone"
        caches = {os.path.dirname(p) for p in after if re.fullmatch(r"data/lt_adv_cache/[^/]+/[^/]+", p)}
        if half := [folder for folder in caches if f"{folder}/meta.json" not in after]:
            return f"{half[0]} is left half written"
        new = [path for path in after if path not in before]
        if refused and "run" in new and "run" not in before:
            return "a working directory is left behind"
        return None


class Fence:
    """Notes what the process itself does outside of the folders allowed. Python has no way to remove an audit hook, so
    there is one for all, asleep but for `watch`."""

    def __init__(self) -> None:
        self._allowed: tuple[str, ...] | None = None
        self._seen: list[str] = []
        self._hooked = False

    @contextlib.contextmanager
    def watch(self, *allowed: Path) -> Iterator[list[str]]:
        """A list that fills with what was written elsewhere, and with programs that were started."""
        if not self._hooked:
            sys.addaudithook(self._note)
            self._hooked = True
        self._seen = []
        self._allowed = tuple(os.path.realpath(folder) for folder in allowed)
        try:
            yield self._seen
        finally:
            self._allowed = None

    def _note(self, event: str, args: tuple[Any, ...]) -> None:
        if self._allowed is None:
            return
        if event == "open":
            path, mode, flags = args
            if isinstance(mode, str) and set(mode) & set("wax+") or mode is None and flags & WRITES:
                self._changed(event, path)
        elif event in CHANGES:
            for argument in CHANGES[event]:
                self._changed(event, args[argument])
        elif event in RUNS:
            what = args[1][0] if event == "subprocess.Popen" and isinstance(args[1], (list, tuple)) else args[0]
            if not OUR_OWN.fullmatch(os.path.basename(str(what))):
                self._seen.append(f"{event} {' '.join(map(str, args))[:100]}")

    def _changed(self, event: str, path: Any) -> None:
        if not isinstance(path, (str, bytes, os.PathLike)) or self._allowed is None:
            return
        where = os.path.realpath(os.fsdecode(path))
        if not where.startswith((*self._allowed, "/dev/")) and "__pycache__" not in where:
            self._seen.append(f"{event} {where}")


FENCE = Fence()
