"""How many bytes of a checkpoint each host writes: one is saved by real processes, and its files are weighed."""

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.benchmark import record
from lt_adv.cli import flags


def weigh(config: list[str], processes: int) -> dict[str, Any]:
    """{"bytes": [of each process]} of the state before the first step; or {"error": what a process said}."""
    common = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_"))}
    common |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        free.close()
        running = []
        for number in range(processes):
            own = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
            own = common | (own | {"JAX_PROCESS_ID": str(number)} if processes > 1 else {})
            command = [sys.executable, "-m", "experiments.communication.checkpoints", folder, *config]
            pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
            running.append(subprocess.Popen(command, env=own, **pipes))
        said = [process.communicate()[1] for process in running]
        for process, words in zip(running, said, strict=True):
            if process.returncode:
                return {"error": record.failure(process.returncode, words)}
        state = Path(folder) / "checkpoints" / "1" / "state"
        return {"bytes": [size(state / f"ocdbt.process_{number}") for number in range(processes)]}


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def table(found: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """A row per state and number of hosts."""
    head = ["State", "Hosts", "Bytes written by each", "In all"]
    rows = []
    for name, row in found.items():
        if "error" not in row:
            rows.append([*name.split(), ", ".join(f"{n:,}" for n in row["bytes"]), f"{sum(row['bytes']):,}"])
    return head, rows


def save(folder: str, config: Any) -> None:
    """A state of the config, as a run saves it: of random numbers, as the zeros of a first state would take no room."""
    import jax
    import jax.numpy as jnp

    from lt_adv import data
    from lt_adv.cli import run
    from lt_adv.training import checkpoint, sharding, stage_builder

    run.prepare(config)
    mesh = sharding.make_mesh()
    built = stage_builder.build(0, stage_builder.stages(config)[0], config, data.load(config.data), mesh)
    checkpoints = checkpoint.Checkpoints(Path(folder) / "checkpoints")

    def draw(a: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.key(0), a.shape, a.dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a

    state = built.first_state()
    filled = jax.jit(lambda tree: jax.tree.map(draw, tree), out_shardings=jax.tree.map(lambda a: a.sharding, state))
    checkpoints.save(1, sharding.to_global(filled(state), mesh, config.parallel), {})
    checkpoints.close()


if __name__ == "__main__":
    from lt_adv.cli import flags

    save(sys.argv[1], flags.parse(["checkpoints", *sys.argv[2:]]).config)
