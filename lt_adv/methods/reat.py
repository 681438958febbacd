"""REAT: re-balancing adversarial training (Li et al., "Alleviating the effect of data imbalance on adversarial
training", 2023)."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from lt_adv import attacks, losses
from lt_adv.methods import base


@dataclasses.dataclass(frozen=True)
class REAT(base.Method):
    """min_theta E CE(z(x_adv) + log n, y) + tail_weight TAIL(f(x_adv), y).

    Inner: PGD on the weighted cross-entropy w_y CE, evaluation mode, w from `losses.rebalanced_weights` of m_c, the
    number of training examples that the last epoch's attacks turned into class c: predictions of the update's forward,
    in training mode, without log n, counted over all devices; m = n in the first epoch. The batch's mean divides by the
    sum of its weights, which no example's direction depends on, and is left out. Neither does the sign of an example's
    gradient depend on its own weight: in L-inf, x_adv is that of plain PGD, in the released code as here.

    TAIL, over the examples of tail classes of the whole batch: pairs of features, drawn together within a class and
    pushed apart up to `tail_margin` otherwise. This reading and its margin are ours, after the stated intent, and so is
    its weight, 0.1, chosen on a validation split (README, Ablations). `fidelity="released_code"` takes the reading of
    the code, `losses.tail_alignment_released`, which does the opposite, and its weight, 1; a weight that is given
    holds in either fidelity. Tail classes are those of ranks 2 floor(C / 3) + 1 to C - 1 by count (none of three
    classes). tail_weight = 0 is AT-BSL from a uniform start.

    Differs from the released code in both: the last, incomplete batch of an epoch is dropped, and its predictions with
    it; no epoch is selected on the test set.
    """

    tail_weight: float = base.by_fidelity(paper=0.1, released_code=1.0)
    tail_margin: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if not self.tail_margin > 0:
            raise ValueError(f"config.method.tail_margin must be positive, not {self.tail_margin}.")

    def init_state(self, info):
        n = jnp.asarray(info.class_counts)
        return {"predicted": n, "running": jnp.zeros_like(n)}

    def perturb(self, key, net, batch, method_state, progress):
        weight = losses.rebalanced_weights(net.info.class_counts, method_state["predicted"])[batch.label]
        return self.pgd(key, net, batch, batch.label, objective=lambda z, y: weight * attacks.cross_entropy(z, y))

    def loss(self, key, net, batch, x_adv, method_state, progress):
        n, num_classes = net.info.class_counts, net.info.num_classes
        logits, out = net(x_adv, train=True)
        balanced = jnp.mean(losses.balanced_softmax(logits, batch.label, class_counts=n))

        features, label, predicted = net.gather((out["features"], batch.label, jnp.argmax(logits, -1)))
        tail = np.isin(np.arange(num_classes), np.argsort(-n, kind="stable")[2 * (num_classes // 3) + 1 :])
        if self.fidelity == "released_code":
            values = losses.tail_alignment_released(features, label, class_counts=n, tail=tail)
        else:
            values = losses.tail_alignment(features, label, class_counts=n, tail=tail, margin=self.tail_margin)
        alignment = jnp.sum(values) / jnp.maximum(jnp.sum(jnp.asarray(tail)[label]), 1)

        turned = jnp.sum(predicted[:, None] == jnp.arange(num_classes), axis=0, dtype=method_state["running"].dtype)
        method_state = {**method_state, "running": method_state["running"] + turned}
        metrics = {"loss_balanced": balanced, "loss_tail": alignment}
        return base.LossOutput(balanced + self.tail_weight * alignment, logits, metrics, method_state)

    def epoch_end(self, method_state, progress):
        return {"predicted": method_state["running"], "running": jnp.zeros_like(method_state["running"])}
