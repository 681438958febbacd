"""TRADES (Zhang et al., ICML 2019)."""

import dataclasses

import jax
import jax.numpy as jnp

from lt_adv import attacks, losses
from lt_adv.methods import base
from lt_adv.methods.base import Array, Batch, MethodState, Net, TrainProgress


@dataclasses.dataclass(frozen=True)
class Trades(base.Method):
    """min_theta E CE(z(x), y) + beta max_d KL(softmax z(x) || softmax z(x + d)).

    Inner maximization: PGD on the KL from x + 0.001 N(0, 1), evaluation mode, with constant clean probabilities. Outer
    minimization: training mode, the gradient flows through both sides of the KL. beta = 0 is standard training.

    Differs from the released codes, which `fidelity="released_code"` restores: they update the running statistics of
    batch norm three times per step (x, x_adv, x), we twice; and in RoBal's study the drops of the learning rate
    compound (see `training.optimizer`). All of them compute the KL with log_softmax: the 1e-12 in the regularizer of
    RoBal (`methods.robal`) is not part of TRADES.
    """

    compounding_schedule = True

    start: str = "gaussian"
    beta: float = base.hyper_parameter(6.0, "[0, inf)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attack == "fgsm":
            raise ValueError(
                "config.attack.name is 'fgsm', but the KL divergence of method trades has no gradient at the clean "
                "image: use 'fgsm_rs' or 'n_fgsm'."
            )

    def perturb(self, key: Array, net: Net, batch: Batch, method_state: MethodState, progress: TrainProgress) -> Array:
        clean = jax.nn.softmax(net(batch.image, train=False)[0])
        return self.maximize(key, net, batch, clean, objective=attacks.kl_divergence)

    def loss(
        self, key: Array, net: Net, batch: Batch, x_adv: Array, method_state: MethodState, progress: TrainProgress
    ) -> base.LossOutput:
        clean, _ = net(batch.image, train=True)
        logits, _ = net(x_adv, train=True)
        if self.fidelity == "released_code":  # the first forward again: it only updates the running statistics
            net(batch.image, train=True)
        natural = jnp.mean(batch.weighted(losses.cross_entropy(clean, batch.label)))
        values = losses.kl_divergence(clean, logits)
        divergence = jnp.mean(values if batch.divergence_weight is None else batch.divergence_weight * values)
        metrics = {"loss_natural": natural, "loss_divergence": divergence}
        return base.LossOutput(natural + self.beta * divergence, logits, metrics)
