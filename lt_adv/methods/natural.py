"""Standard training without an attack."""

import dataclasses

import jax.numpy as jnp

from lt_adv import losses
from lt_adv.methods import base
from lt_adv.methods.base import Array, Batch, MethodState, Net, TrainProgress


@dataclasses.dataclass(frozen=True)
class Natural(base.Method):
    """min_theta E CE(z(x), y), without an inner attack: its options are ignored.

    With `fidelity="released_code"` the drops of the learning rate compound, as in the rows of RoBal's study.
    """

    compounding_schedule = True
    no_attack = True

    def perturb(self, key: Array, net: Net, batch: Batch, method_state: MethodState, progress: TrainProgress) -> Array:
        return batch.image

    def loss(
        self, key: Array, net: Net, batch: Batch, x_adv: Array, method_state: MethodState, progress: TrainProgress
    ) -> base.LossOutput:
        logits, _ = net(batch.image, train=True)
        value = jnp.mean(batch.weighted(losses.cross_entropy(logits, batch.label)))
        return base.LossOutput(value, logits)
