"""Progress of an evaluation: a live bar on a terminal, a few printed lines elsewhere."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import rich.console
import rich.progress

LINES = 10  # printed per evaluation without a terminal


class Meter:
    """Running counts of an evaluation, in passes through the network, for a time estimate across attacks."""

    def __init__(self, passes_per_image: int, images: int, done: int) -> None:
        self.passes_per_image, self.total = passes_per_image, passes_per_image * images
        self.done_before = self.done = passes_per_image * done
        self.start, self.attack = time.perf_counter(), ""
        self.correct: dict[str, int] = {}
        self.images: dict[str, int] = {}
        self.update: Callable[[], None] = lambda: None

    def count(self, name: str, correct: int, images: int, passes: int) -> None:
        """Adds one batch under one attack."""
        self.attack = name
        self.correct[name] = self.correct.get(name, 0) + correct
        self.images[name] = self.images.get(name, 0) + images
        self.done += passes * images
        self.update()

    @property
    def text(self) -> str:
        rate = (self.done - self.done_before) / self.passes_per_image / max(time.perf_counter() - self.start, 1e-9)
        parts = [f"{name} {100 * correct / self.images[name]:.1f} %" for name, correct in self.correct.items()]
        return (f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}") + " images/s   " + "  ".join(parts)


@contextmanager
def meter(console: rich.console.Console, passes: Mapping[str, int], images: int, done: int) -> Iterator[Meter]:
    """Yields a Meter for `images` images, `done` of them from earlier records, at `passes[attack]` per image."""
    current = Meter(sum(passes.values()), images, done)
    if not console.is_terminal:
        printed = LINES * done // images

        def print_line() -> None:
            nonlocal printed
            if LINES * current.done // current.total > printed:
                printed = LINES * current.done // current.total
                share = f"{100 * current.done / current.total:.0f} %"
                console.print(f"evaluating {share}   {current.text}", highlight=False, soft_wrap=True)

        current.update = print_line
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
        current.update = lambda: bar.update(task, completed=current.done, attack=current.attack, text=current.text)
        yield current
