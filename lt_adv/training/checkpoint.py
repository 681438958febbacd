"""Orbax checkpoints of the train state, with a digest of our own: orbax restores a flipped byte silently."""

import contextlib
import json
import math
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import checkpoint_managers as policies

from lt_adv import lookup

TRANSIENT = (ConnectionError, TimeoutError, PermissionError)
VARIABLES = ("params", "batch_stats")
# What a run says in each of its checkpoints, and is read by others.
ENTRIES: dict[str, Any] = {"step": int, "total_steps": int, "stage": str, "stages": int, "class_counts": list}
ENTRIES["seconds"] = (int, float)
BEST = "valid/pgd20/accuracy"  # what the best checkpoint is the best in; the validation split is balanced


def _words(a: jax.Array) -> jax.Array:
    """The bits of `a` as uint32, flat."""
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        a = jax.random.key_data(a)
    a = a.reshape(-1)
    if a.dtype == bool:
        a = a.astype(jnp.uint8)
    width = a.dtype.itemsize
    unsigned = jax.lax.bitcast_convert_type(a, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[width])
    return unsigned.astype(jnp.uint32).reshape(-1)


@jax.jit
def _checksums(tree: Any) -> Any:
    def checksum(a):
        words = _words(a)
        position = jax.lax.iota(jnp.uint32, words.size)
        # Odd multipliers are units modulo 2**32, so no single changed word can cancel; two of them make 64 bits.
        odd = (2 * position + 1) * jnp.uint32(0x9E3779B1)
        return jnp.stack([jnp.sum(words * odd), jnp.sum((words ^ (words >> 15)) * (odd * odd))])

    return jax.tree.map(checksum, tree)


def digest(tree: Any) -> dict[str, str]:
    """Path of each array -> 16 hexadecimal digits over its bits. Computed where the arrays are, shards and all."""
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(_checksums(tree)))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): "".join(f"{int(w):08x}" for w in a)
        for path, a in leaves
    }


def _differing(tree: Any, meta: dict[str, Any]) -> list[str]:
    """The arrays of `tree` whose digest is not the stored one."""
    return [name for name, value in digest(tree).items() if meta["digest"].get(name) != value]


def _options(keep: int, best: str | None) -> ocp.CheckpointManagerOptions:
    kept: list[Any] = [policies.LatestN(keep)]
    if best:
        kept.append(policies.BestN(get_metric_fn=lambda m: m[best], n=1, keep_checkpoints_without_metrics=False))
    return ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(kept),
        best_fn=(lambda m: m[best]) if best else None,
        create=True,
        cleanup_tmp_directories=True,
    )


class Checkpoints:
    """The checkpoints of one stage: the latest `keep`, and the best on validation if there is one.

    Each holds the state, its digest, and `meta` (plain data: epoch, metrics). Saving is asynchronous; the state may be
    donated at once. A save that fails raises OSError, at the next one or at the end; those before it stay whole.
    """

    def __init__(self, directory: epath.PathLike, *, keep: int = 2, best_metric: str | None = None):
        self.directory = epath.Path(directory)
        self._best_metric = best_metric
        self._manager = ocp.CheckpointManager(self.directory, options=_options(keep, best_metric))

    def save(self, step: int, state: Any, meta: dict[str, Any], metrics: dict[str, float] | None = None) -> None:
        meta = {**meta, "digest": digest(state)}
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
        """(state, meta) of `step`, replicated over `mesh`; ValueError if it is damaged or of another network."""
        sharding = NamedSharding(mesh, PartitionSpec())
        target = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), like)
        try:
            restored = self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target), meta=ocp.args.JsonRestore())
            )
            state, meta = restored["state"], _known(restored["meta"])
            wrong = _differing(state, meta)
        except TRANSIENT:
            raise  # a store that does not answer has damaged nothing
        except Exception as error:  # Orbax has no exception of its own: a truncated file may raise almost anything.
            raise ValueError(f"checkpoint {step} in {self.directory} cannot be read ({_first_line(error)})") from error
        if wrong:
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
            for damaged, text in zip(reversed(self.steps()), errors, strict=False):
                aside = self.directory.parent.parent / "damaged" / f"{self.directory.name}-{damaged}"
                logging.warning("%s: moved to %s, going on from checkpoint %d.", text, aside, step)
                aside.parent.mkdir(parents=True, exist_ok=True)
                if aside.exists():
                    aside.rmtree()
                (self.directory / str(damaged)).rename(aside)
            if errors:
                self._manager.reload()
            return restored
        if errors:
            raise ValueError(
                f"None of the checkpoints can be restored: {'; '.join(errors)}. Use another --workdir, or delete them."
            )
        return None


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}"


def read_variables(workdir: epath.PathLike, which: str = "last") -> tuple[dict[str, Any], dict[str, Any]]:
    """({"params", "batch_stats", "extra"} as numpy arrays, meta) of a run: what its evaluation uses.

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
        raise lookup.unknown("config.eval.checkpoint", which, ("last", "best"))
    errors = []
    for stage, step in reversed(found):
        try:
            read = _read(stage, step)
        except TRANSIENT:
            raise
        except Exception as error:  # as in Checkpoints.restore
            errors.append(f"checkpoint {step} in {stage} cannot be read ({_first_line(error)})")
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
        raise ValueError(f"checkpoint {step} in {stage} cannot be read ({_first_line(error)})") from error


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
    return {name: tree[name] for name in (*names, "extra") if name in tree}


def _variables(item: dict[str, Any]) -> dict[str, Any]:
    extra = item.pop("extra", {})
    return {**item.get("average", item), "extra": extra}


def _meta(stage: epath.Path, step: int) -> dict[str, Any]:
    return _known(json.loads((stage / str(step) / "meta" / "metadata").read_text()))


def _known(meta: Any) -> dict[str, Any]:
    """What a checkpoint says of itself; ValueError where that is not what a run would say: it has no digest."""
    if not isinstance(meta, dict):
        raise ValueError(f"what it says of itself is {meta!r:.50}")
    for name, kind in {"digest": dict, **ENTRIES}.items():
        if name in meta and (not isinstance(meta[name], kind) or isinstance(meta[name], bool)):
            raise ValueError(f"its {name} is {meta[name]!r:.50}")
    if not math.isfinite(meta.get("seconds", 0.0)):
        raise ValueError(f"its seconds are {meta['seconds']}")
    return meta


def _read(stage: epath.Path, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
    item = _wanted(stage, step)
    args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
    restored = ocp.PyTreeCheckpointHandler().restore(
        stage / str(step) / "state", args=ocp.args.PyTreeRestore(item=item, restore_args=args, partial_restore=True)
    )
    meta = _meta(stage, step)
    if wrong := _differing(restored, meta):
        raise ValueError(f"its digest differs at {wrong[0]}")
    return _variables(restored), meta
