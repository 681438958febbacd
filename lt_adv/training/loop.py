"""The training loop: logging, validation, checkpoints, resuming, and stopping on SIGTERM."""

import signal
import threading
import time
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from lt_adv import data
from lt_adv.data import longtail
from lt_adv.runtime import distributed
from lt_adv.training import metric_logging, sharding, stage_builder
from lt_adv.training.checkpoint import BEST, Checkpoints
from lt_adv.training.train_step import is_log_step
from lt_adv.training.validation_hook import Monitor


class Preempted(Exception):
    """SIGTERM arrived, and the state is saved."""


class NonFinite(FloatingPointError):
    """The loss or the gradient is infinite or NaN."""


class StopSignal:
    """Whether SIGTERM has arrived; the loop checks it between two steps.

    With several processes, one of them may receive the signal or a notice of preemption: the JAX coordination service
    then chooses the step after which all of them stop.
    """

    def __enter__(self):
        self._event = threading.Event()
        self._previous = None
        self._num_checks = 0
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, lambda *_: self._event.set())
        return self

    def __exit__(self, *error):
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def is_set(self) -> bool:
        if jax.process_count() == 1:
            return self._event.is_set()
        self._num_checks += 1
        return multihost_utils.reached_preemption_sync_point(self._num_checks)


def train(config: ml_collections.ConfigDict, workdir: epath.Path, dataset: data.Dataset, mesh: Mesh) -> None:
    """Trains all stages of the configured method; resumes from the checkpoints in the working directory.

    Raises:
        Preempted: after a SIGTERM; the run can be resumed at that step.
        NonFinite: training diverged. Earlier checkpoints stay, but the same command would diverge again.
    """
    lines = metric_logging.Lines(workdir / "metrics.jsonl")
    speed = metric_logging.Lines(workdir / "timing.jsonl")
    previous: Any = None
    names: list[str] = []
    seconds = 0.0
    with StopSignal() as stop:
        for number, stage in enumerate(stage_builder.stages(config)):
            built = stage_builder.build(number, stage, config, dataset, mesh, previous)
            state, seconds = _run(built, workdir, lines, speed, names, stop, seconds)
            previous = jax.device_get(distributed.replicate(state.variables, distributed.replicated(mesh)))
            names.append(built.name)
        lines.write()  # restores a file that was damaged meanwhile
        if stop.is_set():  # after the last step, which is saved
            raise Preempted("SIGTERM: training is finished and saved. The same command goes on with the evaluation.")


def _monitors(built: stage_builder.StageProgram) -> dict[str, Monitor]:
    """Returns {"train": clean accuracy on a sample of the training images, "valid": clean and PGD-20, on the split}."""
    config, split = built.config, built.data
    key = jax.random.fold_in(jax.random.key(config.seed, impl="threefry2x32"), 99)
    common = {
        "groups": longtail.groups(split.class_counts),
        "mesh": built.mesh,
        "batch_size": config.eval.batch_size,
    }
    label = np.asarray(split.train.label)
    sample = np.concatenate(
        [np.flatnonzero(label == c)[: config.log.clean_per_class] for c in range(len(split.class_counts))]
    )
    monitors = {}
    if len(sample):
        monitors["train"] = Monitor(key, built.apply, split.train.image[sample], label[sample], **common)
    if split.validation is not None:
        attack = {"eps": config.attack.eps, "step_size": config.attack.step_size, "num_steps": 20}
        monitors["valid"] = Monitor(
            key, built.apply, split.validation.image, split.validation.label, attack=attack, **common
        )
    return monitors


def _run_monitors(monitors: dict[str, Monitor], variables: Any, validate: bool) -> dict[str, float]:
    """Returns {"train/clean/balanced_accuracy": ..., "valid/pgd20/accuracy_tail": ..., ...}."""
    rows = {name: monitor(variables) for name, monitor in monitors.items() if name == "train" or validate}
    return {f"{name}/{metric}": value for name, row in rows.items() for metric, value in row.items()}


