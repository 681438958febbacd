"""How an attack's loop runs. The choice between rolled, unrolled and host loop stands here and nowhere else.

XLA's CPU backend runs a gradient convolution inside a loop body some 20 times slower than outside one. So on CPU a
traced loop is unrolled, and `attacks.compile` runs a long one as a host loop over one jitted chunk of steps. On
accelerators the loop is rolled: it runs equally fast and compiles once instead of `num_steps` times.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec

import jax
from jax import Array, lax

_P = ParamSpec("_P")
_LONGEST_CHUNK = 10  # steps: beyond it, unrolled programs compile too slowly to be worth it


class Iteration(NamedTuple):
    """An attack taken apart, so that its loop can be run, or stopped and resumed, from outside."""

    carry: Any  # arrays before the first step
    step: Callable[[Any], Any]  # carry -> carry
    finish: Callable[[Any], Array]  # carry -> x_adv
    num_steps: int


def unrolls() -> bool:
    """Whether loops are unrolled on the default backend."""
    return jax.default_backend() == "cpu"


def repeat(step: Callable[[Any], Any], carry: Any, num_steps: int) -> Any:
    """`step` applied `num_steps` times to `carry`, unrolled or rolled as the backend likes it."""
    if num_steps == 0:
        return carry
    return lax.fori_loop(0, num_steps, lambda _, carry: step(carry), carry, unroll=unrolls())


def chunk_length(num_steps: int) -> int:
    """Steps to jit together: all of them, or on CPU the largest divisor up to 10, so that one program serves all."""
    if not unrolls() or num_steps <= _LONGEST_CHUNK:
        return num_steps
    return max(length for length in range(1, _LONGEST_CHUNK + 1) if num_steps % length == 0)


def iterative(plan: Callable[_P, Iteration]) -> Callable[_P, Array]:
    """Makes an attack of a function that plans one: it runs the loop, and keeps the plan as `attack.plan`."""

    @functools.wraps(plan)
    def attack(*args: _P.args, **kwargs: _P.kwargs) -> Array:
        iteration = plan(*args, **kwargs)
        return iteration.finish(repeat(iteration.step, iteration.carry, iteration.num_steps))

    attack.__signature__ = inspect.signature(plan).replace(return_annotation=Array)  # type: ignore[attr-defined]
    attack.plan = plan  # type: ignore[attr-defined]
    return attack
