"""Orbax checkpoints of the train state, with checksums: orbax does not notice a flipped bit."""

import asyncio
import contextlib
import json
import os
import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import checkpoint_managers as policies

from lt_adv.runtime import atomic_io, distributed, registry
from lt_adv.runtime.distributed import PyTree
from lt_adv.training.checksums import mismatches, validate_metadata, with_digests

TRANSIENT = (ConnectionError, TimeoutError, PermissionError)
VARIABLES = ("params", "batch_stats")
BEST = "valid/pgd20/accuracy"  # the metric of the best checkpoint; the validation split is balanced


class SyncedTemporaryPath(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """The temporary folder of a checkpoint: renamed to the step once all of its content is synced to disk."""

    _final_path: epath.Path

    async def finalize(self) -> None:
        final = self._final_path
        # Orbax finishes its metadata and renames in one call: let it rename to another name that is not a checkpoint.
        self._final_path = self.get().with_name(f"{self.get().name}-written")
        try:
            await super().finalize()
            await asyncio.to_thread(_publish, self._final_path, final)
        finally:
            self._final_path = final


def _publish(written: epath.Path, final: epath.Path) -> None:
    atomic_io.sync_tree(written)
    written.rename(final)
    atomic_io.sync(final.parent)


def _options(keep: int, best: str | None, directory: epath.Path) -> ocp.CheckpointManagerOptions:
    to_preserve: list[Any] = [policies.LatestN(keep)]
    if best:
        to_preserve.append(policies.BestN(get_metric_fn=lambda m: m[best], n=1, keep_checkpoints_without_metrics=False))
    return ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(to_preserve),
        best_fn=(lambda m: m[best]) if best else None,
        create=True,
        cleanup_tmp_directories=True,
        # Object stores cannot rename.
        temporary_path_class=None if "://" in os.fspath(directory) else SyncedTemporaryPath,
    )


class Checkpoints:
    """The checkpoints of one stage: the latest `keep`, and the one with the best `best_metric`, if given.

    A checkpoint holds the state, checksums, and `meta` (plain data). Saving is asynchronous; the state may be donated
    at once. A save that fails raises OSError in the next call or in `close`; earlier checkpoints stay intact.
    """

    def __init__(self, directory: epath.PathLike, *, keep: int = 2, best_metric: str | None = None):
        self.directory = epath.Path(directory)
        self._best_metric = best_metric
        atomic_io.make_folder(self.directory)
        self._manager = ocp.CheckpointManager(self.directory, options=_options(keep, best_metric, self.directory))

    def save(self, step: int, state: PyTree, meta: dict[str, Any], metrics: dict[str, float] | None = None) -> None:
        meta = with_digests(state, meta)
        if step in self._manager.all_steps():
            return
        with self._writing():
            self._manager.save(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)),
                metrics=metrics if self._best_metric else None,
                force=True,
            )

    def wait(self) -> None:
        """Waits until the last save is on disk."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        with self._writing():
            self._manager.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # as in restore
            os_error = re.search(r"([^:]+) \[os_error_code", str(error))  # at the end of a long message
            reason = os_error[1].strip() if os_error else _first_line(error)
            raise OSError(
                f"A checkpoint cannot be written to {self.directory} ({reason}). "
                "Earlier checkpoints are intact: once writing is possible, the same command goes on from the last."
            ) from error

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def restore(self, step: int, target: PyTree, mesh: Mesh) -> tuple[PyTree, dict[str, Any]]:
        """Returns (state, meta) of `step`, on `mesh`, with the shapes and the partition specs of the state `target`.

        Raises:
            ValueError: the checkpoint is damaged, or belongs to another network.
        """

        def shape_on_mesh(a: jax.Array) -> jax.ShapeDtypeStruct:
            spec = a.sharding.spec if isinstance(a.sharding, NamedSharding) else PartitionSpec()
            return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec))

        failure: Exception | None = None
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(jax.tree.map(shape_on_mesh, target)), meta=ocp.args.JsonRestore()
                ),
            )
            state, meta = restored["state"], validate_metadata(restored["meta"])
            dict(meta["digest"])  # if it is missing, all processes must fail here
        except TRANSIENT:
            raise  # a store that is unavailable is not a damaged checkpoint
        except Exception as error:  # Orbax has no exception of its own: a truncated file may raise almost anything.
            failure = error
        if not distributed.all_true(failure is None):
            reason = _failure_reason(failure, self.directory / str(step)) if failure else "by another process"
            raise ValueError(f"checkpoint {step} in {self.directory} cannot be read ({reason})") from failure
        if wrong := mismatches(state, meta):
            raise ValueError(f"checkpoint {step} in {self.directory} is damaged: its digest differs at {wrong[0]}")
        return state, meta

    def restore_latest(self, target: PyTree, mesh: Mesh) -> tuple[PyTree, dict[str, Any]] | None:
        """Returns (state, meta) of the newest checkpoint that can be restored, or None if there is no checkpoint.

        Newer ones that are damaged are moved to <workdir>/damaged, with a warning: the run writes these steps again.

        Raises:
            ValueError: there are checkpoints, but none can be restored.
        """
        errors = []
        for step in reversed(self.steps()):
            try:
                restored = self.restore(step, target, mesh)
            except ValueError as error:
                errors.append(str(error))
                continue
            if errors:
                if distributed.is_primary():
                    self._move_damaged(list(zip(reversed(self.steps()), errors, strict=False)), step)
                distributed.barrier("damaged checkpoints are moved")
                self._manager.reload()
            return restored
        if errors:
            raise ValueError(
                f"None of the checkpoints can be restored: {'; '.join(errors)}. Use another --workdir, or delete them."
            )
        return None

    def _move_damaged(self, damaged: list[tuple[int, str]], resumed: int) -> None:
        for step, text in damaged:
            destination = self.directory.parent.parent / "damaged" / f"{self.directory.name}-{step}"
            logging.warning("%s: moved to %s, going on from checkpoint %d.", text, destination, resumed)
            atomic_io.make_folder(destination.parent)
            if destination.exists():
                destination.rmtree()
            (self.directory / str(step)).rename(destination)


def _failure_reason(error: BaseException, checkpoint: epath.Path) -> str:
    """Returns why a checkpoint could not be read: its files are placeholders, or the first line of the error."""
    return atomic_io.placeholder(checkpoint) or _first_line(error)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}"


def read_variables(workdir: epath.PathLike, which: str = "last") -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns ({"params", "batch_stats", "method_state"} as numpy arrays, meta) of a run, for its evaluation.

    The weights are the averaged ones if the run averages them. Nothing else of the state is read, so that the run may
    have any method, optimizer and number of devices. Damaged checkpoints are skipped with a warning.

    Args:
        workdir: the working directory of the run.
        which: "last", or "best" on the validation split.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: no checkpoint can be read.
    """
    root, checkpoints = _list_checkpoints(workdir)
    if which == "best":
        stage = checkpoints[-1][0]
        options = ocp.CheckpointManagerOptions(best_fn=lambda m: m[BEST], read_only=True)  # the run may be writing
        with ocp.CheckpointManager(stage, options=options) as manager:
            best = manager.best_step()
        if best is None:
            raise ValueError(
                f"{root} has no best checkpoint, since config.data.validation_per_class was 0: "
                "use config.eval.checkpoint=last."
            )
        checkpoints = [(stage, best)]
    elif which != "last":
        raise registry.unknown("config.eval.checkpoint", which, ("last", "best"))
    errors = []
    for stage, step in reversed(checkpoints):
        try:
            read = _read_checkpoint(stage, step)
        except TRANSIENT:
            raise
        except Exception as error:  # as in Checkpoints.restore
            errors.append(f"checkpoint {step} in {stage} cannot be read ({_failure_reason(error, stage / str(step))})")
            continue
        for text in errors:
            logging.warning("%s: skipped, using checkpoint %d.", text, step)
        return read
    raise ValueError(f"No checkpoint can be read: {'; '.join(errors)}. Train again, in another --workdir.")


