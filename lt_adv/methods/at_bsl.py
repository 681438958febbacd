"""AT-BSL: adversarial training with balanced softmax (Yue et al., CVPR 2024)."""

import dataclasses

import jax.numpy as jnp

from lt_adv import losses
from lt_adv.methods import base
from lt_adv.methods.base import Array, Batch, MethodState, Net, TrainProgress


@dataclasses.dataclass(frozen=True)
class ATBSL(base.Method):
    """min_theta E CE(z(x_adv) + log n, y), x_adv from PGD on the cross-entropy of the raw logits.

    The class counts n are used only in the outer loss, not in the attack or at inference. The attack starts at
    x + 0.001 N(0, 1), as in the released code.
    """

    start: str = "gaussian"

    def loss(
        self, key: Array, net: Net, batch: Batch, x_adv: Array, method_state: MethodState, progress: TrainProgress
    ) -> base.LossOutput:
        logits, _ = net(x_adv, train=True)
        values = losses.balanced_softmax(logits, batch.label, class_counts=net.info.class_counts)
        value = jnp.mean(batch.weighted(values))
        return base.LossOutput(value, logits)
