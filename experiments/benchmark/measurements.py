"""The measurements: which processes are started, in which order, and what is made of their numbers.

Each is `kind(record, config, options, save)`: `config` are the arguments that a worker takes its config from, `record`
is filled in as the processes end, and `save()` writes it.
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
LONGEST = 1800.0  # seconds from command to first step
OFF_DEVICE = {"JAX_PLATFORMS": "cpu"}  # for PyTorch's processes: JAX would take the accelerator's memory


class Work(NamedTuple):
    """A work of `worker.py` with its options, and what its process has beside the common config and environment."""

    name: str
    options: Mapping[str, Any] = {}
    environment: Mapping[str, str] = {}
    config: Sequence[str] = ()


def step(record: Record, config: Sequence[str], options: Namespace, save: Save) -> None:
    """The training step of JAX and of the PyTorch twin, in turn, each time in a fresh process."""
    seconds = {"seconds": options.seconds}
    works = {name: Work("torch_step", {"setting": name, **seconds}, OFF_DEVICE) for name in ("released", "tuned")}
    works["jax"] = Work("jax_step", seconds)
    record["flops"] = records.launch("flops", config)

    def finish() -> None:
        peak, size = summary.peak(record), record["config"]["batch_size"]
        flops = record["flops"].get("step")
        for entry in record["summary"].values():
            summary.rates(entry, size, flops, peak)
        record["ratio"] = {name: summary.ratio(record["runs"], name, "jax") for name in ("released", "tuned")}
        record["floor_ms"] = 1e3 * size * flops / peak if flops and peak else None
        save()

    chosen = {name: works[name] for name in options.frameworks}
    _rounds(record, config, options, lambda _: chosen, finish)


def profile(record: Record, config: Sequence[str], options: Namespace, save: Save) -> None:
    """What a training step spends its time on, by kind of operation, in as many processes as there are runs."""
    _rounds(record, config, options, lambda _: {"jax": Work("jax_profile")}, save)


def attack(record: Record, config: Sequence[str], options: Namespace, save: Save) -> None:
    """PGD through `attacks.jit` and as the twin's eager loop, in turn, for each number of steps."""
    works = {}
    for number in options.num_steps:
        setting = {"num_steps": number, "seconds": options.seconds}
        works[f"jax {number}"] = Work("jax_attack", setting)
        works[f"torch {number}"] = Work("torch_attack", setting, OFF_DEVICE)

    def finish() -> None:
        images = next((run["images"] for run in record["runs"] if "images" in run), 0)
        for name, entry in record["summary"].items():
            summary.rates(entry, images, None, None)
            if "ms" in entry:
                entry["ms_per_step"] = entry["ms"] / int(name.split()[1])
        names = {str(number): (f"torch {number}", f"jax {number}") for number in options.num_steps}
        record["ratio"] = {name: summary.ratio(record["runs"], *pair) for name, pair in names.items()}
        record["images"] = images
        save()

    _rounds(record, config, options, lambda _: works, finish)


def autoattack(record: Record, config: Sequence[str], options: Namespace, save: Save) -> None:
    """AutoAttack by JAX and by the twin on the same network and images, in turn: its attacks one after the other on
    what is left, or each alone."""
    case = {name: getattr(options, name) for name in ("golden", "images", "workdir", "eps")}
    series = {
        "+".join(names): names for names in ([[n] for n in options.attacks] if options.alone else [options.attacks])
    }
    works = {}
    for name, names in series.items():
        setting = {"attacks": names, "queries": options.queries, **case}
        works[f"jax {name}"] = Work("jax_autoattack", setting)
        works[f"torch {name}"] = Work("torch_autoattack", setting, OFF_DEVICE)
    record["queries"], record["trained"] = options.queries, bool(options.golden or options.workdir)
    if options.golden:
        record["config"] |= {"dataset": "digits", "network": f"golden digit network, {options.golden} head"}
        if not options.images and options.queries == 5000:
            record["official"] = target.official(options.golden)

    def finish() -> None:
        pairs = {name: (f"torch {name}", f"jax {name}") for name in series}
        record["ratio"] = {name: summary.ratio(record["runs"], *pair) for name, pair in pairs.items()}
        record["agreement"] = {name: summary.agreement(record["runs"], *pair) for name, pair in pairs.items()}
        save()

    _rounds(record, config, options, lambda _: works, finish)


