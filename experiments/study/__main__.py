"""Trains and evaluates many methods with one budget and tabulates the results.

    python -m experiments.study --rows=at,robal --seeds=0,1 --dataset=digits [--epochs=3] [--config.x.y=z ...]
    python -m experiments.study --preset=cpu --config.data.path=<folder with train/<class>/*.jpg, test/<class>/*.jpg>

--rows=...         rows of experiments/study/rows.py, or all rows of the preset [all]; a row runs after the row that it
                   starts from
--seeds=0,1        [0, or the preset's]
--dataset=NAME     as in dataset= of the configs [cifar10, or the preset's]
--epochs=10        epochs of every row but the fine-tuned ones [those of each config, or of the preset]
--preset=cpu       a budget: WRN-10-1, images of 16 x 16, 10 epochs, 1,000 test images
--preset=comparison  the main methods: WRN-16-2, images of 16 x 16, 30 epochs, two seeds, the full test set
--preset=recipe    candidates for our recipe at that budget, on 1,000 validation images instead of the test set
--preset=ablation  choices that papers leave open at the budget of cpu, on 1,000 validation images
--preset=precision RoBal on digits in float32 and in bfloat16
--config.x.y=z     overrides an entry in all configs
--scales=0.1,1,10  PGD-20 on logits multiplied by these scales, for the first seed, or none [all of sweep.py]
--autoattack=30    images per class for AutoAttack, or none [none]
--baseline=at      checks each gain over this row for gradient masking, for the first seed [none]
--name=NAME        name of the study [that of the preset or data set]
--list             prints which runs are done, running, failed or to do, and runs nothing
--workdirs=PATH    folder of the working directories [workdirs/<name>]
--out=PATH         folder of the results [experiments/results]

Each run is a process of lt_adv.main that logs to <workdirs>/<row>-seed<n>-<part>.log. The same command resumes a
stopped study without repeating finished runs. The same command in several processes, or on several machines that share
the folders, divides the runs among them; the run of a process that was killed is taken over by another one.
<out>/<name> gets one result per run, table.md, table.json and plots. A failure is recorded with its reason, the
remaining runs continue, and the exit code is 1. Invalid arguments give one line and exit code 2.
"""

import argparse
import re
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.benchmark import record
from experiments.options import Parser, name, one_of, positive, run_command, some
from experiments.study import findings, jobs, summary, sweep, tables
from experiments.study.rows import PRESETS, ROWS, Preset, with_bases
from experiments.tables import CONFIGS, RESULTS, fields
from lt_adv.cli import flags
from lt_adv.evaluation.report import table
from lt_adv.runtime import atomic_io


def seed(text: str) -> int:
    if not re.fullmatch(r"\d{1,9}", text):
        raise argparse.ArgumentTypeError(f"must be integers from 0, not {text!r}")
    return int(text)


def scales(text: str) -> list[float]:
    return [] if text == "none" else some(one_of("scale", sweep.SCALES, float))(text)


def images(text: str) -> int:
    return 0 if text == "none" else positive(int)(text)


def parse(argv: Sequence[str]) -> jobs.Study:
    """Returns the study that the command line describes.

    Raises:
        ValueError: one line, for an invalid command line.
    """
    parser = Parser(prog="python -m experiments.study")
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
    parser.add_argument("--list", action="store_true")
    options, overrides = parser.parse_with_config(argv, flags.OVERRIDE)
    preset = PRESETS.get(options.preset, Preset())
    dataset = options.dataset or preset.dataset
    study_name = options.name or options.preset or dataset
    return jobs.Study(
        name=study_name,
        rows=preset.rows if "all" in options.rows else tuple(options.rows),
        seeds=tuple(options.seeds or preset.seeds),
        dataset=dataset,
        epochs=options.epochs or preset.epochs,
        overrides=(*preset.overrides, *overrides),
        scales=tuple(sorted(options.scales)),
        autoattack=options.autoattack,
        baseline=options.baseline or "",
        workdirs=options.workdirs or Path("workdirs") / study_name,
        out=options.out,
    )


def check(study: jobs.Study) -> None:
    """Raises ValueError if no row has a valid config; a single invalid row fails later, when it runs."""
    import jax

    from lt_adv.cli.experiment import Experiment

    jax.config.update("jax_platforms", "cpu")  # leaves the accelerators to the runs
    errors = []
    for row in with_bases(study.rows):
        try:
            Experiment.from_config(
                flags.parse(jobs.command(study, jobs.Job(row, study.seeds[0], study.part))[1:]).config
            )
            return
        except ValueError as error:
            errors.append(f"row {row}: {error}")
    raise ValueError(errors[0])


def tabulate(study: jobs.Study) -> dict[str, Any]:
    """Writes table.json and table.md from all results; returns the summary."""
    expected = {path.stem: fields(path).get("Expected", "") for path in CONFIGS.glob("*.py")}
    results = {part: jobs.results(study, part) for part in (study.part, *jobs.ADDITIONAL)}
    main_results, failed = results.pop(study.part), jobs.failures(study)
    data = {"study": study.name, **summary.summarise(main_results, expected, failed, **results)}
    record.write(study.folder / "table.json", data)
    plot_links = [f"plots/{path.name}" for path in sorted((study.folder / "plots").glob("*.png"))]
    blocks = [tables.all_images(data), *tables.slices(data), *tables.masking_reasons(data)]
    blocks += [*tables.published(data), *findings.tables(data)]
    text = tables.page(data, blocks, plot_links)
    atomic_io.write_atomically(study.folder / "table.md", f"# Study {study.name}\n\n{text}\n")
    return data


def draw(study: jobs.Study, data: dict[str, Any]) -> None:
    """Writes the plots of a summary."""
    from experiments.study import plots  # imports jax
    from lt_adv.evaluation.plots import png

    folder = study.folder / "plots"
    folder.mkdir(parents=True, exist_ok=True)
    for file, figure in plots.draw(data).items():
        (folder / f"{file}.png").write_bytes(png(figure))


def show(study: jobs.Study) -> None:
    """Prints the state of every run."""
    states = jobs.states(study)
    for job, (state, details) in states.items():
        print(f"{state:8} {job}{f' ({details})' if details else ''}")
    counts = Counter(state for state, _ in states.values())
    print(", ".join(f"{counts[state]} {state}" for state in jobs.STATES) + ".")


def run(argv: Sequence[str]) -> int:
    """Runs the remaining jobs and writes tables and plots; returns the exit code."""
    study = parse(argv)
    if "--list" in argv:
        show(study)
        return 0
    check(study)
    for folder in (study.workdirs, study.folder):  # fails before the first run
        folder.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # handled like Ctrl-C
    code, remaining = 0, len(jobs.remaining_jobs(study))
    print(f"{remaining} of {len(study.jobs())} runs to do.", flush=True)
    try:
        for job, reason in jobs.run(study):
            print(f"{job}: {reason or 'done'}", flush=True)
            code = code or int(reason is not None)
            tabulate(study)
    except KeyboardInterrupt:
        print("Stopped: the same command resumes.", file=sys.stderr)
        code = 130
    data = tabulate(study)
    if data["rows"]:
        draw(study, data)
        tabulate(study)  # again, with the plots
    print(table(*tables.all_images(data, published=False)))
    print(study.folder / "table.md")
    return code


def main(argv: Sequence[str]) -> int:
    return run_command(run, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
