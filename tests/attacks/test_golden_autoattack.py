"""One run of each of AutoAttack's gradient attacks against the released code's, point for point, in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lt_adv import attacks
from lt_adv.attacks import _apgd_l1, norms
from lt_adv.attacks._apgd import build_apgd, build_apgd_targeted, starting_state
from lt_adv.attacks._fab import build_fab_targeted

pytestmark = pytest.mark.usefixtures("float64")
BOX = (0.0, 1.0)
FAST = {"xla_backend_optimization_level": 3}  # these run for longer than they compile
APGD = {
    "apgd_ce": build_apgd(attacks.stable_cross_entropy, "linf", 100, 1, 0.75, None, BOX),
    "apgd_dlr": build_apgd(attacks.dlr, "linf", 100, 1, 0.75, None, BOX),
    "apgd_t": build_apgd_targeted(attacks.targeted_dlr, "linf", 100, 1, 0.75, None, BOX),
    # On one image the softmax is saturated in float64, and its gradient is what rounding leaves of p_y - 1: the golden
    # path follows it, so the form of the cross-entropy that has this difference is compared here.
    "apgd_ce_l2": build_apgd(attacks.cross_entropy, "l2", 100, 1, 0.75, None, BOX),
}


def follow(attack, net, state):
    """The state after all steps of the attack."""
    network = lambda x, _: net.logits_fn(x)  # noqa: E731
    run = jax.jit(
        lambda s: jax.lax.fori_loop(0, attack.num_steps, lambda _, s: attack.step(network, s), s),
        compiler_options=FAST,
    )
    return run(state)


@pytest.fixture
def images(digits):
    """`images("linear")`: (net, x, y, arrays, keys) of the forty images whose paths are known."""

    def load(head):
        net = digits(head, np.float64)
        index = net.arrays["trajectory.index"]
        return net, jnp.asarray(net.x[index]), jnp.asarray(net.y[index]), jax.random.split(jax.random.key(0), 40)

    return load


@pytest.mark.parametrize("name", APGD)
@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_apgd(images, assert_golden, head, name):
    net, x, y, keys = images(head)
    end = "_l2" if name.endswith("l2") else ""
    start = jnp.clip(net.arrays[f"trajectory.start{end}"], *BOX)
    eps = jnp.full(len(x), net.info[f"eps{end}"])
    state = starting_state(keys, x, y, jnp.asarray(net.arrays["apgd_t.target"]), eps, start)
    state = follow(APGD[name], net, state)
    assert_golden(state.best_point - x, net.arrays[f"{name}.best"])
    assert_golden(state.wrong_point - x, net.arrays[f"{name}.adversarial"])
    assert_golden(state.best_value, net.arrays[f"{name}.best_loss"])
    np.testing.assert_array_equal(~state.broken, net.arrays[f"{name}.still_correct"])


L1_RUNS = {  # golden array -> (stages, start, images whose path may differ)
    "apgd_l1_ce": (((1.0, 1.0),), "clean", 0),
    "apgd_l1_ce_x_init_clean": (((1.0, 1.0),), "given", 0),
    # The released code's projection may leave 1e-16 of a pixel that it sets back, and then counts the pixel as changed.
    # In the stages every step is a checkpoint, so that one such pixel changes the path.
    "apgd_l1_ce_schedule": (_apgd_l1.STAGES, "drawn", 4),
}


@pytest.mark.parametrize("name", L1_RUNS)
@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_apgd_l1(images, golden, head, name):
    net, x, y, keys = images(head)
    if head == "cosine":  # these runs computed the logarithm of the prior in float32
        counts = net.arrays["class_counts"].astype(np.float32)
        net.weights["log_prior"] = np.log(counts / counts.sum()).astype(np.float64)
    stages, start, may_differ = L1_RUNS[name]
    arrays, point = golden(f"attacks_l1_{head}"), x
    if start == "drawn":
        point = norms.get("l1").project(x + arrays["schedule.draw"], x, jnp.asarray(3.0), *BOX)
    attack = _apgd_l1.build(lambda logits, state: attacks.cross_entropy(logits, state.y), 100, 1, None, BOX, stages)
    eps, is_clean = jnp.ones(len(x)), start == "clean"
    state = follow(attack, net, _apgd_l1.starting_state(keys, x, y, y, eps, point, stages[0][0], is_clean))
    differs = np.zeros(len(x), bool)
    for actual, part in ((state.best_point, "best"), (state.wrong_point, "adversarial")):
        differs |= np.abs(np.asarray(actual - x) - arrays[f"{name}.{part}"]).max((1, 2, 3)) > 1e-9
    assert arrays[f"{name}.stable"].all() and differs.sum() <= may_differ
    value, expected = np.asarray(state.best_value), arrays[f"{name}.best_loss"]
    np.testing.assert_allclose(value[~differs], expected[~differs], rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(~np.asarray(state.broken)[~differs], arrays[f"{name}.still_correct"][~differs])


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_fab_targeted(images, assert_golden, head, norm):
    net, x, y, keys = images(head)
    attack = build_fab_targeted(norm, 100, 1, 0.1, 1.05, 0.9, BOX)
    target, everywhere = jnp.asarray(net.arrays["fab_t.target"]), jnp.full(len(x), jnp.inf)
    state = follow(attack, net, attack.init(keys, x, y, target, everywhere, jnp.zeros_like(y)))
    right = jnp.argmax(net.logits_fn(x), axis=-1) == y
    delta = np.array(jnp.where(right[:, None, None, None], state.x_adv - x, 0))
    expected = net.arrays[f"fab_t_{norm}"]
    if (head, norm) == ("linear", "l2"):
        delta = equally_near(attack, net, (keys, x, y, target), delta, expected)
    assert_golden(delta, expected)


def equally_near(attack, net, images, delta, expected):
    """`delta`, with another of the search's wrong points where two are equally near to the last bits.

    Of some images the search comes back to the nearest point again and again, from points 1e-9 apart that lie equally
    far away to 1e-15: rounding says which of them comes first. Where ours is not the golden one, it must be one of ours
    all the same, and no farther away; few images may need it.
    """
    keys, x, y, target = images
    state = attack.init(keys, x, y, target, jnp.full(len(x), jnp.inf), jnp.zeros_like(y))
    step = jax.jit(partial(attack.step, lambda x, _: net.logits_fn(x)), compiler_options=FAST)
    points, lengths = [], []
    for _ in range(attack.num_steps):  # forgetting what was nearest shows every wrong point on the way
        state = step(state._replace(distance=jnp.full(len(x), jnp.inf)))
        points.append(np.asarray(state.nearest - x))
        lengths.append(np.asarray(state.distance))
    points, lengths = np.stack(points), np.stack(lengths)
    unlike = np.flatnonzero(np.abs(delta - expected).max(axis=(1, 2, 3)) > 1e-10)
    assert len(unlike) <= 6
    for i in unlike:
        best = np.argmin(np.abs(points[:, i] - expected[i]).max(axis=(1, 2, 3)))
        assert lengths[best, i] <= lengths[:, i].min() + 1e-14
        delta[i] = points[best, i]
    return delta
