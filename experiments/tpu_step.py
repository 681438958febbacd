"""What a training step is for a TPU, and what of it grows with the set: compiled by libtpu, on a machine without a TPU.

    python -m experiments.tpu_step [--examples=14000,200000] [--topology=v5e:2x2] [--compiler='{"xla_...": 0}']

For each size of the set a line: the cycles that XLA's cost model expects of all instructions together (bodies of loops
once, collectives not at all), bytes of temporaries, and the instructions with an operand or a result as large as the
set, which should be the one that gathers the batch. One more may be there: a set that fits into a chip's own memory
(43 of the 128 MiB of a v5e for 14,000 images) XLA may fetch ahead of the next step, as copy-start and copy-done, unless
`--compiler='{"xla_max_cross_program_prefetches": 0}'` forbids it.

AT on WRN-10-1 in bfloat16, images 32 x 32, 64 a chip; a minute or more of compiling for each size. Needs
`pip install -e '.[train,tpu]'`, and no more than one such process at a time. The test suite looks at the traced step
instead (tests/training/test_input_pipeline.py): libtpu is 684 MB, and most machines lack it.
"""

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

SHAPE = (32, 32, 3)
BATCH = 256
NETWORK = {"name": "wide_resnet", "depth": 10, "width": 1, "dtype": "bfloat16", "head": {"name": "linear"}}
OPTIM = {"learning_rate": 0.1, "momentum": 0.9, "nesterov": False, "weight_decay": 5e-4, "schedule": "constant"}


def compiled(examples: int, topology: str, options: dict[str, Any]) -> Any:
    """The step for a set of so many images; `options` are the compiler's."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from lt_adv import methods, models
    from lt_adv.training import input_pipeline, optimizer, train_state
    from lt_adv.training.net import AXIS
    from lt_adv.training.train_step import StepOptions, make_train_step

    mesh = Mesh(np.array(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices), (AXIS,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    steps = examples // BATCH
    info = methods.DataInfo(np.full(10, examples // 10), steps, epochs=1, image_shape=SHAPE, num_features=64)
    method = methods.create({"name": "at"}, num_steps=2)
    model = models.create(NETWORK, 10, axis_name=AXIS)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, *SHAPE)), train=False))
    config = {**OPTIM, "warmup_epochs": 0}
    rate = optimizer.schedule(config, steps, 1)
    tx = optimizer.create(config, rate, variables["params"])
    static = StepOptions(BATCH, eps=8 / 255, step_size=2 / 255)
    step, init_window = make_train_step(method, model.apply, tx, rate, info, static, mesh, "shard_map")

    def first(variables: Any) -> train_state.TrainState:
        return train_state.create(jax.random.key(0), variables, tx, method.init(info), averaged=False)

    def placed(tree: Any) -> Any:
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere), tree)

    data = {name: jax.ShapeDtypeStruct((input_pipeline.BLOCK, BATCH), np.int32) for name in ("row", "label", "index")}
    data["image"] = jax.ShapeDtypeStruct((examples, math.prod(SHAPE)), np.uint8)
    state, data = placed(jax.eval_shape(first, variables)), placed(data)
    state = placed(state.replace(window=jax.eval_shape(init_window, state, data, {})))
    return step.trace(state, data, {}).lower(lowering_platforms=("tpu",)).compile(compiler_options=options)


def large(text: str, examples: int) -> Iterator[str]:
    """The operations, of all computations, with an operand or a result that has an axis of so many examples, or as many
    elements as their images."""
    of_set: set[str] = set()
    for name, result, operation, operands in re.findall(r"(%[\w.-]+) = (.+?) ([\w-]+)\(([^)]*)\)", text):
        shapes = [list(map(int, filter(None, s.split(",")))) for s in re.findall(r"\w+\[([\d,]*)\]", result)]
        if any(examples in shape or math.prod(shape) >= examples * math.prod(SHAPE) for shape in shapes):
            of_set.add(name)
        if operation != "parameter" and of_set & {name, *re.findall(r"%[\w.-]+", operands)}:
            yield f"{operation} {name}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--examples", default="14000,200000")
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--compiler", type=json.loads, default={})
    options = parser.parse_args()
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    import jax

    # The form that convolutions have on CPU is chosen by it.
    jax.default_backend = lambda: "tpu"
    for examples in map(int, options.examples.split(",")):
        try:
            program = compiled(examples, options.topology, options.compiler)
        except (RuntimeError, ValueError) as error:  # no libtpu, or no such topology
            print("Error:", str(error).splitlines()[0], file=sys.stderr)
            return 2
        text = program.as_text()
        cycles = sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', text)))
        temporaries = program.memory_analysis().temp_size_in_bytes
        of_set = list(large(text, examples))
        print(json.dumps({"examples": examples, "cycles": cycles, "temporary_bytes": temporaries, "of_set": of_set}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
