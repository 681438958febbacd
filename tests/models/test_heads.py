"""Comparison of the heads with the released ones; invariances of the cosine head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lt_adv.models import heads

GAMMA = 1 / 32


def apply(head, features, weight, bias=None):
    """Returns the logits of a head with PyTorch's weight [classes, d]."""
    params = {"kernel": weight.T} if bias is None else {"kernel": weight.T, "bias": bias}
    return head.apply({"params": params}, features)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cosine", {"scale": 10.0}),
        ("cosine_plus", {"scale": 10.0, "gamma": GAMMA}),
        ("cosine_plus_eta", {"scale": 10.0, "gamma": GAMMA, "eta": 0.5}),
    ],
)
def test_cosine_golden(name, options, golden, assert_golden):
    reference = golden("losses_and_heads")
    with jax.enable_x64(True):
        head = heads.Cosine(10, dtype="float64", **options)
        logits = apply(head, reference["head.features"], reference["head.weight"])
        assert_golden(logits, reference[f"head.{name}"])


def test_linear_golden(golden, assert_golden):
    reference = golden("losses_and_heads")
    features, weight, bias = (reference[f"head.{key}"] for key in ("features", "weight", "bias"))
    with jax.enable_x64(True):
        assert_golden(apply(heads.Linear(10, dtype="float64"), features, weight, bias), reference["head.linear"])
        no_bias = apply(heads.Linear(10, use_bias=False, dtype="float64"), features, weight)
        assert_golden(no_bias + bias, reference["head.linear"])


def test_learnable_scale_starts_as_the_linear_head_without_bias(golden, assert_golden):
    reference = golden("losses_and_heads")
    with jax.enable_x64(True):
        features, weight = (jnp.asarray(reference[f"head.{key}"]) for key in ("features", "weight"))
        head = heads.LearnableScale(10, dtype="float64")
        scale = head.init(jax.random.key(0), features)["params"]["scale"]
        logits = head.apply({"params": {"kernel": weight.T, "scale": scale}}, features)
        assert_golden(logits + reference["head.bias"], reference["head.linear"])
        doubled = head.apply({"params": {"kernel": weight.T, "scale": scale.at[3].set(2)}}, features)
        assert_golden(doubled, np.asarray(logits) * np.where(np.arange(10) == 3, 2, 1))


@pytest.mark.parametrize("gamma", [0.0, GAMMA])
def test_cosine_is_invariant_to_feature_norm_and_without_gamma_to_weight_norm(golden, gamma):
    reference = golden("losses_and_heads")
    features = np.float32(reference["head.features"])
    weight = np.float32(reference["head.weight"])
    head = heads.Cosine(10, gamma=gamma)
    logits = apply(head, features, weight)
    np.testing.assert_allclose(apply(head, 1000 * features, weight), logits, atol=1e-6)
    change = np.abs(apply(head, features, 10 * weight) - logits).max()
    assert change < 1e-6 if gamma == 0 else change > 1e-3


@pytest.mark.parametrize(
    ("head", "names"),
    [
        (heads.Linear(10), {"kernel", "bias"}),
        (heads.Linear(10, use_bias=False), {"kernel"}),
        (heads.Cosine(10), {"kernel"}),
    ],
)
def test_initialisation_is_uniform_of_bound_1_over_root_d(head, names):
    params = jax.jit(head.init)(jax.random.key(0), jnp.zeros((1, 400)))["params"]
    assert params["kernel"].shape == (400, 10) and set(params) == names
    for leaf in params.values():
        assert 0.6 / 20 < np.abs(leaf).max() <= 1 / 20 and abs(np.mean(leaf)) < 0.5 / 20


@pytest.mark.parametrize("options", [{}, {"gamma": GAMMA}, {"gamma": GAMMA, "eta": 0.5}])
def test_zero_features_and_weights_have_finite_gradients(golden, options):
    features = jnp.float32(golden("losses_and_heads")["head.features"]).at[3].set(0)
    weight = jnp.float32(golden("losses_and_heads")["head.weight"]).at[2].set(0)
    head = heads.Cosine(10, **options)
    gradient = jax.jit(jax.value_and_grad(lambda f, w: jnp.sum(jnp.sin(apply(head, f, w))), argnums=(0, 1)))
    logits, gradients = gradient(features, weight)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in (logits, *gradients))
    logits = apply(head, features, weight)
    assert not logits[3].any() and not logits[:, 2].any() and logits[0, 0] != 0
