"""Logging of a run: JSON lines, TensorBoard, and a progress display."""

import json
import math
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any

import rich.console
import rich.progress
from absl import logging
from etils import epath

from lt_adv.runtime import atomic_io, distributed
from lt_adv.training.hooks import Hook, LogEvent
from lt_adv.training.stage_builder import StageProgram
from lt_adv.training.train_state import TrainState

SECONDS_BETWEEN_LINES = 3.0  # of the progress display without a terminal
# (metric, label, decimal places) in the progress display; with one decimal place in percent.
COLUMNS = (
    ("train/loss", "loss", 3),
    ("train/clean/balanced_accuracy", "clean (balanced) %", 1),
    ("train/accuracy", "robust %", 1),
    ("train/accuracy_head", "head", 1),
    ("train/accuracy_body", "body", 1),
    ("train/accuracy_tail", "tail", 1),
    ("valid/clean/accuracy", "valid clean %", 1),
    ("valid/pgd20/accuracy", "valid PGD-20 %", 1),
)
console = rich.console.Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 120)


class JsonLines:
    """A file of JSON lines.

    Every change rewrites the file atomically: object stores cannot append, and the file is small. Only the primary
    process writes.
    """

    def __init__(self, path: epath.Path):
        self._path = path
        self.rows: list[dict[str, Any]] = []
        for line in path.read_bytes().decode(errors="replace").splitlines() if path.exists() else ():
            try:
                row = json.loads(line)
                row["stage"], row["step"]  # raises KeyError
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                logging.warning("%s is damaged in line %d (%s).", path, len(self.rows) + 1, error)
                break
            self.rows.append(row)

    def restore(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Replaces the rows by those stored in a checkpoint: the file may have been damaged since."""
        self.rows = [dict(row) for row in rows]

    def write(self) -> None:
        if distributed.is_primary():
            atomic_io.write_atomically(self._path, "".join(json.dumps(r) + "\n" for r in self.rows))

    def truncate(self, last_step: int, stage: str, earlier_stages: Iterable[str] = ()) -> None:
        """Removes the rows after `last_step` of `stage`, where the run resumes."""
        earlier = set(earlier_stages)
        self.rows = [r for r in self.rows if r["stage"] in earlier or (r["stage"] == stage and r["step"] <= last_step)]

    def add(self, row: Mapping[str, Any]) -> None:
        """Appends a row, without its NaN values (of a group without examples): JSON has no NaN."""
        self.rows.append({k: v for k, v in row.items() if not (isinstance(v, float) and math.isnan(v))})
        self.write()


class TensorBoard:
    """Writes the numbers of the log lines as scalars; raises ImportError, with the remedy, without tensorboardX."""

    def __init__(self, workdir: epath.Path):
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise ImportError("config.log.tensorboard needs tensorboardX: pip install -e '.[tensorboard]'.") from None
        self._writer = SummaryWriter(str(workdir / "tensorboard"))

    def add(self, row: Mapping[str, Any]) -> None:
        for name, value in row.items():
            if isinstance(value, float):
                self._writer.add_scalar(f"{row['stage']}/{name}", value, row["step"])
        self._writer.flush()


class LogHook(Hook):
    """Writes the metrics to metrics.jsonl, the speed to timing.jsonl, and the metrics for TensorBoard if configured."""

    def __init__(self, workdir: epath.Path):
        self._workdir = workdir
        self.metrics = JsonLines(workdir / "metrics.jsonl")
        self._timing = JsonLines(workdir / "timing.jsonl")
        self._tensorboard: TensorBoard | None = None
        self._earlier_stages: list[str] = []

    def on_stage_start(self, stage: StageProgram, state: TrainState) -> None:
        for log in (self.metrics, self._timing):
            log.truncate(int(state.step), stage.name, self._earlier_stages)
        if stage.config.log.tensorboard and distributed.is_primary():
            self._tensorboard = TensorBoard(self._workdir)

    def on_log(self, event: LogEvent) -> None:
        if not event.is_log_step:
            return
        position = {"stage": event.stage.name, "step": event.step}
        row = {**position, "epoch": event.epoch, **event.metrics}
        self.metrics.add(row)
        if self._tensorboard:
            self._tensorboard.add(row)
        self._timing.add({**position, "images_per_second": event.images_per_second, "seconds": event.seconds})

    def on_stage_end(self, stage: StageProgram, state: TrainState) -> None:
        self._earlier_stages.append(stage.name)


class ProgressHook(Hook):
    """Shows epoch, images/s, time left, loss, clean and robust accuracy of a stage.

    In a terminal this is one line that is updated. Elsewhere one line is printed per epoch, and at most one every
    SECONDS_BETWEEN_LINES. The hook is a context manager: the line is drawn inside.
    """

    def __init__(self, stage: StageProgram, step: int):
        self._stage, self._total = stage, stage.resolved.num_steps
        self._printed = -math.inf
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(bar_width=24),
            rich.progress.TaskProgressColumn(),
            rich.progress.TimeRemainingColumn(),
            rich.progress.TextColumn("{task.fields[numbers]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(stage.name, total=self._total, completed=step, numbers="compiling ...")

    def __enter__(self) -> "ProgressHook":
        self._bar.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.__exit__(*error)

    def on_log(self, event: LogEvent) -> None:
        name, epochs, metrics = self._stage.name, self._stage.info.epochs, event.metrics
        shown = [f"{event.images_per_second:,.0f} img/s"] + [
            f"{label} {metrics[key]:.{digits}f}" if digits == 3 else f"{label} {100 * metrics[key]:.1f}"
            for key, label, digits in COLUMNS
            if key in metrics and not math.isnan(metrics[key])
        ]
        text = "  ".join(shown)
        description = f"{name} {event.epoch}/{epochs}"
        self._bar.update(self._task, completed=event.step, description=description, numbers=text)
        now = time.monotonic()
        is_due = event.is_last_step or now - self._printed >= SECONDS_BETWEEN_LINES
        if event.epoch_ended and not console.is_terminal and is_due:
            self._printed = now
            images_left = (self._total - event.step) * self._stage.config.optim.batch_size
            minutes = images_left / max(event.images_per_second, 1e-9) / 60
            console.print(f"{name} epoch {event.epoch}/{epochs}  {text}  left {minutes:.1f} min", soft_wrap=True)
