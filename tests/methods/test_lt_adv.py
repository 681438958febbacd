"""Our recipe: its limits, and the term that it adds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import lt_adv as config
from lt_adv import losses
from lt_adv.methods.lt_adv import LTAdv
from lt_adv.methods.self_distillation import SelfDistillation
from lt_adv.training import program
from tests.training.helpers import COUNTS, assert_same, frozen_teacher, run

pytestmark = pytest.mark.usefixtures("float64")


def test_without_tail_weight_and_as_a_teacher_it_is_self_distillation():
    for options, teacher in (({"tail_weight": 0.0}, frozen_teacher()), ({"tail_weight": 0.7}, None)):
        (state, _), (expected, _) = (
            run(method, 1, steps=3, teacher=teacher)
            for method in (LTAdv(num_steps=1, **options), SelfDistillation(num_steps=1))
        )
        assert_same((state.params, state.batch_stats), (expected.params, expected.batch_stats), 1e-12)


def test_the_term_is_reat_s_of_the_whole_batch():
    class Spy(LTAdv):
        def init(self, info):
            return {"features": jnp.zeros((16, 6), float), "label": jnp.zeros(16, int)}

        def taught(self, value, net, batch, x_adv, logits, features):
            value, metrics = super().taught(value, net, batch, x_adv, logits, features)
            self.seen.append(net.gather({"features": features, "label": batch.label}))
            return value, metrics

        def loss(self, *given):
            object.__setattr__(self, "seen", [])
            value, (_, metrics) = super().loss(*given)
            return value, (jax.lax.stop_gradient(self.seen.pop()), metrics)

    method = Spy(num_steps=1, tail_weight=0.3, tail_margin=0.5)
    state, (row,) = run(method, 4, steps=1, teacher=frozen_teacher())
    seen, tail = state.extra, np.arange(4) == 3
    values = losses.tail_alignment(seen["features"], seen["label"], class_counts=COUNTS, tail=tail, margin=0.5)
    expected = float(values.sum()) / max(int((seen["label"] == 3).sum()), 1)
    assert row["loss_tail"] == pytest.approx(expected, rel=1e-9) and expected > 0
    rest = row["loss_balanced"] + row["loss_distillation"]
    assert row["loss"] == pytest.approx(rest + 0.3 * expected, rel=1e-9)


def test_margin_must_be_positive():
    with pytest.raises(ValueError, match=r"config\.method\.tail_margin must be positive, not 0\.0"):
        LTAdv(tail_margin=0.0)


def test_stages():
    teacher, student = program.stages(config.get_config("dataset=cifar10"))
    assert isinstance(teacher.method, LTAdv) and (teacher.name, student.teacher) == ("teacher", "previous")
