"""The benchmark: one real measurement at the smallest size, statistics, and refusal of bad arguments."""

import json
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from experiments.benchmark import measurements, record, summary, timing, worker
from experiments.benchmark.__main__ import main, parse
from lt_adv import data
from lt_adv.cli import flags

ROOT = Path(__file__).parents[2]
DIGITS = "--config=configs/robal.py:dataset=digits"
TINY = [DIGITS, "--config.optim.batch_size=16", "--config.attack.num_steps=1"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Returns (exit code, record) of a step benchmark of JAX and of a PyTorch that cannot be imported."""
    folder = tmp_path_factory.mktemp("benchmark")
    (folder / "torch.py").write_text("raise ImportError('none here')\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("PYTHONPATH", str(folder))
        patch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=1")
        arguments = ["--runs=2", "--seconds=0.05", "--frameworks=jax,released", f"--out={folder}", "--name=tiny"]
        code = main(["step", *TINY, *arguments])
    return code, json.loads((folder / "tiny.json").read_text())


@pytest.mark.slow
def test_record_has_machine_versions_and_config(measured):
    _, result = measured
    assert result["kind"] == "step" and result["command"].startswith("python -m experiments.benchmark step --config=")
    assert result["config"]["network"] == "WRN-10-1" and result["config"]["batch_size"] == 16
    assert result["config"]["method"] == "robal" and result["config"]["num_steps"] == 1
    assert result["machine"]["cores"] >= 1 and len(result["machine"]["load_average"]) == 3 and result["machine"]["cpu"]
    assert {"python", "jax", "jaxlib", "numpy"} <= result["versions"].keys() and "commit" in result
    assert result["peak"]["platform"] == "cpu" and result["peak"]["matmul_flops_per_second"]["float32"] > 1e8
    # A forward and an image gradient in the attack; two forwards with their weight and activation gradients after it.
    assert result["flops"]["passes"] == pytest.approx(8, rel=0.02)
    assert not re.search(r"[= ']/\w", json.dumps(result)), "a path of this machine"


@pytest.mark.slow
def test_summary_follows_the_runs(measured):
    _, result = measured
    first, second = (run for run in result["runs"] if run["series"] == "jax")
    assert (first["round"], second["round"]) == (0, 1)
    for run in (first, second):
        assert len(run["first"]) == timing.WARM_UP_STEPS and len(run["ms"]) >= timing.MIN_BLOCKS and min(run["ms"]) > 0
        assert run["memory"] > 1e7 and np.isfinite(run["loss"]) and run["devices"] == 1 and run["xla"]["flops"] > 0
    jax = result["summary"]["jax"]
    assert jax["ms_min"] <= jax["ms"] <= jax["ms_max"]
    assert jax["images_per_second"] == pytest.approx(16e3 / jax["ms"])
    assert jax["flops_per_second"] == pytest.approx(jax["images_per_second"] * result["flops"]["step"])
    peak = result["peak"]["matmul_flops_per_second"]["float32"]
    assert jax["share_of_peak"] == pytest.approx(jax["flops_per_second"] / peak)
    assert result["floor_ms"] == pytest.approx(jax["ms"] * jax["share_of_peak"])
    assert jax["compile_warm_seconds"] < jax["compile_cold_seconds"], "the second process finds the compiled step"


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
        rest = {"memory": 1 + number, "compile_seconds": 9.0 - number}
        return {"round": number, "series": series, "ms": list(ms), **rest}

    runs = [run(0, "jax", 10, 11, 50), run(0, "tuned", 20, 22, 24), run(1, "jax", 8), run(1, "tuned", 20)]
    runs += [run(2, "jax", 12), {"round": 2, "series": "tuned", "error": "out of memory"}]
    assert summary.ratio(runs, "tuned", "jax") == {"median": 21 / 11, "min": 2.0, "max": 2.5}
    assert summary.ratio(runs, "released", "jax") is None
    result = summary.series(runs)
    assert result["jax"] == {
        "ms": 11, "ms_min": 8, "ms_max": 12, "memory": 2, "compile_cold_seconds": 9.0, "compile_warm_seconds": 7.5,
    }  # fmt: skip
    assert result["tuned"]["error"] == "out of memory" and result["tuned"]["ms"] == 21
    summary.add_rates(result["jax"], 33, 1e9, 6e12)
    assert result["jax"]["images_per_second"] == pytest.approx(3000)
    assert result["jax"]["share_of_peak"] == pytest.approx(0.5)


def test_peak_is_that_of_the_faster_dtype():
    record = {"config": {"dtype": "float32", "attack_dtype": "bfloat16"}}
    assert summary.peak({**record, "peak": {"matmul_flops_per_second": {"float32": 1.0, "bfloat16": 9.0}}}) == 9.0
    assert summary.peak({**record, "peak": {"matmul_flops_per_second": {"float32": 1.0}}}) is None
    assert summary.peak({**record, "peak": {"error": "no device"}}) is None


def test_steps_are_timed_after_the_warm_up(monkeypatch):
    now, steps = [0.0], []

    def step():
        steps.append(len(steps))
        now[0] += {1: 5.0, 2: 0.1875, 4: 1.0}.get(len(steps), 0.125)
        return len(steps)

    waited = []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    result = timing.measure(step, waited.append, seconds=1.0)
    assert result["steps"] == 2 and result["ms"] == [125.0] * 4
    assert len(steps) == timing.WARM_UP_STEPS + 8 and waited == [*range(1, timing.WARM_UP_STEPS + 1), 8, 10, 12, 14]
    assert result["compile_seconds"] == pytest.approx(4.875 + 0.875) and result["first"][0] == pytest.approx(5.0)


class FakeTrainer:
    """Counts the steps that the benchmark takes."""

    instances: list = []

    def __init__(self, config, split, *, setting, device):
        self.steps, self.arguments = 0, (config.optim.batch_size, len(split.train), setting, device)
        FakeTrainer.instances.append(self)

    def step(self):
        self.steps += 1
        return 0.5


def test_pytorch_step_is_timed_like_the_jax_step(monkeypatch):
    monkeypatch.setattr(FakeTrainer, "instances", [])
    monkeypatch.setattr(worker, "torch_device", lambda: (None, "cpu", lambda handle: None))
    monkeypatch.setitem(sys.modules, "experiments.pytorch_baseline.step", types.SimpleNamespace(Trainer=FakeTrainer))
    monkeypatch.setattr(timing, "BLOCK_SECONDS", 1e-9)
    monkeypatch.chdir(ROOT)
    config = flags.parse(["", *TINY]).config
    result = worker.torch_step(config, setting="tuned", seconds=1e-9)
    (trainer,) = FakeTrainer.instances
    images = len(data.long_tailed(data.load(config.data), config.data).train)
    assert trainer.arguments == (16, images, "tuned", "cpu") and result["loss"] == 0.5 and result["memory"] > 1e6
    assert trainer.steps == timing.WARM_UP_STEPS + timing.MIN_BLOCKS * result["steps"]


def test_nan_loss_is_refused():
    with pytest.raises(ValueError, match="nan"):
        worker.require_finite(float("nan"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "/".join(measurements.MEASUREMENTS)),
        (["speed"], "invalid choice: 'speed'"),
        (["step"], "--config is missing"),
        (["step", DIGITS, "--rnus=3"], "Did you mean '--runs'?"),
        (["step", DIGITS, "--workdir=w"], "Unknown option '--workdir'"),
        (["step", DIGITS, "stray"], "Unexpected argument 'stray'"),
        (["step", DIGITS, "--runs=0"], "--runs: must be above 0"),
        (["step", DIGITS, "--runs=two"], "--runs: must be a number of type int, not 'two'"),
        (["step", DIGITS, "--seconds=nan"], "--seconds: must be above 0"),
        (["step", DIGITS, "--name=../x"], "--name: must be of letters"),
        (["step", DIGITS, "--frameworks=jax,tf"], "Unknown framework 'tf'"),
        (["step", DIGITS, "--num-steps=3"], "Unknown option '--num-steps'"),
        (["attack", DIGITS, "--num-steps=10,-1"], "--num-steps: must be above 0, not -1"),
        (["scaling", DIGITS], "at least one of --batch-size"),
        (["step", DIGITS, "--config.optim.batch_siz=3"], "Did you mean 'batch_size'?"),
        (["step", DIGITS, "--config.optim.batch_size=0"], "config.optim.batch_size must be a whole number"),
    ],
)
def test_bad_arguments_give_one_line(arguments, expected, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(record, "launch", lambda *_, **__: pytest.fail("a process was started"))
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("Error: ") and printed.err.count("\n") == 1 and expected in printed.err


def test_stopped_run_prints_its_results(monkeypatch, tmp_path, capsys):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.chdir(ROOT)
    for kind in measurements.MEASUREMENTS:
        monkeypatch.setitem(measurements.MEASUREMENTS, kind, stopped)
        more = ["--depth=16"] if kind == "scaling" else []
        assert main([kind, DIGITS, f"--out={tmp_path}", f"--name={kind}", *more]) == 1
        assert json.loads((tmp_path / f"{kind}.json").read_text())["error"] == "stopped before the last round"
        assert "Failed: benchmark: stopped" in capsys.readouterr().err


def fake_launch(tasks, ms=lambda name: 10.0):
    """Replaces `record.launch` by processes that take `ms` and are listed in `tasks`."""

    def launch(task, config, environment=None, **options):
        tasks.append((task, options, list(config)))
        rates = {"matmul_flops_per_second": {"float32": 1e12}, "platform": "cpu"}
        if task in ("peak", "flops"):
            return rates if task == "peak" else {"step": 1e9, "forward": 1e8}
        if task == "load":
            return {"seconds": 2.0}
        return {"ms": [ms(task)] * 3, "compile_seconds": 1.0, "memory": 2**30, "images": 40}

    return launch


def run_measurement(kind, tmp_path, monkeypatch, *arguments):
    tasks = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(record, "launch", fake_launch(tasks, lambda task: 40.0 if task.startswith("torch") else 10.0))
    assert main([kind, *TINY, "--runs=2", f"--out={tmp_path}", "--name=x", *arguments]) == 0
    return tasks, json.loads((tmp_path / "x.json").read_text())


def test_attacks_alternate_for_each_number_of_steps(monkeypatch, tmp_path, capsys):
    tasks, result = run_measurement("attack", tmp_path, monkeypatch, "--num-steps=5,20")
    order = [(task, options["num_steps"]) for task, options, _ in tasks if "num_steps" in options]
    assert order == 2 * [("jax_attack", 5), ("torch_attack", 5), ("jax_attack", 20), ("torch_attack", 20)]
    assert result["ratio"]["20"]["median"] == 4.0 and result["summary"]["jax 20"]["ms_per_step"] == 0.5
    assert result["summary"]["jax 5"]["images_per_second"] == 4000
    assert "| PGD-20 | 0.50 | 2.00 | 4.00x | 4,000 | 2 |" in capsys.readouterr().out


def test_scaling_changes_one_thing_at_a_time(monkeypatch, tmp_path, capsys):
    arguments = ["--batch-size=8,32", "--depth=16", "--num-steps=3", "--devices=2"]
    tasks, result = run_measurement("scaling", tmp_path, monkeypatch, *arguments)
    steps = [(options.get("devices"), config[len(TINY) :]) for task, options, config in tasks if task == "jax_step"]
    per_round = [(None, ["--config.optim.batch_size=8"]), (None, ["--config.optim.batch_size=32"])]
    per_round += [(None, ["--config.model.depth=16"]), (None, ["--config.attack.num_steps=3"]), (2, [])]
    assert steps == 2 * per_round
    assert result["summary"]["batch_size 32"]["images_per_second"] == 3200
    assert "| batch size 32 | 10.0 | 3,200 | 3,200 | 2 |" in capsys.readouterr().out


def test_images_are_loaded_cold_and_warm_in_every_round(monkeypatch, tmp_path, capsys):
    tasks, result = run_measurement("data", tmp_path, monkeypatch)
    loads = [options["folder"] for task, options, _ in tasks if task == "load"]
    assert loads[0] == loads[1] != loads[2] == loads[3]
    assert result["summary"]["pipeline"]["images_per_second"] == 1600
    assert "| 1,600 | 2.00 | 2.00 | 2 |" in capsys.readouterr().out


def test_failed_start_gives_its_reason(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    answer = measurements._first_step(["--config=configs/nothing.py"], str(tmp_path / "cache"), str(tmp_path / "run"))
    assert answer["error"].startswith("Unknown config file 'configs/nothing.py'")


@pytest.mark.parametrize("file", ["docs/performance.md", "experiments/gpu_queue.md"])
def test_documented_commands_parse(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    pattern = rf"python -m experiments\.benchmark ((?:{'|'.join(measurements.MEASUREMENTS)}) [^`\n]*)"
    result = re.findall(pattern, (ROOT / file).read_text())
    assert result
    for command in result:
        parse(shlex.split(command))


def test_gpu_queue_script_matches_its_page():
    script, page = (ROOT / "experiments" / f"gpu_queue.{kind}" for kind in ("sh", "md"))
    answer = subprocess.run(["bash", str(script), "resnet"], capture_output=True, text=True)
    assert answer.returncode == 2 and answer.stderr.startswith("Unknown entry resnet. There are: prepare resnet18")
    text = script.read_text().replace("$resnet", "--config=configs/at_bsl.py:dataset=cifar10")
    text = text.replace("$wrn", "--config=configs/robal.py:dataset=cifar10")
    commands = re.findall(r"^python -m experiments\.benchmark (.*)", page.read_text(), re.MULTILINE)
    assert len(commands) >= 8
    for command in commands:
        assert re.search(rf"benchmark {re.escape(command)} *(;;|$)", text, re.MULTILINE), command
