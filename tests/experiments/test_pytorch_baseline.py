"""The PyTorch baseline and lt_adv take the same step in float64 from the same weights, images and starts."""

import dataclasses
import functools

import flax
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from tests.experiments import NO_TORCH

torch = pytest.importorskip("torch", reason=NO_TORCH)

from configs import at, at_bsl, robal, trades
from experiments.pytorch_baseline.step import Trainer
from lt_adv.attacks import initialization, norms
from lt_adv.cli.experiment import Experiment
from lt_adv.data import Dataset, Split, device_dataset, long_tailed
from lt_adv.methods import DataInfo
from lt_adv.models import create
from lt_adv.training import input_pipeline, optimizer, sharding, stage_builder, train_state
from lt_adv.training.net import AXIS
from lt_adv.training.train_step import StepOptions, make_train_step

CONFIGS = {
    "at": (at, "dataset=cifar10"),
    "at_bsl": (at_bsl, "dataset=cifar10"),
    "trades": (trades, "dataset=cifar10"),
    "robal_n": (robal, "dataset=cifar10,variant=N"),
    "robal_r": (robal, "dataset=cifar10,variant=R"),
}
# name: (config, side of the images, steps of the attack); XLA's float64 convolutions and their compilation are slow
NETWORKS = {
    "wrn_10_1": ({"name": "wide_resnet", "depth": 10, "width": 1}, 8, 2),
    "resnet18": ({"name": "resnet18"}, 4, 1),
}
COUNTS = (11, 7, 4, 2)
BATCH = 8


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_torch_thread", "float64")]


def make_config(name: str, network: str = "wrn_10_1", **changes) -> ml_collections.ConfigDict:
    module, argument = CONFIGS[name]
    config = module.get_config(argument)
    model, _, config.attack.num_steps = NETWORKS[network]
    config.model = {**model, "dtype": "float64", "head": config.model.head.to_dict()}
    config.data.update({"imbalance": "none", "augment": "none"})
    config.optim.batch_size = BATCH
    config.update_from_flattened_dict(changes)
    return config


@functools.cache
def dataset(side: int) -> Dataset:
    """Returns four long-tailed classes, each of one colour with noise."""
    rng = np.random.default_rng(0)
    label = np.repeat(np.arange(len(COUNTS)), COUNTS).astype(np.int32)
    colour = rng.uniform(60, 190, (len(COUNTS), 1, 1, 3))
    image = np.clip(colour[label] + rng.normal(0, 40, (len(label), side, side, 3)), 0, 255).astype(np.uint8)
    split = Split(image, label, np.arange(len(label)))
    return Dataset("synthetic", split, split, ("a", "b", "c", "d"), "0" * 64)


def images_of(config: ml_collections.ConfigDict):
    (side,) = (side for model, side, _ in NETWORKS.values() if model["name"] == config.model.name)
    return long_tailed(dataset(side), config.data)


def make_trainer(config: ml_collections.ConfigDict, setting: str = "tuned", **options) -> Trainer:
    return Trainer(config, images_of(config), setting=setting, **{"device": "cpu", "compiled": False, **options})


def first_variables(config: ml_collections.ConfigDict) -> dict:
    """Returns weights and statistics like those of a trained network: no scale is 1, no mean is 0."""
    rng = np.random.default_rng(1)

    def perturbed(path, array):
        if path[-1].key == "var":
            return array * rng.uniform(0.5, 1.5, array.shape)
        return array + rng.normal(0, 0.1, array.shape) * (array.ndim < 2)

    return jax.tree_util.tree_map_with_path(perturbed, make_trainer(config).variables())


@dataclasses.dataclass
class Step:
    """One step of lt_adv: the variables before and after, the batch, the start of the attack and the loss."""

    before: dict
    image: np.ndarray
    label: np.ndarray
    noise: np.ndarray
    after: dict
    loss: float


def lt_adv_step(config: ml_collections.ConfigDict) -> Step:
    split, mesh, key = images_of(config), sharding.make_mesh(jax.devices()[:1]), jax.random.key(5)
    train, (stage,), before = split.train, Experiment.from_config(config).stages, first_variables(config)
    num_features = stage_builder.variable_shapes(config, split)[1]
    info = DataInfo(np.array(split.class_counts), len(train) // BATCH, 1, train.image.shape[1:], num_features)
    # The random numbers of the step, from its keys.
    epoch_key = jax.random.fold_in(jax.random.fold_in(key, 0), 0)
    rows = device_dataset.batch_indices(epoch_key, 0, num_examples=len(train), batch_size=BATCH)
    image = train.image[rows].astype(float) / 255
    attack_key = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, 1), 0), 1)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(attack_key, jnp.arange(BATCH))
    start = stage.method.attack_start
    noise = initialization.starting_point(keys, jnp.zeros_like(image), config.attack.eps, start, norms.get("linf"))

    model = create(config.model, info.num_classes, axis_name=AXIS)
    rate = optimizer.schedule(config.optim, info.steps_per_epoch, info.epochs)
    tx = optimizer.create(config.optim, rate, before["params"])
    options = StepOptions(BATCH, config.attack.eps, config.attack.step_size, augment="none")
    take_step, _ = make_train_step(stage.method, model.apply, tx, rate, info, options, mesh)
    state = sharding.replicate(train_state.create(key, before, tx, stage.method.init_state(info)), mesh)
    data = input_pipeline.resident(train, None, key, info, BATCH, mesh).example
    state, metrics = take_step(state, data, {})
    after, loss = jax.device_get((state.variables, metrics["loss"]))
    return Step(before, image, train.label[rows], np.asarray(noise), after, float(loss))


