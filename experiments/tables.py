"""The tables of README.md and docs/, made from configs/ and the records under experiments/results/.

    python -m experiments.tables            write every table between its markers
    python -m experiments.tables --check    exit with 1 if a page is out of date

`PAGES` lists the tables of each page. A table stands between `<!-- table NAME -->` and `<!-- end NAME -->`; the rest of
a page is written by hand.

A result is one file experiments/results/<study>/<row or config>-seed<n>-<part>.json with the entries `report` (a
report.json), `command`, `machine`, `commit`, and `row` if it belongs to a row of `experiments.study`. The part "full"
is the full split, "scales" a sweep of logit scales, any other part a fixed class-balanced subset; the split is that of
the report's header ("test" if it has none). `experiments.study` summarises its results in table.json beside them.
Speed is recorded in benchmark/<name>.json by `experiments.benchmark`, compiled programs in compile/ by
`experiments.accelerators`, fault injection in faults/.
"""

import argparse
import ast
import dataclasses
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from experiments import accelerators
from experiments.benchmark import tables as speed
from experiments.study import findings
from experiments.study import tables as study_tables
from experiments.study.rows import ROWS
from experiments.study.summary import network, spread
from experiments.study.tables import GROUPS
from lt_adv import methods
from lt_adv.cli import entries
from lt_adv.evaluation.metrics import title
from lt_adv.evaluation.records import WORST
from lt_adv.evaluation.report import table
from lt_adv.methods import addons

ROOT = Path(__file__).parents[1]
CONFIGS, RESULTS = ROOT / "configs", ROOT / "experiments" / "results"
FULL, SUBSET, ABLATION, NOT_YET = "full", "subset", "ablation", "not measured yet"
VARIANTS = (ABLATION, "precision")  # beginnings of the names of studies that compare variants of a row
NO_NUMBER = "no published number under this protocol that we could read"
JPEG_ROWS = {"robal": "RoBal-N", "at_bsl": "AT-BSL", "at": "AT"}
FAULT_COLUMNS = (
    "Point",
    "What happens",
    "Faults",
    "Failed",
    "Fell back to an earlier checkpoint",
    "Steps lost at most",
)
HEADLINE = ("at", "at_bsl", "reat", "robal", "self_distillation", "lt_adv")  # rows of the study in README.md

HEADLINE_STUDIES = ("comparison", "cpu")

Runs = Sequence[Mapping[str, Any]]  # a result per seed
Results = Mapping[tuple[str, str], Runs]  # by (row or config, part)


def fields(path: Path) -> dict[str, str]:
    """The docstring of a config: {"title", "Paper", "Command", "Expected", ...}, each on one line."""
    title, _, rest = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")
    entries, name = {"title": title.rstrip(".")}, "title"
    for line in rest.splitlines():
        if start := re.match(r"(\w+) {2,}(.*)", line):
            name, line = start[1], start[2]
        entries[name] = f"{entries.get(name, '')} {line.strip()}".strip()
    return entries


def read(folder: Path) -> Results:
    """The results of one study, in the order of the seeds."""
    results: dict[tuple[str, str], list] = {}
    for path in sorted(folder.glob("*-seed*-*.json")):
        config, _, part = re.fullmatch(r"(.+)-seed(\d+)-(.+)", path.stem).groups()  # type: ignore[union-attr]
        results.setdefault((config, part), []).append(json.loads(path.read_text()))
    return results


def figure(results: Sequence[Mapping[str, Any]], metric: str) -> str:
    """Per cent: mean over the seeds, and their standard deviation if there are several; "" for an absent metric."""
    values = [result["report"]["metrics"].get(metric) for result in results]
    values = [value for value in values if value is not None]
    return study_tables.percent(spread(values) if values else None)


def index(configs: Path = CONFIGS) -> str:
    """A row per config: the method, the paper and the published numbers."""
    rows = []
    for path in config_files(configs):
        claim = fields(path)
        expected = "–" if claim["Expected"] == NO_NUMBER else claim["Expected"]
        rows.append([f"[`{path.stem}`](configs/{path.name})", claim["title"], claim["Paper"], expected])
    return table(["Config", "Method", "Paper", "Published or re-run"], rows, left=4)


