"""Saves and restores checkpoints in the training loop."""

from collections.abc import Mapping
from typing import Any

import jax
from absl import logging
from etils import epath

from lt_adv.training import metric_logging, sharding
from lt_adv.training.checkpoint import BEST, Checkpoints
from lt_adv.training.hooks import Hook, LogEvent
from lt_adv.training.stage_builder import StageProgram
from lt_adv.training.train_state import TrainState


class CheckpointHook(Hook):
    """Checkpoints of one stage: every `config.checkpoint.every_epochs`, the best, the last, and one at SIGTERM.

    Args:
      stage: the stage.
      workdir: checkpoints are written to <workdir>/checkpoints/<stage>.
      metrics_log: the rows of metrics.jsonl, which a checkpoint holds too.
    """

    def __init__(self, stage: StageProgram, workdir: epath.Path, metrics_log: metric_logging.JsonLines):
        self._stage, self._workdir, self._log = stage, workdir, metrics_log
        self._best_metric = BEST if stage.split.validation is not None else None
        self._best = -1.0
        self._checkpoints = Checkpoints(
            workdir / "checkpoints" / stage.name, keep=stage.config.checkpoint.keep, best_metric=self._best_metric
        )
        self.last_saved: int | None = None

    def restore(self, state: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """Returns (state, metadata) of the newest checkpoint, or None; `state` has its structure and sharding.

        Raises:
          ValueError: no checkpoint can be restored, or the run was trained on other images.
        """
        stage = self._stage
        restored = self._checkpoints.restore_latest(state, stage.mesh)
        if restored is None:
            return None
        state, meta = restored
        check_same_run(meta, identity(stage), self._workdir)
        self.last_saved = int(meta["step"])
        return sharding.to_local(state, stage.mesh, stage.config.parallel), meta

    def on_stage_start(self, stage: StageProgram, state: TrainState) -> None:
        del state
        earlier = [row[BEST] for row in self._log.rows if row["stage"] == stage.name and BEST in row]
        self._best = max(earlier, default=-1.0)

    def on_log(self, event: LogEvent) -> None:
        value = event.metrics.get(BEST, -1.0) if self._best_metric else -1.0
        is_best, self._best = value > self._best, max(value, self._best)
        every = event.stage.config.checkpoint.every_epochs
        if event.stopping or event.is_last_step or is_best or (event.epoch_ended and event.epoch % every == 0):
            self._save(event)

    def _save(self, event: LogEvent) -> None:
        stage = event.stage
        meta = {"step": event.step, "seconds": event.seconds, "lines": list(self._log.rows), **identity(stage)}
        has_best = self._best_metric is not None and BEST in event.metrics
        state = sharding.to_global(event.state, stage.mesh, stage.config.parallel)
        self._checkpoints.save(event.step, state, meta, {BEST: event.metrics[BEST]} if has_best else None)
        self.last_saved = event.step

    def wait(self) -> None:
        """Waits until the last checkpoint is on disk."""
        self._checkpoints.wait()

    def close(self) -> None:
        self._checkpoints.close()

    def __enter__(self) -> "CheckpointHook":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        """Waits for the last checkpoint, also after an exception: another run may start in the same folder."""
        try:
            self.close()
        except OSError as error:
            if kind is None:
                raise
            if not issubclass(kind, OSError):  # the exception that ended training is raised, and may be this one
                logging.error("%s", error)


def identity(stage: StageProgram) -> dict[str, Any]:
    """Returns the metadata of a checkpoint that identify its run."""
    meta = {
        "stage": stage.name,
        "stages": stage.resolved.num_stages,
        "total_steps": stage.resolved.num_steps,
        "class_counts": list(stage.split.class_counts),
        "data_digest": stage.split.digest,
        "devices": stage.mesh.size,
        "jax_version": jax.__version__,
    }
    if extra := stage.resolved.describe_extra():
        meta["extra"] = extra
    return meta


def check_same_run(meta: Mapping[str, Any], current: Mapping[str, Any], workdir: epath.Path) -> None:
    """Compares the metadata of a checkpoint with the run that resumes from it.

    Prints a note if the results may differ in their last bits.

    Raises:
      ValueError: the checkpoint was trained on other images.
    """
    if meta.get("data_digest") != current["data_digest"]:
        raise ValueError(f"{workdir} was trained on other images than config.data describes: use another --workdir.")
    if meta.get("extra") != current.get("extra"):
        raise ValueError(
            f"{workdir} was trained with other extra images, or another use of them, than config.data describes: use "
            "another --workdir."
        )
    for name in ("devices", "jax_version"):
        if meta.get(name) != current[name]:
            text = f"{name.replace('_', ' ')} was {meta.get(name)} and is {current[name]}"
            metric_logging.console.print(
                f"Note: {text}: the results will be close, but not equal, to those of an uninterrupted run."
            )
