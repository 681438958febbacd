"""AutoAttack's attacks on a golden digit network, in a process of its own: compiled as users' programs are.

    python -m tests.attacks.official linear plain results.npz apgd-ce square

writes what each attack, run alone, leaves: `<attack>.robust` [1000], for fab-t `fab-t.distance`, for square
`square.queries` (0 wrong clean, 1e9 never broken). On the plain network FAB goes on to the end
of a round, as released, for its distances; AutoAttack leaves an image as soon as it is broken.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from lt_adv import attacks
from lt_adv.attacks import _fab, continuous_batching
from tests.attacks.conftest import load

VARIANTS = {
    "plain": lambda logits_fn: logits_fn,
    "scaled_1e4": lambda logits_fn: lambda x: 1e4 * logits_fn(x),
    "l1": lambda logits_fn: logits_fn,
    "quantised_16": lambda logits_fn: lambda x: logits_fn(jax.lax.stop_gradient(jnp.round(x * 15) / 15)),
}


def watched(taken):
    """`continuous_batching.run`, which notes in `taken` how many steps each image took."""
    plain = continuous_batching.run

    def run(*args, **options):
        for done in plain(*args, **options):
            taken[done.rows] = np.where(done.broken, done.steps, 1e9)
            yield done

    return run


class Patient(_fab.State):
    """Of FAB: broken when its round is over."""

    @property
    def broken(self):
        return super().broken & (self.steps_taken == 100)


def main(head, variant, out, *names):
    net = load(head)
    x, y = net.x, net.y
    logits_fn, results = VARIANTS[variant](net.logits_fn), {}
    run = continuous_batching.run
    _fab.State = Patient if variant in ("plain", "l1") else _fab.State
    for name in names:
        taken = np.zeros(len(x))
        continuous_batching.run = watched(taken)
        norm = "l1" if variant == "l1" else "linf"
        options = {"eps": 1.0 if norm == "l1" else net.info["eps"], "norm": norm, "version": (name,), "batch_size": 500}
        result = attacks.autoattack(jax.random.key(0), logits_fn, x, y, **options)
        continuous_batching.run = run
        results[f"{name}.robust"] = result.robust
        if name == "fab-t":
            delta = np.abs(result.x_adv - x)
            results["fab-t.distance"] = delta.sum((1, 2, 3)) if norm == "l1" else delta.max((1, 2, 3))
        if name == "square":
            results["square.queries"] = taken
    np.savez(out, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
