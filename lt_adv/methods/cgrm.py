"""CGRm: confusion-geometry rebalancing (arXiv 2608.09688, 2026)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from lt_adv import attacks, losses
from lt_adv.methods.base import (
    Array,
    Batch,
    DataInfo,
    LossOutput,
    Method,
    MethodState,
    Net,
    TrainProgress,
    ValidationResult,
    hyper_parameter,
)

STARTS = {"trades": "gaussian", "at": "uniform"}
WEIGHTS, SCALES, LARGEST_EDGE = (0.25, 3.0), (0.5, 2.0), 5.0  # bounds of w, beta_c / beta and G


@dataclasses.dataclass(frozen=True)
class CGRm(Method):
    """TRADES or AT with balanced cross-entropy, and a weight, a beta and a margin for each class from feedback:

      min_theta E CE(z(x) + log n, y) + w_y beta_y KL(softmax z(x) || softmax z(x_adv))
                + margin_weight w_y sum_j G_yj relu(margin - z_y(x_adv) + z_j(x_adv)).

    With `base="at"` the first two terms are w_y CE(z(x_adv) + log n, y), and the attack maximizes CE(z + log n, y) from
    a uniform start. With "trades" the attack is that of TRADES. The radius of each class is that of the add-on
    `robustlt`, which configs/cgrm.py sets.

    Every `feedback_every` epochs PGD-20 on the validation split gives P, the share P_ij of the images of class i
    predicted as j, with the accuracies a_c = P_cc and their mean m, and f_c, the mean features of the adversarial
    images of class c, divided by their norm. With the mean over the classes in <>,

      r_c <- max(m - a_c, 0) + error_weight (1 - a_c),   s <- momentum s + (1 - momentum) r / <r>   (s = 1 at first)
      w   <- 1 + weight_gain s,  then w / <w>,  clipped to [0.25, 3],  then w / <w>
      beta_c = beta q_c / <q>,   q = 1 + beta_gain (s / <s> - 1), clipped to [0.5, 2]
      H_ij <- P_ij sqrt(n_j / n_max) / |f_i - f_j|  for i != j, of each row the `neighbours` largest entries,
      G   <- momentum G + (1 - momentum) min(H / mean of its positive entries, 5)   (G = 0 at first).

    weight_gain = beta_gain = margin_weight = 0 is the base with balanced cross-entropy.

    The source is the authors' code, since we could not read the paper. In the code no gradient flows through the clean
    side of the KL, and with `base="at"` a forward of the clean images updates the running statistics; both are restored
    by `fidelity="released_code"`. Ours is the KL of TRADES, as the limit above requires.

    Differs from the released code in either fidelity: its feedback, and the choice of its checkpoint, use the test set.
    Ours use a validation split, which is cut from the images that the long tail leaves out (`data.validation_from`),
    and by default no checkpoint is chosen. Feedback from the test set is not an option. The step size of PGD-20 is that
    of training, not 0.003. The code attacks in evaluation mode from the base's own start, within the radius of the
    class; the add-on `robustlt` attacks with the statistics of the batch from its common uniform start. Other bases
    (AWP, RoBal and others) are left out.
    """

    start: str = ""  # of the base
    base: str = hyper_parameter("trades", choices=tuple(STARTS))
    beta: float = hyper_parameter(4.0, "[0, inf)")
    weight_gain: float = hyper_parameter(1.0, "[0, inf)")
    error_weight: float = hyper_parameter(0.5, "[0, inf)")
    beta_gain: float = hyper_parameter(0.5, "[0, inf)")
    margin_weight: float = hyper_parameter(0.05, "[0, inf)")
    margin: float = hyper_parameter(0.5, "[0, inf)")
    neighbours: int = hyper_parameter(3, "[1, inf)")
    momentum: float = hyper_parameter(0.8, "[0, 1]")
    feedback_every: int = hyper_parameter(10, "[1, inf)")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "start", self.start or STARTS[self.base])
        if self.base == "trades" and self.attack == "fgsm":
            raise ValueError(
                "config.attack.name is 'fgsm', but the KL divergence of method cgrm has no gradient at the clean "
                "image: use 'fgsm_rs' or 'n_fgsm', or config.method.base='at'."
            )

    def init_state(self, info: DataInfo) -> MethodState:
        return {"score": jnp.ones(info.num_classes), "graph": jnp.zeros((info.num_classes, info.num_classes))}

    def perturb(self, key: Array, net: Net, batch: Batch, method_state: MethodState, progress: TrainProgress) -> Array:
        if self.base == "at":
            log_n = jnp.log(jnp.asarray(net.info.class_counts, float))
            return self.maximize(
                key, net, batch, batch.label, objective=lambda z, y: attacks.cross_entropy(z + log_n.astype(z.dtype), y)
            )
        clean = jax.nn.softmax(net(batch.image, train=False)[0])
        return self.maximize(key, net, batch, clean, objective=attacks.kl_divergence)

    def loss(
        self, key: Array, net: Net, batch: Batch, x_adv: Array, method_state: MethodState, progress: TrainProgress
    ) -> LossOutput:
        y, n, released = batch.label, net.info.class_counts, self.fidelity == "released_code"
        weight = self.class_weights(method_state["score"])[y] if self.weight_gain else 1.0
        metrics = {}
        if self.base == "at":
            if released:  # updates the running statistics only
                net(batch.image, train=True)
            logits, _ = net(x_adv, train=True)
            values = batch.weighted(weight * losses.balanced_softmax(logits, y, class_counts=n))
            value = metrics["loss_balanced"] = jnp.mean(values)
        else:
            clean, _ = net(batch.image, train=True)
            logits, _ = net(x_adv, train=True)
            natural = jnp.mean(batch.weighted(losses.balanced_softmax(clean, y, class_counts=n)))
            target = jax.lax.stop_gradient(clean) if released else clean
            scale = self.beta_scales(method_state["score"])[y] if self.beta_gain else 1.0
            divergence = jnp.mean(weight * scale * losses.kl_divergence(target, logits))
            value = natural + self.beta * divergence
            metrics |= {"loss_natural": natural, "loss_divergence": divergence}
        if self.margin_weight:
            of_label = jnp.take_along_axis(logits, y[:, None], axis=1)
            violation = method_state["graph"][y] * jax.nn.relu(self.margin - of_label + logits)
            metrics["loss_margin"] = jnp.mean(weight * jnp.sum(violation, axis=1))
            value += self.margin_weight * metrics["loss_margin"]
        return LossOutput(value, logits, metrics)

    def class_weights(self, score: Array) -> Array:
        """Returns w, [classes]."""
        weights = _over_mean(1 + self.weight_gain * score)
        return _over_mean(jnp.clip(weights, *WEIGHTS))

    def beta_scales(self, score: Array) -> Array:
        """Returns beta_c / beta, [classes]."""
        return _over_mean(jnp.clip(1 + self.beta_gain * (_over_mean(score) - 1), *SCALES))

    def feedback(self, method_state: MethodState, result: ValidationResult, info: DataInfo) -> MethodState:
        def moving_average(old: Array, new: Array) -> Array:
            return self.momentum * old + (1 - self.momentum) * new

        accuracy = result.accuracy
        raw = jnp.maximum(jnp.mean(accuracy) - accuracy, 0) + self.error_weight * (1 - accuracy)
        graph = self.confusion_graph(result, info.class_counts)
        return {
            "score": moving_average(method_state["score"], _over_mean(raw)),
            "graph": moving_average(method_state["graph"], graph),
        }

    def confusion_graph(self, result: ValidationResult, class_counts: np.ndarray) -> Array:
        """Returns the new G before its moving average, [classes, classes]."""
        num_classes = len(class_counts)
        norm = jnp.linalg.norm(result.features, axis=1, keepdims=True)
        direction = result.features / jnp.maximum(norm, 1e-12)
        distance = jnp.linalg.norm(direction[:, None] - direction[None], axis=-1)
        frequency = jnp.asarray(np.sqrt(class_counts / class_counts.max()), distance.dtype)
        edges = result.confusion * frequency / jnp.maximum(distance, 1e-6) * (1 - jnp.eye(num_classes))
        _, nearest = jax.lax.top_k(edges, min(self.neighbours, num_classes))
        edges *= jnp.sum(jax.nn.one_hot(nearest, num_classes), axis=1)
        mean = jnp.sum(edges) / jnp.maximum(jnp.sum(edges > 0), 1)
        return jnp.minimum(edges / jnp.maximum(mean, 1e-12), LARGEST_EDGE)


def _over_mean(values: Array) -> Array:
    return values / jnp.maximum(jnp.mean(values), 1e-12)
