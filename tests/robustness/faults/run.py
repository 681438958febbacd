"""A run that faults are injected into: its folder, its starts, and their outcomes."""

import dataclasses
import json
import multiprocessing
import re
import shutil
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tests.robustness.faults import child
from tests.robustness.faults.child import Injection

KILLED, TERMINATED, REFUSED, ABORTED = -9, 0, 2, -6
SECONDS = 240  # that a start may take
SILENCE = 20  # seconds after which one of two processes is taken for dead
STAGE = "0_train"
CONFIG = (
    "--config=configs/at.py:dataset=digits,epochs=14",
    "--config.data.name=npz",  # the digits in a file, so that they go through the cache of decoded images
    "--config.data.augment=crop_flip",
    "--config.data.pad=1",
    "--config.average.name=ema",
    "--config.attack.num_steps=1",
    "--config.log.every_steps=3",
    "--config.log.clean_per_class=0",
    "--config.checkpoint.every_epochs=1",
    "--config.cpu_devices=1",
    "--config.eval.only=('fgsm',)",
    "--config.eval.subset_per_class=6",
    "--config.eval.batch_size=4",
)
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload([child.__name__])


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a start left: its exit code (None: it had to be ended), what it printed, and its trace."""

    code: int | None
    out: str
    err: str
    steps: dict[int, str]  # digest of the state before each step that was begun
    saves: list[int]  # that are under way or ended; all but the last have ended

    @property
    def resumed(self) -> int:
        """The step that training went on from, 0 if it began at the start."""
        match = re.search(r"Resumed \S+ at step (\d+)", self.out)
        return int(match[1]) if match else 0


class Run:
    """A working directory below `disk`; the data lie outside of it."""

    def __init__(self, disk: Path, name: str, data: Path, digest: bool = True):
        self.disk, self.folder, self.digest = disk, disk / name, digest
        self.cache = data.parent / f"{name}-data" / "lt_adv_cache"
        self._files = data.parent / f"{name}-files" / "start"
        self._config = [*CONFIG, f"--config.data.path={data}", f"--config.data.data_dir={self.cache.parent}"]
        for folder in (self.folder, self.cache.parent, self._files.parent):
            shutil.rmtree(folder, ignore_errors=True)
        self._files.parent.mkdir()

    def remove(self) -> None:
        for folder in (self.folder, self.cache.parent, self._files.parent):
            shutil.rmtree(folder, ignore_errors=True)

    def checkpoints(self) -> list[int]:
        """The steps of those that are in place."""
        stage = self.folder / "checkpoints" / STAGE
        return sorted(int(path.name) for path in stage.glob("*") if path.name.isdigit())

    def newest(self) -> Path:
        return self.folder / "checkpoints" / STAGE / str(self.checkpoints()[-1])

    def has_cache(self) -> None:
        if not list(self.cache.glob("[!.]*")):
            self._passes(Injection("before_save", "kill"), code=KILLED)

    def reaches(self, where: str | int) -> None:
        """Goes on without a fault to "evaluated", or until there are that many checkpoints."""
        if where == "evaluated" and not (self.folder / "report.json").exists():
            self._passes(code=TERMINATED)
        if isinstance(where, int) and len(self.checkpoints()) < where:
            self._passes(Injection("step", "term", count=16), code=TERMINATED)

    def _passes(self, *injections: Injection, code: int) -> None:
        outcome = self.start(injections=injections)
        if outcome.code != code:
            raise Unfit(f"a start without a fault ended with {outcome.code}: {last(outcome.err) or last(outcome.out)}")

    def begin(
        self,
        files: Path,
        mode: str = "train",
        injections: Sequence[Injection] = (),
        slow: float = 0.0,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> Any:
        argv = [*self._config, f"--workdir={self.folder}", f"--mode={mode}"]
        options = {"slow": slow, "digest": self.digest}
        given = (argv, injections, files, dict(environment))
        process = processes.Process(target=child.enter, args=given, kwargs=options)
        process.start()
        return process

    def start(
        self, mode: str = "train", injections: Sequence[Injection] = (), slow: float = 0.0, beside: bool = False
    ) -> Outcome:
        """Starts the run and waits for its end. With `beside`, a second start is made while the first waits; if that is
        not refused, its outcome is returned."""
        shutil.rmtree(self._files.parent)
        self._files.parent.mkdir()
        process = self.begin(self._files, mode, injections, slow)
        try:
            if beside:
                waits = Path(f"{self._files}.waits")
                while not waits.exists() and process.is_alive():
                    time.sleep(0.05)
                other = self._files.with_name("second")
                second = self.ended(self.begin(other), other)
                if waits.exists():
                    process.kill()
                if complaint := refusal(second):
                    return dataclasses.replace(second, err=f"second start: {complaint}", code=None)
            return self.ended(process, self._files)
        finally:
            process.kill()

    def ended(self, process: Any, files: Path) -> Outcome:
        process.join(SECONDS)
        code = process.exitcode
        if code is None:
            process.kill()
            process.join()
        out, err, trace = (Path(f"{files}.{ending}") for ending in ("out", "err", "trace"))
        rows = [json.loads(line) for line in trace.read_text().splitlines()] if trace.exists() else []
        return Outcome(
            code,
            out.read_text() if out.exists() else "",
            err.read_text() if err.exists() else "",
            {row["step"]: row["digest"] for row in rows if "step" in row},
            [row["save"] for row in rows if "save" in row],
        )


class Pair(Run):
    """One whose starts are two processes, as of two hosts, with a device each."""

    def start(
        self, mode: str = "train", injections: Sequence[Injection] = (), slow: float = 0.0, beside: bool = False
    ) -> Outcome:
        """Both to their ends. Where one dies the other must end too, of itself, in time, and say why."""
        if mode == "export":  # for one process
            return super().start(mode, injections, slow, beside)
        shutil.rmtree(self._files.parent)
        self._files.parent.mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            common = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free.getsockname()[1]}", "JAX_NUM_PROCESSES": "2"}
        common["LT_ADV_HEARTBEAT_TIMEOUT"] = str(SILENCE)
        files = [self._files.with_name(f"process-{number}") for number in (0, 1)]
        begun = []
        try:
            for number in (0, 1):
                local = [injection for injection in injections if injection.process == number]
                begun.append(self.begin(files[number], mode, local, slow, common | {"JAX_PROCESS_ID": str(number)}))
            both = [self.ended(process, file) for process, file in zip(begun, files, strict=True)]
        finally:
            for process in begun:
                process.kill()
        hurt = injections[0].process if injections else 0
        mine, other = both[hurt], both[1 - hurt]
        outcome = dataclasses.replace(mine, out=both[0].out, err=other.err + mine.err, saves=both[0].saves)
        if mine.code == KILLED:
            return outcome if (wrong := peer_died(other)) == "" else dataclasses.replace(outcome, code=None, err=wrong)
        return dataclasses.replace(outcome, code=mine.code or other.code)


class Unfit(RuntimeError):
    """A run that no fault can be done to any more."""


def last(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1][:300] if lines else ""


def peer_died(outcome: Outcome) -> str:
    """ "" if a process whose partner died has ended by itself and says so, in a line of ours or of JAX's; which of the
    two notices it first is chance."""
    if outcome.code == ABORTED and "another task died" in outcome.err:
        return ""
    lines = [line for line in outcome.err.splitlines() if line.startswith("Error: ")]
    if outcome.code == REFUSED and len(lines) == 1 and "Traceback" not in outcome.err:
        return ""
    return f"the other process: exit code {outcome.code}: {last(outcome.err) or last(outcome.out)}"


def refusal(outcome: Outcome) -> str:
    """ "" if it was one: exit code 2 and, warnings aside, one line that begins with "Error:"; else what is wrong."""
    lines = [line for line in outcome.err.splitlines() if not line.startswith("WARNING:")]
    if outcome.code != REFUSED:
        return f"exit code {outcome.code} instead of {REFUSED}: {last(outcome.err) or last(outcome.out)}"
    if len(lines) != 1 or not lines[0].startswith("Error: "):
        return f"{len(lines)} lines on stderr: {' / '.join(lines)[:300]}"
    return ""
