"""Progress on the terminal: one bar at a time, gone when its stage is done."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from torchimpl.training.loop import Progress as Step


class Bars:
    """The bars of one run, on one console."""

    def __init__(self, console: Console) -> None:
        self.console = console

    @contextmanager
    def counting(self, title: str) -> Iterator[Callable[[int, int], None]]:
        """A bar for a known number of things; callback(done, total)."""
        with self._bar(title) as update:
            yield lambda done, total: update(done, total, f"{done}/{total}")

    @contextmanager
    def training(self, title: str) -> Iterator[Callable[[Step], None]]:
        """A bar for the steps of a training run, with loss, pace and time left."""
        with self._bar(title) as update:

            def show(now: Step) -> None:
                pace = f"{now.samples_per_second:,.0f} images/s, {now.seconds_left:.0f} s left"
                text = f"epoch {now.epoch}/{now.epochs}, loss {now.loss:.3f}, {pace}"
                update(now.step, now.steps, text)

            yield show

    @contextmanager
    def _bar(self, title: str) -> Iterator[Callable[[int, int, str], None]]:
        columns = (TextColumn("{task.description:<34}"), BarColumn(), TextColumn("{task.fields[said]}"))
        with Progress(*columns, TimeElapsedColumn(), console=self.console, transient=True) as progress:
            task = progress.add_task(escape(title), total=None, said="")
            yield lambda done, total, said: progress.update(task, completed=done, total=total, said=said)
