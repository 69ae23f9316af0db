"""How far a training is: a bar on a terminal, and lines where there is none."""

import time
from collections.abc import Callable
from datetime import timedelta

from tqdm import tqdm


class Progress:
    """Images, their rate, the loss, and the time left of a whole run.

    Args:
        name: of the training.
        updates: of an epoch.
        images: of an update, of all processes.
        epochs: of the run.
        done: updates that an earlier process did.
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
        self.bar = tqdm(
            desc=name,
            total=updates * images * epochs,
            initial=done * images,
            unit=' images',
            unit_scale=True,
            leave=False,
            disable=None if shown else True,
            dynamic_ncols=True,
        )

    def advance(self, loss: float | None = None) -> None:
        """Tell of an update, and of the mean loss of its epoch so far where it is known."""
        epoch, within = self.done // self.updates + 1, self.done % self.updates + 1
        self.done += 1
        said = '' if loss is None else f'loss {loss:.3f}, '
        if said:
            self.bar.set_postfix_str(f'epoch {epoch}/{self.epochs}, {said}{self.time_left()} left', refresh=False)
        self.bar.update(self.images)
        if self.shown and self.bar.disable and within % self.every == 0:
            tqdm.write(
                f'{self.name} {epoch}/{self.epochs}: update {within} of {self.updates}, {said}{self.time_left()} left'
            )

    def time_left(self) -> str:
        """Time that the rest of the run takes at the mean rate so far, tests and checkpoints included."""
        left = self.updates * self.epochs - self.done
        seconds = (self.clock() - self.begun) / max(1, self.done - self.first) * left
        return str(timedelta(seconds=round(seconds)))
