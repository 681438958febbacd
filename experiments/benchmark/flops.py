"""Model FLOPs: the multiplications and additions of convolutions and matrix products, counted in a jaxpr.

What is counted is the work of the mathematics, not of a compiled program: element-wise operations, normalisation and
random numbers are left out, zeros that a strided convolution's gradient inserts are no work, and an equation that
stands there twice with the same operands counts once, as a compiler shares it (RoBal's released code repeats two
forwards in that way). Padding counts as pixels do, and so does what is traced and never used.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.extend import core

from lt_adv import models
from lt_adv.training.stage_builder import StageProgram

# Primitives that run one inner jaxpr once, on their own operands.
CALLS = ("jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "remat2", "checkpoint")


def count(jaxpr: core.ClosedJaxpr) -> int:
    """FLOPs of a closed jaxpr, 2 per multiply-add; of a `cond` its longest branch, on all devices of a `shard_map`.

    ValueError where the number of turns of a loop that holds such work cannot be known.
    """
    return _inline(jaxpr, [object() for _ in jaxpr.in_avals], {})[0]


def _inline(jaxpr: Any, inputs: Sequence[Any], seen: dict[Any, list[Any]]) -> tuple[int, list[Any]]:
    """(FLOPs, names of the results), where equal names are equal values; `seen` maps an equation to its results."""
    jaxpr, consts = (jaxpr.jaxpr, jaxpr.consts) if isinstance(jaxpr, core.ClosedJaxpr) else (jaxpr, [])
    name = dict(zip(jaxpr.constvars, map(id, consts), strict=True)) | dict(zip(jaxpr.invars, inputs, strict=True))
    total = 0
    for equation in jaxpr.eqns:
        operands = [
            ("literal", str(v.val), str(v.aval)) if isinstance(v, core.Literal) else name[v] for v in equation.invars
        ]
        flops, results = _equation(equation, operands, seen)
        total += flops
        name.update(zip(equation.outvars, results, strict=True))
    return total, [str(v.val) if isinstance(v, core.Literal) else name[v] for v in jaxpr.outvars]


def _equation(equation: Any, operands: list[Any], seen: dict[Any, list[Any]]) -> tuple[int, list[Any]]:
    primitive, params = equation.primitive.name, equation.params
    inner = [j for value in params.values() for j in _jaxprs(value)]
    if primitive in CALLS:
        return _inline(inner[0], operands, seen)
    if primitive == "shard_map":
        flops, results = _inline(inner[0], operands, seen)
        return params["mesh"].size * flops, results
    inner = [j if isinstance(j, core.ClosedJaxpr) else core.ClosedJaxpr(j, ()) for j in inner]
    key = (primitive, str(params), *(id(c) for j in inner for c in j.consts), *operands)
    if key in seen:
        return 0, seen[key]
    seen[key] = [object() for _ in equation.outvars]
    if primitive == "conv_general_dilated":
        return _convolution(equation), seen[key]
    if primitive == "dot_general":
        return _product(equation), seen[key]
    bodies = [count(j) for j in inner]
    if primitive == "scan":
        return params["length"] * sum(bodies), seen[key]
    if primitive != "cond" and any(bodies):
        raise ValueError(f"How often {primitive} runs its convolutions or matrix products cannot be known.")
    return max(bodies, default=0), seen[key]


def _jaxprs(value: Any) -> list[Any]:
    values = value if isinstance(value, (tuple, list)) else [value]
    return [v for v in values if isinstance(v, (core.ClosedJaxpr, core.Jaxpr))]


def _convolution(equation: Any) -> int:
    kernel, result = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
    spec = equation.params["dimension_numbers"].rhs_spec  # (out features, in features of a group, *space)
    window = math.prod(kernel[axis] for axis in spec[1:])
    return 2 * math.prod(result) * window // math.prod(equation.params["lhs_dilation"])


def _product(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def forward(model_config: Mapping[str, Any], image_shape: Sequence[int], num_classes: int) -> int:
    """FLOPs of one evaluation-mode forward of one image [h, w, c]."""
    model = models.create(model_config, num_classes)
    image = jax.ShapeDtypeStruct((1, *image_shape), float)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    return count(jax.make_jaxpr(model.apply)(variables, image))


def step(built: StageProgram) -> float:
    """FLOPs of one training step, attack and update, per image of the batch: counted in the program that trains."""
    state = jax.eval_shape(built.first_state)
    jaxpr = jax.make_jaxpr(built.step)(state, built.feed.example, built.teacher)
    return count(jaxpr) / built.config.optim.batch_size
