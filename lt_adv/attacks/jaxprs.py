"""Evaluates jaxprs equation by equation, for transformations of traced functions."""

from collections.abc import Sequence
from typing import Any

from jax.extend import core

CALLS = ("jit", "pjit", "closed_call")  # primitives that run one inner jaxpr on their operands


def evaluate(equation: core.JaxprEqn, operands: Sequence[Any], jaxpr: core.Jaxpr) -> list[Any]:
    """Returns the results of an equation of `jaxpr`, traced with its line of source and its name."""
    inputs = {v: operand for v, operand in zip(equation.invars, operands, strict=True) if isinstance(v, core.Var)}
    debug_info = jaxpr.debug_info._replace(arg_names=None, result_paths=None)
    alone = core.Jaxpr((), list(inputs), equation.outvars, [equation], equation.effects, debug_info)
    return list(core.jaxpr_as_fun(core.ClosedJaxpr(alone, ()))(*inputs.values()))
