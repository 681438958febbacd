"""Arithmetic on the runs of a record: medians, spread, rates, ratios. No measurement happens here."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Runs = Sequence[Mapping[str, Any]]


def series(runs: Runs) -> dict[str, dict[str, Any]]:
    """Per series, over its runs: the median of their medians in ms, with the lowest and highest of these; the compile
    time of the first run, and of the later ones that found it in the cache; the median of peak memory; the error.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(run["series"] for run in runs):
        own = [run for run in runs if run["series"] == name]
        good = [run for run in own if "error" not in run]
        failed = [run["error"] for run in own if "error" in run]
        entry = found[name] = {"error": failed[0]} if failed else {}
        if any("ms" in run for run in good):
            entry |= spread("ms", [statistics.median(run["ms"]) for run in good])
            entry["memory"] = statistics.median(run["memory"] for run in good)
            compiling = {run["round"]: run["compile_seconds"] for run in good}
            entry["compile_cold_seconds"] = compiling.pop(0, None)
            entry["compile_warm_seconds"] = statistics.median(compiling.values()) if compiling else None
        elif good:
            entry |= spread("seconds", [run["seconds"] for run in good])
    return found


def spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """{"ms": median, "ms_min", "ms_max"}"""
    return {name: statistics.median(values), f"{name}_min": min(values), f"{name}_max": max(values)}


def rates(entry: dict[str, Any], images: int, flops: float | None, peak: float | None) -> None:
    """Adds images/s, and with `flops` per image the model FLOP/s and their share of `peak` FLOP/s, where known."""
    if "ms" not in entry:
        return
    entry["images_per_second"] = images / (entry["ms"] / 1e3)
    if flops:
        entry["flops_per_second"] = entry["images_per_second"] * flops
        if peak:
            entry["share_of_peak"] = entry["flops_per_second"] / peak


def ratio(runs: Runs, slower: str, faster: str) -> dict[str, float] | None:
    """How many times faster: {"median": ratio of the medians over rounds, "min" and "max" of the ratios by round}.

    None where the two were not measured in the same round.
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
    """Of the first round that has both series: how many images are robust in both, and in one of them alone.

    With an "error" where these two differ by more than three standard deviations of a fair coin: each image that the
    two attacks disagree about is as likely to be on either side if they are equally strong.
    """
    robust: dict[str, dict[int, np.ndarray]] = {torch: {}, jax: {}}
    for run in runs:
        if run["series"] in robust and "robust" in run:
            bits = np.frombuffer(bytes.fromhex(run["robust"]), np.uint8)
            robust[run["series"]][run["round"]] = np.unpackbits(bits, count=run["images"]).astype(bool)
    both = sorted(robust[torch].keys() & robust[jax].keys())
    if not both:
        return {}
    theirs, ours = (robust[name][both[0]] for name in (torch, jax))
    found = {"both": theirs & ours, "jax": ours & ~theirs, "torch": theirs & ~ours}
    counts: dict[str, Any] = {name: int(mask.sum()) for name, mask in found.items()}
    if abs(counts["jax"] - counts["torch"]) > 3 * (counts["jax"] + counts["torch"]) ** 0.5:
        shares = " and ".join(f"{100 * mask.mean():.2f} %" for mask in (ours, theirs))
        counts["error"] = f"robust accuracies of JAX and PyTorch, {shares}, differ by more than noise"
    return counts


def peak(record: Mapping[str, Any]) -> float | None:
    """FLOP/s of a matrix product in the dtype of the network, the faster of two if the attack has another; None where
    unmeasured."""
    rates = record["peak"].get("matmul_flops_per_second", {})
    found = [rates.get(record["config"][name]) for name in ("dtype", "attack_dtype")]
    return None if None in found else max(found)


def errors(record: Mapping[str, Any]) -> list[str]:
    """Everything that failed, a line each, as "what: why"."""
    parts = {"benchmark": record} | {name: record[name] for name in ("peak", "flops") if name in record}
    parts |= {f"flops of {name}": entry for name, entry in record.get("flops_of", {}).items()}
    parts |= {f"agreement on {name}": entry for name, entry in record.get("agreement", {}).items()}
    parts |= record["summary"]
    return [f"{name}: {entry['error']}" for name, entry in parts.items() if "error" in entry]
