"""What a compiled program needs and how long it takes, by estimate: nothing here is a measurement.

For TPU the time is that of XLA's cost model: the compiler writes the cycles of an instruction on one core into the
program. It gives collectives, sorts and some other instructions none; their time is left out.

For GPU the compiler has no cost model without a GPU. The time is a roofline: each kernel takes the longer of its bytes
(operands and results, once) over the memory bandwidth and its convolution or matrix product over the FLOP rate. Launch
gaps, caches and kernels that miss these rates are left out.
"""

import dataclasses
import re
from collections import Counter, defaultdict
from typing import Any

import jax

from lt_adv.compilation import hlo
from lt_adv.compilation.topologies import Accelerator

SOURCES = {
    "tpu": "XLA's cost model of the TPU compiler, cycles of one core; without collectives, sorts and the host",
    "cuda": "roofline of the compiled kernels: bytes over bandwidth, or FLOPs over the rate; without launches",
    "cpu": "XLA has no cost model for CPUs",
}
TOP = 10  # instructions that a report lists
_HOST = re.compile(r'is_host_transfer=true|custom_call_target="\w*callback\w*"')


@dataclasses.dataclass(frozen=True)
class Estimate:
    """One compiled program on one device.

    Attributes:
      memory: bytes of "arguments", "results" (without those that reuse arguments), "temporaries" and "code".
      milliseconds: estimate of the time of one call; None where there is none.
      matmul_milliseconds: of it, convolutions and matrix products (GPU; None elsewhere).
      without_estimate: opcode -> number of executed instructions that the estimate leaves out.
      collectives: opcode -> {"count", "bytes"} of one call.
      host_transfers: number of transfers to or from the host.
      kernels: number of executed instructions that are launched or scheduled.
      top: the most expensive instructions: {"ms", "times", "opcode", "source", "op_name"}.
      source: of the estimate.
    """

    memory: dict[str, int]
    milliseconds: float | None
    matmul_milliseconds: float | None
    without_estimate: dict[str, int]
    collectives: dict[str, dict[str, int]]
    host_transfers: int
    kernels: int
    top: list[dict[str, Any]]
    source: str


def estimate(compiled: jax.stages.Compiled, accelerator: Accelerator) -> Estimate:
    """Returns the estimate of a compiled program.

    Args:
      compiled: the result of `jit(f).lower(...).compile()`.
      accelerator: the device that it was compiled for.
    """
    text, stats = compiled.as_text(), compiled.memory_analysis()
    if text is None or stats is None:
        raise ValueError("This compiler gives neither the text of a program nor its memory.")
    module = hlo.parse(text)
    memory = {
        "arguments": stats.argument_size_in_bytes,
        "results": stats.output_size_in_bytes - stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }
    seconds: dict[str, float] = {}
    times: dict[str, int] = {}
    without: Counter[str] = Counter()
    collectives: defaultdict[str, dict[str, int]] = defaultdict(lambda: {"count": 0, "bytes": 0})
    by_name: dict[str, hlo.Instruction] = {}
    kernels = host_transfers = 0
    matmul_seconds = 0.0
    for instruction, count in module.executed():
        opcode = instruction.opcode
        if opcode == "while" and module.trip_count(instruction) is None:
            without["loop of unknown length, counted once"] += count
        if opcode in hlo.FREE or opcode.endswith("-done") or opcode in ("while", "conditional", "call"):
            continue
        kernels += count
        host_transfers += count * is_host_transfer(instruction)
        kind = opcode.removesuffix("-start")
        if kind in hlo.COLLECTIVES:
            collectives[kind]["count"] += count
            collectives[kind]["bytes"] += count * instruction.bytes
        duration = instruction_seconds(module, instruction, accelerator)
        if duration is None:
            without[opcode] += count
        else:
            seconds[instruction.name], times[instruction.name] = count * duration, count
            by_name[instruction.name] = instruction
            if accelerator.platform == "cuda" and module.matmul(instruction)[0]:
                matmul_seconds += count * duration
    ranked = sorted(seconds, key=lambda name: seconds[name], reverse=True)[:TOP]
    return Estimate(
        memory=memory,
        milliseconds=1e3 * sum(seconds.values()) if accelerator.platform != "cpu" else None,
        matmul_milliseconds=1e3 * matmul_seconds if accelerator.platform == "cuda" else None,
        without_estimate=dict(without) if accelerator.platform != "cpu" else {},
        collectives=dict(collectives),
        host_transfers=host_transfers,
        kernels=kernels,
        top=[
            {
                "ms": 1e3 * seconds[name],
                "times": times[name],
                "opcode": by_name[name].opcode,
                "source": by_name[name].source,
                "op_name": by_name[name].op_name,
            }
            for name in ranked
        ],
        source=SOURCES[accelerator.platform],
    )


def is_host_transfer(instruction: hlo.Instruction) -> bool:
    """Whether an instruction moves data between device and host, or calls Python."""
    return instruction.opcode in ("infeed", "outfeed") or bool(_HOST.search(instruction.text))


def instruction_seconds(module: hlo.Module, instruction: hlo.Instruction, accelerator: Accelerator) -> float | None:
    """Returns the estimated time of one execution, or None where there is no estimate."""
    if accelerator.platform == "tpu":
        assert accelerator.clock is not None
        return None if instruction.cycles is None else instruction.cycles / accelerator.clock
    if accelerator.platform == "cuda":
        assert accelerator.bandwidth is not None and accelerator.flops is not None
        moved = instruction.bytes + module.operand_bytes(instruction)
        flops, dtype = module.matmul(instruction)
        rate = accelerator.flops if dtype in ("bf16", "f16") else accelerator.flops / 2  # float32 runs as TF32
        return max(moved / accelerator.bandwidth, flops / rate)
    return None
