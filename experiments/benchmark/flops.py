"""FLOPs of a network and of a training step, by `lt_adv.compilation.flops`."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from lt_adv import models
from lt_adv.attacks.convolutions import tracing_for
from lt_adv.compilation.flops import count
from lt_adv.training.stage_builder import StageProgram


def forward(model_config: Mapping[str, Any], image_shape: Sequence[int], num_classes: int) -> int:
    """Returns the FLOPs of an evaluation-mode forward of one image [h, w, c]."""
    model = models.create(model_config, num_classes)
    image = jax.ShapeDtypeStruct((1, *image_shape), float)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    return count(jax.make_jaxpr(model.apply)(variables, image))


def step(program: StageProgram) -> float:
    """Returns the FLOPs per image of one training step, attack and update, counted in the training program itself.

    It is traced for a GPU, for which no convolution is rewritten: FLOPs do not depend on the platform.
    """
    state = jax.eval_shape(program.first_state)
    with tracing_for("cuda"):
        jaxpr = jax.make_jaxpr(program.step)(state, program.pipeline.example, program.teacher)
    return count(jaxpr) / program.config.optim.batch_size
