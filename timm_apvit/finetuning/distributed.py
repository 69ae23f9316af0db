"""Several processes that train one model, as torchrun starts them; or this process alone."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from timm_apvit.finetuning.sharing import Share

# Minutes: longer than any step, shorter than a queue.
DEFAULT_TIMEOUT = 10.0


def rank() -> int:
    """The number of this process."""
    return int(os.environ['RANK']) if _several_are_started() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process is the one that writes."""
    return rank() == 0


def own_share(pieces: int = 1) -> Share:
    """What of each batch this process computes."""
    return Share(rank() if world_size() > 1 else 0, world_size(), pieces)


def local_device(device: str | None) -> str:
    """The device of this process, for the one that was asked for.

    Raises:
        ValueError: a single GPU for several processes.
    """
    if device is None:
        device = 'cuda' if torch.cuda.is_available() else 'cpu'
    if not _several_are_started() or not device.startswith('cuda'):
        return device
    if device != 'cuda':
        raise ValueError(f'expected --device cuda for several processes, each of which takes its own, got {device!r}')
    return f'cuda:{os.environ.get("LOCAL_RANK", "0")}'


def processes_here() -> int:
    """The number of processes on this machine."""
    return int(os.environ.get('LOCAL_WORLD_SIZE', '1')) if _several_are_started() else 1


@contextmanager
def joined(device: str | None, minutes: float) -> Iterator[None]:
    """Join the other processes that torchrun started, if there are any.

    Args:
        device: that was asked for.
        minutes: after which a process that does not answer ends the training.

    Raises:
        RuntimeError: the others are not there.
    """
    if not _several_are_started():
        yield
        return
    on_gpu = torch.cuda.is_available() and (device is None or device.startswith('cuda'))
    # With both, what lies on the CPU does not go through the GPU.
    dist.init_process_group('cpu:gloo,cuda:nccl' if on_gpu else 'gloo', timeout=timedelta(minutes=minutes))
    yield
    # Not after an error: the others may be gone, and taking leave of them would wait for them.
    dist.destroy_process_group()


def _several_are_started() -> bool:
    """Whether torchrun started this process as one of several."""
    return int(os.environ.get('WORLD_SIZE', '1')) > 1 and 'RANK' in os.environ


def distribute(model: nn.Module, device: torch.device) -> nn.Module:
    """The model, averaging its gradients over all processes if there are several."""
    if world_size() == 1:
        return model
    if device.type == 'cuda':
        torch.cuda.set_device(device)
    device_ids = [device] if device.type == 'cuda' else None
    return nn.parallel.DistributedDataParallel(model, device_ids=device_ids)


def sum_over_processes(values: Tensor) -> Tensor:
    """Sum the values of all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def gather_from_processes(value: Any) -> list[Any]:
    """The value that each process has, in order of their ranks."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values
