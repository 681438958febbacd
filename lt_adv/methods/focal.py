"""Focal loss, plain (Lin et al., ICCV 2017) and class-balanced (Cui et al., CVPR 2019): rows of RoBal's study."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from lt_adv import losses
from lt_adv.methods import at, base
from lt_adv.methods.base import Array, Config, DataInfo, Params, TrainProgress


@dataclasses.dataclass(frozen=True)
class Focal(at.AT):
    """min_theta E w_y sum_c -(1 - p_c)^gamma log p_c, p_c = sigmoid(z_c(x_adv)) for c = y and 1 - sigmoid for others.

    w_c is proportional to (1 - beta) / (1 - beta^n_c), with mean 1 over the classes; beta = 0 is the plain focal loss.
    The attack maximizes the softmax cross-entropy of z. With `prior_bias` the bias of the linear head starts at -log((1
    - pi) / pi), so that sigmoid(z_c) starts near the frequency pi_c. The released code does so in its focal row, not in
    its class-balanced one. Differs from the released code as `AT` does.
    """

    gamma: float = base.hyper_parameter(2.0, "[0, inf)")
    beta: float = base.hyper_parameter(0.0, "[0, 1)")
    prior_bias: bool = True

    def stages(self, config: Config) -> tuple[base.Stage, ...]:
        head = config.model.head.name
        if self.prior_bias and head != "linear":
            raise ValueError(
                f"config.method.prior_bias starts a bias that config.model.head.name = {head!r} does not have: "
                "choose 'linear', or config.method.prior_bias=False."
            )
        return super().stages(config)

    def init_params(self, params: Params, info: DataInfo) -> Params:
        if not self.prior_bias:
            return params
        pi = info.class_counts / np.sum(info.class_counts)
        bias = jnp.asarray(-np.log((1 - pi) / pi), params["head"]["bias"].dtype)
        return {**params, "head": {**params["head"], "bias": bias}}

    def per_example_loss(self, logits: Array, label: Array, info: DataInfo, progress: TrainProgress) -> Array:
        weights = losses.class_balanced_weights(info.class_counts, self.beta)
        return weights[label] * losses.focal(logits, label, gamma=self.gamma, activation="sigmoid")
