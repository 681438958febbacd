"""The losses of natural training, MART, ALP and AVmixup: against their equations, and in limit cases."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lt_adv import losses
from lt_adv.methods.alp import ALP
from lt_adv.methods.at import AT
from lt_adv.methods.at_bsl import ATBSL
from lt_adv.methods.avmixup import AVMixup
from lt_adv.methods.mart import Mart
from lt_adv.methods.natural import Natural
from lt_adv.methods.robal import RoBal
from lt_adv.methods.trades import Trades
from tests.methods.fake_net import FakeNet, make_batch
from tests.training.helpers import assert_same, run

pytestmark = pytest.mark.usefixtures("float64")

RNG = np.random.default_rng(2)
IMAGE, X_ADV = RNG.uniform(0.2, 0.8, (2, 8, 2, 2, 1))
LABEL, WEIGHT = np.arange(8) % 4, RNG.normal(size=(4, 4))
KEYS = jax.vmap(jax.random.key)(jnp.arange(8))


def logits(x):
    return jnp.reshape(jnp.asarray(x), (len(x), -1)) @ jnp.asarray(WEIGHT)


def loss(method, x_adv=X_ADV):
    """Returns (value, LossOutput, images of the forwards) with a linear network."""
    inputs = []
    net = FakeNet(
        lambda x: (inputs.append(x), (logits(x), {}))[1],
        info=types.SimpleNamespace(num_classes=4, class_counts=np.array([8, 4, 2, 1])),
    )
    batch = make_batch(image=jnp.asarray(IMAGE), label=jnp.asarray(LABEL))
    out = method.loss(KEYS, net, batch, jnp.asarray(x_adv), {}, None)
    return float(out.loss), out, inputs


def ce(x):
    return float(losses.cross_entropy(logits(x), LABEL).mean())


def test_natural_trains_on_clean_images():
    value, _, (inputs,) = loss(Natural(num_steps=7))
    np.testing.assert_array_equal(inputs, IMAGE)
    assert value == pytest.approx(ce(IMAGE), rel=1e-12)
    batch = make_batch(image=IMAGE)
    assert Natural().perturb(KEYS, None, batch, {}, None) is IMAGE


def test_mart_trains_on_clean_and_adversarial_images():
    value, out, inputs = loss(Mart(beta=2.0))
    np.testing.assert_array_equal(inputs, [IMAGE, X_ADV])
    assert value == pytest.approx(float(losses.mart(logits(IMAGE), logits(X_ADV), LABEL, beta=2.0).mean()), rel=1e-12)
    np.testing.assert_array_equal(out.logits, logits(X_ADV))


def test_alp_is_one_norm_over_the_batch():
    p, q = (np.asarray(jax.nn.softmax(logits(x))) for x in (IMAGE, X_ADV))
    value, out, _ = loss(ALP(beta=3.0))
    assert float(out.metrics["loss_pairing"]) == pytest.approx(np.linalg.norm(p - q) / 8, rel=1e-12)
    assert value == pytest.approx(ce(X_ADV) + 3 * np.linalg.norm(p - q) / 8, rel=1e-12)
    assert loss(ALP(beta=0.0))[0] == pytest.approx(loss(AT())[0], rel=1e-12)


@pytest.mark.parametrize(
    ("method", "paper", "released"),  # i: the clean images, a: the adversarial ones; batch norm sees them in turn
    [
        (ALP, "ai", "aiia"),
        (AT, "a", "a"),
        (ATBSL, "a", "a"),
        (Mart, "ia", "ia"),
        (Natural, "i", "i"),
        (RoBal, "ai", "aiia"),
        (Trades, "ia", "iai"),
    ],
)
def test_forwards_in_training_mode_and_their_order(method, paper, released):
    for fidelity, order in (("paper", paper), ("released_code", released)):
        inputs = loss(method(fidelity=fidelity))[2]
        assert ["ia"[np.array_equal(x, X_ADV)] for x in inputs] == list(order)


def of_logits(method, clean, adversarial):
    """The loss of a method, with its gradients in the logits of the images and of the adversarial examples."""

    def value(clean, adversarial):
        net = FakeNet(
            lambda x: (clean if x == "clean" else adversarial, {}),
            info=types.SimpleNamespace(class_counts=np.array([8, 4, 2, 1])),
        )
        batch = make_batch(image="clean", label=jnp.asarray(LABEL))
        return method.loss(KEYS, net, batch, "adversarial", {}, None).loss

    return jax.value_and_grad(value, argnums=(0, 1))(clean, adversarial)


@pytest.mark.parametrize("scale", [1, 300])
@pytest.mark.parametrize("fidelity", ["paper", "released_code"])
def test_trades_takes_log_softmax_in_either_fidelity(fidelity, scale):
    """Value and gradients by hand, also where the smallest q is far below the 1e-12 of RoBal's regulariser."""
    z, other = scale * np.asarray(logits(IMAGE)), scale * np.asarray(logits(X_ADV))
    log_p, log_q = (a - a.max(-1, keepdims=True) for a in (z, other))
    log_p, log_q = (a - np.log(np.exp(a).sum(-1, keepdims=True)) for a in (log_p, log_q))
    p, q, one_hot = np.exp(log_p), np.exp(log_q), np.eye(4)[LABEL]
    divergence = (p * (log_p - log_q)).sum(-1, keepdims=True)
    value, (natural, adversarial) = of_logits(Trades(fidelity=fidelity), jnp.asarray(z), jnp.asarray(other))
    assert value == pytest.approx(np.mean(-log_p[one_hot == 1] + 6 * divergence[:, 0]), rel=1e-12)
    np.testing.assert_allclose(natural, (p - one_hot + 6 * p * (log_p - log_q - divergence)) / 8, rtol=0, atol=1e-12)
    np.testing.assert_allclose(adversarial, 6 * (q - p) / 8, rtol=0, atol=1e-12)
    assert (q.min() < 1e-12) == (scale == 300)


