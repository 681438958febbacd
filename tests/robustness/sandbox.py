"""The folder that one input may change, and the check that nothing else was changed or executed."""

import contextlib
import hashlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
# Event of Python's audit hooks -> positions of the arguments that are changed paths.
CHANGES = {"os.mkdir": (0,), "os.rename": (0, 1), "os.remove": (0,), "os.rmdir": (0,), "os.link": (1,)}
CHANGES["os.symlink"] = (1,)
RUNS = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "pickle.find_class", "ctypes.dlopen", "subprocess.Popen")
PROJECT = re.compile(r"git|uname|nvidia-smi|\S*\.so[.\d]*")  # programs and libraries that the project uses
LEFT_OVER = re.compile(r"\..*\.(tmp|old|new)|\.lt_adv.*|\..*-[0-9a-f]{16}\..*|.*incomplete.*")


class Sandbox:
    """Folders of one input; nothing else may appear beside them.

    Attributes:
      input: files of the input, which must not change.
      run: the working directory.
      data: data sets and caches.
      cwd: the current directory.
      canary: a file that is written by code hidden in the input.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.input, self.run, self.data, self.cwd = (root / name for name in ("input", "run", "data", "cwd"))
        self.canary = root / "canary"
        for folder in (self.input, self.data, self.cwd):
            folder.mkdir(parents=True)

    def code(self) -> str:
        """Returns Python source for hidden code."""
        return f"open({str(self.canary)!r}, 'w')"

    def state(self) -> dict[str, str]:
        """Returns {relative path: digest of the file, or its kind}; links are not followed."""
        entries = {}
        for folder, folders, files in os.walk(self.root):
            for name in [*folders, *files]:
                path = os.path.join(folder, name)
                if os.path.islink(path):
                    entries[os.path.relpath(path, self.root)] = f"link to {os.readlink(path)}"
                elif os.path.isdir(path):
                    entries[os.path.relpath(path, self.root)] = "folder"
                elif not os.path.isfile(path):
                    entries[os.path.relpath(path, self.root)] = "a pipe or a device"
                else:
                    with open(path, "rb") as file:
                        entries[os.path.relpath(path, self.root)] = hashlib.file_digest(file, "sha256").hexdigest()
        return entries

    def problem(self, before: dict[str, str], refused: bool) -> str | None:
        """Returns a description of the first problem, or None.

        Problems are executed code, a changed input, a file half written or outside of the folders, and a new working
        directory after a refusal.
        """
        after = self.state()
        if "canary" in after:
            return "code of the input was executed"
        for path in sorted({*before, *after}):
            part, name = path.partition(os.sep)[0], os.path.basename(path)
            if part in ("input", "canary") and before.get(path) != after.get(path):
                return f"{path} was changed"
            if path not in before and LEFT_OVER.fullmatch(name):
                return f"{path} is left half written"
            if part not in ("input", "run", "data", "cwd"):
                return f"{path} was written outside"
            if path in before and path not in after and part == "data":
                return f"{path} was deleted"
        caches = {os.path.dirname(p) for p in after if re.fullmatch(r"data/lt_adv_cache/[^/]+/[^/]+", p)}
        if half := [folder for folder in caches if f"{folder}/meta.json" not in after]:
            return f"{half[0]} is left half written"
        new = [path for path in after if path not in before]
        if refused and "run" in new and "run" not in before:
            return "a working directory is left behind"
        return None


class Fence:
    """Records writes outside of the allowed folders, and started programs.

    Python cannot remove an audit hook, so all tests share one, which is inactive outside of `watch`.
    """

    def __init__(self) -> None:
        self._allowed: tuple[str, ...] | None = None
        self._events: list[str] = []
        self._hooked = False

    @contextlib.contextmanager
    def watch(self, *allowed: Path) -> Iterator[list[str]]:
        """Yields a list to which each write outside of the folders and each started program is appended."""
        if not self._hooked:
            sys.addaudithook(self._note)
            self._hooked = True
        self._events = []
        self._allowed = tuple(os.path.realpath(folder) for folder in allowed)
        try:
            yield self._events
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
            if not PROJECT.fullmatch(os.path.basename(str(what))):
                self._events.append(f"{event} {' '.join(map(str, args))[:100]}")

    def _changed(self, event: str, path: Any) -> None:
        if not isinstance(path, (str, bytes, os.PathLike)) or self._allowed is None:
            return
        where = os.path.realpath(os.fsdecode(path))
        if not where.startswith((*self._allowed, "/dev/")) and "__pycache__" not in where:
            self._events.append(f"{event} {where}")


FENCE = Fence()
