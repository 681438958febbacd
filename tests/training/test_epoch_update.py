"""The validation split under attack, what a method and the average of weights learn from it, and its checkpoints."""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from configs import at, cgrm
from lt_adv import data
from lt_adv.cli import compile_run
from lt_adv.cli.experiment import Experiment
from lt_adv.compilation import topologies
from lt_adv.data import Split
from lt_adv.methods.at import AT
from lt_adv.methods.base import DataInfo, ValidationResult
from lt_adv.methods.cgrm import CGRm
from lt_adv.training import checkpoint, loop, sharding, train_state
from lt_adv.training.epoch_update import EpochUpdate, Validation, average_epoch, latest
from tests.training.helpers import COUNTS, Small, assert_same, make, split

INFO = DataInfo(class_counts=COUNTS, steps_per_epoch=2, epochs=3, image_shape=(6, 6, 1), num_features=6)
NONE = {"name": "none", "decay": 0.88, "start_epoch": 0, "min_class_accuracy": 0.0}
EPOCH_EMA = NONE | {"name": "epoch_ema"}
IMAGE = np.arange(11 * 4, dtype=np.uint8).reshape(11, 2, 2, 1) * 5
LABEL = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 2], np.int32)


def by_brightness(variables, x):
    """Class by brightness: `variables` are two thresholds; the features are the mean and the mean square."""
    m = x.mean((1, 2, 3))
    logits = [variables[0] - m, jnp.minimum(m - variables[0], variables[1] - m), m - variables[1]]
    return jnp.stack(logits, -1), {"features": jnp.stack([m, m**2], -1)}


@pytest.mark.parametrize(("devices", "batch_size"), [(1, 4), (8, 256), (4, 5)])
def test_confusion_and_features_count_every_image_once(devices, batch_size):
    mesh = sharding.make_mesh(jax.devices()[:devices])
    validate = Validation(
        by_brightness,
        Split(IMAGE, LABEL, np.arange(11)),
        3,
        attack={"eps": 1e-6, "step_size": 1e-6, "num_steps": 1},
        key=jax.random.key(0),
        mesh=mesh,
        batch_size=batch_size,
    )
    thresholds = jnp.array([0.31, 0.69])
    result = validate(sharding.replicate(thresholds, mesh), 1)
    m = IMAGE.mean((1, 2, 3)) / 255
    confusion = np.zeros((3, 3))
    np.add.at(confusion, (LABEL, np.digitize(m, thresholds)), 1)
    confusion /= confusion.sum(1, keepdims=True)
    assert 0 < np.diag(confusion).min() < np.diag(confusion).max() < 1
    np.testing.assert_allclose(result.confusion, confusion, rtol=1e-6)
    np.testing.assert_array_equal(result.accuracy, np.diagonal(result.confusion))
    np.testing.assert_allclose(
        result.features, [[np.mean(v[c == LABEL]) for v in (m, m**2)] for c in range(3)], rtol=1e-4
    )


def test_the_attack_starts_elsewhere_in_each_epoch_and_is_the_same_again():
    mesh = sharding.make_mesh(jax.devices()[:2])
    options = {"attack": {"eps": 0.3, "step_size": 0.1, "num_steps": 0}, "mesh": mesh, "batch_size": 8}
    images = Split(IMAGE, LABEL, np.arange(11))
    results = [
        Validation(by_brightness, images, 3, key=jax.random.key(seed), **options)(jnp.array([0.3, 0.7]), epoch)
        for seed, epoch in ((0, 1), (0, 1), (0, 2), (1, 1))
    ]
    features = [result.features.tolist() for result in results]
    assert features[0] == features[1] and features[2] != features[0] != features[3] != features[2]


def validation_of(mesh, seed=3):
    """Attacks the training images of the small network as its validation split, in batches of 24."""
    apply = functools.partial(Small(axis_name=None).apply, train=False)
    attack = {"eps": 0.1, "step_size": 0.05, "num_steps": 3}
    return Validation(apply, split(1), 4, attack=attack, key=jax.random.key(seed), mesh=mesh, batch_size=24)


