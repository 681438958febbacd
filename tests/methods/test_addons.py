"""Every add-on: equal results on one and eight devices, composition, and limit cases."""

import dataclasses
import inspect
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import at
from lt_adv import attacks, methods
from lt_adv.cli import record_header
from lt_adv.cli.experiment import Experiment
from lt_adv.data import longtail
from lt_adv.methods import addons, base
from lt_adv.methods.addons.awp import AWP
from lt_adv.methods.addons.base import AddOn
from lt_adv.methods.addons.robustlt import RobustLT, class_radii
from lt_adv.methods.alp import ALP
from lt_adv.methods.at import AT
from lt_adv.methods.robal import RoBal
from lt_adv.methods.trades import Trades
from lt_adv.training.net import AXIS, Net
from tests.methods.fake_net import FakeNet
from tests.training.helpers import COUNTS, Small, assert_same, run

pytestmark = pytest.mark.usefixtures("float64")

SETTINGS = {  # each acts after one of the three epochs
    "robustlt": {"alpha": 0.3, "warmup": 0.3},
    "dafa": {"scale": 1.0, "epoch": 0.3, "min_weight": 0.5},
    "cfa": {"lambda_1": 0.5, "lambda_2": 0.5, "begin": 0.3},
    "awp": {"gamma": 0.05},
}
EVERY = addons.names()
# Each alone, and all together around a loss that is no mean over examples.
CASES = {name: (AT(num_steps=1), (name,)) for name in EVERY} | {
    "all": (ALP(num_steps=1), EVERY),
    "trades": (Trades(num_steps=1), ("cfa",)),
    "released_code": (AT(num_steps=1, fidelity="released_code"), ("dafa",)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_eight_devices_equal_one(name):
    inner, chosen = CASES[name]
    method = addons.wrap(inner, chosen, SETTINGS)
    one = run(method, 1)
    assert all(np.isfinite(row["loss"]) and row["gradient_norm"] > 0 for row in one[1])
    for parallel in ("pmap", "shard_map") if name == "all" else ("shard_map",):
        assert_same(run(method, 8, parallel), one, 1e-9)


# --- what an add-on is


@pytest.mark.parametrize("name", EVERY)
def test_contract(name):
    method = addons.wrap(RoBal(num_steps=3, fidelity="released_code"), (name,), SETTINGS)
    assert isinstance(method, AddOn) and type(method).__doc__ and inspect.getmodule(type(method)).__doc__
    options = {f.name for f in dataclasses.fields(method) if f.init} - {"inner"}
    assert options == set(SETTINGS[name]) and options == set(at.get_config()[name]), (
        "each setting is an entry of the config"
    )
    assert (method.num_steps, method.fidelity, method.compounding_schedule) == (3, "released_code", True)
    assert method.attack_start == ("uniform" if name == "robustlt" else "one_sided"), "RobustLT sets the start"
    assert hash(method) == hash(dataclasses.replace(method))
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.inner = AT()
    with pytest.raises((TypeError, ValueError), match="num_steps"):
        dataclasses.replace(method, num_steps=1)


@pytest.mark.parametrize("name", EVERY)
def test_values_out_of_range_are_refused(name):
    for option in SETTINGS[name]:
        with pytest.raises(ValueError, match=rf"config\.{name}\.{option} must be a number in [\[(]0, .*, not -1\.0"):
            addons.wrap(AT(), (name,), {name: {**SETTINGS[name], option: -1.0}})


def test_add_ons_are_not_methods():
    assert set(EVERY) == set(SETTINGS) and not set(methods.names()) & {"addons", *EVERY}


def test_add_ons_delegate_every_function_of_a_method():
    """Otherwise the inner method's override of a new function of `Method` would be lost."""
    functions = {name for name, f in vars(base.Method).items() if inspect.isfunction(f) and not name.startswith("__")}
    assert functions - {"maximize"} <= vars(AddOn).keys(), "maximize is what the inner method calls itself"


def test_every_stage_is_wrapped():
    @dataclasses.dataclass(frozen=True)
    class TwoStages(base.Method):
        def stages(self, config):
            first = base.Stage(dataclasses.replace(self, num_steps=1), epochs=1, name="teacher")
            return first, base.Stage(self, epochs=2, name="student", teacher="previous")

    stages = addons.wrap(TwoStages(), ("robustlt", "awp"), SETTINGS).stages(None)
    assert [(s.name, s.epochs, s.teacher) for s in stages] == [("teacher", 1, None), ("student", 2, "previous")]
    for stage, steps in zip(stages, (1, 10), strict=True):
        assert type(stage.method) is AWP and type(stage.method.inner) is RobustLT
        assert type(stage.method.inner.inner) is TwoStages and stage.method.num_steps == steps
        assert (stage.method.gamma, stage.method.inner.alpha) == (0.05, 0.3)


def test_from_the_config():
    config = at.get_config("dataset=cifar100")
    config.addons = ("robustlt", "awp")
    experiment = Experiment.from_config(config)
    (stage,) = experiment.stages
    assert stage.method == AWP(RobustLT(AT(num_steps=5), alpha=0.4, warmup=0.6), gamma=0.005)
    described = "at + robustlt (alpha 0.4, warmup 0.6) + awp (gamma 0.005)"
    assert record_header.describe_method(experiment) == described
    config.addons = ()
    experiment = Experiment.from_config(config)
    assert type(experiment.stages[0].method) is AT and record_header.describe_method(experiment) == "at"
    assert at.get_config("dataset=cifar10").robustlt.to_dict() == {"alpha": 0.3, "warmup": 0.8}


def test_bad_names():
    with pytest.raises(ValueError, match="Unknown addon 'awpp'. Did you mean 'awp'"):
        addons.wrap(AT(), ("awpp",), SETTINGS)
    with pytest.raises(ValueError, match="config.addons names 'awp' twice"):
        addons.wrap(AT(), ("awp", "robustlt", "awp"), SETTINGS)


# --- AWP


def test_awp_of_gamma_0_is_the_inner_method():
    """Running statistics included: the forwards that look for the direction do not count."""
    inner = AT(num_steps=1)
    assert_same(run(AWP(inner, gamma=0.0), 1), run(inner, 1), 1e-12)


@dataclasses.dataclass(frozen=True)
class Quartic(base.Method):
    """A loss of the weights alone, whose gradient (w - 1)^3 depends on where it is taken."""

    def loss(self, key, net, batch, x_adv, method_state, progress):
        value = sum(jnp.sum((w - 1) ** 4) / 4 for w in jax.tree.leaves(net.params))
        return base.LossOutput(value, logits=None)


def test_awp_is_the_gradient_at_perturbed_weights():
    rng = np.random.default_rng(3)
    params = {"kernel": rng.normal(size=(3, 2)), "bias": rng.normal(size=4), "flat": np.ones((2, 2))}

    def gradient(_):
        def value(p):
            return AWP(Quartic(), gamma=0.1).loss(None, Net(None, p, {}, None, key=None), None, None, {}, None).loss

        return jax.grad(value)(jax.tree.map(jnp.asarray, params))

    gradients = jax.tree.map(lambda a: a[0], jax.jit(jax.vmap(gradient, axis_name=AXIS))(jnp.zeros(1)))
    w, g = params["kernel"], (params["kernel"] - 1) ** 3
    moved = w + 0.1 * np.linalg.norm(w) * g / np.linalg.norm(g)
    np.testing.assert_allclose(gradients["kernel"], (moved - 1) ** 3, rtol=1e-12)
    np.testing.assert_allclose(gradients["bias"], (params["bias"] - 1) ** 3, rtol=1e-12)  # one dimension: not moved
    np.testing.assert_array_equal(gradients["flat"], 0)  # no gradient, no direction, and no division by zero


# --- RobustLT


def test_radii_of_the_paper():
    """CIFAR-10-LT ratio 50, alpha 0.3, eps 8 (/255), as printed."""
    counts = longtail.class_counts(10, 5000, imbalance_ratio=50.0)
    expected = [5.60, 8.03, 9.03, 9.80, 10.45, 11.03, 11.54, 12.02, 12.46, 12.88]
    np.testing.assert_allclose(8 * class_radii(counts, 0.3), expected, rtol=0, atol=0.005)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_radii_have_the_mean_of_one_radius(alpha):
    radii = class_radii(COUNTS, alpha)
    assert np.average(radii, weights=COUNTS) == pytest.approx(1, rel=1e-12)
    assert np.all(np.diff(radii) > 0) if alpha else np.all(radii == 1)
    np.testing.assert_array_equal(class_radii((7, 7, 7), alpha), 1)


RNG = np.random.default_rng(4)
LABEL = jnp.arange(16) % 4
EPS, STEP = 0.1, 0.03
WEIGHT = RNG.normal(size=(9, 4))


def linear(x):
    return jnp.tanh(x.reshape(len(x), -1) - 0.5) @ WEIGHT, {}


def perturb(method, epoch=0, epochs=10, low=0.3, high=0.7):
    """(x, x_adv) of 16 images in [low, high]."""
    image = jnp.asarray(np.random.default_rng(5).uniform(low, high, (16, 3, 3, 1)))
    ones = jnp.ones(16)
    batch = base.Batch(image, LABEL, jnp.arange(16), eps=EPS * ones, step_size=STEP * ones)
    progress = base.TrainProgress(step=jnp.asarray(0), epoch=jnp.asarray(epoch), steps_per_epoch=1, epochs=epochs)
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(6)))(jnp.arange(16))
    net = FakeNet(linear, info=types.SimpleNamespace(class_counts=COUNTS))
    return np.asarray(image), np.asarray(method.perturb(keys, net, batch, {}, progress))


