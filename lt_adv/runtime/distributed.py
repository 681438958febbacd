"""Multi-process runs, as on a pod: every process runs the same program on its own devices and reaches the same calls.

Collectives block until all processes take part. A condition that only one process observes (a damaged file, a signal)
must therefore be shared with `all_true` before any process acts on it.
"""

import functools
import hashlib
import os
import signal
import threading
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

PyTree = Any  # nested containers of arrays, as in jax.tree

COORDINATOR, COUNT, NUMBER = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
TASKS = ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
HEARTBEAT_TIMEOUT = "LT_ADV_HEARTBEAT_TIMEOUT"  # seconds without a heartbeat after which a process counts as dead
DEFAULT_HEARTBEAT_TIMEOUT = 100


def initialize(environment: Mapping[str, str] = os.environ) -> None:
    """Connects to the other processes if the environment names any. Call it before the first computation.

    Set JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID yourself; under Slurm,
    Open MPI and on TPU pods JAX detects them. If a process dies or sends no heartbeat for LT_ADV_HEARTBEAT_TIMEOUT
    seconds (default 100), all others end: with our error message if a collective fails first, otherwise with JAX's.

    Raises:
      ValueError: only some of the three variables are set, or one of them is out of range.
    """
    if jax.distributed.is_initialized():
        return
    variables = {name: environment[name] for name in (COORDINATOR, COUNT, NUMBER) if environment.get(name)}
    timeout = _parse_int(HEARTBEAT_TIMEOUT, environment.get(HEARTBEAT_TIMEOUT, DEFAULT_HEARTBEAT_TIMEOUT))
    options: dict[str, Any] = {"heartbeat_timeout_seconds": timeout}
    if COUNT in variables or NUMBER in variables:
        if len(variables) < 3:
            missing = ", ".join({COORDINATOR, COUNT, NUMBER} - variables.keys())
            raise ValueError(f"The environment sets {', '.join(variables)} but not {missing}: set all three.")
        count, number = _parse_int(COUNT, variables[COUNT]), _parse_int(NUMBER, variables[NUMBER], minimum=0)
        if not number < count:
            raise ValueError(f"{NUMBER} = {number} is out of range for {count} processes (0 to {count - 1}).")
        options |= {"coordinator_address": variables[COORDINATOR], "num_processes": count, "process_id": number}
    elif not launcher_detected(environment):
        return
    jax.distributed.initialize(**options)


def process_count(environment: Mapping[str, str] = os.environ) -> int:
    """Returns the number of processes in the environment's variables, 1 without any (TPU pods set none).

    Unlike `jax.process_count` it starts no device.
    """
    values = (environment.get(name, "") for name in (COUNT, *TASKS))
    return max([1, *(int(value) for value in values if value.isdigit())])


def launcher_detected(environment: Mapping[str, str]) -> bool:
    """Whether a launcher that JAX knows has started several processes."""
    if COORDINATOR in environment or process_count(environment) > 1:
        return True
    workers = environment.get("TPU_WORKER_HOSTNAMES", "") or environment.get("TPU_PROCESS_ADDRESSES", "")
    return "," in workers or os.path.exists("/dev/accel0") and "TPU_SKIP_MDS_QUERY" not in environment


def _parse_int(name: str, value: str | int, minimum: int = 1) -> int:
    if not str(value).isdigit() or int(value) < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, not {value!r}.")
    return int(value)


def is_distributed() -> bool:
    """Whether this process is connected to others."""
    return jax.distributed.is_initialized()


def restore_sigterm_handler() -> None:
    """Reinstalls Python's SIGTERM handler, which `initialize` has replaced by JAX's."""
    if jax.process_count() > 1 and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))  # JAX's is set in C: getsignal returns Python's


def is_primary() -> bool:
    """Whether this process is the one that writes logs and reports."""
    return jax.process_index() == 0


def elementwise_all(flags: np.ndarray) -> np.ndarray:
    """Returns the logical AND over all processes of bool arrays of one shape."""
    if jax.process_count() == 1:
        return flags
    return np.asarray(np.all(multihost_utils.process_allgather(flags), axis=0))


def all_true(flag: bool) -> bool:
    """Whether `flag` is true in all processes."""
    return bool(elementwise_all(np.array(flag)))


def on_primary(action: Callable[[], None]) -> None:
    """Runs `action` in the primary process while the others wait.

    If it fails, its error is raised in the primary process and a ValueError in the others.
    """
    failure: Exception | None = None
    if is_primary():
        try:
            action()
        except Exception as error:  # of any kind: the others must not wait indefinitely
            failure = error
    if failure:
        all_true(False)
        raise failure
    if not all_true(True):
        raise ValueError("The primary process has failed: see its error message.")


