"""Compiles a training step for TPU on a machine without one, and lists what in it grows with the data set.

    python -m experiments.tpu_step [--examples=14000,200000] [--topology=v5e:2x2] [--compiler='{"xla_...": 0}']

Prints a line for each size of the data set: the cycles of all instructions in XLA's cost model (loop bodies once, no
collectives), the bytes of temporaries, and the instructions with an operand or result as large as the data set. The
only such instruction should be the gather of the batch. If the data set fits into the chip's own memory (43 of the 128
MiB of a v5e for 14,000 images), XLA may also prefetch it for the next step with copy-start and copy-done, which
`--compiler='{"xla_max_cross_program_prefetches": 0}'` disables.

The step is AT on WRN-10-1 in bfloat16, images 32 x 32, 64 per chip; each size compiles for a minute or more. Needs
`pip install -e '.[train,tpu]'`; only one such process can run at a time. The tests check the traced step instead
(tests/training/test_input_pipeline.py), because libtpu has 684 MB.
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


def compile_step(examples: int, topology: str, options: dict[str, Any]) -> Any:
    """Returns the compiled step for `examples` training images; `options` are those of the compiler."""
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
    replicated = NamedSharding(mesh, PartitionSpec())
    steps = examples // BATCH
    info = methods.DataInfo(np.full(10, examples // 10), steps, epochs=1, image_shape=SHAPE, num_features=64)
    method = methods.create({"name": "at"}, num_steps=2)
    model = models.create(NETWORK, 10, axis_name=AXIS)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, *SHAPE)), train=False))
    config = {**OPTIM, "warmup_epochs": 0}
    rate = optimizer.schedule(config, steps, 1)
    tx = optimizer.create(config, rate, variables["params"])
    static = StepOptions(BATCH, eps=8 / 255, step_size=2 / 255)
    step, init_metric_sums = make_train_step(method, model.apply, tx, rate, info, static, mesh, "shard_map")

    def create_state(variables: Any) -> train_state.TrainState:
        return train_state.create(jax.random.key(0), variables, tx, method.init_state(info), averaged=False)

    def with_sharding(tree: Any) -> Any:
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=replicated), tree)

    data = {name: jax.ShapeDtypeStruct((input_pipeline.BLOCK, BATCH), np.int32) for name in ("row", "label", "index")}
    data["image"] = jax.ShapeDtypeStruct((examples, math.prod(SHAPE)), np.uint8)
    state, data = with_sharding(jax.eval_shape(create_state, variables)), with_sharding(data)
    state = with_sharding(state.replace(metric_sums=jax.eval_shape(init_metric_sums, state, data, {})))
    return step.trace(state, data, {}).lower(lowering_platforms=("tpu",)).compile(compiler_options=options)


def data_set_operations(text: str, examples: int) -> Iterator[str]:
    """Yields the operations of all computations with an operand or result as large as the data set: one with an axis of
    length `examples`, or with as many elements as their images."""
    names: set[str] = set()
    for name, result, operation, operands in re.findall(r"(%[\w.-]+) = (.+?) ([\w-]+)\(([^)]*)\)", text):
        shapes = [list(map(int, filter(None, s.split(",")))) for s in re.findall(r"\w+\[([\d,]*)\]", result)]
        if any(examples in shape or math.prod(shape) >= examples * math.prod(SHAPE) for shape in shapes):
            names.add(name)
        if operation != "parameter" and names & {name, *re.findall(r"%[\w.-]+", operands)}:
            yield f"{operation} {name}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--examples", default="14000,200000")
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--compiler", type=json.loads, default={})
    options = parser.parse_args()
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    import jax

    # lt_adv chooses the form of convolutions by the backend.
    jax.default_backend = lambda: "tpu"
    for examples in map(int, options.examples.split(",")):
        try:
            program = compile_step(examples, options.topology, options.compiler)
        except (RuntimeError, ValueError) as error:  # no libtpu, or no such topology
            print("Error:", str(error).splitlines()[0], file=sys.stderr)
            return 2
        text = program.as_text()
        cycles = sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', text)))
        temporaries = program.memory_analysis().temp_size_in_bytes
        of_set = list(data_set_operations(text, examples))
        print(json.dumps({"examples": examples, "cycles": cycles, "temporary_bytes": temporaries, "of_set": of_set}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
