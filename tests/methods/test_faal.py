"""FAAL: the loss of a batch against the equation, its limit, and its protocol."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import faal
from lt_adv import losses
from lt_adv.cli import schema
from lt_adv.cli.experiment import Experiment
from lt_adv.methods import base
from lt_adv.methods.at import AT
from lt_adv.methods.faal import FAAL
from lt_adv.training import stage_builder
from tests.methods.fake_net import FakeNet
from tests.training.helpers import COUNTS, assert_same, run

pytestmark = pytest.mark.usefixtures("float64")

LABEL = np.array([0, 0, 0, 0, 1, 1, 3, 3, 3])  # no image of class 2
LOGITS = np.random.default_rng(0).normal(size=(9, 4))
INFO = base.DataInfo(class_counts=COUNTS, steps_per_epoch=2, epochs=2, image_shape=(3, 3, 1), num_features=4)


def by_hand(released):
    """(class values that the weights maximize, cross-entropies)"""
    q = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)
    rows = np.arange(len(LABEL))
    margin = np.array([max(q[i, j] for j in range(4) if j != LABEL[i]) - q[i, LABEL[i]] for i in rows])
    values = [margin[c == LABEL].mean() if c in LABEL else -1.0 for c in range(4)]
    if released:
        values = [margin[c == LABEL].sum() for c in range(4)]
    return np.array(values), -np.log(q[rows, LABEL])


def loss(method, logits, calls=None):
    def forward(x):
        if calls is not None:
            calls.append(x)
        return logits, {}

    ones = jnp.ones(9)
    batch = base.Batch("x", jnp.asarray(LABEL), jnp.arange(9), ones, ones)
    return method.loss(None, FakeNet(forward, info=INFO), batch, "x_adv", {}, None)


@pytest.mark.parametrize("fidelity", ["paper", "released_code"])
def test_loss_and_gradient(fidelity):
    values, ce = by_hand(fidelity == "released_code")
    p = np.asarray(losses.worst_distribution(values, radius=0.5))
    calls = []
    method = FAAL(fidelity=fidelity)
    out = loss(method, jnp.asarray(LOGITS), calls)
    assert calls == (["x_adv"] if fidelity == "paper" else ["x_adv", "x"])
    np.testing.assert_allclose(out.loss, np.sum(ce * p[LABEL]) * 4 / 9, rtol=1e-12)
    np.testing.assert_allclose(out.metrics["loss_unweighted"], ce.mean(), rtol=1e-12)
    np.testing.assert_allclose(out.metrics["largest_class_weight"], 4 * p.max(), rtol=1e-12)
    gradient = jax.grad(lambda z: loss(method, z).loss)(jnp.asarray(LOGITS))  # the weights are constants
    q = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)
    np.testing.assert_allclose(gradient, (q - np.eye(4)[LABEL]) * p[LABEL][:, None] * 4 / 9, rtol=1e-9, atol=1e-15)


def test_the_worst_class_has_the_largest_weight_and_an_absent_one_the_smallest():
    p = np.asarray(losses.worst_distribution(by_hand(False)[0], radius=0.5))
    accuracies = [np.mean(LOGITS[c == LABEL].argmax(-1) == c) if c in LABEL else 2 for c in range(4)]
    assert np.argmax(p) == np.argmin(accuracies) and np.argmin(p) == 2


def test_radius_0_is_at_bit_for_bit():
    (state, rows), (expected, others) = run(FAAL(num_steps=2, radius=0.0), 1), run(AT(num_steps=2), 1)
    assert_same(state.params, expected.params, 0)
    assert_same([row["loss"] for row in rows], [row["loss"] for row in others], 0)
    shifted, _ = run(FAAL(num_steps=2), 1)
    with pytest.raises(AssertionError):
        assert_same(shifted.params, expected.params, 1e-3)


def test_protocol():
    """Two epochs, at 0.01 and 0.001, of all parameters, from the run of configs/at.py."""
    experiment = Experiment.from_config(faal.get_config("dataset=cifar10"))
    (stage,) = experiment.stages
    assert (stage.init, stage.freeze, stage.freeze_batch_stats) == ("workdirs/at-dataset=cifar10", None, False)
    config = schema.stage_config(experiment.config, stage)
    schedule = stage_builder.learning_rate(config, stage, 3)
    np.testing.assert_allclose([float(schedule(step)) for step in range(6)], [0.01] * 3 + [0.001] * 3, rtol=1e-6)
    assert (stage.method.radius, stage.method.num_steps, stage.method.attack_start) == (0.5, 10, "uniform")
    assert dataclasses.replace(stage.method, fidelity="released_code").attack_start == "uniform"
    config = faal.get_config("dataset=digits,baseline=elsewhere,epochs=1")
    assert config.init_from == "elsewhere" and config.optim.drop_epochs == (2,)
    config.init_from = ""
    with pytest.raises(ValueError, match="config.init_from is missing: method faal"):
        Experiment.from_config(config)
