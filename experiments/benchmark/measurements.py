"""The measurements: each plans tasks for processes of `worker.py`, and `run` starts them in turn.

The signature is `measurement(record, config, options)`. `config` holds the arguments that define the config of a
worker; a measurement may add entries about itself to `record`.
"""

import functools
import os
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.benchmark import record as records
from experiments.benchmark import summary, target
from experiments.benchmark.libraries import LIBRARIES, missing
from experiments.pytorch_baseline import SETTINGS

Record = dict[str, Any]
PEAK_SECONDS = 2.0
START_TIMEOUT = 1800.0  # seconds from the command to the first step
JAX_ON_CPU = {"JAX_PLATFORMS": "cpu"}  # in PyTorch's processes JAX would reserve the memory of the accelerator


class Task(NamedTuple):
    """A task of `worker.py` or "first_step", its options, and additions to the common environment and config."""

    name: str
    options: Mapping[str, Any] = {}
    environment: Mapping[str, str] = {}
    config: Sequence[str] = ()


class Plan(NamedTuple):
    tasks: Callable[[str], Mapping[str, Task]]  # empty folder of a round -> series -> task
    pairs: Mapping[str, tuple[str, str]] = {}  # label of a ratio -> (series in the numerator, in the denominator)
    flops: Mapping[str, float] = {}  # series -> model FLOPs per image


def step(record: Record, config: Sequence[str], options: Namespace) -> Plan:
    """Times the training step of JAX and of the PyTorch baseline in turn, each time in a fresh process."""
    seconds = {"seconds": options.seconds}
    tasks = {name: Task("torch_step", {"setting": name, **seconds}, JAX_ON_CPU) for name in SETTINGS}
    tasks["jax"] = Task("jax_step", seconds)
    record["flops"] = records.launch("flops", config)
    flops = dict.fromkeys(tasks, record["flops"]["step"]) if "step" in record["flops"] else {}
    selected = {name: tasks[name] for name in options.frameworks}
    return Plan(lambda _: selected, {name: (name, "jax") for name in SETTINGS}, flops)


def profile(record: Record, config: Sequence[str], options: Namespace) -> Plan:
    """Profiles a training step by kind of operation, in one process per round."""
    return Plan(lambda _: {"jax": Task("jax_profile")})


def attack(record: Record, config: Sequence[str], options: Namespace) -> Plan:
    """Times PGD through `attacks.jit` and as an eager PyTorch loop in turn, for each number of steps."""
    return _both("attack", {str(n): {"num_steps": n, "seconds": options.seconds} for n in options.num_steps})


def autoattack(record: Record, config: Sequence[str], options: Namespace) -> Plan:
    """Times AutoAttack in JAX and in PyTorch in turn on the same network and images.

    Each attack runs on the images that the attacks before it left robust, with `alone` on all images.
    """
    record["queries"], record["trained"] = options.queries, bool(options.golden or options.workdir)
    if options.golden:
        record["config"] |= {"dataset": "digits", "network": f"golden digit network, {options.golden} head"}
        if not options.images and options.queries == 5000:
            record["official"] = target.official_accuracies(options.golden)
    common = {name: getattr(options, name) for name in ("queries", "golden", "images", "workdir", "eps")}
    series = [[name] for name in options.attacks] if options.alone else [options.attacks]
    return _both("autoattack", {"+".join(names): {"attacks": names, **common} for names in series})


def libraries(record: Record, config: Sequence[str], options: Namespace) -> Plan:
    """Times attacks of lt_adv and of other libraries in turn on the same network and images, each alone on all images.

    A library that is not installed is recorded with what to install, and left out.
    """
    record["queries"], record["trained"] = options.queries, bool(options.golden or options.workdir)
    record["num_steps"] = options.num_steps
    if options.golden:
        record["config"] |= {"dataset": "digits", "network": f"golden digit network, {options.golden} head"}
    problems = {name: missing(name) for name in options.libraries}
    record["libraries"] = {name: {"error": line} for name, line in problems.items() if line}
    common = {name: getattr(options, name) for name in ("golden", "images", "workdir")}
    record["logits"] = records.launch("logits_difference", config, JAX_ON_CPU, **common, eps=None)
    steps = {name: getattr(options, name) for name in ("num_steps", "queries", "seconds")}
    tasks, pairs = {}, {}
    for norm, eps in options.radii.items():
        for attack in options.attacks:
            for name in (name for name in options.libraries if not problems[name]):
                library, series = LIBRARIES[name], f"{name} {attack} {norm}"
                if attack in library.attacks.get(norm, ()):
                    task = {"library": name, "attack": attack, "norm": norm, **steps, **common, "eps": eps}
                    tasks[series] = Task("library_attack", task, JAX_ON_CPU if library.framework == "torch" else {})
                    if name != "lt_adv":
                        pairs[series] = (f"lt_adv {attack} {norm}", series)
    return Plan(lambda _: tasks, pairs)


