"""FAAL: fairness-aware adversarial learning (Zhang et al., CVPR 2024), fine-tuning of a robust network."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from lt_adv import losses
from lt_adv.methods import base
from lt_adv.methods.base import Array, Batch, Config, MethodState, Net, TrainProgress


@dataclasses.dataclass(frozen=True)
class FAAL(base.Method):
    """min_theta mean_i C p_{y_i} CE(z(x_adv_i), y_i) from `config.init_from`, p the worst distribution of the batch,

      p = argmax_p sum_c p_c m_c   subject to   sum_c p_c = 1,   p >= 0,   KL(1/C || p) <= radius,

    m_c the mean of max_{j != c} q_j - q_c over the x_adv of class c, q their softmax: the larger, the worse the class.
    m_c = -1 for a class without an example in the batch. The batch is that of all devices, and p a constant for the
    gradient; `losses.worst_distribution` computes it. radius = 0 is AT. All parameters are trained and the running
    statistics are updated. Inner maximization: PGD on the cross-entropy, evaluation mode, start x + U(-eps, eps).

    Differs from the released code, which `fidelity="released_code"` restores: the code maximizes the sum of p_y m_y
    over the examples, sum_c n_c p_c m_c with n_c examples of class c in the batch, where an absent class counts 0; and
    it also updates the running statistics of batch norm with x, after x_adv. On a long tail, n_c increases the weights
    of frequent classes with a positive margin at the expense of rare ones.
    """

    radius: float = base.hyper_parameter(0.5, "[0, inf)")

    def loss(
        self, key: Array, net: Net, batch: Batch, x_adv: Array, method_state: MethodState, progress: TrainProgress
    ) -> base.LossOutput:
        released, num_classes = self.fidelity == "released_code", net.info.num_classes
        logits, _ = net(x_adv, train=True)
        if released:  # it only updates the running statistics
            net(batch.image, train=True)
        values = batch.weighted(losses.cross_entropy(logits, batch.label))

        gathered, label = net.gather((lax.stop_gradient(logits), batch.label))
        probabilities, member = jax.nn.softmax(gathered), jax.nn.one_hot(label, num_classes, dtype=gathered.dtype)
        rival = jnp.max(probabilities - 2 * member, axis=-1)  # probabilities are at most 1
        margin = rival - jnp.sum(probabilities * member, axis=-1)
        count = jnp.sum(member, axis=0)
        class_margin = jnp.sum(margin[:, None] * member, axis=0) / jnp.maximum(count, 1)
        class_margin = count * class_margin if released else jnp.where(count > 0, class_margin, -1)
        p = losses.worst_distribution(class_margin, radius=self.radius)

        metrics = {"loss_unweighted": jnp.mean(values), "largest_class_weight": num_classes * jnp.max(p)}
        return base.LossOutput(jnp.mean(num_classes * p[batch.label] * values), logits, metrics)

    def stages(self, config: Config) -> tuple[base.Stage, ...]:
        if not config.init_from:
            raise ValueError("config.init_from is missing: method faal begins with the network of a finished run.")
        return super().stages(config)