def train(devices, parallel, sharded=(), restart=None):
    """Returns the state after each of two epochs, of two steps and the feedback, on the host.

    `restart` is the state after the first epoch to go on from.
    """
    mesh = sharding.make_mesh(jax.devices()[:devices])
    method, average = CGRm(num_steps=1, feedback_every=1), EPOCH_EMA | {"min_class_accuracy": 0.01}
    step, state, pipeline, teacher = make(method, devices, parallel, sharded=sharded, average=average)
    update = EpochUpdate(method, INFO, average, validation_of(mesh), mesh, parallel, sharded)
    first = 0 if restart is None else 2
    if restart is not None:
        state = sharding.shard_state(sharding.replicate(restart, mesh), mesh, sharded)
    states = []
    with pipeline.batches(first, 4) as batches:
        for n, batch in enumerate(batches, first):
            with jax.transfer_guard("disallow"):
                state, _ = step(state, batch, teacher)
            if n % 2:
                state = update(state, n // 2 + 1)
                states.append(jax.device_get(state))
    return states


def updated(mesh, parallel):
    """Returns score, graph and averaged kernel after the update of a fresh state; for tests/test_distributed.py too."""
    method, average = CGRm(feedback_every=1), EPOCH_EMA | {"min_class_accuracy": 0.01}
    variables = Small(axis_name=None).init(jax.random.key(3), jnp.zeros((1, 6, 6, 1), float), train=False)
    variables = jax.tree.map(lambda a: np.asarray(a, float), variables)
    key = jax.random.key(3)
    state = train_state.create(key, variables, optax.identity(), method.init_state(INFO), average="epoch_ema")
    state = sharding.replicate(state, sharding.state_mesh(mesh, parallel))
    state = EpochUpdate(method, INFO, average, validation_of(mesh), mesh, parallel)(state, 1)
    return {**state.method_state, "kernel": state.average["params"]["kernel"]}


def without_key(state):
    return dataclasses.replace(state, key=jax.random.key_data(state.key))


@pytest.fixture(scope="module")
def on_one_device():
    with jax.enable_x64(True):
        return train(1, "pmap")


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("parallel", "sharded"),
    [("pmap", ()), pytest.param("shard_map", ("opt_state", "average", "params"), marks=pytest.mark.slow)],
)
def test_eight_devices_equal_one(on_one_device, parallel, sharded):
    states = train(8, parallel, sharded)
    for state, expected in zip(states, on_one_device, strict=True):
        assert_same(without_key(state), without_key(expected), 1e-9)
    scores = [state.method_state["score"] for state in states]
    assert np.ptp(scores[0]) > 0 and not np.array_equal(*scores) and np.any(states[0].method_state["graph"])


@pytest.mark.usefixtures("float64")
def test_resume_after_feedback_is_bit_exact(on_one_device):
    first, second = on_one_device
    (again,) = train(1, "pmap", restart=first)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(without_key(again)), jax.tree.leaves(without_key(second)), strict=True
    ):
        assert a.tobytes() == b.tobytes(), jax.tree_util.keystr(path)


def test_feedback_compiles_nothing_again():
    """The updated state has the shardings of the old one. Its buffers are those of the old one, which is donated."""
    mesh = sharding.make_mesh(jax.devices()[:2])
    method, average = CGRm(num_steps=0, feedback_every=1), EPOCH_EMA | {"min_class_accuracy": 0.01}
    step, state, pipeline, teacher = make(method, 2, average=average)
    update = EpochUpdate(method, INFO, average, validation_of(mesh), mesh)
    compiled, counts = [], []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if name.endswith("backend_compile_duration") else None
    )
    for epoch in (1, 2, 3):
        trained, _ = step(state, pipeline.example, teacher)
        state = update(trained, epoch)
        counts.append(len(compiled))
    assert counts[0] == counts[1] == counts[2] > 0
    assert all(a.is_deleted() for a in jax.tree.leaves((trained.params, trained.average)))


def test_the_average_skips_epochs_with_a_weak_class():
    """a <- a + (1 - 0.88) (p - a); until the first accepted epoch the average equals the weights."""
    mesh = sharding.make_mesh(jax.devices()[:1])
    accuracies = {1: 0.1, 2: 0.3, 3: 0.1, 4: 0.2, 5: 0.6}

    def validate(variables, epoch):
        jax.tree.map(np.testing.assert_array_equal, variables, new)  # of the last step, not the average
        return ValidationResult(jnp.diag(jnp.array([0.9, accuracies[epoch]])), jnp.zeros((2, 1)))

    average = EPOCH_EMA | {"min_class_accuracy": 0.2}
    update = EpochUpdate(AT(), INFO, average, validate, mesh)
    _, state, _, _ = make(AT(num_steps=0), 1, average=average)
    expected, num_epochs, rng = None, 0, np.random.default_rng(0)
    for epoch, accepted in enumerate([False, True, False, True, True], 1):
        new = jax.tree.map(lambda a: rng.normal(size=a.shape).astype(a.dtype), latest(state))
        state = dataclasses.replace(state, **jax.tree.map(jnp.asarray, new))
        state = update(state, epoch)
        if num_epochs == 0:
            expected = new
        elif accepted:
            expected = jax.tree.map(lambda a, p: 0.88 * a + 0.12 * p, expected, new)
        num_epochs += accepted
        assert state.average["num_epochs"] == num_epochs
        for name, variables in state.variables.items():
            jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), variables, expected[name])


