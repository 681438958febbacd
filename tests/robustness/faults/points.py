"""The points at which faults are injected: a decorated function per point draws a random fault.

The name of a point seeds its random numbers.
"""

import contextlib
import dataclasses
import shutil
from collections.abc import Callable

import numpy as np

from tests.robustness.faults import corruption, disk
from tests.robustness.faults.child import Injection
from tests.robustness.faults.run import KILLED, REFUSED, TERMINATED, Run

PER_EPOCH = 7  # steps per epoch; the runs save a checkpoint after each epoch
LOG_FILES = r"/(metrics|timing)\.jsonl$"
ERRORS = ("ENOSPC", "EDQUOT", "EIO", "EROFS", "EACCES")
FILES = 30  # fewer than the files of a complete checkpoint


@dataclasses.dataclass
class Fault:
    """One start of the run with a fault, and the expected outcome.

    Attributes:
      code: expected exit code.
      injections: what the process injects into itself.
      message: regular expression that stdout or stderr must match.
      damage: description of the damage done to files before the start.
      mode: `--mode` of the start.
      delay: seconds by which each write is delayed.
      context: entered around the start; causes the fault and removes the cause.
      second_start: while this process waits, a second one is started, which must be refused.
      may_fall_back: training may resume from the checkpoint before the newest, with a message.
    """

    code: int
    injections: tuple[Injection, ...] = ()
    message: str = ""
    damage: str = ""
    mode: str = "train"
    delay: float = 0.0
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    second_start: bool = False
    may_fall_back: bool = False


@dataclasses.dataclass(frozen=True)
class Point:
    """A point, and the function that draws a fault there for a run that meets its requirements."""

    name: str
    description: str
    draw: Callable[[np.random.Generator, Run], Fault]
    checkpoints: int = 0  # number of checkpoints that the run must have
    mounts: bool = False  # whether the point mounts a file system
    processes: int = 1  # number of processes of the run


POINTS: dict[str, Point] = {}


def point(description: str, **requirements) -> Callable[[Callable[[np.random.Generator, Run], Fault]], None]:
    def register(draw: Callable[[np.random.Generator, Run], Fault]) -> None:
        name = draw.__name__
        POINTS[name] = Point(name, description, draw, **requirements)

    return register


def random_step(rng: np.random.Generator, action: str, amount: float = 0.0) -> Injection:
    return Injection("step", action, count=int(rng.integers(1, PER_EPOCH + 1)), amount=amount)


def random_write(rng: np.random.Generator, pattern: str, action: str, max_count: int) -> Injection:
    """Within the write, or before the rename, of one of the next `max_count` files whose path matches `pattern`."""
    return Injection(("write", "rename")[rng.integers(2)], action, int(rng.integers(1, max_count + 1)), pattern)


# --- training


@point("SIGKILL before a training step")
def step_killed(rng, run):
    return Fault(KILLED, (random_step(rng, "kill"),))


@point("SIGTERM before a training step: the run saves a checkpoint and exits with code 0")
def step_terminated(rng, run):
    return Fault(TERMINATED, (random_step(rng, "term"),), message="SIGTERM: saved at step")


@point("SIGKILL before a checkpoint is saved")
def before_save(rng, run):
    return Fault(KILLED, (Injection("before_save", "kill"),))


@point("SIGKILL while Orbax writes a checkpoint in the background")
def during_save(rng, run):
    return Fault(KILLED, (Injection("saving", "kill", count=int(rng.integers(1, FILES))),))


@point("SIGKILL after a checkpoint is written and before it is renamed to its final name")
def commit(rng, run):
    return Fault(KILLED, (Injection("rename", "kill", pattern=r"checkpoints/\w+/\d+$"),))


@point("SIGKILL after a checkpoint is saved")
def after_save(rng, run):
    return Fault(KILLED, (Injection("saved", "kill"),))


@point("SIGKILL while a checkpoint is restored", checkpoints=1)
def restore(rng, run):
    return Fault(KILLED, (Injection("restore", "kill", amount=float(rng.uniform(0, 0.1))),))


@point("SIGKILL while `metrics.jsonl` or `timing.jsonl` is written")
def lines(rng, run):
    return Fault(KILLED, (random_write(rng, LOG_FILES, "kill", max_count=6),))


@point("SIGKILL while `config.json` is written")
def config(rng, run):
    return Fault(KILLED, (random_write(rng, r"/config\.json$", "kill", max_count=1),))


@point("SIGKILL while the cache of decoded images is written")
def cache_write(rng, run):
    shutil.rmtree(run.cache, ignore_errors=True)
    injection = Injection("cache", "kill", count=int(rng.integers(1, 13)))
    if rng.random() < 0.25:
        injection = Injection("rename", "kill", pattern=r"/lt_adv_cache/")
    return Fault(KILLED, (injection,), damage="cache deleted")


