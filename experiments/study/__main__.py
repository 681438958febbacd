"""Many methods, one budget, one table.

    python -m experiments.study --rows=at,robal --seeds=0,1 --dataset=digits [--epochs=3] [--config.x.y=z ...]
    python -m experiments.study --preset=cpu --config.data.path=<folder with train/<class>/*.jpg, test/<class>/*.jpg>

--rows=...         rows of experiments/study/rows.py, or all of the preset [all]; a row that another one needs is run
                   before it
--seeds=0,1        [0, or the preset's]
--dataset=NAME     as in dataset= of the configs [cifar10, or the preset's]
--epochs=10        of every row, fine-tuning apart [each config's own, or the preset's]
--preset=cpu       a budget: WRN-10-1, images of 16 x 16, 10 epochs, 1,000 test images
--preset=ablation  the same budget for our own choices, and 1,000 validation images: the test set is not seen
--config.x.y=z     another value for an entry of all configs
--scales=0.1,1,10  scales of the logits at which PGD-20 is swept on the first seed, or none [all of sweep.py]
--autoattack=30    images of each class that AutoAttack is run on, for the first seed, or none [none]
--baseline=at      the row that the others are held against, for the first seed: is a gain over it real? [none]
--name=NAME        of the study [that of the preset or data set]
--workdirs=PATH    where the runs are [workdirs/<name>]
--out=PATH         where the results are [experiments/results]

Each run is a process of lt_adv.main that writes to <workdirs>/<row>-seed<n>-<part>.log. The same command goes on where
it was stopped; what is finished is not run again. <out>/<name> gets a result per run, table.md, table.json and plots.
What fails is recorded with its reason, the rest goes on, and the exit code is 1 at the end; 2, after one line, for
arguments that cannot be meant.
"""

import argparse
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import tables as readme
from experiments.benchmark import record
from experiments.options import Parser, name, one_of, positive, some
from experiments.study import findings, jobs, summary, sweep, tables
from experiments.study.rows import PRESETS, ROWS, with_bases
from lt_adv.cli import flags
from lt_adv.evaluation.report import table
from lt_adv.main import one_line
from lt_adv.runtime import atomic_io, registry

RESULTS = readme.RESULTS


def seed(text: str) -> int:
    if not re.fullmatch(r"\d{1,9}", text):
        raise argparse.ArgumentTypeError(f"must be whole numbers from 0, not {text!r}")
    return int(text)


def scales(text: str) -> list[float]:
    return [] if text == "none" else some(one_of("scale", sweep.SCALES, float))(text)


def images(text: str) -> int:
    return 0 if text == "none" else positive(int)(text)


def parse(argv: Sequence[str]) -> jobs.Study:
    """What the command line asks for; ValueError of one line for what is not clear."""
    parser = Parser(prog="python -m experiments.study", allow_abbrev=False, add_help=False)
    parser.add_argument("--rows", type=some(one_of("row", [*ROWS, "all"])), default=["all"])
    parser.add_argument("--seeds", type=some(seed))
    parser.add_argument("--dataset", type=name)
    parser.add_argument("--epochs", type=positive(int))
    parser.add_argument("--preset", type=one_of("preset", PRESETS))
    parser.add_argument("--scales", type=scales, default=list(sweep.SCALES))
    parser.add_argument("--autoattack", type=images, default=0)
    parser.add_argument("--baseline", type=one_of("row", ROWS))
    parser.add_argument("--name", type=name)
    parser.add_argument("--workdirs", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options, overrides = parser.parse_known_args(argv)
    for given in overrides:
        if not re.match(flags.OVERRIDE, given):
            known = [f"--{option}" for option in vars(options)]
            raise registry.unknown("option", given.partition("=")[0], [*known, "--config.x.y=z"])
    preset = PRESETS.get(options.preset)
    everything = preset and preset.rows or tuple(row for row in ROWS if not ROWS[row].varies)
    title = options.name or options.preset or options.dataset or "cifar10"
    return jobs.Study(
        name=title,
        rows=tuple(everything if "all" in options.rows else options.rows),
        seeds=tuple(options.seeds or (preset.seeds if preset else (0,))),
        dataset=options.dataset or (preset.dataset if preset else "cifar10"),
        epochs=options.epochs or (preset.epochs if preset else None),
        overrides=(*(preset.overrides if preset else ()), *overrides),
        scales=tuple(sorted(options.scales)),
        autoattack=options.autoattack,
        baseline=options.baseline or "",
        workdirs=options.workdirs or Path("workdirs") / title,
        out=options.out,
    )


def check(study: jobs.Study) -> None:
    """ValueError where not one of the rows can be what is asked for; a row that cannot alone fails alone."""
    import jax

    from lt_adv.cli import schema

    jax.config.update("jax_platforms", "cpu")  # of this process: devices belong to the runs
    refused = []
    for row in with_bases(study.rows):
        try:
            schema.values(flags.parse(jobs.command(study, jobs.Job(row, study.seeds[0], study.part))[1:]).config)
            return
        except ValueError as error:
            refused.append(f"row {row}: {error}")
    raise ValueError(refused[0])


def tabulate(study: jobs.Study) -> dict[str, Any]:
    """Write table.json and table.md of all that there is; returns the summary."""
    claims = {path.stem: readme.fields(path).get("Expected", "") for path in readme.CONFIGS.glob("*.py")}
    main, *beside = (jobs.results(study, part) for part in (study.part, jobs.SWEEP, jobs.AUTOATTACK, jobs.VERDICT))
    sweeps, autoattack, verdicts = beside
    failed = jobs.failures(study)
    made = {"study": study.name, **summary.summarise(main, sweeps, failed, claims, autoattack, verdicts)}
    record.write(study.folder / "table.json", made)
    pictures = [f"plots/{path.name}" for path in sorted((study.folder / "plots").glob("*.png"))]
    found = [tables.all_images(made), *tables.slices(made), *tables.verdicts(made), *findings.tables(made)]
    text = tables.page(made, found, pictures)
    atomic_io.write_atomically(study.folder / "table.md", f"# Study {study.name}\n\n{text}\n")
    return made


def draw(study: jobs.Study, made: dict[str, Any]) -> None:
    from experiments.study import plots  # imports jax
    from lt_adv.evaluation.plots import png

    folder = study.folder / "plots"
    folder.mkdir(parents=True, exist_ok=True)
    for file, figure in plots.draw(made).items():
        (folder / f"{file}.png").write_bytes(png(figure))


def main(argv: Sequence[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    try:
        study = parse(argv)
        check(study)
    except ValueError as error:
        print("Error:", one_line(error), file=sys.stderr)
        return 2
    try:
        for folder in (study.workdirs, study.folder):  # now, and not after the first run
            folder.mkdir(parents=True, exist_ok=True)
        return run(study)
    except OSError as error:
        print("Error:", one_line(error), file=sys.stderr)
        return 2


def run(study: jobs.Study) -> int:
    """Run what is left, and show all that there is; the exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stopped as by Ctrl-C: what is there is shown
    code, left = 0, len(jobs.due(study))
    print(f"{left} of {len(study.jobs())} runs are left.", flush=True)
    try:
        for job, reason in jobs.run(study):
            print(f"{job}: {reason or 'done'}", flush=True)
            code = code or int(reason is not None)
            tabulate(study)
    except KeyboardInterrupt:
        print("Stopped: the same command goes on.", file=sys.stderr)
        code = 130
    made = tabulate(study)
    if made["rows"]:
        draw(study, made)
        tabulate(study)  # with the pictures
    print(table(*tables.all_images(made)))
    print(study.folder / "table.md")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
