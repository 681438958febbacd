"""Logit adjustment in training: Menon et al., ICLR 2021, as a row of RoBal's study (Wu et al., CVPR 2021)."""

import dataclasses

from lt_adv import losses
from lt_adv.methods import at
from lt_adv.methods.base import Array, DataInfo, TrainProgress


@dataclasses.dataclass(frozen=True)
class LogitAdjustment(at.AT):
    """min_theta E CE(z(x_adv) + tau log pi, y), with a linear head that has no bias.

    The prior is used only in the outer loss; tau = 1 is the loss of AT-BSL. Differs from the released code as `AT`
    does. In either fidelity the head has no bias; the "bias-free" layer of the code adds a random one, U(+-1/sqrt d),
    that is never trained.
    """

    tau: float = 1.0

    def per_example_loss(self, logits: Array, label: Array, info: DataInfo, progress: TrainProgress) -> Array:
        return losses.logit_adjustment(logits, label, class_counts=info.class_counts, tau=self.tau)