def nchw(image: np.ndarray) -> "torch.Tensor":
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(image, -1, 1)))


def take(trainer: Trainer, step: Step) -> float:
    return trainer.step_on(nchw(step.image), torch.from_numpy(step.label).long(), nchw(step.noise)).item()


def values_per_channel(trainer: Trainer, image: np.ndarray) -> dict:
    """Returns path of a running variance -> number of batch values per channel."""
    counts = {}
    for name, module in trainer.model.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            path = (*name.split("."), "var")
            module.register_forward_pre_hook(lambda m, x, p=path: counts.update({p: x[0][:, 0].numel()}))
    trainer.model.eval()(nchw(image))
    return counts


def assert_same_change(actual, expected, before, tolerance=1e-9):
    """Compares changes from `before`, relative to the largest change of each array."""
    actual, expected, before = (flax.traverse_util.flatten_dict(tree) for tree in (actual, expected, before))
    assert actual.keys() == expected.keys()
    for path, value in expected.items():
        assert actual[path].dtype == value.dtype == np.float64
        change = np.abs(value - before[path]).max()
        assert change > 0, path
        error = np.abs(actual[path] - value).max() / change
        assert error < tolerance, f"{'/'.join(path)}: {error:.1e}"


def biased(after, before, per_channel, forwards):
    """Converts PyTorch's statistics after `forwards` train-mode forwards to those of flax: the part of each running
    variance that comes from the batches is unbiased in PyTorch and biased in flax."""
    after, before = (flax.traverse_util.flatten_dict(tree) for tree in (after, before))
    for path, n in per_channel.items():
        initial = 0.9**forwards * before[path]
        after[path] = initial + (after[path] - initial) * (n - 1) / n
    return flax.traverse_util.unflatten_dict(after)


def assert_same_step(config, setting, step, forwards):
    """`forwards` is the number of forwards that update the running statistics, 0 where the two differ in it."""
    trainer = make_trainer(config, setting, variables=step.before)
    assert take(trainer, step) == pytest.approx(step.loss, rel=1e-9)
    after = trainer.variables()
    assert_same_change(after["params"], step.after["params"], step.before["params"])
    if forwards:
        per_channel = values_per_channel(trainer, step.image)
        statistics = biased(after["batch_stats"], step.before["batch_stats"], per_channel, forwards)
        assert_same_change(statistics, step.after["batch_stats"], step.before["batch_stats"])


@pytest.mark.parametrize(
    ("name", "network"),
    # A small network with every loss, number of forwards and head; compiling a step of ResNet-18 takes ten seconds.
    [*((name, "wrn_10_1") for name in ("at", "at_bsl", "trades", "robal_n")), ("at_bsl", "resnet18")],
)
def test_one_step_equals_that_of_lt_adv(name, network):
    config = make_config(name, network)
    step, forwards = lt_adv_step(config), {"at": 1, "at_bsl": 1}.get(name, 2)
    assert_same_step(config, "tuned", step, forwards)
    assert_same_step(config, "released", step, forwards if forwards == 1 else 0)


@pytest.mark.parametrize(("name", "forwards"), [("robal_r", 4), ("trades", 3)])
def test_released_code_updates_statistics_in_every_forward(name, forwards):
    """Uses the start, the KL term and the forwards of the released code."""
    config = make_config(name, fidelity="released_code")
    step = lt_adv_step(config)
    for setting in ("tuned", "released"):
        assert_same_step(config, setting, step, forwards)


@pytest.mark.parametrize("name", CONFIGS)
def test_both_settings_have_the_same_loss(name):
    """The trainer draws batch, augmentation and start."""
    config = make_config(name, **{"data.augment": "crop_flip", "data.pad": 1})
    losses = [make_trainer(config, setting, seed=2).step().item() for setting in ("released", "tuned")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    other = make_trainer(config, seed=3).step().item()
    assert abs(other - losses[0]) > 1e-3  # the seed counts