def test_without_a_threshold_every_epoch_is_averaged_and_nothing_is_attacked():
    a, p = {"x": jnp.array([1.0, 2.0]), "num_epochs": jnp.array(3)}, {"x": jnp.array([3.0, 0.0])}
    np.testing.assert_allclose(average_epoch(a, p, True, 0.88)["x"], [1.24, 1.76])
    np.testing.assert_array_equal(average_epoch(a, p, False, 0.88)["x"], a["x"])
    np.testing.assert_array_equal(average_epoch(a | {"num_epochs": jnp.array(0)}, p, False, 0.88)["x"], p["x"])
    _, state, _, _ = make(AT(num_steps=0), 1, average=EPOCH_EMA)
    update = EpochUpdate(AT(), INFO, EPOCH_EMA, None, sharding.make_mesh(jax.devices()[:1]))
    assert update(state, 1).average["num_epochs"] == 1
    untouched = EpochUpdate(AT(), INFO, NONE, None, sharding.make_mesh(jax.devices()[:1]))
    assert untouched(state, 1) is state


# --- through the config and the loop


def test_a_missing_validation_split_is_refused():
    config = cgrm.get_config("dataset=digits")
    config.data.validation_per_class = 0
    with pytest.raises(ValueError, match=r"'cgrm' adapts to .*: set config\.data\.validation_per_class above 0"):
        Experiment.from_config(config)
    config = at.get_config("dataset=digits")
    config.average.update(name="epoch_ema", decay=0.88)
    Experiment.from_config(config)
    config.average.min_class_accuracy = 0.2
    with pytest.raises(ValueError, match=r"min_class_accuracy needs a validation split: set config\.data\.validation_"):
        Experiment.from_config(config)
    config.average.name = "ema"
    with pytest.raises(ValueError, match=r"min_class_accuracy applies to 'epoch_ema' only, .*'ema': leave it at 0"):
        Experiment.from_config(config)
    config.average.update(name="epoch_ema", min_class_accuracy=0.0, start_epoch=1)
    with pytest.raises(ValueError, match=r"start_epoch applies to 'swa' only: leave it at 0 for 'epoch_ema'"):
        Experiment.from_config(config)


def test_compile_sees_the_training_step_only():
    config = cgrm.get_config("dataset=digits")
    config.average.update(name="epoch_ema", min_class_accuracy=0.2)
    experiment = compile_run.abstract_experiment(config, topologies.get_topology("cpu:1"))
    (program,) = compile_run.programs(experiment, ("train",))
    assert program.name == "train_step" and program.arguments[0].average["num_epochs"].shape == ()


@pytest.mark.slow
def test_a_run_resumes_after_the_feedback(tmp_path):
    """The checkpoint of the first epoch has the feedback of that epoch, and the run goes on from it."""
    config = cgrm.get_config("dataset=digits,epochs=2,base=at")
    config.method.feedback_every, config.checkpoint.every_epochs, config.attack.num_steps = 1, 1, 0
    config.average.update(name="epoch_ema", min_class_accuracy=0.01)
    config.log.clean_per_class, config.data.validation_per_class, config.addons = 0, 3, ()
    known = {"dataset": data.load(config.data), "mesh": sharding.make_mesh(jax.devices()[:1])}

    def run(workdir):
        experiment = Experiment.from_config(config, **known)
        loop.train(experiment.resolved_stages, epath.Path(workdir), experiment.mesh)
        return checkpoint.read_variables(workdir)[0]

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    expected = run(whole)
    shutil.copytree(whole, stopped)
    shutil.rmtree(stopped / "checkpoints" / "0_train" / "14")
    first = checkpoint.read_variables(stopped)[0]
    assert np.ptp(first["method_state"]["score"]) > 0
    resumed = run(stopped)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(resumed), jax.tree.leaves(expected), strict=True):
        assert a.tobytes() == b.tobytes(), jax.tree_util.keystr(path)
    assert not np.array_equal(first["method_state"]["score"], resumed["method_state"]["score"])
