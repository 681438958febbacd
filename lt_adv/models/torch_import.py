"""Conversion of PyTorch weights to variables of this project's networks.

Supported are the tensor names of the RoBal, AT-BSL and REAT releases and of RobustBench's WideResNets (TRADES' names).

The tensors do not determine, and an import cannot check: scale, gamma and eta of a cosine head, mean and std of a
normalisation of images in code (set them in the config), and an activation other than ReLU. RobustLT, CFA and FAAL
normalise in code. Two variants of PreActResNet-18 have the same tensor names; supported is the one whose projection
shortcut takes the activated input (CFA's, and RobustBench's PreActBlockV2).
"""

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import VariableDict

from lt_adv.models import heads, weight_files
from lt_adv.models.classifier import Classifier
from lt_adv.models.weight_files import format_names

PREFIX = re.compile(r"(module|model|net|_orig_mod)\.")  # of wrappers such as nn.DataParallel
# Pattern in a PyTorch module name -> replacement. The numbers are positions in REAT's nn.Sequential.
RENAMES: Sequence[tuple[str, str]] = (
    (r"^backbone\.", ""),
    (r"^(?:block(\d+)\.layer|layer(\d+))\.(\d+)\.", r"stage\1\2_block\3."),
    (r"\.convShortcut$", ".shortcut"),
    (r"\.shortcut\.0$", ".shortcut"),
    (r"\.shortcut\.1$", ".shortcut_bn"),
    (r"\.residual_function\.0$", ".conv1"),
    (r"\.residual_function\.1$", ".bn1"),
    (r"\.residual_function\.3$", ".conv2"),
    (r"\.residual_function\.4$", ".bn2"),
    (r"^conv1\.0$", "conv1"),
    (r"^conv1\.1$", "bn1"),
)
LEAVES = {
    "weight": ("params", "scale"),  # of a batch norm; a weight with more dimensions is a kernel
    "bias": ("params", "bias"),
    "running_mean": ("batch_stats", "mean"),
    "running_var": ("batch_stats", "var"),
}
# PyTorch module -> kind of head. RoBal's linear head contains a layer `fc`; its cosine head is the layer itself.
HEADS = {"fc": "linear", "linear": "linear", "classifier.fc": "linear", "classifier": "cosine"}
NORMALISATION = re.compile(r"(?:^|\.)(?:(?P<mean>mean|mu)|(?P<std>std|sigma))$")
UNUSED: Mapping[str, str] = {
    r"(^|\.)num_batches_tracked$": "number of batches, not used by batch norm with momentum 0.1",
    r"(^|\.)sub_block1\.": "a copy of the first stage that TRADES' WideResNet defines and never calls",
    r"(^|\.)classifier\.moving_ed$": "RoBal's running mean of feature directions, which RoBal itself does not use",
    r"^n_averaged$": "number of averaged networks",
}
NO_BIAS = "a bias of zeros; the head has no bias"
NORMALISED = "mean or std of the images, as in the config"


class Tensor(NamedTuple):
    """A tensor of a file of weights."""

    name: str  # in the file
    array: np.ndarray


def variables(
    path: str | pathlib.Path, model: Classifier, image_shape: Sequence[int]
) -> tuple[VariableDict, dict[str, str]]:
    """Returns `convert` of a file of weights; error messages name the file."""
    state = weight_files.load(path)
    try:
        return convert(state, model, image_shape)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def convert(
    state: Mapping[str, np.ndarray], model: Classifier, image_shape: Sequence[int]
) -> tuple[VariableDict, dict[str, str]]:
    """Converts a PyTorch state_dict to variables of `model`.

    Kernels [out, in, height, width] become [height, width, in, out] and matrices [out, in] become [in, out]; all
    arrays get the dtype of the model's variables.

    Args:
      state: PyTorch's tensor names -> arrays.
      model: the network that the variables are for.
      image_shape: [height, width, channels].

    Returns:
      ({"params", "batch_stats"} as numpy arrays, {name of an unused tensor: reason}).

    Raises:
      ValueError: in one line, for weights of another network or head, a normalisation of images by another mean or std
        than the model's, and tensors that are missing, unknown, of another shape or type, or not finite.
    """
    unused = {name: reason for name in state for pattern, reason in UNUSED.items() if re.search(pattern, name)}
    normalisation = {name: match for name in state if name not in unused and (match := NORMALISATION.search(name))}
    _check_normalisation({name: (match.lastgroup or "", state[name]) for name, match in normalisation.items()}, model)
    unused |= dict.fromkeys(normalisation, NORMALISED)
    original_names = {name: name for name in state if name not in unused}
    while (
        original_names
        and (wrapper := PREFIX.match(next(iter(original_names))))
        and all(name.startswith(wrapper[0]) for name in original_names)
    ):
        original_names = {name.removeprefix(wrapper[0]): original for name, original in original_names.items()}
    tensors, unknown = _to_flax({name: Tensor(original, state[original]) for name, original in original_names.items()})
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.result_type(float))
    expected = flax.traverse_util.flatten_dict(jax.eval_shape(model.init, jax.random.key(0), image), sep="/")
    bias = tensors.get("params/head/bias")
    if bias and "params/head/bias" not in expected and not bias.array.any():
        unused[tensors.pop("params/head/bias").name] = NO_BIAS
    _check_architecture({path: tensor.array.shape for path, tensor in tensors.items()}, expected)
    _check_head(original_names, model)
    _check_tensors(tensors, expected, unknown)
    with np.errstate(over="ignore"):  # overflow gives infinity, which is checked below
        arrays = {path: tensors[path].array.astype(leaf.dtype) for path, leaf in expected.items()}
    if names := [tensors[path].name for path, array in arrays.items() if not np.isfinite(array).all()]:
        raise ValueError(f"not finite: {format_names(names)}.")
    return flax.traverse_util.unflatten_dict(arrays, sep="/"), unused


