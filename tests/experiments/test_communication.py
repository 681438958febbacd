"""What the devices exchange: counted where it is known, and the arithmetic on it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from experiments import tables
from experiments.communication import __main__ as door
from experiments.communication import checkpoints, counts, paper
from lt_adv import methods
from tests.training.helpers import make

MESH = Mesh(np.array(jax.devices()[:4]), ("data",))


def test_collectives_of_a_known_program():
    def replica(x):
        def turn(carry, _):
            return carry + jax.lax.psum(x[:2], "data"), None

        total, _ = jax.lax.scan(turn, jnp.zeros(2), None, length=3)
        return jax.lax.pmax(x, "data").sum() + total.sum()

    f = jax.jit(jax.shard_map(replica, mesh=MESH, in_specs=P("data"), out_specs=P()))
    x = jnp.zeros(20)
    found = counts.traced(jax.make_jaxpr(f)(x).jaxpr)
    assert sum(one["count"] for one in found.values()) == 3 + 1
    assert sum(one["bytes"] for one in found.values()) == 3 * 2 * 4 + 5 * 4
    text = f.lower(x).compile().as_text()
    assert set(counts.compiled(text)) == {"all-reduce"}


def test_text_of_a_compiled_program():
    text = """
      %a = f32[3,16]{1,0} all-reduce(f32[3,16]{1,0} %x), channel_id=1
      %b = (f32[2]{0}, bf16[4,2]{1,0}) all-reduce(f32[2]{0} %y, bf16[4,2]{1,0} %z), channel_id=2
      ROOT %c = s32[]{} all-gather-start(s32[] %w)
      %d = f32[9]{0} add(f32[9] %all-reduce.1, f32[9] %q)
    """
    assert counts.compiled(text) == {
        "all-reduce": {"count": 2, "bytes": 3 * 16 * 4 + 2 * 4 + 8 * 2}, "all-gather": {"count": 1, "bytes": 4},
    }  # fmt: skip


@pytest.mark.parametrize("sharded", [(), ("opt_state", "params")])
def test_a_step_sums_its_gradient_once_and_nothing_meets_the_host(sharded):
    step, state, feed, teacher = make(methods.create({"name": "at"}, num_steps=3), 2, "shard_map", sharded=sharded)
    jaxpr = jax.make_jaxpr(step)(state, feed.example, teacher)
    gradient = sum(a.nbytes for a in jax.tree.leaves(state.params))
    exchanged = counts.total(counts.traced(jaxpr.jaxpr), "bytes")
    assert gradient <= exchanged < 2 * gradient, "the attack exchanges nothing, statistics and metrics are small"
    text = step.lower(state, feed.example, teacher).compile().as_text()
    found = counts.compiled(text)
    assert ("all-gather" in found) == bool(sharded)
    assert found["all-reduce"]["bytes"] < 2 * gradient
    assert not re.findall(counts.HOST, text)


def test_what_meets_the_host_is_seen():
    f = jax.jit(lambda x: jax.pure_callback(np.asarray, jax.ShapeDtypeStruct((3,), np.float32), x))
    assert len(re.findall(counts.HOST, f.lower(jnp.zeros(3)).compile().as_text())) == 1
    assert re.findall(counts.HOST, " %i = ((f32[]), token[]) infeed(token[] %t)")


def test_paper():
    network = {
        "parameters": 10**7, "step_flops": 1e10, "forward_flops": 5e8, "traced": {"psum": {"count": 100, "bytes": 1}},
    }  # fmt: skip
    machine = paper.Machine("m", 4, 1e14, 1e11, 1e-5)
    found = paper.expected(network, machine, per_device=10)
    assert found.compute == pytest.approx(10 * 1e10 / (0.4 * 1e14))
    assert found.gradient == pytest.approx(2 * 3 / 4 * 4e7 / 1e11) and found.small == pytest.approx(1e-3)
    assert found.efficiency == pytest.approx(found.compute / (found.compute + found.gradient + found.small))
    assert found.hidden > found.efficiency
    assert found.batch * 2 * 5e8 / (0.4 * 1e14) == pytest.approx(found.gradient), "a backward pass takes as long"
    alone = paper.expected(network, machine._replace(devices=1), per_device=10)
    assert alone.gradient == 0 and alone.hidden == alone.efficiency


def test_the_program_and_its_table(tmp_path, monkeypatch, capsys):
    def launch(config, *, devices, compile):
        if devices == 2:
            return {"error": "no such machine"}
        found = {"devices": devices, "parameters": 5, "state_bytes_per_device": 40}
        found |= {"step_flops": 2.0, "forward_flops": 1, "traced": {"psum": {"count": 3, "bytes": 24}}}
        if compile:
            found |= {"compiled": {"all-reduce": {"count": 2, "bytes": 24}}, "host_transfers": 0}
            found |= {"compile_seconds": 1.5}
        return found

    monkeypatch.setattr(door, "launch", launch)
    monkeypatch.setattr(checkpoints, "weigh", lambda config, hosts: {"bytes": [2000 // hosts] * hosts})
    given = ["--config=configs/at.py:dataset=digits", "--devices=1,2,4", f"--out={tmp_path / 'communication'}"]
    monkeypatch.chdir(tables.ROOT)
    assert door.main(given) == 1, "something failed"
    shown = tables.communication(tmp_path)
    assert "| whole | 1 | 2 | 0 | 24 | 0 | 40 | 0 | 1.5 |" in shown and "| WRN-34-10 | 256 TPU v5e" in shown
    assert "| sharded | 2 | 1,000, 1,000 | 2,000 |" in shown
    assert "not measured yet" in tables.communication(tmp_path / "nothing")
    assert door.main(["--config=configs/at.py:dataset=digits", "--devices=0"]) == 2
    assert "Error:" in capsys.readouterr().err


def test_each_of_two_processes_writes_half_of_a_checkpoint():
    config = ["--config=configs/at.py:dataset=digits", "--config.parallel=shard_map", "--config.sharded=('params',)"]
    tiny = ["--config.model.name=wide_resnet", "--config.model.depth=10", "--config.model.width=1"]
    found = checkpoints.weigh([*config, *tiny], 2)
    first, second = found["bytes"]
    # Parameters and momentum are 620 kB in float32, of which orbax's compression takes a little even where it is noise.
    assert 550_000 < first + second < 650_000 and 0.4 < first / (first + second) < 0.6
    head, rows = checkpoints.table({"whole 2": found, "sharded 2": {"error": "no"}})
    assert rows == [["whole", "2", f"{first:,}, {second:,}", f"{first + second:,}"]] and len(head) == 4
