"""Smoke test of every supported Python in CI: import, one training step, one attack.

python -m tests.smoke
"""

import platform
from importlib.metadata import version

import jax
import numpy as np

from configs import robal
from lt_adv import attacks
from lt_adv.cli.experiment import Experiment
from lt_adv.training import stage_builder


def main() -> None:
    """Trains one step and attacks one batch; raises AssertionError on a wrong number."""
    config = robal.get_config("dataset=digits")
    experiment = Experiment.from_config(config)
    program = stage_builder.build(experiment.resolved_stages[0], experiment.mesh)
    state, metrics = program.step(program.first_state(), program.pipeline.example, program.teacher)
    loss = float(metrics["loss"])
    assert int(state.step) == 1 and np.isfinite(loss), metrics

    eps, test = config.attack.eps, program.split.test
    x, y = test.image[:32].astype(np.float32) / 255, test.label[:32]
    pgd = attacks.jit(attacks.pgd, program.apply, eps=eps, step_size=config.attack.step_size, num_steps=5)
    distance = np.abs(np.asarray(pgd(jax.random.key(0), state.variables, x, y)) - x).max()
    assert 0.9 * eps < distance <= eps + 1e-6, distance

    versions = "  ".join(f"{name} {version(name)}" for name in ("jax", "flax", "optax", "orbax-checkpoint", "numpy"))
    print(f"smoke passed: Python {platform.python_version()}  {versions}  loss {loss:.3f}")


if __name__ == "__main__":
    main()
