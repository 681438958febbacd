"""Properties of AutoAttack that hold for every network; test_properties.py has those of its attacks."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lt_adv import attacks
from lt_adv.attacks import continuous_batching
from lt_adv.attacks._autoattack import ATTACKS
from tests.attacks.test_properties import distance

KEY = jax.random.key(3)
SHAPE, CLASSES = (6, 5, 2), 5
RNG = np.random.default_rng(0)
HIDDEN, OUT = (RNG.normal(size=s).astype(np.float32) for s in ((np.prod(SHAPE), 12), (12, CLASSES)))


def apply(weights, x):
    return jnp.tanh(x.reshape(len(x), -1) @ weights[0]) @ weights[1]


network = jax.tree_util.Partial(apply, (HIDDEN, OUT))  # whose programs are compiled once for all tests


def images(n, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).uniform(size=(n, *SHAPE)).astype(dtype)


def labels(x):
    """As the network sees them, and every fifth is wrong."""
    y = np.array(network(x).argmax(-1))
    y[::5] = (y[::5] + 1) % CLASSES
    return y


def wrong(x_adv, y, logits_fn=network):
    return np.asarray(logits_fn(jnp.asarray(x_adv)).argmax(-1) != y)


@pytest.mark.slow
def test_fab_finds_the_nearest_wrong_point_of_a_linear_network():
    """Two classes and one hyperplane: the distance to it is known."""
    w = np.linspace(-1, 1, 30).reshape(1, *SHAPE[:1], 5, 1).astype(np.float32)
    linear = lambda x: jnp.stack([0 * x.sum((1, 2, 3)), (x * w).sum((1, 2, 3)) - 0.4], -1)  # noqa: E731
    x = np.full((1, 6, 5, 1), 0.5, np.float32)
    for norm, length in (("linf", 0.4 / np.abs(w).sum()), ("l2", 0.4 / np.sqrt((w**2).sum()))):
        x_adv = attacks.fab_targeted(KEY, linear, x, np.zeros(1, int), eps=np.inf, norm=norm, num_steps=30)
        assert wrong(x_adv, 0, linear).all()
        np.testing.assert_allclose(distance(x_adv, x, norm), length, rtol=1e-2)
        fab = jax.jit(partial(attacks.fab, KEY, linear, x, np.zeros(1, int), norm=norm, num_steps=30))
        near, far = fab(eps=length * 1.02), fab(eps=length * 0.99)
        assert wrong(near, 0, linear).all() and np.array_equal(far, x)


X = images(23, seed=1)
Y = labels(X)


EPS = {"linf": 0.08, "l2": 0.4, "l1": 1.5}


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "version"), [("linf", ATTACKS), ("l1", ("apgd-ce", "fab-t", "square"))])
def test_result_agrees_with_its_points(short, norm, version):
    result = attacks.autoattack(KEY, network, X, Y, eps=EPS[norm], norm=norm, version=version, batch_size=8)
    np.testing.assert_array_equal(result.robust, ~wrong(result.x_adv, Y))
    np.testing.assert_array_equal(result.correct, ~wrong(X, Y))
    np.testing.assert_array_equal(result.prediction, network(result.x_adv).argmax(-1))
    np.testing.assert_array_equal(result.x_adv[result.robust], X[result.robust])
    np.testing.assert_array_equal(result.broken_by == -1, result.robust)
    np.testing.assert_array_equal(result.broken_by == 0, ~result.correct)
    assert 0 < result.robust.sum() < result.correct.sum()
    assert (distance(result.x_adv, X, norm) <= EPS[norm] * (1 + 1e-5) + 1e-6).all()
    assert ((result.x_adv >= 0) & (result.x_adv <= 1)).all()
    values = list(result.accuracy.values())
    assert values == sorted(values, reverse=True) and values[-1] == result.robust.mean()
    assert list(result.accuracy) == ["clean", *version] and not result.notes


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "version"), [("linf", ("apgd-ce", "square")), ("l2", ("apgd-ce", "fab-t"))])
def test_result_is_independent_of_batch_size_and_devices(short, norm, version):
    run = partial(attacks.autoattack, KEY, network, X, Y, eps=EPS[norm], norm=norm, version=version)
    one, again = (run(batch_size=1, devices=jax.devices()[:1]) for _ in range(2))
    np.testing.assert_array_equal(one.x_adv, again.x_adv)  # the same key, the same bits
    for size, devices in ((7, 1), (16, 8)):
        other = run(batch_size=size, devices=jax.devices()[:devices])
        np.testing.assert_array_equal(one.robust, other.robust)
        np.testing.assert_array_equal(one.broken_by, other.broken_by)
        np.testing.assert_allclose(one.x_adv, other.x_adv, atol=2e-5)


@pytest.mark.slow
def test_robustness_decreases_with_the_radius(short):
    run = partial(attacks.autoattack, KEY, network, X, Y, version=("apgd-ce", "square"), batch_size=8)
    robust = [run(eps=eps).robust for eps in (0, 0.05, 0.1, 1)]
    for small, large in zip(robust, robust[1:], strict=False):
        assert (large <= small).all()
    np.testing.assert_array_equal(robust[0], ~wrong(X, Y))
    assert not robust[-1].any() and 0 < robust[2].sum() < robust[1].sum()


def test_all_images_wrong_and_all_images_robust(short):
    bad = attacks.autoattack(KEY, network, X, (labels(X) + 1 + (np.arange(23) % 5 == 0) * 2) % CLASSES, eps=0.1)
    assert not bad.robust.any() or bad.correct.any()
    none = attacks.autoattack(KEY, network, X, np.asarray(network(X).argmax(-1)) ^ 1, eps=0.1)
    assert not none.correct.any() and np.array_equal(none.x_adv, X) and sum(map(sum, none.evaluations.values())) == 0
    constant = lambda x: jnp.zeros((len(x), 4)).at[:, 2].set(1.0)  # noqa: E731
    all_ = attacks.autoattack(KEY, constant, X, np.full(23, 2), eps=0.3)
    assert all_.robust.all() and np.array_equal(all_.x_adv, X) and (all_.broken_by == -1).all()


@pytest.mark.slow
@pytest.mark.parametrize("classes", [2, 3])
def test_few_classes(short, classes):
    few = lambda x: network(x)[:, :classes]  # noqa: E731
    y = np.asarray(few(X).argmax(-1))
    result = attacks.autoattack(KEY, few, X, y, eps=0.1, version=("apgd-dlr", "apgd-t", "fab"))
    assert (~result.robust).any()
    assert len(result.notes) == (2 if classes == 2 else 1) and "apgd-t" in result.notes[-1]
    with pytest.raises(ValueError, match="compares 4 classes and there are"):
        attacks.apgd_targeted(KEY, few, X, y, eps=0.1)
    if classes == 2:
        with pytest.raises(ValueError, match="dlr compares 3 classes and there are 2"):
            attacks.apgd(KEY, few, X, y, eps=0.1, objective=attacks.dlr)


def test_randomised_network_is_attacked_on_average(short):
    def noisy(x, keys):
        noise = jax.vmap(lambda key: jax.random.normal(key, SHAPE))(keys)
        return network(x + 0.02 * noise)

    run = partial(attacks.autoattack, KEY, noisy, X, Y, eps=0.1, version="rand")
    result, other = run(batch_size=7), run(batch_size=32)
    assert result.robust.sum() < result.correct.sum()
    np.testing.assert_array_equal(result.robust, other.robust)
    forwards, gradients = result.evaluations["apgd-ce"]
    assert forwards == gradients and forwards % 20 == 0


class Stop(Exception): ...


def interrupted(monkeypatch, after):
    """The slots, stopped when that many images are done."""
    plain = continuous_batching.run

    def run(*args, **options):
        count = 0
        for done in plain(*args, **options):
            yield done
            count += len(done.rows)
            if count >= after:
                raise Stop

    monkeypatch.setattr(continuous_batching, "run", run)
    return lambda: monkeypatch.setattr(continuous_batching, "run", plain)


def test_resumes_after_an_interruption(short, monkeypatch, tmp_path):
    run = partial(attacks.autoattack, KEY, network, X, Y, eps=0.08, batch_size=4, devices=jax.devices()[:2])
    uninterrupted = run()
    for after in (5, 9, 2):  # of one call after the other, in whichever attack that is
        restore = interrupted(monkeypatch, after)
        with pytest.raises(Stop):
            run(resume=str(tmp_path / "a"))
        restore()
    files = sorted((tmp_path / "a").glob("*.npz"))
    assert len(files) > 1
    files[0].write_bytes(files[0].read_bytes()[:-40])  # a damaged part is attacked again
    result = run(resume=str(tmp_path / "a"))
    np.testing.assert_array_equal(result.x_adv, uninterrupted.x_adv)
    np.testing.assert_array_equal(result.broken_by, uninterrupted.broken_by)
    assert result.accuracy == uninterrupted.accuracy
    monkeypatch.setattr(continuous_batching.Programs, "advance", None)  # all is known: no step is taken
    again = run(resume=str(tmp_path / "a"))
    np.testing.assert_array_equal(again.robust, uninterrupted.robust)
    assert again.evaluations == uninterrupted.evaluations
    with pytest.raises(ValueError, match="holds another AutoAttack"):
        attacks.autoattack(KEY, network, X, Y, eps=0.07, batch_size=4, resume=tmp_path / "a")


def test_no_more_evaluations_than_the_released_code():
    """The released code takes all steps on every surviving image; ours stops when an image is broken."""
    result = attacks.autoattack(KEY, network, X, Y, eps=0.08, batch_size=23)
    left = (~wrong(X, Y)).sum()
    for name, each in (("apgd-ce", 101), ("apgd-t", 4 * 101), ("fab-t", 4 * 200), ("square", 5001)):
        assert result.evaluations[name][0] <= left * each
        left = round(result.accuracy[name] * len(X))


def test_compiles_once_with_weights_as_arguments(short, caplog):
    continuous_batching.programs.cache_clear()
    run = partial(attacks.autoattack, KEY, x=X, y=Y, eps=0.08, version=("apgd-ce",), batch_size=8)
    with jax.log_compiles():
        first, other = (run(logits_fn=jax.tree_util.Partial(apply, (HIDDEN * c, OUT))) for c in (1, 0.99))
    assert sum("Finished XLA compilation of jit(advance)" in line for line in caplog.messages) == 1
    assert not np.array_equal(first.x_adv, other.x_adv)
    closed = continuous_batching.network(lambda x: apply((HIDDEN, OUT), x), X[0], 8, None, None)
    shapes = {leaf.shape for leaf in jax.tree.leaves(closed.call)}
    assert {HIDDEN.shape, OUT.shape} <= shapes


def test_custom_objectives():
    x, y = X[:4], np.asarray(network(X[:4]).argmax(-1))
    least = lambda z, y: -z[:, 0]  # noqa: E731
    x_adv = attacks.apgd(KEY, network, x, y, eps=0.01, num_steps=5, objective=least)
    listed = attacks.apgd(KEY, network, x, y, eps=0.01, num_steps=5, objective=least, bounds=[0.0, 1.0])
    np.testing.assert_array_equal(listed, x_adv)
    right = ~wrong(x_adv, y)
    assert (network(x_adv)[right, 0] < network(x)[right, 0]).all() and right.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "best"}, "Unknown version 'best'"),
        ({"version": ("apgd",)}, "Unknown attack 'apgd'"),
        ({"version": ()}, "must name attacks"),
        ({"version": ("fab", "fab")}, "each once"),
        ({"norm": "l3"}, "Unknown norm 'l3'"),
        ({"eps": -0.1}, "eps must not be negative"),
        ({"x": (X * 255).astype(np.uint8)}, "divide uint8 images by 255"),
        ({"x": X * 255}, r"must lie inside bounds \(0.0, 1.0\)"),
        ({"y": Y[:3]}, "same batch size"),
        ({"y": np.eye(CLASSES)[Y]}, "integer labels"),
        ({"y": Y + CLASSES}, "y must be labels of 5 classes, got [5-9] to"),
        ({"x": X[:0], "y": Y[:0]}, "Nothing to attack"),
        ({"logits_fn": lambda x: network(x)[:, :1]}, "nothing to attack: logits_fn returns logits of 1 class"),
        ({"key": jax.random.PRNGKey(0)}, "key must be typed"),
    ],
)
def test_invalid_arguments(change, message):
    given = {"key": KEY, "logits_fn": network, "x": X, "y": Y, "eps": 0.1} | change
    with pytest.raises(ValueError, match=message):
        attacks.autoattack(**given)
