"""The measurement `libraries`: its plan, the adapters that need no other library, what counts as robust, the table."""

import json
import types

import jax
import numpy as np
import pytest

from experiments.benchmark import libraries, record, summary, tables, target, worker
from experiments.benchmark.__main__ import GOLDEN, main, parse
from experiments.benchmark.libraries import LIBRARIES, Case, Outcome, summarise
from lt_adv.cli import flags
from tests.experiments import NO_TORCH
from tests.experiments.test_benchmark import PEAK

DIGITS = "--config=configs/at.py:dataset=digits"
OTHERS = ("foolbox", "torchattacks", "pyautoattack")
OPTIONS = {"golden": "linear", "images": 16, "workdir": None, "eps": 0.15}
STEPS = {"num_steps": 3, "queries": 20, "seconds": 1e-9}


@pytest.fixture
def measure(tmp_path, monkeypatch, capsys):
    """Returns `measure(installed, *arguments)` -> (exit code, [(task, options)], record, output) of fake processes."""

    def call(installed, *arguments):
        tasks = []

        def launch(task, config, environment=None, **options):
            tasks.append((task, options))
            assert flags.parse(["", *config]).config.eval.batch_size == 250, "the default of the official code"
            if task in ("peak", "logits_difference"):
                return PEAK if task == "peak" else {"difference": 1e-7}
            seconds = 1.0 if options["library"] == "lt_adv" else 4.0
            evaluations = {options["attack"]: [21000, 20000]}
            found = (
                {} if options["library"] == "loop" else {"robust": np.packbits([1] * 500 + [0] * 500).tobytes().hex()}
            )
            accuracy = {"clean": 0.9} | ({options["attack"]: 0.5} if found else {})
            times = {"ms": [1e3 * seconds], "compile_seconds": 2.0, "memory": 1, "images": 1000}
            return {**times, **found, "accuracy": accuracy, "evaluations": evaluations}

        monkeypatch.setattr(record, "launch", launch)
        monkeypatch.setattr(libraries.importlib.util, "find_spec", lambda name: name in installed)
        monkeypatch.setattr(record, "versions", lambda: {"foolbox": "3.3.4", "pyautoattack": "0.2.0"})
        code = main(["libraries", "--runs=2", f"--out={tmp_path}", "--name=x", *arguments])
        return code, tasks, json.loads((tmp_path / "x.json").read_text()), capsys.readouterr()

    return call


def test_libraries_take_turns_at_each_attack(measure):
    code, tasks, result, output = measure(OTHERS, "--golden=linear", "--attacks=pgd,square", "--num-steps=7")
    names = [(o["library"], o["attack"], o["norm"], o["eps"]) for task, o in tasks if task == "library_attack"]
    pgd = [(name, "pgd", "linf", 0.15) for name in LIBRARIES if name != "pyautoattack"]
    square = [(name, "square", "linf", 0.15) for name in ("lt_adv", "torchattacks", "pyautoattack")]
    square_l1 = [(name, "square", "l1", 1.0) for name in ("lt_adv", "pyautoattack")]
    assert names == 2 * [*pgd, *square, *square_l1] and code == 0
    assert {o["num_steps"] for task, o in tasks if task == "library_attack"} == {7}
    assert tasks[1] == ("logits_difference", {**OPTIONS, "images": None, "eps": None})
    assert result["ratio"]["foolbox-jax pgd linf"] == {"median": 0.25, "min": 0.25, "max": 0.25}
    assert result["config"]["network"] == "golden digit network, linear head" and result["logits"] == {
        "difference": 1e-7
    }
    network = "golden digit network, linear head | 1,000"
    assert (
        f"| L-inf PGD-7 | foolbox 3.3.4, JAX | {network} | 4.00 | 0.25x | 50.00 | 21.0 | 20.0 | 2.00 | 2 |"
        in output.out
    )
    assert f"| L-inf PGD-7 | passes alone, JAX | {network} | 4.00 | 0.25x | – | 21.0 | 20.0 | 2.00 | 2 |" in output.out
    assert f"| L1 square | official AutoAttack 0.2.0 | {network} | 4.00 | 0.25x | 50.00 |" in output.out


def test_missing_library_is_one_line_that_names_what_to_install(measure):
    code, tasks, result, output = measure(("foolbox",), "--golden=cosine", "--attacks=pgd,fab-t")
    lines = [line for line in output.err.splitlines() if "not installed" in line]
    assert code == 1 and lines == [
        "Failed: torchattacks: torchattacks is not installed: pip install --no-deps torchattacks==3.5.1",
        "Failed: pyautoattack: pyautoattack is not installed: pip install pyautoattack==0.2.0",
    ]
    started = {options["library"] for task, options in tasks if task == "library_attack"}
    assert started == {"lt_adv", "loop", "foolbox-jax", "foolbox-jax-jit", "foolbox-torch"}
    assert "foolbox 3.3.4, PyTorch" in output.out and result["libraries"].keys() == {"torchattacks", "pyautoattack"}


