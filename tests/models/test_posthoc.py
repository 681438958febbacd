"""Comparison of the post-hoc adjustments with the released ones."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lt_adv import models
from lt_adv.models import heads, posthoc


@pytest.fixture
def reference(golden):
    with jax.enable_x64(True):
        yield golden("losses_and_heads")


def adjust(reference, head, **config):
    """Returns the adjusted logits of the golden features, weight and, for a linear head, bias."""
    params = {"kernel": jnp.asarray(reference["head.weight"].T)}
    if isinstance(head, heads.Linear):
        params["bias"] = jnp.asarray(reference["head.bias"])
    variables = {"params": {"head": params}, "method_state": {"feature_mean": reference["head.moving_average"][0]}}
    features = jnp.asarray(reference["head.features"])
    adjustment = posthoc.create(config)
    return adjustment(variables, features, lambda f: head.apply({"params": params}, f), reference["class_counts"])


LINEAR, COSINE = heads.Linear(10, dtype="float64"), heads.Cosine(10, scale=10.0, gamma=1 / 32, dtype="float64")


@pytest.mark.parametrize(
    ("name", "head", "config"),
    [
        ("linear", LINEAR, {"name": "none"}),
        ("robal_boundary_adjusted", COSINE, {"name": "boundary", "scale": 1.0, "tau_p": 0.1}),
        ("robal_boundary_adjusted", COSINE.clone(scale=1.0), {"name": "boundary", "scale": 10.0, "tau_p": 0.1}),
        ("posthoc_logit_adjust", LINEAR, {"name": "boundary", "scale": 1.0, "tau_p": 0.1}),
        ("posthoc_logit_adjust", LINEAR, {"name": "logit_adjustment", "tau": 0.1}),
        ("posthoc_cdt", LINEAR, {"name": "cdt"}),
        ("tau_norm", LINEAR, {"name": "tau_norm"}),
        ("tde_posthoc", COSINE, {"name": "tde"}),
    ],
)
def test_golden(reference, assert_golden, name, head, config):
    assert_golden(adjust(reference, head, **config), reference[f"head.{name}"])


def test_adjustment_of_strength_zero_changes_nothing(reference, assert_golden):
    linear = reference["head.linear"]
    for name in ("logit_adjustment", "cdt"):
        assert_golden(adjust(reference, LINEAR, name=name, tau=0.0), linear)
    assert_golden(adjust(reference, LINEAR, name="tau_norm", tau=0.0), linear - reference["head.bias"])
    assert_golden(adjust(reference, COSINE, name="tde", alpha=0.0), reference["head.cosine_plus"])


def test_options_of_other_adjustments_are_ignored():
    logits = np.ones((2, 3), np.float32)
    unadjusted = posthoc.create({"name": "none", "scale": 10.0})
    assert unadjusted(None, None, lambda features: logits, [1, 2, 3]) is logits


def test_zero_features_have_finite_gradients(reference):
    """Evaluation attacks differentiate through the adjustment."""

    def total(features):
        arrays = {name: reference[name] for name in reference.files} | {"head.features": features}
        return jnp.sum(jnp.sin(adjust(arrays, COSINE, name="tde")))

    features = jnp.asarray(reference["head.features"]).at[3].set(0)
    assert jnp.isfinite(jax.grad(total)(features)).all()


class Flat(nn.Module):
    """A backbone whose features are the pixels."""

    def __call__(self, x, *, train):
        assert not train
        return x.reshape(len(x), -1)


@pytest.mark.parametrize("name", ["none", "tau_norm"])
def test_adjusted_logits_of_a_network(name):
    model = models.Classifier(backbone=Flat(), head=heads.Linear(3))
    x = np.random.default_rng(0).random((2, 3, 3, 1), np.float32)
    variables = model.init(jax.random.key(0), x)
    logits, out = model.apply(variables, x)
    if name == "tau_norm":
        kernel = np.asarray(variables["params"]["head"]["kernel"])
        logits = out["features"] @ (kernel / np.linalg.norm(kernel, axis=0))
    apply = jax.jit(posthoc.adjusted_logits_fn(model, {"name": name}, [4, 2, 1]))
    np.testing.assert_allclose(apply({**variables, "method_state": {}}, x), logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "boundry"}, "Unknown adjustment 'boundry'. Did you mean 'boundary'"),
        ({"scale": 2.0}, "Unknown adjustment None"),
        ({"name": "boundary", "tau_b": 1.0}, "'tau_b'. Did you mean 'tau_p'"),
        ({"name": "tau_norm"}, "'tau_norm' is for the heads linear, linear_no_bias, not for 'cosine'"),
    ],
)
def test_unknown_names_and_options_are_refused(config, message):
    with pytest.raises(ValueError, match=message) as error:
        posthoc.create(config, "cosine")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("counts", [[5, 0, 1], [5, 1], [3, 2, -1]])
@pytest.mark.parametrize("name", ["boundary", "logit_adjustment", "cdt"])
def test_counts_must_be_positive_and_one_per_class(name, counts):
    adjustment = posthoc.create({"name": name})
    with pytest.raises(ValueError, match="positive count for each of 3 classes"):
        adjustment(None, None, lambda features: np.ones((2, 3), np.float32), counts)


def test_select_variables_drops_unused_method_state():
    variables = {"params": {"head": {}}, "batch_stats": {}, "method_state": {"feature_mean": 1, "predicted": 2}}
    network = {"params": {"head": {}}, "batch_stats": {}}
    assert posthoc.select_variables({"name": "boundary", "scale": 10.0}, variables) == network
    assert posthoc.select_variables({"name": "tde"}, variables) == {**network, "method_state": {"feature_mean": 1}}
    with pytest.raises(ValueError, match="'tde' needs 'feature_mean', which training has not saved"):
        posthoc.select_variables({"name": "tde"}, network)
