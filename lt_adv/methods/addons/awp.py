"""AWP: adversarial weight perturbation (Wu et al., NeurIPS 2020), an add-on to any method."""

import dataclasses

import jax
import jax.numpy as jnp

from lt_adv.methods.addons import base
from lt_adv.methods.base import Array, Batch, LossOutput, MethodState, Net, TrainProgress, hyper_parameter


@dataclasses.dataclass(frozen=True)
class AWP(base.AddOn):
    """min_theta L(theta + v), v_l = gamma |theta_l| g_l / |g_l| for every tensor l, g = grad L(theta): one ascent step.

    L is the loss of the inner method over the batch of all devices, at the x_adv that its attack returns at theta; v is
    a constant for the gradient. Tensors of one dimension (biases, batch norm) and tensors with zero gradient are not
    perturbed. gamma = 0 is the inner method. A step costs one more gradient of the loss.

    The forwards of the inner method at theta + v update the running statistics. The forwards that compute v normalize
    by the batch and do not update them, as the copy of the network in the released code. The metrics and the
    `method_state` are those at theta + v.

    Differs from the released codes in either fidelity: they take the complete optimizer step at theta + v and then
    subtract v, so that weight decay acts on theta + v, ours on theta; and they can delay the first perturbation by some
    epochs.
    """

    gamma: float = hyper_parameter(0.005, "[0, inf)")

    def loss(
        self, key: Array, net: Net, batch: Batch, x_adv: Array, method_state: MethodState, progress: TrainProgress
    ) -> LossOutput:
        def inner(net: Net) -> LossOutput:
            return self.inner.loss(key, net, batch, x_adv, method_state, progress)

        theta = jax.lax.stop_gradient(net.params)
        ascent = net.mean(jax.grad(lambda params: inner(net.without_updates().with_params(params)).loss)(theta))
        v = jax.tree.map(self._perturbation, theta, ascent)
        return inner(net.with_params(jax.tree.map(jnp.add, net.params, v)))

    def _perturbation(self, w: Array, g: Array) -> Array:
        length = jnp.linalg.norm(g)
        direction = g / jnp.where(length > 0, length, 1)
        return self.gamma * jnp.linalg.norm(w) * direction if w.ndim > 1 else jnp.zeros_like(w)
