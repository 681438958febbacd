"""RobustLT: a radius for every class (CVPR 2026), an add-on to any method."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from lt_adv.attacks import initialization, norms
from lt_adv.methods.addons import base
from lt_adv.methods.base import Array, Batch, DataInfo, MethodState, Net, TrainProgress, hyper_parameter


def class_radii(class_counts: np.ndarray, alpha: float) -> np.ndarray:
    """Returns the radius per class in units of eps: (1 - alpha) + alpha sqrt(log K_c) / sum_k pi_k sqrt(log K_k).

    K_c = n_max / n_c. The mean over training images is 1. With equal counts every radius is 1.
    """
    n = np.asarray(class_counts, np.float64)
    root = np.sqrt(np.log(n.max() / n))
    mean = np.sum(n / n.sum() * root)
    return (1 - alpha) + alpha * (root / mean if mean > 0 else np.ones_like(n))


@dataclasses.dataclass(frozen=True)
class RobustLT(base.AddOn):
    """The inner method with eps_c = w (1 - alpha) eps + w alpha eps sqrt(log K_c) / sum_k pi_k sqrt(log K_k).

    K_c = n_max / n_c: rare classes get the larger radius, its mean over training images is w eps. w = min((t - 1) /
    (warmup T), 1) in epoch t = 1 .. T of the stage, so the first epoch is without attack; warmup = 0 turns it off.
    The step size scales as the radius does. alpha and warmup in the paper: 0.3 and 0.8 (1.0 on TAET) for CIFAR-10-LT,
    0.4 and 0.6 for CIFAR-100-LT and Tiny-ImageNet-LT.

    As in the released code, the attack starts at x + U(-eps, eps) with the common radius, clipped to [0, 1], whatever
    the `start` of the inner method. Inside another add-on that rescales the radius, eps is the rescaled one:
    `addons=("dafa", "robustlt")` starts from the common radius, `("robustlt", "dafa")` from that of DAFA. Every forward
    of its `perturb` normalizes by the statistics of the batch and does not update the running ones. The evaluation is
    unchanged: one radius for all classes. The attacks `fgsm`, `fgsm_rs` and `n_fgsm` of `config.attack.name` keep their
    own start, at the radius of the class.

    Differs from the released code, in either fidelity, in the running statistics. The code updates them three or four
    times per step: with the forwards of the loss (one or two, depending on the method), and then with x_adv and x for
    its log, in training mode with the updated weights. Ours are updated by the forwards of the loss only.

    Not part of the add-on: the released code trains with Nesterov momentum (`config.optim.nesterov`), and its networks
    normalize their input by mean and deviation, which ours do not.
    """

    needs_attack = True

    alpha: float = hyper_parameter(0.3, "[0, 1]")
    warmup: float = hyper_parameter(0.8, "[0, 1]")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "start", "uniform")
        object.__setattr__(self, "released_start", None)

    def perturb(self, key: Array, net: Net, batch: Batch, method_state: MethodState, progress: TrainProgress) -> Array:
        scaled = self._scaled(batch, net.info, progress)
        if self.attack == "pgd":
            eps = norms.per_example(batch.eps, batch.image)
            start = initialization.starting_point(key, batch.image, eps, "uniform", norms.get("linf"))
            scaled = dataclasses.replace(scaled, x_init=jnp.clip(start, 0, 1))
        return self.inner.perturb(key, net.with_batch_statistics(), scaled, method_state, progress)

    def _scaled(self, batch: Batch, info: DataInfo, progress: TrainProgress) -> Batch:
        ramp = progress.epoch / (self.warmup * progress.epochs) if self.warmup else 1.0
        radii = jnp.asarray(class_radii(info.class_counts, self.alpha), batch.eps.dtype)
        factor = jnp.minimum(ramp, 1.0).astype(batch.eps.dtype) * radii[batch.label]
        return dataclasses.replace(batch, eps=batch.eps * factor, step_size=batch.step_size * factor)
