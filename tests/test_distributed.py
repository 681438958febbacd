"""Runs of two real processes, each with two virtual devices: as one process with one device, killed, and resumed.

In float64, where rounding does not grow over the steps, so that the number of devices can be seen to change nothing.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from lt_adv.cli import workdirs
from lt_adv.runtime import distributed
from lt_adv.training import checkpoint
from tests.test_end_to_end import DRIVER, final

ROOT = Path(__file__).parent.parent
SHORT = [
    "--config=configs/robal.py:dataset=digits,epochs=2",
    "--config.model.name=wide_resnet", "--config.model.depth=10", "--config.model.width=1",
    "--config.model.dtype=float64", "--config.eval.dtype=float64",
    "--config.attack.num_steps=1", "--config.average.name=ema",
    "--config.log.every_steps=3", "--config.checkpoint.every_epochs=1", "--config.eval.attacks.pgd20.num_steps=2",
    "--config.eval.attacks.autoattack.eps=0.35", "--config.eval.subset_per_class=2", "--config.eval.batch_size=8",
]  # fmt: skip
SHARDED = ["--config.parallel=shard_map", "--config.sharded=('opt_state','average','params')"]
STREAMED = "--config.data.resident_gib=0"
SILENCE = 10


def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """`launch(workdir, *arguments, count=2, devices=2, only=..., interrupt=None, program=None)`: what each process
    said, in order."""
    cache = tmp_path_factory.mktemp("compiled")
    common = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_"))}
    common |= {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(cache), "JAX_ENABLE_X64": "1"}
    common |= {"XLA_FLAGS": "--xla_backend_optimization_level=1", "LT_ADV_SILENCE": str(SILENCE)}

    def start(workdir, *arguments, count=2, devices=2, only=("pgd20",), interrupt=None, program=None):
        door = ["-m", "lt_adv.main"] if interrupt is None else ["-c", DRIVER.format(arguments=interrupt)]
        door = door if program is None else ["-c", program]
        command = [sys.executable, *door, *SHORT, f"--config.eval.only={only}", f"--workdir={workdir}", *arguments]
        common["JAX_NUM_CPU_DEVICES"] = str(devices)
        names = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port()}", "JAX_NUM_PROCESSES": str(count)} if count > 1 else {}
        running = []
        for number in range(count):
            own = common | names | ({"JAX_PROCESS_ID": str(number)} if count > 1 else {})
            options = {"cwd": ROOT, "env": own, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            running.append(subprocess.Popen(command, **options))
        try:
            said = [process.communicate(timeout=400) for process in running]
        finally:
            for process in running:
                process.kill()
        return [
            subprocess.CompletedProcess(command, process.returncode, *words)
            for process, words in zip(running, said, strict=True)
        ]

    return start


def succeeded(results):
    assert all(result.returncode == 0 for result in results), [result.stderr[-3000:] for result in results]
    return results


@pytest.fixture(scope="module")
def one(launch, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("one")
    succeeded(launch(workdir, count=1, devices=1))
    return workdir


@pytest.fixture(scope="module")
def two(launch, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("two")
    first, second = succeeded(launch(workdir))
    assert "4 x cpu" in first.stdout and "Report:" in first.stdout
    assert not [line for line in second.stdout.splitlines() if not line.startswith("[Gloo]")], "one process speaks"
    return workdir


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def metrics(workdir):
    return json.loads((workdir / "report.json").read_text())["metrics"]


def assert_close(workdir, other, tolerance):
    """The whole last state, the logs and the report."""
    (step, actual), (same, expected) = final(workdir), final(other)
    assert step == same == 14 and actual.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(actual[name], array, rtol=tolerance, atol=tolerance, err_msg=name)
    assert len(rows(workdir)) == len(rows(other)) == 6
    for mine, theirs in zip(rows(workdir), rows(other), strict=True):
        assert mine.pop("stage") == theirs.pop("stage")
        assert mine == pytest.approx(theirs, rel=tolerance, abs=tolerance)
    assert metrics(workdir) == metrics(other)


COPIES = """
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from lt_adv.runtime import distributed
from lt_adv.training import sharding

distributed.join()
mesh = sharding.make_mesh()
shards = NamedSharding(mesh, PartitionSpec("data"))
tree = [distributed.put(np.arange(200.0 * (i + 1)), shards) for i in range(60)]
for _ in range(20):
    for i, whole in enumerate(distributed.everywhere(tree, distributed.replicated(mesh))):
        np.testing.assert_array_equal(whole, np.arange(200.0 * (i + 1)))
