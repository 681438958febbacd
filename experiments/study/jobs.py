"""The jobs of a study: one process of lt_adv.main each, their order, and their results."""

import dataclasses
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments.benchmark import record
from experiments.study import locks, sweep
from experiments.study.outcomes import Outcomes
from experiments.study.rows import ROWS, with_bases
from lt_adv.evaluation import records

STATES = ("done", "running", "failed", "to do")
# Additional parts: each evaluates a network again, after the main evaluation.
ADDITIONAL = SWEEP, AUTOATTACK, VERDICT = "scales", "autoattack", "verdict"


@dataclasses.dataclass(frozen=True)
class Study:
    """A study as the command line describes it."""

    name: str
    rows: tuple[str, ...]
    seeds: tuple[int, ...]
    dataset: str
    epochs: int | None
    overrides: tuple[str, ...]
    scales: tuple[float, ...]
    autoattack: int  # images per class; 0 for none
    baseline: str  # the row that verdicts compare with; "" for none
    workdirs: Path
    out: Path

    @property
    def part(self) -> str:
        """The part name of the main evaluation: "full" for the complete split, or "subset"."""
        values = [o.partition("=")[2] for o in self.overrides if o.startswith("--config.eval.subset_per_class=")]
        return "subset" if values and values[-1] != "0" else "full"

    @property
    def folder(self) -> Path:
        return self.out / self.name

    def jobs(self) -> list["Job"]:
        """Returns all jobs, each after those it requires; the first seed comes first.

        AutoAttack, whose outcomes are compared, is run for all seeds, the other additional parts for the first one.
        """
        jobs = []
        for seed in self.seeds:
            for row in with_bases([self.baseline, *self.rows] if self.baseline else self.rows):
                first = seed == self.seeds[0]
                parts = {
                    self.part: True,
                    SWEEP: first and bool(self.scales),
                    AUTOATTACK: bool(self.autoattack),
                    VERDICT: first and self.baseline not in ("", row),
                }
                jobs += [Job(row, seed, part) for part, required in parts.items() if required]
        return jobs


@dataclasses.dataclass(frozen=True)
class Job:
    row: str
    seed: int
    part: str

    def __str__(self) -> str:
        return f"{self.row}-seed{self.seed}-{self.part}"

    @property
    def trains(self) -> bool:
        return not self.is_additional and not ROWS[self.row].evaluates

    @property
    def is_additional(self) -> bool:
        return self.part in ADDITIONAL

    @property
    def network_row(self) -> str:
        """The row whose working directory the job uses."""
        row = ROWS[self.row]
        return str(row.base) if row.evaluates else self.row

    @property
    def workdir(self) -> str:
        """The name of the working directory."""
        return f"{self.network_row}-seed{self.seed}"

    def required_networks(self, study: Study) -> set[tuple[str, int]]:
        """Returns (row, seed) of the networks that must exist before."""
        rows = [ROWS[self.row].base if self.trains else self.network_row]
        rows += [study.baseline] * (self.part == VERDICT)
        return {(row, self.seed) for row in rows if row}

    @property
    def report(self) -> str:
        """The name of the report in the working directory; "" for the main one."""
        return "-".join([self.row] * ROWS[self.row].evaluates + [self.part] * self.is_additional)


def command(study: Study, job: Job, workdirs: Path | None = None) -> list[str]:
    """Returns the command of a job without the interpreter; the overrides of the row come last and take precedence."""
    workdirs = study.workdirs if workdirs is None else workdirs
    row = ROWS[job.row]
    arguments = [f"dataset={study.dataset}", *filter(None, [row.arguments])]
    if study.epochs and row.share:
        arguments.append(f"epochs={max(1, round(row.share * study.epochs))}")
    config, job_flags = f"configs/{row.config}.py:{','.join(arguments)}", list(row.overrides)
    common = list(study.overrides)
    if job.part == SWEEP:
        config = f"experiments/study/sweep.py:{config}"
        job_flags.append(f"--config.eval.only={tuple(map(sweep.attack_name, study.scales))}".replace(" ", ""))
    if job.part == AUTOATTACK:
        config = f"experiments/study/autoattack.py:{config}"
        job_flags += ["--config.eval.only=('autoattack',)", f"--config.eval.subset_per_class={study.autoattack}"]
    if job.part == VERDICT:
        baseline = _workdir(workdirs, study.baseline, job.seed)
        job_flags += ["--config.eval.only=('pgd20',)", f"--config.eval.baseline={baseline}"]
    if job.part in (AUTOATTACK, VERDICT):
        common = [o for o in common if not o.startswith("--config.eval.only=")]  # a second value would extend the tuple
    if not job.trains:
        job_flags += ["--mode=eval", f"--config.eval.report={job.report}"]
    options = [f"--config={config}", f"--workdir={_workdir(workdirs, job.network_row, job.seed)}"]
    options += [f"--config.seed={job.seed}", *common, *job_flags]
    base = str(_workdir(workdirs, row.base, job.seed)) if row.base else ""
    return ["-m", "lt_adv.main", *(part.replace("{base}", base) for part in options)]


