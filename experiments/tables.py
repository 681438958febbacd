"""The tables of the README, from the docstrings of configs/ and the reports under experiments/results/.

    python -m experiments.tables            write them between their markers
    python -m experiments.tables --check    exit 1 if they are out of date

A result is one file experiments/results/<study>/<config>-seed<n>-<part>.json with the entries `report` (a report.json),
`command`, `machine` and `commit`; the part "full" is the whole test set, any other a fixed class-balanced subset. What
`experiments.study` makes of its results is table.json beside them. Those of speed are
experiments/results/benchmark/<name>.json, as `experiments.benchmark` writes them.
"""

import argparse
import ast
import json
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from experiments.benchmark import tables as speed
from experiments.study import tables as study_tables

ROOT = Path(__file__).parents[1]
README, CONFIGS, RESULTS = ROOT / "README.md", ROOT / "configs", ROOT / "experiments" / "results"
FULL, SUBSET, NOT_YET = "full", "subset", "not measured yet"
GROUPS = ("head", "body", "tail")
JPEG_ROWS = {"robal": "RoBal-N", "at_bsl": "AT-BSL", "at": "AT"}
CONDITIONS = {"clean": "clean", "fgsm": "FGSM", "pgd20": "PGD-20", "pgd100": "PGD-100", "mim20": "MIM-20"}
CONDITIONS |= {"cw20": "CW-20", "lsa": "LSA", "worst": "worst case"}

Results = Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]  # (config, part) -> one result per seed


def fields(path: Path) -> dict[str, str]:
    """The claim of a config: {"title", "Paper", "Command", "Expected", ...} of its docstring, each on one line."""
    title, _, rest = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")
    found, name = {"title": title.rstrip(".")}, "title"
    for line in rest.splitlines():
        if start := re.match(r"(\w+) {2,}(.*)", line):
            name, line = start[1], start[2]
        found[name] = f"{found.get(name, '')} {line.strip()}".strip()
    return found


def read(folder: Path) -> Results:
    """The results of one study; of many seeds in the order of the seeds."""
    found: dict[tuple[str, str], list] = {}
    for path in sorted(folder.glob("*-seed*-*.json")):
        config, _, part = re.fullmatch(r"(.+)-seed(\d+)-(.+)", path.stem).groups()  # type: ignore[union-attr]
        found.setdefault((config, part), []).append(json.loads(path.read_text()))
    return found


def figure(results: Sequence[Mapping[str, Any]], metric: str) -> str:
    """Per cent: the mean over seeds, and half their range where there are several; "" for a metric that is absent."""
    found = [result["report"]["metrics"].get(metric) for result in results]
    values = [100 * value for value in found if value is not None]
    if not values:
        return ""
    spread = f" ± {(max(values) - min(values)) / 2:.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    rule = [":--" if i < left else "--:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (head, rule, *rows))


def index(configs: Path = CONFIGS, results: Path = RESULTS) -> str:
    """A row per config: what it claims, what was measured, at which commit."""
    studies = [read(folder) for folder in sorted(results.glob("*/"))]
    rows = []
    for path in sorted(configs.glob("*.py")):
        if path.stem in ("__init__", "common"):
            continue
        claim = fields(path)
        seen = [study.get((path.stem, FULL)) or study.get((path.stem, SUBSET)) for study in studies]
        known = [runs for runs in seen if runs and "validation" not in runs[0]["report"]["header"]["subset"]]
        measured = [claim["Measured"]] if "Measured" in claim else []
        measured += [measurement(runs) for runs in known]
        commits = {run["commit"][:9] for runs in known for run in runs if run.get("commit")}
        row = [f"[`{path.stem}`](configs/{path.name})", f"{claim['title']}. {claim['Paper']}", claim["Expected"]]
        rows.append([*row, "; ".join(measured) or NOT_YET, " ".join(sorted(commits)) or "–"])
    return table(["Config", "Paper and row", "Expected (published)", "Measured", "Commit"], rows, left=5)


def measurement(runs: Sequence[Mapping[str, Any]]) -> str:
    """One line about the runs of a config, which says where it is of a part of the test set."""
    header = runs[0]["report"]["header"]
    accuracies = ", ".join(f"{CONDITIONS[c]} {figure(runs, f'eval/{c}/accuracy')}" for c in ("clean", "pgd20"))
    number = f"{len(runs)} seed{'s' * (len(runs) > 1)}"
    if "subset" in header["subset"]:
        number += f", {header['images']} test images"
    return f"{header['dataset']}, {network(header)}, {header['epochs']} epochs, {number}: {accuracies}"


def network(header: Mapping[str, Any]) -> str:
    """wide_resnet-10-1, head linear, float32 -> WRN-10-1"""
    return header["model"].partition(",")[0].replace("wide_resnet", "WRN")


def jpeg_rows(results: Path = RESULTS) -> str:
    """RoBal-N, AT-BSL and AT at the same budget: the whole test set, then the subset with all attacks."""
    found = read(results / "jpeg_rows")
    if not found:
        return f"CIFAR-10 (JPEG copy): {NOT_YET}."
    parts = sorted({part for _, part in found}, key=lambda part: part != FULL)
    blocks = [text for part in parts for text in _part(found, part)]
    pictures = {t: f"jpeg_rows/plots-{c}-{FULL}/accuracy_by_class.png" for c, t in JPEG_ROWS.items()}
    pictures = {title: path for title, path in pictures.items() if (results / path).exists()}
    if pictures:
        shown = [f"![Accuracy by class, {title}](experiments/results/{path})" for title, path in pictures.items()]
        blocks.append(table(list(pictures), [shown], left=len(pictures)))
    return "\n\n".join(blocks)