def hyper_parameters() -> str:
    """A row per hyper-parameter of a method or an add-on: its default and the values that are allowed."""
    shared = {field.name for field in dataclasses.fields(methods.Method)} | {"inner"}
    classes = {name: methods.method_class(name) for name in methods.names()}
    classes |= {name: methods.method_class(name, addons.__name__) for name in addons.names()}
    rows = []
    for name, cls in classes.items():
        for field in (field for field in dataclasses.fields(cls) if field.name not in shared):
            rule = {"paper": field.default, "released_code": field.default, "interval": "", "choices": ()}
            rule |= field.metadata
            default = f"`{rule['paper']}`"
            if rule["released_code"] != rule["paper"]:
                default += f"; `{rule['released_code']}` under `released_code`"
            allowed = rule["interval"] or ", ".join(f"`{choice}`" for choice in rule["choices"])
            rows.append([f"`{name}`", f"`{field.name}`", default, allowed])
    return table(["Method or add-on", "Hyper-parameter", "Default", "Range"], rows, left=4)


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def config_files(configs: Path = CONFIGS) -> list[Path]:
    return [path for path in sorted(configs.glob("*.py")) if path.stem not in ("__init__", "common")]


def measured(configs: Path = CONFIGS, results: Path = RESULTS) -> str:
    """A row per measurement on test images, in the order of the configs."""
    measurements, rows = on_test_images(results), []
    for path in config_files(configs):
        if path.stem not in measurements:
            rows.append([f"`{path.stem}`", "", NOT_YET, *[""] * 5])
        for name, runs in measurements.get(path.stem, []):
            header, commits = runs[0]["report"]["header"], {run["commit"][:9] for run in runs if run.get("commit")}
            setting = f"{header['dataset']}; {network(header)}, {count(header['epochs'], 'epoch')}"
            numbers = [f"{header['images']:,}", str(len(runs))]
            numbers += [figure(runs, f"eval/{condition}/accuracy") for condition in ("clean", "pgd20")]
            rows.append([f"`{path.stem}`", name, setting, *numbers, " ".join(sorted(commits)) or "–"])
    head = ["Config", "Row", "Setting", "Test images", "Seeds", "Clean", "PGD-20", "Commit"]
    return table(head, rows, left=3)


def on_test_images(results: Path) -> dict[str, list[tuple[str, Runs]]]:
    """Config -> (title, runs) of each of its rows: on all test images if there is that result, else on the subset.

    Ablations and results on validation images are left out. Results older than the rows of the study are named by their
    config alone.
    """
    measurements: dict[str, list[tuple[str, Runs]]] = {}
    for folder in sorted(path for path in results.glob("*/") if not path.name.startswith(VARIANTS)):
        by_part = read(folder)
        for name in dict.fromkeys(name for name, _ in by_part):
            runs = by_part.get((name, FULL)) or by_part.get((name, SUBSET))
            if not runs or runs[0]["report"]["header"].get("split", "test") != "test":
                continue
            row = ROWS[runs[0]["row"]] if "row" in runs[0] else None
            if not (row and row.varies):
                title = row.title if row else JPEG_ROWS.get(name, name)
                measurements.setdefault(row.config if row else name, []).append((title, runs))
    return measurements


def jpeg_rows(results: Path = RESULTS) -> str:
    """RoBal-N, AT-BSL and AT at the same budget: the full test set, then the subset with all attacks."""
    runs = read(results / "jpeg_rows")
    if not runs:
        return f"CIFAR-10 (JPEG copy): {NOT_YET}."
    parts = sorted({part for _, part in runs}, key=lambda part: part != FULL)
    blocks = [text for part in parts for text in _part(runs, part)]
    pictures = {name: f"jpeg_rows/plots-{c}-{FULL}/accuracy_by_class.png" for c, name in JPEG_ROWS.items()}
    pictures = {name: path for name, path in pictures.items() if (results / path).exists()}
    if pictures:
        shown = [f"![Accuracy by class, {name}](experiments/results/{path})" for name, path in pictures.items()]
        blocks.append(table(list(pictures), [shown], left=len(pictures)))
    return "\n\n".join(blocks)


