"""Expected efficiency on machines that we do not have: arithmetic on counts, and on numbers their makers publish.

A step computes for t = images per device x FLOPs per image / (share x peak), and tells the others, per device,
  the gradient, a ring all-reduce: 2 (n - 1) / n x bytes / bandwidth;
  small sums, of batch statistics and metrics, one after the other: their number x latency. They are counted as traced,
  with one for each array of the gradient; XLA merges more than half of them.
Efficiency is t / (t + both), as if nothing were hidden: a lower bound. The gradient's sum can hide behind the backward
pass of the update, alone of all passes; it does so from a batch on where that takes as long. What a device reaches of
its peak, and the latencies, are assumptions of ours; the method is as good as these.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from experiments.communication.counts import total

SHARE = 0.4  # of the peak that convolutions in bfloat16 reach: an assumption
PER_DEVICE = 128  # images


class Machine(NamedTuple):
    name: str
    devices: int
    peak: float  # FLOP/s in bfloat16, dense
    bandwidth: float  # bytes/s that a device sends to the others
    latency: float  # seconds of a small all-reduce: an assumption


MACHINES = (
    # NVIDIA's data sheet of the H100 SXM: 989 TFLOP/s, NVLink 900 GB/s in both directions together.
    Machine("8 H100 (NVLink)", 8, 989e12, 450e9, 20e-6),
    # Google's page on the TPU v5e: 197 TFLOP/s, 1,600 Gbit/s between chips, counted as both directions together.
    Machine("256 TPU v5e (one pod)", 256, 197e12, 100e9, 50e-6),
)


class Expected(NamedTuple):
    compute: float  # seconds of a step
    gradient: float  # seconds of the gradient's sum
    small: float  # seconds of all small sums
    efficiency: float  # in [0, 1], nothing hidden
    hidden: float  # efficiency if the gradient's sum is hidden
    batch: float  # images per device from which it can be


def expected(counts: Mapping[str, Any], machine: Machine, per_device: int = PER_DEVICE) -> Expected:
    """What the counts of one network come to on a machine."""
    rate = SHARE * machine.peak
    gradient_bytes = 4 * counts["parameters"]
    sums = total(counts["traced"], "count")
    compute = per_device * counts["step_flops"] / rate
    gradient = 2 * (machine.devices - 1) / machine.devices * gradient_bytes / machine.bandwidth
    small = sums * machine.latency
    return Expected(
        compute,
        gradient,
        small,
        compute / (compute + gradient + small),
        compute / (compute + small),
        gradient * rate / (2 * counts["forward_flops"]),  # a backward pass is two forward ones
    )


def table(record: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """A row per network and machine."""
    head = ["Network", "Machine", "Parameters", "Small sums", "GFLOP per image", "Compute, ms", "Gradient, ms"]
    head += ["Small sums, ms", "Efficiency", "Gradient hidden", "Hidden from images per device"]
    rows = []
    for name, counts in record["networks"].items():
        for machine in MACHINES if "error" not in counts else ():
            it = expected(counts, machine)
            row = [name, machine.name, f"{counts['parameters'] / 1e6:.1f} M", str(total(counts["traced"], "count"))]
            row += [f"{counts['step_flops'] / 1e9:.1f}", *(f"{1e3 * s:.2f}" for s in it[:3])]
            rows.append([*row, f"{100 * it.efficiency:.0f} %", f"{100 * it.hidden:.0f} %", f"{it.batch:.0f}"])
    return head, rows


def measured(record: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """A row per state and number of devices, of the compiled program."""
    head = ["State", "Devices", "All-reduces", "All-gathers", "Bytes of all-reduces", "Bytes of all-gathers"]
    head += ["State on a device, bytes", "Transfers to or from the host", "Compile, s"]
    rows = []
    for name, counts in record["compiled"].items():
        if "error" in counts:
            continue
        found = [counts["compiled"].get(kind, {"count": 0, "bytes": 0}) for kind in ("all-reduce", "all-gather")]
        row = [*name.split(), *(str(one["count"]) for one in found), *(f"{one['bytes']:,}" for one in found)]
        row += [f"{counts['state_bytes_per_device']:,}", str(counts["host_transfers"])]
        rows.append([*row, f"{counts['compile_seconds']:.1f}"])
    return head, rows
