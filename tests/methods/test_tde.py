"""TDE's running mean of feature directions."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lt_adv import losses
from lt_adv.methods import Batch
from lt_adv.methods.tde import TDE
from tests.methods.fake_net import FakeNet


def step(features, mean, **options):
    logits, label = jnp.eye(3)[: len(features)], jnp.arange(len(features))
    net = FakeNet(lambda x: (logits, {"features": features}))
    batch = Batch(None, label, None, None, None)
    out = TDE(**options).loss(None, net, batch, None, {"feature_mean": mean}, None)
    assert float(out.loss) == pytest.approx(float(losses.cross_entropy(logits, label).mean()))
    np.testing.assert_array_equal(out.logits, logits)
    return out.method_state["feature_mean"]


def test_mean_has_no_factor_one_minus_mu():
    """m <- 0.9 m + (directions' mean): of the same batch again and again it grows to ten times that mean."""
    features = jnp.array([[3.0, 4.0], [0.0, 2.0]])
    mean = TDE().init_state(SimpleNamespace(num_features=2))["feature_mean"]
    assert mean.tolist() == [0, 0]
    first = step(features, mean)
    np.testing.assert_allclose(first, [0.3, 0.9], rtol=1e-6)
    np.testing.assert_allclose(step(features, first), [0.9 * 0.3 + 0.3, 0.9 * 0.9 + 0.9], rtol=1e-6)
    for _ in range(200):
        first = step(features, first)
    np.testing.assert_allclose(first, [3, 9], rtol=1e-5)


def test_features_of_length_zero_have_no_direction():
    np.testing.assert_allclose(step(jnp.array([[0.0, 0.0], [0.0, 5.0]]), jnp.zeros(2)), [0, 0.5])


def test_mu_is_checked():
    with pytest.raises(ValueError, match=r"config\.method\.mu must be a number in \[0, 1\), not 1"):
        TDE(mu=1.0)
    assert jax.tree.leaves(TDE(mu=0.0).init_state(SimpleNamespace(num_features=3)))[0].shape == (3,)
