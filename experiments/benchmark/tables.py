"""Tables of the records under experiments/results/benchmark/."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.benchmark.libraries import LIBRARIES, NORMS

Record = Mapping[str, Any]
UNKNOWN = "–"
MAX_OPERATIONS = 8
STANDARD = "apgd-ce+apgd-t+fab-t+square"
COMMANDS = {
    "step": "step --config=configs/at_bsl.py:dataset=cifar10",
    "profile": "profile --config=configs/robal.py:dataset=cifar10",
    "data": "data --config=configs/at_bsl.py:dataset=cifar10",
    "attack": "attack --config=configs/at_bsl.py:dataset=cifar10 --num-steps=10,20,100",
    "autoattack": "autoattack --golden=linear",
    "libraries": "libraries --golden=linear",
    "start": "start --config=configs/robal.py:dataset=digits",
    "scaling": "scaling --config=configs/at_bsl.py:dataset=cifar10 --batch-size=64,128,256 --num-steps=1,5,10",
}


def read(folder: Path) -> dict[str, list[Record]]:
    """Returns kind -> its records, sorted by file name."""
    records: dict[str, list[Record]] = {}
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
        records.setdefault(record["kind"], []).append(record)
    return records


def number(value: float | None, unit: float = 1) -> str:
    """Formats a number with three digits, or with all digits before the point; None is a dash."""
    if value is None:
        return UNKNOWN
    value /= unit
    digits = max(0, 3 - len(str(int(abs(value))))) if abs(value) >= 1 else 2
    return f"{value:,.{digits}f}"


def times(ratio: Mapping[str, float] | None) -> str:
    """Formats a speed-up as 1.24x (1.20 to 1.31): the ratio of the medians, and the range over the rounds."""
    if not ratio:
        return UNKNOWN
    spread = f" ({ratio['min']:.2f} to {ratio['max']:.2f})" if ratio["min"] < ratio["max"] else ""
    return f"{ratio['median']:.2f}x{spread}"


def rounds(record: Record) -> str:
    """Returns the number of rounds."""
    return str(len({run["round"] for run in record["runs"]}))


def device(record: Record) -> str:
    """Returns "2 cores of AMD EPYC", "NVIDIA H200" or "8 x NVIDIA H200"."""
    peak, machine = record["peak"], record["machine"]
    if peak.get("platform") == "cpu":
        return f"{machine['cores']} core{'s' * (machine['cores'] > 1)} of {machine['cpu']}"
    return f"{peak['devices']} x {peak['device']}" if peak.get("devices", 1) > 1 else peak.get("device", UNKNOWN)


def setup_cells(record: Record) -> list[str]:
    """Returns device, network, and method with its attack steps."""
    config = record["config"]
    return [device(record), config["network"], f"{config['method']}, {config['num_steps']}"]


def precision(config: Mapping[str, Any]) -> str:
    return config["dtype"] + (f", attack {config['attack_dtype']}" * (config["attack_dtype"] != config["dtype"]))


def step(record: Record) -> Iterator[list[str]]:
    """Compares JAX with the PyTorch baseline; memory and compile times are JAX / as released / tuned."""
    entries = [record["summary"].get(name, {}) for name in ("jax", "released", "tuned")]
    share = entries[0].get("share_of_peak")
    row = [*setup_cells(record), precision(record["config"]), str(record["config"]["batch_size"])]
    row += [number(entry.get("ms")) for entry in entries]
    row += [times(record["ratio"].get(name)) for name in ("released", "tuned")]
    row += [number(entries[0].get("images_per_second")), UNKNOWN if share is None else f"{100 * share:.0f} %"]
    for name, unit in (("memory", 2**30), ("compile_cold_seconds", 1), ("compile_warm_seconds", 1)):
        row.append(" / ".join(number(entry.get(name), unit) for entry in entries))
    yield row


def profile(record: Record) -> Iterator[list[str]]:
    """Lists the longest kinds of operations in the first run without an error."""
    run = next((run for run in record["runs"] if "operations" in run), {"operations": []})
    for entry in run["operations"][:MAX_OPERATIONS]:
        share = f"{100 * entry['ms'] / (1e3 * run['seconds']):.0f} %"
        yield [*setup_cells(record), entry["name"], share, number(entry["ms"]), number(entry["count"])]


def attack(record: Record) -> Iterator[list[str]]:
    images = next((str(run["images"]) for run in record["runs"] if "images" in run), UNKNOWN)
    for steps, ratio in record["ratio"].items():
        entries = [record["summary"].get(f"{name} {steps}", {}) for name in ("jax", "torch")]
        row = [*setup_cells(record)[:2], images, f"PGD-{steps}"]
        row += [number(entry.get("ms"), int(steps)) for entry in entries]
        yield [*row, times(ratio), number(entries[0].get("images_per_second"))]


def autoattack(record: Record) -> Iterator[list[str]]:
    """Compares AutoAttack; robust accuracy, evaluations per image and compile time are JAX / PyTorch."""
    for names, ratio in record["ratio"].items():
        series = [f"{framework} {names}" for framework in ("jax", "torch")]
        entries = [record["summary"].get(name, {}) for name in series]
        runs = [next((r for r in record["runs"] if r["series"] == name and "robust" in r), None) for name in series]
        images = next((run["images"] for run in runs if run), None)
        network = record["config"]["network"] + ("" if record["trained"] else ", untrained")
        row = [device(record), network, UNKNOWN if images is None else f"{images:,}"]
        row += ["standard" if names == STANDARD else names.replace("+", ", ")]
        row += [number(entry.get("ms"), 1e3) for entry in entries] + [times(ratio)]
        agree = "" if "error" not in record["agreement"].get(names, {}) else " (differ)"
        robust = [run and 100 * list(run["accuracy"].values())[-1] for run in runs]
        row.append(" / ".join(UNKNOWN if share is None else f"{share:.2f}" for share in robust) + agree)
        official = record.get("official", {}).get(names)
        row.append(UNKNOWN if official is None else f"{100 * sum(official) / len(official):.2f}")
        for kind in (0, 1):
            per_image = [run and sum(count[kind] for count in run["evaluations"].values()) / images for run in runs]
            row.append(" / ".join(map(number, per_image)))
        yield [*row, " / ".join(number(entry.get("compile_cold_seconds")) for entry in entries)]


def libraries(record: Record) -> Iterator[list[str]]:
    """Compares libraries, a row for each; the time of lt_adv is relative to that of the row."""
    for series, entry in record["summary"].items():
        name, attack, norm = series.split()
        run = next((r for r in record["runs"] if r["series"] == series and "ms" in r), None)
        library = LIBRARIES[name]
        version = record["versions"].get(library.package)
        title = library.title.replace(",", f" {version},", 1) if "," in library.title else f"{library.title} {version}"
        network = record["config"]["network"] + ("" if record["trained"] else ", untrained")
        shown = f"PGD-{record['num_steps']}" if attack == "pgd" else attack
        row = [device(record), f"{NORMS[norm]} {shown}", title if version else library.title, network]
        row += [f"{run['images']:,}" if run else UNKNOWN, number(entry.get("ms"), 1e3)]
        row.append(times(record["ratio"].get(series)))
        agree = "" if "error" not in record["agreement"].get(series, {}) else " (differs)"
        robust = run["accuracy"].get(attack) if run else None
        row.append(UNKNOWN if robust is None else f"{100 * robust:.2f}{agree}")
        counts = run["evaluations"][attack] if run else (None, None)
        row += [number(None if count is None else count / run["images"]) for count in counts]
        yield [*row, number(entry.get("compile_cold_seconds"))]


def data(record: Record) -> Iterator[list[str]]:
    entries = record["summary"]
    row = [device(record), record["config"]["dataset"], str(record["config"]["batch_size"])]
    row.append(number(entries.get("pipeline", {}).get("images_per_second")))
    yield row + [number(entries.get(f"load {name}", {}).get("seconds")) for name in ("cold", "warm")]


def start(record: Record) -> Iterator[list[str]]:
    entries = (record["summary"].get(name, {}) for name in ("cold", "warm"))
    yield [*setup_cells(record), *(number(entry.get("seconds")) for entry in entries)]


def scaling(record: Record) -> Iterator[list[str]]:
    for name, entry in record["summary"].items():
        row = [*setup_cells(record)[:2], record["config"]["method"], name.replace("_", " ")]
        row += [number(entry.get("ms")), number(entry.get("images_per_second"))]
        yield [*row, number(entry.get("flops_per_second"), 1e9)]


TABLES: Mapping[str, tuple[Callable[[Record], Iterator[list[str]]], list[str]]] = {
    "step": (
        step,
        ["Device", "Network", "Method, attack steps", "Precision", "Batch", "JAX, ms", "PyTorch as released, ms"]
        + ["PyTorch tuned, ms", "Speed-up over released", "Speed-up over tuned", "JAX, images/s", "Share of peak"]
        + ["Peak memory, GiB", "Compile, s", "Compile with cache, s", "Rounds"],
    ),
    "profile": (
        profile,
        ["Device", "Network", "Method, attack steps", "Operation", "Share", "ms per step, of all threads", "Times"],
    ),
    "data": (
        data,
        ["Device", "Images", "Batch", "Draw, gather, augment: images/s", "Load, s", "Load once decoded, s", "Rounds"],
    ),
    "attack": (
        attack,
        ["Device", "Network", "Batch", "Attack", "JAX, ms per attack step", "PyTorch eager, ms", "Speed-up"]
        + ["JAX, images/s", "Rounds"],
    ),
    "autoattack": (
        autoattack,
        ["Device", "Network", "Images", "Attacks", "JAX, s", "PyTorch eager, s", "Speed-up", "Robust accuracy, %"]
        + ["Official", "Forward passes per image", "Gradients per image", "Compile, s", "Rounds"],
    ),
    "libraries": (
        libraries,
        ["Device", "Attack", "Library", "Network", "Images", "Seconds", "Time of lt_adv / library"]
        + ["Robust accuracy, %", "Forward passes per image", "Gradients per image", "Compile, s", "Rounds"],
    ),
    "start": (
        start,
        ["Device", "Network", "Method, attack steps", "Command to first step, s", "With a filled compile cache, s"]
        + ["Rounds"],
    ),
    "scaling": (
        scaling,
        ["Device", "Network", "Method", "Changed", "ms per step", "Images/s", "GFLOP/s", "Rounds"],
    ),
}


def table(kind: str, records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Returns (head, rows) of all records of one kind, a row or more for each."""
    rows_of, head = TABLES[kind]
    rows = [row + [rounds(record)] * (head[-1] == "Rounds") for record in records for row in rows_of(record)]
    return head, rows
