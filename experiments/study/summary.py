"""Summarises the results of a study as plain data, for tables and plots."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.study import findings, published, sweep
from experiments.study.outcomes import Outcomes
from experiments.study.rows import ROWS

Results = Mapping[str, Sequence[Mapping[str, Any]]]  # row -> a result per seed


def summarise(
    results: Results,
    expected: Mapping[str, str],
    failed: Mapping[str, str],
    *,
    scales: Results | None = None,
    autoattack: Results | None = None,
    verdict: Results | None = None,
) -> dict[str, Any]:
    """Returns the summary of a study.

    Args:
        results: of the main evaluation.
        expected: config -> its published numbers in words.
        failed: job -> reason.
        scales: results of PGD-20 on rescaled logits.
        autoattack: results of AutoAttack, on fewer images.
        verdict: results of the comparison with a baseline.

    Returns:
        {"about": common facts, "rows": row -> its figures, "findings", "rank_correlations", "failed"}. Accuracies and
        errors are in [0, 1]; accuracies by class are means over the seeds.
    """
    scales, autoattack, verdict = scales or {}, autoattack or {}, verdict or {}
    about = common_facts(results)
    if autoattack:
        about["autoattack_images"] = max(report["header"]["images"] for report in _reports(autoattack))
        about["autoattack_seeds"] = max(map(len, autoattack.values()))
    if verdict:
        masking = next(_reports(verdict))["reliability"]
        baseline = Path(masking["baseline_run"]).name.rpartition("-seed")[0]
        about["judged_images"] = masking["protocol"]["images"]
        about["baseline"] = ROWS[baseline].title if baseline in ROWS else baseline
    rows = {}
    for name, runs in results.items():
        row, reports = ROWS[name], [run["report"] for run in runs]
        of_autoattack = [
            {metric: value for metric, value in run["report"]["metrics"].items() if "/autoattack/" in metric}
            for run in autoattack.get(name, [])  # the main evaluation has the other metrics, on more images
        ]
        rows[name] = {
            "title": row.title,
            "config": row.config,
            "varies": row.varies,
            "evaluates": row.base if row.evaluates else None,
            "seeds": [run["seed"] for run in runs],
            "figures": figures([report["metrics"] for report in reports]) | figures(of_autoattack),
            "training_seconds": spread([run["training_seconds"] for run in runs]),
            "published": expected.get(row.config, "") if row.published else "",
            "commits": sorted({run["commit"] for run in runs if run["commit"]}),
            "warnings": sorted({line for report in reports for line in report["warnings"]}),
            "classes": classes(reports),
            "verdict": verdict[name][0]["report"]["reliability"]["verdict"] if name in verdict else None,
            "scales": accuracy_by_scale(scales[name][0]["report"]) if name in scales else [],
        }
    return {
        "about": about,
        "rows": rows,
        "findings": findings.test(outcomes(results), class_groups(results), outcomes(autoattack)),
        "rank_correlations": published.rank_correlations(rows),
        "failed": dict(failed),
    }


def outcomes(results: Results) -> dict[str, list[Outcomes]]:
    """Returns row -> the outcomes of each run, without rows of which a result has none, as those of old versions."""
    return {
        name: [Outcomes.from_json(run["outcomes"]) for run in runs]
        for name, runs in results.items()
        if all("outcomes" in run for run in runs)
    }


def class_groups(results: Results) -> dict[str, list[int]]:
    """Returns group -> its classes, of the first report: they are those of the data set."""
    for report in _reports(results):
        number = {entry["name"]: entry["class"] for entry in report["classes"]}
        return {name: [number[c] for c in names] for name, names in report["groups"].items() if name != "definition"}
    return {}


def _reports(results: Results) -> Iterator[Mapping[str, Any]]:
    return (run["report"] for runs in results.values() for run in runs)


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Returns mean, values, and the sample standard deviation, None for a single value."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "deviation": deviation, "values": list(values)}


def figures(metrics: Sequence[Mapping[str, float | None]]) -> dict[str, dict[str, Any]]:
    """Returns each metric over the seeds; a metric that a seed lacks is left out."""
    names = [name for name in (metrics[0] if metrics else ()) if all(m.get(name) is not None for m in metrics)]
    return {name: spread([m[name] for m in metrics]) for name in names}  # type: ignore[misc]


def classes(reports: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns name, training images and accuracies of each class, the most frequent first."""
    return [
        {
            "name": entries[0]["name"],
            "class_count": entries[0]["class_count"],
            "accuracy": {
                condition: statistics.fmean([row["accuracy"][condition] for row in entries])
                for condition in entries[0]["accuracy"]
                if all(row["accuracy"].get(condition) is not None for row in entries)
            },
        }
        for entries in zip(*(report["classes"] for report in reports), strict=True)
    ]


def accuracy_by_scale(report: Mapping[str, Any]) -> list[list[float]]:
    """Returns [scale of the logits, accuracy under PGD on them], ascending."""
    metrics = {scale: f"eval/{sweep.attack_name(scale)}/accuracy" for scale in sweep.SCALES}
    return [[scale, report["metrics"][name]] for scale, name in metrics.items() if name in report["metrics"]]


def network(header: Mapping[str, Any]) -> str:
    """Returns the short name of a network: WRN-10-1 for "wide_resnet-10-1, head linear, float32"."""
    return header["model"].partition(",")[0].replace("wide_resnet", "WRN")


def common_facts(results: Results) -> dict[str, Any]:
    """Returns the most frequent value of each fact in the headers, and which facts differ between rows."""
    headers = [report["header"] for report in _reports(results)]
    if not headers:
        return {}
    names = ("dataset", "epochs", "images", "subset", "device", "jax_version")
    facts: dict[str, list[Any]] = {name: [header[name] for header in headers] for name in names}
    facts["network"] = [network(header) for header in headers]
    facts["eps"] = [h["attacks"]["pgd20"]["eps"] for h in headers if "pgd20" in h["attacks"]]
    return {name: statistics.mode(values) for name, values in facts.items() if values} | {
        "different": sorted(name for name, values in facts.items() if len(set(values)) > 1)
    }