def portable_command(study: Study, job: Job) -> str:
    """Returns the command as recorded, without paths of this machine."""
    return record.portable(shlex.join(["python", *command(study, job, Path("workdirs") / study.name)]))


def _workdir(workdirs: Path, row: str, seed: int) -> Path:
    return workdirs / f"{row}-seed{seed}"


def result_path(study: Study, job: Job) -> Path:
    return study.folder / f"{job}.json"


def failure_path(study: Study, job: Job) -> Path:
    return study.folder / "failed" / f"{job}.txt"


def finished(study: Study, job: Job) -> bool:
    """Returns whether a readable result of the same command exists."""
    path = result_path(study, job)
    try:
        return path.exists() and json.loads(path.read_text())["command"] == portable_command(study, job)
    except (ValueError, KeyError, TypeError):
        return False


def remaining_jobs(study: Study) -> list[Job]:
    """Returns the jobs to run: unfinished ones, and finished ones whose missing network another job requires."""
    jobs: list[Job] = []
    required: set[tuple[str, int]] = set()
    for job in reversed(study.jobs()):
        has_network = (_workdir(study.workdirs, job.row, job.seed) / "checkpoints").exists()
        if not finished(study, job) or job.trains and (job.row, job.seed) in required and not has_network:
            jobs.append(job)
            required |= job.required_networks(study)
    return jobs[::-1]


def run(study: Study) -> Iterator[tuple[Job, str | None]]:
    """Runs the remaining jobs one after another; yields (job, None) or (job, reason of the failure in one line).

    Other processes may run the same study in the same folders: a job is run by the process that has locked its
    working directory. A failure from before the call is tried again, one since then is not, whichever process had it.
    """
    earlier = {path: _modification_time(path) for path in failure_path(study, study.jobs()[0]).parent.glob("*.txt")}

    def has_failed(job: Job) -> bool:
        path = failure_path(study, job)
        return _modification_time(path) not in (None, earlier.get(path))

    while True:
        jobs = [job for job in remaining_jobs(study) if not has_failed(job)]
        failed = {(job.row, job.seed) for job in study.jobs() if job.trains and has_failed(job)}
        untrained = {(job.row, job.seed) for job in jobs if job.trains}
        blocked = [job for job in jobs if job.required_networks(study) & failed]
        if reported := [job for job in blocked if not job.is_additional]:  # once, for the main part
            row = min(reported[0].required_networks(study) & failed)[0]
            yield reported[0], _record(study, reported[0], f"needs {row}, which failed")
            continue
        jobs = [job for job in jobs if job not in blocked]
        if not jobs:
            return
        ready = [job for job in jobs if not job.required_networks(study) & untrained]
        for job in ready:
            with locks.lock(study.workdirs, job.workdir, str(job)) as descriptor:
                if descriptor is None:
                    continue
                if job in remaining_jobs(study) and not has_failed(job):  # another process may have run it meanwhile
                    yield job, _record(study, job, run_job(study, job, descriptor))
                break
        else:  # all of them are locked
            locks.wait_for_any(study.workdirs, {job.workdir for job in ready})


def _record(study: Study, job: Job, reason: str | None) -> str | None:
    """Writes the reason of a failure, or removes that of an earlier one; returns it."""
    path = failure_path(study, job)
    if reason is None:
        path.unlink(missing_ok=True)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(reason + "\n")
    return reason


