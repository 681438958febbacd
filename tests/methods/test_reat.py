"""REAT: its counts of predictions, its attack, tail alignment, and the limit that equals AT-BSL."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import reat
from lt_adv import losses
from lt_adv.cli.experiment import Experiment
from lt_adv.methods.at_bsl import ATBSL
from lt_adv.methods.reat import REAT
from tests.methods.fake_net import FakeNet, make_batch
from tests.training.helpers import COUNTS, assert_same, make, run

pytestmark = pytest.mark.usefixtures("float64")


@dataclasses.dataclass(frozen=True)
class Spy(REAT):
    """REAT whose state holds the predictions of the last step."""

    def init_state(self, info):
        return {**super().init_state(info), "latest": jnp.zeros(16, int)}

    def loss(self, key, net, batch, x_adv, method_state, progress):
        latest = net.gather(jnp.argmax(net(x_adv, train=True)[0], -1))
        out = super().loss(key, net, batch, x_adv, method_state, progress)
        return out._replace(method_state={**out.method_state, "latest": latest})

    def epoch_end(self, method_state, progress):
        return {**method_state, **super().epoch_end(method_state, progress)}


def test_counts_are_the_predictions_of_the_last_epoch_on_all_devices():
    step, state, pipeline, teacher = make(Spy(num_steps=1), 2)  # two steps are an epoch
    extras = [jax.device_get(state.method_state)]
    with pipeline.batches(0, 4) as batches:
        for data in batches:
            state, _ = step(state, data, teacher)
            extras.append(jax.device_get(state.method_state))
    np.testing.assert_array_equal(extras[0]["predicted"], COUNTS)
    for first in (1, 3):
        once, twice = (np.bincount(extras[first + n]["latest"], minlength=4) for n in (0, 1))
        np.testing.assert_array_equal(extras[first]["running"], once)
        np.testing.assert_array_equal(extras[first]["predicted"], extras[first - 1]["predicted"])
        np.testing.assert_array_equal(extras[first + 1]["predicted"], once + twice)
        assert (once + twice).sum() == 32 and not extras[first + 1]["running"].any()
    assert len({tuple(method_state["predicted"].tolist()) for method_state in extras}) == 3


def test_without_tail_alignment_it_is_at_bsl_from_a_uniform_start():
    """Weights of the inner loss do not change an L-inf attack, which uses only the sign of the gradient."""
    (state, rows), (expected, others) = (
        run(method, 1, steps=4) for method in (REAT(num_steps=2, tail_weight=0.0), ATBSL(num_steps=2, start="uniform"))
    )
    assert np.ptp(state.method_state["predicted"]) > 0
    for name in ("params", "batch_stats"):
        assert_same(getattr(state, name), getattr(expected, name), 1e-12)
    np.testing.assert_allclose([row["loss"] for row in rows], [row["loss"] for row in others], rtol=1e-12)


@pytest.mark.parametrize(
    ("counts", "tail"),
    [
        ((5000, 3237, 2096, 1357, 878, 568, 368, 238, 154, 100), (7, 8, 9)),
        ((20, 12, 6, 2), (3,)),
        ((1, 40, 9, 30, 2, 8, 3), (0, 4)),  # ranks 5 and 6 of seven classes that are in no order
        ((9, 5, 1), ()),
    ],
)
def test_the_tail_is_the_rarest_classes(counts, tail):
    features = jax.random.normal(jax.random.key(0), (2 * len(counts), 5))
    label = jnp.arange(2 * len(counts)) % len(counts)
    info = types.SimpleNamespace(class_counts=np.array(counts), num_classes=len(counts))
    net = FakeNet(lambda x: (jnp.eye(len(counts))[label], {"features": x}), info=info)
    method, batch = REAT(tail_weight=1.0), make_batch(label=label)

    def alignment(x):
        return method.loss(None, net, batch, x, method.init_state(info), None).metrics["loss_tail"]

    # Examples of other classes are contrasts, not anchors: the sum over anchors changes with each tail class.
    expected = losses.tail_alignment(
        features, label, class_counts=counts, tail=np.isin(np.arange(len(counts)), tail), margin=1.0
    )
    assert float(alignment(features)) == pytest.approx(float(expected.sum()) / max(2 * len(tail), 1), rel=1e-12)
    assert (float(alignment(features)) > 0) == bool(tail)


def test_readings_and_weight_of_tail_alignment():
    ours, released = (
        run(REAT(num_steps=1, tail_weight=0.5, fidelity=fidelity), 1, steps=1)[1][0]
        for fidelity in ("paper", "released_code")
    )
    for row in (ours, released):
        assert row["loss"] == pytest.approx(row["loss_balanced"] + 0.5 * row["loss_tail"], rel=1e-12)
    assert ours["loss_balanced"] == pytest.approx(released["loss_balanced"], rel=1e-12)
    assert ours["loss_tail"] > 0 and 0 < abs(released["loss_tail"]) < 0.1 * ours["loss_tail"]
    with pytest.raises(ValueError, match=r"config\.method\.tail_margin must be a number in \(0, inf\), not 0\.0"):
        REAT(tail_margin=0.0)


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_protocol(dataset):
    config = reat.get_config(f"dataset={dataset}")
    (stage,) = Experiment.from_config(config).stages
    assert (stage.method.start, stage.epochs, config.model.name) == ("uniform", 80, "resnet18")
    assert (config.attack.eps, config.attack.step_size, config.attack.num_steps) == (8 / 255, 2 / 255, 10)
    optim = config.optim
    assert (optim.batch_size, optim.weight_decay, optim.drop_epochs, optim.first_epoch) == (128, 5e-4, (60, 75), 0)
