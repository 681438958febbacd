"""Uniform margin on a cosine head (HE): Pang et al., NeurIPS 2020, a row of RoBal's study (Wu et al., CVPR 2021)."""

import dataclasses

import jax.numpy as jnp

from lt_adv import losses
from lt_adv.methods import at, base


@dataclasses.dataclass(frozen=True)
class Margin(at.AT):
    """min_theta E CE(u(x_adv), y), u_y = s (z_y - m) and u_j = s z_j otherwise, z cosines: the head has scale 1.

    Scale and margin belong to the outer loss. The attack climbs the cross-entropy of the cosines themselves, in
    evaluation as well, as in the released code. Its other differences are those of `AT`.
    """

    margin: float = 0.2
    scale: float = 10.0

    def loss(self, key, net, batch, x_adv, extra, clock):
        logits, _ = net.train(x_adv)
        options = {"margin": self.margin, "scale": self.scale, "tau_b": 0.0, "tau_m": 0.0}
        values = losses.robal_margin(logits, batch.label, class_counts=net.info.class_counts, **options)
        return jnp.mean(values), (extra, {"accuracy": base.correct(logits, batch.label)})