def test_worker_refuses_a_missing_library(monkeypatch, capsys):
    monkeypatch.setattr(libraries.importlib.util, "find_spec", lambda name: None)
    task = {"library": "foolbox-jax", "attack": "pgd", "norm": "linf", **STEPS, **OPTIONS}
    assert worker.main(["worker", "library_attack", json.dumps(task), *GOLDEN]) == 1
    assert capsys.readouterr().err == "Error: foolbox is not installed: pip install foolbox==3.3.4\n"


@pytest.mark.parametrize(
    ("arguments", "radii"),
    [
        (["--golden=linear"], {"linf": 0.15, "l1": 1.0}),
        (["--golden=cosine", "--norms=l2"], {"l2": 0.48}),
        (["--golden=cosine", "--norms=l2,l1", "--eps=0.5,2"], {"l2": 0.5, "l1": 2.0}),
        ([DIGITS], {"linf": None}),
        ([DIGITS, "--norms=l1", "--eps=3"], {"l1": 3.0}),
    ],
)
def test_radii(arguments, radii):
    assert parse(["libraries", *arguments])[0].radii == radii


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([DIGITS, "--norms=l1"], "for other norms give --eps"),
        (["--golden=linear", "--eps=0.1"], "--eps needs a radius for each of linf, l1, got 1."),
        (["--golden=linear", "--eps=0.1,none"], "must be a number"),
        (["--golden=linear", "--libraries=foolbx"], "Unknown library 'foolbx'"),
        (["--golden=linear", DIGITS], "--golden brings its network"),
    ],
)
def test_invalid_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        parse(["libraries", *arguments])


@pytest.mark.parametrize("attack", ["pgd", "apgd-ce"])
def test_attack_of_lt_adv_on_a_golden_network(attack):
    task = {"library": "lt_adv", "attack": attack, "norm": "linf", **STEPS, **OPTIONS}
    run = worker.run("library_attack", GOLDEN, **task)
    assert run["images"] == 16 and run["eps"] == 0.15 and run["outside"] == 0 and min(run["ms"]) > 0
    robust = np.unpackbits(np.frombuffer(bytes.fromhex(run["robust"]), np.uint8), count=16)
    assert run["accuracy"][attack] == robust.mean() < run["accuracy"]["clean"] > 0.7
    forwards, gradients = run["evaluations"][attack]
    assert (forwards, gradients) == (48, 48) if attack == "pgd" else forwards == gradients > 100


def test_passes_alone_are_those_of_pgd():
    run = worker.run("library_attack", GOLDEN, library="loop", attack="pgd", norm="linf", **STEPS, **OPTIONS)
    assert run["evaluations"] == {"pgd": [48, 48]} and "robust" not in run and "pgd" not in run["accuracy"]


def test_passes_alone_depend_on_each_other():
    from experiments.benchmark import libraries_jax

    visited = []

    def apply(_, x):
        jax.debug.callback(visited.append, x)
        return x @ jax.numpy.eye(3)

    x, y = jax.numpy.full((1, 3), np.nan), jax.numpy.zeros(1, int)
    case = types.SimpleNamespace(num_steps=2, target=types.SimpleNamespace(variables=()))
    assert np.isnan(libraries_jax.passes_alone(apply, case)(x, y)).all(), "the gradient is in the result"
    jax.effects_barrier()
    assert len(visited) == 2


def fake_case(eps, norm, images):
    return Case(target.Target(images, None, eps, None, None, None), "a", norm, 20, 5000, 2, 0, 1.0)


@pytest.mark.parametrize(
    ("norm", "inside", "outside"), [("linf", 0.1, 0.101), ("l1", 0.05, 0.0501), ("l2", 0.07, 0.0711)]
)
def test_a_point_outside_the_ball_is_not_found(norm, inside, outside):
    """The second image is broken, the third only outside of the ball; the first was wrong without an attack."""
    images = np.full((4, 1, 2, 1), 0.5, np.float32)
    x_adv = images + np.float32([0, inside, outside, 0])[:, None, None, None]
    label, clean, attacked = np.array([0, 0, 0, 0]), np.array([1, 0, 0, 0]), np.array([1, 1, 1, 0])
    result = summarise(fake_case(0.1, norm, images), Outcome({}, (8, 4), label, clean, x_adv, attacked))
    assert result["outside"] == 1 and result["robust"] == np.packbits([0, 0, 1, 1]).tobytes().hex()
    assert result["accuracy"] == {"clean": 0.75, "a": 0.5} and result["evaluations"] == {"a": [8, 4]}


