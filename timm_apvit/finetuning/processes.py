"""The devices and processes of a training, by accelerate."""

import importlib.util
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch

from timm_apvit.failures import RefusedError, one_line, refusing
from timm_apvit.finetuning.settings import Settings

T = TypeVar('T')


def workers_of(settings: Settings) -> int:
    """How many processes of this one's own load data."""
    if settings.workers is not None or settings.data is None:
        return settings.workers or 0
    return min(8, (os.cpu_count() or 1) // int(os.environ.get('LOCAL_WORLD_SIZE', '1')))


def create_accelerator(settings: Settings, directory: Path) -> Any:
    """Accelerate's own, for the device, the precision and the processes of the settings.

    Raises:
        ValueError: there is no such device, or it does not compute in the data type.
        ModuleNotFoundError: the tracker is not installed.
    """
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.state import AcceleratorState
    from accelerate.utils import LoggerType

    device = settings.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    several = int(os.environ.get('WORLD_SIZE', '1')) > 1
    if several and ':' in device:
        raise ValueError(f'expected --device cuda for several processes, each of which takes its own, got {device!r}')
    check_device(device, settings.amp)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    known = [str(each.value) for each in LoggerType if each.value != 'all']
    if settings.log_with is not None:
        if settings.log_with not in known:
            raise ValueError(f'expected --log-with {", ".join(known)}, got {settings.log_with!r}')
        if importlib.util.find_spec(settings.log_with) is None:
            raise ModuleNotFoundError(
                f'--log-with {settings.log_with} needs its package: pip install {settings.log_with}'
            )
    # An earlier run of this process may have had another device or precision.
    AcceleratorState._reset_state(True)
    if ':' in device:
        os.environ['ACCELERATE_TORCH_DEVICE'] = device
    return Accelerator(
        cpu=device == 'cpu',
        mixed_precision={None: 'no', 'bfloat16': 'bf16', 'float16': 'fp16'}[settings.amp],
        gradient_accumulation_steps=settings.grad_accum,
        log_with=settings.log_with,
        project_dir=directory,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(minutes=settings.timeout))],
    )


def check_device(device: str, amp: str | None) -> str:
    """The device, if it is there and computes in the data type.

    Raises:
        ValueError: it is not, or does not.
    """
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f'expected a device that is there, got {device!r}: {one_line(error)}') from None
    if amp == 'float16' and not device.startswith('cuda'):
        raise ValueError(f'expected --amp bfloat16 on {device!r}, got float16, which needs a CUDA GPU')
    return device


def together(act: Callable[[], T]) -> T:
    """Do something in every process, and fail in all if it fails in one.

    Raises:
        RefusedError: it failed.
    """
    from accelerate.utils import gather_object

    result, problem = None, None
    try:
        with refusing():
            result = act()
    except RefusedError as error:
        problem = str(error)
    for number, found in enumerate(gather_object([problem])):
        if found is not None:
            raise RefusedError(found if number == 0 else f'process {number}: {found}')
    return result  # type: ignore[return-value]
