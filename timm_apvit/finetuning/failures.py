"""What went wrong, in words that say what to do."""

import errno

import torch

from timm_apvit.finetuning.checkpoints import first_line

OUT_OF_SPACE = {errno.ENOSPC, errno.EDQUOT}
TO_LOWER = (
    'lower --batch-size or --num-patches, raise --grad-accum (the same result in less memory), '
    'or add --amp bfloat16 or --grad-checkpointing'
)


def explain(error: BaseException, several: bool) -> str:
    """Say what went wrong while training, in a line.

    Args:
        error: that ended it.
        several: whether other processes take part.
    """
    text = first_line(error)
    if is_out_of_memory(error):
        return f'out of memory: {text}; {TO_LOWER}'
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