def data(record: Record, config: Sequence[str], options: Namespace, save: Save) -> None:
    """Draw, gather and augmentation alone; and how long the images take to load, at first and once decoded."""

    def works(folder: str) -> Mapping[str, Work]:
        load = Work("load", {"folder": f"{folder}/data"})
        return {"load cold": load, "load warm": load, "pipeline": Work("pipeline", {"seconds": options.seconds})}

    def finish() -> None:
        for entry in record["summary"].values():
            summary.rates(entry, record["config"]["batch_size"], None, None)
        save()

    _rounds(record, config, options, works, finish)


def scaling(record: Record, config: Sequence[str], options: Namespace, save: Save) -> None:
    """The JAX step at other batch sizes, depths, attack steps and numbers of devices, one changed at a time."""
    entries = {"batch_size": "optim.batch_size", "depth": "model.depth", "num_steps": "attack.num_steps"}
    works, seconds = {}, {"seconds": options.seconds}
    for name, entry in entries.items():
        for value in getattr(options, name):
            works[f"{name} {value}"] = Work("jax_step", seconds, {}, [f"--config.{entry}={value}"])
    for value in options.devices:  # on CPU as many virtual ones
        works[f"devices {value}"] = Work("jax_step", {"devices": value, **seconds})
    record["flops_of"] = {name: records.launch("flops", [*config, *work.config]) for name, work in works.items()}

    def finish() -> None:
        for name, entry in record["summary"].items():
            size = int(name.split()[1]) if name.startswith("batch_size ") else record["config"]["batch_size"]
            summary.rates(entry, size, record["flops_of"][name].get("step"), None)
        save()

    _rounds(record, config, options, lambda _: works, finish)


def start(record: Record, config: Sequence[str], options: Namespace, save: Save) -> None:
    """Seconds from the command to the first finished step of `lt_adv.main`; the compile cache is empty, then filled."""
    _begin(record, config, options)
    for number in range(options.runs):
        with tempfile.TemporaryDirectory() as folder:
            for name in ("cold", "warm"):
                _add(record, number, name, _first_step(config, folder, f"{folder}/{name}"))
                record["summary"] = summary.series(record["runs"])
                save()


def _first_step(config: Sequence[str], cache: str, workdir: str) -> dict[str, Any]:
    """Starts a training, waits for the line of its first step in timing.jsonl, and ends it."""
    short = [f"--workdir={workdir}", "--config.optim.epochs=1", "--config.log.every_steps=1"]
    command = [sys.executable, "-m", "lt_adv.main", *config, *short]
    environment = {**os.environ, **records.caches(cache)}
    line = Path(workdir) / "timing.jsonl"
    with tempfile.TemporaryFile("w+") as said:
        begin = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said, env=environment)
        try:
            while not line.exists():
                if process.poll() is not None:
                    said.seek(0)
                    return {"error": records.failure(process.returncode, said.read())}
                if time.perf_counter() - begin > LONGEST:
                    return {"error": f"no step within {LONGEST:.0f} seconds"}
                time.sleep(0.005)
            return {"seconds": time.perf_counter() - begin}
        finally:
            process.kill()
            process.wait()


def _rounds(
    record: Record,
    config: Sequence[str],
    options: Namespace,
    works: Callable[[str], Mapping[str, Work]],
    finish: Callable[[], None],
) -> None:
    """Every work of `works(folder of this round)` once a round, in turn; one that failed is not started again.

    What they compile is kept from round to round, so that the first one compiles and the others find it.
    """
    _begin(record, config, options)
    with tempfile.TemporaryDirectory() as kept:
        for number in range(options.runs):
            with tempfile.TemporaryDirectory() as folder:
                for name, work in works(folder).items():
                    if "error" in record["summary"].get(name, {}):
                        continue
                    environment = {**records.caches(kept), **work.environment}
                    found = records.launch(work.name, [*config, *work.config], environment, **work.options)
                    _add(record, number, name, found)
                    record["summary"] = summary.series(record["runs"])
                    finish()


def _begin(record: Record, config: Sequence[str], options: Namespace) -> None:
    record["peak"] = records.launch("peak", config, seconds=min(PEAK_SECONDS, options.seconds))


def _add(record: Record, number: int, name: str, found: Mapping[str, Any]) -> None:
    record["runs"].append({"round": number, "series": name, **found})
    print(f"round {number + 1}: {name}: {_brief(found)}", file=sys.stderr, flush=True)


def _brief(found: Mapping[str, Any]) -> str:
    if "ms" in found:
        return f"{sorted(found['ms'])[len(found['ms']) // 2]:.1f} ms, compiled in {found['compile_seconds']:.1f} s"
    return found["error"] if "error" in found else f"{found['seconds']:.2f} s"


MEASUREMENTS: Mapping[str, Callable[..., None]] = {
    k.__name__: k for k in (step, profile, data, attack, autoattack, start, scaling)
}
