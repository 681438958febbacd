"""The training-time rows of RoBal's study: each config's loss against the released numbers, and when it begins."""

import dataclasses
import importlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.special import expit

from configs import common
from lt_adv import methods
from lt_adv.cli import schema
from lt_adv.cli.experiment import Experiment
from lt_adv.methods.at import AT
from lt_adv.methods.focal import Focal
from lt_adv.methods.ldam import LDAM
from lt_adv.training import optimizer, sharding, stage_builder
from tests.methods.fake_net import FakeNet, make_batch
from tests.training.helpers import COUNTS, run

# Config -> the golden logits it acts on, and the golden loss it has.
GOLDEN = {
    "at": ("logits", "cross_entropy"),
    "cosine": ("logits", "cross_entropy"),
    "resampling": ("logits", "cross_entropy"),
    "margin": ("cosine_logits", "uniform_margin"),
    "ldam": ("logits", "ldam"),
    "cdt": ("logits", "cdt"),
    "logit_adjustment": ("logits", "logit_adjust"),
    "focal": ("logits", "focal_sigmoid"),
    "class_balanced_focal": ("logits", "class_balanced_focal"),
}
DEFERRED = [(1, "cross_entropy"), (39, "cross_entropy"), (40, "ldam"), (80, "ldam")]


def get(name, arguments=""):
    return importlib.import_module(f"configs.{name}").get_config(arguments)


def method_of(name, fidelity="paper"):
    config = get(name, "dataset=cifar10")
    config.fidelity = fidelity
    (stage,) = Experiment.from_config(config).stages
    return stage.method


def value_and_gradient(method, arrays, source="logits", epoch=1):
    """Of the method's loss with respect to the logits, in `epoch` (from 1)."""
    net = FakeNet(lambda x: (x, {}), info=SimpleNamespace(class_counts=arrays["class_counts"]))
    batch = make_batch(label=jnp.asarray(arrays["labels"]))
    progress = methods.TrainProgress(step=epoch - 1, epoch=jnp.asarray(epoch - 1), steps_per_epoch=1, epochs=80)
    return jax.value_and_grad(lambda z: method.loss(None, net, batch, z, {}, progress).loss)(
        jnp.asarray(arrays[source])
    )


@pytest.mark.parametrize("name", GOLDEN)
def test_loss_of_a_row(golden, assert_golden, name):
    source, expected = GOLDEN[name]
    with jax.enable_x64(True):
        arrays = golden("losses_and_heads")
        value, gradient = value_and_gradient(method_of(name), arrays, source)
    assert_golden(value, arrays[f"{expected}.value"])
    assert_golden(gradient, arrays[f"{expected}.grad"])


@pytest.mark.parametrize(("epoch", "expected"), DEFERRED)
def test_deferred_margin(golden, assert_golden, epoch, expected):
    with jax.enable_x64(True):
        arrays = golden("losses_and_heads")
        value, gradient = value_and_gradient(method_of("deferred_margin"), arrays, epoch=epoch)
    assert_golden(value, arrays[f"{expected}.value"])
    assert_golden(gradient, arrays[f"{expected}.grad"])


@pytest.mark.parametrize("epoch", [10, 39, 40, 50])
def test_deferred_reweighting(golden, assert_golden, epoch):
    """The weighted mean of the cross-entropies and its gradient, written out, with the released weights."""
    with jax.enable_x64(True):
        arrays = golden("losses_and_heads")
        value, gradient = value_and_gradient(method_of("deferred_reweighting"), arrays, epoch=epoch)
    weights = arrays["drw_weights_epoch10" if epoch < 40 else "drw_weights_epoch50"][arrays["labels"]]
    p = np.exp(arrays["logits"]) / np.exp(arrays["logits"]).sum(-1, keepdims=True)
    one_hot = np.eye(p.shape[1])[arrays["labels"]]
    assert_golden(value, np.average(-np.log(p[one_hot == 1]), weights=weights))
    assert_golden(gradient, weights[:, None] * (p - one_hot) / weights.sum())
    if epoch < 40:
        assert_golden(value, arrays["cross_entropy.value"])


