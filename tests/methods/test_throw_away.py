"""The Method contract, proved on five methods that exist here alone: each needs another part of it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lt_adv import attacks, losses
from lt_adv.methods import base
from tests.training.helpers import COUNTS, assert_same, frozen_teacher, make, run


@pytest.fixture(scope="module", autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@dataclasses.dataclass(frozen=True)
class EpochCounts(base.Method):
    """REAT's kind: counts what was predicted in an epoch, uses the counts of the epoch before."""

    def init(self, info):
        return {"running": jnp.zeros(4, int), "last": jnp.asarray(info.class_counts)}

    def loss(self, key, net, batch, x_adv, extra, clock):
        logits, _ = net.train(x_adv)
        predicted = net.gather(jnp.argmax(logits, -1))
        running = extra["running"] + jnp.sum(jax.nn.one_hot(predicted, 4, dtype=int), 0)
        weight = 1.0 / (1.0 + extra["last"])[batch.label]
        # A weighted mean is no plain mean over examples: gather first.
        value, weight = net.gather((losses.cross_entropy(logits, batch.label), weight))
        return jnp.sum(weight * value) / jnp.sum(weight), ({**extra, "running": running}, {})

    def epoch_end(self, extra, clock):
        return {"running": jnp.zeros_like(extra["running"]), "last": extra["running"]}


@dataclasses.dataclass(frozen=True)
class ClassMeans(base.Method):
    """TAET's kind: means over the classes of the batch, nonlinear in them; a class may be missing from a shard."""

    def loss(self, key, net, batch, x_adv, extra, clock):
        logits, out = net.train(x_adv)
        value, label, features = net.gather((losses.cross_entropy(logits, batch.label), batch.label, out["features"]))
        member = jax.nn.one_hot(label, 4)
        means = (value @ member) / jnp.maximum(member.sum(0), 1)
        pairs = jnp.mean(jnp.square(features @ features.T))
        return jnp.mean(means) + jnp.mean(jnp.square(means - jnp.mean(value))) + pairs, (extra, {})


@dataclasses.dataclass(frozen=True)
class Distil(base.Method):
    """The self-teacher's kind: two stages, the second sees the frozen network of the first."""

    def loss(self, key, net, batch, x_adv, extra, clock):
        logits, _ = net.train(x_adv)
        value = jnp.mean(losses.cross_entropy(logits, batch.label))
        if net.teacher is not None:
            value += jnp.mean(losses.kl_divergence(net.teacher(batch.image)[0], logits))
        return value, (extra, {})

    def stages(self, config):
        first = base.Stage(method=self, epochs=1, name="teacher", overrides={"data.imbalance": "balanced"})
        return first, base.Stage(method=self, epochs=2, name="student", teacher="previous")


@dataclasses.dataclass(frozen=True)
class Moved(base.Method):
    """AWP's kind: the gradient at weights moved along the ascent direction of the whole batch's loss."""

    def loss(self, key, net, batch, x_adv, extra, clock):
        def ascent(params):
            return jnp.mean(losses.cross_entropy(net.at(params).eval(x_adv)[0], batch.label))

        direction = net.mean(jax.grad(ascent)(net.params))
        moved = jax.tree.map(lambda p, d: p + lax.stop_gradient(0.01 * d), net.params, direction)
        logits, _ = net.at(moved).train(x_adv)
        return jnp.mean(losses.cross_entropy(logits, batch.label)), (
            extra,
            {"accuracy": base.correct(logits, batch.label)},
        )


@dataclasses.dataclass(frozen=True)
class Radius(base.Method):
    """RobustLT's kind: wraps any method and rescales the radius by class, growing with the epochs."""

    inner: base.Method = base.Method()

    def perturb(self, key, net, batch, extra, clock):
        factor = (jnp.asarray([0.5, 1.0, 1.5, 2.0]) * (clock.epoch + 1) / clock.epochs)[batch.label]
        scaled = batch.replace(eps=batch.eps * factor, step_size=batch.step_size * factor)
        return self.inner.perturb(key, net, scaled, extra, clock)

    def loss(self, key, net, batch, x_adv, extra, clock):
        value, (extra, metrics) = self.inner.loss(key, net, batch, x_adv, extra, clock)
        radius = jnp.max(jnp.abs(x_adv - batch.image), axis=(1, 2, 3))
        return value, (extra, {**metrics, "radius": radius})


