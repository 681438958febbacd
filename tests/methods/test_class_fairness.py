"""DAFA and CFA: state, radius and loss against the equations, limits, and composition with other add-ons."""

import dataclasses
import json
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from configs import at, taet
from lt_adv import attacks, data
from lt_adv.cli.experiment import Experiment
from lt_adv.methods import addons, base
from lt_adv.methods.addons.awp import AWP
from lt_adv.methods.addons.cfa import CFA
from lt_adv.methods.addons.dafa import DAFA, class_weights
from lt_adv.methods.addons.robustlt import RobustLT, class_radii
from lt_adv.methods.at import AT
from lt_adv.methods.mart import Mart
from lt_adv.methods.natural import Natural
from lt_adv.methods.reat import REAT
from lt_adv.methods.taet import TAET
from lt_adv.methods.tde import TDE
from lt_adv.methods.trades import Trades
from lt_adv.training import checkpoint, loop, sharding
from tests.methods.fake_net import FakeNet
from tests.training.helpers import COUNTS, assert_same, run

pytestmark = pytest.mark.usefixtures("float64")

RELEASED = "released_code"
RNG = np.random.default_rng(8)
B, C, EPS, STEP = 12, 4, 0.1, 0.03
PARAMS = RNG.normal(size=(9, C))
INFO = base.DataInfo(class_counts=COUNTS, steps_per_epoch=2, epochs=4, image_shape=(3, 3, 1), num_features=9)
W = np.array([0.6, 0.9, 1.2, 1.5])  # any class weights


def forward(x):
    return jnp.tanh(2 * x.reshape(len(x), -1) - 1) @ PARAMS, {}


NET = FakeNet(forward, info=INFO)


def progress(epoch, epochs=4):
    return base.TrainProgress(jnp.asarray(2 * epoch), jnp.asarray(epoch), steps_per_epoch=2, epochs=epochs)


def batch_of(seed, label=None):
    """(batch, x_adv, its logits)"""
    rng = np.random.default_rng(seed)
    x, x_adv = rng.uniform(0.2, 0.8, (2, B, 3, 3, 1))
    label = rng.integers(0, C, B) if label is None else np.asarray(label)
    ones = jnp.ones(B)
    batch = base.Batch(jnp.asarray(x), jnp.asarray(label), jnp.arange(B), eps=EPS * ones, step_size=STEP * ones)
    return batch, jnp.asarray(x_adv), np.asarray(forward(x_adv)[0])


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def cross_entropy(z, label):
    return -np.log(softmax(z))[np.arange(len(label)), label]


def keys():
    return jax.random.split(jax.random.key(6), B)


@dataclasses.dataclass(frozen=True)
class Sizes(AT):
    """Its adversarial examples are the radii and step sizes that the attack would use."""

    def perturb(self, key, net, batch, method_state, progress):
        return jnp.stack([batch.eps, batch.step_size])


def with_state(method, **entries):
    return {**method.init_state(INFO), **{name: jnp.asarray(value) for name, value in entries.items()}}


# --- DAFA


def weights_by_hand(s, scale, released=False):
    """The equation of the docstring, pair by pair; `released` as the double loop of the code."""
    w = np.ones(len(s))
    for i in range(len(s)):
        for j in set(range(len(s))) - {i}:
            if s[i, i] < s[j, j]:
                w[i] += scale * s[i, j] * s[j, j]
            elif released:
                w[i] -= scale * s[i, j] * s[j, j]
            elif s[j, j] < s[i, i]:
                w[i] -= scale * s[j, i] * s[i, i]
    return w


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1.5])
def test_class_weights(scale, released):
    s = softmax(np.random.default_rng(9).normal(size=(6, 6)) + 3 * np.eye(6))
    w = class_weights(jnp.asarray(s), scale, 0.1, released=released)
    np.testing.assert_allclose(w, weights_by_hand(s, scale, released), rtol=1e-12)
    if scale == 0:
        np.testing.assert_array_equal(w, 1)
    elif not released:
        assert np.sum(w) == pytest.approx(6) and w[np.argmin(np.diag(s))] > 1 > w[np.argmax(np.diag(s))]


def test_the_scale_is_reduced_where_a_weight_would_be_too_small():
    """A long tail: all rare classes are mistaken for the frequent one, whose weight by the equation is negative."""
    s = np.full((10, 10), 0.02)
    s[:, 0], s[0] = 0.7, 0.02
    s[np.diag_indices(10)] = 0.12
    s[0, 0] = 0.82
    w = weights_by_hand(s, 1.0)
    assert w[0] < 0
    reduced = np.asarray(class_weights(jnp.asarray(s), 1.0, 0.4))
    np.testing.assert_allclose(reduced, 1 + 0.6 / (1 - w[0]) * (w - 1), rtol=1e-12)
    assert reduced.min() == pytest.approx(0.4) and reduced.sum() == pytest.approx(10)
    np.testing.assert_array_equal(class_weights(jnp.full((3, 3), 1 / 3), 1.0, 0.4), 1)  # equally hard


