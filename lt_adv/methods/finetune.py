"""Fine-tuning of a part of a trained network (Kang et al., ICLR 2020; Wu et al., CVPR 2021): rows of RoBal's study."""

import dataclasses

from lt_adv.methods import at, base
from lt_adv.methods.base import Config


@dataclasses.dataclass(frozen=True)
class FineTune(at.AT):
    """min_phi E CE(z(x_adv), y) from `config.init_from`, phi the parameters whose path does not match `freeze`.

    `freeze` is a regular expression over paths such as "backbone/stage1_block0/conv1/kernel" and "head/bias". With
    "backbone/" and the class-aware sampler this is re-sampling of the classifier. If the kernel of an "lws" head is
    frozen too, it is learnable weight scaling. The attack maximizes the cross-entropy of the full network.

    The running statistics of batch norm are frozen and used in every forward. Differs from the released code as `AT`
    does, and in these statistics, which `fidelity="released_code"` updates: freezing parameters does not stop them.
    """

    freeze: str = "backbone/"

    def stages(self, config: Config) -> tuple[base.Stage, ...]:
        if not config.init_from:
            raise ValueError("config.init_from is missing: method finetune begins with the network of a finished run.")
        frozen = self.fidelity != "released_code"
        return tuple(
            dataclasses.replace(stage, freeze=self.freeze, freeze_batch_stats=frozen)
            for stage in super().stages(config)
        )
