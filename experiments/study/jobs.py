"""Rows to processes of lt_adv.main: what is run, in which order, and what is kept of it."""

import dataclasses
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.benchmark import record
from experiments.study import sweep
from experiments.study.rows import ROWS, with_bases

SWEEP, AUTOATTACK, VERDICT = "scales", "autoattack", "verdict"  # beside the main evaluation, of the first seed


@dataclasses.dataclass(frozen=True)
class Study:
    """What was asked for."""

    name: str
    rows: tuple[str, ...]
    seeds: tuple[int, ...]
    dataset: str
    epochs: int | None
    overrides: tuple[str, ...]
    scales: tuple[float, ...]
    autoattack: int  # images per class, 0 without
    baseline: str  # the row that verdicts compare with, "" without
    workdirs: Path
    out: Path

    @property
    def part(self) -> str:
        """Of the main evaluation: "full", the whole split that is evaluated, or "subset"."""
        given = [o.partition("=")[2] for o in self.overrides if o.startswith("--config.eval.subset_per_class=")]
        return "subset" if given and given[-1] != "0" else "full"

    @property
    def folder(self) -> Path:
        return self.out / self.name

    def jobs(self) -> list["Job"]:
        """Every job, after those that it needs; all rows of the first seed come first, and it alone is swept."""
        found = []
        for seed in self.seeds:
            for row in with_bases([self.baseline, *self.rows] if self.baseline else self.rows):
                found.append(Job(row, seed, self.part))
                if self.scales and seed == self.seeds[0]:
                    found.append(Job(row, seed, SWEEP))
                if self.autoattack and seed == self.seeds[0]:
                    found.append(Job(row, seed, AUTOATTACK))
                if self.baseline not in ("", row) and seed == self.seeds[0]:
                    found.append(Job(row, seed, VERDICT))
        return found


@dataclasses.dataclass(frozen=True)
class Job:
    row: str
    seed: int
    part: str

    def __str__(self) -> str:
        return f"{self.row}-seed{self.seed}-{self.part}"

    @property
    def trains(self) -> bool:
        return not self.beside and not ROWS[self.row].evaluates

    @property
    def beside(self) -> bool:
        """Whether it looks at a network that the main part has looked at."""
        return self.part in (SWEEP, AUTOATTACK, VERDICT)

    @property
    def trained(self) -> str:
        """The row in whose working directory this is done."""
        row = ROWS[self.row]
        return str(row.base) if row.evaluates else self.row

    @property
    def needs(self) -> str | None:
        """The row whose network must be there before."""
        return ROWS[self.row].base if self.trains else self.trained

    @property
    def report(self) -> str:
        """The name of the report in that working directory; "" for the main one."""
        return "-".join([self.row] * ROWS[self.row].evaluates + [self.part] * self.beside)


def command(study: Study, job: Job, workdirs: Path | None = None) -> list[str]:
    """The very command of a job, after the interpreter's name; the overrides of a row come last, and win."""
    workdirs = study.workdirs if workdirs is None else workdirs
    row = ROWS[job.row]
    arguments = [f"dataset={study.dataset}", *filter(None, [row.arguments])]
    if study.epochs and row.share:
        arguments.append(f"epochs={max(1, round(row.share * study.epochs))}")
    config, own = f"configs/{row.config}.py:{','.join(arguments)}", list(row.overrides)
    common = list(study.overrides)
    if job.part == SWEEP:
        config = f"experiments/study/sweep.py:{config}"
        own.append(f"--config.eval.only={tuple(map(sweep.name, study.scales))}".replace(" ", ""))
    if job.part == AUTOATTACK:
        config = f"experiments/study/autoattack.py:{config}"
        own += ["--config.eval.only=('autoattack',)", f"--config.eval.subset_per_class={study.autoattack}"]
    if job.part == VERDICT:
        baseline = _workdir(workdirs, study.baseline, job.seed)
        own += ["--config.eval.only=('pgd20',)", f"--config.eval.baseline={baseline}"]
    if job.part in (AUTOATTACK, VERDICT):
        common = [o for o in common if not o.startswith("--config.eval.only=")]  # given twice, a tuple is added to
    if not job.trains:
        own += ["--mode=eval", f"--config.eval.report={job.report}"]
    given = [f"--config={config}", f"--workdir={_workdir(workdirs, job.trained, job.seed)}"]
    given += [f"--config.seed={job.seed}", *common, *own]
    base = str(_workdir(workdirs, row.base, job.seed)) if row.base else ""
    return ["-m", "lt_adv.main", *(part.replace("{base}", base) for part in given)]


def shown(study: Study, job: Job) -> str:
    """The command as it is recorded: with no place of this machine in it."""
    return record.portable(shlex.join(["python", *command(study, job, Path("workdirs") / study.name)]))


def _workdir(workdirs: Path, row: str, seed: int) -> Path:
    return workdirs / f"{row}-seed{seed}"