@pytest.mark.parametrize("warmup", [0.0, 0.8])
def test_robustlt_of_alpha_0_perturbs_as_the_inner_method(warmup):
    """Bit for bit, once warm: the same start, radius and step, where clipping the start changes nothing."""
    _, bare = perturb(AT(num_steps=3))
    np.testing.assert_array_equal(perturb(RobustLT(AT(num_steps=3), alpha=0.0, warmup=warmup), epoch=8)[1], bare)
    assert not np.array_equal(perturb(RobustLT(AT(num_steps=3), alpha=0.1, warmup=warmup), epoch=8)[1], bare)


@dataclasses.dataclass(frozen=True)
class ByBatch(AT):
    """AT whose attack starts clipped and sees batch statistics: all of RobustLT but the radii."""

    def perturb(self, key, net, batch, method_state, progress):
        def noise(k):
            return jax.random.uniform(k, batch.image.shape[1:], batch.image.dtype, -1, 1)

        eps = batch.eps[:, None, None, None]
        return attacks.pgd(
            key, lambda x: net.with_batch_statistics()(x, train=True)[0], batch.image, batch.label, eps=batch.eps,
            step_size=batch.step_size, num_steps=self.num_steps,
            x_init=jnp.clip(batch.image + eps * jax.vmap(noise)(key), 0, 1),
        )  # fmt: skip


