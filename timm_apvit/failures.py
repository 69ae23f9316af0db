"""What went wrong, in words that say what to do."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

OUT_OF_SPACE = {errno.ENOSPC, errno.EDQUOT}
LONGEST = 600  # characters of another library's message


class RefusedError(Exception):
    """Bad input, found before any work."""


class FailedError(Exception):
    """Work that failed or was interrupted, and what is left of it.

    Args:
        text: for people; nothing where another process says it.
        status: of the process when it ends.
    """

    def __init__(self, text: str, status: int = 1) -> None:
        super().__init__(text)
        self.status = status


@contextmanager
def refusing() -> Iterator[None]:
    """Take what goes wrong inside, before any work, for bad input."""
    try:
        yield
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        raise RefusedError(one_line(error)) from error


def explain(error: BaseException, remedy: str = '', several: bool = False) -> str:
    """Say what went wrong, in a line.

    Args:
        error: that ended it.
        remedy: what takes less memory.
        several: whether other processes take part.
    """
    text = one_line(error)
    if is_out_of_memory(error):
        return f'out of memory: {text}' + f'; {remedy}' * bool(remedy)
    if isinstance(error, OSError) and error.errno in OUT_OF_SPACE:
        return f'the disk is full: {text}; free some space'
    if several and isinstance(error, RuntimeError) and is_of_communication(error):
        return f'another process of the training ended or does not answer: {text}'
    return text


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the GPU, or the CPU, which says so in words only, ran out of memory."""
    said = 'DefaultCPUAllocator' in str(error) or "can't allocate memory" in str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (isinstance(error, RuntimeError) and said)


def is_of_communication(error: RuntimeError) -> bool:
    """Whether processes lost each other."""
    said = any(word in str(error).lower() for word in ('gloo', 'nccl', 'connection', 'timed out', 'timeout'))
    return isinstance(error, torch.distributed.DistError) or said


def one_line(error: BaseException) -> str:
    """What an error says, in a line, or its name; of an error in a worker, what went wrong there."""
    name = type(error).__name__
    # All that a KeyError says is the key.
    said = f'{name}: {error}' if isinstance(error, KeyError) else str(error)
    # Where to read of an answer of the Hub, which says no more.
    said = re.sub(r'\s*For more information check: \S+', '', said)
    lines = [line.strip() for line in (said.strip() or name).splitlines()]
    if lines[0].startswith('Caught ') and 'DataLoader worker' in lines[0]:
        return lines[-1].partition(': ')[2] or lines[-1]
    text = ' '.join(lines)
    return text if len(text) <= LONGEST else text[:LONGEST] + '...'