def test_deferred_losses_start_at_their_epoch():
    """Two steps are an epoch: the first two are those of plain adversarial training, the third is not."""
    with jax.enable_x64(True):
        _, rows = run(LDAM(from_epoch=2, max_margin=3.0, num_steps=0), 1, steps=3)
        _, no_attack = run(AT(num_steps=0), 1, steps=3)
    losses = [(float(a["loss"]), float(b["loss"])) for a, b in zip(rows, no_attack, strict=True)]
    assert all(a == pytest.approx(b, rel=1e-12) for a, b in losses[:2]) and abs(losses[2][0] - losses[2][1]) > 1e-3


def test_focal_starts_from_the_frequencies():
    info = SimpleNamespace(class_counts=COUNTS)
    params = {"backbone": {"w": np.ones(2)}, "head": {"kernel": np.ones((3, 4)), "bias": np.zeros(4, np.float32)}}
    started = Focal().init_params(params, info)
    np.testing.assert_allclose(expit(started["head"]["bias"]), COUNTS / COUNTS.sum(), rtol=1e-6)
    assert started["head"]["bias"].dtype == np.float32 and started["head"]["kernel"] is params["head"]["kernel"]
    assert started["backbone"] is params["backbone"] and not params["head"]["bias"].any()
    assert Focal(prior_bias=False).init_params(params, info) is params and AT().init_params(params, info) is params


def test_a_run_starts_with_the_initial_parameters_of_its_method():
    """And the parameters of an earlier stage go before it."""
    config, mesh = get("focal", "dataset=digits"), sharding.make_mesh(jax.devices()[:1])
    (resolved,) = Experiment.from_config(config, mesh=mesh).resolved_stages
    built = stage_builder.build(resolved, mesh)
    variables = jax.device_get(built.first_state().variables)
    np.testing.assert_allclose(
        expit(variables["params"]["head"]["bias"]), built.info.class_counts / built.info.class_counts.sum(), rtol=1e-5
    )
    previous = jax.tree.map(jnp.ones_like, variables)
    later = dataclasses.replace(resolved, number=1, stage=dataclasses.replace(resolved.stage, init="previous"))
    later = stage_builder.build(later, mesh, previous)
    assert (later.first_state().params["head"]["bias"] == 1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "focal", "gamma": -1.0}, r"config\.method\.gamma must be a number in \[0, inf\), not -1\.0"),
        ({"name": "focal", "beta": 1.0}, r"config\.method\.beta must be a number in \[0, 1\), not 1\.0"),
        ({"name": "reweighting", "beta": -0.5}, r"config\.method\.beta must be a number in \[0, 1\), not -0\.5"),
    ],
)
def test_bad_options_are_one_line(options, message):
    with pytest.raises(ValueError, match=message):
        methods.create(options)


def test_focal_needs_a_bias_to_start():
    config = get("focal", "dataset=digits")
    config.model.head.name = "cosine"
    with pytest.raises(ValueError, match=r"head\.name = 'cosine' does not have: choose 'linear', or .*prior_bias=F"):
        Experiment.from_config(config)
    config.method.prior_bias = False
    assert len(Experiment.from_config(config).stages) == 1


@pytest.mark.parametrize("name", ["at", "robal", "margin", "focal", "deferred_reweighting", "at_bsl"])
def test_start_of_the_released_code(name):
    """One-sided in all of the study, which AT-BSL is not part of."""
    image = jnp.full((8, 4, 4, 1), 0.5)
    batch = methods.Batch(image, jnp.zeros(8, int), jnp.arange(8), eps=jnp.full(8, 0.1), step_size=jnp.full(8, 0.1))
    net = FakeNet(lambda x: (x.mean((1, 2)) * jnp.arange(3.0), {}))
    low = {}
    for fidelity in ("paper", "released_code"):
        method = dataclasses.replace(method_of(name, fidelity), num_steps=0)
        x = method.perturb(jax.random.split(jax.random.key(0), 8), net, batch, {}, None)
        low[fidelity] = float((x - image).min())
        assert method.attack_start == ("one_sided" if low[fidelity] >= 0 else method.start)
    assert low["paper"] < 0 and (low["released_code"] >= 0) == (name != "at_bsl")


