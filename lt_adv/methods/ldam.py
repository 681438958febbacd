"""LDAM, and its deferred margin: Cao et al., NeurIPS 2019, as rows of RoBal's study (Wu et al., CVPR 2021)."""

import dataclasses

import jax.numpy as jnp

from lt_adv import losses
from lt_adv.methods import at, base
from lt_adv.methods.base import Array, DataInfo, TrainProgress


@dataclasses.dataclass(frozen=True)
class LDAM(at.AT):
    """min_theta E CE(s (z(x_adv) - m_y [j = y]), y), m_c = max_margin (n_min / n_c)^(1/4).

    The margin is 0 before `from_epoch`, which counts from 1 as in the released code. The attack maximizes the
    cross-entropy of z. Differs from the released code as `AT` does.
    """

    max_margin: float = base.hyper_parameter(0.5, "[0, inf)")
    scale: float = base.hyper_parameter(1.0, "(0, inf)")
    from_epoch: int = 1

    def per_example_loss(self, logits: Array, label: Array, info: DataInfo, progress: TrainProgress) -> Array:
        margin = jnp.where(progress.epoch + 1 >= self.from_epoch, self.max_margin, 0.0)
        counts = info.class_counts
        return losses.ldam(logits, label, class_counts=counts, max_margin=margin, scale=self.scale)
