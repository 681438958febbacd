"""TDE: total direct effect of a causal graph (Tang et al., NeurIPS 2020), as a row of RoBal's study."""

import dataclasses

import jax.numpy as jnp

from lt_adv import losses
from lt_adv.methods import at, base
from lt_adv.methods.base import Array, Batch, DataInfo, MethodState, Net, TrainProgress


@dataclasses.dataclass(frozen=True)
class TDE(at.AT):
    """Adversarial training of a cosine head that keeps a running mean of feature directions, m <- mu m + E f / |f|.

    f are the features of x_adv in the outer forward, E the mean over the batch of all devices. There is no factor
    1 - mu, so m grows to 1 / (1 - mu) times the mean direction. Training does not use m; `config.eval.adjustment` "tde"
    removes its effect at inference.

    Differs from the released code as `AT` does, and in either fidelity in m and in the attack. The only config of the
    code has `posthoc: True`: it updates m once per step, in the outer forward, as we do, but starts from uninitialized
    memory, where we start at 0. Its training attack maximizes the cross-entropy of the adjusted logits, which its
    network returns in evaluation mode, where ours maximizes that of the logits that are trained.
    """

    mu: float = base.hyper_parameter(0.9, "[0, 1)")

    def init_state(self, info: DataInfo) -> MethodState:
        return {"feature_mean": jnp.zeros(info.num_features, float)}

    def loss(
        self, key: Array, net: Net, batch: Batch, x_adv: Array, method_state: MethodState, progress: TrainProgress
    ) -> base.LossOutput:
        logits, out = net(x_adv, train=True)
        lengths = jnp.linalg.norm(out["features"], axis=-1, keepdims=True)
        directions = out["features"] / jnp.where(lengths > 0, lengths, 1)
        mean = self.mu * method_state["feature_mean"] + net.mean(jnp.mean(directions, axis=0))
        value = jnp.mean(batch.weighted(losses.cross_entropy(logits, batch.label)))
        return base.LossOutput(value, logits, method_state={"feature_mean": mean})
