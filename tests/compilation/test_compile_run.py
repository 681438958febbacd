"""`--mode=compile`: the programs are those of training and evaluation, and what it prints and refuses."""

import dataclasses
import importlib
import json

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from etils import epath

from configs import at, robal, self_distillation
from lt_adv import data, main
from lt_adv.attacks import convolutions
from lt_adv.cli import compile_run
from lt_adv.cli.experiment import Experiment
from lt_adv.cli.flags import CompileOptions
from lt_adv.compilation import topologies
from lt_adv.training import sharding, stage_builder
from tests.test_configs import NAMES

SMALL = ["--config.model.depth=10", "--config.model.width=1"]
KEYS = {"topology", "devices", "batch_size", "programs", "hours", "cost", "seconds_per_epoch", "source", "versions"}
PROGRAM_KEYS = {
    "compile_seconds",
    "memory",
    "flops",
    "estimated_ms",
    "images_per_second",
    "share_of_peak",
    "collectives",
}
PROGRAM_KEYS |= {"collectives", "top", "host_transfers", "kernels"}


def small(config, **changes):
    config.model.depth, config.model.width, config.optim.batch_size = 10, 1, 16
    config.update(changes)
    return config


def compile_main(tmp_path, *args):
    """Returns (exit code, compile.json)."""
    code = main.main(["main", "--mode=compile", f"--workdir={tmp_path / 'run'}", *args])
    path = tmp_path / "run" / "compile.json"
    return code, json.loads(path.read_text()) if path.exists() else None


@pytest.mark.parametrize(
    ("parallel", "sharded", "streamed"),
    [("pmap", (), False), ("shard_map", (), False), ("shard_map", ("opt_state", "params"), False), ("pmap", (), True),
     ("shard_map", (), True)],
)  # fmt: skip
def test_the_step_is_that_of_training(parallel, sharded, streamed):
    """The program that is lowered from shapes equals the one that training lowers from its state and data."""
    config = small(robal.get_config("dataset=digits"), parallel=parallel, sharded=sharded)
    config.data.max_device_gib = 0 if streamed else 8
    mesh = sharding.make_mesh(jax.devices()[:4])
    (resolved,) = Experiment.from_config(config, mesh=mesh).resolved_stages
    step, arguments = stage_builder.abstract_step(resolved, mesh)
    expected = sharding.lower(step, arguments, "cpu")[0].as_text()
    stage = stage_builder.build(resolved, mesh)
    with stage.pipeline.batches(0, 1) as batches:
        actual = sharding.lower(stage.step, (stage.first_state(), next(iter(batches)), stage.teacher), "cpu")[
            0
        ].as_text()
    assert len(expected) > 10000 and actual == expected


@pytest.mark.slow
def test_the_teacher_of_a_stage_is_an_argument(tmp_path):
    config = small(self_distillation.get_config("dataset=digits"))
    options = CompileOptions("cpu:2")
    report = compile_run.compile_run(config, epath.Path(tmp_path), options)
    teacher, student = report["programs"].values()
    assert list(report["programs"]) == ["train_step_teacher", "train_step_student"]
    assert student["memory"]["arguments"] > teacher["memory"]["arguments"]


def test_report(tmp_path, capsys):
    """Through `main`, for eight devices, with AutoAttack's programs."""
    args = ["--config=configs/robal.py:dataset=digits", *SMALL, "--topology=cpu:8", "--programs=train,eval"]
    code, report = compile_main(tmp_path, *args, "--config.eval.only=('pgd20','autoattack')", "--price=2.5")
    assert code == 0 and report.keys() >= KEYS and report["devices"] == 8
    names = ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert list(report["programs"]) == ["train_step", "predict", "attack_pgd20", *(f"autoattack_{n}" for n in names)]
    for name, program in report["programs"].items():
        assert program.keys() >= PROGRAM_KEYS and program["flops"] > 0 and program["host_transfers"] == 0
        assert program["memory"].keys() == {"arguments", "results", "temporaries", "code", "capacity"}
        assert program["estimated_ms"] is None  # of a CPU
        # Only training exchanges anything: an evaluation's images are independent.
        assert program["collectives"].keys() == ({"all-reduce"} if name == "train_step" else set()), name
        assert (tmp_path / "run" / f"{name}.hlo.txt").read_text().startswith("HloModule")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "cpu:8: 8 devices, batch size 64 (8 a device), pmap"
    assert lines[-1] == "No estimate of time: XLA has no cost model for CPUs."