def _run(
    built: stage_builder.StageProgram,
    workdir: epath.Path,
    lines,
    speed,
    earlier: list[str],
    stop: StopSignal,
    seconds: float,
) -> tuple[Any, float]:
    """Trains one stage to its end; returns its last state, and `seconds` plus the training time of the stage."""
    config, per_epoch, total = built.config, built.info.steps_per_epoch, built.num_steps
    best = BEST if built.data.validation is not None else None
    checkpoints = Checkpoints(workdir / "checkpoints" / built.name, keep=config.checkpoint.keep, best_metric=best)
    state = built.first_state()
    distributed.assert_same_everywhere("The training set", built.data.digest)
    restored = checkpoints.restore_latest(state, built.mesh)
    if restored is not None:
        state, meta = restored
        state = sharding.to_local(state, built.mesh, config.parallel)
        seconds = meta.get("seconds", 0.0)
        lines.put_back(meta.get("lines", lines.rows))  # older checkpoints have none
        _same_run(built, meta, workdir)
    first = int(state.step)
    if first == total:
        checkpoints.close()
        return state, seconds
    if restored is not None:
        metric_logging.console.print(f"Resumed {built.name} at step {first} of {total}.")
    for log in (lines, speed):
        log.keep(first, built.name, earlier)
    monitors = _monitors(built)
    boards = [metric_logging.TensorBoard(workdir)] if config.log.tensorboard and distributed.is_primary() else []
    saved = first if restored is not None else None
    best_so_far = max((row[best] for row in lines.rows if row["stage"] == built.name and best in row), default=-1.0)
    started, mark = time.perf_counter(), first
    metrics: Any = None
    previous_metrics: Any = None

    def save(step: int, row: dict[str, Any]) -> None:
        nonlocal saved
        meta = {"step": step, "seconds": seconds, "lines": list(lines.rows), **_identity(built)}
        metrics = {best: row[best]} if best and best in row else None
        checkpoints.save(step, sharding.to_global(state, built.mesh, config.parallel), meta, metrics)
        saved = step

    with (
        metric_logging.Progress(built.name, built.info.epochs, per_epoch, config.optim.batch_size, first) as progress,
        built.feed.batches(first, total) as batches,
    ):
        for step, batch in zip(range(first, total), batches, strict=False):
            # At most two steps are in flight: the device stays busy, and the loop reacts to SIGTERM quickly.
            jax.block_until_ready(previous_metrics)
            previous_metrics = metrics
            with jax.transfer_guard("disallow"):
                state, metrics = built.step(state, batch, built.teacher)
            done, stopping = step + 1, stop.is_set()
            if not (stopping or is_log_step(step, per_epoch, config.log.every_steps)):
                continue
            row = {f"train/{k}": float(v) for k, v in jax.device_get(metrics).items()}
            _check_finite(row, done, saved, checkpoints)
            epoch, epoch_ended = step // per_epoch + 1, done % per_epoch == 0
            now = time.perf_counter()
            rate, seconds = (done - mark) * config.optim.batch_size / (now - started), seconds + now - started
            if epoch_ended:
                variables = distributed.replicate(state.evaluated, distributed.replicated(built.mesh))
                row |= _run_monitors(
                    monitors, variables, epoch % config.log.validate_every_epochs == 0 or done == total
                )
            if is_log_step(step, per_epoch, config.log.every_steps):
                for log in (lines, *boards):
                    log.add({"stage": built.name, "step": done, "epoch": epoch, **row})
                speed.add({"stage": built.name, "step": done, "images_per_second": rate, "seconds": seconds})
            improved = best in row and row[best] > best_so_far
            if stopping or done == total or improved or (epoch_ended and epoch % config.checkpoint.every_epochs == 0):
                save(done, row)
            best_so_far = max(best_so_far, row.get(best, -1.0))
            progress.update(done, row, rate, epoch_ended)
            if stopping:
                checkpoints.close()
                raise Preempted(f"SIGTERM: saved at step {done} of {total}. The same command goes on from there.")
            started, mark = time.perf_counter(), done
    checkpoints.close()
    return state, seconds


def _identity(built: stage_builder.StageProgram) -> dict[str, Any]:
    """Returns the metadata of a checkpoint that identify its run."""
    return {
        "stage": built.name,
        "stages": len(stage_builder.stages(built.config)),
        "total_steps": built.num_steps,
        "class_counts": built.info.class_counts.tolist(),
        "data_digest": built.data.digest,
        "devices": built.mesh.size,
        "jax_version": jax.__version__,
    }


def _same_run(built: stage_builder.StageProgram, meta: dict[str, Any], workdir: epath.Path) -> None:
    """Checks a checkpoint against the run that resumes from it.

    Prints a note if the results may differ in their last bits.

    Raises:
        ValueError: the checkpoint was trained on other images.
    """
    now = _identity(built)
    if meta.get("data_digest") != now["data_digest"]:
        raise ValueError(f"{workdir} was trained on other images than config.data describes: use another --workdir.")
    for name in ("devices", "jax_version"):
        if meta.get(name) != now[name]:
            text = f"{name.replace('_', ' ')} was {meta.get(name)} and is {now[name]}"
            metric_logging.console.print(
                f"Note: {text}: the results will be close, but not equal, to those of an uninterrupted run."
            )


def _check_finite(row: dict[str, float], step: int, saved: int | None, checkpoints: Checkpoints) -> None:
    bad = [name for name in ("train/loss", "train/gradient_norm") if not np.isfinite(row[name])]
    if bad:
        checkpoints.wait()
        advice = f"The last good checkpoint is step {saved}" if saved else "There is no checkpoint yet"
        raise NonFinite(
            f"{bad[0]} is {row[bad[0]]} in the steps before step {step}. {advice}. "
            "In another --workdir, try a smaller config.optim.learning_rate, a warm-up (config.optim.warmup_epochs), "
            "or float32 (config.model.dtype)."
        )
