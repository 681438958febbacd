"""Functions as programs whose closed-over arrays are arguments, and compilation of calls outside a trace."""

from collections.abc import Callable
from typing import TypeVar

import jax
from jax import Array
from jax.extend import core

from lt_adv.attacks.signatures import PyTree

T = TypeVar("T")


class Traced:
    """A traced function. Two of them are equal only if they are the same object, as for ordinary functions."""

    def __init__(self, jaxpr: core.Jaxpr, tree: jax.tree_util.PyTreeDef) -> None:
        self.jaxpr, self.tree = jaxpr, tree

    def __call__(self, consts: list[Array], *args: Array) -> PyTree:
        return jax.tree.unflatten(self.tree, core.jaxpr_as_fun(core.ClosedJaxpr(self.jaxpr, consts))(*args))


def trace(fun: Callable[..., PyTree], *args: PyTree) -> tuple[Traced, list[Array]]:
    """Returns `fun` as a function of the arrays that it closes over, and these arrays."""
    closed, shape = jax.make_jaxpr(fun, return_shape=True)(*args)
    return Traced(closed.jaxpr, jax.tree.structure(shape)), closed.consts


def run_compiled(fun: Callable[[], T], *arrays: PyTree) -> T:
    """Returns fun(); outside a trace it is compiled as one program, which is freed after the call.

    Executed operation by operation, each loop would stay in JAX's compilation cache together with the arrays that it
    closes over. Transfers are allowed, because `fun` transfers constants only. A tracer among `arrays`, the inputs of
    `fun`, means that the call is inside a trace.
    """
    if any(isinstance(array, jax.core.Tracer) for array in jax.tree.leaves(arrays)):
        return fun()
    with jax.transfer_guard("allow"):
        traced, consts = trace(fun)
        if any(isinstance(const, jax.core.Tracer) for const in consts):  # logits_fn closes over them
            return fun()
        return jax.jit(traced)(consts)