def test_only_the_released_robal_has_a_constant_in_the_logarithm():
    """And of no other method: the gradient in the logits of x_adv, where q is zero to all digits."""
    z, other = 300 * logits(IMAGE), 300 * logits(X_ADV)
    for method in (RoBal, Trades, Mart):
        apart = [of_logits(method(fidelity=fidelity), z, other)[1][1] for fidelity in ("paper", "released_code")]
        assert (np.abs(apart[0] - apart[1]).max() > 1e-6) == (method is RoBal)


def test_alp_has_a_finite_gradient_without_perturbation():
    state, rows = run(ALP(num_steps=0, start="zero"), 1, steps=1)
    assert rows[0]["loss_pairing"] == 0 and rows[0]["gradient_norm"] > 0
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state.params))


def test_avmixup_mixes_image_and_label_alike():
    method = AVMixup(gamma=2.0, lambda1=0.9, lambda2=0.3)
    value, _, (inputs,) = loss(method)
    vertex = IMAGE + 2 * (X_ADV - IMAGE)
    unclipped = np.abs(vertex - 0.5) < 0.5
    # (inputs - v) / (x - v) is the m of the image wherever nothing was clipped.
    m = [np.median(((inputs - vertex) / (IMAGE - vertex))[i][unclipped[i]]) for i in range(8)]
    assert np.all((np.array(m) > 0) & (np.array(m) < 1)) and len(set(np.round(m, 6))) == 8
    mix = np.array(m)[:, None, None, None]
    np.testing.assert_allclose(inputs, np.clip(mix * IMAGE + (1 - mix) * vertex, 0, 1), rtol=1e-9)
    confidence = np.array(m) * 0.9 + (1 - np.array(m)) * 0.3
    target = np.where(np.eye(4)[LABEL] == 1, confidence[:, None], (1 - confidence[:, None]) / 3)
    np.testing.assert_allclose(target.sum(-1), 1)
    assert value == pytest.approx(float(losses.soft_cross_entropy(logits(inputs), target).mean()), rel=1e-9)


def test_avmixup_without_vertex_is_plain_training():
    """gamma 0 leaves the image, lambdas of 1 leave the label: every weight moves as in `natural`."""
    assert_same(run(AVMixup(gamma=0.0, lambda2=1.0, num_steps=1), 1), run(Natural(), 1), 1e-12)


@pytest.mark.parametrize("name", ["lambda1", "lambda2"])
def test_avmixup_lambdas_are_in_the_unit_interval(name):
    with pytest.raises(ValueError, match=rf"config\.method\.{name} must be a number in \[0, 1\], not 1\.5"):
        AVMixup(**{name: 1.5})
