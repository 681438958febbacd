"""Plain training: no attack, what a network learns when robustness is not asked for."""

import dataclasses

import jax.numpy as jnp

from lt_adv import losses
from lt_adv.methods import base


@dataclasses.dataclass(frozen=True)
class Natural(base.Method):
    """min_theta E CE(z(x), y): there is no inner attack, and its settings are not read.

    Under `fidelity="released_code"` the drops of the learning rate compound, as in the rows of RoBal's study.
    """

    compounding_schedule = True
    plain = True

    def perturb(self, key, net, batch, extra, clock):
        return batch.image

    def loss(self, key, net, batch, x_adv, extra, clock):
        logits, _ = net.train(batch.image)
        value = jnp.mean(losses.cross_entropy(logits, batch.label))
        return value, (extra, {"accuracy": base.correct(logits, batch.label)})
