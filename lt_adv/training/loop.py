"""The training loop: stages, steps, and stopping on SIGTERM. Everything else is a hook, see `lt_adv.training.hooks`."""

import signal
import threading
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from lt_adv.runtime import distributed
from lt_adv.runtime.distributed import PyTree
from lt_adv.training import metric_logging, stage_builder
from lt_adv.training.checkpoint_hook import CheckpointHook
from lt_adv.training.hooks import Hook, LogEvent
from lt_adv.training.metric_logging import LogHook, ProgressHook
from lt_adv.training.stage_builder import ResolvedStage, StageProgram
from lt_adv.training.train_state import TrainState
from lt_adv.training.train_step import is_log_step
from lt_adv.training.validation_hook import ValidationHook


class Preempted(Exception):
    """SIGTERM arrived, and the state is saved."""


class NonFinite(FloatingPointError):
    """The loss or the gradient is infinite or NaN."""


class StopSignal:
    """Whether SIGTERM has arrived; the loop checks it between two steps.

    With several processes, one of them may receive the signal or a notice of preemption: the JAX coordination service
    then chooses the step after which all of them stop.
    """

    def __enter__(self) -> "StopSignal":
        self._event = threading.Event()
        self._previous = None
        self._num_checks = 0
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, lambda *_: self._event.set())
        return self

    def __exit__(self, *error: Any) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def is_set(self) -> bool:
        if jax.process_count() == 1:
            return self._event.is_set()
        self._num_checks += 1
        return multihost_utils.reached_preemption_sync_point(self._num_checks)


def train(stages: Sequence[ResolvedStage], workdir: epath.Path, mesh: Mesh, hooks: Sequence[Hook] = ()) -> None:
    """Trains all stages of a run; resumes from the checkpoints in the working directory.

    Raises:
        Preempted: after a SIGTERM; the run can be resumed at that step.
        NonFinite: training diverged. Earlier checkpoints stay, but the same command would diverge again.
    """
    for hook in hooks:
        hook.on_train_start(stages)
    log = LogHook(workdir)
    previous: PyTree = None
    seconds = 0.0
    with StopSignal() as stop:
        for resolved in stages:
            stage = stage_builder.build(resolved, mesh, previous)
            state, seconds = train_stage(stage, workdir, log, hooks, stop, seconds)
            previous = jax.device_get(distributed.replicate(state.variables, distributed.replicated(mesh)))
        log.metrics.write()  # restores a file that was damaged meanwhile
        if stop.is_set():  # after the last step, which is saved
            raise Preempted("SIGTERM: training is finished and saved. The same command goes on with the evaluation.")


def train_stage(
    stage: StageProgram,
    workdir: epath.Path,
    log: LogHook,
    hooks: Sequence[Hook],
    stop: StopSignal,
    seconds: float,
) -> tuple[TrainState, float]:
    """Trains one stage to its end; returns its last state, and `seconds` plus the training time of the stage."""
    batch_size, per_epoch, total = stage.config.optim.batch_size, stage.info.steps_per_epoch, stage.resolved.num_steps
    checkpoints = CheckpointHook(stage, workdir, log.metrics)
    state = stage.first_state()
    digests = [stage.split.digest, stage.resolved.extra.digest if stage.resolved.extra else ""]
    distributed.assert_same_everywhere("The training set", " ".join(digests))
    if (restored := checkpoints.restore(state)) is not None:
        state, meta = restored
        seconds = meta.get("seconds", 0.0)
        log.metrics.restore(meta.get("lines", log.metrics.rows))  # older checkpoints have none
    first = int(state.step)
    if first == total:
        checkpoints.close()
        log.on_stage_end(stage, state)
        return state, seconds
    if restored is not None:
        metric_logging.console.print(f"Resumed {stage.name} at step {first} of {total}.")
    progress = ProgressHook(stage, first)
    # In this order: a row of metrics has the accuracies of its epoch, a checkpoint has the rows up to its step.
    all_hooks = (ValidationHook(stage), log, checkpoints, progress, *hooks)
    for hook in all_hooks:
        hook.on_stage_start(stage, state)

    started, last_event = time.perf_counter(), first
    metrics: dict[str, jax.Array] | None = None
    previous_metrics: dict[str, jax.Array] | None = None
    with checkpoints, progress, stage.pipeline.batches(first, total) as batches:
        for step, batch in zip(range(first, total), batches, strict=False):
            # At most two steps are in flight: the device stays busy, and the loop reacts to SIGTERM quickly.
            jax.block_until_ready(previous_metrics)
            previous_metrics = metrics
            for hook in hooks:
                hook.on_step(stage, state)
            with jax.transfer_guard("disallow"):
                state, metrics = stage.step(state, batch, stage.teacher)
            stopping, log_step = stop.is_set(), is_log_step(step, per_epoch, stage.config.log.every_steps)
            if not (stopping or log_step):
                continue
            values = {f"train/{k}": float(v) for k, v in jax.device_get(metrics).items()}
            check_finite(values, step + 1, checkpoints)
            epoch, epoch_ended = step // per_epoch + 1, (step + 1) % per_epoch == 0
            if epoch_ended:
                state = stage.end_epoch(state, epoch)
            elapsed = time.perf_counter() - started
            seconds += elapsed
            event = LogEvent(
                stage=stage,
                state=state,
                step=step + 1,
                epoch=epoch,
                epoch_ended=epoch_ended,
                is_log_step=log_step,
                stopping=stopping,
                metrics=values,
                images_per_second=(step + 1 - last_event) * batch_size / elapsed,
                seconds=seconds,
            )
            for hook in all_hooks:
                hook.on_log(event)
            if stopping:
                checkpoints.wait()
                raise Preempted(f"SIGTERM: saved at step {step + 1} of {total}. The same command goes on from there.")
            started, last_event = time.perf_counter(), step + 1
    for hook in all_hooks:
        hook.on_stage_end(stage, state)
    return state, seconds


def check_finite(metrics: dict[str, float], step: int, checkpoints: CheckpointHook) -> None:
    """Raises NonFinite if the loss or the gradient is infinite or NaN."""
    bad = [name for name in ("train/loss", "train/gradient_norm") if not np.isfinite(metrics[name])]
    if bad:
        checkpoints.wait()
        saved = checkpoints.last_saved
        advice = f"The last good checkpoint is step {saved}" if saved else "There is no checkpoint yet"
        raise NonFinite(
            f"{bad[0]} is {metrics[bad[0]]} in the steps before step {step}. {advice}. "
            "In another --workdir, try a smaller config.optim.learning_rate, a warm-up (config.optim.warmup_epochs), "
            "or float32 (config.model.dtype)."
        )
