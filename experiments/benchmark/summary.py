"""Statistics over the runs of a record: medians, spread, rates, ratios."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Runs = Sequence[Mapping[str, Any]]


def series(runs: Runs) -> dict[str, dict[str, Any]]:
    """Returns the summary of each series over its runs.

    "ms" is the median of the runs' medians, "ms_min" and "ms_max" are their extremes, "memory" is the median of peak
    memory. "compile_cold_seconds" is the compile time of the first round, "compile_warm_seconds" the median over later
    rounds, which load from the cache. "error" is the first error.
    """
    summaries: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(run["series"] for run in runs):
        of_series = [run for run in runs if run["series"] == name]
        good = [run for run in of_series if "error" not in run]
        failed = [run["error"] for run in of_series if "error" in run]
        entry = summaries[name] = {"error": failed[0]} if failed else {}
        if any("ms" in run for run in good):
            entry |= spread("ms", [statistics.median(run["ms"]) for run in good])
            entry["memory"] = statistics.median(run["memory"] for run in good)
            compiling = {run["round"]: run["compile_seconds"] for run in good}
            entry["compile_cold_seconds"] = compiling.pop(0, None)
            entry["compile_warm_seconds"] = statistics.median(compiling.values()) if compiling else None
        elif good:
            entry |= spread("seconds", [run["seconds"] for run in good])
    return summaries


def spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """Returns {"ms": median, "ms_min", "ms_max"} for the name "ms"."""
    return {name: statistics.median(values), f"{name}_min": min(values), f"{name}_max": max(values)}


def add_rates(entry: dict[str, Any], images: int, flops: float | None, peak: float | None) -> None:
    """Adds images/s to `entry`; with `flops` per image also the model FLOP/s, and their share of `peak` FLOP/s."""
    if "ms" not in entry:
        return
    entry["images_per_second"] = images / (entry["ms"] / 1e3)
    if flops:
        entry["flops_per_second"] = entry["images_per_second"] * flops
        if peak:
            entry["share_of_peak"] = entry["flops_per_second"] / peak


def ratio(runs: Runs, slower: str, faster: str) -> dict[str, float] | None:
    """Returns the speed-up {"median": ratio of the medians over rounds, "min", "max": extremes of the ratios by round}.

    None if no round has both series.
    """
    medians: dict[str, dict[int, float]] = {slower: {}, faster: {}}
    for run in runs:
        if run["series"] in medians and "ms" in run:
            medians[run["series"]][run["round"]] = statistics.median(run["ms"])
    both = sorted(medians[slower].keys() & medians[faster].keys())
    if not both:
        return None
    by_round = [medians[slower][number] / medians[faster][number] for number in both]
    of_medians = statistics.median(medians[slower].values()) / statistics.median(medians[faster].values())
    return {"median": of_medians, "min": min(by_round), "max": max(by_round)}


def agreement(runs: Runs, torch: str, jax: str) -> dict[str, Any]:
    """Returns how many images are robust in "both", only in "jax" and only in "torch", in the first common round.

    Equally strong attacks leave an image on which they disagree robust with equal probability. "error" is set where
    the two counts differ by more than three standard deviations of that coin.
    """
    robust: dict[str, dict[int, np.ndarray]] = {torch: {}, jax: {}}
    for run in runs:
        if run["series"] in robust and "robust" in run:
            bits = np.frombuffer(bytes.fromhex(run["robust"]), np.uint8)
            robust[run["series"]][run["round"]] = np.unpackbits(bits, count=run["images"]).astype(bool)
    both = sorted(robust[torch].keys() & robust[jax].keys())
    if not both:
        return {}
    in_torch, in_jax = (robust[name][both[0]] for name in (torch, jax))
    masks = {"both": in_torch & in_jax, "jax": in_jax & ~in_torch, "torch": in_torch & ~in_jax}
    counts: dict[str, Any] = {name: int(mask.sum()) for name, mask in masks.items()}
    if abs(counts["jax"] - counts["torch"]) > 3 * (counts["jax"] + counts["torch"]) ** 0.5:
        shares = " and ".join(f"{100 * mask.mean():.2f} %" for mask in (in_jax, in_torch))
        counts["error"] = f"robust accuracies of JAX and PyTorch, {shares}, differ by more than noise"
    return counts


def peak(record: Mapping[str, Any]) -> float | None:
    """Returns the measured peak FLOP/s in the dtype of the network, or in that of the attack if it is faster.

    None if one of them was not measured.
    """
    rates = record["peak"].get("matmul_flops_per_second", {})
    peaks = [rates.get(record["config"][name]) for name in ("dtype", "attack_dtype")]
    return None if None in peaks else max(peaks)


def errors(record: Mapping[str, Any]) -> list[str]:
    """Returns one line "measurement: reason" for everything that failed."""
    parts = {"benchmark": record} | {name: record[name] for name in ("peak", "flops") if name in record}
    parts |= {f"flops of {name}": entry for name, entry in record.get("flops_of", {}).items()}
    parts |= {f"agreement on {name}": entry for name, entry in record.get("agreement", {}).items()}
    parts |= record["summary"]
    return [f"{name}: {entry['error']}" for name, entry in parts.items() if "error" in entry]
