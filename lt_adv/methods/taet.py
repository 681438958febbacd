"""TAET: two-stage adversarial equalisation training on long-tailed distributions (CVPR 2025)."""

import dataclasses

from lt_adv import losses
from lt_adv.methods import base
from lt_adv.methods.base import Array, Batch, Config, MethodState, Net, TrainProgress
from lt_adv.methods.natural import Natural


@dataclasses.dataclass(frozen=True)
class TAET(base.Method):
    """First `clean_epochs` of cross-entropy on clean images; then, with L_c the mean CE(z(x_adv), y) of class c,

      min_theta a mean_c L_c + b mean_c (L_c - mean_k L_k)^2 + g sum_c (L_c / sum_k L_k)^2.

    The means are over the batch of all devices; a class without an example in it has L_c = 0. Inner maximization: PGD
    on the cross-entropy, evaluation mode, start x + 0.001 N(0, 1) as in the released code.

    `config.optim.epochs`, `drop_epochs` and `average.start_epoch` count over both stages, as in the released code. A
    warm-up belongs to the first stage, and "cosine" starts again in each stage. Differs from the released code: the
    second stage starts without the momentum of the first (and from its averaged weights, if `config.average` is set);
    the last, incomplete batch of an epoch is dropped.
    """

    start: str = "gaussian"
    clean_epochs: int = base.hyper_parameter(40, "[1, inf)")
    a: float = base.hyper_parameter(0.1, "[0, inf)")
    b: float = base.hyper_parameter(0.1, "[0, inf)")
    g: float = base.hyper_parameter(0.1, "[0, inf)")

    def loss(
        self, key: Array, net: Net, batch: Batch, x_adv: Array, method_state: MethodState, progress: TrainProgress
    ) -> base.LossOutput:
        logits, _ = net(x_adv, train=True)
        values, label = net.gather((batch.weighted(losses.cross_entropy(logits, batch.label)), batch.label))
        num_classes = net.info.num_classes
        value = losses.hierarchical_equalisation(values, label, num_classes=num_classes, a=self.a, b=self.b, g=self.g)
        return base.LossOutput(value, logits)

    def stages(self, config: Config) -> tuple[base.Stage, ...]:
        first, total = self.clean_epochs, config.optim.epochs
        if not 0 < first < total:
            limit = f"at least 1 and less than config.optim.epochs = {total}"
            raise ValueError(f"config.method.clean_epochs must be {limit}, not {first}.")
        earliest = config.optim.first_epoch  # drops of the first stage apply from the start of the second
        shifted = {
            "optim.drop_epochs": tuple(max(epoch - first, earliest) for epoch in config.optim.drop_epochs),
            "optim.warmup_epochs": 0,
            "average.start_epoch": max(config.average.start_epoch - first, 0),
        }
        return (
            base.Stage(method=Natural(), epochs=first, name="clean"),
            base.Stage(method=self, epochs=total - first, name="adversarial", init="previous", overrides=shifted),
        )
