"""PGD adversarial training (Madry et al., ICLR 2018): the baseline of every table."""

import dataclasses

import jax.numpy as jnp

from lt_adv import losses
from lt_adv.methods import base


@dataclasses.dataclass(frozen=True)
class AT(base.Method):
    """min_theta E max_{|d| <= eps} CE(z(x + d), y).

    Inner: PGD on cross-entropy, network in evaluation mode. Outer: cross-entropy on x_adv, in training mode.

    Differs from the released code of RoBal's study (Wu et al., CVPR 2021), which `fidelity="released_code"` restores:
    there the start is one-sided, x + eps U[0, 1), and the drops of the learning rate compound (see `training.optim`);
    the rows of it with class-aware draws make these in cycles (see `data.class_aware`), and not each for itself.
    Rows of that study that differ in the outer loss alone are subclasses, most of which override only `values`.
    """

    compounding_schedule = True
    released_start = "one_sided"

    def values(self, logits, label, info, clock):
        """The outer loss of each example, [b]."""
        return losses.cross_entropy(logits, label)

    def loss(self, key, net, batch, x_adv, extra, clock):
        logits, _ = net.train(x_adv)
        value = jnp.mean(self.values(logits, batch.label, net.info, clock))
        return value, (extra, {"accuracy": base.correct(logits, batch.label)})
