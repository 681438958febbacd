"""Three SGD steps of each method, in float64, against equations written out here: weights and running statistics.

The forwards in training mode stand in the order in which batch norm sees them, "i" the images and "a" the adversarial
examples; the loss is that of methods and their codes, with none of `lt_adv.losses`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lt_adv.data import device_dataset
from lt_adv.methods.addons.awp import AWP
from lt_adv.methods.alp import ALP
from lt_adv.methods.at import AT
from lt_adv.methods.at_bsl import ATBSL
from lt_adv.methods.mart import Mart
from lt_adv.methods.reat import REAT
from lt_adv.methods.robal import RoBal
from lt_adv.methods.trades import Trades
from tests.training.helpers import COUNTS, OPTIM, make, split

pytestmark = pytest.mark.usefixtures("float64")

N = COUNTS.astype(float)
RELEASED = "released_code"


def adversarial(x):
    """Any examples near x will do, as long as both sides have the same."""
    return jnp.clip(x + 0.1 * jnp.cos(40 * x), 0, 1)


def fixed(method):
    """The method with `adversarial` for its attack."""

    @dataclasses.dataclass(frozen=True)
    class Fixed(type(method)):
        def perturb(self, key, net, batch, method_state, progress):
            return adversarial(batch.image)

    return Fixed(**{f.name: getattr(method, f.name) for f in dataclasses.fields(method) if f.init})


# --- the network of tests/training/helpers.py, and losses of logits and features


def forward(params, x):
    """(logits, features, mean, variance) of tests.training.helpers.Small in training mode."""
    h = jax.lax.conv_general_dilated(
        x, params["Conv_0"]["kernel"], (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    mean, variance = h.mean((0, 1, 2)), h.var((0, 1, 2))
    normal = params["BatchNorm_0"]
    h = (h - mean) / jnp.sqrt(variance + 1e-5) * normal["scale"] + normal["bias"]
    features = jnp.tanh(h).mean((1, 2))
    length = jnp.sqrt((features**2).sum(-1, keepdims=True))
    return 4 * features @ params["kernel"] / (0.01 + length), features, mean, variance


def log_p(z):
    return z - jnp.log(jnp.exp(z).sum(-1, keepdims=True))


def ce(z, y):
    return -log_p(z)[jnp.arange(len(y)), y].mean()


def kl(z, other):
    return (jnp.exp(log_p(z)) * (log_p(z) - log_p(other))).sum(-1).mean()


def robal(i, a, y):
    """Margin 0.1, scale 10, tau_b 1.2, tau_m 0; log(q + 1e-12) in the code."""
    u = 10 * (a - 0.1 * jax.nn.one_hot(y, 4)) + 1.2 * jnp.log(N / N.sum())
    p, q = jnp.exp(log_p(i)), jnp.exp(log_p(a))
    return ce(u, y) + 6 * (p * (jnp.log(p) - jnp.log(q + 1e-12))).sum(-1).mean()


def alp(i, a, y):
    apart = jnp.exp(log_p(i)) - jnp.exp(log_p(a))
    return ce(a, y) + 6 / len(y) * jnp.sqrt((apart**2).sum())


def mart(i, a, y):
    rows = jnp.arange(len(y))
    p, q = jnp.exp(log_p(i)), jnp.exp(log_p(a))
    rival = q.at[rows, y].set(0).max(-1)
    apart = (p * (log_p(i) - log_p(a))).sum(-1)
    return (-jnp.log(q[rows, y]) - jnp.log(1 - rival) + 5 * apart * (1 - p[rows, y])).mean()


def reat(features, a, y):
    """Four classes: the rarest is the tail. The code's divergence is one number for each anchor; its weight is 1."""
    total, anchors = 0.0, 0
    log_f = log_p(features)
    root = jnp.sqrt(N.sum() / N)[y]
    for i in np.flatnonzero(np.asarray(y) == 3):
        fixed_f = jax.lax.stop_gradient(log_f[i])
        divergence = (jnp.exp(fixed_f) * (fixed_f - log_f)).mean()
        total += (divergence * jnp.where(y == y[i], -1, 1) * (root[i] + root)).mean()
        anchors += 1
    return ce(a + jnp.log(N), y) + (total / anchors if anchors else 0.0)


@dataclasses.dataclass(frozen=True)
class Case:
    method: Any
    forwards: str
    loss: Callable[..., Any]  # (logits of images, of adversarial examples, labels)
    gamma: float = 0.0  # of AWP


