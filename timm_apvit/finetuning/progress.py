"""A bar that tells how far a training is."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any


class Progress:
    """A bar for an epoch: its images, their rate, the loss, and the time left of the epoch and of the whole run.

    Shown on a terminal only.

    Args:
        name: of the training.
        updates: of an epoch.
        images: of an update, of all processes.
        epochs: that this process trains, as a range from 0.
        shown: whether this process is the one that shows it.
        clock: in seconds.
    """

    def __init__(
        self,
        name: str,
        updates: int,
        images: int,
        epochs: range,
        shown: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self.updates = updates
        self.images = images
        self.epochs = epochs
        self.shown = shown
        self.clock = clock
        self.begun = clock()
        self.done = 0
        self._bar: Any = None

    @contextmanager
    def epoch(self, number: int) -> Iterator[None]:
        """Show the bar of an epoch, from 0."""
        from tqdm import tqdm

        self._bar = tqdm(
            total=self.updates * self.images,
            desc=f'{self.name} {number + 1}/{self.epochs.stop}',
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

    def time_left(self) -> str:
        """Time that the rest of the run takes at the mean rate so far, tests and checkpoints included."""
        left = self.updates * len(self.epochs) - self.done
        seconds = (self.clock() - self.begun) / max(1, self.done) * left
        return str(timedelta(seconds=round(seconds)))
