"""ALP: adversarial logit pairing, in the form of RoBal's study, which pairs probabilities."""

import dataclasses

import jax.numpy as jnp

from lt_adv import losses
from lt_adv.methods import at, base


@dataclasses.dataclass(frozen=True)
class ALP(at.AT):
    """min_theta E CE(z(x_adv), y) + (beta / N) ||P(x_adv) - P(x)||_F, P the softmax of all N images of the batch.

    The Frobenius norm is one root over the whole batch, on all devices, so the pairing weakens as 1 / sqrt(N). Inner:
    as AT. Outer: training mode, the gradient flows through both sides. beta = 0 is AT, but for the running statistics,
    which see x as well.

    Sources: Kannan et al., "Adversarial logit pairing", 2018, which pairs logits by a mean of squares beside the clean
    cross-entropy; the norm, the softmax, and x_adv alone in the cross-entropy are the code's of RoBal's study (Wu et
    al., CVPR 2021). That code has no config for ALP, and its default, beta = 0, adds no pairing: 6, the weight of the
    divergence in TRADES and RoBal, is ours, under either fidelity.

    Differs from the released code as `AT` does, and in the running statistics of batch norm: there they move four times
    a step (x_adv, x, x, x_adv), ours twice. `fidelity="released_code"` restores both.
    """

    beta: float = 6.0

    def loss(self, key, net, batch, x_adv, method_state, progress):
        logits, _ = net(x_adv, train=True)
        clean, _ = net(batch.image, train=True)
        if self.fidelity == "released_code":  # the same two forwards again, which only move the running statistics
            net(batch.image, train=True)
            net(x_adv, train=True)
        adversarial = jnp.mean(losses.cross_entropy(logits, batch.label))
        squares = net.gather(losses.squared_probability_distance(clean, logits))
        total = jnp.sum(squares)
        apart = total > 0  # where x_adv = x the root has no derivative
        pairing = jnp.where(apart, jnp.sqrt(jnp.where(apart, total, 1)), 0) / len(squares)
        return base.LossOutput(adversarial + self.beta * pairing, logits, {"loss_pairing": pairing})
