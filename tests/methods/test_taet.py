"""TAET: two stages that are one schedule, and a loss of the batch over all devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import taet
from lt_adv.cli import schema
from lt_adv.cli.experiment import Experiment
from lt_adv.methods.natural import Natural
from lt_adv.methods.taet import TAET
from lt_adv.training import optimizer, stage_builder
from tests.training.helpers import run


@pytest.mark.parametrize("dataset", ["cifar10", "tiny_imagenet"])
def test_protocol(dataset):
    config = taet.get_config(f"dataset={dataset}")
    clean, adversarial = Experiment.from_config(config).stages
    assert isinstance(clean.method, Natural) and isinstance(adversarial.method, TAET)
    assert (clean.epochs, adversarial.epochs, adversarial.init) == (40, 60, "previous")
    method = adversarial.method
    assert (method.start, method.num_steps, method.a, method.b, method.g) == ("gaussian", 10, 0.1, 0.1, 0.1)
    assert (config.attack.eps, config.attack.step_size) == (0.031, 0.003)
    assert config.eval.attacks.pgd100.step_size == 1 / 255 and config.eval.attacks.pgd20.step_size == 0.0078
    assert config.robustlt.warmup == (1.0 if dataset == "cifar10" else 0.6)
    assert (config.optim.batch_size, config.optim.weight_decay, config.optim.learning_rate) == (128, 5e-4, 0.1)


@pytest.mark.parametrize("fidelity", ["paper", "released_code"])  # plain training by itself would compound
@pytest.mark.parametrize("drops", [(75, 90), (20, 60), (40,), ()])
def test_drops_count_over_both_stages(drops, fidelity):
    config = taet.get_config("dataset=cifar10")
    config.optim.drop_epochs, config.fidelity = drops, fidelity
    rates, per_epoch = [], 3
    for stage in Experiment.from_config(config).stages:
        schedule = stage_builder.learning_rate(schema.stage_config(config, stage), stage, per_epoch)
        rates += [float(schedule(step)) for step in range(stage.epochs * per_epoch)]
    full = optimizer.schedule(config.optim, per_epoch, 100)
    np.testing.assert_allclose(rates, [full(step) for step in range(300)], rtol=1e-5)
    assert len(set(np.round(rates, 9))) == len(drops) + 1


def test_warm_up_and_average_count_over_both_stages():
    config = taet.get_config("dataset=cifar10")
    config.optim.warmup_epochs = 5
    for start, shifted in ((75, 35), (10, 0)):
        config.average.start_epoch = start
        clean, adversarial = Experiment.from_config(config).stages
        assert "optim.warmup_epochs" not in clean.overrides and adversarial.overrides["optim.warmup_epochs"] == 0
        assert adversarial.overrides["average.start_epoch"] == shifted


@pytest.mark.parametrize("epochs", [1, 40])
def test_too_few_epochs_are_one_line(epochs):
    config = taet.get_config("dataset=cifar10")
    config.optim.epochs = epochs
    with pytest.raises(
        ValueError, match=rf"config\.method\.clean_epochs must be .*config\.optim\.epochs = {epochs}, not 40"
    ):
        Experiment.from_config(config)


def test_with_a_alone_the_loss_is_the_mean_of_class_means():
    """a = 1 alone, one step: the loss against class means of the cross-entropy, from the images that it saw."""
    with jax.enable_x64(True):

        class Spy(TAET):
            def init_state(self, info):
                return {"values": jnp.zeros(16, float), "label": jnp.zeros(16, int)}

            def loss(self, key, net, batch, x_adv, method_state, progress):
                log_p = jax.nn.log_softmax(net(x_adv, train=True)[0])
                values = -jnp.take_along_axis(log_p, batch.label[:, None], 1)[:, 0]
                out = super().loss(key, net, batch, x_adv, method_state, progress)
                return out._replace(
                    method_state={"values": net.gather(values), "label": net.gather(batch.label).astype(int)}
                )

        state, rows = run(Spy(num_steps=1, a=1.0, b=0.0, g=0.0), 4, steps=1)
        saved = state.method_state
        means = [np.mean(v) if len(v := saved["values"][saved["label"] == c]) else 0.0 for c in range(4)]
        assert rows[0]["loss"] == pytest.approx(np.mean(means), rel=1e-9)
