"""Writes files of weights: golden networks under the names of each release, and WideResNets of any size."""

import json
import re
import struct

import numpy as np
import pytest

from tests.experiments import NO_TORCH
from tests.models.test_backbones import SPECIFICATION, fill

REAT = (
    (r"^conv1\.", "conv1.0."),
    (r"^bn1\.", "conv1.1."),
    (r"(?<=\.\d\.)conv1\.", "residual_function.0."),
    (r"(?<=\.\d\.)bn1\.", "residual_function.1."),
    (r"(?<=\.\d\.)conv2\.", "residual_function.3."),
    (r"(?<=\.\d\.)bn2\.", "residual_function.4."),
    (r"^linear\.", "fc."),
)


def golden_state(name):
    """Returns {PyTorch's name: float64 array} by the rule of models.json; the bias of a cosine head is 0."""
    state = {}
    for t, (tensor, shape) in enumerate(SPECIFICATION[name]["state_dict"]):
        state[tensor] = fill(t, tensor, shape)
        if tensor.endswith("num_batches_tracked"):
            state[tensor] = np.array(7)
        elif tensor == "classifier.bias":
            state[tensor] = np.zeros(shape)
    return state


def prefixed(state, prefix):
    return {prefix + name: array for name, array in state.items()}


def trades(state):
    """RoBal's names of a linear WideResNet -> TRADES' names, which AT-BSL and RobustBench use."""
    state = {re.sub(r"^backbone\.|^classifier\.(?=fc)", "", name): array for name, array in state.items()}
    copy = {f"sub_{name}": array + 1 for name, array in state.items() if name.startswith("block1.")}
    return {**state, **copy}


def reat(state):
    for pattern, replacement in REAT:
        state = {re.sub(pattern, replacement, name): array for name, array in state.items()}
    return state


def wide_resnet_state(variables):
    """Variables of a WideResNet -> state_dict of TRADES' network: the inverse of the import."""
    import flax

    leaves = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    state = {}
    for (_, *module, leaf), array in flax.traverse_util.flatten_dict(variables).items():
        name = ".".join(module).replace("shortcut", "convShortcut")
        name = re.sub(r"backbone\.stage(\d)_block(\d+)", r"block\1.layer.\2", name)
        name = {"backbone.conv1": "conv1", "backbone.bn": "bn1", "head": "fc"}.get(name, name)
        array = np.asarray(array)
        axes = {2: (1, 0), 4: (3, 2, 0, 1)}.get(array.ndim)
        state[f"{name}.{leaves[leaf]}"] = array.transpose(axes) if axes else array
    return state


def save_torch(path, state, wrap=lambda state: state):
    torch = pytest.importorskip("torch", reason=NO_TORCH)
    torch.save(wrap({name: torch.from_numpy(np.array(array)) for name, array in state.items()}), path)
    return path


def save_npz(path, state):
    np.savez(path, **state)
    return path


TAGS = {"float64": "F64", "float32": "F32", "float16": "F16", "int64": "I64", "bfloat16": "BF16"}


def save_safetensors(path, state):
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, array in state.items():
        content = np.ascontiguousarray(array).tobytes()
        offsets = [len(data), len(data) + len(content)]
        header[name] = {"dtype": TAGS[str(array.dtype)], "shape": list(array.shape), "data_offsets": offsets}
        data += content
    return save_header(path, header, data)


def save_header(path, header, data):
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # aligns the data
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


SAVE = {".pt": save_torch, ".npz": save_npz, ".safetensors": save_safetensors}
