"""This project's own recipe: a balanced self-teacher, and features of the tail aligned."""

import dataclasses

from lt_adv.methods.reat import tail_alignment
from lt_adv.methods.self_distillation import SelfDistillation


@dataclasses.dataclass(frozen=True)
class LTAdv(SelfDistillation):
    """`SelfDistillation`, whose student has REAT's TAIL of its features beside its own terms:

      ... + tail_weight TAIL(f(x_adv), y),

    in our reading of TAIL (see `reat.REAT`). tail_weight = 0 is self-distillation.
    """

    tail_weight: float = 0.1
    tail_margin: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if not self.tail_margin > 0:
            raise ValueError(f"config.method.tail_margin must be positive, not {self.tail_margin}.")

    def taught(self, value, net, batch, x_adv, logits, features):
        value, metrics = super().taught(value, net, batch, x_adv, logits, features)
        metrics["loss_tail"] = tail_alignment(net, features, batch.label, margin=self.tail_margin)
        return value + self.tail_weight * metrics["loss_tail"], metrics