@pytest.mark.parametrize("value", [1.001, -0.001, np.nan])
def test_a_point_outside_the_box_is_not_found(value):
    images = np.full((1, 1, 1, 1), 1.0 if value > 0 else 0.0, np.float32)
    outcome = Outcome({}, (1, 1), np.array([0]), np.array([0]), np.full_like(images, value), np.array([1]))
    assert summarise(fake_case(0.1, "linf", images), outcome)["outside"] == 1


def test_networks_that_differ_are_refused(monkeypatch):
    pytest.importorskip("torch", reason=NO_TORCH)
    config = flags.parse(["", *GOLDEN]).config
    assert libraries.logits_difference(config, **OPTIONS)["difference"] < 1e-6
    original = target.digits_torch
    monkeypatch.setattr(
        target, "digits_torch", lambda w, device: original({**w, "dense.bias": w["dense.bias"] + 0.01}, device)
    )
    with pytest.raises(ValueError, match="The logits of the JAX and the PyTorch network differ by 0.01"):
        libraries.logits_difference(config, **OPTIONS)


def test_official_autoattack_runs_one_attack_of_the_standard_version(monkeypatch, one_torch_thread):
    torch = pytest.importorskip("torch", reason=NO_TORCH)
    from experiments.benchmark import libraries_torch

    class AutoAttack:
        def __init__(self, model, **options):
            self.model, self.options, self.square = model, options, types.SimpleNamespace()

        def run_standard_evaluation(self, x, y, batch_size):
            calls.append((self.options, self.attacks_to_run, self.square.n_queries, batch_size))
            torch.autograd.grad(self.model(x.requires_grad_()).sum(), x)
            with torch.no_grad():
                self.model(x)
            return x.detach(), y

    calls = []
    monkeypatch.setattr(libraries, "missing", lambda name: "")
    module = types.SimpleNamespace(AutoAttack=AutoAttack)
    monkeypatch.setattr(libraries_torch, "importlib", types.SimpleNamespace(import_module=lambda name: module))
    task = {"library": "pyautoattack", "attack": "fab-t", "norm": "l1", **STEPS, **OPTIONS, "eps": 1.0}
    run = worker.run("library_attack", GOLDEN, **task)
    options = {"norm": "L1", "eps": 1.0, "seed": 0, "version": "standard", "device": "cpu"}
    assert calls == [(options, ["fab-t"], 20, 500)]
    assert run["evaluations"] == {"fab-t": [32, 16]} and run["accuracy"]["fab-t"] == run["accuracy"]["clean"] > 0.7


def test_differences_beyond_noise_are_marked():
    def run(series, robust):
        bits = np.packbits(np.asarray(robust, bool)).tobytes().hex()
        accuracy, evaluations = {"clean": 1.0, "square": float(np.mean(robust))}, {"square": [3200, 0]}
        rest = {"ms": [1e3], "memory": 1, "compile_seconds": 0.5, "evaluations": evaluations}
        return {"round": 0, "series": series, "robust": bits, "images": 32, "accuracy": accuracy, **rest}

    ours, theirs = "lt_adv square l2", "torchattacks square l2"
    result = {
        "machine": {"cpu": "Some CPU", "cores": 2}, "peak": {"platform": "cpu"}, "versions": {"torchattacks": "3.5.1"},
        "config": {"network": "WRN-16-2", "dtype": "float32", "attack_dtype": "float32"}, "num_steps": 20,
        "trained": False,
        "runs": [run(ours, [0] * 16 + [1] * 16), run(theirs, [1] * 32), {"round": 1, "series": theirs, "error": "-"}],
    }  # fmt: skip
    summary.update(result, {theirs: (ours, theirs)}, {})
    assert result["agreement"][theirs] == {
        "both": 16, "lt_adv": 0, "torchattacks": 16,
        "error": "robust accuracies of lt_adv and torchattacks, 50.00 % and 100.00 %, differ by more than noise",
    }  # fmt: skip
    head, (first, second) = tables.table("libraries", [result])
    assert dict(zip(head, first, strict=True))["Time of lt_adv / library"] == "–"
    assert dict(zip(head, second, strict=True)) == {
        "Device": "2 cores of Some CPU", "Attack": "L2 square", "Library": "torchattacks 3.5.1",
        "Network": "WRN-16-2, untrained", "Images": "32", "Seconds": "1.00", "Time of lt_adv / library": "1.00x",
        "Robust accuracy, %": "100.00 (differs)", "Forward passes per image": "100", "Gradients per image": "0.00",
        "Compile, s": "0.50", "Rounds": "2",
    }  # fmt: skip
    result["runs"] = [{"round": 0, "series": theirs, "error": "out of memory"}]
    summary.update(result, {theirs: (ours, theirs)}, {})
    _, (row,) = tables.table("libraries", [{**result, "agreement": {}}])
    assert row[4:-1] == ["–"] * 7 and summary.errors(result)[-1] == f"{theirs}: out of memory"