CASES = {
    "at": Case(AT(fidelity=RELEASED), "a", lambda i, a, y: ce(a, y)),
    "at_bsl": Case(ATBSL(fidelity=RELEASED), "a", lambda i, a, y: ce(a + jnp.log(N), y)),
    "trades": Case(Trades(fidelity=RELEASED), "iai", lambda i, a, y: ce(i, y) + 6 * kl(i, a)),
    "trades-paper": Case(Trades(), "ia", lambda i, a, y: ce(i, y) + 6 * kl(i, a)),
    "alp": Case(ALP(fidelity=RELEASED), "aiia", alp),
    "alp-paper": Case(ALP(), "ai", alp),
    "robal": Case(RoBal(fidelity=RELEASED), "aiia", robal),
    "mart": Case(Mart(fidelity=RELEASED), "ia", mart),
    "reat": Case(REAT(fidelity=RELEASED), "a", reat),
    "at-awp": Case(AT(fidelity=RELEASED), "a", lambda i, a, y: ce(a, y), gamma=0.05),
    "trades-awp": Case(Trades(fidelity=RELEASED), "iai", lambda i, a, y: ce(i, y) + 6 * kl(i, a), gamma=0.05),
}


def reference(case, params, running, steps):
    """[(params, running)] after each step, of SGD as PyTorch has it and running statistics <- 0.9 of them + 0.1."""
    data, results = split(), []
    velocity = jax.tree.map(jnp.zeros_like, params)
    for step in range(steps):
        rows = device_dataset.batch_rows(jax.random.key(3), step // 2, step % 2, num_examples=len(data), batch_size=16)
        x, y = jnp.asarray(data.image)[rows] / 255.0, jnp.asarray(data.label)[rows]
        inputs = {"i": x, "a": adversarial(x)}

        def loss(params, inputs=inputs, y=y):
            outputs = {letter: forward(params, inputs[letter]) for letter in inputs}
            first = outputs["a"][1] if case.loss is reat else outputs["i"][0]
            return case.loss(first, outputs["a"][0], y), outputs

        moved = params
        if case.gamma:
            ascent = jax.grad(loss, has_aux=True)(params)[0]
            moved = jax.tree.map(
                lambda w, g: w + (case.gamma * jnp.linalg.norm(w) / jnp.linalg.norm(g) * g if w.ndim > 1 else 0),
                params,
                ascent,
            )
        gradient, outputs = jax.grad(loss, has_aux=True)(moved)
        for letter in case.forwards:
            mean, variance = outputs[letter][2:]
            running = {"mean": 0.9 * running["mean"] + 0.1 * mean, "var": 0.9 * running["var"] + 0.1 * variance}
        # Weight decay pulls at the weights themselves, those of AWP too.
        decayed = jax.tree.map(lambda g, w: g + OPTIM["weight_decay"] * w, gradient, params)
        velocity = jax.tree.map(lambda v, d: OPTIM["momentum"] * v + d, velocity, decayed)
        params = jax.tree.map(lambda w, v: w - OPTIM["learning_rate"] * v, params, velocity)
        results.append((params, running))
    return results


def close(actual, expected):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * max(1, np.abs(b).max()))


@pytest.mark.parametrize("name", CASES)
def test_three_steps(name):
    """After one step, and after three with those between: another epoch's batch among them."""
    case = CASES[name]
    method = fixed(case.method)
    step, state, fed, teacher = make(AWP(method, gamma=case.gamma) if case.gamma else method, 1, augment="none")
    start = jax.device_get((state.params, state.batch_stats["BatchNorm_0"]))
    expected = reference(case, *start, steps=3)
    with fed.batches(0, 3) as batches:
        for (params, running), batch in zip(expected, batches, strict=True):
            state, _ = step(state, batch, teacher)
            close(state.params, params)
            close(state.batch_stats["BatchNorm_0"], running)


def test_one_forward_fewer_is_detected():
    """One forward fewer is far outside of the tolerance: after a step in the statistics."""
    case = CASES["alp"]
    start = jax.device_get(make(fixed(AT()), 1, augment="none")[1])
    first, second = (
        reference(dataclasses.replace(case, forwards=order), start.params, start.batch_stats["BatchNorm_0"], 1)[0][1]
        for order in ("aiia", "aia")
    )
    assert np.abs(first["var"] - second["var"]).max() > 1e-3
