"""Orbax checkpoints of the train state, with a digest of our own: orbax restores a flipped byte silently."""

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
from lt_adv.training.checksums import differing, known, sealed

TRANSIENT = (ConnectionError, TimeoutError, PermissionError)
VARIABLES = ("params", "batch_stats")
BEST = "valid/pgd20/accuracy"  # what the best checkpoint is the best in; the validation split is balanced


class Synced(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """The folder in which orbax writes a checkpoint: renamed to the step's name once all in it has reached the disk."""

    async def finalize(self) -> None:
        final = self._final_path
        # Orbax writes its last words and renames in one: to a name that still stands for an unfinished checkpoint.
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
    kept: list[Any] = [policies.LatestN(keep)]
    if best:
        kept.append(policies.BestN(get_metric_fn=lambda m: m[best], n=1, keep_checkpoints_without_metrics=False))
    return ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(kept),
        best_fn=(lambda m: m[best]) if best else None,
        create=True,
        cleanup_tmp_directories=True,
        temporary_path_class=None if "://" in os.fspath(directory) else Synced,  # stores have ways of their own
    )


class Checkpoints:
    """The checkpoints of one stage: the latest `keep`, and the best on validation if there is one.

    Each holds the state, its digest, and `meta` (plain data: epoch, metrics). Saving is asynchronous; the state may be
    donated at once. A save that fails raises OSError, at the next one or at the end; those before it stay whole.
    """

    def __init__(self, directory: epath.PathLike, *, keep: int = 2, best_metric: str | None = None):
        self.directory = epath.Path(directory)
        self._best_metric = best_metric
        atomic_io.make_folder(self.directory)
        self._manager = ocp.CheckpointManager(self.directory, options=_options(keep, best_metric, self.directory))

    def save(self, step: int, state: Any, meta: dict[str, Any], metrics: dict[str, float] | None = None) -> None:
        meta = sealed(state, meta)
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
        """Until the last save is on disk."""
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
            found = re.search(r"([^:]+) \[os_error_code", str(error))  # at the end of a long story
            reason = found[1].strip() if found else _first_line(error)
            raise OSError(
                f"A checkpoint cannot be written to {self.directory} ({reason}). "
                "Those before it are whole: once it can be written, the same command goes on from the last."
            ) from error

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def restore(self, step: int, like: Any, mesh: Mesh) -> tuple[Any, dict[str, Any]]:
        """(state, meta) of `step`, over `mesh` in whole copies or in shards, as `like` is; ValueError if it is damaged
        or of another network."""

        def wanted(a: jax.Array) -> jax.ShapeDtypeStruct:
            spec = a.sharding.spec if isinstance(a.sharding, NamedSharding) else PartitionSpec()
            return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec))

        failure: Exception | None = None
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(jax.tree.map(wanted, like)), meta=ocp.args.JsonRestore()
                ),
            )
            state, meta = restored["state"], known(restored["meta"])
            dict(meta["digest"])  # all processes look at it below, or none
        except TRANSIENT:
            raise  # a store that does not answer has damaged nothing
        except Exception as error:  # Orbax has no exception of its own: a truncated file may raise almost anything.
            failure = error
        if not distributed.all_true(failure is None):
            reason = _unreadable(failure, self.directory / str(step)) if failure else "by another process"
            raise ValueError(f"checkpoint {step} in {self.directory} cannot be read ({reason})") from failure
        if wrong := differing(state, meta):
            raise ValueError(f"checkpoint {step} in {self.directory} is damaged: its digest differs at {wrong[0]}")
        return state, meta

    def restore_latest(self, like: Any, mesh: Mesh) -> tuple[Any, dict[str, Any]] | None:
        """The newest undamaged checkpoint; None if there is none at all.

        Damaged newer ones are moved to <workdir>/damaged, with a warning: the run writes these steps anew. ValueError
        if there are checkpoints and none can be restored.
        """
        errors = []
        for step in reversed(self.steps()):
            try:
                restored = self.restore(step, like, mesh)
            except ValueError as error:
                errors.append(str(error))
                continue
            if errors:
                if distributed.is_primary():
                    self._put_aside(list(zip(reversed(self.steps()), errors, strict=False)), step)
                distributed.barrier("damaged checkpoints are moved")
                self._manager.reload()
            return restored
        if errors:
            raise ValueError(
                f"None of the checkpoints can be restored: {'; '.join(errors)}. Use another --workdir, or delete them."
            )
        return None

    def _put_aside(self, damaged: list[tuple[int, str]], kept: int) -> None:
        for step, text in damaged:
            aside = self.directory.parent.parent / "damaged" / f"{self.directory.name}-{step}"
            logging.warning("%s: moved to %s, going on from checkpoint %d.", text, aside, kept)
            atomic_io.make_folder(aside.parent)
            if aside.exists():
                aside.rmtree()
            (self.directory / str(step)).rename(aside)


