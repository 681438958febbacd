"""Weights that others trained with PyTorch, as variables of the networks here.

Read are the names that RoBal, AT-BSL and REAT release and those of RobustBench's WideResNets, which are TRADES'. What
tensors do not tell, the config says, and nobody can check it: scale, gamma and eta of a cosine head, an activation
other than ReLU, a normalisation of images that is code and not a tensor, and for PreActResNet-18, whose names are
shared by two networks, that a projection shortcut starts from the activated input (RobustBench's PreActBlockV2).
"""

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from lt_adv.models import heads, weight_files
from lt_adv.models.classifier import Classifier
from lt_adv.models.weight_files import listed

PREFIX = re.compile(r"(module|model|net|_orig_mod)\.")  # of what others wrap around a network
# Part of a module's name -> its name here. The numbers are positions in the nn.Sequential that REAT's layers are.
RENAMED: Sequence[tuple[str, str]] = (
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
    "weight": ("params", "scale"),  # of a batch norm; those with more dimensions are kernels
    "bias": ("params", "bias"),
    "running_mean": ("batch_stats", "mean"),
    "running_var": ("batch_stats", "var"),
}
# RoBal's linear heads have a layer `fc` inside; its cosine ones are the layer. Names tell them apart, shapes do not.
HEADS = {"fc": "linear", "linear": "linear", "classifier.fc": "linear", "classifier": "cosine"}
NORMALISATION = re.compile(r"(^|\.)(mean|std|mu|sigma)$")
UNUSED: Mapping[str, str] = {
    r"(^|\.)num_batches_tracked$": "counts batches, which batch norm at momentum 0.1 does not look at",
    r"(^|\.)sub_block1\.": "a second first stage, made and never called by WideResNets that descend from TRADES'",
    r"(^|\.)classifier\.moving_ed$": "RoBal's running mean of feature directions, which its own method does not use",
    r"^n_averaged$": "counts the networks that were averaged",
}
NO_BIAS = "a bias of zeros, for a head that has none"


def variables(
    path: str | pathlib.Path, model: Classifier, image_shape: Sequence[int]
) -> tuple[dict[str, Any], dict[str, str]]:
    """What `convert` makes of a file that `weight_files.load` reads; its errors name the file."""
    state = weight_files.load(path)
    try:
        return convert(state, model, image_shape)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def convert(
    state: Mapping[str, np.ndarray], model: Classifier, image_shape: Sequence[int]
) -> tuple[dict[str, Any], dict[str, str]]:
    """({"params", "batch_stats"} of `model` as numpy arrays, {name of an unused tensor: why it is not used}).

    `state`: PyTorch's names -> arrays; kernels [out, in, height, width] become [height, width, in, out], matrices
    [out, in] become [in, out], and all get the dtype that `model` keeps them in. `image_shape` is [height, width,
    channels]. Errors: ValueError, of one line, for another network or head, a normalisation of images, and for
    tensors that are missing, unknown, of another shape or type, or not finite.
    """
    unused = {name: why for name in state for pattern, why in UNUSED.items() if re.search(pattern, name)}
    named = {name: name for name in state if name not in unused}
    if found := [name for name in named if NORMALISATION.search(name)]:
        raise ValueError(
            f"{listed(found)} would normalise the images, and networks here take pixels in [0, 1] as they are."
        )
    while named and (wrapper := PREFIX.match(next(iter(named)))) and all(n.startswith(wrapper[0]) for n in named):
        named = {name.removeprefix(wrapper[0]): origin for name, origin in named.items()}
    tensors, unknown = _arranged({name: (origin, state[origin]) for name, origin in named.items()})
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.result_type(float))
    wanted = _flat(jax.eval_shape(model.init, jax.random.key(0), image))
    bias = tensors.get("params/head/bias")
    if bias and "params/head/bias" not in wanted and not bias[1].any():
        unused[tensors.pop("params/head/bias")[0]] = NO_BIAS
    _same_network({path: array.shape for path, (_, array) in tensors.items()}, wanted)
    _same_head(named, model)
    _fit(tensors, wanted, unknown)
    with np.errstate(over="ignore"):  # infinity, which is looked for
        arrays = {path: tensors[path][1].astype(leaf.dtype) for path, leaf in wanted.items()}
    if found := [tensors[path][0] for path, array in arrays.items() if not np.isfinite(array).all()]:
        raise ValueError(f"not finite: {listed(found)}.")
    return flax.traverse_util.unflatten_dict(arrays, sep="/"), unused