def test_images_need_not_be_there(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "load", lambda _: pytest.fail("data are read"))
    code, report = compile_main(
        tmp_path, "--config=configs/at.py:dataset=cifar10", "--config.model.name=wide_resnet", *SMALL,
        "--topology=cpu:2", "--config.attack.num_steps=1",
    )  # fmt: skip
    assert code == 0 and report["train_images"] == 13996  # CIFAR-10-LT of ratio 50


def test_other_sets_have_the_size_of_the_config(tmp_path, capsys):
    args = ["--config=configs/at.py:dataset=cifar10", "--config.model.name=wide_resnet", *SMALL, "--topology=cpu:2"]
    args += ["--config.data.name=npz", "--config.data.path=nowhere.npz", "--config.attack.num_steps=1"]
    assert compile_main(tmp_path, *args)[0] == 2
    assert "config.data.image_size and config.data.class_counts" in capsys.readouterr().err
    sizes = ["--config.data.image_size=16", "--config.data.class_counts=(300,200)"]
    code, report = compile_main(tmp_path, *args, *sizes, "--config.optim.batch_size=32")
    assert code == 0 and report["train_images"] == 500


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--topology=v5e"], "--topology=v5e: write v5e:2x2"),
        (["--topology=h100"], "needs the CUDA plugin: pip install -e '.[cuda13]'"),
        (["--topology=cpu:3"], "config.optim.batch_size = 64 is not a multiple of the 3 devices"),
        (["--topology=cpu:2", "--fit"], "--fit: the memory of cpu:2 is not known"),
        (["--topology=cpu:2", "--programs=train,test"], "Unknown program in --programs: 'test'"),
        (["--topology=cpu:2", "--price=-1"], "price"),
        (["--topology=cpu:2", "--price=free"], "price"),
        ([], "--topology is missing"),
    ],
)
def test_bad_arguments_give_one_line(tmp_path, capsys, args, message):
    code, report = compile_main(tmp_path, "--config=configs/robal.py:dataset=digits", *SMALL, *args)
    error = capsys.readouterr().err
    assert code == 2 and report is None and len(error.splitlines()) == 1 and message in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag", ["--topology=cpu:2", "--programs=train", "--fit", "--price=1"])
def test_flags_of_compilation_need_the_mode(tmp_path, capsys, flag):
    args = ["main", "--config=configs/robal.py:dataset=digits", f"--workdir={tmp_path / 'run'}", flag]
    assert main.main(args) == 2 and "belongs to --mode=compile" in capsys.readouterr().err


@pytest.fixture
def small_memory(monkeypatch):
    """Sets the memory of a CPU device, in bytes."""

    def set_memory(number):
        others = tuple(a for a in topologies.ACCELERATORS if a.platform != "cpu")
        cpu = dataclasses.replace(topologies.ACCELERATORS[-1], memory=number)
        monkeypatch.setattr(topologies, "ACCELERATORS", (*others, cpu))

    return set_memory


def test_a_batch_that_does_not_fit(tmp_path, capsys, small_memory):
    small_memory(2 * 2**20)
    args = ["--config=configs/at.py:dataset=digits", *SMALL, "--topology=cpu:2"]
    code, report = compile_main(tmp_path, *args)
    error = capsys.readouterr().err
    assert code == 2 and report is None and len(error.splitlines()) == 1
    assert "train_step does not fit into the memory of cpu:2 with 32 images a device: it needs" in error
    assert "--fit searches the largest" in error


@pytest.mark.parametrize(
    ("message", "needs"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (37.97G) "
            "exceeds available HBM (15.75G).",
            "total memory required for HLO temporaries (37.97G) exceeds available HBM (15.75G)",
        ),
        ("RESOURCE_EXHAUSTED: ... Used 18.34G of 15.75G hbm. Exceeded by 2.59G.\nmore", "Used 18.34G of 15.75G hbm"),
        (
            "RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom:\nRan out of memory in memory space vmem while "
            "allocating on stack for %copy.191 = u8[88,224,224,3]{2,1,3,0:T(32,128)(4,1)S(1)} copy(%reshape.349)",
            "one instruction, of u8[88,224,224,3], exceeds XLA's limit of on-chip memory (VMEM)",
        ),
        ("RESOURCE_EXHAUSTED: No room.\nmore", "No room"),
    ],
)
def test_messages_of_the_tpu_compiler(message, needs):
    assert compile_run.used_memory(RuntimeError(message)) == needs