def assert_same_everywhere(what: str, text: str) -> None:
    """Raises ValueError unless `text` is equal in all processes; `what` names it in the error message."""
    if jax.process_count() == 1:
        return
    local_digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    differing = (multihost_utils.process_allgather(local_digest) != local_digest).any(-1)
    if not all_true(not differing.any()):
        raise ValueError(f"{what} is not the same in all processes: start them with the same command on the same data.")


def barrier(what: str) -> None:
    """Blocks until all processes have reached this call."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def device_put(tree: PyTree, sharding: NamedSharding) -> PyTree:
    """Puts arrays on the devices of all processes. Every process has the same arrays and fills its own devices."""
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def put_leaf(a: ArrayLike) -> jax.Array:
        if jnp.issubdtype(jax.dtypes.result_type(a), jax.dtypes.prng_key):
            return jax.random.wrap_key_data(put_leaf(jax.random.key_data(a)))  # the default implementation, as ours
        array = np.asarray(a)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(put_leaf, tree)


def local_rows(rows: int) -> slice:
    """Returns this process's share of `rows` rows: of n processes every n-th row, starting at the process index."""
    return slice(jax.process_index(), rows, jax.process_count())


def all_gather(columns: PyTree, rows: int) -> PyTree:
    """Gathers arrays from all processes: `columns` has `local_rows(rows)`, the result all `rows` rows."""
    if jax.process_count() == 1:
        return columns
    rows_per_process = -(-rows // jax.process_count())

    def gather_column(column: np.ndarray) -> np.ndarray:
        padded = np.zeros((rows_per_process, *column.shape[1:]), column.dtype)
        padded[: len(column)] = column
        gathered = multihost_utils.process_allgather(padded)  # [process, row, ...]
        return np.asarray(gathered).swapaxes(0, 1).reshape(-1, *column.shape[1:])[:rows]

    return jax.tree.map(gather_column, columns)


def replicate(tree: PyTree, sharding: NamedSharding) -> PyTree:
    """Returns a full copy of `tree` on every device of a replicated `sharding`.

    Copies that already lie on this process's devices (as after pmap) are reused. One compiled program makes all others:
    with several programs in flight, two processes may start different ones and deadlock.
    """
    leaves, structure = jax.tree.flatten(tree)
    is_key = [jnp.issubdtype(a.dtype, jax.dtypes.prng_key) for a in leaves]
    arrays = [jax.random.key_data(a) if key else a for a, key in zip(leaves, is_key, strict=True)]
    copies = [_existing_copies(a, sharding) for a in arrays]
    missing = [a for a, copy in zip(arrays, copies, strict=True) if copy is None]
    new = iter(_jit_replicate(sharding)(missing) if missing else ())
    replicated_arrays = [next(new) if copy is None else copy for copy in copies]
    leaves = [jax.random.wrap_key_data(a) if key else a for a, key in zip(replicated_arrays, is_key, strict=True)]
    return jax.tree.unflatten(structure, leaves)


def _existing_copies(a: jax.Array, sharding: NamedSharding) -> jax.Array | None:
    """Returns `a` under `sharding` if this process's devices already hold full copies, else None."""
    if a.sharding.is_equivalent_to(sharding, a.ndim):
        return a
    if a.is_fully_replicated:
        copies = {shard.device: shard.data for shard in a.addressable_shards}
        devices = list(local(cast(Mesh, sharding.mesh)).devices.flat)
        if set(devices) <= copies.keys():
            return jax.make_array_from_single_device_arrays(a.shape, sharding, [copies[d] for d in devices])
    return None


@functools.lru_cache(maxsize=8)
def _jit_replicate(sharding: NamedSharding) -> Callable[[list[jax.Array]], list[jax.Array]]:
    """Cached, so that each list of shapes is compiled once and not in every call."""
    return jax.jit(lambda arrays: arrays, out_shardings=sharding)


def local(mesh: Mesh) -> Mesh:
    """Returns the part of a mesh on the devices of this process; all of a mesh that does not exist, see `exists`."""
    if not exists(mesh):
        return mesh
    devices = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    return mesh if len(devices) == mesh.size else Mesh(np.array(devices), mesh.axis_names)


def exists(mesh: Mesh) -> bool:
    """Whether this program can run on the mesh: not if its devices are those of a topology, for compilation only."""
    return mesh.devices.flat[0] in jax.devices()


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that keeps a full copy on every device."""
    return NamedSharding(mesh, PartitionSpec())
