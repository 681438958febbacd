"""Class-dependent temperatures: Ye et al., 2020, as a row of RoBal's study (Wu et al., CVPR 2021)."""

import dataclasses

from lt_adv import losses
from lt_adv.methods import at
from lt_adv.methods.base import Array, DataInfo, TrainProgress


@dataclasses.dataclass(frozen=True)
class CDT(at.AT):
    """min_theta E CE(z_c(x_adv) / (n_max / n_c)^tau, y).

    The temperatures are used only in the outer loss: attack and evaluation see the logits z, in which rare classes get
    larger values. The study warns that gains under PGD and MIM due to such a change of scale may be gradient masking.
    Differs from the released code as `AT` does.
    """

    tau: float = 0.3

    def per_example_loss(self, logits: Array, label: Array, info: DataInfo, progress: TrainProgress) -> Array:
        counts = info.class_counts
        return losses.class_dependent_temperature(logits, label, class_counts=counts, tau=self.tau)
