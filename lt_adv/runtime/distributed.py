"""Several processes, as on a pod, that run one program: each has some of the devices, and all come to the same calls.

Whatever one process finds by itself (a file that is damaged, a signal) must be agreed on before any of them acts on it:
the others would wait for it in the next exchange between devices.
"""

import functools
import hashlib
import os
import signal
import threading
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

COORDINATOR, COUNT, NUMBER = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
TASKS = ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
SILENCE = "LT_ADV_SILENCE"  # seconds after which a process that says nothing is taken for dead
USUAL_SILENCE = 100


def join(environment: Mapping[str, str] = os.environ) -> None:
    """Join the other processes, where the environment names any; before anything is computed.

    By hand: JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID. Slurm, Open MPI and
    TPU pods need nothing, and JAX asks them. When a process dies, or is silent for LT_ADV_SILENCE seconds [100], all
    others end: with a line of ours where an exchange fails, by JAX with its own where its service hears of it first.
    ValueError for an environment that says it by halves.
    """
    if jax.distributed.is_initialized():
        return
    given = {name: environment[name] for name in (COORDINATOR, COUNT, NUMBER) if environment.get(name)}
    options: dict[str, Any] = {"heartbeat_timeout_seconds": _whole(SILENCE, environment.get(SILENCE, USUAL_SILENCE))}
    if COUNT in given or NUMBER in given:
        if len(given) < 3:
            missing = ", ".join({COORDINATOR, COUNT, NUMBER} - given.keys())
            raise ValueError(f"The environment has {', '.join(given)} and no {missing}: it takes all three.")
        count, number = _whole(COUNT, given[COUNT]), _whole(NUMBER, given[NUMBER], least=0)
        if not number < count:
            raise ValueError(f"{NUMBER} = {number} is none of the {count} processes (0 to {count - 1}).")
        options |= {"coordinator_address": given[COORDINATOR], "num_processes": count, "process_id": number}
    elif not launched(environment):
        return
    jax.distributed.initialize(**options)


def count(environment: Mapping[str, str] = os.environ) -> int:
    """Processes, as the environment says in numbers (a TPU pod does not); unlike jax.process_count starts no device."""
    found = (environment.get(name, "") for name in (COUNT, *TASKS))
    return max([1, *(int(number) for number in found if number.isdigit())])


def launched(environment: Mapping[str, str]) -> bool:
    """Whether a launcher that JAX knows has started several processes."""
    if COORDINATOR in environment or count(environment) > 1:
        return True
    workers = environment.get("TPU_WORKER_HOSTNAMES", "") or environment.get("TPU_PROCESS_ADDRESSES", "")
    return "," in workers or os.path.exists("/dev/accel0") and "TPU_SKIP_MDS_QUERY" not in environment


def _whole(name: str, value: Any, least: int = 1) -> int:
    if not str(value).isdigit() or int(value) < least:
        raise ValueError(f"{name} must be a whole number, {least} or more, not {value!r}.")
    return int(value)


def joined() -> bool:
    """Whether there are others."""
    return jax.distributed.is_initialized()


def heed_sigterm() -> None:
    """From here on SIGTERM is Python's again: `join` gives it to JAX, which only tells training of it when asked."""
    if jax.process_count() > 1 and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))  # which never heard that it was taken away


def is_primary() -> bool:
    """Whether this process is the one that writes logs and reports."""
    return jax.process_index() == 0


def in_all(holds: np.ndarray) -> np.ndarray:
    """Where it holds in all processes, bool arrays of one shape."""
    if jax.process_count() == 1:
        return holds
    return np.asarray(multihost_utils.process_allgather(holds)).all(0)


def agree(holds: bool) -> bool:
    """Whether it holds in all processes."""
    return bool(in_all(np.array(holds)))


def on_primary(act: Callable[[], None]) -> None:
    """Done by the first process, while the others wait; where it fails, its error there, ValueError in the others."""
    failure: Exception | None = None
    if is_primary():
        try:
            act()
        except Exception as error:  # whatever it is, the others must not wait for ever
            failure = error
    if failure:
        agree(False)
        raise failure
    if not agree(True):
        raise ValueError("The first process has failed: it says why.")


