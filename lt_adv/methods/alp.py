"""ALP: adversarial logit pairing, in the form of RoBal's study, which pairs probabilities."""

import dataclasses

import jax.numpy as jnp

from lt_adv import losses
from lt_adv.methods import at, base
from lt_adv.methods.base import Array, Batch, MethodState, Net, TrainProgress


@dataclasses.dataclass(frozen=True)
class ALP(at.AT):
    """min_theta E CE(z(x_adv), y) + (beta / N) ||P(x_adv) - P(x)||_F, P the softmax of all N images of the batch.

    The Frobenius norm is one square root over the batch of all devices, so the pairing weakens as 1 / sqrt(N). Inner
    maximization: as AT. Outer minimization: training mode, the gradient flows through both sides. beta = 0 is AT,
    except for the running statistics, which also see x.

    Sources: Kannan et al., "Adversarial logit pairing", 2018, adds the mean square of logit differences to the clean
    cross-entropy. The norm, the softmax, and the cross-entropy of x_adv alone follow the code of RoBal's study (Wu et
    al., CVPR 2021). That code has no config for ALP, and its default, beta = 0, adds no pairing. Our default, 6 in
    either fidelity, is the weight of the divergence in TRADES and RoBal.

    Differs from the released code as `AT` does, and in the running statistics of batch norm, which the code updates
    four times per step (x_adv, x, x, x_adv) and we twice. `fidelity="released_code"` restores both.
    """

    beta: float = base.hyper_parameter(6.0, "[0, inf)")

    def loss(
        self, key: Array, net: Net, batch: Batch, x_adv: Array, method_state: MethodState, progress: TrainProgress
    ) -> base.LossOutput:
        logits, _ = net(x_adv, train=True)
        clean, _ = net(batch.image, train=True)
        if self.fidelity == "released_code":  # the same forwards again: they only update the running statistics
            net(batch.image, train=True)
            net(x_adv, train=True)
        adversarial = jnp.mean(batch.weighted(losses.cross_entropy(logits, batch.label)))
        squares = net.gather(losses.squared_probability_distance(clean, logits))
        total = jnp.sum(squares)
        positive = total > 0  # at x_adv = x the square root has no derivative
        pairing = jnp.where(positive, jnp.sqrt(jnp.where(positive, total, 1)), 0) / len(squares)
        return base.LossOutput(adversarial + self.beta * pairing, logits, {"loss_pairing": pairing})
