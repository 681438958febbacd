"""The measurements: each starts its processes in turn and summarises their results.

The signature is `measurement(record, config, options, save)`. `config` holds the arguments that define the config of a
worker, `record` is filled in as processes end, and `save()` writes it.
"""

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

Record = dict[str, Any]
Save = Callable[[], None]
PEAK_SECONDS = 2.0
START_TIMEOUT = 1800.0  # seconds from the command to the first step
JAX_ON_CPU = {"JAX_PLATFORMS": "cpu"}  # in PyTorch's processes JAX would reserve the memory of the accelerator


class Task(NamedTuple):
    """A task of `worker.py`, its options, and additions to the common environment and config."""

    name: str
    options: Mapping[str, Any] = {}
    environment: Mapping[str, str] = {}
    config: Sequence[str] = ()


def step(record: Record, config: Sequence[str], options: Namespace, save: Save) -> None:
    """Times the training step of JAX and of the PyTorch baseline in turn, each time in a fresh process."""
    seconds = {"seconds": options.seconds}
    tasks = {name: Task("torch_step", {"setting": name, **seconds}, JAX_ON_CPU) for name in ("released", "tuned")}
    tasks["jax"] = Task("jax_step", seconds)
    record["flops"] = records.launch("flops", config)

    def finish() -> None:
        peak, size = summary.peak(record), record["config"]["batch_size"]
        flops = record["flops"].get("step")
        for entry in record["summary"].values():
            summary.add_rates(entry, size, flops, peak)
        record["ratio"] = {name: summary.ratio(record["runs"], name, "jax") for name in ("released", "tuned")}
        record["floor_ms"] = 1e3 * size * flops / peak if flops and peak else None
        save()

    selected = {name: tasks[name] for name in options.frameworks}
    _rounds(record, config, options, lambda _: selected, finish)


def profile(record: Record, config: Sequence[str], options: Namespace, save: Save) -> None:
    """Profiles a training step by kind of operation, in one process per round."""
    _rounds(record, config, options, lambda _: {"jax": Task("jax_profile")}, save)


def attack(record: Record, config: Sequence[str], options: Namespace, save: Save) -> None:
    """Times PGD through `attacks.jit` and as an eager PyTorch loop in turn, for each number of steps."""
    tasks = {}
    for number in options.num_steps:
        setting = {"num_steps": number, "seconds": options.seconds}
        tasks[f"jax {number}"] = Task("jax_attack", setting)
        tasks[f"torch {number}"] = Task("torch_attack", setting, JAX_ON_CPU)

    def finish() -> None:
        images = next((run["images"] for run in record["runs"] if "images" in run), 0)
        for name, entry in record["summary"].items():
            summary.add_rates(entry, images, None, None)
            if "ms" in entry:
                entry["ms_per_step"] = entry["ms"] / int(name.split()[1])
        names = {str(number): (f"torch {number}", f"jax {number}") for number in options.num_steps}
        record["ratio"] = {name: summary.ratio(record["runs"], *pair) for name, pair in names.items()}
        record["images"] = images
        save()

    _rounds(record, config, options, lambda _: tasks, finish)


def autoattack(record: Record, config: Sequence[str], options: Namespace, save: Save) -> None:
    """Times AutoAttack in JAX and in PyTorch in turn on the same network and images.

    Each attack runs on the images that the attacks before it left robust, with `alone` on all images.
    """
    target_options = {name: getattr(options, name) for name in ("golden", "images", "workdir", "eps")}
    series = {
        "+".join(names): names for names in ([[n] for n in options.attacks] if options.alone else [options.attacks])
    }
    tasks = {}
    for name, names in series.items():
        setting = {"attacks": names, "queries": options.queries, **target_options}
        tasks[f"jax {name}"] = Task("jax_autoattack", setting)
        tasks[f"torch {name}"] = Task("torch_autoattack", setting, JAX_ON_CPU)
    record["queries"], record["trained"] = options.queries, bool(options.golden or options.workdir)
    if options.golden:
        record["config"] |= {"dataset": "digits", "network": f"golden digit network, {options.golden} head"}
        if not options.images and options.queries == 5000:
            record["official"] = target.official_accuracies(options.golden)

    def finish() -> None:
        pairs = {name: (f"torch {name}", f"jax {name}") for name in series}
        record["ratio"] = {name: summary.ratio(record["runs"], *pair) for name, pair in pairs.items()}
        record["agreement"] = {name: summary.agreement(record["runs"], *pair) for name, pair in pairs.items()}
        save()

    _rounds(record, config, options, lambda _: tasks, finish)


