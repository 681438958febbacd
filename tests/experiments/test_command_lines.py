"""Command lines of the experiments: invalid arguments give one line and start nothing."""

import importlib
import re
import shlex
import subprocess
import sys

import pytest

from experiments.benchmark import measurements, record
from experiments.benchmark.__main__ import main as benchmark
from experiments.benchmark.__main__ import parse
from experiments.study import jobs
from experiments.study.__main__ import main as study
from experiments.study.rows import PRESETS
from tests.experiments import NO_TORCH
from tests.experiments.conftest import ROOT

DIGITS = "--config=configs/robal.py:dataset=digits"
BENCHMARK = [
    ([], "/".join(measurements.MEASUREMENTS)),
    (["speed"], "invalid choice: 'speed'"),
    (["step"], "--config is missing"),
    (["step", DIGITS, "--rnus=3"], "Did you mean '--runs'?"),
    (["step", DIGITS, "--workdir=w"], "Unknown option '--workdir'"),
    (["step", DIGITS, "stray"], "Unknown option 'stray'"),
    (["step", DIGITS, "--runs=0"], "--runs: must be above 0"),
    (["step", DIGITS, "--runs=two"], "--runs: must be a number of type int, not 'two'"),
    (["step", DIGITS, "--seconds=nan"], "--seconds: must be above 0"),
    (["step", DIGITS, "--name=../x"], "--name: must be of letters"),
    (["step", DIGITS, "--frameworks=jax,tf"], "Unknown framework 'tf'"),
    (["step", DIGITS, "--num-steps=3"], "Unknown option '--num-steps'"),
    (["attack", DIGITS, "--num-steps=10,-1"], "--num-steps: must be above 0, not -1"),
    (["scaling", DIGITS], "at least one of --batch-size"),
    (["step", DIGITS, "--config.optim.batch_siz=3"], "Did you mean 'batch_size'?"),
    (["step", DIGITS, "--config.optim.batch_size=0"], "config.optim.batch_size must be"),
    (["autoattack"], "--config is missing"),
    (["autoattack", DIGITS, "--attacks=apgd"], "Unknown attack 'apgd'"),
    (["autoattack", DIGITS, "--attacks=fab"], "Unknown attack 'fab'"),
    (["autoattack", DIGITS, "--images=0"], "--images: must be above 0"),
    (["autoattack", DIGITS, "--queries=many"], "--queries: must be a number of type int"),
    (["autoattack", DIGITS, "--eps=-0.1"], "--eps: must be above 0"),
    (["autoattack", DIGITS, "--workdir=nowhere"], "--workdir: there is no folder 'nowhere'"),
    (["autoattack", DIGITS, "--golden=linear"], "--golden brings its network and images"),
    (["autoattack", "--golden=linear", "--workdir=configs"], "--golden brings its network and images"),
    (["autoattack", "--golden=robal"], "Unknown head 'robal'"),
    (["autoattack", DIGITS, "--querys=5"], "Did you mean '--queries'?"),
]
STUDY = [
    (["--rows=at,robbal"], "Did you mean 'robal'?"),
    (["--rows="], "Unknown row ''"),
    (["--seeds=0,-1"], "--seeds: must be integers from 0"),
    (["--seeds=one"], "--seeds: must be integers from 0"),
    (["--epochs=0"], "--epochs: must be above 0"),
    (["--epochs=ten"], "--epochs: must be a number of type int"),
    (["--preset=gpu"], "Unknown preset 'gpu'"),
    (["--scales=2"], "Unknown scale 2.0"),
    (["--scales=much"], "Unknown scale 'much'"),
    (["--autoattack=many"], "--autoattack: must be a number of type int"),
    (["--baseline=att"], "Unknown row 'att'"),
    (["--name=.."], "--name: must be of letters"),
    (["--row=at"], "Did you mean '--rows'?"),
    (["stray"], "Unknown option 'stray'"),
    (["--workdir=w"], "Did you mean '--workdirs'?"),
    (["--rows=at", "--config.optim.batch_siz=3"], "row at: Unknown entry"),
    (["--rows=at,robal", "--config.optim.batch_size=0"], "config.optim.batch_size must be"),
    (["--rows=at", "--dataset=digits,epochs=3"], "--dataset: must be of letters"),
]
PYTORCH = [
    ([DIGITS], "--workdir is missing"),
    ([DIGITS, "--workdir=x", "--setting=fast"], "Unknown setting 'fast'"),
    ([DIGITS, "--workdir=x", "--mode=eval"], "lt_adv.main --mode=eval evaluates"),
    ([DIGITS, "--workdir=x", "--setings=tuned"], "--setings"),
    ([DIGITS, "--workdir=x", "--config.data.sampler=class_aware"], "config.data.sampler = 'class_aware'"),
    (["--workdir=x"], "--config is missing"),
]


