"""Fine-tuning of a part of a trained network (Kang et al., ICLR 2020; Wu et al., CVPR 2021): rows of RoBal's study."""

import dataclasses

from lt_adv.methods import at


@dataclasses.dataclass(frozen=True)
class FineTune(at.AT):
    """min_phi E CE(z(x_adv), y) from `config.init_from`, phi the parameters whose path does not begin with `freeze`.

    `freeze` is a regular expression over paths such as "backbone/stage1_block0/conv1/kernel" and "head/bias". With
    "backbone/" and the class-aware sampler this is re-sampling of the classifier; with the kernel of a head "lws"
    frozen too, learnable weight scaling. The attack climbs the cross-entropy of the whole network.

    The running statistics of batch norm stay as they are, and normalise in every forward. Differs from the released
    code as `AT` does, and in those statistics: `fidelity="released_code"` lets them move, as freezing parameters alone
    does.
    """

    freeze: str = "backbone/"

    def stages(self, config):
        if not config.init_from:
            raise ValueError("config.init_from is missing: method finetune begins with the network of a finished run.")
        frozen = self.fidelity != "released_code"
        return tuple(
            dataclasses.replace(stage, freeze=self.freeze, freeze_batch_stats=frozen)
            for stage in super().stages(config)
        )
