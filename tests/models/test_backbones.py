"""Comparison of the networks with the released PyTorch ones, in float64, with deterministic values in every tensor."""

import json
import pathlib
import re

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lt_adv.models import create

SPECIFICATION = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "models.json").read_text())

WRN_10_1 = {"name": "wide_resnet", "depth": 10, "width": 1, "head": {"name": "cosine_plus", "scale": 10.0}}
WRN_16_2 = {"name": "wide_resnet", "depth": 16, "width": 2}
# name: (config, classes, key of the images, batch size, {batch norm: values per channel that its statistics average})
NETWORKS = {
    "wrn_10_1_cosine_plus": (
        WRN_10_1, 10, "images", 4, {"backbone.block1.layer.0.bn1": 4 * 32 * 32, "backbone.bn1": 4 * 8 * 8},
    ),
    "wrn_16_2_linear": (
        WRN_16_2, 10, "images", 4, {"backbone.block1.layer.0.bn1": 4 * 32 * 32, "backbone.bn1": 4 * 8 * 8},
    ),
    "resnet18_linear": (
        {"name": "resnet18"}, 10, "images", 2, {"bn1": 2 * 32 * 32, "layer4.1.bn2": 2 * 4 * 4},
    ),
    "preact_resnet18_linear": (
        {"name": "preact_resnet18"}, 200, "images64", 2, {"layer1.0.bn1": 2 * 64 * 64, "bn": 2 * 8 * 8},
    ),
}  # fmt: skip
LEAVES = {
    "weight": ("params", "scale"),
    "bias": ("params", "bias"),
    "running_mean": ("batch_stats", "mean"),
    "running_var": ("batch_stats", "var"),
}


def fill(t, name, shape):
    """Returns the values of tensor number t of the state_dict, by the `fill_rule` of models.json."""
    i = np.arange(int(np.prod(shape)), dtype=np.float64)
    if len(shape) >= 2:
        values = np.sin(1.7 * i + 0.9 * t * t + 0.3 * np.floor(i / 7)) * np.sqrt(3 / np.prod(shape[1:]))
    elif name.endswith("running_var"):
        values = 1 + 0.2 * np.cos(i + 3 * t)
    elif name.endswith("running_mean"):
        values = 0.1 * np.sin(i + 2 * t)
    elif name.endswith("weight"):
        values = 1 + 0.1 * np.sin(i + t)
    else:
        values = 0.05 * np.cos(i + t)
    return values.reshape(shape)


def flax_path(name, ndim):
    """PyTorch's name -> flax path: backbone.block2.layer.0.bn1.weight -> params/backbone/stage2_block0/bn1/scale."""
    *module, leaf = name.removeprefix("backbone.").split(".")
    module = ".".join(module)
    collection, leaf = ("params", "kernel") if leaf == "weight" and ndim >= 2 else LEAVES[leaf]
    if module in ("linear", "classifier", "classifier.fc"):
        return (collection, "head", leaf)
    module = re.sub(r"^(?:block|layer)(\d)\.(?:layer\.)?(\d)\.", r"stage\1_block\2.", module)
    module = re.sub(r"shortcut\.0$|convShortcut$", "shortcut", module)
    module = re.sub(r"shortcut\.1$", "shortcut_bn", module)
    if name == f"backbone.bn1.{name.rsplit('.', 1)[-1]}":  # a WideResNet's last batch norm, a ResNet's first
        module = "bn"
    return (collection, "backbone", *module.split("."), leaf)


def to_flax(tensor):
    """OIHW -> HWIO, [out, in] -> [in, out]."""
    return {4: lambda a: a.transpose(2, 3, 1, 0), 2: np.transpose}.get(tensor.ndim, lambda a: a)(tensor)


def golden_variables(name):
    variables, extra_bias = {}, 0.0
    for t, (tensor, shape) in enumerate(SPECIFICATION[name]["state_dict"]):
        if tensor.endswith(("num_batches_tracked", "moving_ed")):
            continue
        values = to_flax(fill(t, tensor, shape))
        if tensor == "classifier.bias":  # 0 in RoBal's cosine head, but filled by the rule
            extra_bias = values
        else:
            variables[flax_path(tensor, len(shape))] = values
    return flax.traverse_util.unflatten_dict(variables), extra_bias


