"""Import, one training step, one attack: what CI asks of every supported Python.

python -m tests.smoke
"""

import platform
from importlib.metadata import version

import jax
import numpy as np

from configs import robal
from lt_adv import attacks, data
from lt_adv.training import sharding, stage_builder


def main() -> None:
    """AssertionError where a number is not what it must be."""
    config = robal.get_config("dataset=digits")
    mesh = sharding.make_mesh()
    (stage,) = stage_builder.stages(config)
    built = stage_builder.build(0, stage, config, data.load(config.data), mesh)
    state, metrics = built.step(built.first_state(), built.feed.example, built.teacher)
    loss = float(metrics["loss"])
    assert int(state.step) == 1 and np.isfinite(loss), metrics

    eps, test = config.attack.eps, built.data.test
    x, y = test.image[:32].astype(np.float32) / 255, test.label[:32]
    pgd = attacks.jit(attacks.pgd, built.apply, eps=eps, step_size=config.attack.step_size, num_steps=5)
    moved = np.abs(np.asarray(pgd(jax.random.key(0), state.variables, x, y)) - x).max()
    assert 0.9 * eps < moved <= eps + 1e-6, moved

    versions = "  ".join(f"{name} {version(name)}" for name in ("jax", "flax", "optax", "orbax-checkpoint", "numpy"))
    print(f"smoke passed: Python {platform.python_version()}  {versions}  loss {loss:.3f}")


if __name__ == "__main__":
    main()
