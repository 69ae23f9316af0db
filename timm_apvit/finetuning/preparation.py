"""From options to a run: everything that can be checked before any long work is checked here."""

import importlib.util
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from timm_apvit.failures import first_line
from timm_apvit.finetuning import options as defaults
from timm_apvit.finetuning.checkpoints import CheckpointStore, check_vacant, create_run, locked
from timm_apvit.finetuning.config import config_text, resumed_options
from timm_apvit.finetuning.data import Splits
from timm_apvit.finetuning.distributed import is_main, local_device, own_share, processes_here
from timm_apvit.finetuning.learner import Distillation
from timm_apvit.finetuning.logs import check_tensorboard
from timm_apvit.finetuning.models import create_model, is_of_a_vit, start_model
from timm_apvit.finetuning.options import Options
from timm_apvit.finetuning.schedule import Schedule
from timm_apvit.finetuning.soundness import (
    check_batches,
    check_destination,
    check_epochs,
    check_options,
)
from timm_apvit.finetuning.sources import is_path, load_splits
from timm_apvit.finetuning.teachers import create_distillation
from timm_apvit.finetuning.training import STATE_KEYS, fits_first
from timm_apvit.finetuning.twin import create_twin
from timm_apvit.learning.glance import glance_of
from timm_apvit.models.glance import glances
from timm_apvit.models.mixin import APViT
from timm_apvit.pictures.images import image_config


class Run(NamedTuple):
    """A run whose options proved sound.

    Attributes:
        options: all of them.
        directory: of its checkpoints.
        resumed: whether it was begun before.
        model: to train.
        twin: its fixed-grid twin, to train too.
        splits: training and test data.
        data_config: of the images that the model takes.
        schedule: how to train.
        distillation: what to learn from besides the labels.
        notes: what people should know before it begins.
    """

    options: Options
    directory: Path
    resumed: bool
    model: APViT
    twin: nn.Module | None
    splits: Splits
    data_config: dict[str, Any]
    schedule: Schedule
    distillation: Distillation | None
    notes: tuple[str, ...]


def prepare(given: dict[str, Any]) -> Run:
    """Check everything that can be checked before any long work; write nothing.

    Raises:
        ValueError, OSError, ModuleNotFoundError: bad input, or an extra is missing.
    """
    for module in ('tqdm', 'matplotlib'):
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(f"fine-tuning needs {module}: pip install 'timm-apvit[finetune]'")
    given = _with_absolute_paths(given)
    resumed = given.get('resume') is not None
    if resumed:
        if given.get('output') is not None:
            raise ValueError('expected --output or --resume, got both')
        directory = Path(given['resume'])
        options = resumed_options(directory, given)
        states = [CheckpointStore(each).load() for each in (directory, directory / 'twin')]
    else:
        options = Options(**given)
        check_options(options)
        options = with_defaults(options)
        default = Path('runs', f'{_file_name(options.model)}-{time.strftime("%Y%m%d-%H%M%S")}')
        directory = Path(options.output or default)
        if is_main():
            check_vacant(directory)
        states = []
    check_destination(options)
    schedule = _schedule(options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)

    if options.tensorboard:
        check_tensorboard()
    config_text(options)  # raises TypeError before any long work
    # A model without a classifier is quickly made and tells what images it takes, before the data are looked through.
    data_config = image_config(create_model(options, num_classes=0))
    splits = load_splits(options, data_config, schedule.workers)
    check_batches(schedule, len(splits.train), own_share(schedule.grad_accum))
    torch.manual_seed(options.seed)
    start = start_model(options, len(splits.label_names))
    if options.crop_pct is not None:
        start.model.pretrained_cfg['crop_pct'] = options.crop_pct  # which those who load the model crop by
    _check_states(states, splits)
    distillation = create_distillation(options, start, data_config)
    twin = create_twin(start.model) if options.twin else None
    notes = (*start.notes, *_on_glance(start.model, schedule))
    return Run(options, directory, resumed, start.model, twin, splits, data_config, schedule, distillation, notes)


def _on_glance(model: APViT, schedule: Schedule) -> tuple[str, ...]:
    """What people should know of how a model finds where to look."""
    if not glances(model):
        return ()
    fitted = f', fitted first for {schedule.glance_epochs} epochs' if fits_first(model, schedule) else ''
    return (
        f'the patches close in on what a glance of the first {glance_of(model).blocks} blocks finds{fitted} '
        '(--localizer cnn: they move one by one)',
    )