def data(record: Record, config: Sequence[str], options: Namespace, save: Save) -> None:
    """Times drawing, gathering and augmenting a batch, and loading the images before and after they were decoded."""

    def tasks(folder: str) -> Mapping[str, Task]:
        load = Task("load", {"folder": f"{folder}/data"})
        return {"load cold": load, "load warm": load, "pipeline": Task("pipeline", {"seconds": options.seconds})}

    def finish() -> None:
        for entry in record["summary"].values():
            summary.add_rates(entry, record["config"]["batch_size"], None, None)
        save()

    _rounds(record, config, options, tasks, finish)


def scaling(record: Record, config: Sequence[str], options: Namespace, save: Save) -> None:
    """Times the JAX step with other batch sizes, depths, attack steps and numbers of devices, one changed at a time."""
    entries = {"batch_size": "optim.batch_size", "depth": "model.depth", "num_steps": "attack.num_steps"}
    tasks, seconds = {}, {"seconds": options.seconds}
    for name, entry in entries.items():
        for value in getattr(options, name):
            tasks[f"{name} {value}"] = Task("jax_step", seconds, {}, [f"--config.{entry}={value}"])
    for value in options.devices:  # virtual ones on CPU
        tasks[f"devices {value}"] = Task("jax_step", {"devices": value, **seconds})
    record["flops_of"] = {name: records.launch("flops", [*config, *task.config]) for name, task in tasks.items()}

    def finish() -> None:
        for name, entry in record["summary"].items():
            size = int(name.split()[1]) if name.startswith("batch_size ") else record["config"]["batch_size"]
            summary.add_rates(entry, size, record["flops_of"][name].get("step"), None)
        save()

    _rounds(record, config, options, lambda _: tasks, finish)


def start(record: Record, config: Sequence[str], options: Namespace, save: Save) -> None:
    """Times `lt_adv.main` from the command to the end of its first step, with an empty, then a filled compile cache."""
    _begin(record, config, options)
    for number in range(options.runs):
        with tempfile.TemporaryDirectory() as folder:
            for name in ("cold", "warm"):
                _add(record, number, name, _first_step(config, folder, f"{folder}/{name}"))
                record["summary"] = summary.series(record["runs"])
                save()


def _first_step(config: Sequence[str], cache: str, workdir: str) -> dict[str, Any]:
    """Starts a training, waits for the line of its first step in timing.jsonl, and kills it."""
    overrides = [f"--workdir={workdir}", "--config.optim.epochs=1", "--config.log.every_steps=1"]
    command = [sys.executable, "-m", "lt_adv.main", *config, *overrides]
    environment = {**os.environ, **records.caches(cache)}
    line = Path(workdir) / "timing.jsonl"
    with tempfile.TemporaryFile("w+") as stderr:
        begin = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr, env=environment)
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


def _rounds(
    record: Record,
    config: Sequence[str],
    options: Namespace,
    tasks: Callable[[str], Mapping[str, Task]],
    finish: Callable[[], None],
) -> None:
    """Runs every task of `tasks(folder of this round)` once per round, in turn; a failed task is not started again.

    All rounds share a compile cache: the first round compiles and the others load.
    """
    _begin(record, config, options)
    with tempfile.TemporaryDirectory() as cache:
        for number in range(options.runs):
            with tempfile.TemporaryDirectory() as folder:
                for name, task in tasks(folder).items():
                    if "error" in record["summary"].get(name, {}):
                        continue
                    environment = {**records.caches(cache), **task.environment}
                    result = records.launch(task.name, [*config, *task.config], environment, **task.options)
                    _add(record, number, name, result)
                    record["summary"] = summary.series(record["runs"])
                    finish()


def _begin(record: Record, config: Sequence[str], options: Namespace) -> None:
    record["peak"] = records.launch("peak", config, seconds=min(PEAK_SECONDS, options.seconds))


def _add(record: Record, number: int, name: str, result: Mapping[str, Any]) -> None:
    record["runs"].append({"round": number, "series": name, **result})
    print(f"round {number + 1}: {name}: {_brief(result)}", file=sys.stderr, flush=True)


def _brief(result: Mapping[str, Any]) -> str:
    if "ms" in result:
        return f"{sorted(result['ms'])[len(result['ms']) // 2]:.1f} ms, compiled in {result['compile_seconds']:.1f} s"
    return result["error"] if "error" in result else f"{result['seconds']:.2f} s"


MEASUREMENTS: Mapping[str, Callable[..., None]] = {
    function.__name__: function for function in (step, profile, data, attack, autoattack, start, scaling)
}
