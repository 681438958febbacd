"""RoBal: adversarial robustness under long-tailed distribution (Wu et al., CVPR 2021)."""

import dataclasses

import jax.numpy as jnp

from lt_adv import losses
from lt_adv.methods import base
from lt_adv.methods.base import Array, Batch, MethodState, Net, TrainProgress


@dataclasses.dataclass(frozen=True)
class RoBal(base.Method):
    """min_theta E CE(u(x_adv), y) + beta KL(softmax z(x) || softmax z(x_adv)), z the logits of the cosine-plus head.

    u_y = s (z_y - m) - tau_m log(n_y / n_min) + tau_b log pi_y and u_j = s z_j + tau_b log pi_j otherwise: a uniform
    margin m, a class-aware margin tau_m, a class-aware bias tau_b, at scale s. The KL is that of the unscaled logits,
    its gradient flows through both sides. Inner maximization: PGD on the cross-entropy of the unscaled logits,
    evaluation mode. It never sees the boundary adjustment, which `config.eval.adjustment` adds at inference.

    Differs from the released code, which `fidelity="released_code"` restores: the code starts one-sided, at
    x + eps U[0, 1); its KL uses log(q + 1e-12); it updates the running statistics of batch norm four times per step
    (x_adv, x, x, x_adv), we twice; and the drops of its learning rate compound (see `training.optimizer`).
    """

    compounding_schedule = True
    released_start = "one_sided"

    num_steps: int = 5
    margin: float = 0.1
    scale: float = base.hyper_parameter(10.0, "(0, inf)")
    tau_b: float = 1.2
    tau_m: float = 0.0
    beta: float = base.hyper_parameter(6.0, "[0, inf)")

    def loss(
        self, key: Array, net: Net, batch: Batch, x_adv: Array, method_state: MethodState, progress: TrainProgress
    ) -> base.LossOutput:
        released = self.fidelity == "released_code"
        logits, _ = net(x_adv, train=True)
        clean, _ = net(batch.image, train=True)
        if released:  # the same forwards again: they only update the running statistics
            net(batch.image, train=True)
            net(x_adv, train=True)
        values = losses.robal_margin(
            logits,
            batch.label,
            class_counts=net.info.class_counts,
            margin=self.margin,
            scale=self.scale,
            tau_b=self.tau_b,
            tau_m=self.tau_m,
        )
        margin = jnp.mean(batch.weighted(values))
        divergence = jnp.mean(losses.kl_divergence(clean, logits, epsilon=1e-12 if released else 0.0))
        metrics = {"loss_margin": margin, "loss_divergence": divergence}
        return base.LossOutput(margin + self.beta * divergence, logits, metrics)
