"""PGD adversarial training (Madry et al., ICLR 2018): the baseline of every table."""

import dataclasses

import jax.numpy as jnp

from lt_adv import losses
from lt_adv.methods import base
from lt_adv.methods.base import Array, Batch, DataInfo, MethodState, Net, TrainProgress


@dataclasses.dataclass(frozen=True)
class AT(base.Method):
    """min_theta E max_{|d| <= eps} CE(z(x + d), y).

    Inner maximization: PGD on the cross-entropy, network in evaluation mode. Outer minimization: cross-entropy of
    x_adv, network in training mode.

    Differs from the released code of RoBal's study (Wu et al., CVPR 2021), which `fidelity="released_code"` restores:
    the code starts one-sided, at x + eps U[0, 1); the drops of its learning rate compound (see `training.optimizer`);
    and its class-aware sampling runs in cycles (see `data.class_aware`) instead of independent draws.
    Rows of that study that differ only in the outer loss are subclasses; most override only `per_example_loss`.
    """

    compounding_schedule = True
    released_start = "one_sided"

    def per_example_loss(self, logits: Array, label: Array, info: DataInfo, progress: TrainProgress) -> Array:
        """Returns the outer loss of each example, [b]."""
        return losses.cross_entropy(logits, label)

    def loss(
        self, key: Array, net: Net, batch: Batch, x_adv: Array, method_state: MethodState, progress: TrainProgress
    ) -> base.LossOutput:
        logits, _ = net(x_adv, train=True)
        value = jnp.mean(batch.weighted(self.per_example_loss(logits, batch.label, net.info, progress)))
        return base.LossOutput(value, logits)
