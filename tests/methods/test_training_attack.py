"""`config.attack.name`: the search of the inner maximization, in every method."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from lt_adv import attacks, losses, methods
from lt_adv.attacks.initialization import example_keys
from lt_adv.cli import record_header, schema
from lt_adv.cli.experiment import Experiment
from lt_adv.methods import Batch, TrainProgress
from lt_adv.methods.addons.robustlt import RobustLT
from lt_adv.training import stage_builder
from tests.training.helpers import COUNTS, assert_same, run

RNG = np.random.default_rng(0)
WEIGHT = RNG.normal(size=(12, 4)).astype(np.float32)
X, Y = RNG.uniform(size=(8, 2, 2, 3)).astype(np.float32), RNG.integers(0, 4, 8)
KEYS, EPS = example_keys(jax.random.key(0), 8), 0.1
BATCH = Batch(image=X, label=Y, index=Y, eps=jnp.full(8, EPS), step_size=jnp.full(8, EPS / 4))
ONE_STEP = ("fgsm", "fgsm_rs", "n_fgsm")


class Net:
    info = methods.DataInfo(COUNTS, steps_per_epoch=2, epochs=10, image_shape=(2, 2, 3), num_features=12)

    def __call__(self, x, *, train):
        assert not train
        return logits_fn(x), {}

    def with_batch_statistics(self):
        return self


def logits_fn(x):
    return 2 * x.reshape(len(x), -1) @ WEIGHT


def perturb(method, state=None, epoch=9):
    return method.perturb(KEYS, Net(), BATCH, state or {}, TrainProgress.at(jnp.asarray(2 * epoch), Net.info))


def direct(name, y=Y, eps=EPS, **options):
    return getattr(attacks, name)(KEYS, logits_fn, X, y, eps=eps, **options)


def config(name="at", **entries):
    result = common.get("digits", epochs=2, drop_epochs=(), of=2)
    result.method.name = name
    result.update_from_flattened_dict(entries)
    return result


OTHERS = [name for name in methods.names() if name not in ("at", "cgrm", "natural", "trades")]


@pytest.mark.parametrize(
    ("name", "attack"), [("at", "pgd"), *(("at", a) for a in ONE_STEP), *((name, "n_fgsm") for name in OTHERS)]
)
def test_every_method_on_the_cross_entropy(name, attack):
    """The default is PGD with the options of the method; the other attacks are those of `lt_adv.attacks`."""
    method = methods.create({"name": name}, attack=attack)
    options = {"step_size": EPS / 4, "num_steps": method.num_steps, "start": method.start} if attack == "pgd" else {}
    result = perturb(method, method.init_state(Net.info))
    np.testing.assert_allclose(result, direct(attack, **options), atol=1e-6)
    if attack == "pgd":
        assert method == methods.create({"name": name})


@pytest.mark.parametrize("name", ["cgrm", "trades"])
@pytest.mark.parametrize("attack", ["fgsm_rs", "n_fgsm"])
def test_trades_keeps_its_objective(attack, name):
    clean = jax.nn.softmax(logits_fn(X))
    expected = np.asarray(direct(attack, clean, objective=attacks.kl_divergence))
    np.testing.assert_allclose(perturb(methods.create({"name": name}, attack=attack)), expected, atol=1e-6)
    assert np.mean(expected != np.asarray(direct(attack))) > 0.1, "not that of the cross-entropy"


def test_reat_keeps_its_objective():
    method = methods.create({"name": "reat"}, attack="n_fgsm")
    state = {**method.init_state(Net.info), "predicted": np.array([40, 0, 0, 0])}
    weight = losses.rebalanced_weights(COUNTS, state["predicted"])[Y]
    expected = direct("n_fgsm", objective=lambda z, y: weight * attacks.cross_entropy(z, y))
    np.testing.assert_allclose(perturb(method, state), expected, atol=1e-6)
    assert len(np.unique(weight)) > 1


def test_options_of_the_config():
    for entries, options in (
        ({"attack.name": "n_fgsm"}, {}),
        ({"attack.name": "n_fgsm", "attack.noise": 1.0, "attack.relative_step_size": 0.5}, {"noise": 1.0, "step": 0.5}),
        ({"attack.name": "fgsm_rs", "attack.relative_step_size": 0.75}, {"step": 0.75}),
    ):
        step = {"step_size": EPS * options.pop("step")} if "step" in options else {}
        method = stage_builder.create_method(config(**entries))
        np.testing.assert_allclose(perturb(method), direct(entries["attack.name"], **options, **step), atol=1e-6)


@pytest.mark.parametrize("attack", ONE_STEP)
def test_robustlt_scales_the_radius(attack):
    method = RobustLT(inner=methods.create({"name": "at"}, attack=attack), warmup=0.5)
    assert method.attack == attack
    full = method._scaled(BATCH, Net.info, TrainProgress.at(jnp.asarray(18), Net.info))
    assert len(np.unique(full.eps)) > 1
    np.testing.assert_allclose(perturb(method), direct(attack, eps=full.eps), atol=1e-6)
    np.testing.assert_array_equal(perturb(method, epoch=0), X)


def test_existing_configs_have_the_default():
    """An older working directory has no such entries: they count as these defaults (`workdirs.require_same_config`)."""
    assert config().attack.name == "pgd" and config().attack.noise == 2.0
    assert config().attack.relative_step_size is None
    without = config()
    with without.unlocked():
        del without.attack.name, without.attack.noise, without.attack.relative_step_size
    assert stage_builder.create_method(without) == stage_builder.create_method(config())


@pytest.mark.parametrize(
    ("name", "entries", "message"),
    [
        ("at", {"attack.name": "fgsm-rs"}, r"Unknown config\.attack\.name 'fgsm-rs'. Did you mean 'fgsm_rs'\?"),
        ("natural", {"attack.name": "n_fgsm"}, r"config\.attack\.name is 'n_fgsm', but config\.method has no attack"),
        ("trades", {"attack.name": "fgsm"}, r"config\.attack\.name is 'fgsm', but the KL .* use 'fgsm_rs' or 'n_fgsm'"),
        ("at", {"attack.name": "n_fgsm", "attack.start": "zero"}, r"config\.attack\.start applies to 'pgd' only"),
        ("at", {"attack.name": "fgsm", "attack.start": "uniform"}, r"config\.attack\.start applies to 'pgd' only"),
        ("at", {"attack.name": "fgsm_rs", "attack.noise": 1.0}, r"config\.attack\.noise applies to 'n_fgsm' only"),
        ("at", {"attack.noise": -1.0}, r"config\.attack\.noise must be a number in \[0, inf\)"),
        ("at", {"attack.relative_step_size": 1.0}, r"relative_step_size applies to 'fgsm_rs' and 'n_fgsm' only"),
        ("at", {"attack.name": "n_fgsm", "attack.relative_step_size": 0.0}, r"relative_step_size must be a number in"),
    ],
)
def test_what_does_not_fit_is_named_in_one_line(name, entries, message):
    with pytest.raises(ValueError, match=message) as caught:
        Experiment.from_config(config(name, **entries))
    assert "\n" not in str(caught.value)


def test_names_are_those_of_the_schema():
    for name in methods.base.ATTACKS:
        Experiment.from_config(config(**{"attack.name": name}))
        schema.ENTRIES["attack.name"].rule("config.attack.name", name)


def test_header_of_a_report():
    def described(**entries):
        return record_header.training_attack(config(**entries).attack, "uniform")

    assert described() == "eps 0.1, step 0.025, 10 steps, start uniform"
    assert described(**{"attack.name": "fgsm"}) == "fgsm, eps 0.1, step 1 eps"
    assert described(**{"attack.name": "fgsm_rs"}) == "fgsm_rs, eps 0.1, step 1.25 eps"
    options = {"attack.name": "n_fgsm", "attack.relative_step_size": 0.5, "attack.dtype": "bfloat16"}
    assert described(**options) == "n_fgsm, eps 0.1, step 0.5 eps, noise 2 eps, in bfloat16"


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("attack", ONE_STEP)
def test_training_on_two_devices_equals_one(attack):
    method = methods.create({"name": "at"}, attack=attack)
    expected = run(method, 1, steps=2)
    for parallel in ("pmap", "shard_map") if attack == "n_fgsm" else ("shard_map",):
        assert_same(run(method, 2, parallel, steps=2), expected, 1e-9)
    assert abs(trained_on_pgd()[1][-1]["loss"] - expected[1][-1]["loss"]) > 1e-6, "the attack is used"


@functools.cache
def trained_on_pgd():
    return run(methods.create({"name": "at"}), 1, steps=2)