def result_path(study: Study, job: Job) -> Path:
    return study.folder / f"{job}.json"


def failure_path(study: Study, job: Job) -> Path:
    return study.folder / "failed" / f"{job}.txt"


def finished(study: Study, job: Job) -> bool:
    """Whether this very command has a result; a damaged one is none, and is made again."""
    path = result_path(study, job)
    try:
        return path.exists() and json.loads(path.read_text())["command"] == shown(study, job)
    except (ValueError, KeyError, TypeError):
        return False


def due(study: Study) -> list[Job]:
    """The jobs that are left; a finished one too where its network is needed and is not there, as in a fresh clone."""
    found: list[Job] = []
    needed: set[tuple[str | None, int]] = set()
    for job in reversed(study.jobs()):
        there = (_workdir(study.workdirs, job.row, job.seed) / "checkpoints").exists()
        if not finished(study, job) or job.trains and (job.row, job.seed) in needed and not there:
            found.append(job)
            needed |= {(job.needs, job.seed), (study.baseline if job.part == VERDICT else None, job.seed)}
    return found[::-1]


def run(study: Study) -> Iterator[tuple[Job, str | None]]:
    """Run what is left, one after another: (job, None), or (job, the line that says why there is no result)."""
    broken: set[tuple[str | None, int]] = set()
    for job in due(study):
        blocked = (job.needs, job.seed) in broken
        if blocked and job.beside:
            continue  # the row itself has said it
        reason = f"needs {job.needs}, which failed" if blocked else launch(study, job)
        failure = failure_path(study, job)
        if reason is None:
            failure.unlink(missing_ok=True)
        else:
            failure.parent.mkdir(parents=True, exist_ok=True)
            failure.write_text(reason + "\n")
            if job.trains:
                broken.add((job.row, job.seed))
        yield job, reason


def launch(study: Study, job: Job) -> str | None:
    """Run a job to its end and keep its result; the line that says why there is none, or None."""
    workdir = _workdir(study.workdirs, job.trained, job.seed)
    report = workdir / "reports" / job.report / "report.json" if job.report else workdir / "report.json"
    before, start = _written(report), time.monotonic()
    code, last = execute(command(study, job), study.workdirs / f"{job}.log")
    if code:
        return record.failure(code, last)
    if _written(report) == before:
        return f"it ended without a report: {record.portable(last.strip() or 'no word')}"
    summary = json.loads(report.read_text())
    if "reliability" in summary:
        summary["reliability"]["baseline_run"] = record.portable(summary["reliability"]["baseline_run"])
    record.write(
        result_path(study, job),
        {
            "row": job.row,
            "seed": job.seed,
            "command": shown(study, job),
            "machine": {**record.machine(), "device": summary["header"]["device"]},
            "commit": summary["context"].get("commit"),
            "seconds": time.monotonic() - start,
            "training_seconds": training_seconds(study, job.trained, job.seed),
            "report": summary,
        },
    )
    return None


def execute(given: list[str], log: Path) -> tuple[int, str]:
    """(exit code, last words) of a process that writes to `log`; it is told to save if this one is stopped."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as out:
        process = subprocess.Popen([sys.executable, *given], stdout=out, stderr=subprocess.PIPE, text=True)
        try:
            errors = process.communicate()[1]
        except KeyboardInterrupt:
            process.terminate()
            process.communicate()
            raise
    said = errors if process.returncode else log.read_text()
    with log.open("a") as out:
        out.write(errors)
    return process.returncode, (said.strip().splitlines() or [""])[-1]


def _written(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


def training_seconds(study: Study, row: str, seed: int) -> float:
    """Of all stages, and of the network that training began from."""
    path = _workdir(study.workdirs, row, seed) / "timing.jsonl"
    own, base = json.loads(path.read_text().splitlines()[-1])["seconds"], ROWS[row].base
    return own + (training_seconds(study, base, seed) if base else 0.0)


def results(study: Study, part: str) -> dict[str, list[dict[str, Any]]]:
    """What this budget gave so far, in any call: row -> its results in the order of the seeds; rows as in ROWS.

    Results of other commands under the same name (other epochs, say) are left out: a table has one budget.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for row in ROWS:
        stems = (re.fullmatch(rf"{row}-seed(\d+)-{part}", path.stem) for path in study.folder.glob(f"{row}-seed*.json"))
        seeds = (int(match[1]) for match in stems if match)
        jobs = [Job(row, seed, part) for seed in sorted(seeds)]
        kept = [json.loads(result_path(study, job).read_text()) for job in jobs if finished(study, job)]
        if kept:
            found[row] = kept
    return found


def failures(study: Study) -> dict[str, str]:
    """What has failed and was not made good since."""
    return {path.stem: path.read_text().strip() for path in sorted((study.folder / "failed").glob("*.txt"))}
