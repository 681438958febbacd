"""CGRm: loss, gradient and state against formulas in numpy, and the limit that is TRADES."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import cgrm
from lt_adv import losses, methods
from lt_adv.cli.experiment import Experiment
from lt_adv.methods.addons.robustlt import RobustLT
from lt_adv.methods.base import LossOutput, ValidationResult
from lt_adv.methods.cgrm import CGRm
from lt_adv.methods.trades import Trades
from tests.methods.fake_net import FakeNet, make_batch
from tests.training.helpers import run

pytestmark = pytest.mark.usefixtures("float64")

N = np.array([40, 4, 20, 9])  # in no order
LABEL = np.array([0, 1, 2, 3, 1, 0])
INFO = types.SimpleNamespace(class_counts=N, num_classes=4)
SCORE = np.array([0.2, 3.1, 0.9, 1.4])
GRAPH = np.array([[0, 0.5, 0, 2.0], [1.0, 0, 0.3, 0], [0, 0.7, 0, 0], [4.0, 0, 0.1, 0]])


def log_softmax(z):
    return z - np.log(np.exp(z).sum(1, keepdims=True))


def weights(score, gain=1.0):
    w = 1 + gain * score
    w = np.clip(w / w.mean(), 0.25, 3)
    return w / w.mean()


def betas(score, gain=0.5, beta=4.0):
    q = np.clip(1 + gain * (score / score.mean() - 1), 0.5, 2)
    return beta * q / q.mean()


def expected_loss(clean, adv, base, constant=None):
    """The equation of the docstring; `constant` are the clean logits of the KL, which do not vary."""
    w, b, log_n = weights(SCORE)[LABEL], betas(SCORE)[LABEL], np.log(N)
    rows = np.arange(len(LABEL))
    if base == "at":
        value = -np.mean(w * log_softmax(adv + log_n)[rows, LABEL])
    else:
        log_p, log_q = log_softmax(clean if constant is None else constant), log_softmax(adv)
        kl = (np.exp(log_p) * (log_p - log_q)).sum(1)
        value = np.mean(-log_softmax(clean + log_n)[rows, LABEL] + w * b * kl)
    margin = np.maximum(0.5 - adv[rows, LABEL][:, None] + adv, 0)
    return value + 0.05 * np.mean(w * (GRAPH[LABEL] * margin).sum(1))


@pytest.mark.parametrize("fidelity", ["paper", "released_code"])
@pytest.mark.parametrize("base", ["trades", "at"])
def test_loss_and_gradient(base, fidelity):
    """The images are the logits, and their gradient is that of central differences."""
    assert not np.allclose(weights(SCORE), weights(SCORE, 0.5)) and weights(SCORE).max() < 3
    rng = np.random.default_rng(0)
    clean, adv = rng.normal(size=(2, 6, 4))
    method, net = CGRm(base=base, fidelity=fidelity), FakeNet(lambda x: (x, {}), info=INFO)
    state = {"score": jnp.asarray(SCORE), "graph": jnp.asarray(GRAPH)}

    def loss(clean, adv):
        batch = make_batch(image=clean, label=jnp.asarray(LABEL))
        return method.loss(None, net, batch, adv, state, None).loss

    value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(jnp.asarray(clean), jnp.asarray(adv))
    assert float(value) == pytest.approx(expected_loss(clean, adv, base), rel=1e-12)
    constant = clean if fidelity == "released_code" else None
    for argument, gradient in enumerate(gradients):
        for index in np.ndindex(clean.shape):
            inputs, difference = [[clean.copy(), adv.copy()] for _ in (0, 1)], 0.0
            for sign, moved in zip((1, -1), inputs, strict=True):
                moved[argument][index] += sign * 1e-5
                difference += sign * expected_loss(*moved, base, constant)
            assert float(gradient[index]) == pytest.approx(difference / 2e-5, abs=1e-8)


def test_the_forwards_of_the_released_code():
    """With AT a forward of the clean images comes first, in training mode."""
    calls = []
    net = FakeNet(lambda x: (calls.append(float(x[0, 0])) or x, {}), info=INFO)
    batch = make_batch(image=jnp.zeros((6, 4)), label=jnp.asarray(LABEL))
    state = CGRm().init_state(INFO)
    for base, fidelity in (("at", "paper"), ("at", "released_code"), ("trades", "released_code")):
        calls.clear()
        CGRm(base=base, fidelity=fidelity).loss(None, net, batch, jnp.ones((6, 4)), state, None)
        assert calls == ([1.0] if (base, fidelity) == ("at", "paper") else [0.0, 1.0])


def result_of(seed):
    rng = np.random.default_rng(seed)
    confusion = rng.dirichlet(np.full(4, 0.6), size=4)
    return ValidationResult(jnp.asarray(confusion), jnp.asarray(rng.normal(size=(4, 5))))


def expected_state(score, graph, confusion, features, neighbours):
    accuracy = np.diag(confusion)
    raw = np.array([max(accuracy.mean() - a, 0) + 0.5 * (1 - a) for a in accuracy])
    score = 0.8 * score + 0.2 * raw / raw.mean()
    f = [v / np.sqrt((v**2).sum()) for v in features]
    edges = np.zeros((4, 4))
    for i in range(4):
        for j in range(4):
            if i != j:
                edges[i, j] = confusion[i, j] * np.sqrt(N[j] / N.max()) / np.sqrt(((f[i] - f[j]) ** 2).sum())
        edges[i, edges[i] < np.sort(edges[i])[-neighbours]] = 0
    return score, 0.8 * graph + 0.2 * np.minimum(edges / edges[edges > 0].mean(), 5)


@pytest.mark.parametrize("neighbours", [1, 2, 3])
def test_two_rounds_of_feedback(neighbours):
    method = CGRm(neighbours=neighbours)
    state = method.init_state(INFO)
    score, graph = np.ones(4), np.zeros((4, 4))
    for seed in (0, 1):
        result = result_of(seed)
        state = method.feedback(state, result, INFO)
        score, graph = expected_state(score, graph, *map(np.asarray, result), neighbours)
        np.testing.assert_allclose(state["score"], score, rtol=1e-12)
        np.testing.assert_allclose(state["graph"], graph, rtol=1e-12)
    np.testing.assert_allclose(method.class_weights(state["score"]), weights(score), rtol=1e-12)
    np.testing.assert_allclose(method.beta * method.beta_scales(state["score"]), betas(score), rtol=1e-12)


def test_bounds_and_degenerate_results():
    """Both clips and the largest edge; nothing is predicted wrongly, or all images have the same features."""
    method, extreme = CGRm(), np.array([30.0, 0.0, 0.1, 0.1])
    assert (weights(extreme) * np.clip(1, 0.25, 3)).max() < 4 * 30.1 / 34.3 and betas(extreme).max() < 2 * 4 / 0.7
    np.testing.assert_allclose(method.class_weights(jnp.asarray(extreme)), weights(extreme), rtol=1e-12)
    np.testing.assert_allclose(4 * method.beta_scales(jnp.asarray(extreme)), betas(extreme), rtol=1e-12)
    perfect = method.feedback(method.init_state(INFO), ValidationResult(jnp.eye(4), jnp.ones((4, 5))), INFO)
    np.testing.assert_allclose(perfect["score"], 0.8)
    assert not np.any(perfect["graph"])
    same = method.confusion_graph(ValidationResult(jnp.full((4, 4), 0.25), jnp.ones((4, 5))), N)
    assert np.isfinite(same).all() and np.max(same) <= 5


@dataclasses.dataclass(frozen=True)
class BalancedTrades(Trades):
    """TRADES whose natural cross-entropy is the balanced one."""

    beta: float = 4.0

    def loss(self, key, net, batch, x_adv, method_state, progress):
        clean, _ = net(batch.image, train=True)
        logits, _ = net(x_adv, train=True)
        natural = jnp.mean(losses.balanced_softmax(clean, batch.label, class_counts=net.info.class_counts))
        return LossOutput(natural + self.beta * jnp.mean(losses.kl_divergence(clean, logits)), logits)


def test_without_gains_it_is_trades_with_balanced_cross_entropy():
    """Bit for bit, whatever the state."""

    @dataclasses.dataclass(frozen=True)
    class AnyState(CGRm):
        def init_state(self, info):
            return {"score": jnp.asarray(SCORE), "graph": jnp.asarray(GRAPH)}

    gains = {"weight_gain": 0.0, "beta_gain": 0.0, "margin_weight": 0.0}
    (state, rows), (expected, others) = (
        run(method, 1, steps=2) for method in (AnyState(num_steps=2, **gains), BalancedTrades(num_steps=2))
    )
    assert [row["loss"].tobytes() for row in rows] == [row["loss"].tobytes() for row in others]
    for name in ("params", "batch_stats"):
        for a, b in zip(*(jax.tree.leaves(getattr(s, name)) for s in (state, expected)), strict=True):
            assert a.tobytes() == b.tobytes()


def test_the_attack_of_each_base(monkeypatch):
    """AT attacks the balanced cross-entropy from a uniform start, TRADES its KL; RobustLT sets the start of both."""
    seen = {}
    record = lambda self, key, net, batch, y, objective: seen.update(y=y, objective=objective)  # noqa: E731
    monkeypatch.setattr(CGRm, "maximize", record)
    z = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)))
    net = FakeNet(lambda x: (x, {}), info=INFO)
    batch = make_batch(image=z, label=jnp.asarray(LABEL))
    CGRm(base="at").perturb(None, net, batch, None, None)
    np.testing.assert_allclose(
        seen["objective"](z, seen["y"]), -log_softmax(z + np.log(N))[np.arange(6), LABEL], rtol=1e-12
    )
    CGRm().perturb(None, net, batch, None, None)
    np.testing.assert_allclose(seen["y"], np.exp(log_softmax(z)), rtol=1e-12)
    assert CGRm(base="at").attack_start == "uniform" and CGRm().attack_start == "gaussian"
    assert CGRm(base="at", start="zero").attack_start == "zero"
    wrapped = RobustLT(CGRm(feedback_every=7))
    assert wrapped.attack_start == "uniform" and wrapped.feedback_every == 7
    state = CGRm().init_state(INFO)
    feedback = (method.feedback(state, result_of(0), INFO) for method in (wrapped, CGRm()))
    for a, b in zip(*map(jax.tree.leaves, feedback), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="no gradient at the clean image"):
        methods.create({"name": "cgrm"}, attack="fgsm")
    methods.create({"name": "cgrm", "base": "at"}, attack="fgsm")


def test_protocol():
    config = cgrm.get_config("dataset=cifar10")
    (stage,) = Experiment.from_config(config).stages
    assert (stage.epochs, stage.method.feedback_every, config.model.name) == (110, 10, "resnet18")
    assert (stage.method.alpha, stage.method.warmup, stage.method.inner.beta) == (0.3, 0.8, 4.0)
    assert (config.attack.eps, config.attack.step_size, config.attack.num_steps) == (0.031, 0.007, 10)
    assert (config.optim.drop_epochs, config.optim.weight_decay, config.optim.nesterov) == ((100, 105), 5e-4, False)
    assert (config.data.validation_per_class, config.data.validation_from) == (100, "unused")
