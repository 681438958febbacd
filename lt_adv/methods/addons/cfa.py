"""CFA: class-wise calibrated fair adversarial training (Wei et al., CVPR 2023), an add-on to any method."""

import dataclasses

import jax
import jax.numpy as jnp

from lt_adv.methods import trades
from lt_adv.methods.addons import base
from lt_adv.methods.base import Array, Batch, DataInfo, LossOutput, MethodState, Net, TrainProgress, hyper_parameter


@dataclasses.dataclass(frozen=True)
class CFA(base.AddOn):
    """The inner method with the radius eps_c = (lambda_1 + acc_c) eps of every class c = y, and, around TRADES,

      E (1 - b_c) CE(z(x), y) + b_c KL,   b_c = (lambda_2 + acc_c) beta / (1 + (lambda_2 + acc_c) beta),

    beta that of TRADES. acc_c is the accuracy of class c on the x_adv of the last epoch: the number of correct
    predictions in the forwards of the loss, in training mode, over the number of images of class c, on all devices
    (around AVmixup the predictions on its mixtures). In the first part of the stage, the fraction `begin` of its epochs
    (at least one epoch; the code takes 10 of 200), both factors lambda + acc_c are 1. The step size of PGD is not
    scaled; those of FGSM and N-FGSM are multiples of the radius of the class. The attack starts as that of the inner
    method, at the radius of the class: U(-eps_c, eps_c) in AT.

    The paper defines the class-wise regularization for TRADES only. Around any other method, the add-on changes the
    radius alone, and lambda_2 is not used. Add-ons that rescale the radius multiply: with `robustlt` it is the product
    of both factors. The third part of the paper, a fairness-aware average of the weights at the end of an epoch (decay
    0.88; skipped while the worst class of a validation split is below 0.2), is `config.average.name="epoch_ema"`.

    Differs from the released code, which `fidelity="released_code"` restores: there acc_c = C correct_c / N, N the
    number of images of all classes. That is the accuracy if all classes have N / C images; on a long tail it exceeds 1
    for frequent classes and is close to 0 for rare ones. Differs from it in either fidelity in the running statistics
    of batch norm, which the code also updates with x after each step and, in AT, in every step of the attack.
    """

    needs_attack = True

    lambda_1: float = hyper_parameter(0.5, "[0, inf)")
    lambda_2: float = hyper_parameter(0.5, "[0, inf)")
    begin: float = hyper_parameter(0.05, "[0, 1]")

    def init_state(self, info: DataInfo) -> MethodState:
        own = {name: jnp.zeros(info.num_classes, float) for name in ("correct", "count", "accuracy")}
        return self.join_state(own, self.inner.init_state(info))

    def _factor(self, offset: float, own: MethodState, batch: Batch, progress: TrainProgress) -> Array:
        """Returns lambda + acc_y of each example, or 1 in the first epochs."""
        active = progress.epoch >= max(round(self.begin * progress.epochs), 1)
        return jnp.where(active, offset + own["accuracy"], 1.0).astype(batch.eps.dtype)[batch.label]

    def perturb(self, key: Array, net: Net, batch: Batch, method_state: MethodState, progress: TrainProgress) -> Array:
        own, inner = self.split_state(method_state)
        eps = self._factor(self.lambda_1, own, batch, progress) * batch.eps
        return self.inner.perturb(key, net, dataclasses.replace(batch, eps=eps), inner, progress)

    def loss(
        self, key: Array, net: Net, batch: Batch, x_adv: Array, method_state: MethodState, progress: TrainProgress
    ) -> LossOutput:
        own, inner = self.split_state(method_state)
        weighted = batch
        if isinstance(self.innermost, trades.Trades):  # its loss is weight CE + beta divergence_weight KL
            factor = self._factor(self.lambda_2, own, batch, progress)
            total = 1 + factor * self.innermost.beta
            divergence = factor / total if batch.divergence_weight is None else batch.divergence_weight * factor / total
            weighted = dataclasses.replace(batch, weight=batch.weighted(1 / total), divergence_weight=divergence)
        out = self.inner.loss(key, net, weighted, x_adv, inner, progress)

        correct, label = net.gather((jnp.argmax(out.logits, -1) == batch.label, batch.label))
        member = jax.nn.one_hot(label, net.info.num_classes, dtype=own["count"].dtype)
        own["correct"] += jnp.sum(member * correct[:, None], axis=0)
        own["count"] += jnp.sum(member, axis=0)
        return out._replace(method_state=self.join_state(own, inner if out.method_state is None else out.method_state))

    def epoch_end(self, method_state: MethodState, progress: TrainProgress) -> MethodState:
        own, inner = self.split_state(method_state)
        correct, count = own["correct"], own["count"]
        if self.fidelity == "released_code":
            accuracy = len(count) * correct / jnp.sum(count)
        else:  # a class without an image in this epoch keeps its accuracy
            accuracy = jnp.where(count > 0, correct / jnp.maximum(count, 1), own["accuracy"])
        reset = {"correct": 0 * correct, "count": 0 * count, "accuracy": accuracy}
        return self.join_state(reset, self.inner.epoch_end(inner, progress))
