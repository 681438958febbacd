"""Import of PyTorch weights: golden networks under the names of each release; errors for weights that do not fit."""

import functools
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lt_adv.models import create, torch_import
from tests.models.test_backbones import NETWORKS, SPECIFICATION, fill
from tests.models.test_classifier import random_variables
from tests.models.torch_files import (
    SAVE,
    golden_state,
    prefixed,
    reat,
    save_npz,
    save_safetensors,
    save_torch,
    trades,
    wide_resnet_state,
)

WRN = {"name": "wide_resnet", "depth": 10, "width": 1}
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.201)
COSINE = {**WRN, "head": {"name": "cosine_plus"}}
# release: (network, its tensor names, suffix, the dict around the state_dict)
RELEASES = {
    "robal": ("wrn_10_1_cosine_plus", lambda state: prefixed(state, "model.module."), ".pth", None),
    "robal_linear": ("wrn_16_2_linear", lambda state: prefixed(state, "model.module."), ".pt", None),
    "at_bsl": ("resnet18_linear", dict, ".pt", None),
    "at_bsl_preact": ("preact_resnet18_linear", dict, ".safetensors", None),
    "at_bsl_wide": ("wrn_16_2_linear", trades, ".pt", None),
    "reat": ("resnet18_linear", reat, ".pkl", lambda state: {"state_dict": state, "epoch": 79}),
    "robustbench": (
        "wrn_16_2_linear",
        lambda state: prefixed(trades(state), "module."),
        ".pt",
        lambda state: {"model_state_dict": state, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}},
    ),
    "net": ("wrn_16_2_linear", trades, ".tar", lambda state: {"net": state, "acc": 0.5}),
    "safetensors": ("wrn_10_1_cosine_plus", dict, ".safetensors", None),
    "npz": ("wrn_10_1_cosine_plus", dict, ".npz", None),
}


@functools.cache
def compiled(network):
    """Returns (model, its jitted logits), compiled once for all releases of a network; call in double precision."""
    config, classes, *_ = NETWORKS[network]
    model = create({**config, "dtype": "float64"}, classes)
    return model, jax.jit(lambda variables, x: model.apply(variables, x)[0])


@pytest.mark.parametrize("release", RELEASES)
def test_golden_logits_of_every_release(release, tmp_path, golden, assert_golden):
    network, names, suffix, wrap = RELEASES[release]
    _, _, images, batch, _ = NETWORKS[network]
    state = names(golden_state(network))
    path = tmp_path / f"weights{suffix}"
    save_torch(path, state, wrap or dict) if suffix not in SAVE or wrap else SAVE[suffix](path, state)
    reference = golden("models")
    bias = 0.0  # 0 in RoBal's cosine head, but filled by the golden rule
    for t, (tensor, shape) in enumerate(SPECIFICATION[network]["state_dict"]):
        if tensor == "classifier.bias":
            bias = fill(t, tensor, shape)
    with jax.enable_x64(True):
        model, logits = compiled(network)
        x = jnp.asarray(reference[images][:batch])
        variables, unused = torch_import.variables(path, model, x.shape[1:])
        assert_golden(logits(variables, x) + bias, reference[f"{network}.eval_logits"])
    known = ("num_batches_tracked", "moving_ed", "classifier.bias")
    expected = {name for name in state if name.endswith(known) or "sub_block1." in name}
    assert set(unused) == expected and all(unused.values())


@pytest.fixture(scope="module")
def drawn():
    """`drawn(config, classes)` returns (model, random variables) of a WideResNet for 8 x 8 x 3 images."""

    def draw(config=WRN, classes=10):
        model = create(config, classes)
        return model, random_variables(model, jnp.zeros((1, 8, 8, 3)))

    return draw


