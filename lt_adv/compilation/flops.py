"""Model FLOPs: the multiplications and additions of convolutions and matrix products, counted in a jaxpr.

The count follows the mathematics, not a compiled program. Left out are element-wise operations, normalisation, random
numbers, and the zeros that the gradient of a strided convolution inserts. An equation that appears twice with the same
operands counts once, as a compiler shares it (RoBal's released code repeats two forwards in this way). Padding counts
like pixels, and so do traced results that are never used.
"""

import math
from collections.abc import Sequence
from typing import Any

from jax.extend import core

# Primitives that run one inner jaxpr once, on their own operands.
CALLS = ("jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "remat2", "checkpoint")


def count(jaxpr: core.ClosedJaxpr) -> int:
    """Returns the FLOPs of a closed jaxpr, 2 per multiply-add.

    A `cond` counts its most expensive branch, a `shard_map` all its devices.

    Raises:
        ValueError: a loop with convolutions or products has an unknown number of iterations.
    """
    return _inline(jaxpr, [object() for _ in jaxpr.in_avals], {})[0]


def _inline(jaxpr: Any, inputs: Sequence[Any], known: dict[Any, list[Any]]) -> tuple[int, list[Any]]:
    """Returns (FLOPs, names of the results). Equal names are equal values; `known` maps an equation to its results."""
    jaxpr, consts = (jaxpr.jaxpr, jaxpr.consts) if isinstance(jaxpr, core.ClosedJaxpr) else (jaxpr, [])
    name = dict(zip(jaxpr.constvars, map(id, consts), strict=True)) | dict(zip(jaxpr.invars, inputs, strict=True))
    total = 0
    for equation in jaxpr.eqns:
        operands = [
            ("literal", str(v.val), str(v.aval)) if isinstance(v, core.Literal) else name[v] for v in equation.invars
        ]
        flops, results = _equation(equation, operands, known)
        total += flops
        name.update(zip(equation.outvars, results, strict=True))
    return total, [str(v.val) if isinstance(v, core.Literal) else name[v] for v in jaxpr.outvars]


def _equation(equation: Any, operands: list[Any], known: dict[Any, list[Any]]) -> tuple[int, list[Any]]:
    primitive, params = equation.primitive.name, equation.params
    inner = [j for value in params.values() for j in _jaxprs(value)]
    if primitive in CALLS:
        return _inline(inner[0], operands, known)
    if primitive == "shard_map":
        flops, results = _inline(inner[0], operands, known)
        return params["mesh"].size * flops, results
    inner = [j if isinstance(j, core.ClosedJaxpr) else core.ClosedJaxpr(j, ()) for j in inner]
    key = (primitive, str(params), *(id(c) for j in inner for c in j.consts), *operands)
    if key in known:
        return 0, known[key]
    known[key] = [object() for _ in equation.outvars]
    if primitive == "conv_general_dilated":
        return _convolution(equation), known[key]
    if primitive == "dot_general":
        return _product(equation), known[key]
    bodies = [count(j) for j in inner]
    if primitive == "scan":
        return params["length"] * sum(bodies), known[key]
    if primitive != "cond" and any(bodies):
        raise ValueError(f"How often {primitive} runs its convolutions or matrix products cannot be known.")
    return max(bodies, default=0), known[key]


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
