"""What went wrong, in words that say what to do."""

import errno

import torch

OUT_OF_SPACE = {errno.ENOSPC, errno.EDQUOT}


def explain(error: BaseException, remedy: str, several: bool = False) -> str:
    """Say what went wrong, in a line.

    Args:
        error: that ended it.
        remedy: what takes less memory.
        several: whether other processes take part.
    """
    text = first_line(error)
    if is_out_of_memory(error):
        return f'out of memory: {text}; {remedy}'
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


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its name; of an error in a worker, what went wrong there."""
    name = type(error).__name__
    # All that a KeyError says is the key.
    said = f'{name}: {error}' if isinstance(error, KeyError) else str(error)
    lines = (said.strip() or name).splitlines()
    if lines[0].startswith('Caught ') and 'DataLoader worker' in lines[0]:
        return lines[-1].partition(': ')[2] or lines[-1]
    return lines[0]