def _part(runs: Results, part: str) -> list[str]:
    """What was measured, in words, and the table."""
    titles = JPEG_ROWS | {config: config for config, _ in runs if config not in JPEG_ROWS}
    rows = {name: runs[config, part] for config, name in titles.items() if (config, part) in runs}
    report = next(iter(rows.values()))[0]["report"]
    header, conditions = report["header"], study_tables.ordered(report["conditions"])
    if part == FULL:
        conditions = [c for c in conditions if c != WORST]  # it is that of PGD-20 alone
    columns = {title(c): f"eval/{c}/accuracy" for c in conditions}
    if part == FULL:
        columns |= {f"{title(c)}, {group}": f"eval/{c}/accuracy_{group}" for c in conditions for group in GROUPS}
    body = [[name, str(len(runs)), *(figure(runs, m) for m in columns.values())] for name, runs in rows.items()]
    missing = [name for name in titles.values() if name not in rows]
    eps = header["attacks"]["pgd20"]["eps"]
    text = f"{header['dataset']}; {network(header)}, {header['epochs']} epochs, eps {eps!r} = {255 * eps:.6g}/255; "
    text += f"{header['images']} test images ({header['subset']}); {header['device']}, jax {header['jax_version']}"
    text += f"; not measured yet: {', '.join(missing)}." if missing else "."
    return [text, table(["", "Seeds", *columns], body)]


def precision(results: Path = RESULTS) -> str:
    """The study `precision`, one row per precision: mean and standard deviation over the seeds."""
    path = results / "precision" / "table.json"
    if not path.exists():
        return f"Precision: {NOT_YET}; `python -m experiments.study --preset=precision --scales=none` measures it."
    summary = json.loads(path.read_text())
    metrics = {f"{title(c)}, balanced": f"eval/{c}/balanced_accuracy" for c in ("clean", "pgd20")}
    head, rows = study_tables.accuracies(summary, "Precision", metrics | {"PGD-20, tail": "eval/pgd20/accuracy_tail"})
    for cells, row in zip(rows, summary["rows"].values(), strict=True):
        cells.insert(1, str(len(row["seeds"])))
    head.insert(1, "Seeds")
    return f"{study_tables.sentence(summary)}\n\n{table(head, rows)}"


def study(results: Path = RESULTS) -> str:
    """Every study of `experiments.study` that compares methods: all images, the groups, and its pictures."""
    blocks = []
    for path in sorted(path for path in results.glob("*/table.json") if not path.parent.name.startswith(VARIANTS)):
        summary = json.loads(path.read_text())
        pictures = [f"experiments/results/{p.relative_to(results)}" for p in sorted(path.parent.glob("plots/*.png"))]
        tables = [study_tables.all_images(summary, published=False), study_tables.groups(summary)]
        tables += [*study_tables.masking_reasons(summary), *study_tables.published(summary)]
        tables += findings.tables(summary)
        blocks.append(f"**{summary['study']}.** {study_tables.page(summary, tables, pictures)}")
    return "\n\n".join(blocks) or _unmeasured("Study", "cpu")


def headline(results: Path = RESULTS) -> str:
    """The rows `HEADLINE` of the first study that has them all: all images, and the tail in the worst case."""
    paths = [path for path in (results / study / "table.json" for study in HEADLINE_STUDIES) if path.exists()]
    summaries = [json.loads(path.read_text()) for path in paths]
    summary = next((s for s in summaries if set(HEADLINE) <= s["rows"].keys()), None)
    if summary is None:
        return _unmeasured("Study", HEADLINE_STUDIES[0])
    rows = summary["rows"]
    columns = {title(c): f"eval/{c}/accuracy" for c in ("clean", "pgd20", "autoattack", WORST)}
    columns |= {f"{title(WORST)}, {group}": f"eval/{WORST}/accuracy_{group}" for group in ("head", "tail")}
    head, body = study_tables.accuracies({"rows": {name: rows[name] for name in HEADLINE}}, "", columns)
    attacks = [title(c) for c in study_tables.conditions(summary) if c not in ("clean", "autoattack", WORST)]
    # Without the facts of other columns and rows.
    about = {name: fact for name, fact in summary["about"].items() if name != "baseline"} | {"different": []}
    text = study_tables.sentence({"about": about})
    text += f" The worst case is over {', '.join(attacks[:-1])} and {attacks[-1]}."
    return f"{text}\n\n{table(head, body)}"