def test_robustlt_of_alpha_0_trains_as_the_inner_method():
    method = RobustLT(AT(num_steps=2), alpha=0.0, warmup=0.0)
    assert_same(run(method, 1), run(ByBatch(num_steps=2), 1), 1e-12)


@pytest.mark.parametrize(("epoch", "share"), [(0, 0.0), (2, 0.25), (4, 0.5), (8, 1.0), (9, 1.0)])
def test_radius_by_class_and_epoch(epoch, share):
    """Warm-up over 8 of 10 epochs; after enough steps some pixel of each image is at the edge."""
    x, x_adv = perturb(RobustLT(AT(num_steps=20), alpha=0.3, warmup=0.8), epoch)
    radii = share * EPS * class_radii(COUNTS, 0.3)[np.asarray(LABEL)]
    np.testing.assert_allclose(np.abs(x_adv - x).reshape(16, -1).max(-1), radii, rtol=0, atol=1e-12)


def test_step_scales_as_the_radius_does():
    """From the centre, one step that stays inside is step_size times the class's share."""

    @dataclasses.dataclass(frozen=True)
    class Sizes(AT):
        def perturb(self, key, net, batch, method_state, progress):
            return jnp.stack([batch.eps, batch.step_size])

    eps, step = perturb(RobustLT(Sizes(), alpha=0.3, warmup=0.8), epoch=4)[1]
    factor = 0.5 * class_radii(COUNTS, 0.3)[np.asarray(LABEL)]
    np.testing.assert_allclose(eps, EPS * factor, rtol=1e-12)
    np.testing.assert_allclose(step, STEP * factor, rtol=1e-12)


def test_the_start_has_the_common_radius_and_is_clipped():
    @dataclasses.dataclass(frozen=True)
    class Start(AT):
        def perturb(self, key, net, batch, method_state, progress):
            return batch.x_init

    x, start = perturb(RobustLT(Start(), alpha=0.3), epoch=0, low=0.0, high=1.0)
    assert start.min() == 0 and start.max() == 1  # some were outside
    assert np.abs(start - x).max() <= EPS and np.abs(start - x).reshape(16, -1).max(-1).min() > 0.5 * EPS


# --- the network as the add-ons see it


@pytest.mark.parametrize("freeze", [False, True])
def test_derived_networks_do_not_update_statistics(freeze):
    model, x = Small(axis_name=None), jnp.asarray(RNG.uniform(size=(5, 6, 6, 1)))
    variables = jax.tree.map(lambda a: a.astype(float), model.init(jax.random.key(7), x, train=False))
    net = Net(model.apply, **variables, info=None, key=jax.random.key(8), freeze_batch_stats=freeze)
    running, before = net(x, train=False)[0], net.batch_stats
    silent, by_batch = net.without_updates()(x, train=True)[0], net.with_batch_statistics()(x, train=False)[0]
    np.testing.assert_array_equal(net.without_updates()(x, train=False)[0], running)
    np.testing.assert_array_equal(net.with_batch_statistics().with_params(net.params)(x, train=True)[0], by_batch)
    assert net.batch_stats is before
    np.testing.assert_array_equal(net(x, train=True)[0], silent)
    np.testing.assert_array_equal(silent, by_batch)
    assert np.array_equal(by_batch, running) == freeze and (net.batch_stats is before) == freeze
