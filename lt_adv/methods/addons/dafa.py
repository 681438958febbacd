"""DAFA: distance-aware fair adversarial training (Lee et al., ICLR 2024), an add-on to any method."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from lt_adv import attacks
from lt_adv.attacks import hoisting, initialization, norms
from lt_adv.attacks.convolutions import with_fast_convolutions
from lt_adv.methods import at
from lt_adv.methods.addons import base
from lt_adv.methods.base import Array, Batch, DataInfo, LossOutput, MethodState, Net, TrainProgress, hyper_parameter


def class_weights(similarity: Array, scale: float, min_weight: float, *, released: bool = False) -> Array:
    """Returns w [classes] of `similarity` S [classes, classes]; see `DAFA`."""
    own = jnp.diagonal(similarity)
    product = similarity * own  # S_ij S_jj
    harder, same = own[:, None] < own, jnp.eye(len(own), dtype=bool)  # class i is harder than class j
    gain = jnp.sum(jnp.where(harder, product, 0), axis=1)
    if released:
        loss = jnp.sum(jnp.where(harder | same, 0, product), axis=1)
    else:
        loss = jnp.sum(jnp.where(harder, product, 0), axis=0)
    change = gain - loss
    lowest = jnp.min(change)
    largest_scale = jnp.where(lowest < 0, (1 - min_weight) / jnp.where(lowest < 0, -lowest, 1), scale)
    return 1 + jnp.minimum(scale, largest_scale) * change


@dataclasses.dataclass(frozen=True)
class DAFA(base.AddOn):
    """The inner method with a weight w_c of every class c = y: radius w_c eps, step size w_c a, cross-entropy w_c CE.

      w_i = 1 + scale sum_{j: S_ii < S_jj} S_ij S_jj - scale sum_{j: S_jj < S_ii} S_ji S_ii

    S_ij is the mean probability of class j over the x_adv of class i in one epoch, in the forward of the loss in
    training mode (around AVmixup over its mixtures): weight moves from an easy class to the hard classes that are
    mistaken for it. All weights are 1 in the first part of the stage, the fraction `epoch` of its epochs; S is that of
    the last of them, over all devices. The weights then stay. The paper takes epoch 70 of 110; scale is its lambda, 1
    for CIFAR-10 and 1.5 for CIFAR-100.

    w_c multiplies the cross-entropy (`Batch.weight`), so that of the clean image in TRADES, whose KL divergence has no
    weight, and that of x_adv in AT. The attack starts as that of the inner method, at the radius of the class.
    scale = 0 is the inner method. Add-ons that rescale the radius multiply: with `robustlt` it is the product of both
    factors.

    On a long tail: S is a mean over each class and assumes no class sizes. But the sum of w is C over the classes, not
    over the images, and a frequent class that all rare ones are mistaken for can get a negative weight. So the scale is
    reduced until no weight is below `min_weight`: our choice, which changes nothing where classes are similarly hard.

    Differs from the released code, which `fidelity="released_code"` restores. Versions of the code subtract S_ij S_jj
    in the second sum, so that the sum of w is not C; others compute the equation. The loss of AT attacks from
    x + 0.001 N(0, 1), and in every iteration takes a second step of size a along the same gradient, without w, after
    which it projects to the radius eps, without w: where w = 1 it is PGD with the step 2 a. This is restored for PGD
    directly around AT and its variants (`methods.at`). In either fidelity we drop the last, incomplete batch of an
    epoch, with its probabilities.
    """

    needs_attack = True

    scale: float = hyper_parameter(1.0, "[0, inf)")
    epoch: float = hyper_parameter(70 / 110, "[0, 1]")
    min_weight: float = hyper_parameter(0.5, "(0, 1)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self._has_released_attack:
            object.__setattr__(self, "released_start", "gaussian")

    @property
    def _has_released_attack(self) -> bool:
        return self.fidelity == "released_code" and self.attack == "pgd" and isinstance(self.inner, at.AT)

    def _last_epoch(self, progress: TrainProgress) -> int:
        """Returns the epoch, counted from 0, whose probabilities give the weights."""
        return max(round(self.epoch * progress.epochs), 1) - 1

    def init_state(self, info: DataInfo) -> MethodState:
        zeros = jnp.zeros((info.num_classes, info.num_classes), float)
        own = {"probabilities": zeros, "count": zeros[0], "weight": 1 + zeros[0]}
        return self.join_state(own, self.inner.init_state(info))

    def perturb(self, key: Array, net: Net, batch: Batch, method_state: MethodState, progress: TrainProgress) -> Array:
        own, inner = self.split_state(method_state)
        weight = own["weight"].astype(batch.eps.dtype)[batch.label]
        if self._has_released_attack:
            return self._released_pgd(key, net, batch, weight)
        batch = dataclasses.replace(batch, eps=weight * batch.eps, step_size=weight * batch.step_size)
        return self.inner.perturb(key, net, batch, inner, progress)

    def loss(
        self, key: Array, net: Net, batch: Batch, x_adv: Array, method_state: MethodState, progress: TrainProgress
    ) -> LossOutput:
        own, inner = self.split_state(method_state)
        weighted = dataclasses.replace(batch, weight=batch.weighted(own["weight"][batch.label]))
        out = self.inner.loss(key, net, weighted, x_adv, inner, progress)

        logits, label = net.gather((lax.stop_gradient(out.logits), batch.label))
        member = jax.nn.one_hot(label, net.info.num_classes, dtype=own["count"].dtype, axis=0)
        member *= progress.epoch == self._last_epoch(progress)
        probabilities = jnp.matmul(member, jax.nn.softmax(logits).astype(member.dtype), precision="highest")
        own["probabilities"] += probabilities
        own["count"] += jnp.sum(member, axis=1)
        return out._replace(method_state=self.join_state(own, inner if out.method_state is None else out.method_state))

    def epoch_end(self, method_state: MethodState, progress: TrainProgress) -> MethodState:
        own, inner = self.split_state(method_state)
        similarity = own["probabilities"] / jnp.maximum(own["count"], 1)[:, None]
        released = self.fidelity == "released_code"
        weight = class_weights(similarity, self.scale, self.min_weight, released=released)
        own["weight"] = jnp.where(progress.epoch == self._last_epoch(progress), weight, own["weight"])
        return self.join_state(own, self.inner.epoch_end(inner, progress))

    def _released_pgd(self, key: Array, net: Net, batch: Batch, weight: Array) -> Array:
        """Returns the x_adv of the released loss of AT."""
        x, w = batch.image, norms.per_example(weight, batch.image)
        eps, step_size = norms.per_example(batch.eps, x), norms.per_example(batch.step_size, x)

        def total(x: Array) -> Array:
            return jnp.sum(attacks.cross_entropy(net(x, train=False)[0], batch.label))

        gradient = hoisting.hoist(with_fast_convolutions(jax.grad(total)), x)

        def step(_: int, x_adv: Array) -> Array:
            sign = jnp.sign(norms.finite(gradient(x_adv)))
            x_adv = jnp.clip(x_adv + w * step_size * sign, x - w * eps, x + w * eps)
            x_adv = jnp.clip(x_adv + step_size * sign, x - eps, x + eps)
            return jnp.clip(x_adv, 0, 1)

        start = x if batch.x_init is None else batch.x_init
        if batch.x_init is None:
            start = initialization.starting_point(key, x, eps, "gaussian", norms.get("linf"))
        return lax.stop_gradient(lax.fori_loop(0, self.num_steps, step, start))
