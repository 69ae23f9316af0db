"""What went wrong, in words that say what to do."""

import errno
import importlib.util
import re
from collections.abc import Iterable

import torch

OUT_OF_SPACE = {errno.ENOSPC, errno.EDQUOT}
LONGEST = 600  # characters of another library's message


class FailedError(Exception):
    """Work that failed, in words that also say what is left of it."""


def require(module: str, what: str, install: str = "'timm-apvit[finetune]'") -> None:
    """Raise ModuleNotFoundError unless a module that something needs is installed, and say how to install it."""
    if importlib.util.find_spec(module) is None:
        raise ModuleNotFoundError(f'{what} needs {module}: pip install {install}')


def explain(error: BaseException, remedy: str = '', several: bool = False) -> str:
    """Say what went wrong, in a line.

    Args:
        error: that ended it.
        remedy: what takes less memory.
        several: whether other processes take part.
    """
    text = one_line(error)
    # The CPU's allocator, and CUDA's libraries, say so in words only.
    words = ('DefaultCPUAllocator', "can't allocate memory", 'CUDA error: out of memory', '_ALLOC_FAILED')
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or _says(error, words):
        return f'out of memory: {text}' + f'; {remedy}' * bool(remedy)
    if isinstance(error, OSError) and error.errno in OUT_OF_SPACE:
        return f'the disk is full: {text}; free some space'
    lost = ('gloo', 'nccl', 'connection', 'timed out', 'timeout')
    if several and (isinstance(error, torch.distributed.DistError) or _says(error, lost)):
        return f'another process of the training ended or does not answer: {text}'
    return text


def _says(error: BaseException, words: tuple[str, ...]) -> bool:
    """Whether torch tells one of these in its own words."""
    return isinstance(error, RuntimeError) and any(word.lower() in str(error).lower() for word in words)


def one_line(error: BaseException) -> str:
    """What an error says, in a line, or its name; of an error in a worker, what went wrong there."""
    name = type(error).__name__
    # All that a KeyError says is the key.
    said = f'{name}: {error}' if isinstance(error, KeyError) else str(error)
    # Where to read of an answer of the Hub, which says no more.
    said = re.sub(
        r'\s*(For more information check: \S+|If this checkpoint is trusted, .*weights_only=False\.?)', '', said
    )
    lines = [line.strip() for line in (said.strip() or name).splitlines()]
    if lines[0].startswith('Caught ') and 'DataLoader worker' in lines[0]:
        return lines[-1].partition(': ')[2] or lines[-1]
    text = ' '.join(lines)
    return text if len(text) <= LONGEST else text[:LONGEST] + '...'


def listed(names: Iterable[object], most: int = 5) -> str:
    """The first few of some names, and how many more there are."""
    every = [str(name) for name in names]
    return (', '.join(every[:most]) + f' and {len(every) - most} more' * (len(every) > most)) or 'none'