@pytest.mark.parametrize("name", NETWORKS)
def test_golden(name, golden, assert_golden):
    config, classes, images, batch, averaged = NETWORKS[name]
    reference = golden("models")
    classifier = create({**config, "dtype": "float64"}, classes)
    with jax.enable_x64(True):
        variables, bias = golden_variables(name)
        x = jnp.asarray(reference[images][:batch])
        assert jax.tree.map(jnp.shape, jax.eval_shape(classifier.init, jax.random.key(0), x)) == jax.tree.map(
            np.shape, variables
        )

        @jax.jit
        def both_modes(variables, x):
            logits, _ = classifier.apply(variables, x)
            (train_logits, _), updates = classifier.apply(variables, x, train=True, mutable=["batch_stats"])
            return logits, train_logits, updates["batch_stats"]

        logits, train_logits, after = both_modes(variables, x)
        assert_golden(logits + bias, reference[f"{name}.eval_logits"])
        assert_golden(train_logits + bias, reference[f"{name}.train_logits"])
        before = flax.traverse_util.flatten_dict(variables["batch_stats"])
        after = flax.traverse_util.flatten_dict(jax.device_get(after))
    prefix = f"{name}.after_train_forward."
    assert {key.removeprefix(prefix).rsplit(".", 1)[0] for key in reference if key.startswith(prefix)} == set(averaged)
    for module, n in averaged.items():
        mean, variance = (flax_path(f"{module}.{leaf}", 1)[1:] for leaf in ("running_mean", "running_var"))
        assert_golden(after[mean], reference[f"{prefix}{module}.running_mean"])
        # PyTorch averages the unbiased variance: convert the batch's part of the running average.
        batch_share = (after[variance] - 0.9 * before[variance]) * n / (n - 1)
        expected = reference[f"{prefix}{module}.running_var"]
        assert_golden(0.9 * before[variance] + batch_share, expected)


def parameter_count(config, classes):
    shapes = jax.eval_shape(create(config, classes).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))


@pytest.mark.parametrize("name", NETWORKS)
def test_parameter_count_matches_the_released_networks(name):
    config, classes, *_ = NETWORKS[name]
    unused = 74 if name == "wrn_10_1_cosine_plus" else 0  # the head's bias (10) and moving average (64)
    assert parameter_count(config, classes) == SPECIFICATION[name]["parameters"] - unused


def test_wrn_34_10_has_46_million_parameters():
    assert parameter_count({"name": "wide_resnet", "depth": 34, "width": 10}, 10) == 46_160_474


@pytest.mark.parametrize("config", [WRN_10_1, {"name": "resnet18"}, {"name": "preact_resnet18"}])
@pytest.mark.parametrize("size", [8, 32, 64])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_image_size_and_channels(config, size, channels):
    classifier = create(config, 7)
    logits, out = jax.eval_shape(
        lambda key, x: classifier.init_with_output(key, x)[0], jax.random.key(0), jnp.zeros((2, size, size, channels))
    )
    assert logits.shape == (2, 7) and out["features"].shape[0] == 2


def initial(config, *paths):
    """Returns some leaves of the initial parameters; jit removes the others, which take seconds to compile on CPU."""

    @jax.jit
    def draw(key):
        params = create(config, 10).init(key, jnp.zeros((1, 8, 8, 3)))["params"]
        return [flax.traverse_util.flatten_dict(params, sep="/")[path] for path in paths]

    return [np.asarray(leaf) for leaf in draw(jax.random.key(0))]


def test_wide_resnet_initialisation_is_normal_of_variance_2_over_fan_out():
    kernel, shortcut = initial(
        WRN_10_1, "backbone/stage3_block0/conv1/kernel", "backbone/stage3_block0/shortcut/kernel"
    )
    assert kernel.shape == (3, 3, 32, 64) and shortcut.shape == (1, 1, 32, 64)
    assert abs(kernel.std() / np.sqrt(2 / (9 * 64)) - 1) < 0.02
    assert abs(shortcut.std() / np.sqrt(2 / 64) - 1) < 0.05
    assert np.abs(kernel).max() > 3 * kernel.std()


@pytest.mark.parametrize("name", ["resnet18", "preact_resnet18"])
def test_resnet_initialisation_is_uniform_of_bound_1_over_root_fan_in(name):
    (kernel,) = initial({"name": name}, "backbone/stage2_block0/conv1/kernel")
    bound = 1 / np.sqrt(9 * 64)
    assert kernel.shape == (3, 3, 64, 128)
    assert 0.99 * bound < np.abs(kernel).max() <= bound
    assert abs(kernel.std() / (bound / np.sqrt(3)) - 1) < 0.02