@point("Damaged file in the cache of decoded images: the cache is rebuilt with a message")
def cache_damaged(rng, run):
    run.ensure_cache()
    (folder,) = run.cache.glob("[!.]*")
    damage = corruption.any_of(rng, corruption.files_below(folder))
    return Fault(
        TERMINATED, (random_step(rng, "term"),), message=r"The cache .* is damaged .*: it is rebuilt", damage=damage
    )


@point("Failed write of `config.json` or a log (no space, quota, permission, read-only disk, I/O error): error message")
def write_error(rng, run):
    error = ERRORS[rng.integers(len(ERRORS))]
    return Fault(REFUSED, (random_write(rng, LOG_FILES + r"|/config\.json$", error, max_count=5),))


@point("Limit on the file size, at most 300 KiB: error message")
def file_size(rng, run):
    return Fault(REFUSED, (random_step(rng, "limit", amount=float(rng.uniform(1, 300))),))


@point("Disk with at most 300 KiB of free space: error message", mounts=True)
def full_disk(rng, run):
    left = int(rng.integers(300 * 1024))
    return Fault(REFUSED, damage=f"{left} bytes left", context=lambda: disk.full(run.disk, left))


@point("Read-only disk: error message", mounts=True)
def read_only(rng, run):
    return Fault(REFUSED, context=lambda: disk.read_only(run.disk))


@point("SIGTERM with slow storage: the run saves a checkpoint and exits with code 0")
def slow_store(rng, run):
    delay = float(rng.uniform(0.05, 0.3))
    return Fault(TERMINATED, (random_step(rng, "term"),), message="SIGTERM: saved at step", delay=delay)


@point("Second process in the same working directory: it exits with an error message; then SIGKILL to the first")
def second_run(rng, run):
    return Fault(KILLED, (random_step(rng, "wait"),), second_start=True)


def damaged_file(rng, corrupt, files) -> Fault:
    """Damages one of the files, then starts training and stops it with SIGTERM."""
    damage = corrupt(rng, files)
    return Fault(TERMINATED, (random_step(rng, "term"),), damage=damage, may_fall_back=True)


@point("Flipped bit in a file of the newest checkpoint", checkpoints=2)
def corrupt_byte(rng, run):
    files = corruption.files_below(run.newest_checkpoint())
    arrays = [path for path in files if path.parent.name == "d"]
    return damaged_file(rng, corruption.flip_bit, arrays if rng.random() < 0.5 else files)


@point("Truncated file in the newest checkpoint", checkpoints=2)
def truncated_file(rng, run):
    return damaged_file(rng, corruption.truncate, corruption.files_below(run.newest_checkpoint()))


@point("Missing metadata in the newest checkpoint", checkpoints=2)
def lost_metadata(rng, run):
    files = [path for path in corruption.files_below(run.newest_checkpoint()) if path.name in corruption.METADATA]
    return damaged_file(rng, corruption.delete, files)


@point("Damaged, truncated or missing `metrics.jsonl`", checkpoints=1)
def torn_lines(rng, run):
    return damaged_file(rng, corruption.any_of, [run.folder / "metrics.jsonl"])


@point("SIGKILL to one of two processes in a step or a save: the other process ends with an error message", processes=2)
def host_death(rng, run):
    site = ("step", "before_save", "saving", "saved")[rng.integers(4)]
    max_count = {"step": PER_EPOCH, "saving": FILES}.get(site, 1)
    return Fault(KILLED, (Injection(site, "kill", int(rng.integers(1, max_count + 1)), process=int(rng.integers(2))),))


# --- evaluation, report and export


@point("SIGKILL during an attack of the evaluation, or while a record is written")
def evaluation_killed(rng, run):
    attack = Injection("attack", "kill", count=int(rng.integers(1, 3)))
    record = random_write(rng, r"/records/\w+/(batch|header)", "kill", max_count=2)
    return Fault(KILLED, (attack if rng.random() < 0.4 else record,))


@point("SIGTERM during an attack of the evaluation: the run exits with code 0")
def evaluation_terminated(rng, run):
    injection = Injection("attack", "term", count=int(rng.integers(1, 3)))
    return Fault(TERMINATED, (injection,), message="SIGTERM: the same command resumes")


@point("SIGKILL while the report is written")
def report_killed(rng, run):
    return Fault(KILLED, (random_write(rng, r"/(report\.\w+|\w+\.png)$", "kill", max_count=3),))


@point("Damaged or missing record: it is computed again")
def record_damaged(rng, run):
    run.ensure_report()
    return Fault(TERMINATED, damage=corruption.any_of(rng, corruption.files_below(run.folder / "eval")), mode="eval")


@point("SIGKILL while the export is written")
def export_killed(rng, run):
    run.ensure_report()
    return Fault(KILLED, (random_write(rng, r"/\.?export", "kill", max_count=1),), mode="export")
