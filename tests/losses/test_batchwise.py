"""REAT's and TAET's losses of whole batches, and distillation: goldens, values by hand, limits, gradients, bounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from lt_adv import losses

pytestmark = pytest.mark.usefixtures("float64")

COUNTS = np.array([50, 20, 8, 2])
TAIL = np.array([False, False, True, True])
LABELS = np.array([0, 0, 1, 2, 2, 3, 1])
RNG = np.random.default_rng(0)
FEATURES = RNG.normal(size=(7, 5))


def test_golden_rebalanced_cross_entropy(golden, assert_golden):
    """A weighted mean: the weights of REAT, divided by their sum over the batch."""
    arrays = golden("losses_and_heads")
    label = arrays["labels"]
    weight = losses.rebalanced_weights(arrays["class_counts"], arrays["attack_counts"])
    np.testing.assert_allclose(weight.sum(), 10)

    def reduced(logits):
        return jnp.sum(weight[label] * losses.cross_entropy(logits, label)) / jnp.sum(weight[label])

    value, gradient = jax.value_and_grad(reduced)(jnp.asarray(arrays["logits"]))
    assert_golden(value, arrays["reat_rbl.value"])
    assert_golden(gradient, arrays["reat_rbl.grad"])


def test_golden_tail_alignment_of_the_released_code(golden, assert_golden):
    arrays = golden("losses_and_heads")
    label, tail = arrays["labels"], np.arange(10) >= 7

    def reduced(features):
        values = losses.tail_alignment_released(features, label, class_counts=arrays["class_counts"], tail=tail)
        assert values.shape == label.shape
        return jnp.sum(values) / np.sum(tail[label])

    value, gradient = jax.value_and_grad(reduced)(jnp.asarray(arrays["features"]))
    assert_golden(value, arrays["reat_tail.value"])
    assert_golden(gradient, arrays["reat_tail.grad"])


def test_rebalanced_weights():
    n, m = np.array([9.0, 4.0, 1.0]), np.array([3.0, 1.0, 5.0])
    effective = [(1 - b**k) / (1 - b) for b, k in zip((n - 1) / n, m, strict=True)]
    expected = 1 / (np.array(effective) + 1e-5)
    np.testing.assert_allclose(losses.rebalanced_weights(n, m), expected / expected.mean(), rtol=1e-12)
    # Nothing turned into a class, of one image too: finite, and by far the largest.
    weights = np.asarray(losses.rebalanced_weights((9, 4, 1), (3, 0, 0)))
    assert np.all(np.isfinite(weights)) and weights[1] == weights[2] > 1e4 * weights[0]
    single = losses.rebalanced_weights((50_000, 100), (50_000, 100), dtype=jnp.float32)
    exact = losses.rebalanced_weights((50_000, 100), (50_000, 100))
    np.testing.assert_allclose(single, exact, rtol=1e-5)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def by_hand(features, margin):
    """The equation of `tail_alignment`, pair by pair."""
    values = np.zeros(len(LABELS))
    for i, anchor in enumerate(LABELS):
        for j, other in enumerate(LABELS):
            p, q = softmax(features[i]), softmax(features[j])
            divergence = np.sum(p * np.log(p / q))
            weight = np.sqrt(COUNTS.sum() / COUNTS[anchor]) + np.sqrt(COUNTS.sum() / COUNTS[other])
            pair = divergence if anchor == other else max(margin - divergence, 0)
            values[i] += TAIL[anchor] * weight * pair / len(LABELS)
    return values


def align(features, margin=1.0, labels=LABELS, tail=TAIL):
    return losses.tail_alignment(features, labels, class_counts=COUNTS, tail=tail, margin=margin)


@pytest.mark.parametrize("margin", [0.3, 1.0, 100.0])
def test_tail_alignment_by_hand(margin):
    np.testing.assert_allclose(align(FEATURES, margin), by_hand(FEATURES, margin), rtol=1e-10, atol=1e-12)
    assert not np.any(align(FEATURES, margin)[~TAIL[LABELS]])


def test_tail_alignment_gradient_matches_the_equation():
    """Finite differences in f_j, with the softmax of the anchors held where it was."""

    def frozen(features):
        log_p, log_q = jax.nn.log_softmax(FEATURES), jax.nn.log_softmax(features)
        total = 0.0
        for i in np.flatnonzero(TAIL[LABELS]):
            divergence = jnp.sum(jnp.exp(log_p[i]) * (log_p[i] - log_q), -1)
            root = np.sqrt(COUNTS.sum() / COUNTS)
            weight = root[LABELS[i]] + root[LABELS]
            pair = jnp.where(LABELS[i] == LABELS, divergence, jnp.maximum(2.0 - divergence, 0))
            total += jnp.mean(weight * pair)
        return total

    gradient = jax.grad(lambda f: jnp.sum(align(f, 2.0)))(jnp.asarray(FEATURES))
    check_grads(frozen, (FEATURES,), order=1, modes=["rev"])
    np.testing.assert_allclose(gradient, jax.grad(frozen)(jnp.asarray(FEATURES)), rtol=1e-9, atol=1e-12)


def test_tail_alignment_attracts_its_class_and_repels_others():
    labels = np.array([3, 3, 0])
    features = jnp.asarray(FEATURES[:3])

    def distances(f):
        log_p = jax.nn.log_softmax(f)
        return [float(jnp.sum(jnp.exp(log_p[0]) * (log_p[0] - log_p[j]))) for j in (1, 2)]

    gradient = jax.grad(lambda f: align(f, 50.0, labels)[0])(features)
    near, far = zip(distances(features), distances(features - 0.01 * gradient), strict=True)
    assert near[1] < near[0] and far[1] > far[0]
    # Further apart than the margin: nothing left to gain, however far.
    for size in (10.0, 1e4):
        apart = jnp.asarray([[size, 0.0], [size, 0.0], [0.0, size]])
        value, gradient = jax.value_and_grad(lambda f: jnp.sum(align(f, 1.0, labels)))(apart)
        assert value == pytest.approx(0, abs=1e-9) and np.allclose(gradient, 0, atol=1e-12)
    # And never below zero, where the released reading falls without end.
    assert np.all(np.asarray(align(1e3 * FEATURES)) >= -1e-9)
    pulled = losses.tail_alignment_released(
        jnp.asarray([[9.0, 0.0], [0.0, 9.0]]), np.array([3, 3]), class_counts=COUNTS, tail=TAIL
    )
    assert np.all(pulled < -1), "two images of one tail class: minimised by driving them apart"


def test_tail_alignment_limits():
    same = jnp.ones((7, 5))
    assert not np.any(align(same, labels=np.full(7, 3)))  # one class, one point
    assert not np.any(align(FEATURES, tail=np.zeros(4, bool)))  # no tail
    released = losses.tail_alignment_released(same, LABELS, class_counts=COUNTS, tail=TAIL)
    np.testing.assert_allclose(released, 0, atol=1e-15)
    with pytest.raises(ValueError, match="margin must be positive, got 0"):
        align(FEATURES, 0)


VALUES = RNG.uniform(0.1, 3, size=7)


def equalise(values, labels=LABELS, num_classes=5, **weights):
    return losses.hierarchical_equalisation(values, labels, num_classes=num_classes, **weights)


def test_hierarchical_equalisation_by_hand():
    means = [np.mean(VALUES[c == LABELS]) if np.any(c == LABELS) else 0.0 for c in range(5)]  # class 4 is absent
    expected = 0.1 * np.mean(means) + 0.1 * np.mean((means - np.mean(means)) ** 2)
    expected += 0.1 * np.sum((means / np.sum(means)) ** 2)
    assert equalise(VALUES) == pytest.approx(expected, rel=1e-9)
    check_grads(equalise, (VALUES,), order=1, modes=["rev"])


def test_hierarchical_equalisation_limits():
    labels = np.repeat(np.arange(3), 2)
    mean = equalise(VALUES[:6], labels, 3, a=1.0, b=0.0, g=0.0)
    assert mean == pytest.approx(VALUES[:6].mean(), rel=1e-9)  # classes of equal counts: the plain mean
    equal = jnp.full(6, 0.7)
    assert equalise(equal, labels, 3, a=0.0, b=1.0, g=0.0) == pytest.approx(0, abs=1e-15)
    assert equalise(equal, labels, 3, a=0.0, b=0.0, g=1.0) == pytest.approx(1 / 3)
    assert equalise(1e3 * equal, labels, 3, a=0.0, b=0.0, g=1.0) == pytest.approx(1 / 3)  # whatever the scale
    zero = jax.value_and_grad(lambda v: equalise(v, labels, 3))(jnp.zeros(6))
    assert zero[0] == 0 and np.all(np.isfinite(zero[1]))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_distillation(temperature):
    student, teacher = RNG.normal(size=(2, 6, 4))

    def loss(z, target):
        return jnp.mean(losses.distillation(z, target, temperature=temperature))

    p, q = (np.stack([softmax(row / temperature) for row in z]) for z in (teacher, student))
    assert loss(student, teacher) == pytest.approx(temperature**2 * np.mean(np.sum(p * np.log(p / q), -1)))
    check_grads(lambda z: loss(z, teacher), (student,), order=1, modes=["rev"])
    of_student, of_teacher = jax.grad(loss, (0, 1))(jnp.asarray(student), jnp.asarray(teacher))
    np.testing.assert_allclose(of_student, temperature * (q - p) / len(p), atol=1e-12)
    assert not np.any(of_teacher), "the teacher has no gradient"
    np.testing.assert_allclose(losses.distillation(teacher, teacher + 3.0, temperature=temperature), 0, atol=1e-12)


def test_distillation_at_high_temperature_compares_centred_logits():
    student, teacher = RNG.normal(size=(2, 6, 4))
    difference = student - teacher
    centred = difference - difference.mean(-1, keepdims=True)
    hot = losses.distillation(student, teacher, temperature=1e3)
    np.testing.assert_allclose(hot, np.mean(centred**2, -1) / 2, rtol=1e-2)
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        losses.distillation(student, teacher, temperature=0)
