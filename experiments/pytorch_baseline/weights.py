"""Converts weights between flax and PyTorch: the modules have the same names, kernels are transposed.

backbone.stage1_block0.conv1.weight [out, in, h, w] <-> params/backbone/stage1_block0/conv1/kernel [h, w, in, out]. Both
frameworks keep running averages with a weight of 0.1 for the newest batch. PyTorch averages the unbiased variance
(n / (n - 1) times the biased one, n values per channel); it is not converted, as the network was trained with it.
"""

from collections.abc import Mapping
from typing import Any

import flax
import numpy as np
import torch

STATISTICS = {"running_mean": "mean", "running_var": "var"}
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", **{v: k for k, v in STATISTICS.items()}}


def to_torch(variables: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Returns the state dict of flax variables {"params", "batch_stats"}; dtypes stay the same."""
    state = {}
    for (_, *module, leaf), array in flax.traverse_util.flatten_dict(dict(variables)).items():
        array = np.asarray(array)
        axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(array.ndim, (0,))
        state[".".join([*module, LEAVES[leaf]])] = torch.from_numpy(array.transpose(axes).copy())
    return state


def to_flax(state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Returns flax variables {"params", "batch_stats"} of numpy arrays from a state dict."""
    variables = {}
    for name, tensor in state.items():
        *module, leaf = name.split(".")
        if leaf == "num_batches_tracked":  # unused with a fixed momentum
            continue
        array = tensor.detach().cpu().numpy()
        collection = "batch_stats" if leaf in STATISTICS else "params"
        if leaf == "weight":
            leaf = "kernel" if array.ndim > 1 else "scale"
        axes = {4: (2, 3, 1, 0), 2: (1, 0)}.get(array.ndim, (0,))
        variables[(collection, *module, STATISTICS.get(leaf, leaf))] = array.transpose(axes).copy()
    return flax.traverse_util.unflatten_dict(variables)
