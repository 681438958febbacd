"""The default of every hyper-parameter in either fidelity, which an explicit value overrides."""

import dataclasses
import importlib
import json

import jax
import numpy as np
import pytest
from etils import epath
from jax.sharding import Mesh

from lt_adv import methods
from lt_adv.cli import flags, record_header, workdirs
from lt_adv.cli.experiment import Experiment
from lt_adv.methods import base
from lt_adv.methods.reat import REAT
from lt_adv.training import stage_builder
from tests.test_configs import NAMES
from tests.training.helpers import run

FIDELITIES = ("paper", "released_code")
# Values as the papers and their codes have them, or ours where the codes have none. A pair: ours, and the code's.
OPTIONS = {
    "alp": {"beta": 6.0},  # ours: the code has no config for ALP, and its default of 0 is no pairing
    "at": {},
    "at_bsl": {},
    "avmixup": {"gamma": 2.0, "lambda1": 1.0, "lambda2": 0.1},
    "cdt": {"tau": 0.3},
    "cgrm": {
        "base": "trades",
        "beta": 4.0,
        "weight_gain": 1.0,
        "error_weight": 0.5,
        "beta_gain": 0.5,
        "margin_weight": 0.05,
        "margin": 0.5,
        "neighbours": 3,
        "momentum": 0.8,
        "feedback_every": 10,
    },
    "faal": {"radius": 0.5},
    "finetune": {"freeze": "backbone/"},
    "focal": {"gamma": 2.0, "beta": 0.0, "prior_bias": True},
    "ldam": {"max_margin": 0.5, "scale": 1.0, "from_epoch": 1},
    "logit_adjustment": {"tau": 1.0},
    "margin": {"margin": 0.2, "scale": 10.0},
    "mart": {"beta": 5.0},
    "natural": {},
    "reat": {"tail_weight": (0.1, 1.0), "tail_margin": 1.0},  # the margin, ours, is not read in the code's reading
    "reweighting": {"beta": 0.9999, "from_epoch": 1},
    "robal": {"margin": 0.1, "scale": 10.0, "tau_b": 1.2, "tau_m": 0.0, "beta": 6.0},
    "self_distillation": {  # ours: no code could be read
        "teacher_epochs": 30,
        "balance": 0.5,
        "distillation": 1.0,
        "temperature": 1.0,
        "teacher_input": "adversarial",
        "matching": 1.0,
    },
    "taet": {"clean_epochs": 40, "a": 0.1, "b": 0.1, "g": 0.1},
    "tde": {"mu": 0.9},
    "trades": {"beta": 6.0},
}
STARTS = {  # of the attack, (ours, the code's)
    **dict.fromkeys(OPTIONS, ("uniform", "one_sided")),  # RoBal's study
    **dict.fromkeys(("at_bsl", "cgrm", "mart", "taet", "trades"), ("gaussian", "gaussian")),
    **dict.fromkeys(("faal", "natural", "reat", "self_distillation"), ("uniform", "uniform")),
}
# Values of the configs for CIFAR-10 that differ from the default of the method.
CONFIGS = {
    "class_balanced_focal": {"beta": 0.9999, "prior_bias": False},
    "deferred_margin": {"from_epoch": 40},
    "deferred_reweighting": {"from_epoch": 40},
    "finetune_reweighting": {"beta": 0.9999, "prior_bias": False},
    "lt_adv": {"matching": 2.0},
    "lws": {"freeze": "backbone/|head/kernel"},
}


def get(name, fidelity="paper", arguments="dataset=cifar10"):
    config = importlib.import_module(f"configs.{name}").get_config(arguments)
    config.fidelity = fidelity
    return config


def values(method):
    shared = {f.name for f in dataclasses.fields(base.Method)}
    return {f.name: getattr(method, f.name) for f in dataclasses.fields(method) if f.name not in shared}


def expected(name, fidelity):
    number = FIDELITIES.index(fidelity)
    return {k: v[number] if isinstance(v, tuple) else v for k, v in OPTIONS[name].items()}


def test_the_table_is_complete():
    assert set(OPTIONS) == set(methods.names())


