"""Accuracy during training, compared with a count in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lt_adv.training import sharding
from lt_adv.training.validation_hook import Monitor

IMAGE = np.arange(11 * 4, dtype=np.uint8).reshape(11, 2, 2, 1) * 5
LABEL = np.array([0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2], np.int32)
GROUPS = {"head": np.array([0]), "body": np.array([1]), "tail": np.array([2])}


def apply(variables, x):
    """Class by brightness: `variables` are two thresholds."""
    m = x.mean((1, 2, 3))
    return jnp.stack([variables[0] - m, jnp.minimum(m - variables[0], variables[1] - m), m - variables[1]], -1)


@pytest.mark.parametrize("devices, batch_size", [(1, 4), (8, 256), (4, 5)])
def test_every_image_is_counted_once_for_any_batch_size(devices, batch_size):
    mesh = sharding.make_mesh(jax.devices()[:devices])
    attack = {"eps": 0.05, "step_size": 0.05, "num_steps": 3}
    monitor = Monitor(
        jax.random.key(0), apply, IMAGE, LABEL, groups=GROUPS, mesh=mesh, batch_size=batch_size, attack=attack
    )
    thresholds = jnp.array([0.51, 0.69])
    result = monitor(sharding.replicate(thresholds, mesh))
    brightness = IMAGE.mean((1, 2, 3)) / 255
    correct = np.digitize(brightness, thresholds) == LABEL
    assert result["clean/accuracy"] == pytest.approx(correct.mean()) and 0 < correct.mean() < 1
    balanced = np.mean([correct[c == LABEL].mean() for c in range(3)])
    assert result["clean/balanced_accuracy"] == pytest.approx(balanced) and abs(balanced - correct.mean()) > 0.01
    for group, classes in GROUPS.items():
        assert result[f"clean/accuracy_{group}"] == pytest.approx(correct[np.isin(LABEL, classes)].mean())
    assert result["pgd3/accuracy"] < result["clean/accuracy"]


def test_the_monitor_compiles_once(caplog):
    mesh = sharding.make_mesh(jax.devices()[:4])
    label = np.arange(20) % 4
    image = np.zeros((20, 2, 2, 1), np.uint8)
    groups = {"head": np.array([0])}
    apply = lambda variables, x: jnp.zeros((len(x), 4)) + variables + 0 * x.sum()  # noqa: E731
    monitor = Monitor(jax.random.key(0), apply, image, label, groups=groups, mesh=mesh, batch_size=4)
    variables = sharding.replicate(np.float32(1), mesh)
    first = monitor(variables)
    with jax.log_compiles():
        assert monitor(variables) == first
    assert not [line for line in caplog.messages if "Finished XLA compilation" in line]