def run_job(study: Study, job: Job, descriptor: int) -> str | None:
    """Runs a job and writes its result; returns None, or the reason of the failure in one line.

    The process inherits `descriptor`, the file descriptor of the lock: if this process is killed, the lock lasts until
    that one has ended too.
    """
    workdir = _workdir(study.workdirs, job.network_row, job.seed)
    report = workdir / "reports" / job.report / "report.json" if job.report else workdir / "report.json"
    before, start = _modification_time(report), time.monotonic()
    code, last = execute(command(study, job), study.workdirs / f"{job}.log", descriptor)
    if code:
        return record.failure(code, last)
    if _modification_time(report) == before:
        return f"ended without a report: {record.portable(last.strip() or 'no output')}"
    summary = json.loads(report.read_text())
    if "reliability" in summary:
        summary["reliability"]["baseline_run"] = record.portable(summary["reliability"]["baseline_run"])
    record.write(
        result_path(study, job),
        {
            "row": job.row,
            "seed": job.seed,
            "command": portable_command(study, job),
            "machine": {**record.machine(), "device": summary["header"]["device"]},
            "commit": summary["context"].get("commit"),
            "seconds": time.monotonic() - start,
            "training_seconds": training_seconds(study, job.network_row, job.seed),
            "report": summary,
            "outcomes": Outcomes.of(evaluated(workdir, summary)).to_json(),
        },
    )
    return None


def evaluated(workdir: Path, report: Mapping[str, Any]) -> records.Records:
    """Returns the records from which a report of a working directory was made."""
    return records.read_records(records.record_directory(workdir / "eval", report["header"]))


def execute(command: list[str], log: Path, *descriptors: int) -> tuple[int, str]:
    """Runs a process that logs to `log`; returns (exit code, last line). Ctrl-C sends it SIGTERM, so that it saves.

    The process inherits the file `descriptors`.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, *command], stdout=out, stderr=subprocess.PIPE, text=True, pass_fds=descriptors
        )
        try:
            errors = process.communicate()[1]
        except KeyboardInterrupt:
            process.terminate()
            process.communicate()
            raise
    output = errors if process.returncode else log.read_text()
    with log.open("a") as out:
        out.write(errors)
    return process.returncode, (output.strip().splitlines() or [""])[-1]


def _modification_time(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:  # another process may have removed it
        return None


def training_seconds(study: Study, row: str, seed: int) -> float:
    """Returns the training seconds of all stages, with those of the network that training started from."""
    path = _workdir(study.workdirs, row, seed) / "timing.jsonl"
    seconds, base = json.loads(path.read_text().splitlines()[-1])["seconds"], ROWS[row].base
    return seconds + (training_seconds(study, base, seed) if base else 0.0)


def results(study: Study, part: str) -> dict[str, list[dict[str, Any]]]:
    """Returns row -> its results sorted by seed, with rows in the order of ROWS.

    Results of other commands under the same name, for example with other epochs, are left out: a table has one budget.
    """
    by_row: dict[str, list[dict[str, Any]]] = {}
    for row in ROWS:
        stems = (re.fullmatch(rf"{row}-seed(\d+)-{part}", path.stem) for path in study.folder.glob(f"{row}-seed*.json"))
        seeds = (int(match[1]) for match in stems if match)
        jobs = [Job(row, seed, part) for seed in sorted(seeds)]
        runs = [json.loads(result_path(study, job).read_text()) for job in jobs if finished(study, job)]
        if runs:
            by_row[row] = runs
    return by_row


def failures(study: Study) -> dict[str, str]:
    """Returns job -> reason of every failure that no later success replaced."""
    reasons = {path.stem: _failure(path) for path in sorted((study.folder / "failed").glob("*.txt"))}
    return {job: reason for job, reason in reasons.items() if reason is not None}


def _failure(path: Path) -> str | None:
    """Returns the reason in the file of a failure; None without a file, which another process may have removed."""
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        return None


def states(study: Study) -> dict[Job, tuple[str, str]]:
    """Returns job -> (one of `STATES`, details), for all jobs."""
    result = {}
    for job in study.jobs():
        holder, failure = locks.holder(study.workdirs, job.workdir), _failure(failure_path(study, job))
        if finished(study, job):
            result[job] = ("done", "")
        elif holder and holder["job"] == str(job):
            result[job] = ("running", f"{holder['host']}, process {holder['process']}")
        elif failure is not None:
            result[job] = ("failed", failure)
        else:
            result[job] = ("to do", "")
    return result
