"""The points at which faults are injected. A new point is a decorated function that draws a fault."""

import contextlib
import dataclasses
import shutil
from collections.abc import Callable

import numpy as np

from tests.robustness.faults import damage, disk
from tests.robustness.faults.child import Injection
from tests.robustness.faults.run import KILLED, REFUSED, TERMINATED, Run

PER_EPOCH = 7  # steps; the runs save after each epoch
LINES = r"/(metrics|timing)\.jsonl$"
ERRORS = ("ENOSPC", "EDQUOT", "EIO", "EROFS", "EACCES")
ARRAYS = 30  # files that a checkpoint has at least, when it is complete


@dataclasses.dataclass
class Fault:
    """One start of the run, and what must come of it: the exit code, and a line on stdout or stderr."""

    code: int
    injections: tuple[Injection, ...] = ()
    says: str = ""  # regular expression
    done: str = ""  # to the files, before the start, in words
    mode: str = "train"
    slow: float = 0.0
    around: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext  # the cause, and its removal
    beside: bool = False  # a second start, while this one waits, must be refused
    falls_back: bool = False  # to the checkpoint before the newest, with a message


@dataclasses.dataclass(frozen=True)
class Point:
    """A name, a description, and a function that draws a fault for a run that has what the point needs."""

    name: str
    words: str
    draw: Callable[[np.random.Generator, Run], Fault]
    checkpoints: int = 0  # that must be there
    mounts: bool = False  # needs a file system of its own
    processes: int = 1  # of the run


POINTS: dict[str, Point] = {}


def point(words: str, **needs) -> Callable[[Callable[[np.random.Generator, Run], Fault]], None]:
    def register(draw: Callable[[np.random.Generator, Run], Fault]) -> None:
        name = draw.__name__
        POINTS[name] = Point(name, words, draw, **needs)

    return register


def some_step(rng: np.random.Generator, act: str, amount: float = 0.0) -> Injection:
    return Injection("step", act, count=int(rng.integers(1, PER_EPOCH + 1)), amount=amount)


def some_moment(rng: np.random.Generator, pattern: str, act: str, most: int) -> Injection:
    """In the middle of the writing of one of the next `most` such files, or before it takes its place."""
    return Injection(("write", "rename")[rng.integers(2)], act, int(rng.integers(1, most + 1)), pattern)


# --- training


@point("SIGKILL before a step")
def step_killed(rng, run):
    return Fault(KILLED, (some_step(rng, "kill"),))


@point("SIGTERM before a step: saves, exit code 0")
def step_terminated(rng, run):
    return Fault(TERMINATED, (some_step(rng, "term"),), says="SIGTERM: saved at step")


@point("SIGKILL as a save begins")
def before_save(rng, run):
    return Fault(KILLED, (Injection("before_save", "kill"),))


@point("SIGKILL while orbax writes a checkpoint in the background")
def during_save(rng, run):
    return Fault(KILLED, (Injection("saving", "kill", count=int(rng.integers(1, ARRAYS))),))


@point("SIGKILL when a checkpoint is written and not yet in place")
def commit(rng, run):
    return Fault(KILLED, (Injection("rename", "kill", pattern=r"checkpoints/\w+/\d+$"),))


@point("SIGKILL after a save")
def after_save(rng, run):
    return Fault(KILLED, (Injection("saved", "kill"),))


@point("SIGKILL while a checkpoint is restored", checkpoints=1)
def restore(rng, run):
    return Fault(KILLED, (Injection("restore", "kill", amount=float(rng.uniform(0, 0.1))),))


@point("SIGKILL while `metrics.jsonl` or `timing.jsonl` is written")
def lines(rng, run):
    return Fault(KILLED, (some_moment(rng, LINES, "kill", most=6),))


@point("SIGKILL while `config.json` is written")
def config(rng, run):
    return Fault(KILLED, (some_moment(rng, r"/config\.json$", "kill", most=1),))


@point("SIGKILL while the cache of decoded images is written")
def cache_write(rng, run):
    shutil.rmtree(run.cache, ignore_errors=True)
    site = Injection("cache", "kill", count=int(rng.integers(1, 13)))
    if rng.random() < 0.25:
        site = Injection("rename", "kill", pattern=r"/lt_adv_cache/")
    return Fault(KILLED, (site,), done="cache deleted")


