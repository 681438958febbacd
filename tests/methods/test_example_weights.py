"""Every method multiplies the cross-entropy of each example by `Batch.weight`, and no other term of its loss."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from lt_adv import losses, methods
from lt_adv.methods import base
from tests.methods.fake_net import FakeNet
from tests.training.helpers import COUNTS

pytestmark = pytest.mark.usefixtures("float64")

N = COUNTS.astype(float)
RNG = np.random.default_rng(2)
B, D = 12, 9
X, X_ADV = RNG.uniform(0.1, 0.9, (2, B, 3, 3, 1))
LABEL = np.array([0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 0])
PARAMS = RNG.normal(size=(D, 4))
WEIGHT = RNG.uniform(0, 2, B)
KEYS = jax.random.split(jax.random.key(5), B)
INFO = base.DataInfo(class_counts=COUNTS, steps_per_epoch=2, epochs=3, image_shape=(3, 3, 1), num_features=D)
PROGRESS = base.TrainProgress(jnp.asarray(2), jnp.asarray(1), steps_per_epoch=2, epochs=3)


def features(x):
    return jnp.tanh(2 * x.reshape(len(x), -1) - 1)


def log_p(z):
    return z - jnp.log(jnp.exp(z).sum(-1, keepdims=True))


def ce(z):
    return -log_p(z)[jnp.arange(B), LABEL]


def boosted(z):
    q = jnp.exp(log_p(z))
    return ce(z) - jnp.log(1 - q.at[jnp.arange(B), LABEL].set(0).max(-1))


def sigmoid_focal(z, gamma=2):
    p = jnp.where(LABEL[:, None] == jnp.arange(4), jax.nn.sigmoid(z), 1 - jax.nn.sigmoid(z))
    return jnp.sum(-((1 - p) ** gamma) * jnp.log(p), -1)


def of_mixture(params, weight):
    m = jax.vmap(lambda k: jax.random.uniform(k, dtype=float))(KEYS)
    x = jnp.clip(X + (1 - m)[:, None, None, None] * 2 * (X_ADV - X), 0, 1)
    confidence = (m + 0.1 * (1 - m))[:, None]
    target = jnp.where(LABEL[:, None] == jnp.arange(4), confidence, (1 - confidence) / 3)
    return jnp.mean(weight * -jnp.sum(target * log_p(features(x) @ params), -1))


def equalised(params, weight):
    values = weight * ce(features(X_ADV) @ params)
    means = jnp.stack([values[c == LABEL].mean() for c in range(4)])
    return 0.1 * means.mean() + 0.1 * means.var() + 0.1 * ((means / means.sum()) ** 2).sum()


def worst_classes(params, weight):
    """The class weights are a constant for the gradient, at `PARAMS`."""
    z = features(X_ADV) @ params
    q = np.asarray(jnp.exp(log_p(features(X_ADV) @ PARAMS)))
    others = np.where(LABELS, 0, q)
    margin = others.max(-1) - q[np.arange(B), LABEL]
    p = losses.worst_distribution([margin[c == LABEL].mean() for c in range(4)], radius=0.5)
    return 4 * jnp.mean(weight * p[LABEL] * ce(z))


def adversarial(term):
    """The mean of `term` (logits of x_adv), each times its weight."""
    return lambda params, weight: jnp.mean(weight * term(features(X_ADV) @ params))


def clean(params, weight):
    return jnp.mean(weight * ce(features(X) @ params))


LABELS = np.eye(4)[LABEL]
EFFECTIVE = ((1 - 0.9999) / (1 - 0.9999**N))[LABEL]
# Method -> the part of the loss that has the weight; all others have the cross-entropy of x_adv.
WEIGHTED = {
    "natural": clean,
    "trades": clean,
    "cgrm": lambda params, weight: jnp.mean(weight * ce(features(X) @ params + jnp.log(N))),
    "mart": adversarial(boosted),
    "avmixup": of_mixture,
    "taet": equalised,
    "faal": worst_classes,
    "cdt": adversarial(lambda z: ce(z / (N.max() / N) ** 0.3)),
    "focal": adversarial(sigmoid_focal),
    "ldam": adversarial(lambda z: ce(z - 0.5 * (N.min() / N) ** 0.25 * LABELS)),
    "margin": adversarial(lambda z: ce(10 * (z - 0.2 * LABELS))),
    "robal": adversarial(lambda z: ce(10 * (z - 0.1 * LABELS) + 1.2 * jnp.log(N / N.sum()))),
    "reweighting": adversarial(lambda z: B * EFFECTIVE / EFFECTIVE.sum() * ce(z)),
} | dict.fromkeys(
    ("at_bsl", "reat", "self_distillation", "logit_adjustment"), adversarial(lambda z: ce(z + jnp.log(N)))
)


def stages():
    config = common.get("digits", epochs=200, drop_epochs=(150,), of=200)
    config.init_from = "a finished run"
    for name in methods.names():
        for stage in methods.create({"name": name}).stages(config):
            if stage.name != "clean":  # of TAET: natural
                yield pytest.param(name, stage, id=name if stage.name == "train" else f"{name}-{stage.name}")


def loss_of(method, teacher=None, divergence_weight=None):
    """(params, weight or None) -> the loss of the method."""

    def loss(params, weight):
        def forward(x):
            return features(x) @ params, {"features": features(x) + jnp.sum(params) / 10}

        ones = jnp.ones(B)
        batch = base.Batch(jnp.asarray(X), jnp.asarray(LABEL), jnp.arange(B), 0.1 * ones, 0.1 * ones)
        batch = dataclasses.replace(batch, weight=weight, divergence_weight=divergence_weight)
        net = FakeNet(forward, info=INFO, teacher=teacher)
        return method.loss(KEYS, net, batch, jnp.asarray(X_ADV), method.init_state(INFO), PROGRESS).loss

    return loss


@pytest.mark.parametrize(("name", "stage"), list(stages()))
def test_the_gradient_follows_the_weight(name, stage):
    teacher = (lambda x: (features(x) @ PARAMS[::-1], {})) if stage.teacher else None
    loss, expected = loss_of(stage.method, teacher), WEIGHTED.get(name, adversarial(ce))
    np.testing.assert_allclose(loss(PARAMS, jnp.ones(B)), loss(PARAMS, None), rtol=1e-14)

    def difference(f):
        """(value, gradient) of the change that the weights make."""
        return jax.value_and_grad(lambda params: f(params, WEIGHT) - f(params, jnp.ones(B)))(jnp.asarray(PARAMS))

    (value, gradient), (expected_value, expected_gradient) = difference(loss), difference(expected)
    assert np.abs(expected_gradient).max() > 1e-3
    np.testing.assert_allclose(value, expected_value, rtol=1e-9)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-8, atol=1e-10)


def test_the_divergence_of_trades_has_its_own_weight():
    method = methods.create({"name": "trades", "beta": 3.0})

    def kl(params):
        p, q = (log_p(features(x) @ params) for x in (X, X_ADV))
        return jnp.sum(jnp.exp(p) * (p - q), -1)

    def expected(params):
        return clean(params, jnp.ones(B)) + 3 * jnp.mean(WEIGHT * kl(params))

    loss = loss_of(method, divergence_weight=WEIGHT)
    value, gradient = jax.value_and_grad(lambda params: loss(params, None))(jnp.asarray(PARAMS))
    np.testing.assert_allclose(value, expected(PARAMS), rtol=1e-12)
    np.testing.assert_allclose(gradient, jax.grad(expected)(jnp.asarray(PARAMS)), rtol=1e-9, atol=1e-12)