# Config -> head, method (without its name), sampler.
VALUES = {
    "cosine": ({"name": "cosine", "scale": 16}, {"name": "at"}),
    "margin": ({"name": "cosine", "scale": 1}, {"name": "margin", "margin": 0.2, "scale": 10}),
    "ldam": ({"name": "linear"}, {"name": "ldam", "max_margin": 0.5, "scale": 1, "from_epoch": 1}),
    "deferred_margin": ({"name": "linear"}, {"name": "ldam", "max_margin": 0.5, "scale": 1, "from_epoch": 40}),
    "cdt": ({"name": "linear"}, {"name": "cdt", "tau": 0.3}),
    "logit_adjustment": ({"name": "linear_no_bias"}, {"name": "logit_adjustment", "tau": 1}),
    "focal": ({"name": "linear"}, {"name": "focal", "gamma": 2, "beta": 0, "prior_bias": True}),
    "class_balanced_focal": ({"name": "linear"}, {"name": "focal", "gamma": 2, "beta": 0.9999, "prior_bias": False}),
    "deferred_reweighting": ({"name": "linear"}, {"name": "reweighting", "beta": 0.9999, "from_epoch": 40}),
    "resampling": ({"name": "linear"}, {"name": "at"}),
}


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_values_of_a_row(name, dataset):
    head, method = VALUES[name]
    config = get(name, f"dataset={dataset}")
    assert config.model.head.to_dict() == head and config.method.to_dict() == method
    assert config.data.sampler == ("class_aware" if name == "resampling" else "uniform")
    assert config.optim.warmup_epochs == (5 if name == "focal" else 0)
    epochs, drops = (25, (15, 20)) if name == "resampling" else (80, (60, 75))
    assert (config.optim.epochs, config.optim.drop_epochs) == (epochs, drops)
    row, baseline = (schema.flatten(c.to_dict()) for c in (config, get("at", f"dataset={dataset}")))
    allowed = ("method.", "model.head.", "data.sampler", "optim.epochs", "optim.drop_epochs", "optim.warmup_epochs")
    different = {path for path in {*row, *baseline} if row.get(path) != baseline.get(path)}
    assert not {path for path in different if not path.startswith(allowed)}, "the rest is plain adversarial training's"


def test_epochs_of_a_row_scale_with_its_length():
    assert get("deferred_margin", "epochs=10").method.from_epoch == 5
    assert get("deferred_reweighting", "epochs=10").method.from_epoch == 5
    assert get("deferred_margin", "dataset=digits").method.from_epoch == 15  # of 30
    assert get("deferred_margin", "epochs=1").method.from_epoch == 2  # never the first epoch
    assert [get("focal", f"epochs={n}").optim.warmup_epochs for n in (1, 10, 30, 160)] == [1, 1, 2, 10]
    assert get("resampling", "epochs=10").optim.drop_epochs == (6, 8)
    assert get("resampling", "dataset=digits").optim.epochs == 9  # as 25 to 80, so 9 to 30
    assert common.scaled(40, 80, of=80) == 40


def test_warm_up_of_focal():
    """Step by step, linearly, over five epochs; in the released code by the epoch, and what it scales down stays so."""
    config = get("focal", "dataset=cifar10")
    rate = optimizer.schedule(config.optim, 10, config.optim.epochs)
    np.testing.assert_allclose([rate(step) for step in (0, 24, 49, 50, 589)], [0.002, 0.05, 0.1, 0.1, 0.1], rtol=1e-5)
    released = optimizer.schedule(config.optim, 10, config.optim.epochs, compounding=True)
    expected = 0.1 * np.cumprod([2 / 5, 3 / 5, 4 / 5, 1, 1])
    np.testing.assert_allclose([released(10 * epoch + 5) for epoch in range(5)], expected, rtol=1e-5)