@contextmanager
def opened(run: Run) -> Iterator[None]:
    """Make the directory of a run, or open it again, and keep other processes out of it.

    Raises:
        OSError: it exists, cannot be made, or another process trains in it.
    """
    if not is_main():
        yield
        return
    if not run.resumed:
        create_run(run.directory, config_text(run.options))
    with locked(run.directory):
        yield


def _with_absolute_paths(given: dict[str, Any]) -> dict[str, Any]:
    """Options whose paths hold in any folder, so that --resume does."""
    names = [name for name in ('data', 'data_dir', 'class_map', 'checkpoint') if given.get(name) is not None]
    absolute = {name: str(Path(given[name]).resolve()) for name in names if is_path(given[name])}
    for name in ('model', 'teacher'):
        source, colon, path = str(given.get(name)).partition(':')
        if source == 'local-dir' and colon:
            absolute[name] = f'local-dir:{Path(path).resolve()}'
        elif name == 'teacher' and Path(source).is_file():
            absolute[name] = str(Path(source).resolve())
    return {**given, **absolute}


def _check_states(states: list[dict[str, Any] | None], splits: Splits) -> None:
    """Raise ValueError unless saved states are those of a training on the classes that the data have now."""
    for state in states:
        if state is not None and not (isinstance(state, dict) and state.keys() >= STATE_KEYS):
            raise ValueError(f'expected a saved state with {", ".join(sorted(STATE_KEYS))}, got another file')
        if state is not None and tuple(state['label_names']) != splits.label_names:
            raise ValueError(
                f'expected the classes that the run was trained on, {", ".join(state["label_names"])}, '
                f'got {", ".join(splits.label_names)}'
            )


def with_defaults(options: Options) -> Options:
    """Fill in the defaults that depend on other options."""
    embedded = options.data is None
    changes: dict[str, Any] = {}
    if options.model is None:
        changes['model'] = defaults.EMBEDDED_MODEL if embedded else 'apvit_small'
        if embedded:
            changes['model_kwargs'] = {**defaults.EMBEDDED_MODEL_KWARGS, **options.model_kwargs}
            usual = {
                'img_size': defaults.EMBEDDED_IMG_SIZE,
                'num_patches': defaults.EMBEDDED_NUM_PATCHES,
                'transform': defaults.EMBEDDED_TRANSFORM,
            }
            changes.update({name: value for name, value in usual.items() if name not in options.model_kwargs})
            changes.update({name: getattr(options, name) for name in usual if getattr(options, name) is not None})
    if embedded:
        usual = {'samples': defaults.EMBEDDED_SAMPLES, 'test_samples': defaults.EMBEDDED_TEST_SAMPLES}
        changes.update({name: value for name, value in usual.items() if getattr(options, name) is None})
    fine_tuned = _is_fine_tuned(options)
    epochs = options.epochs or (6 if embedded else 10)
    # A registered name: what was saved has a localiser of its own.
    chooses = options.localizer is None and 'localizer' not in options.model_kwargs and ':' not in str(options.model)
    of_vit = chooses and (options.pretrained or (options.checkpoint is not None and is_of_a_vit(options.checkpoint)))
    filled = {
        'localizer': 'glance' if of_vit else None,
        'glance_epochs': 10 if fine_tuned else 0,
        'twin': embedded,
        'epochs': epochs,
        'lr': 2e-4 if fine_tuned else 1e-3,
        'layer_decay': 0.75 if fine_tuned else 1.0,
        'warmup': epochs / 10,
    }
    changes.update({name: value for name, value in filled.items() if getattr(options, name) is None})
    return replace(options, **changes)


def _is_fine_tuned(options: Options) -> bool:
    """Whether the model comes with weights."""
    return options.pretrained or options.checkpoint is not None


def checked_device(device: str, amp: str | None) -> str:
    """The device, if it is there and computes in the data type.

    Raises:
        ValueError: it is not, or does not.
    """
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f'expected a device that is there, got {device!r}: {first_line(error)}') from None
    if amp == 'float16' and not device.startswith('cuda'):
        raise ValueError(f'expected --amp bfloat16 on {device!r}, got float16, which needs a CUDA GPU')
    return device


def _schedule(options: Options) -> Schedule:
    device = checked_device(local_device(options.device), options.amp)
    workers = options.workers
    if workers is None:
        workers = 0 if options.data is None else min(8, (os.cpu_count() or 1) // processes_here())
    settled: dict[str, Any] = {'device': device, 'workers': workers}
    schedule = Schedule(**{name: settled.get(name, getattr(options, name)) for name in Schedule._fields})
    check_epochs(schedule)
    return schedule


def _file_name(name: str | None) -> str:
    return ''.join(c if c.isalnum() or c in '._-' else '-' for c in str(name))
