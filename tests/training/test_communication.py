"""What the devices exchange in a training step, and what each process writes of a checkpoint.

A step exchanges the gradient, once, and small sums of batch statistics and metrics. The attack exchanges nothing,
nothing goes to the host, and the count does not depend on the number of devices. A sharded state is gathered once more.
"""

import collections
import math
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from lt_adv import methods
from tests.conftest import QUICK
from tests.training.helpers import make

ROOT = Path(__file__).parents[2]
COLLECTIVES = ("psum", "psum_invariant", "pmax", "pmin", "all_gather", "all_gather_invariant", "reduce_scatter")
COLLECTIVES += ("ppermute", "pbroadcast", "all_to_all")
HLO = r"= (.*?) (all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)(?:-start)?\("
HOST = r" (infeed|outfeed|send|recv)\(|custom_call_target=\"xla_(?:ffi_)?(?:python|partitioned_python)[^\"]*callback"
BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "s32": 4, "u32": 4, "s64": 8, "u64": 8, "u8": 1, "s8": 1}


def traced_collectives(jaxpr, times=1):
    """Returns {primitive: {"count", "bytes"}} of a jaxpr and all jaxprs in it; bytes are those that a device sends."""
    counts = collections.defaultdict(lambda: {"count": 0, "bytes": 0})
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name in COLLECTIVES:
            size = sum(math.prod(v.aval.shape) * v.aval.dtype.itemsize for v in equation.invars)
            counts[name]["count"] += times
            counts[name]["bytes"] += times * size
        repeats = params["length"] if name == "scan" else 1
        for value in params.values():
            for inner in value if isinstance(value, (tuple, list)) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    for key, count in traced_collectives(inner, times * repeats).items():
                        if name == "while":
                            raise ValueError(f"{key} in a while loop: the number of iterations is not known.")
                        for quantity in count:
                            counts[key][quantity] += count[quantity]
    return dict(counts)


def compiled_collectives(text):
    """Returns the same for the text of a compiled program, after XLA's optimisation; bytes are those of the results."""
    counts = collections.defaultdict(lambda: {"count": 0, "bytes": 0})
    for result, name in re.findall(HLO, text):
        sizes = re.findall(r"(\w+)\[([\d,]*)\]", result)
        counts[name]["count"] += 1
        counts[name]["bytes"] += sum(BYTES[kind] * math.prod(map(int, filter(None, s.split(",")))) for kind, s in sizes)
    return dict(counts)


def total(collectives, quantity):
    return sum(count[quantity] for count in collectives.values())


def test_traced_collectives_of_a_known_program_are_counted():
    def per_device(x):
        def body(carry, _):
            return carry + jax.lax.psum(x[:2], "data"), None

        sums, _ = jax.lax.scan(body, jnp.zeros(2), None, length=3)
        return jax.lax.pmax(x, "data").sum() + sums.sum()

    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    f = jax.jit(jax.shard_map(per_device, mesh=mesh, in_specs=P("data"), out_specs=P()))
    x = jnp.zeros(20)
    counts = traced_collectives(jax.make_jaxpr(f)(x).jaxpr)
    assert total(counts, "count") == 3 + 1
    assert total(counts, "bytes") == 3 * 2 * 4 + 5 * 4
    assert set(compiled_collectives(f.lower(x).compile().as_text())) == {"all-reduce"}


def test_collectives_in_the_text_of_a_program_are_counted():
    text = """
      %a = f32[3,16]{1,0} all-reduce(f32[3,16]{1,0} %x), channel_id=1
      %b = (f32[2]{0}, bf16[4,2]{1,0}) all-reduce(f32[2]{0} %y, bf16[4,2]{1,0} %z), channel_id=2
      ROOT %c = s32[]{} all-gather-start(s32[] %w)
      %d = f32[9]{0} add(f32[9] %all-reduce.1, f32[9] %q)
    """
    assert compiled_collectives(text) == {
        "all-reduce": {"count": 2, "bytes": 3 * 16 * 4 + 2 * 4 + 8 * 2},
        "all-gather": {"count": 1, "bytes": 4},
    }


@pytest.mark.parametrize("sharded", [(), ("opt_state", "params")])
def test_step_sums_its_gradient_once_and_transfers_nothing_to_the_host(sharded):
    step, state, pipeline, teacher = make(methods.create({"name": "at"}, num_steps=3), 2, "shard_map", sharded=sharded)
    jaxpr = jax.make_jaxpr(step)(state, pipeline.example, teacher)
    gradient = sum(a.nbytes for a in jax.tree.leaves(state.params))
    exchanged = total(traced_collectives(jaxpr.jaxpr), "bytes")
    assert gradient <= exchanged < 2 * gradient, "the attack exchanges nothing, statistics and metrics are small"
    text = step.lower(state, pipeline.example, teacher).compile().as_text()
    counts = compiled_collectives(text)
    assert ("all-gather" in counts) == bool(sharded)
    assert counts["all-reduce"]["bytes"] < 2 * gradient
    assert not re.findall(HOST, text)


def test_bytes_sent_by_a_device_depend_neither_on_devices_nor_on_attack_steps():
    counts = []
    for devices, num_steps in ((2, 1), (4, 1), (8, 1), (2, 5)):
        step, state, pipeline, teacher = make(methods.create({"name": "at"}, num_steps=num_steps), devices, "shard_map")
        counts.append(traced_collectives(jax.make_jaxpr(step)(state, pipeline.example, teacher).jaxpr))
    assert total(counts[0], "count") > 0 and all(count == counts[0] for count in counts)


def test_transfers_to_the_host_are_detected():
    f = jax.jit(lambda x: jax.pure_callback(np.asarray, jax.ShapeDtypeStruct((3,), np.float32), x))
    assert len(re.findall(HOST, f.lower(jnp.zeros(3)).compile().as_text())) == 1
    assert re.findall(HOST, " %i = ((f32[]), token[]) infeed(token[] %t)")


@pytest.mark.slow
def test_each_of_two_processes_writes_half_of_a_checkpoint(tmp_path):
    flags = ["--config=configs/at.py:dataset=digits", "--config.parallel=shard_map", "--config.sharded=('params',)"]
    flags += ["--config.model.name=wide_resnet", "--config.model.depth=10", "--config.model.width=1"]
    common = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_"))}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    common |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "JAX_COORDINATOR_ADDRESS": address}
    common |= {"XLA_FLAGS": QUICK}
    command = [sys.executable, "-m", "tests.training.save_state", str(tmp_path), *flags]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    processes = [
        subprocess.Popen(command, env=common | {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(number)}, **pipes)
        for number in (0, 1)
    ]
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    state = tmp_path / "checkpoints" / "1" / "state"
    folders = [state / f"ocdbt.process_{number}" for number in (0, 1)]
    first, second = (sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) for folder in folders)
    # Parameters and momentum are 620 kB in float32, of which orbax's compression saves a little even for noise.
    assert 550_000 < first + second < 650_000 and 0.4 < first / (first + second) < 0.6