def _to_flax(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Renames and transposes tensors: {name without wrappers: tensor} -> flax's names and layout.

    Returns:
      ({path of the variable: tensor}, names of unknown tensors in the file).
    """
    is_wide_resnet = any(re.match(r"(backbone\.)?block1\.", name) for name in tensors)
    converted: dict[str, Tensor] = {}
    unknown = []
    for name, (original, array) in tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf not in LEAVES:
            unknown.append(original)
            continue
        collection, leaf = ("params", "kernel") if leaf == "weight" and array.ndim > 1 else LEAVES[leaf]
        if module in HEADS:
            module = "head"
        else:
            for pattern, replacement in RENAMES:
                module = re.sub(pattern, replacement, module)
            if is_wide_resnet and module == "bn1":  # a WideResNet's last batch norm, a ResNet's first
                module = "bn"
            module = f"backbone/{module.replace('.', '/')}"
        path = f"{collection}/{module}/{leaf}"
        if path in converted:
            raise ValueError(f"{converted[path].name} and {original} are the same tensor of the network: keep one.")
        axes = {2: (1, 0), 4: (2, 3, 1, 0)}.get(array.ndim)
        converted[path] = Tensor(original, array.transpose(axes) if axes else array)
    return converted, unknown


def _architecture(shapes: Mapping[str, Sequence[int]]) -> str | None:
    """Returns "WideResNet-28-10 for 3-channel images and 10 classes"; None if tensors needed for it are missing."""
    blocks = {match[0] for path in shapes if (match := re.search(r"stage(\d+)_block\d+(?=/)", path))}
    paths = [f"params/{name}/kernel" for name in ("backbone/conv1", "backbone/stage1_block0/conv1", "head")]
    stem, first, head = (shapes.get(path) for path in paths)
    if not (stem and first and head):
        return None
    layers = len(blocks) * (3 if any("/conv3/" in path for path in shapes) else 2)
    if len({block.partition("_")[0] for block in blocks}) == 3:
        name = f"WideResNet-{layers + 4}-{first[-1] / 16:g}"
    else:
        kind = "ResNet" if "params/backbone/bn1/scale" in shapes else "PreActResNet"
        name = f"{kind}-{layers + 2}"
    return f"{name} for {stem[-2]}-channel images and {head[-1]} classes"


def _check_architecture(shapes: Mapping[str, Sequence[int]], expected: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    loaded, configured = _architecture(shapes), _architecture({path: leaf.shape for path, leaf in expected.items()})
    if loaded and loaded != configured:
        raise ValueError(f"the weights are those of a {loaded}, the config's network is a {configured}.")


def _check_head(names: Mapping[str, str], model: Classifier) -> None:
    configured = "cosine" if isinstance(model.head, heads.Cosine) else "linear"
    for module, kind in HEADS.items():
        if f"{module}.weight" in names and kind != configured:
            raise ValueError(
                f"{names[f'{module}.weight']} is the weight of a {kind} head, the config's is a {configured} one."
            )


def _check_normalisation(tensors: Mapping[str, tuple[str, np.ndarray]], model: Classifier) -> None:
    """Raises ValueError unless {name: ("mean" or "std", array)} are the mean and std of the model."""
    configured, wrong = {"mean": model.mean, "std": model.std}, []
    for name, (entry, array) in tensors.items():
        if array.size != max(array.shape, default=1):
            raise ValueError(f"{name} has the shape {list(array.shape)}: supported is one {entry} for each channel.")
        own, values = np.array(configured[entry]), array.ravel()
        if own.size not in (1, values.size) or not np.allclose(values, own, rtol=1e-6, atol=0):
            wrong.append(f"config.model.{entry} to {tuple(float(f'{value:.7g}') for value in values)}")
    if wrong:
        raise ValueError(f"{format_names(list(tensors))} normalise the images: set {' and '.join(wrong)}.")


def _check_tensors(
    tensors: Mapping[str, Tensor], expected: Mapping[str, jax.ShapeDtypeStruct], unknown: Sequence[str]
) -> None:
    """Raises ValueError unless the tensors are exactly those of the network, in its shapes and dtypes."""
    missing = [path for path in expected if path not in tensors]
    unknown = [*unknown, *(tensors[path].name for path in tensors if path not in expected)]
    mismatched = [
        f"{name} is {array.dtype}{list(array.shape)}, expected {expected[path].dtype}{list(expected[path].shape)}"
        for path, (name, array) in tensors.items()
        if path in expected and (array.shape != expected[path].shape or not jnp.issubdtype(array.dtype, jnp.floating))
    ]
    kinds = {
        "missing": missing,
        "not in the network": unknown,
        "of another shape or type (in flax's layout)": mismatched,
    }
    if problems := [f"{kind}: {format_names(names)}" for kind, names in kinds.items() if names]:
        raise ValueError("; ".join(problems) + ".")