@pytest.mark.parametrize("fidelity", FIDELITIES)
@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_a_method(name, fidelity):
    method = methods.create({"name": name}, fidelity=fidelity)
    assert values(method) == expected(name, fidelity) == values(type(method)(fidelity=fidelity))
    assert method.attack_start == STARTS[name][FIDELITIES.index(fidelity)]


@pytest.mark.parametrize("fidelity", FIDELITIES)
@pytest.mark.parametrize("name", NAMES)
def test_options_of_a_config(name, fidelity):
    """No config sets a hyper-parameter that depends on the fidelity."""
    config = get(name, fidelity)
    method = Experiment.from_config(config).method
    assert values(method) == {**expected(config.method.name, fidelity), **CONFIGS.get(name, {})}


@pytest.mark.parametrize("fidelity", FIDELITIES)
@pytest.mark.parametrize("weight", [0.1, 0.5, 1.0, 0.0])
def test_a_value_that_is_given_holds_in_either_fidelity(weight, fidelity):
    """Also if it equals a default, and from the command line."""
    command = ["", "--config=configs/reat.py:dataset=digits", f"--config.method.tail_weight={weight}"]
    config = flags.parse([*command, f"--config.fidelity={fidelity}"]).config
    assert Experiment.from_config(config).method.tail_weight == weight
    assert methods.create({"name": "reat", "tail_weight": weight}, fidelity=fidelity).tail_weight == weight
    assert REAT(tail_weight=weight, fidelity=fidelity).tail_weight == weight


def test_none_is_allowed_for_options_with_two_defaults():
    assert methods.create({"name": "reat", "tail_weight": None}, fidelity="released_code").tail_weight == 1
    with pytest.raises(ValueError, match=r"config\.method\.tail_weight must be of type float, not '1'"):
        methods.create({"name": "reat", "tail_weight": "1"})
    with pytest.raises(ValueError, match=r"config\.method\.tail_margin must be of type float, not None"):
        methods.create({"name": "reat", "tail_margin": None})


def test_report_and_saved_config(tmp_path):
    """The report has the value; config.json has None, and the fidelity that decides it."""
    for fidelity, weight in (("paper", "0.1"), ("released_code", "1")):
        config = get("reat", fidelity)
        described = f"reat (tail_margin 1, tail_weight {weight})"
        assert record_header.describe_method(Experiment.from_config(config)) == described
        config.addons = ("awp",)
        assert record_header.describe_method(Experiment.from_config(config)) == f"{described} + awp (gamma 0.005)"
        workdir = tmp_path / fidelity
        with workdirs.claim(config, epath.Path(workdir)):
            saved = json.loads((workdir / "config.json").read_text())
        assert saved["method"]["tail_weight"] is None and saved["fidelity"] == fidelity


@pytest.mark.usefixtures("float64")
def test_reat_trains_with_the_weight_of_the_fidelity():
    for fidelity, weight in (("paper", 0.1), ("released_code", 1.0)):
        (row,) = run(REAT(num_steps=1, fidelity=fidelity), 1, steps=1)[1]
        assert row["loss"] == pytest.approx(row["loss_balanced"] + weight * row["loss_tail"], rel=1e-12)
        assert abs(row["loss_tail"]) > 1e-6


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("name", ["resampling", "finetune_resampling", "lws"])
def test_class_aware_rows_sample_in_cycles_in_the_released_code(name, streamed):
    """Each of ten classes 5 to 8 times in a batch of 64, where independent draws leave that to chance."""
    for fidelity in FIDELITIES:
        config = get(name, fidelity, "dataset=digits")
        config.data.max_device_gib = 0.0 if streamed else 8.0
        mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
        built = stage_builder.build(Experiment.from_config(config, mesh=mesh).resolved_stages[0], mesh)
        with built.pipeline.batches(0, 8) as batches:  # a resident set has the labels of a block of steps
            labels = [np.asarray(b["label"]) if streamed else np.asarray(b["label"])[n] for n, b in enumerate(batches)]
        counts = np.stack([np.bincount(label.ravel(), minlength=10) for label in labels])
        assert (counts.min() >= 5 and counts.max() <= 8) == (fidelity == "released_code")