def test_weights_are_those_of_one_epoch():
    """Epochs 0 to 3, two steps each; the second epoch is the last without weights."""
    method = DAFA(AT(), epoch=0.5)
    state, seen = method.init_state(INFO), {}
    for epoch in range(4):
        for step in range(2):
            batch, x_adv, z = batch_of(10 * epoch + step)
            state = method.loss(None, NET, batch, x_adv, state, progress(epoch)).method_state
            seen.setdefault(epoch, []).append((softmax(z), np.asarray(batch.label)))
        if epoch < 2:
            np.testing.assert_array_equal(state["dafa_weight"], 1)
        state = method.epoch_end(state, progress(epoch))
        if epoch >= 1:
            probabilities, label = (np.concatenate(part) for part in zip(*seen[1], strict=True))
            s = np.stack([probabilities[label == c].mean(0) for c in range(C)])
            np.testing.assert_allclose(state["dafa_weight"], weights_by_hand(s, 1.0), rtol=1e-12)
    assert np.ptp(state["dafa_weight"]) > 0.05


@pytest.mark.parametrize(
    ("fraction", "epochs", "last"), [(7 / 11, 110, 69), (7 / 11, 10, 5), (0.0, 10, 0), (0.5, 1, 0)]
)
def test_epoch_is_a_fraction(fraction, epochs, last):
    """The code computes the weights after epoch 70, counted from 1, of 110."""
    assert DAFA(AT(), epoch=fraction)._last_epoch(progress(0, epochs)) == last


def test_dafa_scales_radius_and_step():
    batch, *_ = batch_of(0)
    method = DAFA(Sizes())
    eps, step = method.perturb(None, NET, batch, with_state(method, dafa_weight=W), progress(3))
    np.testing.assert_allclose(eps, EPS * W[batch.label], rtol=1e-12)
    np.testing.assert_allclose(step, STEP * W[batch.label], rtol=1e-12)


def divergence(batch, z):
    p, q = softmax(np.asarray(forward(batch.image)[0])), softmax(z)
    return np.sum(p * np.log(p / q), -1)


def test_dafa_weighs_the_cross_entropy():
    batch, x_adv, z = batch_of(1)
    label = np.asarray(batch.label)
    for inner, expected in (
        (AT(), np.mean(W[label] * cross_entropy(z, label))),
        (
            Trades(beta=2.0),
            np.mean(W[label] * cross_entropy(np.asarray(forward(batch.image)[0]), label) + 2 * divergence(batch, z)),
        ),
    ):
        method = DAFA(inner)
        out = method.loss(None, NET, batch, x_adv, with_state(method, dafa_weight=W), progress(3))
        np.testing.assert_allclose(out.loss, expected, rtol=1e-12)


def test_the_attack_of_the_released_code():
    """The second, unweighted step of every iteration, for AT only; a step of 2 a where the weight is 1."""
    batch, *_ = batch_of(2)
    x, label = np.asarray(batch.image), np.asarray(batch.label)
    start = x + np.random.default_rng(3).uniform(-0.001, 0.001, x.shape)
    batch = dataclasses.replace(batch, x_init=jnp.asarray(start))
    method = DAFA(AT(num_steps=5, fidelity=RELEASED))
    gradient = jax.grad(lambda x: jnp.sum(attacks.cross_entropy(forward(x)[0], batch.label)))
    weight = W[label][:, None, None, None]
    expected = start
    for _ in range(5):
        sign = np.sign(gradient(jnp.asarray(expected)))
        expected = np.clip(expected + weight * STEP * sign, x - weight * EPS, x + weight * EPS)
        expected = np.clip(expected + STEP * sign, x - EPS, x + EPS)
        expected = np.clip(expected, 0, 1)
    x_adv = method.perturb(keys(), NET, batch, with_state(method, dafa_weight=W), progress(3))
    np.testing.assert_allclose(x_adv, expected, rtol=0, atol=1e-12)

    before = method.perturb(keys(), NET, batch, method.init_state(INFO), progress(0))
    double = dataclasses.replace(batch, step_size=2 * batch.step_size)
    np.testing.assert_allclose(before, AT(num_steps=5).perturb(keys(), NET, double, {}, None), rtol=0, atol=1e-12)

    assert method.attack_start == "gaussian" and DAFA(AT()).attack_start == "uniform"
    for other in (DAFA(Trades(fidelity=RELEASED)), DAFA(AT(fidelity=RELEASED, attack="n_fgsm"))):
        assert not other._has_released_attack
    free = dataclasses.replace(batch, x_init=None)
    drawn = method.perturb(keys(), NET, free, method.init_state(INFO), progress(0))
    assert np.all(np.isfinite(drawn)) and np.abs(drawn - x).max() <= EPS + 1e-12