@point("a file of the cache of decoded images damaged: rebuilt, with a message")
def cache_damaged(rng, run):
    run.has_cache()
    (folder,) = run.cache.glob("[!.]*")
    done = damage.any_of(rng, damage.below(folder))
    return Fault(TERMINATED, (some_step(rng, "term"),), says=r"The cache .* is damaged .*: it is rebuilt", done=done)


@point("no space, no quota, no permission, an I/O error as a line or the config is written: refused")
def write_error(rng, run):
    error = ERRORS[rng.integers(len(ERRORS))]
    return Fault(REFUSED, (some_moment(rng, LINES + r"|/config\.json$", error, most=5),))


@point("no file may grow beyond some KiB any more: refused")
def file_size(rng, run):
    return Fault(REFUSED, (some_step(rng, "limit", amount=float(rng.uniform(1, 300))),))


@point("the disk is full but for some KiB: refused", mounts=True)
def full_disk(rng, run):
    left = int(rng.integers(300 * 1024))
    return Fault(REFUSED, done=f"{left} bytes left", around=lambda: disk.full(run.disk, left))


@point("the disk is read-only: refused", mounts=True)
def read_only(rng, run):
    return Fault(REFUSED, around=lambda: disk.read_only(run.disk))


@point("a slow store, and SIGTERM: saves, exit code 0")
def slow_store(rng, run):
    slow = float(rng.uniform(0.05, 0.3))
    return Fault(TERMINATED, (some_step(rng, "term"),), says="SIGTERM: saved at step", slow=slow)


@point("a second start during a run: refused; then the run is killed")
def second_run(rng, run):
    return Fault(KILLED, (some_step(rng, "wait"),), beside=True)


def damaged(rng, run, how, files) -> Fault:
    done = how(rng, files)
    return Fault(TERMINATED, (some_step(rng, "term"),), done=done, falls_back=True)


@point("a bit flipped in the newest checkpoint", checkpoints=2)
def corrupt_byte(rng, run):
    files = damage.below(run.newest())
    arrays = [path for path in files if path.parent.name == "d"]
    return damaged(rng, run, damage.flip, arrays if rng.random() < 0.5 else files)


@point("a file of the newest checkpoint cut short", checkpoints=2)
def truncated_file(rng, run):
    return damaged(rng, run, damage.cut, damage.below(run.newest()))


@point("metadata of the newest checkpoint lost", checkpoints=2)
def lost_metadata(rng, run):
    files = [path for path in damage.below(run.newest()) if path.name in damage.METADATA]
    return damaged(rng, run, damage.lose, files)


@point("`metrics.jsonl` cut short, changed or lost", checkpoints=1)
def torn_lines(rng, run):
    return damaged(rng, run, damage.any_of, [run.folder / "metrics.jsonl"])


@point("one of two processes dies in a step or a save: the other ends by itself, with a message", processes=2)
def host_death(rng, run):
    site = ("step", "before_save", "saving", "saved")[rng.integers(4)]
    most = {"step": PER_EPOCH, "saving": ARRAYS}.get(site, 1)
    return Fault(KILLED, (Injection(site, "kill", int(rng.integers(1, most + 1)), process=int(rng.integers(2))),))


# --- evaluation, report and export


@point("SIGKILL during an attack of the evaluation, or while a record is written")
def evaluation_killed(rng, run):
    attack = Injection("attack", "kill", count=int(rng.integers(1, 3)))
    record = some_moment(rng, r"/records/\w+/(batch|header)", "kill", most=2)
    return Fault(KILLED, (attack if rng.random() < 0.4 else record,))


@point("SIGTERM during the evaluation: exit code 0")
def evaluation_terminated(rng, run):
    site = Injection("attack", "term", count=int(rng.integers(1, 3)))
    return Fault(TERMINATED, (site,), says="SIGTERM: the same command goes on")


@point("SIGKILL while the report is written")
def report_killed(rng, run):
    return Fault(KILLED, (some_moment(rng, r"/(report\.\w+|\w+\.png)$", "kill", most=3),))


@point("a record damaged or lost: computed again")
def record_damaged(rng, run):
    run.reaches("evaluated")
    return Fault(TERMINATED, done=damage.any_of(rng, damage.below(run.folder / "eval")), mode="eval")


@point("SIGKILL while the export is written")
def export_killed(rng, run):
    run.reaches("evaluated")
    return Fault(KILLED, (some_moment(rng, r"/\.?export", "kill", most=1),), mode="export")


def possible(mounts: bool) -> list[str]:
    return [name for name, point in POINTS.items() if mounts or not point.mounts]