def read_shapes(workdir: epath.PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the result of `read_variables` for the last checkpoint, with shapes instead of arrays."""
    _, checkpoints = _list_checkpoints(workdir)
    stage, step = checkpoints[-1]
    try:
        return _variables(_array_metadata(stage, step)), _read_metadata(stage, step)
    except TRANSIENT:
        raise
    except Exception as error:  # as in Checkpoints.restore
        reason = _failure_reason(error, stage / str(step))
        raise ValueError(f"checkpoint {step} in {stage} cannot be read ({reason})") from error


def _list_checkpoints(workdir: epath.PathLike) -> tuple[epath.Path, list[tuple[epath.Path, int]]]:
    """Returns the checkpoint folder of a run, and (folder of the stage, step) of each checkpoint in order of time."""
    root = epath.Path(workdir) / "checkpoints"
    if "://" not in str(root):
        root = root.expanduser().absolute()  # orbax requires an absolute path
    stages = [s for s in root.glob("*") if re.match(r"[0-9]+_", s.name) and s.is_dir()]
    stages.sort(key=lambda s: int(s.name.partition("_")[0]))
    steps = {s: sorted(int(d.name) for d in s.iterdir() if re.fullmatch("[0-9]+", d.name)) for s in stages}
    checkpoints = [(s, step) for s in stages for step in steps[s]]
    if not checkpoints:
        raise FileNotFoundError(f"There is no checkpoint under {root}: train first, or correct --workdir.")
    return root, checkpoints


def _array_metadata(stage: epath.Path, step: int) -> dict[str, Any]:
    """Returns orbax's metadata of the arrays that an evaluation uses."""
    # A Checkpointer would warn about metadata that a CheckpointManager does not write.
    tree = ocp.PyTreeCheckpointHandler().metadata(stage / str(step) / "state").tree
    names = ("average",) if tree.get("average") else VARIABLES
    return {name: tree[name] for name in (*names, "method_state") if name in tree}


def _variables(item: dict[str, Any]) -> dict[str, Any]:
    method_state = item.pop("method_state", {})
    averages = item.get("average", item)
    return {**{name: averages[name] for name in VARIABLES if name in averages}, "method_state": method_state}


def _read_metadata(stage: epath.Path, step: int) -> dict[str, Any]:
    return validate_metadata(json.loads((stage / str(step) / "meta" / "metadata").read_text()))


def _read_checkpoint(stage: epath.Path, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
    item = _array_metadata(stage, step)
    args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
    restored = ocp.PyTreeCheckpointHandler().restore(
        stage / str(step) / "state", args=ocp.args.PyTreeRestore(item=item, restore_args=args, partial_restore=True)
    )
    meta = _read_metadata(stage, step)
    if wrong := mismatches(restored, meta):
        raise ValueError(f"its digest differs at {wrong[0]}")
    return _variables(restored), meta
