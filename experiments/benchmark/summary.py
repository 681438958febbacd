"""Statistics over the runs of a record: medians, spread, rates, ratios."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Runs = Sequence[Mapping[str, Any]]


def update(record: dict[str, Any], pairs: Mapping[str, tuple[str, str]], flops: Mapping[str, float]) -> None:
    """Computes the statistics of a record from its runs.

    Args:
        record: gets "summary", "ratio", and "agreement" if its runs list the robust images.
        pairs: label of a ratio -> (series in the numerator, in the denominator), in general the slower one first.
        flops: series -> model FLOPs per image.
    """
    runs = record["runs"]
    record["summary"] = series(runs, flops, peak(record))
    record["ratio"] = {label: ratio(runs, *pair) for label, pair in pairs.items()}
    if any("robust" in run for run in runs):
        record["agreement"] = {label: agreement(runs, *pair) for label, pair in pairs.items()}


def series(runs: Runs, flops: Mapping[str, float], peak: float | None) -> dict[str, dict[str, Any]]:
    """Returns the summary of each series over its runs.

    "ms" is the median of the runs' medians, "ms_min" and "ms_max" are their extremes, "memory" is the median of peak
    memory. "compile_cold_seconds" is the compile time of the first round, "compile_warm_seconds" the median over later
    rounds, which load from the cache. Series with `flops` per image also have the model FLOP/s, and their share of
    `peak` FLOP/s. "error" is the first error.
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
            entry["images_per_second"] = good[0]["images"] / (entry["ms"] / 1e3)
            if name in flops:
                entry["flops_per_second"] = entry["images_per_second"] * flops[name]
                if peak:
                    entry["share_of_peak"] = entry["flops_per_second"] / peak
        elif good:
            entry |= spread("seconds", [run["seconds"] for run in good])
    return summaries


def spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """Returns {"ms": median, "ms_min", "ms_max"} for the name "ms"."""
    return {name: statistics.median(values), f"{name}_min": min(values), f"{name}_max": max(values)}


def by_round(runs: Runs, series: Sequence[str], entry: str) -> list[tuple[Any, ...]]:
    """Returns the values of `entry` in each of `series`, for every round in which all of them have it."""
    values: dict[int, dict[str, Any]] = {}
    for run in runs:
        if entry in run:
            values.setdefault(run["round"], {})[run["series"]] = run[entry]
    return [tuple(of[name] for name in series) for of in values.values() if of.keys() >= set(series)]


def ratio(runs: Runs, slower: str, faster: str) -> dict[str, float] | None:
    """Returns slower / faster {"median": ratio of the medians over rounds, "min", "max": extremes of those by round}.

    None if no round has both series.
    """
    rounds = [tuple(map(statistics.median, pair)) for pair in by_round(runs, (slower, faster), "ms")]
    if not rounds:
        return None
    ratios = [slow / fast for slow, fast in rounds]
    medians = [
        statistics.median(statistics.median(run["ms"]) for run in runs if run["series"] == name and "ms" in run)
        for name in (slower, faster)
    ]
    return {"median": medians[0] / medians[1], "min": min(ratios), "max": max(ratios)}


def agreement(runs: Runs, *series: str) -> dict[str, Any]:
    """Returns how many images are robust in "both" of two series and in one alone, in the first common round.

    A series goes by its first word: "jax" and "torch" for "jax apgd-ce" and "torch apgd-ce".

    Equally strong attacks leave an image on which they disagree robust with equal probability. "error" is set where
    the two counts differ by more than three standard deviations of that coin.
    """
    rounds = by_round(runs, series, "robust")
    if not rounds:
        return {}
    images = next(run["images"] for run in runs if "robust" in run)
    first, second = (
        np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8), count=images).astype(bool) for text in rounds[0]
    )
    names = [name.split()[0] for name in series]
    masks = {"both": first & second, names[0]: first & ~second, names[1]: second & ~first}
    counts: dict[str, Any] = {name: int(mask.sum()) for name, mask in masks.items()}
    if abs(counts[names[0]] - counts[names[1]]) > 3 * (counts[names[0]] + counts[names[1]]) ** 0.5:
        shares = " and ".join(f"{100 * mask.mean():.2f} %" for mask in (first, second))
        counts["error"] = f"robust accuracies of {' and '.join(names)}, {shares}, differ by more than noise"
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
    parts = {"benchmark": record} | {name: record[name] for name in ("peak", "flops", "logits") if name in record}
    parts |= record.get("libraries", {})
    parts |= {f"flops of {name}": entry for name, entry in record.get("flops_of", {}).items()}
    parts |= {f"agreement on {name}": entry for name, entry in record.get("agreement", {}).items()}
    parts |= record["summary"]
    return [f"{name}: {entry['error']}" for name, entry in parts.items() if "error" in entry]
