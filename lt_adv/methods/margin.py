"""Uniform margin on a cosine head (HE): Pang et al., NeurIPS 2020, a row of RoBal's study (Wu et al., CVPR 2021)."""

import dataclasses

from lt_adv import losses
from lt_adv.methods import at, base
from lt_adv.methods.base import Array, DataInfo, TrainProgress


@dataclasses.dataclass(frozen=True)
class Margin(at.AT):
    """min_theta E CE(u(x_adv), y), u_y = s (z_y - m) and u_j = s z_j otherwise, z cosines: the head has scale 1.

    Scale and margin are used only in the outer loss. The attack maximizes the cross-entropy of the cosines, also in the
    evaluation, as in the released code. Differs from the released code as `AT` does.
    """

    margin: float = 0.2
    scale: float = base.hyper_parameter(10.0, "(0, inf)")

    def per_example_loss(self, logits: Array, label: Array, info: DataInfo, progress: TrainProgress) -> Array:
        options = {"margin": self.margin, "scale": self.scale, "tau_b": 0.0, "tau_m": 0.0}
        return losses.robal_margin(logits, label, class_counts=info.class_counts, **options)
