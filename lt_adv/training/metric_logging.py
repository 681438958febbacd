"""Logging of a run: JSON lines, TensorBoard, and a progress display."""

import json
import math
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any

import rich.console
import rich.progress
from absl import logging as warnings
from etils import epath

from lt_adv.runtime import atomic_io, distributed

SECONDS_BETWEEN_LINES = 3.0  # of the progress display without a terminal
console = rich.console.Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 120)


class Lines:
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
                row["stage"], row["step"]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                warnings.warning("%s is damaged in line %d (%s).", path, len(self.rows) + 1, error)
                break
            self.rows.append(row)

    def put_back(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Replaces the rows by those stored in a checkpoint: the file may have been damaged since."""
        self.rows = [dict(row) for row in rows]

    def write(self) -> None:
        if distributed.is_primary():
            atomic_io.write_atomically(self._path, "".join(json.dumps(r) + "\n" for r in self.rows))

    def keep(self, last_step: int, stage: str, earlier: Iterable[str] = ()) -> None:
        """Removes the rows after `last_step` of `stage`, where the run resumes."""
        earlier = set(earlier)
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


class Progress:
    """Shows epoch, images/s, time left, loss, clean and robust accuracy.

    In a terminal this is one line that is updated. Elsewhere one line is printed per epoch, and at most one every
    SECONDS_BETWEEN_LINES.
    """

    def __init__(self, stage: str, epochs: int, steps_per_epoch: int, batch_size: int, step: int):
        self._size, self._epochs, self._per_epoch, self._stage = batch_size, epochs, steps_per_epoch, stage
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
        self._task = self._bar.add_task(stage, total=epochs * steps_per_epoch, completed=step, numbers="compiling ...")

    def __enter__(self):
        self._bar.__enter__()
        return self

    def __exit__(self, *error):
        self._bar.__exit__(*error)

    def update(self, step: int, row: Mapping[str, Any], images_per_second: float, epoch_ended: bool) -> None:
        epoch = (step - 1) // self._per_epoch + 1
        shown = [f"{images_per_second:,.0f} img/s"] + [
            f"{label} {row[name]:.{digits}f}" if digits == 3 else f"{label} {100 * row[name]:.1f}"
            for name, label, digits in COLUMNS
            if name in row and row[name] == row[name]
        ]
        text = "  ".join(shown)
        self._bar.update(self._task, completed=step, description=f"{self._stage} {epoch}/{self._epochs}", numbers=text)
        now, last = time.monotonic(), step == self._epochs * self._per_epoch
        if epoch_ended and not console.is_terminal and (last or now - self._printed >= SECONDS_BETWEEN_LINES):
            self._printed = now
            seconds_left = (self._epochs * self._per_epoch - step) * self._size / max(images_per_second, 1e-9)
            console.print(
                f"{self._stage} epoch {epoch}/{self._epochs}  {text}  left {seconds_left / 60:.1f} min", soft_wrap=True
            )


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