def _unreadable(error: BaseException, checkpoint: epath.Path) -> str:
    """Why a checkpoint could not be read: its files are placeholders, or the error."""
    return atomic_io.placeholder(checkpoint) or _first_line(error)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}"


def read_variables(workdir: epath.PathLike, which: str = "last") -> tuple[dict[str, Any], dict[str, Any]]:
    """({"params", "batch_stats", "method_state"} as numpy arrays, meta) of a run: what its evaluation uses.

    Any run's, whatever its method, optimiser and number of devices: nothing else of the state is read. Averaged weights
    where the run kept an average. `which`: "last", or "best" on the validation split. A damaged checkpoint is passed
    over with a warning. FileNotFoundError if there is no checkpoint, ValueError if none can be read.
    """
    root, found = _stored(workdir)
    if which == "best":
        options = ocp.CheckpointManagerOptions(best_fn=lambda m: m[BEST], read_only=True)  # a run may be writing there
        with ocp.CheckpointManager(found[-1][0], options=options) as manager:
            best = manager.best_step()
        if best is None:
            raise ValueError(f"{root} has no best checkpoint: the run had no config.data.validation_per_class.")
        found = [(found[-1][0], best)]
    elif which != "last":
        raise registry.unknown("config.eval.checkpoint", which, ("last", "best"))
    errors = []
    for stage, step in reversed(found):
        try:
            read = _read(stage, step)
        except TRANSIENT:
            raise
        except Exception as error:  # as in Checkpoints.restore
            errors.append(f"checkpoint {step} in {stage} cannot be read ({_unreadable(error, stage / str(step))})")
            continue
        for text in errors:
            logging.warning("%s: passed over for checkpoint %d.", text, step)
        return read
    raise ValueError(f"No checkpoint can be read: {'; '.join(errors)}. Train again, in another --workdir.")


def look(workdir: epath.PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `read_variables` gives for the last checkpoint, but with each array's shape in its place: little is read."""
    _, found = _stored(workdir)
    stage, step = found[-1]
    try:
        return _variables(_wanted(stage, step)), _meta(stage, step)
    except TRANSIENT:
        raise
    except Exception as error:  # as in Checkpoints.restore
        why = _unreadable(error, stage / str(step))
        raise ValueError(f"checkpoint {step} in {stage} cannot be read ({why})") from error


def _stored(workdir: epath.PathLike) -> tuple[epath.Path, list[tuple[epath.Path, int]]]:
    """The folder of a run's checkpoints, and (folder of the stage, step) of each, in the order they were written."""
    root = epath.Path(workdir) / "checkpoints"
    if "://" not in str(root):
        root = root.expanduser().absolute()  # orbax wants it absolute
    stages = [s for s in root.glob("*") if re.match(r"[0-9]+_", s.name) and s.is_dir()]
    stages.sort(key=lambda s: int(s.name.partition("_")[0]))
    steps = {s: sorted(int(d.name) for d in s.iterdir() if re.fullmatch("[0-9]+", d.name)) for s in stages}
    found = [(s, step) for s in stages for step in steps[s]]
    if not found:
        raise FileNotFoundError(f"There is no checkpoint under {root}: train first, or correct --workdir.")
    return root, found


def _wanted(stage: epath.Path, step: int) -> dict[str, Any]:
    """The part of the stored state that an evaluation uses, as orbax describes it."""
    # A Checkpointer would warn of metadata that no manager writes.
    tree = ocp.PyTreeCheckpointHandler().metadata(stage / str(step) / "state").tree
    names = ("average",) if tree.get("average") else VARIABLES
    return {name: tree[name] for name in (*names, "method_state") if name in tree}


def _variables(item: dict[str, Any]) -> dict[str, Any]:
    method_state = item.pop("method_state", {})
    return {**item.get("average", item), "method_state": method_state}


def _meta(stage: epath.Path, step: int) -> dict[str, Any]:
    return known(json.loads((stage / str(step) / "meta" / "metadata").read_text()))


def _read(stage: epath.Path, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
    item = _wanted(stage, step)
    args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
    restored = ocp.PyTreeCheckpointHandler().restore(
        stage / str(step) / "state", args=ocp.args.PyTreeRestore(item=item, restore_args=args, partial_restore=True)
    )
    meta = _meta(stage, step)
    if wrong := differing(restored, meta):
        raise ValueError(f"its digest differs at {wrong[0]}")
    return _variables(restored), meta
