"""The measurement `autoattack`: both frameworks on the same network, the summary and the table."""

import json

import jax
import numpy as np
import pytest

from experiments.benchmark import record, summary, tables, target, timing, worker
from experiments.benchmark.__main__ import main
from lt_adv import data
from lt_adv.cli import flags
from lt_adv.training import checkpoint
from tests.experiments import NO_TORCH
from tests.experiments.test_benchmark import PEAK

DIGITS = "--config=configs/at.py:dataset=digits"
NO_OPTIONS = {"golden": None, "images": None, "workdir": None, "eps": None}


def in_this_process(task, config, environment=None, **options):
    """Replaces `record.launch`, without the time to import jax and torch in a new process."""
    if task == "peak":
        return PEAK
    return json.loads(json.dumps(worker.run(task, config, **json.loads(json.dumps(options)))))


def measured(tmp_path, monkeypatch, *arguments):
    """Returns (record, JAX run, PyTorch run) of a small measurement with a twentieth of the steps."""

    monkeypatch.setattr(record, "launch", in_this_process)
    monkeypatch.setattr("experiments.pytorch_baseline.autoattack.NUM_STEPS", 5)
    assert main(["autoattack", *arguments, "--images=16", "--runs=1", f"--out={tmp_path}", "--name=x"]) == 0
    result = json.loads((tmp_path / "x.json").read_text())
    jax_run, torch_run = result["runs"][:2]
    assert jax_run["images"] == torch_run["images"] == 16 and jax_run["eps"] == torch_run["eps"]
    assert jax_run["accuracy"]["clean"] == torch_run["accuracy"]["clean"] > 0.5, "the same weights and images"
    assert all(entry["jax"] + entry["torch"] <= 4 for entry in result["agreement"].values())
    assert all(ratio["median"] > 0 for ratio in result["ratio"].values())
    return result, jax_run, torch_run


def test_both_attack_a_golden_network(one_torch_thread, short, tmp_path, monkeypatch):
    result, jax_run, torch_run = measured(tmp_path, monkeypatch, "--golden=linear", "--attacks=apgd-ce,apgd-dlr")
    names = ["jax apgd-ce", "torch apgd-ce", "jax apgd-dlr", "torch apgd-dlr"]
    assert [run["series"] for run in result["runs"]] == names, "each alone, in turn"
    forwards, gradients = torch_run["evaluations"]["apgd-ce"]
    assert forwards == gradients == 6 * round(16 * torch_run["accuracy"]["clean"])
    assert 0 < jax_run["evaluations"]["apgd-ce"][0] <= forwards
    assert jax_run["eps"] == 0.15 and result["config"]["network"] == "golden digit network, linear head"
    assert "official" not in result, "it is of all images"


def test_both_attack_the_network_of_a_config(one_torch_thread, tmp_path, monkeypatch, capsys):
    arguments = [DIGITS, "--eps=0.02", "--attacks=square", "--queries=6"]
    result, jax_run, torch_run = measured(tmp_path, monkeypatch, *arguments)
    assert jax_run["eps"] == 0.02 and jax_run["accuracy"]["clean"] == 1 and not result["trained"]
    for run in (jax_run, torch_run):
        forwards, gradients = run["evaluations"]["square"]
        assert 16 <= forwards <= 16 * 7 and gradients == 0
    assert "| WRN-10-1, untrained | 16 | square |" in capsys.readouterr().out