# --- CFA


@pytest.mark.parametrize("fidelity", ["paper", RELEASED])
def test_accuracy_of_the_last_epoch(fidelity):
    method = CFA(AT(fidelity=fidelity))
    state = method.init_state(INFO)
    accuracy = np.zeros(C)
    for epoch in range(3):
        correct, label = [], []
        for step in range(2):
            present = np.arange(B) % (C - (epoch == 2))  # no image of the last class in the last epoch
            batch, x_adv, z = batch_of(20 * epoch + step, present)
            state = method.loss(None, NET, batch, x_adv, state, progress(epoch)).method_state
            np.testing.assert_allclose(state["cfa_accuracy"], accuracy, rtol=1e-12)
            correct.append(z.argmax(-1) == present)
            label.append(present)
        state = method.epoch_end(state, progress(epoch))
        correct, label = np.concatenate(correct), np.concatenate(label)
        hits, n = np.bincount(label, correct, C), np.bincount(label, minlength=C)
        accuracy = np.where(n > 0, hits / np.maximum(n, 1), accuracy)
        if fidelity == RELEASED:
            accuracy = C * hits / len(label)
        np.testing.assert_allclose(state["cfa_accuracy"], accuracy, rtol=1e-12)
        assert not state["cfa_correct"].any() and not state["cfa_count"].any()
    assert np.ptp(accuracy) > 0.1


ACCURACY = np.array([0.9, 0.5, 0.2, 0.0])


@pytest.mark.parametrize(("begin", "epochs", "first"), [(0.05, 200, 10), (0.05, 4, 1), (0.5, 4, 2), (0.0, 4, 1)])
def test_cfa_scales_the_radius_from_begin_on(begin, epochs, first):
    batch, *_ = batch_of(0)
    method = CFA(Sizes(), lambda_1=0.3, begin=begin)
    for epoch, factor in ((first - 1, np.ones(C)), (first, 0.3 + ACCURACY)):
        state = with_state(method, cfa_accuracy=ACCURACY)
        eps, step = method.perturb(None, NET, batch, state, progress(epoch, epochs))
        np.testing.assert_allclose(eps, EPS * factor[batch.label], rtol=1e-12)
        np.testing.assert_allclose(step, STEP, rtol=1e-12)