@pytest.mark.parametrize(("depth", "width", "classes"), [(10, 1, 10), (22, 3, 7), (34, 2, 100)])
@pytest.mark.parametrize("suffix", SAVE)
def test_export_and_import_at_any_depth_and_width(drawn, tmp_path, depth, width, classes, suffix):
    model, variables = drawn({**WRN, "depth": depth, "width": width}, classes)
    path = SAVE[suffix](tmp_path / f"weights{suffix}", wide_resnet_state(variables))
    imported, unused = torch_import.variables(path, model, (8, 8, 3))
    assert not unused and jax.tree.structure(imported) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, imported, variables)
    assert {leaf.dtype for leaf in jax.tree.leaves(imported)} == {np.dtype("float32")}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_bfloat16_becomes_float32(drawn, tmp_path, suffix):
    model, variables = drawn()
    state = wide_resnet_state(variables)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        save_torch(path, state, lambda tensors: {name: tensor.bfloat16() for name, tensor in tensors.items()})
    else:
        save_safetensors(path, {name: array.astype(jnp.bfloat16) for name, array in state.items()})
    imported, _ = torch_import.variables(path, model, (8, 8, 3))
    rounded = jax.tree.map(lambda a: np.asarray(a).astype(jnp.bfloat16).astype(np.float32), variables)
    jax.tree.map(np.testing.assert_array_equal, imported, rounded)


def test_normalisation_of_the_file_and_the_config_agree(drawn, tmp_path):
    """The buffers of a layer before the network (RobustBench's) or in it, of any shape with one value a channel."""
    _, variables = drawn()
    model, state = create({**WRN, "mean": MEAN, "std": STD}, 10), wide_resnet_state(variables)
    mean, std = np.float32(MEAN), np.float32(STD)
    layouts = [
        {
            "normalize.mean": mean.reshape(1, 3, 1, 1),
            "normalize.std": std.reshape(3, 1, 1),
            **prefixed(state, "model."),
        },
        prefixed({**state, "mu": np.float64(MEAN), "sigma": std}, "module."),
        state,  # normalised in code
    ]
    for layout in layouts:
        path = save_npz(tmp_path / "weights.npz", layout)
        imported, unused = torch_import.variables(path, model, (8, 8, 3))
        jax.tree.map(np.testing.assert_array_equal, imported, variables)
        known = [name for name in layout if name.endswith((".mean", "normalize.std", ".mu", ".sigma"))]
        assert unused == dict.fromkeys(known, torch_import.NORMALISED)
    x = np.random.default_rng(0).random((4, 8, 8, 3), np.float32)
    logits, _ = jax.jit(model.apply)(imported, x)
    expected, _ = jax.jit(create(WRN, 10).apply)(variables, (x - mean) / std)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    assert np.abs(logits - jax.jit(create(WRN, 10).apply)(variables, x)[0]).max() > 0.01


def without(state, *names):
    return {name: array for name, array in state.items() if name not in names}


def change(state, name, f):
    return {**state, name: f(state[name])}


FIRST = "block1.layer.0.conv1.weight"


