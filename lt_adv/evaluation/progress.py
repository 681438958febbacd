"""Progress of an evaluation: a live bar on a terminal, a line now and then everywhere else."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import rich.console
import rich.progress

LINES = 10  # how many lines a whole evaluation prints where there is no terminal


class Meter:
    """Running counts of one evaluation. Work is counted in gradient steps, so the time left knows PGD-100 from FGSM."""

    def __init__(self, each: int, images: int, done: int) -> None:
        self.each, self.total = each, each * images
        self.first = self.done = each * done
        self.start, self.attack = time.perf_counter(), ""
        self.correct: dict[str, int] = {}
        self.seen: dict[str, int] = {}
        self.shown: Callable[[], None] = lambda: None

    def count(self, name: str, correct: int, images: int, work: int) -> None:
        """Book one batch under one attack."""
        self.attack = name
        self.correct[name] = self.correct.get(name, 0) + correct
        self.seen[name] = self.seen.get(name, 0) + images
        self.done += work * images
        self.shown()

    @property
    def text(self) -> str:
        rate = (self.done - self.first) / self.each / max(time.perf_counter() - self.start, 1e-9)
        parts = [f"{name} {100 * right / self.seen[name]:.1f} %" for name, right in self.correct.items()]
        return (f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}") + " images/s   " + "  ".join(parts)


@contextmanager
def meter(console: rich.console.Console, work: Mapping[str, int], images: int, done: int) -> Iterator[Meter]:
    """A Meter for `images` images, `done` of them in earlier records, each costing `work[attack]` gradient steps."""
    current = Meter(sum(work.values()), images, done)
    if not console.is_terminal:
        printed = LINES * done // images

        def line() -> None:
            nonlocal printed
            if LINES * current.done // current.total > printed:
                printed = LINES * current.done // current.total
                share = f"{100 * current.done / current.total:.0f} %"
                console.print(f"evaluating {share}   {current.text}", highlight=False, soft_wrap=True)

        current.shown = line
        yield current
        return
    columns = (
        rich.progress.TextColumn("evaluating [bold]{task.fields[attack]}"),
        rich.progress.BarColumn(bar_width=24),
        rich.progress.TaskProgressColumn(),
        rich.progress.TimeRemainingColumn(),
        rich.progress.TextColumn("{task.fields[text]}"),
    )
    with rich.progress.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=current.total, completed=current.done, attack="", text="")
        current.shown = lambda: bar.update(task, completed=current.done, attack=current.attack, text=current.text)
        yield current
