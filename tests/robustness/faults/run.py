"""A run into which faults are injected: its folder, its starts, and their outcomes."""

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
SECONDS = 240  # time limit of one start
HEARTBEAT_TIMEOUT = 20  # seconds
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
    """Exit code of a start (None: it exceeded the time limit), its output, and its trace."""

    code: int | None
    out: str
    err: str
    steps: dict[int, str]  # step -> digest of the state before it
    saves: list[int]  # steps of the saves; all but the last are finished

    @property
    def resumed(self) -> int:
        """The step from which training resumed, 0 if it did not resume."""
        match = re.search(r"Resumed \S+ at step (\d+)", self.out)
        return int(match[1]) if match else 0


class Run:
    """A run in the working directory `disk / name`; the data are outside of `disk`."""

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
        """Returns the steps of the complete checkpoints."""
        stage = self.folder / "checkpoints" / STAGE
        return sorted(int(path.name) for path in stage.glob("*") if path.name.isdigit())

    def newest_checkpoint(self) -> Path:
        return self.folder / "checkpoints" / STAGE / str(self.checkpoints()[-1])

    def ensure_cache(self) -> None:
        """Starts the run, if necessary, until the cache of decoded images is written."""
        if not list(self.cache.glob("[!.]*")):
            self._start_expecting(KILLED, Injection("before_save", "kill"))

    def ensure_checkpoints(self, number: int) -> None:
        """Starts the run, if necessary, until it has this number of checkpoints."""
        if len(self.checkpoints()) < number:
            self._start_expecting(TERMINATED, Injection("step", "term", count=16))

    def ensure_report(self) -> None:
        """Starts the run, if necessary, until it is evaluated."""
        if not (self.folder / "report.json").exists():
            self._start_expecting(TERMINATED)

    def _start_expecting(self, code: int, *injections: Injection) -> None:
        outcome = self.start(injections=injections)
        if outcome.code != code:
            line = last_line(outcome.err) or last_line(outcome.out)
            raise UnusableRun(f"a start without a fault ended with {outcome.code}: {line}")

    def launch(
        self,
        files: Path,
        mode: str = "train",
        injections: Sequence[Injection] = (),
        delay: float = 0.0,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> Any:
        argv = [*self._config, f"--workdir={self.folder}", f"--mode={mode}"]
        options = {"delay": delay, "digest": self.digest}
        arguments = (argv, injections, files, dict(environment))
        process = processes.Process(target=child.run, args=arguments, kwargs=options)
        process.start()
        return process

    def start(
        self, mode: str = "train", injections: Sequence[Injection] = (), delay: float = 0.0, second_start: bool = False
    ) -> Outcome:
        """Starts the run and waits for its end.

        With `second_start`, starts a second process while the first one waits, and returns the outcome of the second
        one unless it is refused.
        """
        shutil.rmtree(self._files.parent)
        self._files.parent.mkdir()
        process = self.launch(self._files, mode, injections, delay)
        try:
            if second_start:
                waits = Path(f"{self._files}.waits")
                while not waits.exists() and process.is_alive():
                    time.sleep(0.05)
                other = self._files.with_name("second")
                second = self.wait(self.launch(other), other)
                if waits.exists():
                    process.kill()
                if problem := refusal_problem(second):
                    return dataclasses.replace(second, err=f"second start: {problem}", code=None)
            return self.wait(process, self._files)
        finally:
            process.kill()

    def wait(self, process: Any, files: Path) -> Outcome:
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
    """A run of two processes with one device each, like two hosts."""

    def start(
        self, mode: str = "train", injections: Sequence[Injection] = (), delay: float = 0.0, second_start: bool = False
    ) -> Outcome:
        """Starts both processes and waits for them. If one is killed, the other must end in time with a message."""
        if mode == "export":  # runs in one process
            return super().start(mode, injections, delay, second_start)
        shutil.rmtree(self._files.parent)
        self._files.parent.mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            common = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free.getsockname()[1]}", "JAX_NUM_PROCESSES": "2"}
        common["LT_ADV_HEARTBEAT_TIMEOUT"] = str(HEARTBEAT_TIMEOUT)
        files = [self._files.with_name(f"process-{number}") for number in (0, 1)]
        started = []
        try:
            for number in (0, 1):
                local = [injection for injection in injections if injection.process == number]
                started.append(self.launch(files[number], mode, local, delay, common | {"JAX_PROCESS_ID": str(number)}))
            both = [self.wait(process, file) for process, file in zip(started, files, strict=True)]
        finally:
            for process in started:
                process.kill()
        number = injections[0].process if injections else 0
        faulty, other = both[number], both[1 - number]
        outcome = dataclasses.replace(faulty, out=both[0].out, err=other.err + faulty.err, saves=both[0].saves)
        if faulty.code == KILLED:
            problem = peer_problem(other)
            return dataclasses.replace(outcome, code=None, err=problem) if problem else outcome
        return dataclasses.replace(outcome, code=faulty.code or other.code)


class UnusableRun(RuntimeError):
    """The run cannot reach the state that a fault requires."""


def last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1][:300] if lines else ""


def peer_problem(outcome: Outcome) -> str:
    """Returns what is wrong with the outcome of a process whose peer was killed, or "".

    The process must end with an error message of lt_adv or of JAX, whichever notices the loss first.
    """
    if outcome.code == ABORTED and "another task died" in outcome.err:
        return ""
    lines = [line for line in outcome.err.splitlines() if line.startswith("Error: ")]
    if outcome.code == REFUSED and len(lines) == 1 and "Traceback" not in outcome.err:
        return ""
    return f"the other process: exit code {outcome.code}: {last_line(outcome.err) or last_line(outcome.out)}"


def refusal_problem(outcome: Outcome) -> str:
    """Returns why the outcome is not a refusal, or "".

    A refusal has exit code 2 and, apart from warnings, a single line on stderr that begins with "Error:".
    """
    lines = [line for line in outcome.err.splitlines() if not line.startswith("WARNING:")]
    if outcome.code != REFUSED:
        return f"exit code {outcome.code} instead of {REFUSED}: {last_line(outcome.err) or last_line(outcome.out)}"
    if len(lines) != 1 or not lines[0].startswith("Error: "):
        return f"{len(lines)} lines on stderr: {' / '.join(lines)[:300]}"
    return ""