@pytest.mark.parametrize(
    ("config", "edit", "line"),
    [
        (WRN, lambda s: without(s, FIRST), "missing: params/backbone/stage1_block0/conv1/kernel."),
        (
            WRN,
            lambda s: {
                **without(s, "bn1.bias", "fc.bias"),
                "bn3.bias": s["bn1.bias"],
                "classifier.cla_scale": np.ones(3),
            },
            "missing: params/backbone/bn/bias, params/head/bias; not in the network: classifier.cla_scale, bn3.bias.",
        ),
        (
            WRN,
            lambda s: change(s, "block2.layer.0.conv1.weight", lambda a: a[:, :3]),
            "block2.layer.0.conv1.weight is float32[3, 3, 3, 32], expected float32[3, 3, 16, 32]",
        ),
        (WRN, lambda s: change(s, "fc.bias", lambda a: a.astype(np.int8)), "fc.bias is int8[10], expected float32[10]"),
        (WRN, lambda s: change(s, FIRST, lambda a: a * np.nan), f"not finite: {FIRST}."),
        (WRN, lambda s: change(s, "fc.bias", lambda a: a + np.float64(1e300)), "not finite: fc.bias."),
        (
            {**WRN, "depth": 16, "width": 2},
            dict,
            "the weights are those of a WideResNet-10-1 for 3-channel images and 10 classes, the config's network is a "
            "WideResNet-16-2 for 3-channel images and 10 classes.",
        ),
        (WRN, lambda s: change(s, "fc.weight", lambda a: a[:7]), "for 3-channel images and 7 classes, the config's"),
        (
            WRN,
            lambda s: change(s, "conv1.weight", lambda a: a[:, :1]),
            "for 1-channel images and 10 classes, the",
        ),
        ({"name": "resnet18"}, dict, "the config's network is a ResNet-18 for 3-channel images"),
        (WRN, lambda s: golden_state("resnet18_linear"), "the weights are those of a ResNet-18 for 3-channel"),
        (
            {"name": "resnet18"},
            lambda s: golden_state("preact_resnet18_linear"),
            "those of a PreActResNet-18 for",
        ),
        (COSINE, dict, "fc.weight is the weight of a linear head, the config's is a cosine one."),
        (
            WRN,
            lambda s: golden_state("wrn_10_1_cosine_plus"),
            "classifier.weight is the weight of a cosine head, the config's is a linear one.",
        ),
        (
            COSINE,
            lambda s: change(golden_state("wrn_10_1_cosine_plus"), "classifier.bias", lambda a: a + 0.1),
            "not in the network: classifier.bias.",
        ),
        (
            {**WRN, "head": {"name": "linear_no_bias"}},
            lambda s: change(s, "fc.bias", lambda a: a + 1),
            "not in the network: fc.bias.",
        ),
        (
            WRN,
            lambda s: {"normalize.mean": np.zeros((1, 3, 1, 1)), "normalize.std": np.ones(3), **prefixed(s, "model.")},
            "normalize.mean, normalize.std normalise the images: set config.model.mean to (0.0, 0.0, 0.0) and "
            "config.model.std to (1.0, 1.0, 1.0).",
        ),
        (
            {**WRN, "mean": MEAN, "std": STD},
            lambda s: {**s, "mu": np.float32(MEAN), "sigma": np.float32([0.2, 0.2, 0.3])},
            "mu, sigma normalise the images: set config.model.std to (0.2, 0.2, 0.3).",
        ),
        (
            {**WRN, "mean": (0.5,), "std": (0.5,)},
            lambda s: {**s, "mean": np.full((3, 8, 8), 0.5)},
            "mean has the shape [3, 8, 8]: supported is one mean for each channel.",
        ),
        (
            {**WRN, "mean": (0.5, 0.5), "std": (0.5, 0.5)},
            dict,
            "model.mean and model.std have 2 values for images of 3 channels: give one for each channel, or one for",
        ),
        (WRN, lambda s: {**s, "linear.weight": s["fc.weight"]}, "fc.weight and linear.weight are the same tensor"),
        (WRN, lambda s: {"epoch": np.array(3)}, "and 34 more; not in the network: epoch."),
    ],
)
def test_weights_that_do_not_fit(drawn, tmp_path, config, edit, line):
    _, variables = drawn()
    path = save_npz(tmp_path / "weights.npz", edit(wide_resnet_state(variables)))
    with pytest.raises(ValueError) as error:
        torch_import.variables(path, create(config, 10), (8, 8, 3))
    text = str(error.value)
    assert text.startswith(f"{path}: ") and line in text and "\n" not in text and len(text) < 600, text


def test_bias_of_zeros_is_dropped_for_a_head_without_bias(drawn):
    model, variables = drawn({**WRN, "head": {"name": "linear_no_bias"}})
    state = {**wide_resnet_state(variables), "fc.bias": np.zeros(10, np.float32)}
    imported, unused = torch_import.convert(state, model, (8, 8, 3))
    assert set(imported["params"]["head"]) == {"kernel"} and unused == {"fc.bias": torch_import.NO_BIAS}


def test_error_without_pytorch_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with zipfile.ZipFile(tmp_path / "weights.pt", "w") as file:  # as torch.save writes one
        file.writestr("weights/data.pkl", b"")
    with pytest.raises(ImportError, match=r"weights\.pt needs PyTorch to be read: pip install -e '\.\[torch\]', or"):
        torch_import.variables(tmp_path / "weights.pt", create(WRN, 10), (8, 8, 3))
