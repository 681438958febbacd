"""The target of the measurement `autoattack`: a network in JAX and PyTorch with the same weights, images and labels."""

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

GOLDEN = Path(__file__).parents[2] / "tests" / "golden"
HEADS = ("linear", "cosine")  # of the golden digit networks
STRIDES = (1, 2, 2)


class Target(NamedTuple):
    image: np.ndarray  # float32 [n, h, w, c] in [0, 1]
    label: np.ndarray | None  # int32 [n]; None: the predictions of the network
    eps: float
    apply: Callable[[Any, Any], Any]  # (variables, x [b, h, w, c]) -> logits, in JAX
    variables: Any
    torch: Callable[[str], Any]  # device -> network (x [b, c, h, w]) -> logits, in evaluation mode


def make_target(
    config: Any, *, golden: str | None, images: int | None, workdir: str | None, eps: float | None
) -> Target:
    """Returns the golden digits network or the network of the config, with test images.

    Args:
        config: a config; a golden network takes nothing from it.
        golden: head of a golden network; None takes the network of the config.
        images: number of test images, evenly spaced; None takes all.
        workdir: run whose last weights are used; None takes the initial weights.
        eps: radius; None takes that of the golden file or of the config.
    """
    target = golden_digits(golden) if golden else from_config(config, workdir)
    rows = np.arange(min(images or len(target.image), len(target.image)))
    rows = rows * len(target.image) // len(rows)
    label = None if target.label is None else target.label[rows]
    return target._replace(image=target.image[rows], label=label, eps=eps or target.eps)


def from_config(config: Any, workdir: str | None) -> Target:
    """Returns the evaluated network of a config.

    Raises:
        ValueError: the PyTorch baseline does not support the config.
    """
    import jax

    from lt_adv import data, models
    from lt_adv.cli import schema
    from lt_adv.training import checkpoint, stage_builder

    if (dtype := config.eval.dtype) != "float32":
        raise ValueError(f"config.eval.dtype = {dtype!r}: AutoAttack of the PyTorch baseline supports only 'float32'.")
    if (name := config.eval.adjustment.name) != "none":
        raise ValueError(f"config.eval.adjustment.name = {name!r}: the PyTorch baseline supports only 'none'.")
    split = data.long_tailed(data.load(config.data), config.data)
    model, image = models.create(config.model, len(split.class_names)), split.test.image
    if workdir:
        variables, _ = checkpoint.read_variables(workdir)
        schema.validate_variables(config, split, variables, workdir)
        variables = {name: variables[name] for name in ("params", "batch_stats")}
    else:
        variables = jax.jit(model.init)(jax.random.key(config.seed), np.zeros((1, *image.shape[1:]), np.float32))

    def create_torch(device: str) -> Any:
        from experiments.pytorch_baseline import models as pytorch_models
        from experiments.pytorch_baseline import weights

        net = pytorch_models.create(config.model, len(split.class_names), image.shape[-1])
        net.load_state_dict(weights.to_torch(variables))
        return net.eval().requires_grad_(False).to(device)

    label = split.test.label if workdir else None
    eps = config.eval.attacks.autoattack.eps
    return Target(
        image.astype(np.float32) / 255,
        label,
        eps,
        stage_builder.evaluation_apply(config, split),
        variables,
        create_torch,
    )


def golden_digits(head: str, dtype: Any = np.float32) -> Target:
    """Returns a golden digits network: three 3x3 convolutions with zero padding, mean pooling and the head."""
    path = GOLDEN / f"attacks_digits_{head}"
    arrays, info = np.load(f"{path}.npz"), json.loads(path.with_suffix(".json").read_text())
    weights = {name: arrays[name].astype(dtype) for name in arrays.files if name.startswith(("conv", "dense"))}
    if head == "cosine":
        share = arrays["class_counts"].astype(np.float32) / arrays["class_counts"].sum(dtype=np.float32)
        weights["log_prior"] = np.log(share.astype(dtype))  # the golden code has float32 shares
        weights |= {name: np.asarray(value, dtype) for name, value in info["head_parameters"].items()}
    image, label = arrays["images"].astype(dtype), arrays["labels"].astype(np.int32)
    return Target(image, label, info["eps"], digits_logits_jax, weights, functools.partial(digits_torch, weights))


def golden_radius(head: str, norm: str) -> float:
    """Returns the radius at which the official code was run on a golden network; `norm` is "linf", "l2" or "l1"."""
    file, entry = {"linf": ("digits", "eps"), "l2": ("digits", "eps_l2"), "l1": ("l1", "radius")}[norm]
    return json.loads((GOLDEN / f"attacks_{file}_{head}.json").read_text())[entry]


def official_accuracies(head: str) -> dict[str, Any]:
    """Returns attack -> robust accuracies of the official code on a golden network, one per seed, each attack alone."""
    return json.loads((GOLDEN / f"attacks_digits_{head}.json").read_text())["official"]["plain"]


def digits_logits_jax(weights: Mapping[str, Any], x: Any) -> Any:
    import jax
    import jax.numpy as jnp

    for number, stride in enumerate(STRIDES):
        x = jax.lax.conv_general_dilated(
            x, weights[f"conv{number}.kernel"], (stride, stride), ((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        x = jax.nn.relu(x + weights[f"conv{number}.bias"])
    features, kernel = x.mean((1, 2)), weights["dense.kernel"]
    if "log_prior" not in weights:
        return features @ kernel + weights["dense.bias"]
    features = features / jnp.linalg.norm(features, axis=1, keepdims=True)
    kernel = kernel / (jnp.linalg.norm(kernel, axis=0) + weights["gamma"])
    return weights["scale"] * features @ kernel - weights["tau_p"] * weights["log_prior"]


def digits_torch(weights: Mapping[str, Any], device: str) -> Callable[[Any], Any]:
    """Returns the network of `digits_logits_jax` in PyTorch."""
    import torch
    import torch.nn.functional as F

    w = {name: torch.tensor(np.asarray(array), device=device) for name, array in weights.items()}

    def logits(x: Any) -> Any:
        for number, stride in enumerate(STRIDES):
            kernel = w[f"conv{number}.kernel"].permute(3, 2, 0, 1)
            x = F.relu(F.conv2d(x, kernel, w[f"conv{number}.bias"], stride, padding=1), inplace=True)
        features, kernel = x.mean((2, 3)), w["dense.kernel"]
        if "log_prior" not in w:
            return features @ kernel + w["dense.bias"]
        features = features / features.norm(dim=1, keepdim=True)
        kernel = kernel / (kernel.norm(dim=0) + w["gamma"])
        return w["scale"] * features @ kernel - w["tau_p"] * w["log_prior"]

    return logits
