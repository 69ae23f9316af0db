"""How far a training is: a bar on a terminal, and lines where there is none."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any


class Progress:
    """Images, their rate, the loss, and the time left of the epoch and of the whole run.

    Args:
        name: of the training.
        updates: of an epoch.
        images: of an update, of all processes.
        epochs: of the whole run.
        done: updates of the run that an earlier process did.
        every: where there is no terminal, a line is printed every so many updates.
        shown: whether this process is the one that shows it.
        clock: in seconds.
    """

    def __init__(
        self,
        name: str,
        updates: int,
        images: int,
        epochs: int,
        done: int = 0,
        every: int = 100,
        shown: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name, self.updates, self.images, self.epochs = name, updates, images, epochs
        self.first = self.done = done
        self.every, self.shown, self.clock = every, shown, clock
        self.begun = clock()
        self._bar: Any = None

    @contextmanager
    def epoch(self, number: int) -> Iterator[None]:
        """Show the bar of an epoch, from 0."""
        from tqdm import tqdm

        self._bar = tqdm(
            total=self.updates * self.images,
            initial=(self.done - number * self.updates) * self.images,
            desc=f'{self.name} {number + 1}/{self.epochs}',
            unit=' images',
            unit_scale=True,
            leave=False,
            disable=None if self.shown else True,
            dynamic_ncols=True,
        )
        with self._bar:
            yield

    def advance(self, loss: float | None = None) -> None:
        """Tell of an update, and of the mean loss so far where it is known."""
        self.done += 1
        if loss is not None:
            self._bar.set_postfix_str(f'loss {loss:.3f}, whole run {self.time_left()}', refresh=False)
        self._bar.update(self.images)
        within = (self.done - 1) % self.updates + 1
        if self.shown and self._bar.disable and within % self.every == 0:
            epoch, said = (self.done - 1) // self.updates + 1, '' if loss is None else f'loss {loss:.3f}, '
            line = (
                f'{self.name} {epoch}/{self.epochs}: update {within} of {self.updates}, {said}{self.time_left()} left'
            )
            sys.stdout.write(line + '\n')
            sys.stdout.flush()

    def time_left(self) -> str:
        """Time that the rest of the run takes at the mean rate so far, tests and checkpoints included."""
        left = self.updates * self.epochs - self.done
        seconds = (self.clock() - self.begun) / max(1, self.done - self.first) * left
        return str(timedelta(seconds=round(seconds)))
