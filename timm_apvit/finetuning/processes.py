"""The devices and processes of a training, by accelerate."""

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch

from timm_apvit.failures import one_line, require
from timm_apvit.finetuning.settings import Settings

T = TypeVar('T')


def workers_of(settings: Settings) -> int:
    """How many processes of this one's own load data."""
    if settings.workers is not None or settings.data is None:
        return settings.workers or 0
    return min(8, (os.cpu_count() or 1) // int(os.environ.get('LOCAL_WORLD_SIZE', '1')))


def create_accelerator(settings: Settings, directory: Path) -> Any:
    """Accelerate's own, for the device, the precision and the processes of the settings."""
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.state import AcceleratorState
    from accelerate.utils import LoggerType, patch_environment

    device = settings.device or default_device()
    several = int(os.environ.get('WORLD_SIZE', '1')) > 1
    if several and ':' in device:
        raise ValueError(f'expected --device cuda for several processes, each of which takes its own, got {device!r}')
    # Each of several processes has a GPU of its own, and is to touch no other.
    check_device(f'cuda:{os.environ.get("LOCAL_RANK", "0")}' if several and device == 'cuda' else device, settings.amp)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    known = [str(each.value) for each in LoggerType if each.value != 'all']
    if settings.log_with is not None:
        if settings.log_with not in known:
            raise ValueError(f'expected --log-with {", ".join(known)}, got {settings.log_with!r}')
        require(settings.log_with, f'--log-with {settings.log_with}', settings.log_with)
    # An earlier run of this process may have had another device or precision.
    AcceleratorState._reset_state(True)
    with patch_environment(**({} if device in ('cpu', 'cuda') else {'ACCELERATE_TORCH_DEVICE': device})):
        return Accelerator(
            cpu=device == 'cpu',
            mixed_precision={None: 'no', 'bfloat16': 'bf16', 'float16': 'fp16'}[settings.amp],
            gradient_accumulation_steps=settings.grad_accum,
            log_with=settings.log_with,
            project_dir=directory,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(minutes=settings.timeout))],
        )


def default_device() -> str:
    """A GPU if there is one."""
    return 'cuda' if torch.cuda.is_available() else 'cpu'


def check_device(device: str, amp: str | None) -> str:
    """The device, if it is there and computes in the data type."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f'expected a device that is there, got {device!r}: {one_line(error)}') from None
    if amp == 'float16' and not device.startswith('cuda'):
        raise ValueError(f'expected --amp bfloat16 on {device!r}, got float16, which needs a CUDA GPU')
    return device


def in_all_processes(act: Callable[[], T]) -> T:
    """Do something in every process, and fail in all if it fails in one."""
    from accelerate.utils import gather_object

    result, failure = None, None
    try:
        result = act()
    except Exception as error:  # of any kind: the others wait for this one
        failure = error
    problems = gather_object([None if failure is None else one_line(failure)])
    found = next(((number, text) for number, text in enumerate(problems) if text is not None), None)
    if found is None:
        return result  # type: ignore[return-value]
    if int(os.environ.get('RANK', '0')):
        raise SystemExit(2)
    if failure is not None:
        raise failure
    raise ValueError(f'process {found[0]}: {found[1]}')