"""


def test_whole_copies_of_many_shards(launch, tmp_path):
    """One program for each of them, many in flight, had two processes wait for each other for ever."""
    succeeded(launch(tmp_path, program=COPIES))


def test_two_processes_are_as_one_device(one, two):
    assert_close(two, one, 1e-9)


def test_one_is_killed_and_both_go_on_bit_for_bit(launch, two, tmp_path):
    """Before step 10: step 7 was saved. The other one does not wait for ever. Then each reads its part of the batches:
    the bits are those of a set that lives on the devices."""
    survivor, killed = launch(tmp_path, interrupt=("step", 10, 9))
    assert killed.returncode == -9
    assert survivor.returncode in (2, -6)
    words = "Error: Another process of this run has ended" if survivor.returncode == 2 else "another task died"  # JAX's
    assert words in survivor.stderr
    first, _ = succeeded(launch(tmp_path, STREAMED))
    assert "Resumed 0_train at step 7 of 14" in first.stdout
    (_, actual), (_, expected) = final(tmp_path), final(two)
    assert not [name for name in expected if expected[name].tobytes() != actual[name].tobytes()]
    assert rows(tmp_path) == rows(two) and metrics(tmp_path) == metrics(two)


def test_shards_survive_a_sigterm_and_a_flipped_byte(launch, one, tmp_path):
    """SIGTERM to one of the processes: both save and end with 0. Then the newest checkpoint is damaged: both fall back
    to the one before. In shards all the way, and what one process reads of them is whole."""
    results = succeeded(launch(tmp_path, *SHARDED, interrupt=("step", 9, 15)))
    assert "SIGTERM: saved at step" in results[0].stdout and not (tmp_path / "report.json").exists()
    newest = max((tmp_path / "checkpoints" / "0_train").glob("[0-9]*"), key=lambda d: int(d.name))
    assert 9 <= int(newest.name) < 14
    arrays = max((f for f in newest.rglob("d/*") if f.is_file()), key=lambda f: f.stat().st_size)
    content = bytearray(arrays.read_bytes())
    content[len(content) // 2] ^= 1
    arrays.write_bytes(content)
    first, second = succeeded(launch(tmp_path, *SHARDED, STREAMED))
    assert "Resumed 0_train at step 7 of 14" in first.stdout
    assert (tmp_path / "damaged" / f"0_train-{newest.name}").exists()
    assert_close(tmp_path, one, 1e-9)
    with jax.enable_x64(True):
        whole, _ = checkpoint.read_variables(tmp_path)
        expected, _ = checkpoint.read_variables(one)
    for mine, theirs in zip(jax.tree.leaves(whole), jax.tree.leaves(expected), strict=True):
        assert isinstance(mine, np.ndarray)
        np.testing.assert_allclose(mine, theirs, rtol=1e-9, atol=1e-9)


def test_an_evaluation_of_two_processes(launch, two, tmp_path):
    """It resumes where a batch of the records is lost, shares AutoAttack, and says what one process says of the same
    network."""
    again = tmp_path / "again"
    shutil.copytree(two, again)
    (lost,) = again.glob("eval/records/*/batch-00001.npz")
    lost.unlink()
    (again / "report.json").unlink()
    succeeded(launch(again, "--mode=eval"))
    assert metrics(again) == metrics(two) and lost.exists()
    both = ("pgd20", "autoattack")
    succeeded(launch(again, "--mode=eval", only=both))
    shared = metrics(again)
    assert shared["eval/autoattack/accuracy"] < shared["eval/pgd20/accuracy"]
    succeeded(launch(again, "--mode=eval", count=1, devices=1, only=both))
    assert metrics(again) == shared


def test_what_differs_is_said_in_one_line(launch, tmp_path):
    """Processes of different commands, and what several processes cannot do."""
    results = launch(tmp_path / "pmap", *SHARDED[1:])
    for result in results:
        assert result.returncode == 2
        (line,) = (line for line in result.stderr.splitlines() if line.startswith("Error:"))
        assert "config.sharded: pmap replicates the state" in line


def test_a_working_directory_that_is_taken_is_refused_by_both(launch, tmp_path):
    with workdirs.locked(tmp_path):
        first, second = launch(tmp_path)
    assert first.returncode == second.returncode == 2, "neither waits for the other"
    assert "Error: Another process uses" in first.stderr
    assert "Error: The first process has failed: it says why." in second.stderr
    assert [path.name for path in tmp_path.iterdir()] == [workdirs.LOCK]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "has JAX_NUM_PROCESSES and no .*JAX_PROCESS_ID"),
        ({"JAX_PROCESS_ID": "0", "JAX_COORDINATOR_ADDRESS": "h:1"}, "and no JAX_NUM_PROCESSES"),
        ({"JAX_PROCESS_ID": "2", "JAX_NUM_PROCESSES": "2", "JAX_COORDINATOR_ADDRESS": "h:1"}, "is none of the 2"),
        ({"JAX_PROCESS_ID": "x", "JAX_NUM_PROCESSES": "2", "JAX_COORDINATOR_ADDRESS": "h:1"}, "not 'x'"),
        ({"JAX_PROCESS_ID": "0", "JAX_NUM_PROCESSES": "0", "JAX_COORDINATOR_ADDRESS": "h:1"}, "1 or more"),
        ({"LT_ADV_SILENCE": "soon"}, "LT_ADV_SILENCE must be a whole number"),
    ],
)
def test_an_environment_that_cannot_be_meant(environment, message):
    with pytest.raises(ValueError, match=message):
        distributed.join(environment)


def test_who_is_asked_to_join(monkeypatch):
    asked = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: asked.append(options))
    distributed.join({})
    distributed.join({"SLURM_NTASKS": "1"})
    assert not asked, "one process alone"
    for launcher in ({"SLURM_NTASKS": "4"}, {"OMPI_COMM_WORLD_SIZE": "2"}, {"TPU_WORKER_HOSTNAMES": "a,b"}):
        distributed.join(launcher)
        assert asked.pop() == {"heartbeat_timeout_seconds": 100}, "JAX asks the launcher"
    given = {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1", "LT_ADV_SILENCE": "7"}
    distributed.join(given)
    assert asked == [
        {"coordinator_address": "h:1", "num_processes": 2, "process_id": 1, "heartbeat_timeout_seconds": 7}
    ]
    assert (
        distributed.count(given) == 2 and distributed.count({"SLURM_NTASKS": "4"}) == 4 and distributed.count({}) == 1
    )
