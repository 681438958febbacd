"""Long-tailed adversarial training with self-distillation from a balanced self-teacher (Cho et al., ICLR 2025)."""

import dataclasses

import jax.numpy as jnp

from lt_adv import losses
from lt_adv.methods import base
from lt_adv.methods.base import Array, Batch, Config, MethodState, Net, TrainProgress


@dataclasses.dataclass(frozen=True)
class SelfDistillation(base.Method):
    """A teacher of the same architecture is trained on a balanced set D_B; the student is trained on all images:

      min_theta E CE(z(x_adv) + log n, y) + distillation t^2 KL(softmax(z_T / t) || softmax(z(x_adv) / t))
                + matching KL(softmax(z_T(x + d) - z_T(x - d)) || softmax(z(x + d) - z(x - d))),   d = x_adv - x.

    z_T are the logits of the frozen teacher in evaluation mode, of x_adv or x (`teacher_input`). The last term is
    indirect gradient matching; x - d may leave [0, 1] and also updates the running statistics. Inner maximization in
    both stages: PGD on the cross-entropy of z, evaluation mode. The student starts from a fresh initialization.

    The teacher is trained first, for `teacher_epochs` in addition to `config.optim.epochs`, with the first term only,
    which is the plain cross-entropy on D_B: floor(`balance` n_max) images of each class, a fixed subset of the head and
    repeated images of the tail. That is floor(gamma n_min) with gamma = balance * IR, so gamma = IR / 2 by default (a
    third party's sampler). Drops of the learning rate and the start of weight averaging are at the same fractions of
    both stages.

    From the paper and third parties: a balanced self-teacher, equal counts, a short first stage, balanced softmax and
    distillation in the second; the reviews mention indirect gradient matching (Lee et al., ICLR 2025). Our choices, as
    no source was available: distillation, temperature, teacher_input and matching, selected on a validation split with
    a small network (docs/results.md, Ablations), and the loss of the teacher. There is no released code, so `fidelity`
    changes nothing.
    """

    teacher_epochs: int = base.hyper_parameter(30, "[1, inf)")
    balance: float = base.hyper_parameter(0.5, "(0, 1]")
    distillation: float = base.hyper_parameter(1.0, "[0, inf)")
    temperature: float = base.hyper_parameter(1.0, "(0, inf)")
    teacher_input: str = base.hyper_parameter("adversarial", choices=("adversarial", "clean"))
    matching: float = base.hyper_parameter(1.0, "[0, inf)")

    def loss(
        self, key: Array, net: Net, batch: Batch, x_adv: Array, method_state: MethodState, progress: TrainProgress
    ) -> base.LossOutput:
        logits, _ = net(x_adv, train=True)
        values = losses.balanced_softmax(logits, batch.label, class_counts=net.info.class_counts)
        value = jnp.mean(batch.weighted(values))
        if net.teacher is None:
            return base.LossOutput(value, logits)
        metrics = {"loss_balanced": value}
        teacher_logits, _ = net.teacher(x_adv if self.teacher_input == "adversarial" else batch.image)
        metrics["loss_distillation"] = jnp.mean(
            losses.distillation(logits, teacher_logits, temperature=self.temperature)
        )
        value += self.distillation * metrics["loss_distillation"]
        if self.matching:
            opposite = 2 * batch.image - x_adv
            teacher_adv = teacher_logits if self.teacher_input == "adversarial" else net.teacher(x_adv)[0]
            target = teacher_adv - net.teacher(opposite)[0]
            metrics["loss_matching"] = jnp.mean(losses.distillation(logits - net(opposite, train=True)[0], target))
            value += self.matching * metrics["loss_matching"]
        return base.LossOutput(value, logits, metrics)

    def stages(self, config: Config) -> tuple[base.Stage, ...]:
        optim = config.optim
        ratio = self.teacher_epochs / optim.epochs
        overrides = {
            "data.resample_balanced": self.balance,
            "optim.drop_epochs": tuple(max(2, int(epoch * ratio + 0.5)) for epoch in optim.drop_epochs),
            "average.start_epoch": int(config.average.start_epoch * ratio),
        }
        return (
            base.Stage(method=self, epochs=self.teacher_epochs, name="teacher", overrides=overrides),
            base.Stage(method=self, epochs=optim.epochs, name="student", teacher="previous"),
        )
