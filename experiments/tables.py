"""The tables of the README, from the docstrings of configs/ and the reports under experiments/results/.

    python -m experiments.tables            write them between their markers
    python -m experiments.tables --check    exit 1 if they are out of date

A result is one file experiments/results/<study>/<row or config>-seed<n>-<part>.json with the entries `report` (a
report.json), `command`, `machine`, `commit`, and `row` where it is of a row of `experiments.study`. The part "full" is
the whole split, "scales" a sweep, any other a fixed class-balanced subset; the split is that of the report's header
("test" where it has none). What `experiments.study` makes of its results is table.json beside them. Those of speed are
experiments/results/benchmark/<name>.json, as `experiments.benchmark` writes them; those of faults likewise.
"""

import argparse
import ast
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from experiments import fault_tables
from experiments.benchmark import tables as speed
from experiments.study import findings
from experiments.study import tables as study_tables
from experiments.study.rows import ROWS
from experiments.study.summary import network, spread
from experiments.study.tables import GROUPS
from lt_adv.evaluation.metrics import title
from lt_adv.evaluation.records import WORST
from lt_adv.evaluation.report import table

ROOT = Path(__file__).parents[1]
README, CONFIGS, RESULTS = ROOT / "README.md", ROOT / "configs", ROOT / "experiments" / "results"
FULL, SUBSET, ABLATION, NOT_YET = "full", "subset", "ablation", "not measured yet"
JPEG_ROWS = {"robal": "RoBal-N", "at_bsl": "AT-BSL", "at": "AT"}

Runs = Sequence[Mapping[str, Any]]  # a result per seed
Results = Mapping[tuple[str, str], Runs]  # by (row or config, part)


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
    """Per cent: mean over the seeds, and their standard deviation where there are several; "" for an absent metric."""
    found = [result["report"]["metrics"].get(metric) for result in results]
    values = [value for value in found if value is not None]
    return study_tables.percent(spread(values) if values else None)


def index(configs: Path = CONFIGS, results: Path = RESULTS) -> str:
    """A row per config: what it claims, what was measured, at which commit."""
    measured, rows = on_test_images(results), []
    for path in sorted(configs.glob("*.py")):
        if path.stem in ("__init__", "common"):
            continue
        claim, known = fields(path), measured.get(path.stem, [])
        lines = [claim["Measured"]] if "Measured" in claim else []
        lines += [measurement(name, runs) for name, runs in known]
        commits = {run["commit"][:9] for _, runs in known for run in runs if run.get("commit")}
        row = [f"[`{path.stem}`](configs/{path.name})", f"{claim['title']}. {claim['Paper']}", claim["Expected"]]
        rows.append([*row, "<br>".join(lines) or NOT_YET, " ".join(sorted(commits)) or "–"])
    return table(["Config", "Paper and row", "Expected (published)", "Measured", "Commit"], rows, left=5)


def on_test_images(results: Path) -> dict[str, list[tuple[str, Runs]]]:
    """Config -> (title, runs) of each of its rows: of all test images where there is that, else of the subset.

    Ablations are no claim of a config. Results older than the rows of the study are named by their config alone.
    """
    found: dict[str, list[tuple[str, Runs]]] = {}
    for folder in sorted(path for path in results.glob("*/") if not path.name.startswith(ABLATION)):
        measured = read(folder)
        for name in dict.fromkeys(name for name, _ in measured):
            runs = measured.get((name, FULL)) or measured.get((name, SUBSET))
            if not runs or runs[0]["report"]["header"].get("split", "test") != "test":
                continue
            row = ROWS[runs[0]["row"]] if "row" in runs[0] else None
            if not (row and row.varies):
                found.setdefault(row.config if row else name, []).append((row.title if row else "", runs))
    return found


def measurement(name: str, runs: Runs) -> str:
    """One line about the runs of a row, which says where it is of a part of the test set."""
    header = runs[0]["report"]["header"]
    number = f"{len(runs)} seed{'s' * (len(runs) > 1)}"
    if "subset" in header["subset"]:
        number += f", {header['images']} test images"
    text = f"{name}: " * bool(name) + f"{header['dataset']}, {network(header)}, {header['epochs']} epochs, {number}: "
    return text + f"clean {figure(runs, 'eval/clean/accuracy')}, PGD-20 {figure(runs, 'eval/pgd20/accuracy')}"