def _flat(tree: Any) -> dict[str, Any]:
    return flax.traverse_util.flatten_dict(flax.core.unfreeze(tree), sep="/")


def _arranged(
    named: Mapping[str, tuple[str, np.ndarray]],
) -> tuple[dict[str, tuple[str, np.ndarray]], list[str]]:
    """({path here: (name there, array in our layout)}, names without a path) of {name: (name there, array)}."""
    wide = any(re.match(r"(backbone\.)?block1\.", name) for name in named)
    arranged: dict[str, tuple[str, np.ndarray]] = {}
    unknown = []
    for name, (origin, array) in named.items():
        module, _, leaf = name.rpartition(".")
        if leaf not in LEAVES:
            unknown.append(origin)
            continue
        collection, leaf = ("params", "kernel") if leaf == "weight" and array.ndim > 1 else LEAVES[leaf]
        if module in HEADS:
            module = "head"
        else:
            for pattern, replacement in RENAMED:
                module = re.sub(pattern, replacement, module)
            if wide and module == "bn1":  # the last batch norm there, in a ResNet the first
                module = "bn"
            module = f"backbone/{module.replace('.', '/')}"
        path = f"{collection}/{module}/{leaf}"
        if path in arranged:
            raise ValueError(f"{arranged[path][0]} and {origin} are the same tensor of the network, which needs one.")
        axes = {2: (1, 0), 4: (2, 3, 1, 0)}.get(array.ndim)
        arranged[path] = origin, array.transpose(axes) if axes else array
    return arranged, unknown


def _architecture(shapes: Mapping[str, Sequence[int]]) -> str | None:
    """WideResNet-28-10 for 3-channel images and 10 classes; None where the tensors that say it are missing."""
    blocks = {match[0] for path in shapes if (match := re.search(r"stage(\d+)_block\d+(?=/)", path))}
    ends = [f"params/{name}/kernel" for name in ("backbone/conv1", "backbone/stage1_block0/conv1", "head")]
    stem, first, head = (shapes.get(name) for name in ends)
    if not (stem and first and head):
        return None
    layers = len(blocks) * (3 if any("/conv3/" in path for path in shapes) else 2)
    if len({block.partition("_")[0] for block in blocks}) == 3:
        name = f"WideResNet-{layers + 4}-{first[-1] / 16:g}"
    else:
        kind = "ResNet" if "params/backbone/bn1/scale" in shapes else "PreActResNet"
        name = f"{kind}-{layers + 2}"
    return f"{name} for {stem[-2]}-channel images and {head[-1]} classes"


def _same_network(shapes: Mapping[str, Sequence[int]], wanted: Mapping[str, Any]) -> None:
    there, here = _architecture(shapes), _architecture({path: leaf.shape for path, leaf in wanted.items()})
    if there and there != here:
        raise ValueError(f"the weights are those of a {there}, the config's network is a {here}.")


def _same_head(names: Mapping[str, str], model: Classifier) -> None:
    kind = "cosine" if isinstance(model.head, heads.Cosine) else "linear"
    for module, of in HEADS.items():
        if f"{module}.weight" in names and of != kind:
            raise ValueError(f"{names[f'{module}.weight']} is the weight of a {of} head, the config's is a {kind} one.")


def _fit(tensors: Mapping[str, tuple[str, np.ndarray]], wanted: Mapping[str, Any], unknown: Sequence[str]) -> None:
    """ValueError unless the tensors are those of the network: all of them, nothing else, each of its shape."""
    missing = [path for path in wanted if path not in tensors]
    unknown = [*unknown, *(tensors[path][0] for path in tensors if path not in wanted)]
    wrong = [
        f"{name} is {array.dtype}{list(array.shape)} where {wanted[path].dtype}{list(wanted[path].shape)} is wanted"
        for path, (name, array) in tensors.items()
        if path in wanted and (array.shape != wanted[path].shape or not jnp.issubdtype(array.dtype, jnp.floating))
    ]
    kinds = {"no tensor for": missing, "without a place in the network": unknown, "misshapen, in our layout": wrong}
    if problems := [f"{kind}: {listed(names)}" for kind, names in kinds.items() if names]:
        raise ValueError("; ".join(problems) + ".")
