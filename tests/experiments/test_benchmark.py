"""The benchmark: one real measurement at the smallest size, the order of the processes, statistics and tables."""

import json
import re
import sys
import types

import numpy as np
import pytest

import experiments.tables
from experiments.benchmark import measurements, record, summary, tables, timing, worker
from experiments.benchmark.__main__ import main
from lt_adv import data
from lt_adv.cli import flags
from tests.conftest import QUICK
from tests.experiments.conftest import ROOT

DIGITS = "--config=configs/robal.py:dataset=digits"
TINY = [DIGITS, "--config.optim.batch_size=16", "--config.attack.num_steps=1"]
PEAK = {"device": "cpu", "platform": "cpu", "devices": 1, "matmul_flops_per_second": {"float32": 1e12}}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Returns (exit code, record) of a step benchmark of JAX and of a PyTorch that cannot be imported.

    The record also has "cached", the number of files in the compile cache before each process and at the end.
    """
    folder, cache = tmp_path_factory.mktemp("benchmark"), tmp_path_factory.mktemp("cache")
    caches, cached = record.caches(cache), []

    def count_and_return_caches(_=None):
        cached.append(sum(path.is_file() for path in cache.rglob("*")))
        return caches

    (folder / "torch.py").write_text("raise ImportError('none here')\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("PYTHONPATH", str(folder))
        patch.setenv("XLA_FLAGS", f"{QUICK} --xla_force_host_platform_device_count=1")
        patch.setattr(record, "caches", count_and_return_caches)
        arguments = ["--runs=2", "--seconds=0.05", "--frameworks=jax,released", f"--out={folder}", "--name=tiny"]
        code = main(["step", *TINY, *arguments])
    count_and_return_caches()
    return code, {**json.loads((folder / "tiny.json").read_text()), "cached": cached}


@pytest.mark.slow
def test_record_has_machine_versions_and_config(measured):
    _, result = measured
    assert result["kind"] == "step" and result["command"].startswith("python -m experiments.benchmark step --config=")
    config = {name: result["config"][name] for name in ("network", "batch_size", "method", "num_steps")}
    assert config == {"network": "WRN-10-1", "batch_size": 16, "method": "robal", "num_steps": 1}
    assert result["machine"]["cores"] >= 1 and len(result["machine"]["load_average"]) == 3 and result["machine"]["cpu"]
    assert {"python", "jax", "jaxlib", "numpy"} <= result["versions"].keys() and "commit" in result
    assert result["peak"]["platform"] == "cpu" and result["peak"]["matmul_flops_per_second"]["float32"] > 1e8
    # A forward and an image gradient in the attack; two forwards with their weight and activation gradients after it.
    assert result["flops"]["step"] / result["flops"]["forward"] == pytest.approx(8, rel=0.02)
    assert not re.search(r"[= ']/\w", json.dumps(result)), "a path of this machine"


@pytest.mark.slow
def test_summary_follows_the_runs(measured):
    _, result = measured
    first, second = (run for run in result["runs"] if run["series"] == "jax")
    assert (first["round"], second["round"]) == (0, 1)
    for run in (first, second):
        assert len(run["first"]) == timing.WARM_UP_STEPS and len(run["ms"]) >= timing.MIN_BLOCKS and min(run["ms"]) > 0
        assert run["memory"] > 1e7 and np.isfinite(run["loss"]) and run["devices"] == 1
    jax = result["summary"]["jax"]
    assert jax["ms_min"] <= jax["ms"] <= jax["ms_max"]
    assert jax["images_per_second"] == pytest.approx(16e3 / jax["ms"])
    assert jax["flops_per_second"] == pytest.approx(jax["images_per_second"] * result["flops"]["step"])
    peak = result["peak"]["matmul_flops_per_second"]["float32"]
    assert jax["share_of_peak"] == pytest.approx(jax["flops_per_second"] / peak)
    assert min(jax["compile_warm_seconds"], jax["compile_cold_seconds"]) > 0
    before_jax, after_jax, *later = result["cached"]
    assert before_jax == 0 < after_jax and set(later) == {after_jax}, "the second process loads the compiled step"


@pytest.mark.slow
def test_failure_is_recorded_and_the_rest_continues(measured):
    code, result = measured
    assert code == 1
    (failed,) = (run for run in result["runs"] if run["series"] == "released")  # not started a second time
    assert failed["error"] == "PyTorch is not installed: pip install -e '.[torch]'."
    assert summary.errors(result) == [f"released: {failed['error']}"]
    assert result["ratio"] == {"released": None, "tuned": None}


def test_failed_process_is_described_in_one_line():
    assert record.failure(-9, "whatever\n") == "ended by SIGKILL"
    assert record.failure(1, "noise\n\nError: no such thing in /data/set/train\n") == "no such thing in .../train"
    assert record.failure(3, "") == "exit code 3"


def test_ratios_and_spread():
    def run(number, series, *ms):
        rest = {"memory": 1 + number, "compile_seconds": 9.0 - number, "images": 33}
        return {"round": number, "series": series, "ms": list(ms), **rest}

    runs = [run(0, "jax", 10, 11, 50), run(0, "tuned", 20, 22, 24), run(1, "jax", 8), run(1, "tuned", 20)]
    runs += [run(2, "jax", 12), {"round": 2, "series": "tuned", "error": "out of memory"}]
    assert summary.ratio(runs, "tuned", "jax") == {"median": 21 / 11, "min": 2.0, "max": 2.5}
    assert summary.ratio(runs, "released", "jax") is None
    result = summary.series(runs, {"jax": 1e9}, 6e12)
    assert result["jax"] == {
        "ms": 11, "ms_min": 8, "ms_max": 12, "memory": 2, "compile_cold_seconds": 9.0, "compile_warm_seconds": 7.5,
        "images_per_second": pytest.approx(3000), "flops_per_second": pytest.approx(3e12),
        "share_of_peak": pytest.approx(0.5),
    }  # fmt: skip
    assert result["tuned"]["error"] == "out of memory" and result["tuned"]["ms"] == 21


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        ({"matmul_flops_per_second": {"float32": 1.0, "bfloat16": 9.0}}, 9.0),  # that of the faster dtype
        ({"matmul_flops_per_second": {"float32": 1.0}}, None),
        ({"error": "no device"}, None),
    ],
)
def test_peak_of_mixed_precision(measured, expected):
    assert summary.peak({"config": {"dtype": "float32", "attack_dtype": "bfloat16"}, "peak": measured}) == expected


def test_steps_are_timed_after_the_warm_up(monkeypatch):
    now, steps = [0.0], []

    def step():
        steps.append(len(steps))
        now[0] += {1: 5.0, 2: 0.1875, 4: 1.0}.get(len(steps), 0.125)
        return len(steps)

    waited = []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    result, last = timing.measure(step, waited.append, seconds=1.0)
    assert result["steps"] == 2 and result["ms"] == [125.0] * 4 and last == waited[-1]
    assert len(steps) == timing.WARM_UP_STEPS + 8 and waited == [*range(1, timing.WARM_UP_STEPS + 1), 8, 10, 12, 14]
    assert result["compile_seconds"] == pytest.approx(4.875 + 0.875) and result["first"][0] == pytest.approx(5.0)


def test_pytorch_step_is_timed_like_the_jax_step(monkeypatch):
    trainers = []

    class Trainer:
        def __init__(self, config, split, *, setting, device):
            self.steps, self.arguments = 0, (config.optim.batch_size, len(split.train), setting, device)
            trainers.append(self)

        def step(self):
            self.steps += 1
            return 0.5

    monkeypatch.setattr(worker, "torch_device", lambda: (None, "cpu", lambda handle: None))
    monkeypatch.setitem(sys.modules, "experiments.pytorch_baseline.step", types.SimpleNamespace(Trainer=Trainer))
    monkeypatch.setattr(timing, "BLOCK_SECONDS", 1e-9)
    config = flags.parse(["", *TINY]).config
    result = worker.run("torch_step", TINY, setting="tuned", seconds=1e-9)
    (trainer,) = trainers
    images = len(data.long_tailed(data.load(config.data), config.data).train)
    assert trainer.arguments == (16, images, "tuned", "cpu") and result["loss"] == 0.5 and result["memory"] > 1e6
    assert result["images"] == 16
    assert trainer.steps == timing.WARM_UP_STEPS + timing.MIN_BLOCKS * result["steps"]


def test_nan_loss_is_refused():
    with pytest.raises(ValueError, match="nan"):
        worker.require_finite(float("nan"))


def test_stopped_run_prints_its_results(monkeypatch, tmp_path, capsys):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(record, "launch", lambda *_, **__: PEAK)
    for kind in measurements.MEASUREMENTS:
        monkeypatch.setitem(measurements.MEASUREMENTS, kind, stopped)
        more = ["--depth=16"] if kind == "scaling" else []
        assert main([kind, DIGITS, f"--out={tmp_path}", f"--name={kind}", *more]) == 1
        assert json.loads((tmp_path / f"{kind}.json").read_text())["error"] == "stopped before the last round"
        assert "Failed: benchmark: stopped" in capsys.readouterr().err


@pytest.fixture
def measure(tmp_path, monkeypatch, capsys):
    """Returns `measure(kind, *arguments)` -> ([(task, options, config)], record, printed table) of fake processes."""

    def call(kind, *arguments):
        tasks = []

        def launch(task, config, environment=None, **options):
            tasks.append((task, options, list(config)))
            if task == "load":
                return {"seconds": 2.0}
            ms = 40.0 if task.startswith("torch") else 10.0
            step = {"ms": [ms] * 3, "compile_seconds": 1.0, "memory": 2**30, "images": 16}
            return {"peak": PEAK, "flops": {"step": 1e9, "forward": 1e8}}.get(task, step)

        monkeypatch.setattr(record, "launch", launch)
        assert main([kind, *TINY, "--runs=2", f"--out={tmp_path}", "--name=x", *arguments]) == 0
        return tasks, json.loads((tmp_path / "x.json").read_text()), capsys.readouterr().out

    return call


def test_attacks_alternate_for_each_number_of_steps(measure):
    tasks, result, printed = measure("attack", "--num-steps=5,20")
    order = [(task, options["num_steps"]) for task, options, _ in tasks if "num_steps" in options]
    assert order == 2 * [("jax_attack", 5), ("torch_attack", 5), ("jax_attack", 20), ("torch_attack", 20)]
    assert result["ratio"]["20"]["median"] == 4.0 and result["summary"]["jax 5"]["images_per_second"] == 1600
    assert "| 16 | PGD-20 | 0.50 | 2.00 | 4.00x | 1,600 | 2 |" in printed


def test_scaling_changes_one_thing_at_a_time(measure):
    tasks, _, printed = measure("scaling", "--batch-size=8,32", "--depth=16", "--num-steps=3", "--devices=2")
    steps = [(options.get("devices"), config[len(TINY) :]) for task, options, config in tasks if task == "jax_step"]
    per_round = [(None, ["--config.optim.batch_size=8"]), (None, ["--config.optim.batch_size=32"])]
    per_round += [(None, ["--config.model.depth=16"]), (None, ["--config.attack.num_steps=3"]), (2, [])]
    assert steps == 2 * per_round
    assert "| batch size 32 | 10.0 | 1,600 | 1,600 | 2 |" in printed


def test_images_are_loaded_cold_and_warm_in_every_round(measure):
    tasks, result, printed = measure("data")
    loads = [options["folder"] for task, options, _ in tasks if task == "load"]
    assert loads[0] == loads[1] != loads[2] == loads[3]
    assert result["summary"]["pipeline"]["images_per_second"] == 1600
    assert "| 1,600 | 2.00 | 2.00 | 2 |" in printed


def test_first_step_is_cold_then_warm_in_every_round(measure, monkeypatch):
    calls = []

    def first_step(config, environment, *, workdir):
        calls.append((environment["JAX_COMPILATION_CACHE_DIR"], workdir))
        return {"seconds": 8.0 if workdir.endswith("cold") else 2.0}

    monkeypatch.setattr(measurements, "first_step", first_step)
    assert "| 8.00 | 2.00 | 2 |" in measure("start")[2]
    caches, workdirs = zip(*calls, strict=True)
    assert caches[0] == caches[1] != caches[2] == caches[3] and len(set(workdirs)) == 4


def test_failed_start_gives_its_reason(tmp_path):
    caches = record.caches(tmp_path / "cache")
    answer = measurements.first_step(["--config=configs/nothing.py"], caches, workdir=str(tmp_path / "run"))
    assert answer["error"].startswith("Unknown config file 'configs/nothing.py'")


def test_step_record_is_a_row():
    compiled = {"compile_cold_seconds": 41.26, "compile_warm_seconds": 2.5}
    rates = {"images_per_second": 78.8, "share_of_peak": 0.337}
    not_cached = {"compile_cold_seconds": 0.1, "compile_warm_seconds": None}
    cpu = {
        "machine": {"cpu": "Some CPU", "cores": 2},
        "peak": {"device": "cpu", "platform": "cpu", "devices": 1},
        "config": {"network": "WRN-16-2", "method": "robal", "num_steps": 5, "batch_size": 64}
        | {"dtype": "float32", "attack_dtype": "float32"},
        "summary": {
            "jax": {"ms": 812.3, "memory": 2**30, **rates, **compiled},
            "released": {"ms": 1000.4, "memory": 2**29, **not_cached},
            "tuned": {"error": "out of memory"},
        },
        "runs": [{"round": number, "series": "jax"} for number in (0, 0, 1)],
        "ratio": {"released": {"median": 1.2316, "min": 1.2, "max": 1.25}, "tuned": None},
    }
    gpu = {**cpu, "peak": {"device": "Some GPU", "platform": "gpu", "devices": 2}}
    gpu["config"] = {**cpu["config"], "attack_dtype": "bfloat16"}
    head, rows = tables.table("step", [cpu, gpu])
    cpu_cells, gpu_cells = (dict(zip(head, row, strict=True)) for row in rows)
    assert cpu_cells == {
        "Device": "2 cores of Some CPU",
        "Network": "WRN-16-2",
        "Method, attack steps": "robal, 5",
        "Precision": "float32",
        "Batch": "64",
        "JAX, ms": "812",
        "PyTorch as released, ms": "1,000",
        "PyTorch tuned, ms": "–",
        "Speed-up over released": "1.23x (1.20 to 1.25)",
        "Speed-up over tuned": "–",
        "JAX, images/s": "78.8",
        "Share of peak": "34 %",
        "Peak memory, GiB": "1.00 / 0.50 / –",
        "Compile, s": "41.3 / 0.10 / –",
        "Compile with cache, s": "2.50 / – / –",
        "Rounds": "2",
    }
    assert gpu_cells["Device"] == "2 x Some GPU" and gpu_cells["Precision"] == "float32, attack bfloat16"


def test_one_round_has_no_range():
    assert tables.times({"median": 1.5, "min": 1.5, "max": 1.5}) == "1.50x"


@pytest.mark.parametrize("kind", measurements.MEASUREMENTS)
def test_every_measurement_has_a_table_and_a_command(kind, tmp_path):
    assert f"benchmark_{kind}" in experiments.tables.TABLES
    expected = f"`{kind}`: not measured yet; `python -m experiments.benchmark {kind} --"
    assert experiments.tables.benchmark(kind, tmp_path).startswith(expected)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "–"), (0.0375, "0.04"), (0.9, "0.90"), (1.237, "1.24"), (12.34, "12.3"), (123.4, "123"), (12345, "12,345")],
)
def test_numbers_have_three_digits(value, shown):
    assert tables.number(value) == shown