def assert_same_everywhere(what: str, text: str) -> None:
    """ValueError unless `text` is the same in all processes; `what` says what it stands for."""
    if jax.process_count() == 1:
        return
    mine = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    differing = (multihost_utils.process_allgather(mine) != mine).any(-1)
    if not agree(not differing.any()):
        raise ValueError(f"{what} is not the same in all processes: start them with the same command on the same data.")


def barrier(what: str) -> None:
    """Until all processes have come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def put(tree: Any, sharding: NamedSharding) -> Any:
    """Arrays that every process has, on the devices of all: each process fills its own ones."""
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def one(a: Any) -> jax.Array:
        if jnp.issubdtype(jax.dtypes.result_type(a), jax.dtypes.prng_key):
            return jax.random.wrap_key_data(one(jax.random.key_data(a)))  # of the default implementation, as ours are
        a = np.asarray(a)
        return jax.make_array_from_callback(a.shape, sharding, lambda where: a[where])

    return jax.tree.map(one, tree)


def local_rows(rows: int) -> slice:
    """This process's part of so many rows: of n processes every n-th row, from its own number on."""
    return slice(jax.process_index(), rows, jax.process_count())


def gather(columns: Any, rows: int) -> Any:
    """Of `rows` rows all, from arrays of those of `local_rows(rows)`."""
    if jax.process_count() == 1:
        return columns
    most = -(-rows // jax.process_count())

    def whole(column: np.ndarray) -> np.ndarray:
        padded = np.zeros((most, *column.shape[1:]), column.dtype)
        padded[: len(column)] = column
        found = multihost_utils.process_allgather(padded)  # [process, row, ...]
        return np.asarray(found).swapaxes(0, 1).reshape(-1, *column.shape[1:])[:rows]

    return jax.tree.map(whole, columns)


def replicate(tree: Any, sharding: NamedSharding) -> Any:
    """Whole copies of `tree` on every device of a replicated `sharding`, from shards or from other devices' copies.

    The copies that a process has on its own devices (pmap's) are used as they are. All others are made by one program:
    of several in flight side by side, two processes may begin different ones, and then each waits for the other.
    """
    leaves, structure = jax.tree.flatten(tree)
    typed = [jnp.issubdtype(a.dtype, jax.dtypes.prng_key) for a in leaves]
    plain = [jax.random.key_data(a) if key else a for a, key in zip(leaves, typed, strict=True)]
    found = [_as_it_is(a, sharding) for a in plain]
    missing = [i for i, a in enumerate(found) if a is None]
    for i, copy in zip(missing, _copied(sharding)([plain[i] for i in missing]) if missing else (), strict=True):
        found[i] = copy
    whole = [jax.random.wrap_key_data(a) if key else a for a, key in zip(found, typed, strict=True)]
    return jax.tree.unflatten(structure, whole)


def _as_it_is(a: jax.Array, sharding: NamedSharding) -> jax.Array | None:
    """Whole copies of `a` where nothing has to be moved for them."""
    if a.sharding.is_equivalent_to(sharding, a.ndim):
        return a
    if a.is_fully_replicated:
        copies = {shard.device: shard.data for shard in a.addressable_shards}
        mine = list(local(sharding.mesh).devices.flat)
        if set(mine) <= copies.keys():
            return jax.make_array_from_single_device_arrays(a.shape, sharding, [copies[d] for d in mine])
    return None


@functools.lru_cache(maxsize=8)
def _copied(sharding: NamedSharding) -> Callable[[list[jax.Array]], list[jax.Array]]:
    """Compiled once for each list of shapes, not in each call."""
    return jax.jit(lambda arrays: arrays, out_shardings=sharding)


def local(mesh: Mesh) -> Mesh:
    """This process's devices of a mesh; the mesh itself where these are all."""
    mine = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    return mesh if len(mine) == mesh.size else Mesh(np.array(mine), mesh.axis_names)


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())