CASES = {
    "epoch_counts": (EpochCounts(num_steps=1), {}),
    "class_means": (ClassMeans(num_steps=1), {}),
    "distil": (Distil(num_steps=1), {"teacher": frozen_teacher}),
    "moved": (Moved(num_steps=1), {}),
    "radius": (Radius(inner=Distil(num_steps=1)), {}),
    "frozen": (Distil(num_steps=1), {"freeze": "Conv_0/", "freeze_batch_stats": True}),
}


@pytest.fixture(scope="module")
def results():
    cache = {}

    def get(name):
        if name not in cache:
            method, options = CASES[name]
            options = {k: v() if callable(v) else v for k, v in options.items()}
            cache[name] = run(method, 1, **options), {p: run(method, 8, p, **options) for p in ("pmap", "shard_map")}
        return cache[name]

    return get


@pytest.mark.parametrize("name", CASES)
def test_eight_devices_equal_one(results, name):
    one, eight = results(name)
    for parallel in ("pmap", "shard_map"):
        assert_same(eight[parallel], one, 1e-9)


def test_counts_turn_over_at_the_end_of_an_epoch(results):
    state, _ = results("epoch_counts")[0]
    # Two steps of 16 are an epoch: after four steps `last` holds the second epoch's 32 predictions, `running` none.
    assert state.extra["last"].sum() == 32 and state.extra["running"].sum() == 0


def test_radius_follows_class_and_epoch(results):
    _, rows = results("radius")[0]
    # eps 0.1, step 0.05: the uniform start and one step stay within 0.1 * factor; epochs 0 and 1 of 3.
    heads = [row["radius_head"] for row in rows if np.isfinite(row.get("radius_head", np.nan))]
    assert all(0 < row["radius"] <= 0.2 * 2 / 3 + 1e-12 for row in rows) and rows[-1]["radius"] > rows[0]["radius"], (
        heads
    )


def test_frozen_parts_do_not_move(results):
    state, _ = results("frozen")[0]
    _, first, _, _ = make(CASES["frozen"][0], 1)
    np.testing.assert_array_equal(state.params["Conv_0"]["kernel"], first.params["Conv_0"]["kernel"])
    np.testing.assert_array_equal(state.batch_stats["BatchNorm_0"]["mean"], first.batch_stats["BatchNorm_0"]["mean"])
    assert np.abs(state.params["kernel"] - first.params["kernel"]).max() > 1e-4


def test_teacher_changes_the_loss(results):
    (_, taught), (_, alone) = results("distil")[0], run(Distil(num_steps=1), 1, steps=1)
    assert taught[0]["loss"] > alone[0]["loss"] + 1e-3


def test_attacks_without_a_key_per_example_would_differ():
    """The step's keys are per example: the same attack with one key for the shard gives other images on each layout."""
    x, y = jnp.full((16, 6, 6, 1), 0.5), jnp.arange(16) % 4
    assert len(COUNTS) == 4
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(16))

    def attack(k, n):
        return attacks.pgd(
            k, lambda v: v.mean((1, 2)) @ jnp.ones((1, 4)), x[n], y[n], eps=0.1, step_size=0.1, num_steps=0
        )

    whole = attack(keys, slice(None))
    half = jnp.concatenate([attack(keys[:8], slice(0, 8)), attack(keys[8:], slice(8, 16))])
    np.testing.assert_array_equal(whole, half)
    shards = jnp.concatenate([attack(keys[0], slice(0, 8)), attack(keys[0], slice(8, 16))])
    assert not np.array_equal(whole, shards)
