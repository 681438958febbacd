"""AWP: adversarial weight perturbation (Wu et al., NeurIPS 2020), an add-on to any method."""

import dataclasses

import jax
import jax.numpy as jnp

from lt_adv.methods.addons import base


@dataclasses.dataclass(frozen=True)
class AWP(base.AddOn):
    """min_theta L(theta + v), v_l = gamma |theta_l| g_l / |g_l| for every tensor l, g = grad L(theta): one ascent step.

    L is the inner method's loss of the whole batch, at the x_adv that the inner method found at theta; v is a constant
    to the gradient. Tensors of one dimension (biases, batch norm) are not perturbed, nor is one without gradient.
    gamma = 0 is the inner method. A step costs one more gradient of the loss.

    Running statistics move as often as the inner method moves them, by its forwards at theta + v: those that look for v
    normalise by the batch and write nothing, as the copy of the network does in the released code. The metrics, and
    what the method keeps in `method_state`, are those at theta + v.

    Differs from the released codes, under either fidelity: they take the whole optimiser step at theta + v and then
    subtract v, so that weight decay pulls at theta + v, where ours pulls at theta; and they can wait for some epochs
    before the first perturbation.
    """

    gamma: float = 0.005

    def loss(self, key, net, batch, x_adv, method_state, progress):
        def inner(net):
            return self.inner.loss(key, net, batch, x_adv, method_state, progress)

        theta = jax.lax.stop_gradient(net.params)
        ascent = net.mean(jax.grad(lambda params: inner(net.without_updates().with_params(params)).loss)(theta))
        v = jax.tree.map(self._along, theta, ascent)
        return inner(net.with_params(jax.tree.map(jnp.add, net.params, v)))

    def _along(self, w, g):
        length = jnp.linalg.norm(g)
        direction = g / jnp.where(length > 0, length, 1)
        return self.gamma * jnp.linalg.norm(w) * direction if w.ndim > 1 else jnp.zeros_like(w)
