"""REAT: re-balancing adversarial training (Li et al., "Alleviating the effect of data imbalance on adversarial
training", 2023)."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from lt_adv import attacks, losses
from lt_adv.methods import base
from lt_adv.methods.base import Array, Batch, DataInfo, MethodState, Net, TrainProgress


@dataclasses.dataclass(frozen=True)
class REAT(base.Method):
    """min_theta E CE(z(x_adv) + log n, y) + tail_weight TAIL(f(x_adv), y).

    Inner maximization: PGD on the weighted cross-entropy w_y CE, evaluation mode, with w = `losses.rebalanced_weights`
    of m. m_c is the number of adversarial examples that the last epoch predicted as class c: in the forward of the
    update, in training mode, without log n, counted over all devices; m = n in the first epoch. The normalization by
    the sum of weights in the batch is left out, since it does not change the direction of any example. Nor does the
    sign of an example's gradient depend on its weight: in L-inf, x_adv is that of plain PGD, as in the released code.

    TAIL is a loss over the examples of tail classes in the batch of all devices: it attracts pairs of features of one
    class, and repels other pairs up to the distance `tail_margin`. This interpretation and its margin are ours, after
    the intent that the paper states; its weight, 0.1, was chosen on a validation split (docs/results.md, Ablations).
    `fidelity="released_code"` uses the term of the code, `losses.tail_alignment_released`, which does the opposite, and
    its weight, 1. An explicit weight is used in either fidelity. Tail classes are those of ranks 2 floor(C / 3) + 1 to
    C - 1 by count (none of three classes). tail_weight = 0 is AT-BSL from a uniform start.

    Differs from the released code in either fidelity: the last, incomplete batch of an epoch is dropped, with its
    predictions; no epoch is selected on the test set.
    """

    tail_weight: float = base.hyper_parameter(0.1, "[0, inf)", released_code=1.0)
    tail_margin: float = base.hyper_parameter(1.0, "(0, inf)")

    def init_state(self, info: DataInfo) -> MethodState:
        n = jnp.asarray(info.class_counts)
        return {"predicted": n, "running": jnp.zeros_like(n)}

    def perturb(self, key: Array, net: Net, batch: Batch, method_state: MethodState, progress: TrainProgress) -> Array:
        weight = losses.rebalanced_weights(net.info.class_counts, method_state["predicted"])[batch.label]
        return self.maximize(key, net, batch, batch.label, objective=lambda z, y: weight * attacks.cross_entropy(z, y))

    def loss(
        self, key: Array, net: Net, batch: Batch, x_adv: Array, method_state: MethodState, progress: TrainProgress
    ) -> base.LossOutput:
        n, num_classes = net.info.class_counts, net.info.num_classes
        logits, out = net(x_adv, train=True)
        balanced = jnp.mean(batch.weighted(losses.balanced_softmax(logits, batch.label, class_counts=n)))

        features, label, predicted = net.gather((out["features"], batch.label, jnp.argmax(logits, -1)))
        tail = np.isin(np.arange(num_classes), np.argsort(-n, kind="stable")[2 * (num_classes // 3) + 1 :])
        if self.fidelity == "released_code":
            values = losses.tail_alignment_released(features, label, class_counts=n, tail=tail)
        else:
            values = losses.tail_alignment(features, label, class_counts=n, tail=tail, margin=self.tail_margin)
        alignment = jnp.sum(values) / jnp.maximum(jnp.sum(jnp.asarray(tail)[label]), 1)

        counts = jnp.sum(predicted[:, None] == jnp.arange(num_classes), axis=0, dtype=method_state["running"].dtype)
        method_state = {**method_state, "running": method_state["running"] + counts}
        metrics = {"loss_balanced": balanced, "loss_tail": alignment}
        return base.LossOutput(balanced + self.tail_weight * alignment, logits, metrics, method_state)

    def epoch_end(self, method_state: MethodState, progress: TrainProgress) -> MethodState:
        return {"predicted": method_state["running"], "running": jnp.zeros_like(method_state["running"])}