def jpeg_rows(results: Path = RESULTS) -> str:
    """RoBal-N, AT-BSL and AT at the same budget: the whole test set, then the subset with all attacks."""
    found = read(results / "jpeg_rows")
    if not found:
        return f"CIFAR-10 (JPEG copy): {NOT_YET}."
    parts = sorted({part for _, part in found}, key=lambda part: part != FULL)
    blocks = [text for part in parts for text in _part(found, part)]
    pictures = {name: f"jpeg_rows/plots-{c}-{FULL}/accuracy_by_class.png" for c, name in JPEG_ROWS.items()}
    pictures = {name: path for name, path in pictures.items() if (results / path).exists()}
    if pictures:
        shown = [f"![Accuracy by class, {name}](experiments/results/{path})" for name, path in pictures.items()]
        blocks.append(table(list(pictures), [shown], left=len(pictures)))
    return "\n\n".join(blocks)


def _part(found: Results, part: str) -> list[str]:
    """What was measured, in words, and the table."""
    titles = JPEG_ROWS | {config: config for config, _ in found if config not in JPEG_ROWS}
    rows = {name: found[config, part] for config, name in titles.items() if (config, part) in found}
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
    """Accuracies of `experiments.precision`, one row per precision: mean and standard deviation over the seeds."""
    head = ["Device", "Config", "Precision", "Seeds", "Clean, balanced", "PGD-20, balanced", "PGD-20, tail"]
    rows = []
    for path in sorted((results / "precision").glob("*.json")):
        record = json.loads(path.read_text())
        for name in dict.fromkeys(run["precision"] for run in record["runs"]):
            runs = [{"report": run} for run in record["runs"] if run["precision"] == name]
            row = [record["header"]["device"], path.stem, name, str(len(runs))]
            rows.append([*row, *(figure(runs, metric) for metric in runs[0]["report"]["metrics"])])
    command = "python -m experiments.precision --name=robal-digits --config=configs/robal.py:dataset=digits"
    return table(head, rows, left=3) if rows else f"Precision: {NOT_YET}; `{command}` measures it."


def study(results: Path = RESULTS) -> str:
    """Every study of `experiments.study` but the ablations: all images, the groups, and its pictures."""
    blocks = []
    for path in sorted(path for path in results.glob("*/table.json") if not path.parent.name.startswith(ABLATION)):
        made = json.loads(path.read_text())
        pictures = [f"experiments/results/{p.relative_to(results)}" for p in sorted(path.parent.glob("plots/*.png"))]
        tables = [study_tables.all_images(made, published=False), study_tables.groups(made)]
        tables += [*study_tables.verdicts(made), *findings.tables(made)]
        blocks.append(f"**{made['study']}.** {study_tables.page(made, tables, pictures)}")
    return "\n\n".join(blocks) or _unmeasured("Study", "cpu")


def ablation(results: Path = RESULTS) -> str:
    """Choices of ours on validation images: every folder ablation*, as a row became what it is in several rounds."""
    blocks = []
    for path in sorted(results.glob(f"{ABLATION}*/table.json")):
        made = json.loads(path.read_text())
        blocks.append(f"**{path.parent.name}.** {study_tables.page(made, [study_tables.choices(made)])}")
    return "\n\n".join(blocks) or _unmeasured("Ablations", ABLATION)


def _unmeasured(what: str, preset: str) -> str:
    command = f"python -m experiments.study --preset={preset} --config.data.path=<folder of images>"
    return f"{what}: {NOT_YET}; `{command}` measures it."


def faults(results: Path = RESULTS) -> str:
    """The fault campaign of tests/robustness/test_faults.py."""
    return fault_tables.page(results / "faults")


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
    "ablation": ablation,
    "precision": precision,
    "faults": faults,
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