def _part(found: Results, part: str) -> list[str]:
    """What was measured, in words, and the table."""
    titles = JPEG_ROWS | {config: config for config, _ in found if config not in JPEG_ROWS}
    rows = {title: found[config, part] for config, title in titles.items() if (config, part) in found}
    report = next(iter(rows.values()))[0]["report"]
    header = report["header"]
    conditions = [c for c in CONDITIONS if c in report["conditions"]]
    columns = {CONDITIONS[c]: f"eval/{c}/accuracy" for c in conditions}
    if part == FULL:
        columns.pop(CONDITIONS["worst"], None)  # of PGD-20 alone
        shown = [c for c in conditions if c != "worst"]
        columns |= {f"{CONDITIONS[c]} {group}": f"eval/{c}/accuracy_{group}" for c in shown for group in GROUPS}
    body = [[title, str(len(runs)), *(figure(runs, m) for m in columns.values())] for title, runs in rows.items()]
    missing = [title for title in titles.values() if title not in rows]
    eps = header["attacks"]["pgd20"]["eps"]
    text = f"{header['dataset']}; {network(header)}, {header['epochs']} epochs, eps {eps!r} = {255 * eps:.6g}/255; "
    text += f"{header['images']} test images ({header['subset']}); {header['device']}, jax {header['jax_version']}"
    text += f"; not measured yet: {', '.join(missing)}." if missing else "."
    return [text, table(["", "Seeds", *columns], body)]


def precision(results: Path = RESULTS) -> str:
    """Balanced accuracies of `experiments.precision`: mean over seeds, half their range, per precision."""
    head = ["Device", "Config", "Precision", "Seeds", "clean", "PGD-20", "PGD-20 tail"]
    rows = []
    for path in sorted((results / "precision").glob("*.json")):
        record = json.loads(path.read_text())
        for name in dict.fromkeys(run["precision"] for run in record["runs"]):
            runs = [{"report": run} for run in record["runs"] if run["precision"] == name]
            row = [record["header"]["device"], path.stem, name, str(len(runs))]
            rows.append([*row, *(figure(runs, metric) for metric in runs[0]["report"]["metrics"])])
    return (
        table(head, rows, left=3) if rows else f"Precision: {NOT_YET}; `python -m experiments.precision` measures it."
    )


def study(results: Path = RESULTS) -> str:
    """Every study of `experiments.study`: all images and the tail as tables, and its pictures."""
    blocks = []
    for path in sorted(results.glob("*/table.json")):
        made = json.loads(path.read_text())
        blocks.append(f"**{made['study']}.** {study_tables.sentence(made)}")
        parts = study_tables.slices(made)
        for caption in ("All images", "Tail"):
            if caption in parts:
                head, rows = parts[caption]
                blocks.append(table([caption, *head[1:]], rows))
        if made["failed"]:
            blocks.append("Failed: " + "; ".join(f"{run}: {reason}" for run, reason in made["failed"].items()) + ".")
        pictures = [f"experiments/results/{p.relative_to(results)}" for p in sorted(path.parent.glob("plots/*.png"))]
        blocks += [f"![{Path(picture).stem.replace('_', ' ')}]({picture})" for picture in pictures]
    command = "python -m experiments.study --preset=cpu --config.data.path=<folder of images>"
    return "\n\n".join(blocks) or f"Study: {NOT_YET}; `{command}` measures it."


def benchmark(kind: str, results: Path = RESULTS) -> str:
    """What `experiments.benchmark <kind>` measured, a row or more per file."""
    found = speed.read(results / "benchmark").get(kind)
    if not found:
        return f"`{kind}`: {NOT_YET}; `python -m experiments.benchmark {speed.COMMANDS[kind]}` measures it."
    head, rows = speed.TABLES[kind](found)
    return table(head, rows, left=3)


SPEED = {f"benchmark_{kind}": partial(benchmark, kind) for kind in speed.TABLES}
TABLES: Mapping[str, Callable[[], str]] = {
    "index": index,
    "jpeg_rows": jpeg_rows,
    "study": study,
    "precision": precision,
    **SPEED,
}


def rendered(text: str, tables: Mapping[str, Callable[[], str]] = TABLES) -> str:
    """`text` with the tables between <!-- table NAME --> and <!-- end NAME -->; ValueError without these markers."""
    for name, make in tables.items():
        start, end = f"<!-- table {name} -->", f"<!-- end {name} -->"
        before, opened, rest = text.partition(start)
        _, closed, after = rest.partition(end)
        if not (opened and closed):
            raise ValueError(f"The README has no {start} ... {end}.")
        text = f"{before}{start}\n{make()}\n{end}{after}"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 if the README is out of date")
    check = parser.parse_args().check
    old = README.read_text()
    new = rendered(old)
    if check and old != new:
        print("The tables of README.md are out of date: python -m experiments.tables", file=sys.stderr)
        return 1
    if not check:
        README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
