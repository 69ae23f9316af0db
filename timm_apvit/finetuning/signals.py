"""Signals that ask a training to end."""

import os
import signal
import threading
from types import TracebackType
from typing import Any


class Interrupted(KeyboardInterrupt):
    """Work that a signal ended.

    Args:
        number: of the signal.
        text: what is left, for people.
    """

    def __init__(self, number: int = signal.SIGINT, text: str = '') -> None:
        super().__init__(text)
        self.number = number

    @property
    def status(self) -> int:
        """Of the process when it ends, as shells have it."""
        return 128 + self.number


class StopSignals:
    """Ctrl-C, or SIGTERM as clusters send it, asks a training to save and end; a second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> 'StopSignals':
        if threading.current_thread() is threading.main_thread():  # only that one receives signals
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:  # as a shell starts what it runs in the background
                    self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: Any) -> None:
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number
        if os.environ.get('RANK', '0') == '0':
            os.write(2, b'\nsaving a checkpoint; Ctrl-C again ends at once\n')  # a stream could be in use
