"""The training step: one compilation, no transfer to the host, bit-exact when resumed."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lt_adv import methods
from lt_adv.attacks import initialization
from lt_adv.data import device_dataset
from lt_adv.methods.at import AT
from lt_adv.methods.robal import RoBal
from lt_adv.training import sharding, train_state
from lt_adv.training.train_step import StepOptions, is_log_step
from tests.training.helpers import Small, assert_same, make, run, split

GROUPS = {"head": np.array([0]), "body": np.array([1, 2]), "tail": np.array([3])}
EMA = {"name": "ema", "decay": 0.7, "start_epoch": 0}
SWA = {"name": "swa", "decay": 0.0, "start_epoch": 1}


@pytest.fixture(scope="module")
def trained():
    """Six steps (three epochs of two) on four devices: (states on the host after each step, their metrics)."""
    step, state, pipeline, teacher = make(AT(num_steps=1), 4, average=EMA, groups=GROUPS)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if name.endswith("backend_compile_duration") else None
    )
    states, rows, kinds = [jax.device_get(state)], [], []
    with pipeline.batches(0, 6) as batches:
        for data in batches:
            with jax.transfer_guard("disallow"):
                state, metrics = step(state, data, teacher)
            kinds.append(len(compiled))
            states.append(jax.device_get(state))
            rows.append(jax.device_get(metrics))
    return states, rows, kinds, (step, pipeline, teacher)


def test_the_step_compiles_once(trained):
    _, _, counts, _ = trained
    assert counts == [1] * 6, "only the first step compiles a program"


def test_resume_is_bit_exact(trained):
    states, rows, _, (step, pipeline, teacher) = trained
    mesh = sharding.make_mesh(jax.devices()[:4])
    state = sharding.replicate(states[3], mesh)  # within an epoch, between two log steps
    with pipeline.batches(3, 6) as batches:
        for n, data in enumerate(batches, 3):
            state, metrics = step(state, data, teacher)
            chex.assert_trees_all_equal(jax.device_get(metrics), rows[n])
    chex.assert_trees_all_equal(jax.device_get(state), states[6])


def test_average_is_an_ema_of_weights_and_statistics(trained):
    states, *_ = trained
    for name in ("params", "batch_stats"):
        expected = getattr(states[0], name)
        for t, state in enumerate(states[1:]):
            d = min(0.7, (1 + t) / (10 + t))
            expected = jax.tree.map(lambda a, p, d=d: d * a + (1 - d) * p, expected, getattr(state, name))
        chex.assert_trees_all_close(states[-1].average[name], expected, rtol=1e-5, atol=1e-7)
    assert np.any(np.asarray(states[-1].variables["params"]["kernel"]) != states[-1].params["kernel"])


def test_swa_is_the_mean_over_epoch_ends():
    step, state, pipeline, teacher = make(AT(num_steps=0), 1, average=SWA)
    ends = []
    for n in range(6):
        donated = state
        state, _ = step(state, pipeline.example, teacher)
        if n == 5:  # buffers that numpy has read cannot be donated on CPU
            assert all(a.is_deleted() for a in jax.tree.leaves((donated.params, donated.average, donated.opt_state)))
        if n < 3:  # before the end of epoch 1, where the mean starts, the average equals the weights
            np.testing.assert_allclose(state.average["params"]["kernel"], state.params["kernel"], rtol=1e-6)
        if n in (3, 5):  # the ends of epochs 1 and 2, counted from 0
            ends.append(np.asarray(state.params["kernel"]))
    np.testing.assert_allclose(state.average["params"]["kernel"], np.mean(ends, 0), rtol=1e-5)


def test_metrics_of_the_groups_sum_to_the_metric_of_all_images(trained):
    """Weights are the number of images, 16 per step, or of steps; metrics restart after two steps, an epoch."""
    states, rows, _, _ = trained
    assert [is_log_step(n, 2, 2) for n in range(6)] == [False, True] * 3
    for n, (state, row) in enumerate(zip(states[1:], rows, strict=True)):
        steps, sums = n % 2 + 1, state.metric_sums
        for part in (0, 1):
            sum_of_groups = sum(sums[f"accuracy_{group}"][part] for group in GROUPS)
            assert sum_of_groups == pytest.approx(sums["accuracy"][part], rel=1e-6)
        assert sums["accuracy"][1] == 16 * steps and sums["loss"][1] == sums["gradient_norm"][1] == steps
        for name, (total, weight) in sums.items():
            assert row[name] == pytest.approx(total / weight, rel=1e-6)
    assert rows[1]["learning_rate"] == pytest.approx(0.05)
    assert rows[1]["loss"] > 0 and any(0 < row["accuracy"] < 1 for row in rows)


def test_an_epoch_has_every_image_once_in_a_new_order():
    indices = []

    step, state, pipeline, teacher = make(Draws(num_steps=0), 8)
    with pipeline.batches(0, 4) as batches:
        for data in batches:
            state, _ = step(state, data, teacher)
            indices.append(np.asarray(state.method_state["index"]))
    epochs = [np.concatenate(indices[:2]), np.concatenate(indices[2:])]
    assert all(len(set(e.tolist())) == 32 for e in epochs) and not np.array_equal(*epochs)


@dataclasses.dataclass(frozen=True)
class Draws(AT):
    """AT whose state holds the image indices of the last step."""

    def init_state(self, info):
        return {"index": jnp.zeros(16, int)}

    def loss(self, key, net, batch, x_adv, method_state, progress):
        out = AT.loss(self, key, net, batch, x_adv, method_state, progress)
        return out._replace(method_state={"index": net.gather(batch.index)})


@pytest.mark.slow
@pytest.mark.parametrize(("parallel", "devices"), [("pmap", 1), ("pmap", 8), ("shard_map", 8)])
def test_class_aware_draws_in_cycles_on_any_number_of_devices(parallel, devices):
    """16 of four classes, so each class four times in every batch; and the same images after a restart."""
    options = {"sampler": "class_aware", "cycles": True}
    step, state, pipeline, teacher = make(Draws(num_steps=0), devices, parallel, **options)
    classes = device_dataset.class_table(split().label, 4)
    indices, key = [], jax.random.key(3)  # that of `make`
    for n in range(7):  # five steps are an epoch
        if n == 4:
            state = sharding.replicate(jax.device_get(state), sharding.make_mesh(jax.devices()[:devices]))
        with pipeline.batches(n, n + 1) as batches:
            state, _ = step(state, next(batches), teacher)
        indices.append(np.asarray(state.method_state["index"]))
        expected = device_dataset.batch_rows(
            key, n // 5, n % 5, num_examples=40, batch_size=16, classes=classes, cycles=True
        )
        np.testing.assert_array_equal(indices[-1], expected)
        np.testing.assert_array_equal(np.bincount(split().label[indices[-1]]), [4] * 4)
    images = np.bincount(np.concatenate(indices[:5]), minlength=40)
    np.testing.assert_array_equal(images[split().label == 0], 1)
    np.testing.assert_array_equal(images[split().label == 3], 10)


@pytest.mark.slow
def test_robal_updates_statistics_twice_and_the_released_code_four_times():
    method = RoBal(num_steps=0, start="zero", beta=0.0)
    moves = {}
    for fidelity in methods.base.FIDELITIES:
        step, state, pipeline, teacher = make(
            dataclasses.replace(method, fidelity=fidelity, start="zero"), 1, augment="none"
        )
        start = float(state.batch_stats["BatchNorm_0"]["var"][0])
        variables = jax.device_get({"params": state.params, "batch_stats": state.batch_stats})
        state, _ = step(state, pipeline.example, teacher)
        moves[fidelity] = start, float(state.batch_stats["BatchNorm_0"]["var"][0]), variables
    # With x_adv = x every forward sees the same variance v: after k moves it is 0.9^k * start + (1 - 0.9^k) v.
    start, paper, variables = moves["paper"]
    v = (paper - 0.81 * start) / 0.19
    _, released, _ = moves["released_code"]
    x = split().image.astype(np.float32) / 255
    _, new = Small(axis_name=None).apply(variables, x, train=True, mutable=["batch_stats"])
    assert v == pytest.approx((float(new["batch_stats"]["BatchNorm_0"]["var"][0]) - 0.9) / 0.1, rel=0.3)  # of all 40
    # The released start is one-sided: with num_steps = 0 x_adv differs from x, so v is approximate there.
    assert released == pytest.approx(0.9**4 * start + (1 - 0.9**4) * v, rel=0.05)
    assert abs(released - paper) > 0.05 * abs(start)


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="not a multiple of the 3 devices"):
        make(AT(), 3)
    with pytest.raises(ValueError, match="Did you mean 'crop_flip'"):
        StepOptions(batch_size=1, eps=0.1, step_size=0.1, augment="cropflip")
    with pytest.raises(ValueError, match="Did you mean 'shard_map'"):
        make(AT(), 1, "shardmap")


def test_training_repeats_bit_for_bit_and_depends_on_the_key():
    (a, _), (b, _), (c, _) = (run(RoBal(num_steps=1), 2, steps=2, seed=seed) for seed in (3, 3, 4))
    chex.assert_trees_all_equal(a, b)
    assert not np.allclose(a.params["kernel"], c.params["kernel"], rtol=1e-3)


@pytest.mark.slow
def test_frozen_parameters_stay_constant_on_any_number_of_devices(float64):
    options = {"freeze": "Conv_0/", "freeze_batch_stats": True}
    (first, _), one = (run(AT(num_steps=1), 1, steps=steps, **options) for steps in (0, 4))
    for parallel in ("pmap", "shard_map"):
        assert_same(run(AT(num_steps=1), 8, parallel, **options), one, 1e-9)
    state, _ = one
    chex.assert_trees_all_equal(state.params["Conv_0"], first.params["Conv_0"])
    chex.assert_trees_all_equal(state.batch_stats, first.batch_stats)
    assert np.abs(state.params["kernel"] - first.params["kernel"]).max() > 1e-4


@pytest.mark.slow
def test_the_attack_can_see_the_network_in_another_dtype():
    """Only `perturb` sees `attack_apply`: with negated logits the attack makes the loss smaller."""
    model = Small()

    def negated(variables, x, train):
        assert not train
        logits, out = model.apply(variables, x, train=train)
        return -logits, out

    def first_loss(**options):
        return run(AT(num_steps=3, start="zero"), 2, steps=1, **options)[1][0]["loss"]

    no_attack = first_loss()
    assert first_loss(attack_apply=model.apply) == no_attack
    assert first_loss(attack_apply=negated) < no_attack - 0.05


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_the_state_holds_a_threefry_key(impl):
    """Others would draw the same augmentation and the same start for every image of a device."""
    tx = optax.sgd(0.1)
    key = jax.random.key(3, impl=impl)
    state = train_state.create(key, {"params": {"w": jnp.ones(2)}}, tx, {})
    assert jax.random.key_impl(state.key) == "threefry2x32"
    np.testing.assert_array_equal(jax.random.key_data(state.key), jax.random.key_data(initialization.threefry(key)))
