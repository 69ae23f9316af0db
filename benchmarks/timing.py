"""Timing in turns: what is compared runs in the same rounds, so that a machine that slows down slows all."""

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

# With glibc's defaults, memory of a few megabytes goes back to the system between layers and is faulted in again: 20 to
# 50 thousand page faults a forward of ViT-S, some 7 % of its time, more or fewer from process to process.
ALLOCATOR = {'MALLOC_MMAP_THRESHOLD_': str(1 << 32), 'MALLOC_TRIM_THRESHOLD_': str(1 << 33)}


def keep_memory() -> None:
    """Start this script again with an allocator that keeps what is freed; where it is not glibc's, nothing changes."""
    if platform.libc_ver()[0] == 'glibc' and not all(name in os.environ for name in ALLOCATOR):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **ALLOCATOR})


def time_in_turns(calls: dict[str, Callable[[], Any]], rounds: int, device: str = 'cpu') -> dict[str, list[float]]:
    """Seconds of each call in each round, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds + 1):
        for name, call in calls.items():
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            if round_ > 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def synchronize(device: str) -> None:
    """Wait until a device has done what it was given."""
    if device.startswith('cuda'):
        torch.cuda.synchronize(device)


def peak_memory(call: Callable[[], Any], device: str) -> float:
    """Peak of what a call allocates on a GPU, in MiB. On CPU, `cost.py` measures it in processes of their own."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def quartiles(own: list[float], reference: list[float]) -> list[float]:
    """Quartiles of the ratios of two that were timed in the same rounds; the second of them is the median."""
    ratios = [mine / other for mine, other in zip(own, reference, strict=True)]
    return ratios * 3 if len(ratios) == 1 else statistics.quantiles(ratios, n=4, method='inclusive')
