"""Attacks of lt_adv and foolbox on a JAX network."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmark.libraries import PGD, Case, Outcome
from experiments.benchmark.timing import compile_spans, measure, timed, union_length
from lt_adv import attacks
from lt_adv.runtime import environment

COUNTED_IMAGES = 8

Apply = Callable[[Any, Any], Any]  # (variables, x) -> logits
PGDAttack = Callable[[jax.Array, jax.Array], Any]  # (x, y) -> x_adv


def run(library: str, config: Any, case: Case) -> Outcome:
    """Runs PGD on one device, the default of JAX, and attacks of AutoAttack on all cores, as the evaluation does."""
    if case.attack == PGD:
        return run_pgd(BUILDERS[library], case)
    return run_autoattack(config, case)


def run_pgd(build: Callable[[Apply, Case], PGDAttack], case: Case) -> Outcome:
    target = case.target
    x, clean = jnp.asarray(target.image), predictions(case, target.image)
    label = clean if target.label is None else target.label
    y = jnp.asarray(label)
    pgd = build(target.apply, case)
    times, x_adv = measure(lambda: pgd(x, y), jax.block_until_ready, case.seconds)
    counter = Counter()
    jax.block_until_ready(build(counter.wrap(target.apply), case)(x[:COUNTED_IMAGES], y[:COUNTED_IMAGES]))
    jax.effects_barrier()
    evaluations = [count * len(x) // len(x[:COUNTED_IMAGES]) for count in (counter.forwards, counter.gradients)]
    if build is passes_alone:
        return Outcome(times, evaluations, label, clean)
    x_adv = np.asarray(x_adv)
    return Outcome(times, evaluations, label, clean, x_adv, predictions(case, x_adv))


def lt_adv_pgd(apply: Apply, case: Case) -> PGDAttack:
    pgd = attacks.jit(
        attacks.pgd, apply, eps=case.target.eps, step_size=case.step_size, num_steps=case.num_steps, norm=case.norm
    )
    return functools.partial(pgd, jax.random.key(case.seed), case.target.variables)


def passes_alone(apply: Apply, case: Case) -> PGDAttack:
    """A compiled loop of the forward and backward passes of PGD. Each step depends on the one before."""

    def loss(x: jax.Array, variables: Any, y: jax.Array) -> jax.Array:
        return -jnp.take_along_axis(jax.nn.log_softmax(apply(variables, x)), y[:, None], 1).sum()

    @jax.jit
    def loop(variables: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        def step(_: int, carry: jax.Array) -> jax.Array:
            value, gradient = jax.value_and_grad(loss)(carry, variables, y)
            return carry + 0 * (value + gradient)

        return jax.lax.fori_loop(0, case.num_steps, step, x)

    return functools.partial(loop, case.target.variables)


def foolbox_pgd(apply: Apply, case: Case, compiled: bool = False) -> PGDAttack:
    import foolbox

    network = functools.partial(apply, jax.device_put(case.target.variables))
    model = foolbox.models.JAXModel(jax.jit(network) if compiled else network, bounds=(0, 1))
    attack_type = {"linf": foolbox.attacks.LinfPGD, "l2": foolbox.attacks.L2PGD}[case.norm]
    attack = attack_type(abs_stepsize=case.step_size, steps=case.num_steps)
    return lambda x, y: attack(model, x, y, epsilons=case.target.eps)[1]


BUILDERS = {
    "lt_adv": lt_adv_pgd,
    "loop": passes_alone,
    "foolbox-jax": foolbox_pgd,
    "foolbox-jax-jit": functools.partial(foolbox_pgd, compiled=True),
}


def run_autoattack(config: Any, case: Case) -> Outcome:
    environment.prepare(config.optim.batch_size, config.cpu_devices)
    target = case.target
    clean = predictions(case, target.image)
    label = clean if target.label is None else target.label
    logits_fn = jax.tree_util.Partial(target.apply, jax.device_put(target.variables))
    options = {"eps": target.eps, "norm": case.norm, "version": (case.attack,), "num_queries": case.queries}

    def call() -> Any:
        key = jax.random.key(case.seed)
        return attacks.autoattack(key, logits_fn, target.image, label, batch_size=case.batch_size, **options)

    with compile_spans() as spans:
        seconds, result = timed(call)
    compile_seconds = union_length(spans)
    times = {"ms": [1e3 * (seconds - compile_seconds)], "compile_seconds": compile_seconds}
    attacked = predictions(case, result.x_adv)
    return Outcome(times, result.evaluations[case.attack], label, clean, result.x_adv, attacked)


def predictions(case: Case, x: np.ndarray) -> np.ndarray:
    apply = jax.jit(case.target.apply)
    batches = np.split(x, range(case.batch_size, len(x), case.batch_size))
    return np.concatenate([np.asarray(apply(case.target.variables, batch)).argmax(-1) for batch in batches])


class Counter:
    """Counts the images of forward and backward passes when they are computed, in compiled code too."""

    def __init__(self) -> None:
        self.forwards, self.gradients = 0, 0

    def wrap(self, apply: Apply) -> Apply:
        """Returns `apply` with calls of the host, which take time: count in a call that is not timed."""

        def forward(number: int) -> None:
            self.forwards += number

        def backward(number: int) -> None:
            self.gradients += number

        @jax.custom_vjp
        def identity(x: jax.Array) -> jax.Array:
            return x

        def backward_rule(_: None, gradient: jax.Array) -> tuple[jax.Array]:
            jax.debug.callback(functools.partial(backward, len(gradient)))
            return (gradient,)

        identity.defvjp(lambda x: (x, None), backward_rule)

        def counted(variables: Any, x: jax.Array) -> Any:
            jax.debug.callback(functools.partial(forward, len(x)))
            return apply(variables, identity(x))

        return counted
