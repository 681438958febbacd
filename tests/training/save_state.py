"""Saves a checkpoint of random numbers as a run does: `python -m tests.training.save_state FOLDER --config=...`"""

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lt_adv.cli import flags
from lt_adv.cli.experiment import Experiment
from lt_adv.training import checkpoint, sharding, stage_builder


def save(folder: str, config: Any) -> None:
    """Saves random numbers, because zeros would be compressed."""
    experiment = Experiment.from_config(config)
    experiment.connect()
    built, mesh = stage_builder.build(experiment.resolved_stages[0], experiment.mesh), experiment.mesh
    checkpoints = checkpoint.Checkpoints(Path(folder) / "checkpoints")

    def draw(a: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.key(0), a.shape, a.dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a

    state = built.first_state()
    filled = jax.jit(lambda tree: jax.tree.map(draw, tree), out_shardings=jax.tree.map(lambda a: a.sharding, state))
    checkpoints.save(1, sharding.to_global(filled(state), mesh, config.parallel), {})
    checkpoints.close()


if __name__ == "__main__":
    save(sys.argv[1], flags.parse(["save_state", *sys.argv[2:]]).config)
