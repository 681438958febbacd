"""Continuous batching: the assignment of images to slots changes the run time, never the result."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lt_adv import attacks
from lt_adv.attacks import continuous_batching
from lt_adv.attacks._apgd import build_apgd_targeted
from lt_adv.attacks._autoattack import ATTACKS
from lt_adv.attacks._square import build_square
from lt_adv.attacks.objectives import logit_margin, targeted_logit_margin
from tests.attacks.test_autoattack import images, labels, network

APGD = build_apgd_targeted(targeted_logit_margin, "linf", 16, 3, 0.75, None, (0.0, 1.0))
SQUARE = build_square(logit_margin, "linf", 180, 0.8, (0.0, 1.0))


def run(attack, x, y, eps, batch_size):
    """{image: (broken, point, steps)}, and the slot-steps that were computed; on one device."""
    devices, n = jax.local_devices()[:1], len(x)
    net = continuous_batching.network(network, x[0], batch_size, None, devices)
    keys = jax.random.split(jax.random.key(0), n)
    radius = np.broadcast_to(np.asarray(eps, np.float32), n)
    targets = np.argsort(-np.asarray(network(x)), axis=-1)[:, 1:]
    results, computed = {}, 0
    program = net.programs

    def advance(attack, steps, *args):
        nonlocal computed
        computed += steps
        return program.advance(attack, steps, *args)

    net = net._replace(programs=program._replace(advance=advance))
    for done in continuous_batching.run(attack, net, np.arange(n), keys=keys, x=x, y=y, eps=radius, targets=targets):
        points = iter(done.x_adv)
        for row, broken, steps in zip(done.rows.tolist(), done.broken, done.steps, strict=True):
            assert row not in results, "finished twice"
            results[row] = (bool(broken), next(points) if broken else None, int(steps))
    assert len(results) == n
    return results, computed * net.slots


def assert_same(a, b):
    for row, (broken, point, steps) in a.items():
        assert (broken, steps) == (b[row][0], b[row][2]), row
        if broken:
            np.testing.assert_array_equal(point, b[row][1])


@pytest.mark.slow
@pytest.mark.parametrize("attack", [APGD, SQUARE], ids=["apgd-t", "square"])
def test_pausing_images_does_not_change_results(attack, monkeypatch):
    x = images(13)
    y, eps = labels(x), np.linspace(0.001, 0.06, 13)
    alone, _ = run(attack, x, y, eps, 13)
    assert 3 <= sum(broken for broken, _, _ in alone.values()) <= 10, "some images break early, some late, some never"
    monkeypatch.setattr(continuous_batching, "MAX_STEPS_IN_SLOT", 1)
    for size in (3, 7, 12):
        assert_same(alone, run(attack, x, y, eps, size)[0])


@pytest.mark.parametrize("attack", [APGD, SQUARE], ids=["apgd-t", "square"])
def test_last_images_share_the_slots(attack, monkeypatch):
    """Ten images that never break share eight slots.

    Without pausing, the last two would occupy eight slots for all their steps, and 63 % of the slots would be used.
    """
    monkeypatch.setattr(continuous_batching, "MAX_STEPS_IN_SLOT", 1)
    x = images(10)
    y = np.asarray(network(x).argmax(-1))
    results, computed = run(attack, x, y, 0.0, 8)
    assert not any(broken for broken, _, _ in results.values())
    assert sum(steps for _, _, steps in results.values()) >= 0.75 * computed


def test_images_finish_before_others_start_while_many_wait(monkeypatch):
    """At any time at most twice as many images are unfinished as there are slots, so that an interruption loses few."""
    x = images(24)
    y = np.asarray(network(x).argmax(-1))
    begun, finished, behind = set(), set(), []
    keys_of = continuous_batching.fold_in_numbers

    def record(keys, rounds):
        begun.update(np.asarray(jax.random.key_data(keys))[:, 1].tolist())
        behind.append(len(begun) - len(finished))
        return keys_of(keys, rounds)

    monkeypatch.setattr(continuous_batching, "fold_in_numbers", record)
    net = continuous_batching.network(network, x[0], 4, None, jax.local_devices()[:1])
    keys = jax.random.split(jax.random.key(0), 24)
    targets = np.argsort(-np.asarray(network(x)), axis=-1)[:, 1:]
    eps = np.zeros(24, np.float32)
    for done in continuous_batching.run(APGD, net, np.arange(24), keys=keys, x=x, y=y, eps=eps, targets=targets):
        finished.update(done.rows.tolist())
    assert len(finished) == len(begun) == 24
    assert max(behind) <= 8


def test_autoattack_with_paused_images(monkeypatch):
    monkeypatch.setattr(continuous_batching, "MAX_STEPS_IN_SLOT", 100)
    x = images(11)
    options = {"eps": 0.05, "version": ("square",), "num_queries": 400}
    one_batch, two_batches = (
        attacks.autoattack(jax.random.key(3), network, x, labels(x), batch_size=size, **options) for size in (11, 8)
    )
    np.testing.assert_array_equal(one_batch.x_adv, two_batches.x_adv)
    assert one_batch.evaluations == two_batches.evaluations


@pytest.mark.slow
def test_randomised_network_uses_new_draws_and_broken_images_stay_broken():
    def noisy(x, keys):
        return network(x + 0.1 * jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(keys))

    x = images(40)
    y = np.asarray(network(x).argmax(-1))
    result = attacks.autoattack(jax.random.key(1), noisy, x, y, eps=0.02, version="rand", batch_size=40)
    left = list(result.accuracy.values())
    assert left == sorted(left, reverse=True) and left[0] > left[-1] == result.robust.mean()
    np.testing.assert_array_equal(result.robust, result.broken_by == -1)
    assert result.evaluations["apgd-ce"][0] == 20 * 101 * result.correct.sum(), "no draw ends the search"
    assert (result.x_adv[result.robust] == x[result.robust]).all()
    assert (result.x_adv[~result.robust & result.correct] != x[~result.robust & result.correct]).any((1, 2, 3)).all()

    def by_key(x, keys):  # right for the keys that image 3 has in each judgement, wrong for all others
        is_allowed = (jax.random.key_data(keys)[:, None] == allowed).all(-1).any(-1)
        return jnp.stack([jnp.where(is_allowed, 1.0, -1.0), jnp.zeros(len(x))], -1) + 0 * x.sum((1, 2, 3))[:, None]

    keys = jax.random.split(jax.random.key(5), 6)
    judgements = jnp.concatenate(
        [continuous_batching.fold_in_numbers(keys[3:4], np.uint32(len(ATTACKS) + number)) for number in range(3)]
    )
    draws = [continuous_batching.fold_in_numbers(judgements, np.uint32(s)) for s in range(20)]
    allowed = jax.random.key_data(jnp.concatenate(draws))
    result = attacks.autoattack(keys, by_key, x[:6], np.zeros(6, int), eps=0.02, version="rand", batch_size=6)
    np.testing.assert_array_equal(result.correct, np.arange(6) == 3)
    np.testing.assert_array_equal(result.robust, np.arange(6) == 3)


@pytest.mark.slow
def test_nan_gradients_do_not_break_images():
    def network_with_a_pole(x):
        return network(x) + jnp.sqrt(x[:, 0, 0, 0] * 0)[:, None]

    x = images(20)
    y = np.asarray(network(x).argmax(-1))
    names = ("apgd-ce", "apgd-t", "fab-t")
    options = {"eps": 1e-6, "norm": "l2", "version": names, "batch_size": 20}
    result = attacks.autoattack(jax.random.key(0), network_with_a_pole, x, y, **options)
    assert result.robust.all() and np.isfinite(result.x_adv).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_images_are_refused(dtype):
    x = jnp.asarray(images(4), dtype)
    with pytest.raises(ValueError, match=f"must be float32 or float64, got {dtype}"):
        attacks.autoattack(jax.random.key(0), network, x, labels(images(4)), eps=0.1)
    with pytest.raises(ValueError, match="must be float32 or float64"):
        attacks.square(jax.random.key(0), network, x, labels(images(4)), eps=0.1)
    half = attacks.apgd(
        jax.random.key(0), lambda x: network(x).astype(dtype), images(4), labels(images(4)), eps=0.1, num_steps=3
    )
    assert half.dtype == np.float32, "the network may compute in it"


def test_resume_accepts_logits_that_differ_by_rounding(tmp_path):
    x = images(8)
    y = labels(x)
    run = partial(attacks.autoattack, jax.random.key(0), x=x, y=y, eps=0.08, version=("apgd-ce",), resume=tmp_path)
    first = run(network, batch_size=4)
    again = run(lambda x: network(x) * (1 + 1e-6), batch_size=3)
    np.testing.assert_array_equal(again.robust, first.robust)
    with pytest.raises(ValueError, match="holds another AutoAttack"):
        run(lambda x: network(x) * 1.1, batch_size=4)
    (tmp_path / "logits.npy").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="holds another AutoAttack"):
        run(network, batch_size=4)