def _both(task: str, settings: Mapping[str, Mapping[str, Any]]) -> Plan:
    """Returns the plan that times a task with each setting in JAX, then in PyTorch."""
    tasks = {}
    for name, options in settings.items():
        tasks[f"jax {name}"] = Task(f"jax_{task}", options)
        tasks[f"torch {name}"] = Task(f"torch_{task}", options, JAX_ON_CPU)
    return Plan(lambda _: tasks, {name: (f"torch {name}", f"jax {name}") for name in settings})


def data(record: Record, config: Sequence[str], options: Namespace) -> Plan:
    """Times drawing, gathering and augmenting a batch, and loading the images before and after they were decoded."""

    def tasks(folder: str) -> Mapping[str, Task]:
        load = Task("load", {"folder": f"{folder}/data"})
        return {"load cold": load, "load warm": load, "pipeline": Task("pipeline", {"seconds": options.seconds})}

    return Plan(tasks)


def scaling(record: Record, config: Sequence[str], options: Namespace) -> Plan:
    """Times the JAX step with one thing changed at a time: batch size, depth, attack steps, devices or images."""
    entries = {"batch_size": "optim.batch_size", "depth": "model.depth", "num_steps": "attack.num_steps"}
    tasks, seconds = {}, {"seconds": options.seconds}
    for name, entry in entries.items():
        for value in getattr(options, name):
            tasks[f"{name} {value}"] = Task("jax_step", seconds, {}, [f"--config.{entry}={value}"])
    for value in options.devices:  # virtual ones on CPU
        tasks[f"devices {value}"] = Task("jax_step", {"devices": value, **seconds})
    for value in options.images:
        tasks[f"training images {value}"] = Task("jax_step", {"images": value, **seconds})
    record["flops_of"] = {name: records.launch("flops", [*config, *task.config]) for name, task in tasks.items()}
    flops = {name: entry["step"] for name, entry in record["flops_of"].items() if "step" in entry}
    return Plan(lambda _: tasks, flops=flops)


def start(record: Record, config: Sequence[str], options: Namespace) -> Plan:
    """Times `lt_adv.main` from the command to the end of its first step, with an empty, then a filled compile cache."""

    def tasks(folder: str) -> Mapping[str, Task]:
        caches = records.caches(folder)
        return {name: Task("first_step", {"workdir": f"{folder}/{name}"}, caches) for name in ("cold", "warm")}

    return Plan(tasks)


def first_step(config: Sequence[str], environment: Mapping[str, str], *, workdir: str) -> dict[str, Any]:
    """Starts a training, waits for the line of its first step in timing.jsonl, and kills it."""
    overrides = [f"--workdir={workdir}", "--config.optim.epochs=1", "--config.log.every_steps=1"]
    command = [sys.executable, "-m", "lt_adv.main", *config, *overrides]
    line = Path(workdir) / "timing.jsonl"
    with tempfile.TemporaryFile("w+") as stderr:
        begin = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr, env={**os.environ, **environment})
        try:
            while not line.exists():
                if process.poll() is not None:
                    stderr.seek(0)
                    return {"error": records.failure(process.returncode, stderr.read())}
                if time.perf_counter() - begin > START_TIMEOUT:
                    return {"error": f"no step within {START_TIMEOUT:.0f} seconds"}
                time.sleep(0.005)
            return {"seconds": time.perf_counter() - begin}
        finally:
            process.kill()
            process.wait()


def run(record: Record, config: Sequence[str], options: Namespace, save: Callable[[], None]) -> None:
    """Runs every task of the measurement once per round, in turn; a failed task is not started again.

    All rounds share a compile cache: the first round compiles and the others load. `save()` writes the record after
    each task.
    """
    record["peak"] = records.launch("peak", config, seconds=min(PEAK_SECONDS, options.seconds))
    plan = MEASUREMENTS[options.kind](record, config, options)
    with tempfile.TemporaryDirectory() as cache:
        for number in range(options.runs):
            with tempfile.TemporaryDirectory() as folder:
                for name, task in plan.tasks(folder).items():
                    if "error" in record["summary"].get(name, {}):
                        continue
                    in_worker = functools.partial(records.launch, task.name)
                    launch = first_step if task.name == "first_step" else in_worker
                    environment = {**records.caches(cache), **task.environment}
                    result = launch([*config, *task.config], environment, **task.options)
                    record["runs"].append({"round": number, "series": name, **result})
                    print(f"round {number + 1}: {name}: {_brief(result)}", file=sys.stderr, flush=True)
                    summary.update(record, plan.pairs, plan.flops)
                    save()


def _brief(result: Mapping[str, Any]) -> str:
    if "ms" in result:
        return f"{sorted(result['ms'])[len(result['ms']) // 2]:.1f} ms, compiled in {result['compile_seconds']:.1f} s"
    return result["error"] if "error" in result else f"{result['seconds']:.2f} s"


MEASUREMENTS: Mapping[str, Callable[[Record, Sequence[str], Namespace], Plan]] = {
    function.__name__: function for function in (step, profile, data, attack, autoattack, libraries, start, scaling)
}
