"""What the devices tell each other in one training step: counted in the traced program, and in the compiled one.

python -m experiments.communication.counts '{"devices": 8, "compile": true}' --config=...    a JSON line
"""

import collections
import json
import math
import re
import sys
import time
from collections.abc import Mapping
from typing import Any

COLLECTIVES = ("psum", "psum_invariant", "pmax", "pmin", "all_gather", "all_gather_invariant", "reduce_scatter")
OTHERS = ("ppermute", "pbroadcast", "all_to_all")
HLO = r"= (.*?) (all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)(?:-start)?\("
HOST = r" (infeed|outfeed|send|recv)\(|custom_call_target=\"xla_(?:ffi_)?(?:python|partitioned_python)[^\"]*callback"
BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "s32": 4, "u32": 4, "s64": 8, "u64": 8, "u8": 1, "s8": 1}


def traced(jaxpr: Any, times: int = 1) -> dict[str, dict[str, int]]:
    """{primitive: {"count", "bytes"}} of a jaxpr and all within it; bytes are those each device brings."""
    found: dict[str, dict[str, int]] = collections.defaultdict(lambda: {"count": 0, "bytes": 0})
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name in COLLECTIVES + OTHERS:
            size = sum(math.prod(v.aval.shape) * v.aval.dtype.itemsize for v in equation.invars)
            found[name]["count"] += times
            found[name]["bytes"] += times * size
        turns = params["length"] if name == "scan" else 1
        for value in params.values():
            for inner in value if isinstance(value, (tuple, list)) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    for key, one in traced(inner, times * turns).items():
                        if name == "while":
                            raise ValueError(f"How often a while loop exchanges ({key}) cannot be known.")
                        for what in one:
                            found[key][what] += one[what]
    return dict(found)


def compiled(text: str) -> dict[str, dict[str, int]]:
    """The same of a compiled program's text: what is left after XLA has merged and moved; bytes are of the results."""
    found: dict[str, dict[str, int]] = collections.defaultdict(lambda: {"count": 0, "bytes": 0})
    for result, name in re.findall(HLO, text):
        sizes = re.findall(r"(\w+)\[([\d,]*)\]", result)
        found[name]["count"] += 1
        found[name]["bytes"] += sum(BYTES[kind] * math.prod(map(int, filter(None, s.split(",")))) for kind, s in sizes)
    return dict(found)


def counted(config: Any, *, devices: int, compile: bool) -> dict[str, Any]:
    """Of the training step of a config on so many virtual devices."""
    import jax

    from experiments.benchmark import flops
    from experiments.benchmark.worker import build

    jax.config.update("jax_enable_compilation_cache", False)  # what is measured is compiling
    built = build(config, devices)
    state = built.first_state()
    arguments = (state, built.feed.example, built.teacher)
    jaxpr = jax.make_jaxpr(built.step)(*arguments)
    found: dict[str, Any] = {
        "devices": devices,
        "parameters": sum(a.size for a in jax.tree.leaves(state.params)),
        "state_bytes": sum(a.nbytes for a in jax.tree.leaves(state.replace(key=())) if hasattr(a, "nbytes")),
        "state_bytes_per_device": sum(
            a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(state.replace(key=()))
        ),
        "traced": traced(jaxpr.jaxpr),
        "step_flops": flops.step(built),
        "forward_flops": flops.forward(built.config.model, built.info.image_shape, built.info.num_classes),
    }
    if compile:
        begin = time.perf_counter()
        text = built.step.lower(*arguments).compile().as_text()
        found["compile_seconds"] = time.perf_counter() - begin
        found["compiled"], found["host_transfers"] = compiled(text), len(re.findall(HOST, text))
    return found


def total(collectives: Mapping[str, Mapping[str, int]], what: str) -> int:
    return sum(one[what] for one in collectives.values())


def main(argv: list[str]) -> int:
    from lt_adv.cli import flags

    options, *config = argv[1:]
    print(json.dumps(counted(flags.parse(["counts", *config]).config, **json.loads(options))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
