"""Moves the part of a function that does not depend on its argument out of the loop that calls it.

XLA leaves such work in the body of a loop: in each step of an attack the kernels of a network are cast to bfloat16, for
instance, and mirrored for the gradient.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend import core

from lt_adv.attacks.convolutions import mirrors_kernel_beforehand
from lt_adv.attacks.jaxprs import evaluate, walk

T = TypeVar("T")


@dataclasses.dataclass(eq=False)
class _Value:
    """A result of an equation, or an argument.

    Attributes:
      size: number of elements.
      known: whether it does not depend on the arguments.
      parts: number of elements of all arrays that it is computed from.
    """

    size: int
    known: bool = False
    parts: int = 0

    @property
    def is_hoisted(self) -> bool:
        """Whether it is computed before a loop that uses it; a larger one is cheaper to repeat than to load."""
        return self.known and self.size <= self.parts


class _Equation(NamedTuple):
    """An equation of a jaxpr; an operand is an array, or a value of an equation before it."""

    jaxpr: core.Jaxpr
    equation: core.JaxprEqn
    operands: Sequence[Any]
    results: Sequence[_Value]


def hoist(function: Callable[..., T], *args: Array) -> Callable[..., T]:
    """Returns `function` for arguments of the types of `args`, with what does not depend on arguments computed now.

    Call it in the trace around the loop, and its result inside. Values that are larger than all that they are made of,
    such as a broadcast, are computed in the loop. The returned function can be differentiated.

    Args:
      function: any traceable function of arrays.
      *args: its arguments, of which only the types are used.

    Examples:
      >>> w = jnp.ones((2, 2))
      >>> x = jnp.ones((1, 2), jnp.bfloat16)
      >>> f = hoist(lambda x: x @ w.astype(jnp.bfloat16), x)
      >>> [equation.primitive.name for equation in jax.make_jaxpr(f)(x).eqns]
      ['dot_general']
    """
    closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
    arguments = [_Value(_size(v)) for v in closed.jaxpr.invars]
    outputs, equations = _flatten(closed, arguments)

    # From the last equation to the first: is it needed in the loop, or for a value that is hoisted?
    in_loop: list[_Equation] = []
    before: list[_Equation] = []
    used_in_loop, used_before = set(filter(_is_value, outputs)), set()
    for equation in reversed(equations):
        results = set(equation.results)
        used_before |= {value for value in results & used_in_loop if value.is_hoisted}
        depends = bool(equation.equation.effects) or not all(value.known for value in results)
        if depends or results & used_in_loop - used_before:
            in_loop.append(equation)
            used_in_loop |= set(filter(_is_value, equation.operands))
        if results & used_before:
            before.append(equation)
            used_before |= set(filter(_is_value, equation.operands))
    known = _evaluate_all(before[::-1], {})

    def rest(*args: Array) -> T:
        values = _evaluate_all(in_loop[::-1], {**known, **dict(zip(arguments, args, strict=True))})
        leaves = [values[output] if _is_value(output) else output for output in outputs]
        result: T = jax.tree.unflatten(jax.tree.structure(shape), leaves)
        return result

    return rest


def _size(variable: core.Var) -> int:
    aval: Any = variable.aval
    return math.prod(aval.shape)


def _is_value(operand: Any) -> bool:
    return isinstance(operand, _Value)


def _flatten(closed: core.ClosedJaxpr, args: Sequence[Any]) -> tuple[list[Any], list[_Equation]]:
    """Returns the results of a jaxpr and its equations, with those of the jaxprs that it calls in their place."""
    equations: list[_Equation] = []

    def record(equation: core.JaxprEqn, operands: list[Any], jaxpr: core.Jaxpr) -> list[Any]:
        known = not equation.effects and all(operand.known for operand in operands if _is_value(operand))
        # XLA recognises the gradient of a strided convolution by the reversal of its kernel.
        if known and equation.primitive.name == "rev":
            known = mirrors_kernel_beforehand(equation.invars[0].aval)
        parts = sum(operand.parts if _is_value(operand) else math.prod(jnp.shape(operand)) for operand in operands)
        results = [_Value(_size(v), known, parts) for v in equation.outvars]
        equations.append(_Equation(jaxpr, equation, operands, results))
        return results

    return walk(closed.jaxpr, closed.consts, args, record), equations


def _evaluate_all(equations: Sequence[_Equation], values: Mapping[_Value, Any]) -> dict[_Value, Any]:
    """Returns `values` with the results of the equations."""
    values = dict(values)
    for jaxpr, equation, operands, results in equations:
        arrays = [values[operand] if _is_value(operand) else operand for operand in operands]
        values.update(zip(results, evaluate(equation, arrays, jaxpr), strict=True))
    return values
