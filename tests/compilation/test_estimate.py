"""Estimates from compiled programs: the stored ones, and programs of this machine."""

import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from lt_adv import compilation
from lt_adv.compilation import hlo, topologies

GOLDEN = Path(__file__).parents[1] / "golden"
STATS = types.SimpleNamespace(
    argument_size_in_bytes=100, output_size_in_bytes=30, alias_size_in_bytes=20, temp_size_in_bytes=7,
    generated_code_size_in_bytes=5,
)  # fmt: skip


class Stored:
    """A compiled program of which only the text is there."""

    def __init__(self, name):
        self.as_text = (GOLDEN / name).read_text
        self.memory_analysis = lambda: STATS


def accelerator(kind):
    return next(a for a in topologies.ACCELERATORS if a.kind == kind)


def test_tpu():
    """The time is that of all cycles, the loop's three times; the clock is that of the chip."""
    estimate = compilation.estimate(Stored("compiled_tpu.txt"), accelerator("v5e"))
    executed = list(hlo.parse((GOLDEN / "compiled_tpu.txt").read_text()).executed())
    cycles = sum(times * i.cycles for i, times in executed if i.cycles and i.opcode not in ("while", *hlo.FREE))
    assert estimate.milliseconds == pytest.approx(1e3 * cycles / 1.5e9)
    faster = compilation.estimate(Stored("compiled_tpu.txt"), accelerator("v5p"))
    assert faster.milliseconds == pytest.approx(estimate.milliseconds * 1.5 / 1.75)
    assert estimate.matmul_milliseconds is None and estimate.without_estimate
    assert estimate.memory == {"arguments": 100, "results": 10, "temporaries": 7, "code": 5}
    assert [entry["ms"] for entry in estimate.top] == sorted((e["ms"] for e in estimate.top), reverse=True)


def test_gpu():
    """A roofline: neither faster than the FLOPs nor than the bytes, and halved at twice the rates."""
    card = accelerator("h200")
    estimate = compilation.estimate(Stored("compiled_gpu.txt"), card)
    flops = 7 * (2 * 16 * 16 * 16 * 9 * (3 * 64 + 64 * 64))
    assert estimate.milliseconds > estimate.matmul_milliseconds >= 1e3 * flops / card.flops
    twice = topologies.Accelerator("cuda", "x", card.memory, 2 * card.bandwidth, 2 * card.flops)
    halved = compilation.estimate(Stored("compiled_gpu.txt"), twice)
    assert halved.milliseconds == pytest.approx(estimate.milliseconds / 2)
    assert estimate.collectives == {"all-reduce": {"count": 1, "bytes": 4}} and estimate.host_transfers == 0


def test_collectives_and_callbacks_of_a_real_program():
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))

    def program(x):
        jax.debug.callback(lambda _: None, x[0])
        return jax.lax.psum(x, "data")

    mapped = jax.jit(jax.shard_map(program, mesh=mesh, in_specs=P("data"), out_specs=P()))
    estimate = compilation.estimate(mapped.lower(jnp.ones((16,))).compile(), accelerator("cpu"))
    assert estimate.collectives == {"all-reduce": {"count": 1, "bytes": 32}}
    assert estimate.host_transfers == 1 and estimate.milliseconds is None
