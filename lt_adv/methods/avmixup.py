"""AVmixup: adversarial vertex mixup (Lee et al., CVPR 2020)."""

import dataclasses

import jax
import jax.numpy as jnp

from lt_adv import losses
from lt_adv.methods import at, base
from lt_adv.methods.base import Array, Batch, MethodState, Net, TrainProgress


@dataclasses.dataclass(frozen=True)
class AVMixup(at.AT):
    """min_theta E CE(z(m x + (1 - m) v), m phi(y, lambda1) + (1 - m) phi(y, lambda2)), m ~ U(0, 1) for each image.

    v = x + gamma (x_adv - x) is the adversarial vertex, gamma times as far from x as x_adv. phi(y, l) assigns l to the
    label and (1 - l) / (C - 1) to each other class. Inner maximization: as AT. Outer minimization: training mode, on
    the mixture only, which is clipped to [0, 1] (the vertex is not). The metric "accuracy" is that on the mixture.
    `fidelity`: as AT.

    gamma 2, lambda1 1 and lambda2 0.1 are the defaults of the code of RoBal's study, which has no config for it.
    """

    gamma: float = base.hyper_parameter(2.0, "[0, inf)")
    lambda1: float = base.hyper_parameter(1.0, "[0, 1]")
    lambda2: float = base.hyper_parameter(0.1, "[0, 1]")

    def loss(
        self, key: Array, net: Net, batch: Batch, x_adv: Array, method_state: MethodState, progress: TrainProgress
    ) -> base.LossOutput:
        m = jax.vmap(lambda k: jax.random.uniform(k, dtype=x_adv.dtype))(key)
        weight = m[:, None, None, None]
        vertex = batch.image + self.gamma * (x_adv - batch.image)
        mixture = jnp.clip(weight * batch.image + (1 - weight) * vertex, 0, 1)
        confidence = (m * self.lambda1 + (1 - m) * self.lambda2)[:, None]  # phi is linear in lambda
        classes = jnp.arange(net.info.num_classes)
        target = jnp.where(batch.label[:, None] == classes, confidence, (1 - confidence) / (len(classes) - 1))
        logits, _ = net(mixture, train=True)
        value = jnp.mean(batch.weighted(losses.soft_cross_entropy(logits, target)))
        return base.LossOutput(value, logits)
