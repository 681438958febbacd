"""MART: misclassification aware adversarial training (Wang et al., ICLR 2020)."""

import dataclasses

import jax.numpy as jnp

from lt_adv import losses
from lt_adv.methods import base
from lt_adv.methods.base import Array, Batch, MethodState, Net, TrainProgress


@dataclasses.dataclass(frozen=True)
class Mart(base.Method):
    """min_theta E BCE(z(x_adv), y) + beta KL(softmax z(x) || softmax z(x_adv)) (1 - p_y(x)), beta the paper's lambda.

    The boosted cross-entropy BCE = -log p_y - log(1 - max_{k != y} p_k) also lowers the probability of the strongest
    wrong class. The last factor gives more weight to clean images of low confidence. The gradient flows through all
    three. Inner maximization: PGD on the cross-entropy, evaluation mode, start x + 0.001 N(0, 1) as in the released
    code. Outer minimization: training mode, x before x_adv.

    Differs from the released code in either fidelity: the logarithms contain no constants (the code has
    log(1.0001 - p + 1e-12)) and are computed without cancellation. RoBal's study lists MART too, but that branch of its
    code does not run.
    """

    start: str = "gaussian"
    beta: float = base.hyper_parameter(5.0, "[0, inf)")

    def loss(
        self, key: Array, net: Net, batch: Batch, x_adv: Array, method_state: MethodState, progress: TrainProgress
    ) -> base.LossOutput:
        clean, _ = net(batch.image, train=True)
        logits, _ = net(x_adv, train=True)
        values = losses.mart(clean, logits, batch.label, beta=self.beta)
        if batch.weight is not None:  # of the boosted cross-entropy alone, which is the loss of beta = 0
            values += (batch.weight - 1) * losses.mart(clean, logits, batch.label, beta=0.0)
        return base.LossOutput(jnp.mean(values), logits)
