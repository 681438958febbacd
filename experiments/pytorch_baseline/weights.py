"""Weights between flax and PyTorch: the modules have the same names, kernels are turned around.

backbone.stage1_block0.conv1.weight [out, in, h, w] <-> params/backbone/stage1_block0/conv1/kernel [h, w, in, out]. Both
frameworks keep running averages with a share of 0.1 for the newest batch; PyTorch averages the unbiased variance
(n / (n - 1) of the biased one, n values per channel), and it is handed over as it is: the network was trained with it.
"""

from collections.abc import Mapping
from typing import Any

import flax
import numpy as np
import torch

STATISTICS = {"running_mean": "mean", "running_var": "var"}
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", **{v: k for k, v in STATISTICS.items()}}


def to_torch(variables: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """{"params", "batch_stats"} -> state dict, in the dtypes that the arrays have."""
    state = {}
    for (_, *module, leaf), array in flax.traverse_util.flatten_dict(dict(variables)).items():
        array = np.asarray(array)
        turned = {4: (3, 2, 0, 1), 2: (1, 0)}.get(array.ndim, (0,))
        state[".".join([*module, LEAVES[leaf]])] = torch.from_numpy(array.transpose(turned).copy())
    return state


def to_flax(state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """State dict -> {"params", "batch_stats"} of numpy arrays."""
    variables = {}
    for name, tensor in state.items():
        *module, leaf = name.split(".")
        if leaf == "num_batches_tracked":  # of no use with a fixed share
            continue
        array = tensor.detach().cpu().numpy()
        collection = "batch_stats" if leaf in STATISTICS else "params"
        if leaf == "weight":
            leaf = "kernel" if array.ndim > 1 else "scale"
        turned = {4: (2, 3, 1, 0), 2: (1, 0)}.get(array.ndim, (0,))
        variables[(collection, *module, STATISTICS.get(leaf, leaf))] = array.transpose(turned).copy()
    return flax.traverse_util.unflatten_dict(variables)