def test_cfa_starts_in_the_ball_of_the_class():
    batch, *_ = batch_of(0)
    method = CFA(AT(num_steps=0))
    x_adv = method.perturb(keys(), NET, batch, with_state(method, cfa_accuracy=ACCURACY), progress(2))
    bare = AT(num_steps=0).perturb(keys(), NET, batch, {}, None)
    factor = (0.5 + ACCURACY)[batch.label][:, None, None, None]
    np.testing.assert_allclose(x_adv - batch.image, factor * (bare - batch.image), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("epoch", [0, 2])
def test_cfa_weighs_both_terms_of_trades(epoch):
    batch, x_adv, z = batch_of(3)
    label = np.asarray(batch.label)
    method = CFA(Trades(beta=3.0), lambda_2=0.4)
    factor = (0.4 + ACCURACY[label]) if epoch else np.ones(B)
    b = factor * 3 / (1 + factor * 3)
    natural = cross_entropy(np.asarray(forward(batch.image)[0]), label)
    out = method.loss(None, NET, batch, x_adv, with_state(method, cfa_accuracy=ACCURACY), progress(epoch))
    np.testing.assert_allclose(out.loss, np.mean((1 - b) * natural + b * divergence(batch, z)), rtol=1e-12)


def test_cfa_leaves_the_loss_of_other_methods():
    batch, x_adv, _ = batch_of(4)
    for inner in (AT(), Mart()):
        method = CFA(inner)
        out = method.loss(None, NET, batch, x_adv, with_state(method, cfa_accuracy=ACCURACY), progress(2))
        np.testing.assert_array_equal(out.loss, inner.loss(None, NET, batch, x_adv, {}, progress(2)).loss)
    assert type(CFA(AWP(Trades())).innermost) is Trades


# --- both


@pytest.mark.parametrize("method", [DAFA(REAT(num_steps=1), scale=0.0, epoch=0.3), CFA(REAT(num_steps=1), begin=1.0)])
def test_limits_are_the_inner_method_bit_for_bit(method):
    """And the state of the inner method is its own."""
    (state, rows), (expected, others) = run(method, 1), run(method.inner, 1)
    for field in ("params", "batch_stats", "opt_state", "metric_sums"):
        assert_same(getattr(state, field), getattr(expected, field), 0)
    assert_same(rows, others, 0)
    _, inner = method.split_state(state.method_state)
    assert_same(inner, expected.method_state, 0)
    own = sum(np.ptp(value) > 0 for name, value in state.method_state.items() if name not in inner)
    assert own > 0, "the add-on has seen something"


@pytest.mark.parametrize("order", [("robustlt", "dafa", "cfa"), ("cfa", "robustlt", "dafa", "awp")])
def test_factors_of_the_radius_multiply(order):
    batch, *_ = batch_of(5)
    options = {"robustlt": {"alpha": 0.3, "warmup": 0.0}, "dafa": {}, "cfa": {}, "awp": {}}
    method = addons.wrap(Sizes(), order, options)
    state = with_state(method, dafa_weight=W, cfa_accuracy=ACCURACY)
    eps, step = method.perturb(keys(), NET, batch, state, progress(3))
    factor = class_radii(COUNTS, 0.3) * W
    np.testing.assert_allclose(step, STEP * factor[batch.label], rtol=1e-12)
    np.testing.assert_allclose(eps, EPS * (factor * (0.5 + ACCURACY))[batch.label], rtol=1e-12)


def test_weights_of_both_multiply():
    batch, x_adv, _ = batch_of(6)
    label = np.asarray(batch.label)
    method = DAFA(CFA(Trades(beta=0.0)))
    state = with_state(method, dafa_weight=W, cfa_accuracy=ACCURACY)
    out = method.loss(None, NET, batch, x_adv, state, progress(3))
    natural = cross_entropy(np.asarray(forward(batch.image)[0]), label)
    np.testing.assert_allclose(out.loss, np.mean(W[label] * natural), rtol=1e-12)  # beta = 0: b = 0


def test_states_do_not_meet():
    method = addons.wrap(TDE(), ("dafa", "awp", "cfa"), {"dafa": {}, "awp": {}, "cfa": {}})
    state = method.init_state(INFO)
    assert {"feature_mean", "dafa_weight", "cfa_accuracy"} <= set(state), "adjustments read the state of the method"
    assert set(method.inner.inner.split_state(state)[0]) == {"probabilities", "count", "weight"}
    leaves = jax.tree.leaves(state)
    assert len({id(leaf) for leaf in leaves}) == len(leaves), "the step donates every array of its state"


def test_stages_without_an_attack_are_not_wrapped():
    config = taet.get_config("dataset=cifar10")
    config.addons = ("robustlt", "dafa", "cfa", "awp")
    clean, adversarial = Experiment.from_config(config).stages
    assert type(clean.method) is AWP and type(clean.method.inner) is Natural
    chain = [adversarial.method]
    while isinstance(chain[-1], addons.base.AddOn):
        chain.append(chain[-1].inner)
    assert [type(method) for method in chain] == [AWP, CFA, DAFA, RobustLT, TAET]
    for addon in (DAFA, CFA, RobustLT):
        with pytest.raises(ValueError, match="changes the training attack, and config.method has none"):
            addon(Natural())


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit(tmp_path, capsys):
    """From the checkpoint of the epoch whose probabilities give the weights."""
    with jax.enable_x64(False):
        config = at.get_config("dataset=digits,epochs=3")
        config.addons = ("dafa", "cfa")
        config.dafa.epoch, config.attack.num_steps, config.checkpoint.every_epochs = 0.34, 1, 1
        parts = {"dataset": data.load(config.data), "mesh": sharding.make_mesh(jax.devices()[:1])}
        train = partial(_train, config, parts)
        train(tmp_path / "whole")
        shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
        (folder,) = (tmp_path / "resumed" / "checkpoints").iterdir()
        last = max((d for d in folder.iterdir() if d.name.isdigit()), key=lambda d: int(d.name))
        shutil.rmtree(last)
        capsys.readouterr()
        train(tmp_path / "resumed")
        assert "Resumed" in capsys.readouterr().out
        (whole, _), (resumed, _) = (checkpoint.read_variables(tmp_path / name) for name in ("whole", "resumed"))
    assert_same(resumed, whole, 0)
    assert np.ptp(whole["method_state"]["dafa_weight"]) > 0 and np.ptp(whole["method_state"]["cfa_accuracy"]) > 0
    logs = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "resumed")]
    assert logs[0] == logs[1] and len([json.loads(line) for line in logs[0].splitlines()]) >= 3


def _train(config, parts, workdir):
    experiment = Experiment.from_config(config, **parts)
    loop.train(experiment.resolved_stages, epath.Path(workdir), experiment.mesh, [])