@pytest.mark.slow
def test_fit_searches_the_largest_batch(tmp_path, small_memory, capsys):
    small_memory(5 * 2**18)
    args = ["--config=configs/natural.py:dataset=digits", *SMALL, "--topology=cpu:2", "--fit"]
    code, report = compile_main(tmp_path, *args, "--config.optim.batch_size=4")
    largest = report["batch_size_per_device"]
    memory = report["programs"]["train_step"]["memory"]
    assert code == 0 and 1 <= largest < 8 and sum(memory.values()) <= 2 * memory["capacity"]
    assert f"{largest} images a device fit" in capsys.readouterr().out
    small_memory(2**10)
    assert compile_main(tmp_path / "none", *args, "--config.optim.batch_size=2")[0] == 2
    assert "with 1 images a device" in capsys.readouterr().err


@hypothesis.given(limit=st.integers(1, 5000), start=st.integers(1, 2000), most=st.integers(1, 3000))
def test_search_of_the_largest_batch(limit, start, most):
    tried = []

    def fits(number):
        tried.append(number)
        assert 1 <= number <= most
        return number <= limit

    result = compile_run.search_largest(fits, start, most)
    assert fits(result) and len(tried) < 40
    assert result == most or result + max(result // 8, 1) + 8 > min(limit, most)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_config_is_traced_for_devices_that_are_not_there(name):
    """Every stage of every config; tracing finds what does not fit together, compilation takes long."""
    config = importlib.import_module(f"configs.{name}").get_config("dataset=digits")
    config.parallel = "shard_map"
    experiment = Experiment.from_config(config, mesh=sharding.make_mesh(jax.devices()[:2]))
    for program in compile_run.programs(experiment, ("train",)):
        assert program.function.trace(*program.arguments).jaxpr.eqns


def test_programs_are_traced_for_the_platform():
    """On a CPU, a program for a TPU keeps the form of convolutions that TPUs execute fast."""
    kernel = jax.ShapeDtypeStruct((3, 3, 160, 160), np.float32)
    assert convolutions.mirrors_kernel_beforehand(kernel)
    for platform, channels in (("tpu", 64), ("tpu", 640), ("cuda", 160)):
        with convolutions.tracing_for(platform):
            assert not convolutions.mirrors_kernel_beforehand(
                jax.ShapeDtypeStruct((3, 3, channels, channels), np.float32)
            )
    with convolutions.tracing_for("tpu"):
        assert convolutions.mirrors_kernel_beforehand(kernel)
    assert convolutions.target_platform() == "cpu"


@pytest.mark.slow
def test_tpu(tmp_path, capsys):
    """Compiles for two hosts of v5e and for one, by libtpu; the estimate has all parts."""
    pytest.importorskip("libtpu")  # of the extra `tpu`, 0.7 GB; CI installs it
    config = small(at.get_config("dataset=digits"))
    config.attack.num_steps, config.model.dtype, config.parallel, config.sharded = 2, "bfloat16", "pmap", ()
    for topology, devices, parallel, sharded in (
        ("v5e:2x4", 8, "pmap", ()), ("v5e:2x2", 4, "shard_map", ("opt_state",)),
    ):  # fmt: skip
        config.parallel, config.sharded = parallel, sharded
        options = CompileOptions(topology, price=1.0)
        report = compile_run.compile_run(config, epath.Path(tmp_path / parallel), options)
        step = report["programs"]["train_step"]
        assert report["devices"] == devices and step["host_transfers"] == 0
        assert 0 < step["estimated_ms"] < 100 and 0 < step["share_of_peak"] < 1
        assert step["memory"]["capacity"] == 16 * 2**30 and step["collectives"]["all-reduce"]["count"] > 0
        assert len(step["top"]) == 10 and any(entry["source"].startswith("lt_adv/") for entry in step["top"])
        assert report["cost"] == pytest.approx(devices * report["hours"]) and report["versions"]["libtpu"]
        assert ("all-gather" in step["collectives"]) == bool(sharded)
    assert "Estimates, not measurements. Source: XLA's cost model of the TPU compiler" in capsys.readouterr().out
