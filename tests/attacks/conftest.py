"""The two small digit networks of the golden files, rebuilt from their weights."""

import json
import os
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

GOLDEN = os.path.join(os.path.dirname(os.path.dirname(__file__)), "golden")


def _apply(weights, x):
    for i, stride in enumerate((1, 2, 2)):
        x = jax.lax.conv_general_dilated(
            x,
            weights[f"conv{i}.kernel"],
            window_strides=(stride, stride),
            padding=((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        x = jax.nn.relu(x + weights[f"conv{i}.bias"])
    features = x.mean(axis=(1, 2))
    if "log_prior" not in weights:
        return features @ weights["dense.kernel"] + weights["dense.bias"]
    kernel = weights["dense.kernel"]
    kernel = kernel / (jnp.linalg.norm(kernel, axis=0) + weights["gamma"])
    features = features / jnp.linalg.norm(features, axis=1, keepdims=True)
    return weights["scale"] * features @ kernel - weights["tau_p"] * weights["log_prior"]


def load(head, dtype=np.float32):
    """A network by the name of its head: .apply, .weights, .logits_fn, .arrays and .info (the JSON), .x and .y."""
    path = os.path.join(GOLDEN, f"attacks_digits_{head}")
    arrays = np.load(f"{path}.npz", allow_pickle=False)
    with open(f"{path}.json") as file:
        info = json.load(file)
    weights = {name: arrays[name].astype(dtype) for name in arrays.files if name.startswith(("conv", "dense"))}
    if head == "cosine":
        counts = arrays["class_counts"].astype(np.float32)
        weights["log_prior"] = np.log((counts / counts.sum()).astype(dtype))  # the prior is float32, its log not
        weights |= {name: np.asarray(value, dtype) for name, value in info["head_parameters"].items()}
    return SimpleNamespace(
        apply=_apply,
        weights=weights,
        logits_fn=lambda x: _apply(weights, x),
        arrays=arrays,
        info=info,
        x=arrays["images"].astype(dtype),
        y=arrays["labels"],
    )


@pytest.fixture(scope="session")
def digits():
    """`digits("linear", dtype)`, see `load`."""
    return load
