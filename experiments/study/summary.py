"""What the results of a study say: plain data, from which tables and plots are made."""

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
    """`published`: what each config expects. Beside the results: `autoattack`, on fewer images, and `verdicts` on a
    gain over a baseline. Accuracies and errors are in [0, 1]; curves are means over the seeds."""
    autoattack, verdicts = autoattack or {}, verdicts or {}
    return {
        "about": about(results) | autoattacked(autoattack) | judged(verdicts),
        "rows": {
            name: {
                "title": ROWS[name].title,
                "config": ROWS[name].config,
                "varies": ROWS[name].varies,
                "evaluates": ROWS[name].base if ROWS[name].evaluates else None,
                "seeds": [run["seed"] for run in runs],
                "figures": figures([run["report"]["metrics"] for run in runs])
                | figures([under_autoattack(run["report"]["metrics"]) for run in autoattack.get(name, [])]),
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
    """The mean, and the deviation of a sample where there is more than one."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "deviation": deviation, "values": list(values)}


def figures(metrics: Sequence[Mapping[str, float | None]]) -> dict[str, dict[str, Any]]:
    """Each metric over the seeds; one that a seed lacks is left out."""
    names = [name for name in (metrics[0] if metrics else ()) if all(found.get(name) is not None for found in metrics)]
    return {name: spread([found[name] for found in metrics]) for name in names}  # type: ignore[misc]


def under_autoattack(metrics: Mapping[str, float | None]) -> dict[str, float | None]:
    """Those of AutoAttack alone: the others stand for more images."""
    return {name: value for name, value in metrics.items() if name.startswith("eval/autoattack/")}


def autoattacked(results: Results) -> dict[str, Any]:
    """On how many images AutoAttack was run, where it was not a part of the main evaluation."""
    counts = {run["report"]["header"]["images"] for runs in results.values() for run in runs}
    return {"autoattack_images": max(counts)} if counts else {}


def judged(verdicts: Results) -> dict[str, Any]:
    """On how many images gains were judged, and which row is the baseline."""
    found = [run["report"]["reliability"] for runs in verdicts.values() for run in runs]
    if not found:
        return {}
    name = Path(found[0]["baseline_run"]).name.rpartition("-seed")[0]
    return {"judged_images": found[0]["protocol"]["images"], "baseline": ROWS[name].title if name in ROWS else name}


def classes(reports: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Name, training images and accuracies of each class, from the most frequent one."""
    return [
        {
            "name": seen[0]["name"],
            "class_count": seen[0]["class_count"],
            "accuracy": {
                condition: statistics.fmean([row["accuracy"][condition] for row in seen])
                for condition in seen[0]["accuracy"]
                if all(row["accuracy"].get(condition) is not None for row in seen)
            },
        }
        for seen in zip(*(report["classes"] for report in reports), strict=True)
    ]


def scales(report: Mapping[str, Any]) -> list[list[float]]:
    """[scale of the logits, accuracy under PGD on it], ascending."""
    names = {attack["logit_scale"]: name for name, attack in report["header"]["attacks"].items() if swept(name)}
    return [[scale, report["metrics"][f"eval/{names[scale]}/accuracy"]] for scale in sorted(names)]


def swept(name: str) -> bool:
    return name in map(sweep.name, sweep.SCALES)


def network(header: Mapping[str, Any]) -> str:
    """wide_resnet-10-1, head linear, float32 -> WRN-10-1"""
    return header["model"].partition(",")[0].replace("wide_resnet", "WRN")


def about(results: Results) -> dict[str, Any]:
    """What the rows have in common: of each fact what most of them say."""
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
