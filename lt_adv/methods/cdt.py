"""Class-dependent temperatures: Ye et al., 2020, as a row of RoBal's study (Wu et al., CVPR 2021)."""

import dataclasses

from lt_adv import losses
from lt_adv.methods import at


@dataclasses.dataclass(frozen=True)
class CDT(at.AT):
    """min_theta E CE(z_c(x_adv) / (n_max / n_c)^tau, y).

    The temperatures stand in the outer loss alone: the network that is attacked and evaluated has the logits z, in
    which they leave rare classes the larger ones. Gains under PGD and MIM that come with such a change of scale need
    not be real, as the study warns. Differs from the released code as `AT` does.
    """

    tau: float = 0.3

    def per_example_loss(self, logits, label, info, progress):
        counts = info.class_counts
        return losses.class_dependent_temperature(logits, label, class_counts=counts, tau=self.tau)
