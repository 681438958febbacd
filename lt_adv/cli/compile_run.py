"""`--mode=compile`: compiles the programs of a run for devices that need not be there, and estimates what they cost."""

import contextlib
import copy
import dataclasses
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from lt_adv import compilation, evaluation
from lt_adv.attacks import convolutions
from lt_adv.attacks._autoattack import abstract_programs
from lt_adv.cli.experiment import Experiment
from lt_adv.cli.flags import CompileOptions
from lt_adv.compilation import flops, topologies
from lt_adv.compilation.topologies import Accelerator, Topology
from lt_adv.data.abstract import abstract_dataset, abstract_extra, without_split_file
from lt_adv.evaluation import attack_specs
from lt_adv.runtime import atomic_io, distributed
from lt_adv.training import metric_logging, sharding, stage_builder
from lt_adv.training.net import AXIS
from lt_adv.training.stage_builder import ResolvedStage

DEVICE_COUNT = "--xla_force_host_platform_device_count"
LISTED = 5  # instructions that are printed for each program; compile.json has ten


@dataclasses.dataclass(frozen=True)
class Program:
    """A program of a run, not yet compiled.

    Attributes:
      name: "train_step", "predict", "attack_pgd20", "autoattack_apgd-ce", ...
      function: jitted or pmapped.
      arguments: its arguments, arrays as shapes with shardings.
      images: images of one call, over its devices.
      calls: how often a run calls it; for AutoAttack if no image is broken.
      epochs: of a training step.
      devices: that run it; None for all. AutoAttack runs on those of each host.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    images: int
    calls: int
    epochs: int = 0
    devices: int | None = None


class DoesNotFit(ValueError):
    """A program needs more memory than a device has."""


def compile_run(config: ConfigDict, workdir: epath.Path, options: CompileOptions) -> dict[str, Any]:
    """Compiles the programs that training and evaluation would run, and writes <workdir>/compile.json.

    Nothing is executed, no device is touched and no image is read: `config.data` names the shapes. The text of each
    compiled program is written to <workdir>/<program>.hlo.txt.

    Returns:
      The content of compile.json.

    Raises:
      ValueError: for an unknown topology, or a config that does not fit it.
      DoesNotFit: a program does not fit into the memory of a device, and `options.fit` is not set, or no batch fits.
      ImportError: the compiler of the topology is not installed.
    """
    use_cpu_only(options.topology)
    topology = compilation.get_topology(options.topology)
    with convolutions.tracing_for(topology.accelerator.platform):
        if options.fit:
            config = largest_batch(config, topology, workdir)
        experiment = abstract_experiment(config, topology)
        results = {p.name: compile_program(p, topology, workdir) for p in programs(experiment, options.programs)}
    report = make_report(experiment, topology, results, options.price)
    atomic_io.write_atomically(workdir / "compile.json", json.dumps(report, indent=1) + "\n")
    for line in report_lines(report):
        metric_logging.console.print(line, soft_wrap=True)
    return report


def use_cpu_only(topology: str) -> None:
    """Keeps JAX off real accelerators, and makes the CPU devices of "cpu:8"."""
    accelerator, shape = topologies.parse_name(topology)
    jax.config.update("jax_platforms", "cpu")
    if accelerator.platform == "cpu" and DEVICE_COUNT not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # JAX is initialized already, perhaps with enough devices
            jax.config.update("jax_num_cpu_devices", int(shape or 1))


def abstract_experiment(config: ConfigDict, topology: Topology) -> Experiment:
    """Returns the experiment on the devices of a topology, with images of which only the shape is known."""
    mesh = sharding.make_mesh(topology.devices)
    config = copy.deepcopy(config)
    config.data.update(without_split_file(config.data.to_dict()))
    dataset = abstract_dataset(config.data)
    extra = abstract_extra(config.data, dataset.train.image.shape[1:])
    return Experiment.from_config(config, dataset=dataset, extra=extra, mesh=mesh)


def programs(experiment: Experiment, kinds: tuple[str, ...]) -> Iterator[Program]:
    """Yields the programs of a run; `kinds` are "train" and "eval"."""
    if "train" in kinds:
        for resolved in experiment.resolved_stages:
            yield train_step(experiment, resolved)
    if "eval" in kinds:
        yield from evaluation_programs(experiment)


def train_step(experiment: Experiment, resolved: ResolvedStage) -> Program:
    """Returns the training step of a stage."""
    name = "train_step" if len(experiment.stages) == 1 else f"train_step_{resolved.stage.name}"
    step, arguments = stage_builder.abstract_step(resolved, experiment.mesh)
    return Program(
        name, step, arguments, resolved.config.optim.batch_size, resolved.num_steps, epochs=resolved.info.epochs
    )


def evaluation_programs(experiment: Experiment) -> Iterator[Program]:
    """Yields the prediction, and the attacks of `config.eval`: `only`, or all but AutoAttack."""
    config, split, mesh = experiment.config, experiment.split, experiment.mesh
    options, specs = config.eval, config.eval.attacks.to_dict()
    apply = stage_builder.evaluation_apply(config, split)
    selected = options.only or [name for name, spec in specs.items() if not evaluation.needs_all_images(spec)]
    num_images = options.subset_per_class * len(split.class_names) or len(split.test)
    size = math.ceil(options.batch_size / mesh.size) * mesh.size
    batches = math.ceil(num_images / size)

    over_devices = NamedSharding(mesh, PartitionSpec(AXIS))
    variables = abstract_variables(experiment)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0, impl="threefry2x32"), size))
    x = jax.ShapeDtypeStruct((size, *split.test.image.shape[1:]), jnp.float32)
    keys, x, y = stage_builder.with_sharding((keys, x, jax.ShapeDtypeStruct((size,), jnp.int32)), over_devices)
    replicated_variables = stage_builder.with_sharding(variables, distributed.replicated(mesh))
    yield Program("predict", jax.jit(apply), (replicated_variables, x), size, batches)
    for name in selected:
        if not evaluation.needs_all_images(specs[name]):
            attack = attack_specs.jit_attack(apply, specs[name])
            yield Program(f"attack_{name}", attack, (keys, replicated_variables, x, y), size, batches)
            continue
        # Each process uses its own devices; see `evaluation.evaluate`.
        first = mesh.devices.flat[0].process_index
        processes = len({device.process_index for device in mesh.devices.flat})
        local = Mesh(np.array([d for d in mesh.devices.flat if d.process_index == first]), ("slots",))
        slots = math.ceil((options.batch_size // processes or 1) / local.size) * local.size
        calls = math.ceil(math.ceil(num_images / processes) / slots)
        keywords = attack_specs.resolve(specs[name])[1]
        keywords.pop("eps")
        parts = abstract_programs(
            jax.tree_util.Partial(apply, variables),
            jax.ShapeDtypeStruct((slots, *x.shape[1:]), x.dtype),
            len(split.class_names),
            local,
            **keywords,
        )
        for part in parts:
            yield Program(
                f"{name}_{part.name}", part.function, part.arguments, slots, calls * part.calls, devices=local.size
            )


def abstract_variables(experiment: Experiment) -> Any:
    """Returns the shapes of the trained network, with the state of its method, which some adjustments need."""
    resolved = experiment.resolved_stages[-1]
    method_state = jax.eval_shape(lambda: resolved.stage.method.init_state(resolved.info))
    return {**resolved.variable_shapes, "method_state": method_state}


def compile_program(program: Program, topology: Topology, workdir: epath.Path) -> dict[str, Any]:
    """Compiles one program, writes its text, and returns its entry of compile.json.

    Raises:
      DoesNotFit: it does not fit into the memory of a device.
    """
    accelerator, num_devices = topology.accelerator, program.devices or len(topology.devices)
    began = time.perf_counter()
    lowered, jaxpr = sharding.lower(program.function, program.arguments, accelerator.platform)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFit(does_not_fit(program, topology, used_memory(error))) from error
    seconds = time.perf_counter() - began
    atomic_io.make_folder(workdir)
    atomic_io.write_atomically(workdir / f"{program.name}.hlo.txt", compiled.as_text() or "")
    estimate = compilation.estimate(compiled, accelerator)
    needed = sum(estimate.memory.values())
    if accelerator.memory and needed > accelerator.memory:
        needs = f"it needs {needed / 2**30:.1f} GiB of {accelerator.memory / 2**30:.1f} GiB a device"
        raise DoesNotFit(does_not_fit(program, topology, needs))
    count = flops.count(jaxpr) / num_devices
    ms = estimate.milliseconds
    return {
        "compile_seconds": round(seconds, 1),
        "memory": {**estimate.memory, "capacity": accelerator.memory},
        "flops": count,
        "estimated_ms": ms,
        "images_per_second": program.images / ms * 1e3 if ms else None,
        "share_of_peak": count / (ms / 1e3) / accelerator.flops if ms and accelerator.flops else None,
        "collectives": estimate.collectives,
        "host_transfers": estimate.host_transfers,
        "kernels": estimate.kernels,
        "matmul_ms": estimate.matmul_milliseconds,
        "without_estimate": estimate.without_estimate,
        "images": program.images,
        "calls": program.calls,
        "epochs": program.epochs,
        "hours": ms * program.calls / 3.6e6 if ms else None,
        "top": estimate.top,
    }


def does_not_fit(program: Program, topology: Topology, needs: str) -> str:
    per_device = program.images // (program.devices or len(topology.devices))
    return (
        f"{program.name} does not fit into the memory of {topology.name} with {per_device} images a device: {needs}. "
        "Take a smaller batch; --fit searches the largest."
    )


def used_memory(error: Exception) -> str:
    """Returns the part of the compiler's message that says how much memory the program needs.

    On a TPU that may be the on-chip memory (VMEM) of one instruction, of which the compiler has a limit.
    """
    if match := re.search(r"memory space vmem .* for %\S+ = (\w+\[[\d,]*\])", str(error)):
        return f"one instruction, of {match[1]}, exceeds XLA's limit of on-chip memory (VMEM)"
    match = re.search(
        r"Used [\d.]+\w of [\d.]+\w \w+|total memory required.*exceeds available \w+ \([\d.]+\w\)", str(error)
    )
    return match[0] if match else str(error).splitlines()[0][:200].removeprefix("RESOURCE_EXHAUSTED: ").rstrip(".")


def largest_batch(config: ConfigDict, topology: Topology, workdir: epath.Path) -> ConfigDict:
    """Returns the config with the largest batch whose training fits: to an eighth, in steps of 8 images a device.

    It doubles or halves the batch of the config until it no longer fits or does, and then bisects.

    Raises:
      DoesNotFit: not even one image a device fits.
      ValueError: the memory of the devices is not known.
    """
    if topology.accelerator.memory is None:
        raise ValueError(f"--fit: the memory of {topology.name} is not known.")
    devices = len(topology.devices)

    def with_batch(per_device: int) -> ConfigDict:
        changed = copy.deepcopy(config)
        changed.optim.batch_size = per_device * devices
        return changed

    def fits(per_device: int) -> bool:
        experiment = abstract_experiment(with_batch(per_device), topology)
        try:
            for program in programs(experiment, ("train",)):
                compile_program(program, topology, workdir)
        except DoesNotFit as error:
            reason = str(error).partition(": ")[2].partition(". Take")[0]
            metric_logging.console.print(f"{per_device} images a device do not fit: {reason}", soft_wrap=True)
            if per_device == 1:
                raise DoesNotFit(str(error).partition(". Take")[0] + ".") from error
            return False
        metric_logging.console.print(f"{per_device} images a device fit", soft_wrap=True)
        return True

    split = abstract_experiment(with_batch(1), topology).split
    most = sum(split.class_counts) // devices  # a batch is not larger than an epoch
    return with_batch(search_largest(fits, max(config.optim.batch_size // devices, 1), most))


def search_largest(fits: Callable[[int], bool], start: int, most: int) -> int:
    """Returns a number that fits while 9/8 of it, rounded to a multiple of 8, does not, or `most`.

    Args:
      fits: whether a number fits; if a number does, smaller ones do. It raises an exception if 1 does not.
      start: the first number to try.
      most: the largest number to try.
    """
    start = min(start, most)
    if fits(start):
        low, high = start, min(2 * start, most + 1)
        while low < most and high <= most and fits(high):
            low, high = high, min(2 * high, most + 1)
    else:
        low, high = start // 2, start
        while not fits(low):
            low, high = low // 2, low
    while high - low > max(low // 8, 1):
        middle = (low + high) // 2
        if high - low > 16:
            middle -= middle % 8
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def make_report(
    experiment: Experiment, topology: Topology, results: dict[str, dict[str, Any]], price: float | None
) -> dict[str, Any]:
    """Returns the content of compile.json."""
    config, devices = experiment.config, len(topology.devices)
    hours = [entry["hours"] for entry in results.values() if entry["hours"] is not None]
    steps = [entry for entry in results.values() if entry["epochs"] and entry["hours"] is not None]
    total = math.fsum(hours) if hours else None
    return {
        "topology": topology.name,
        "devices": devices,
        "batch_size": config.optim.batch_size,
        "batch_size_per_device": config.optim.batch_size // devices,
        "parallel": config.parallel,
        "sharded": list(config.sharded),
        "method": config.method.to_dict(),
        "network": config.model.to_dict(),
        "dataset": config.data.to_dict(),
        "train_images": len(experiment.split.train),
        "extra_images": len(experiment.extra.split) if experiment.extra else 0,
        "versions": compilation.versions(topology.accelerator.platform),
        "programs": results,
        "seconds_per_epoch": [3600 * entry["hours"] / entry["epochs"] for entry in steps],
        "hours": total,
        "price": price,
        "cost": total * devices * price if total is not None and price is not None else None,
        "source": compilation.SOURCES[topology.accelerator.platform],
        "rates": dataclasses.asdict(topology.accelerator),
    }


def report_lines(report: dict[str, Any]) -> Iterator[str]:
    """Yields the report as lines of text."""
    accelerator = Accelerator(**report["rates"])
    yield (
        f"{report['topology']}: {report['devices']} devices, batch size {report['batch_size']} "
        f"({report['batch_size_per_device']} a device), {report['parallel']}"
    )
    head = ["Program", "Estimated ms", "Images/s", "Of peak", "Memory a device", "GFLOP a device", "Collectives"]
    yield evaluation.table([*head, "Compiled in s"], [_row(*item) for item in report["programs"].items()])
    for name, program in report["programs"].items():
        if program["host_transfers"]:
            yield f"warning: {name}: {program['host_transfers']} transfers to or from the host in each call."
    if accelerator.platform != "cpu":
        yield "Most expensive instructions:"
        for name, program in report["programs"].items():
            for entry in program["top"][:LISTED]:
                place = entry["source"] or entry["op_name"] or "?"
                yield f"  {name}  {entry['ms']:.3f} ms  {entry['times']} x {entry['opcode']}  {place}"
    for seconds in report["seconds_per_epoch"]:
        yield f"{seconds:.3g} s an epoch, without evaluation and checkpoints"
    if report["hours"] is not None:
        cost = f", {report['cost']:,.2f} at this price" if report["cost"] is not None else ""
        yield f"{report['hours']:.3g} hours for these programs{cost}"
    if accelerator.platform == "cpu":
        yield f"No estimate of time: {report['source']}."
    else:
        yield f"Estimates, not measurements. Source: {report['source']}. Rates: {accelerator.source}."


def _row(name: str, program: dict[str, Any]) -> list[str]:
    memory = program["memory"]
    used = format_bytes(sum(value for part, value in memory.items() if part != "capacity"))
    capacity = f" of {format_bytes(memory['capacity'])}" if memory["capacity"] else ""
    collectives = [f"{v['count']} {kind} ({v['bytes'] / 1e6:.1f} MB)" for kind, v in program["collectives"].items()]
    return [
        name,
        f"{program['estimated_ms']:.3g}" if program["estimated_ms"] is not None else "n/a",
        f"{program['images_per_second']:,.0f}" if program["images_per_second"] else "n/a",
        f"{100 * program['share_of_peak']:.3g} %" if program["share_of_peak"] else "n/a",
        f"{used}{capacity}",
        f"{program['flops'] / 1e9:,.1f}",
        ", ".join(collectives) or "none",
        f"{program['compile_seconds']:.0f}",
    ]


def format_bytes(number: int) -> str:
    """Returns "312 MiB" or "15.9 GiB"."""
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.3g} MiB"
