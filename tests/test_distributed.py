"""Runs of two real processes with two virtual devices each, compared with one process and one device.

In float64, so that rounding errors stay far below the tolerance over all steps.
"""

import json
import os
import re
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
from lt_adv.training import checkpoint, sharding
from tests.test_end_to_end import SIGNAL_PROGRAM, last_checkpoint
from tests.training import test_epoch_update, test_extra

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
SHORT = [
    "--config=configs/robal.py:dataset=digits,epochs=2",
    "--config.model.name=wide_resnet", "--config.model.depth=10", "--config.model.width=1",
    "--config.model.dtype=float64", "--config.eval.dtype=float64",
    "--config.attack.num_steps=1", "--config.average.name=ema",
    "--config.log.every_steps=3", "--config.log.clean_per_class=2", "--config.checkpoint.every_epochs=1",
    "--config.eval.attacks.pgd20.num_steps=2",
    "--config.eval.attacks.autoattack.eps=0.35", "--config.eval.subset_per_class=2", "--config.eval.batch_size=8",
]  # fmt: skip
SHARDED = ["--config.parallel=shard_map", "--config.sharded=('opt_state','average','params')"]
STREAMED = "--config.data.max_device_gib=0"
HEARTBEAT_TIMEOUT = 10


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """`launch(workdir, *arguments, count=2, devices=2, only=..., interrupt=None, program=None)` returns the completed
    processes in order."""
    cache = tmp_path_factory.mktemp("compiled")
    common = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_"))}
    common |= {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(cache), "JAX_ENABLE_X64": "1"}
    common |= {"XLA_FLAGS": "--xla_backend_optimization_level=1", distributed.HEARTBEAT_TIMEOUT: str(HEARTBEAT_TIMEOUT)}

    def start(workdir, *arguments, count=2, devices=2, only=("pgd20",), interrupt=None, program=None):
        entry = ["-m", "lt_adv.main"] if interrupt is None else ["-c", SIGNAL_PROGRAM.format(arguments=interrupt)]
        entry = entry if program is None else ["-c", program]
        command = [sys.executable, *entry, *SHORT, f"--config.eval.only={only}", f"--workdir={workdir}", *arguments]
        common["JAX_NUM_CPU_DEVICES"] = str(devices)
        coordinator = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": str(count)}
        processes = []
        for number in range(count):
            environment = common | (coordinator | {"JAX_PROCESS_ID": str(number)} if count > 1 else {})
            options = {"cwd": ROOT, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            processes.append(subprocess.Popen(command, env=environment, **options))
        try:
            outputs = [process.communicate(timeout=400) for process in processes]
        finally:
            for process in processes:
                process.kill()
        return [
            subprocess.CompletedProcess(command, process.returncode, *output)
            for process, output in zip(processes, outputs, strict=True)
        ]

    return start


def succeeded(results):
    assert all(result.returncode == 0 for result in results), [result.stderr[-3000:] for result in results]
    return results


@pytest.fixture(scope="module")
def single_device_run(launch, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("one")
    succeeded(launch(workdir, count=1, devices=1))
    return workdir


@pytest.fixture(scope="module")
def two_process_run(launch, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("two")
    first, second = succeeded(launch(workdir))
    assert "4 x cpu" in first.stdout and "Report:" in first.stdout
    # Threads of Gloo print at the same time, so their lines may be mixed.
    printed = [line for line in second.stdout.splitlines() if line and "Gloo" not in line and "peer ranks" not in line]
    assert not printed, "only the primary prints"
    return workdir


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def metrics(workdir):
    return json.loads((workdir / "report.json").read_text())["metrics"]


def assert_close(workdir, other, tolerance):
    """Compares the last state, the logs and the report."""
    (step, actual), (other_step, expected) = last_checkpoint(workdir), last_checkpoint(other)
    assert step == other_step == 14 and actual.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(actual[name], array, rtol=tolerance, atol=tolerance, err_msg=name)
    assert len(rows(workdir)) == len(rows(other)) == 6
    for row, expected_row in zip(rows(workdir), rows(other), strict=True):
        assert row.pop("stage") == expected_row.pop("stage")
        assert row == pytest.approx(expected_row, rel=tolerance, abs=tolerance)
    assert metrics(workdir) == metrics(other)


COPIES = """
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from lt_adv.runtime import distributed
from lt_adv.training import sharding

distributed.initialize()
mesh = sharding.make_mesh()
shards = NamedSharding(mesh, PartitionSpec("data"))
tree = [distributed.device_put(np.arange(200.0 * (i + 1)), shards) for i in range(60)]
for _ in range(20):
    for i, copy in enumerate(distributed.replicate(tree, distributed.replicated(mesh))):
        np.testing.assert_array_equal(copy, np.arange(200.0 * (i + 1)))
"""


def test_many_shards_are_replicated_without_deadlock(launch, tmp_path):
    """With one program per array, two processes could start different ones and wait for each other for ever."""
    succeeded(launch(tmp_path, program=COPIES))


PARTS = """
import jax
import numpy as np
from lt_adv.runtime import distributed
from lt_adv.training import sharding
from tests.training import test_epoch_update, test_extra

distributed.initialize()
for parallel in ("pmap", "shard_map"):
    for name, array in test_epoch_update.updated(sharding.make_mesh(), parallel).items():
        print(parallel, "feedback", name, np.asarray(array).tolist(), sep="=")
    for step, columns in enumerate(test_extra.local_batches(sharding.make_mesh(), parallel)):
        for name, array in columns.items():
            print(parallel, step, name, array.tolist(), sep="=")
"""


@pytest.fixture(scope="module")
def printed_by_two_processes(launch, tmp_path_factory):
    """Returns {"pmap=0=label": values} of each process."""
    results = succeeded(launch(tmp_path_factory.mktemp("parts"), program=PARTS))
    lines = [re.findall(r"^(\w+=\w+=\w+)=(.*)$", result.stdout, re.MULTILINE) for result in results]
    return [{name: json.loads(values) for name, values in of_process} for of_process in lines]


def test_feedback_of_two_processes_equals_that_of_one(printed_by_two_processes):
    with jax.enable_x64(True):
        expected = test_epoch_update.updated(sharding.make_mesh(jax.devices()[:1]), "pmap")
    for printed in printed_by_two_processes:
        for parallel in ("pmap", "shard_map"):
            for name, array in expected.items():
                actual = printed[f"{parallel}=feedback={name}"]
                np.testing.assert_allclose(actual, array, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("parallel", ["pmap", "shard_map"])
def test_two_processes_stream_halves_of_the_batches_with_extra_images(printed_by_two_processes, parallel):
    with jax.enable_x64(True):
        batches = test_extra.local_batches(sharding.make_mesh(jax.devices()[:1]), parallel)
    assert len(batches) == 4 and all((batch["index"] < 0).sum() == 6 for batch in batches)
    for step, batch in enumerate(batches):
        for name, column in batch.items():
            halves = [printed[f"{parallel}={step}={name}"] for printed in printed_by_two_processes]
            assert sum(halves, []) == column.tolist() and len(halves[0]) == len(halves[1])


def test_two_processes_match_one_device(single_device_run, two_process_run):
    assert_close(two_process_run, single_device_run, 1e-9)


def test_kill_of_one_process_and_resume_are_bit_exact(launch, two_process_run, tmp_path):
    """One process is killed before step 10, after the checkpoint of step 7, and the other one ends as well.

    The resumed run reads its batches from host memory, which gives the same bits as a set on the devices.
    """
    survivor, killed = launch(tmp_path, interrupt=("step", 10, 9))
    assert killed.returncode == -9
    assert survivor.returncode in (2, -6)
    message = "Error: Another process of this run has ended" if survivor.returncode == 2 else "another task died"  # JAX
    assert message in survivor.stderr
    first, _ = succeeded(launch(tmp_path, STREAMED))
    assert "Resumed 0_train at step 7 of 14" in first.stdout
    (_, actual), (_, expected) = last_checkpoint(tmp_path), last_checkpoint(two_process_run)
    assert not [name for name in expected if expected[name].tobytes() != actual[name].tobytes()]
    assert rows(tmp_path) == rows(two_process_run) and metrics(tmp_path) == metrics(two_process_run)


def test_sharded_run_survives_sigterm_and_a_damaged_checkpoint(launch, single_device_run, tmp_path):
    """After SIGTERM to one process both save and exit with 0. When the newest checkpoint is damaged, both resume from
    the one before. A single process reads full arrays from the sharded checkpoint."""
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
    assert_close(tmp_path, single_device_run, 1e-9)
    with jax.enable_x64(True):
        variables, _ = checkpoint.read_variables(tmp_path)
        expected, _ = checkpoint.read_variables(single_device_run)
    for array, expected_array in zip(jax.tree.leaves(variables), jax.tree.leaves(expected), strict=True):
        assert isinstance(array, np.ndarray)
        np.testing.assert_allclose(array, expected_array, rtol=1e-9, atol=1e-9)


def test_evaluation_with_two_processes_matches_one(launch, two_process_run, tmp_path):
    """The evaluation resumes where a batch of records is missing, and splits AutoAttack over the processes."""
    copy = tmp_path / "copy"
    shutil.copytree(two_process_run, copy)
    (batch,) = copy.glob("eval/records/*/batch-00001.npz")
    batch.unlink()
    (copy / "report.json").unlink()
    succeeded(launch(copy, "--mode=eval"))
    assert metrics(copy) == metrics(two_process_run) and batch.exists()
    attacks = ("pgd20", "autoattack")
    succeeded(launch(copy, "--mode=eval", only=attacks))
    two_process_metrics = metrics(copy)
    assert two_process_metrics["eval/autoattack/accuracy"] < two_process_metrics["eval/pgd20/accuracy"]
    succeeded(launch(copy, "--mode=eval", count=1, devices=1, only=attacks))
    assert metrics(copy) == two_process_metrics


def test_invalid_config_is_refused_by_all_processes(launch, tmp_path):
    results = launch(tmp_path / "pmap", *SHARDED[1:])
    for result in results:
        assert result.returncode == 2
        (line,) = (line for line in result.stderr.splitlines() if line.startswith("Error:"))
        assert "config.sharded: pmap replicates the state" in line


def test_locked_working_directory_is_refused_by_both_processes(launch, tmp_path):
    with workdirs.locked(tmp_path):
        first, second = launch(tmp_path)
    assert first.returncode == second.returncode == 2
    assert "Error: Another process uses" in first.stderr
    assert "Error: The primary process has failed: see its error message." in second.stderr
    assert [path.name for path in tmp_path.iterdir()] == [workdirs.LOCK]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "sets JAX_NUM_PROCESSES but not .*JAX_PROCESS_ID"),
        ({"JAX_PROCESS_ID": "0", "JAX_COORDINATOR_ADDRESS": "h:1"}, "but not JAX_NUM_PROCESSES: set all three"),
        (
            {"JAX_PROCESS_ID": "2", "JAX_NUM_PROCESSES": "2", "JAX_COORDINATOR_ADDRESS": "h:1"},
            "is out of range for 2 processes",
        ),
        ({"JAX_PROCESS_ID": "x", "JAX_NUM_PROCESSES": "2", "JAX_COORDINATOR_ADDRESS": "h:1"}, "not 'x'"),
        ({"JAX_PROCESS_ID": "0", "JAX_NUM_PROCESSES": "0", "JAX_COORDINATOR_ADDRESS": "h:1"}, "at least 1"),
        ({"LT_ADV_HEARTBEAT_TIMEOUT": "soon"}, "LT_ADV_HEARTBEAT_TIMEOUT must be an integer"),
    ],
)
def test_invalid_environment_is_refused(environment, message):
    with pytest.raises(ValueError, match=message):
        distributed.initialize(environment)


def test_processes_initialize_with_launchers_and_variables(monkeypatch):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: calls.append(options))
    distributed.initialize({})
    distributed.initialize({"SLURM_NTASKS": "1"})
    assert not calls, "a single process does not initialize"
    for launcher in ({"SLURM_NTASKS": "4"}, {"OMPI_COMM_WORLD_SIZE": "2"}, {"TPU_WORKER_HOSTNAMES": "a,b"}):
        distributed.initialize(launcher)
        assert calls.pop() == {"heartbeat_timeout_seconds": 100}, "JAX detects the rest"
    environment = {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    environment |= {"LT_ADV_HEARTBEAT_TIMEOUT": "7"}
    distributed.initialize(environment)
    assert calls == [
        {"coordinator_address": "h:1", "num_processes": 2, "process_id": 1, "heartbeat_timeout_seconds": 7}
    ]
    assert distributed.process_count(environment) == 2
    assert distributed.process_count({"SLURM_NTASKS": "4"}) == 4
    assert distributed.process_count({}) == 1