def test_weights_of_a_run_in_both_frameworks(monkeypatch):
    torch = pytest.importorskip("torch", reason=NO_TORCH)
    config = flags.parse(["", DIGITS, "--config.data.split_seed=1"]).config
    first = target.make_target(config, **NO_OPTIONS)
    assert first.label is None, "an untrained network predicts its labels"
    stored = {**jax.tree.map(np.asarray, first.variables), "method_state": {}}
    monkeypatch.setattr(checkpoint, "read_variables", lambda workdir: (stored, {}))
    case = target.make_target(config, **NO_OPTIONS | {"workdir": "run", "images": 20})
    test = data.long_tailed(data.load(config.data), config.data).test
    assert len(case.image) == len(case.label) == 20 and case.eps == 0.1
    np.testing.assert_array_equal(case.label[:2], test.label[[0, len(test) // 20]])
    logits = case.torch("cpu")(torch.from_numpy(case.image.transpose(0, 3, 1, 2).copy()))
    np.testing.assert_allclose(case.apply(case.variables, case.image), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--config.eval.dtype=bfloat16", "config.eval.dtype = 'bfloat16': AutoAttack of the PyTorch baseline supports"),
        ("--config.eval.adjustment.name=logit_adjustment", "config.eval.adjustment.name = 'logit_adjustment'"),
    ],
)
def test_unsupported_config_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        target.make_target(flags.parse(["", DIGITS, change]).config, **NO_OPTIONS)


def test_nested_spans_count_once():
    assert timing.union_length([(5, 6), (0, 4), (1, 2), (3, 4.5)]) == 5.5 and timing.union_length([]) == 0


def test_compile_time_is_measured_apart():
    with timing.compile_spans() as spans:
        jax.jit(lambda x: jax.jit(lambda x: x * 3.125)(x) + 1)(1.0)
    count = len(spans)
    assert count >= 3 and 0 < timing.union_length(spans) <= sum(end - start for start, end in spans) + 1e-9
    jax.jit(lambda x: x * 3.25)(1.0)
    assert len(spans) == count, "the listener is removed"


def runs(jax_robust, torch_robust):
    def run(series, robust):
        bits = np.packbits(np.asarray(robust, bool)).tobytes().hex()
        return {"round": 0, "series": series, "robust": bits, "images": len(robust), "accuracy": {"clean": 1, "a": 0.5}}

    return [run("jax a", jax_robust), run("torch a", torch_robust), {"round": 1, "series": "jax a", "error": "killed"}]


def test_disagreement_beyond_noise_is_an_error():
    near = summary.agreement(runs([1, 1, 0, 1] * 25 + [0], [1, 0, 1, 1] * 25 + [0]), "torch a", "jax a")
    assert near == {"both": 50, "jax": 25, "torch": 25}
    far = summary.agreement(runs([1] * 100, [1] * 90 + [0] * 10), "torch a", "jax a")
    assert far["error"] == "robust accuracies of torch and jax, 90.00 % and 100.00 %, differ by more than noise"
    about = {"peak": {}, "summary": {}, "agreement": {"a": far, "b": near}}
    assert summary.errors(about) == [f"agreement on a: {far['error']}"]
    assert summary.agreement(runs([1], [1])[1:], "torch a", "jax a") == {}


def test_table_row():
    result = {
        "machine": {"cpu": "Some CPU", "cores": 2},
        "peak": {"platform": "cpu"},
        "config": {"network": "WRN-34-10"},
        "trained": True,
        "official": {"a": [0.5, 0.52]},
        "runs": [{**run, "evaluations": {"a": [808, 404]}} for run in runs([1] * 8, [1] * 7 + [0])],
        "summary": {"jax a": {"ms": 12345.6, "compile_cold_seconds": 4.0}, "torch a": {"ms": 25000.0}},
        "ratio": {"a": {"median": 2.0251, "min": 2.0251, "max": 2.0251}},
        "agreement": {"a": {"error": "they differ"}},
    }
    head, (row,) = tables.table("autoattack", [result])
    assert dict(zip(head, row, strict=True)) == {
        "Device": "2 cores of Some CPU",
        "Network": "WRN-34-10",
        "Images": "8",
        "Attacks": "a",
        "JAX, s": "12.3",
        "PyTorch eager, s": "25.0",
        "Speed-up": "2.03x",
        "Robust accuracy, %": "50.00 / 50.00 (differ)",
        "Official": "51.00",
        "Forward passes per image": "101 / 101",
        "Gradients per image": "50.5 / 50.5",
        "Compile, s": "4.00 / –",
        "Rounds": "2",
    }
    result |= {"runs": [{"round": 0, "series": "jax a", "error": "out of memory"}], "summary": {}, "ratio": {"a": None}}
    _, (row,) = tables.table("autoattack", [result])
    assert dict(zip(head, row, strict=True))["Robust accuracy, %"] == "– / – (differ)"
