"""Post-hoc adjustments against the released ones."""

import jax
import numpy as np
import pytest

from lt_adv.models import adjustments


def test_boundary_golden(golden, assert_golden):
    """RoBal's adjusted logits, from cosine-plus logits at scale 1; and the sign at a rare class."""
    reference = golden("losses_and_heads")
    counts = reference["class_counts"]
    with jax.enable_x64(True):
        logits = jax.numpy.asarray(reference["head.cosine_plus"]) / 10  # the golden ones carry scale 10
        adjusted = adjustments.create({"name": "boundary", "scale": 10.0, "tau_p": 0.1})(None, None, logits, counts)
        assert_golden(adjusted, reference["head.robal_boundary_adjusted"])
        only_shift = adjustments.create({"name": "boundary", "scale": 1.0, "tau_p": 0.1})
        linear = jax.numpy.asarray(reference["head.linear"])
        assert_golden(only_shift(None, None, linear, counts), reference["head.posthoc_logit_adjust"])


def test_none_returns_the_logits_and_leaves_other_options_unused():
    logits = np.ones((2, 3), np.float32)
    assert adjustments.create({"name": "none", "scale": 10.0})(None, None, logits, [1, 2, 3]) is logits


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "boundry"}, "Unknown adjustment 'boundry'. Did you mean 'boundary'"),
        ({"scale": 2.0}, "Unknown adjustment None"),
        ({"name": "boundary", "tau_b": 1.0}, "'tau_b'. Did you mean 'tau_p'"),
    ],
)
def test_unknown_names_and_options(config, message):
    with pytest.raises(ValueError, match=message) as error:
        adjustments.create(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("counts", [[5, 0, 1], [5, 1], [3, 2, -1]])
def test_counts_must_be_positive_and_one_per_class(counts):
    with pytest.raises(ValueError, match="positive count for each of 3 classes"):
        adjustments.boundary(None, None, np.ones((2, 3), np.float32), counts)
