"""Summarises the results of a study as plain data, for tables and plots."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.study import sweep
from experiments.study.rows import ROWS

Results = Mapping[str, Sequence[Mapping[str, Any]]]  # row -> a result per seed


def summarise(
    results: Results,
    sweeps: Results,
    failed: Mapping[str, str],
    published: Mapping[str, str],
    autoattack: Results | None = None,
    verdicts: Results | None = None,
) -> dict:
    """Returns the summary of a study.

    Args:
        results: of the main evaluation.
        sweeps: of PGD-20 on rescaled logits.
        failed: job -> reason.
        published: config -> its published numbers in words.
        autoattack: of AutoAttack, on fewer images.
        verdicts: on the gain over a baseline.

    Returns:
        {"about": common facts, "rows": row -> its figures, "failed"}. Accuracies and errors are in [0, 1]; accuracies
        by class are means over the seeds.
    """
    autoattack, verdicts = autoattack or {}, verdicts or {}
    return {
        "about": common_facts(results) | autoattack_images(autoattack) | verdict_facts(verdicts),
        "rows": {
            name: {
                "title": ROWS[name].title,
                "config": ROWS[name].config,
                "varies": ROWS[name].varies,
                "evaluates": ROWS[name].base if ROWS[name].evaluates else None,
                "seeds": [run["seed"] for run in runs],
                "figures": figures([run["report"]["metrics"] for run in runs])
                | figures([autoattack_metrics(run["report"]["metrics"]) for run in autoattack.get(name, [])]),
                "training_seconds": spread([run["training_seconds"] for run in runs]),
                "published": published.get(ROWS[name].config, "") if ROWS[name].published else "",
                "commits": sorted({run["commit"] for run in runs if run["commit"]}),
                "warnings": sorted({line for run in runs for line in run["report"]["warnings"]}),
                "classes": classes([run["report"] for run in runs]),
                "verdict": verdicts[name][0]["report"]["reliability"]["verdict"] if name in verdicts else None,
                "scales": scales(sweeps[name][0]["report"]) if name in sweeps else [],
            }
            for name, runs in results.items()
        },
        "failed": dict(failed),
    }


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Returns mean, values, and the sample standard deviation, None for a single value."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "deviation": deviation, "values": list(values)}


def figures(metrics: Sequence[Mapping[str, float | None]]) -> dict[str, dict[str, Any]]:
    """Returns each metric over the seeds; a metric that a seed lacks is left out."""
    names = [name for name in (metrics[0] if metrics else ()) if all(m.get(name) is not None for m in metrics)]
    return {name: spread([m[name] for m in metrics]) for name in names}  # type: ignore[misc]


def autoattack_metrics(metrics: Mapping[str, float | None]) -> dict[str, float | None]:
    """Returns the metrics of AutoAttack; the main evaluation has the others, on more images."""
    return {name: value for name, value in metrics.items() if name.startswith("eval/autoattack/")}


def autoattack_images(results: Results) -> dict[str, Any]:
    """Returns the number of images of AutoAttack, if it was a separate part."""
    counts = {run["report"]["header"]["images"] for runs in results.values() for run in runs}
    return {"autoattack_images": max(counts)} if counts else {}


def verdict_facts(verdicts: Results) -> dict[str, Any]:
    """Returns the number of images behind the verdicts, and the title of the baseline."""
    reports = [run["report"]["reliability"] for runs in verdicts.values() for run in runs]
    if not reports:
        return {}
    name = Path(reports[0]["baseline_run"]).name.rpartition("-seed")[0]
    return {"judged_images": reports[0]["protocol"]["images"], "baseline": ROWS[name].title if name in ROWS else name}


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


def scales(report: Mapping[str, Any]) -> list[list[float]]:
    """Returns [scale of the logits, accuracy under PGD on them], ascending."""
    names = {
        attack["logit_scale"]: name for name, attack in report["header"]["attacks"].items() if is_scale_attack(name)
    }
    return [[scale, report["metrics"][f"eval/{names[scale]}/accuracy"]] for scale in sorted(names)]


def is_scale_attack(name: str) -> bool:
    return name in map(sweep.attack_name, sweep.SCALES)


def network(header: Mapping[str, Any]) -> str:
    """Returns the short name of a network: WRN-10-1 for "wide_resnet-10-1, head linear, float32"."""
    return header["model"].partition(",")[0].replace("wide_resnet", "WRN")


def common_facts(results: Results) -> dict[str, Any]:
    """Returns the most frequent value of each fact in the headers, and which facts differ between rows."""
    headers = [run["report"]["header"] for runs in results.values() for run in runs]
    if not headers:
        return {}
    names = ("dataset", "epochs", "images", "subset", "device", "jax_version")
    facts: dict[str, list[Any]] = {name: [header[name] for header in headers] for name in names}
    facts["network"] = [network(header) for header in headers]
    facts["eps"] = [h["attacks"]["pgd20"]["eps"] for h in headers if "pgd20" in h["attacks"]]
    return {name: statistics.mode(values) for name, values in facts.items() if values} | {
        "different": sorted(name for name, values in facts.items() if len(set(values)) > 1)
    }