def refused(main, arguments, capsys):
    """Returns the one line that `main` prints for these arguments."""
    assert main(arguments) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("Error: ") and printed.count("\n") == 1
    return printed


@pytest.mark.parametrize(("arguments", "expected"), BENCHMARK)
def test_benchmark_refuses(arguments, expected, monkeypatch, capsys):
    monkeypatch.setattr(record, "launch", lambda *_, **__: pytest.fail("a process was started"))
    assert expected in refused(benchmark, arguments, capsys)


@pytest.mark.parametrize(("arguments", "expected"), STUDY)
def test_study_refuses(arguments, expected, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(jobs, "execute", lambda *_: pytest.fail("a process was started"))
    assert expected in refused(study, [*arguments, f"--out={tmp_path}"], capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "expected"), PYTORCH)
def test_pytorch_baseline_refuses(arguments, expected, capsys, tmp_path):
    pytest.importorskip("torch", reason=NO_TORCH)
    train = importlib.import_module("experiments.pytorch_baseline.train")
    arguments = [argument.replace("=x", f"={tmp_path}/x") for argument in arguments]
    assert expected in refused(train.main, arguments, capsys)
    assert not list(tmp_path.iterdir())


def test_missing_torch_names_the_extra(monkeypatch, capsys):
    from experiments.pytorch_baseline import train

    monkeypatch.setitem(sys.modules, "torch", None)
    expected = "Error: PyTorch is not installed: pip install -e '.[torch]'.\n"
    assert refused(train.main, [DIGITS, "--workdir=x"], capsys) == expected


def test_help_describes_every_preset(capsys):
    assert study(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"--preset={name}" in printed for name in PRESETS)


@pytest.mark.parametrize("file", ["docs/performance.md", "experiments/gpu_queue.md"])
def test_documented_commands_parse(file):
    pattern = rf"python -m experiments\.benchmark ((?:{'|'.join(measurements.MEASUREMENTS)}) [^`\n]*)"
    commands = re.findall(pattern, (ROOT / file).read_text())
    assert commands
    for command in commands:
        parse(shlex.split(command))


def test_gpu_queue_script_matches_its_page():
    script, page = (ROOT / "experiments" / f"gpu_queue.{kind}" for kind in ("sh", "md"))
    answer = subprocess.run(["bash", str(script), "resnet"], capture_output=True, text=True)
    assert answer.returncode == 2 and answer.stderr.startswith("Unknown entry resnet. There are: prepare resnet18")
    text = script.read_text().replace("$resnet", "--config=configs/at_bsl.py:dataset=cifar10")
    text = text.replace("$wrn", DIGITS.replace("digits", "cifar10"))
    commands = re.findall(r"^python -m experiments\.benchmark (.*)", page.read_text(), re.MULTILINE)
    assert len(commands) >= 8
    for command in commands:
        assert re.search(rf"benchmark {re.escape(command)} *(;;|$)", text, re.MULTILINE), command
