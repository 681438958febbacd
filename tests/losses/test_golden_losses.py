"""Values and gradients of the losses against the released implementations, in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from lt_adv import losses

# Golden name: the array it acts on, the loss per example, and what its mean over the batch is multiplied with.
CASES = {
    "cross_entropy": ("logits", losses.cross_entropy, 1.0),
    "balanced_softmax": ("logits", losses.balanced_softmax, 1.0),
    "logit_adjust": ("logits", partial(losses.logit_adjustment, tau=1.0), 1.0),
    "cdt": ("logits", partial(losses.class_dependent_temperature, tau=0.3), 1.0),
    "ldam": ("logits", partial(losses.ldam, max_margin=0.5, scale=1.0), 1.0),
    "focal_sigmoid": ("logits", partial(losses.focal, gamma=2.0, activation="sigmoid"), 1.0),
    "focal_softmax": ("logits", partial(losses.focal, gamma=2.0), 0.5),
    "uniform_margin": ("cosine_logits", partial(losses.robal_margin, margin=0.2, scale=10, tau_b=0, tau_m=0), 1.0),
    "robal_n": ("cosine_logits", partial(losses.robal_margin, margin=0.1, scale=10, tau_b=1.2, tau_m=0), 1.0),
    "robal_r": ("cosine_logits", partial(losses.robal_margin, margin=0.1, scale=10, tau_b=1.5, tau_m=0.3), 1.0),
}


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient(golden, assert_golden, name):
    source, loss, factor = CASES[name]
    with jax.enable_x64(True):
        arrays = golden("losses_and_heads")

        def reduced(logits):
            values = loss(logits, arrays["labels"], class_counts=arrays["class_counts"])
            assert values.shape == arrays["labels"].shape
            return factor * values.mean()

        value, gradient = jax.value_and_grad(reduced)(jnp.asarray(arrays[source]))
        assert_golden(value, arrays[f"{name}.value"])
        assert_golden(gradient, arrays[f"{name}.grad"])


def test_class_balanced_focal(golden, assert_golden):
    with jax.enable_x64(True):
        arrays = golden("losses_and_heads")
        weights = losses.class_balanced_weights(arrays["class_counts"], beta=0.9999)
        assert_golden(weights, arrays["class_balanced_weights"])

        def reduced(logits):
            values = losses.focal(logits, arrays["labels"], gamma=2.0, activation="sigmoid")
            return (weights[arrays["labels"]] * values).mean()

        value, gradient = jax.value_and_grad(reduced)(jnp.asarray(arrays["logits"]))
        assert_golden(value, arrays["class_balanced_focal.value"])
        assert_golden(gradient, arrays["class_balanced_focal.grad"])


def test_deferred_reweighting_weights(golden, assert_golden):
    with jax.enable_x64(True):
        arrays = golden("losses_and_heads")
        for epoch, beta in ((10, 0.0), (50, 0.9999)):
            weights = losses.class_balanced_weights(arrays["class_counts"], beta=beta)
            assert_golden(weights, arrays[f"drw_weights_epoch{epoch}"])


def test_robal_regulariser(golden, assert_golden):
    """RoBal's: `trades_regulariser` in the golden file, though TRADES itself has no 1e-12."""
    with jax.enable_x64(True):
        arrays = golden("losses_and_heads")

        def reduced(natural, adversarial):
            return losses.kl_divergence(natural, adversarial, epsilon=1e-12).mean()

        value, (natural, adversarial) = jax.value_and_grad(reduced, argnums=(0, 1))(
            jnp.asarray(arrays["logits"]), jnp.asarray(arrays["adversarial_logits"])
        )
        assert_golden(value, arrays["trades_regulariser.value"])
        assert_golden(natural, arrays["trades_regulariser.grad_natural"])
        assert_golden(adversarial, arrays["trades_regulariser.grad_adversarial"])