def configuration() -> str:
    """Every entry that all configs have, by section: its default for CIFAR-10, type and range, and meaning."""
    blocks = []
    for section, group in entries.by_section():
        rows = [[f"`{e.path}`", f"`{entries.format_default(e.default)}`", e.rule.text, e.meaning] for e in group]
        blocks += [f"### {section}"] * bool(section) + [table(["Entry", "Default", "Type", "Meaning"], rows, left=4)]
    return "\n\n".join(blocks)


def ablation(results: Path = RESULTS) -> str:
    """Choices of ours on validation images: every folder ablation*, as a row became what it is in several rounds."""
    blocks = []
    for path in sorted(results.glob(f"{ABLATION}*/table.json")):
        summary = json.loads(path.read_text())
        blocks.append(f"**{path.parent.name}.** {study_tables.page(summary, [study_tables.choices(summary)])}")
    return "\n\n".join(blocks) or _unmeasured("Ablations", ABLATION)


def _unmeasured(what: str, preset: str) -> str:
    command = f"python -m experiments.study --preset={preset} --config.data.path=<folder of images>"
    return f"{what}: {NOT_YET}; `{command}` measures it."


def faults(results: Path = RESULTS) -> str:
    """Fault injection: a sentence for each campaign, and a row per point for those that verify digests."""
    records = [json.loads(path.read_text()) for path in sorted((results / "faults").glob("*.json"))]
    blocks = []
    for record in sorted(records, key=lambda record: not record["digest"]):
        points, machine, ends = record["points"], record["machine"], [run["end"] for run in record["runs"]]
        total, failed = (sum(row[count] for row in points.values()) for count in ("faults", "failed"))
        text = f"{total} faults at {count(len(points), 'point')}, {failed} of them failed; {ends.count('the same')} of "
        text += f"{len(ends)} runs ended like the run without faults ({machine['cores']} cores of {machine['cpu']}, "
        text += f"jax {record['versions']['jax']}, commit {record['commit']})."
        if not record["digest"]:
            text = f"With the digest of checkpoints switched off: {text} A run that diverged fails at each later fault."
            blocks.append(text)
            continue
        rows = []
        for name, row in points.items():
            counts = (row["faults"], row["failed"], row["fell_back"] or None, row["lost"])
            rows.append([f"`{name}`", row["description"], *("" if count is None else str(count) for count in counts)])
        blocks += [text, table(FAULT_COLUMNS, rows, left=2)]
    return "\n\n".join(blocks) or f"Faults: {NOT_YET}; `pytest -m faults --faults=10` measures them."


def compiled(results: Path = RESULTS) -> str:
    """Estimates of `--mode=compile`, a row per network and topology."""
    reports = [json.loads(path.read_text()) for path in (results / "compile").glob("*.json")]
    if not reports:
        return f"Compiled training steps: {NOT_YET}; `python -m experiments.accelerators` measures them."
    order = {network.title: n for n, network in enumerate(accelerators.NETWORKS.values())}
    places = {topology: n for n, topology in enumerate(accelerators.TOPOLOGIES)}
    rows = []
    for report in sorted(reports, key=lambda r: (order[r["title"]], places[r["topology"]])):
        step, devices = report["programs"]["train_step"], report["devices"]
        memory = sum(value for part, value in step["memory"].items() if part != "capacity")
        collectives = sum(c["count"] for c in step["collectives"].values())
        megabytes = sum(c["bytes"] for c in step["collectives"].values()) / 1e6
        rows.append([
            report["title"],
            f"`{report['topology']}`",
            str(report["batch_size_per_device"]),
            f"{step['estimated_ms']:.3g}",
            f"{step['images_per_second'] / devices:,.0f}",
            f"{100 * step['share_of_peak']:.0f} %",
            f"{memory / 2**30:.1f} of {step['memory']['capacity'] / 2**30:.0f}",
            f"{collectives}, {megabytes:.0f} MB" if collectives else "none",
            f"{report['seconds_per_epoch'][0]:.3g}",
            f"{report['hours']:.2g}",
        ])  # fmt: skip
    versions = {name: version for report in reports for name, version in report["versions"].items()}
    head = ["Network", "Topology", "Batch a device", "ms", "Images/s a device", "Of peak", "Memory a device, GiB"]
    head += ["Collectives a step", "s an epoch", "Hours"]
    return f"{', '.join(f'{n} {v}' for n, v in sorted(versions.items()))}.\n\n{table(head, rows, left=2)}"


