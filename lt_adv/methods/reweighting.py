"""Class-balanced re-weighting (Cui et al., CVPR 2019), deferred or not (Cao et al., NeurIPS 2019), in RoBal's study."""

import dataclasses

import jax.numpy as jnp

from lt_adv import losses
from lt_adv.methods import at, base
from lt_adv.methods.base import Array, Batch, MethodState, Net, TrainProgress


@dataclasses.dataclass(frozen=True)
class Reweighting(at.AT):
    """min_theta sum_i w_{y_i} CE(z(x_adv_i), y_i) / sum_i w_{y_i} over a batch, w_c = (1 - beta) / (1 - beta^n_c).

    All weights are equal before `from_epoch`, which counts from 1 as in the released code. The attack maximizes the
    unweighted cross-entropy. Differs from the released code as `AT` does.
    """

    beta: float = base.hyper_parameter(0.9999, "[0, 1)")
    from_epoch: int = 1

    def loss(
        self, key: Array, net: Net, batch: Batch, x_adv: Array, method_state: MethodState, progress: TrainProgress
    ) -> base.LossOutput:
        logits, _ = net(x_adv, train=True)
        weights = losses.class_balanced_weights(net.info.class_counts, self.beta)
        weights = jnp.where(progress.epoch + 1 >= self.from_epoch, weights, 1.0)[batch.label]
        # The sum of weights that normalizes the mean is that of the batch of all devices.
        values, weights = net.gather((batch.weighted(losses.cross_entropy(logits, batch.label)), weights))
        value = jnp.sum(weights * values) / jnp.sum(weights)
        return base.LossOutput(value, logits)
