"""Evaluates jaxprs equation by equation, for transformations of traced functions."""

from collections.abc import Callable, Sequence
from typing import Any

from jax.extend import core

CALLS = ("jit", "pjit", "closed_call")  # primitives that run one inner jaxpr on their operands


def evaluate(equation: core.JaxprEqn, operands: Sequence[Any], jaxpr: core.Jaxpr) -> list[Any]:
    """Returns the results of an equation of `jaxpr`, traced with its line of source and its name."""
    inputs = {v: operand for v, operand in zip(equation.invars, operands, strict=True) if isinstance(v, core.Var)}
    debug_info = jaxpr.debug_info._replace(arg_names=None, result_paths=None)
    alone = core.Jaxpr((), list(inputs), equation.outvars, [equation], equation.effects, debug_info)
    return list(core.jaxpr_as_fun(core.ClosedJaxpr(alone, ()))(*inputs.values()))


def walk(
    jaxpr: core.Jaxpr,
    consts: Sequence[Any],
    args: Sequence[Any],
    apply: Callable[[core.JaxprEqn, list[Any], core.Jaxpr], list[Any]],
) -> list[Any]:
    """Returns the results of a jaxpr; `apply` evaluates its equations and those of the jaxprs that it calls."""
    values: dict[core.Var, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(atom: core.Var | core.Literal) -> Any:
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for equation in jaxpr.eqns:
        operands = [read(atom) for atom in equation.invars]
        if equation.primitive.name in CALLS:
            inner = equation.params["jaxpr"]
            results = walk(inner.jaxpr, inner.consts, operands, apply)
        else:
            results = apply(equation, operands, jaxpr)
        values.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]