def benchmark(kind: str, results: Path = RESULTS) -> str:
    """What `experiments.benchmark <kind>` measured, a row or more per file."""
    records = speed.read(results / "benchmark").get(kind)
    if not records:
        return f"`{kind}`: {NOT_YET}; `python -m experiments.benchmark {speed.COMMANDS[kind]}` measures it."
    head, rows = speed.table(kind, records)
    labels, split = WIDE.get(kind, (3, len(head)))
    first = int(len({row[0] for row in rows}) == 1)  # a device that all rows share is named above the table
    blocks = [f"{head[0]}: {rows[0][0]}."] * first
    for part in ([*range(first, split)], [*range(first, labels), *range(split, len(head))]):
        if len(part) > labels - first:
            blocks.append(table([head[i] for i in part], [[row[i] for i in part] for row in rows], left=3 - first))
    return "\n\n".join(blocks)


# Kind of a table that is split in two -> number of columns that name a row, first column of the second part.
WIDE = {"step": (5, 12), "autoattack": (4, 9)}
SPEED = {f"benchmark_{kind}": partial(benchmark, kind) for kind in speed.TABLES}
TABLES: Mapping[str, Callable[[], str]] = {
    "headline": headline,
    "index": index,
    "hyper_parameters": hyper_parameters,
    "measured": measured,
    "configuration": configuration,
    "jpeg_rows": jpeg_rows,
    "study": study,
    "ablation": ablation,
    "precision": precision,
    "faults": faults,
    "compiled": compiled,
    **SPEED,
}
PAGES: Mapping[str, tuple[str, ...]] = {
    "README.md": ("headline",),
    "docs/methods.md": ("index", "hyper_parameters", "measured"),
    "docs/configuration.md": ("configuration",),
    "docs/results.md": ("jpeg_rows", "study", "ablation"),
    "docs/performance.md": (*SPEED, "precision"),
    "docs/reliability.md": ("faults",),
    "docs/accelerators.md": ("compiled",),
}


def rendered(text: str, tables: Mapping[str, Callable[[], str]], prefix: str = "") -> str:
    """`text` with each of `tables` between its markers, and `prefix` before the relative links of these tables.

    Raises:
      ValueError: the markers of a table are missing.
    """
    for name, make in tables.items():
        start, end = f"<!-- table {name} -->", f"<!-- end {name} -->"
        before, opened, rest = text.partition(start)
        _, closed, after = rest.partition(end)
        if not (opened and closed):
            raise ValueError(f"The markers {start} ... {end} are missing.")
        content = re.sub(r"\]\((?!https?:|#)", f"]({prefix}", make())
        text = f"{before}{start}\n{content}\n{end}{after}"
    return text


def page(root: Path, name: str) -> tuple[str, str]:
    """The text of a page as it is and as it should be."""
    text = (root / name).read_text()
    return text, rendered(text, {table: TABLES[table] for table in PAGES[name]}, "../" * name.count("/"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, exit with 1 if a page is out of date")
    check, status = parser.parse_args().check, 0
    for name in PAGES:
        old, new = page(ROOT, name)
        if old == new:
            continue
        if check:
            print(f"The tables of {name} are out of date: run python -m experiments.tables", file=sys.stderr)
            status = 1
        else:
            (ROOT / name).write_text(new)
    return status


if __name__ == "__main__":
    sys.exit(main())
