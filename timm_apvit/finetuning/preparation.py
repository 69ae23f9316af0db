"""From options to settings: what depends on others is filled in, and what cannot be is refused before any work."""

import re
import time
from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from timm.optim import list_optimizers

from timm_apvit.finetuning.checkpoints import check_vacant
from timm_apvit.finetuning.config import resumed_settings, with_config
from timm_apvit.finetuning.models import check_checkpoint, folder_of, is_of_a_vit
from timm_apvit.finetuning.report import display_name
from timm_apvit.finetuning.samples import BatchSplit
from timm_apvit.finetuning.settings import FIELDS, SELF, Settings
from timm_apvit.finetuning.sources import EMBEDDED_SAMPLES, EMBEDDED_TEST_SAMPLES, check_data, is_path
from timm_apvit.finetuning.values import Budget, count, flag

# What trains without any argument: a model small enough for a CPU on images that need no network.
EMBEDDED_MODEL = 'test_apvit'
# Patches that only move read 0.88, 0.93 and 0.91 of the digits after 6 epochs (three seeds), those that also change in
# size 0.66 (the first of these); in colour and in batches of 64, as all of these figures are.
EMBEDDED: dict[str, Any] = {'img_size': 112, 'num_patches': ((4, 4),), 'transform': 'translation'}
EMBEDDED_MODEL_KWARGS: dict[str, Any] = {
    'embed_dim': 128,
    'depth': 4,
    'num_heads': 4,
    'max_shift': 1.5,
    # Digits are grey. Half of the usual side takes less time and names two of 100 more, half of the width less time.
    'in_chans': 1,
    'localizer': {'name': 'cnn', 'side': 32, 'width': 32},
    # Without these three a ViT this small takes several times as long to learn anything at all from scratch.
    'class_token': False,
    'global_pool': 'avg',
    'weight_init': 'jax',
}
ADDRESS = re.compile(r'\w+://|pipe:')
TEACHING = ('distill_weight', 'distill_temperature', 'token_weight', 'attention_weight')


def resolve_settings(given: dict[str, Any]) -> tuple[Settings, Path]:
    """The settings of a run, and its folder, from the options that were given; with ``resume`` those it has."""
    given = _with_absolute_paths(with_config(given))
    if given.get('checkpoint') is not None:
        check_checkpoint(given['checkpoint'])
    if given.get('resume') is not None:
        if given.get('output') is not None:
            raise ValueError('expected --output or --resume, got both')
        directory = Path(given['resume'])
        settings = resumed_settings(directory, given)
        check_settings(settings)
    else:
        settings = Settings(**given)
        check_settings(settings)
        settings = with_defaults(settings)
        name = ''.join(c if c.isalnum() or c in '._-' else '-' for c in display_name(str(settings.model)))
        directory = Path(settings.output or Path('runs', f'{name}-{time.strftime("%Y%m%d-%H%M%S")}'))
        check_vacant(directory)
    check_epochs(settings)
    return settings, directory


def with_defaults(settings: Settings) -> Settings:
    """Fill in the defaults that depend on other settings."""
    embedded = settings.data is None
    changes: dict[str, Any] = {}
    if settings.model is None:
        changes['model'] = EMBEDDED_MODEL if embedded else 'apvit_small'
        if embedded:
            own = {k: v for k, v in EMBEDDED_MODEL_KWARGS.items() if k != 'localizer' or settings.localizer is None}
            changes['model_kwargs'] = {**own, **settings.model_kwargs}
            open_ = [name for name in EMBEDDED if getattr(settings, name) is None and name not in settings.model_kwargs]
            changes.update({name: EMBEDDED[name] for name in open_})
    fine_tuned = settings.pretrained or settings.checkpoint is not None
    epochs = settings.epochs or (5 if embedded else 10)
    # A registered name: what was saved has a localiser of its own.
    chooses = settings.localizer is None and 'localizer' not in settings.model_kwargs and ':' not in str(settings.model)
    of_vit = chooses and (settings.pretrained or (settings.checkpoint is not None and is_of_a_vit(settings.checkpoint)))
    may_glance = settings.localizer in (None, 'glance') and (of_vit or not chooses)
    filled = {
        'localizer': 'glance' if of_vit else None,
        'glance_epochs': 10 if fine_tuned and may_glance and settings.freeze_localizer_epochs == 0 else 0,
        'twin': embedded,
        'monitor': 'test_map' if settings.multi_label else 'test_top1',
        'epochs': epochs,
        'batch_size': 32 if embedded else settings.images_of_update,
        'lr': 2e-4 if fine_tuned else 1e-3,
        'layer_decay': 0.75 if fine_tuned else 1.0,
        'warmup': epochs / (10 if fine_tuned else 5),
        'samples': EMBEDDED_SAMPLES if embedded else None,
        'test_samples': EMBEDDED_TEST_SAMPLES if embedded else None,
    }
    changes.update({name: value for name, value in filled.items() if getattr(settings, name) is None})
    return replace(settings, **changes)


def check_settings(settings: Settings) -> None:
    """Raise ValueError if settings that were given exclude each other."""
    given, usual, mixes = settings, Settings(), bool(settings.mixup or settings.cutmix)
    balanced = given.class_weights == 'balanced'
    changed = {name for name in FIELDS if getattr(given, name) != getattr(usual, name)}
    both = [name for name in ('num_patches', 'transform', 'img_size', 'jitter', 'localizer')
            if name in changed and name in given.model_kwargs]  # fmt: skip
    of_digits = [name for name in ('samples', 'test_samples') if name in changed]
    of_a_push = [name for name in ('private', 'push_picture') if name in changed]
    of_teachers = [name for name in TEACHING if name in changed]
    near = get_close_matches(given.opt.lower(), list_optimizers(), n=3, cutoff=0)
    for wrong, message in (
        (given.pretrained and given.checkpoint is not None,
         'expected --pretrained or --checkpoint, got both: each says where the weights come from'),
        (given.data is not None and of_digits,
         f'expected {_first(of_digits)} without DATA only, whose images count themselves, got {_first(of_digits)} with '
         'DATA'),
        (both, f'expected {_first(both)} or {both[0] if both else ""} among --model-kwargs, got both'),
        ('num_classes' in given.model_kwargs,
         'expected the number of classes of the data, got num_classes among --model-kwargs'),
        (of_a_push and given.push_to_hub is None,
         f'expected --push-to-hub with {"--private" if given.private else "--no-push-picture"}, got none'),
        (given.glance_epochs and given.localizer not in (None, 'glance'),
         f'expected --localizer glance with --glance-epochs, got {given.localizer}'),
        (given.glance_epochs and given.freeze_localizer_epochs,
         'expected --glance-epochs or --freeze-localizer-epochs, got both'),
        (of_teachers and given.teacher is None, f'expected --teacher with {_first(of_teachers)}, got none'),
        (given.teacher is not None and given.multi_label, 'expected --teacher without --multi-label, got both'),
        (given.opt.lower() not in list_optimizers(),
         f'expected --opt of one of the optimisers of timm, such as {", ".join(near)}, got {given.opt!r}'),
        (given.jitter_epochs is not None and not given.jitter,
         'expected a --jitter above 0 for --jitter-epochs to lower, got none'),
        ('mixup_prob' in changed and not mixes, 'expected --mixup or --cutmix with --mixup-prob, got neither'),
        (balanced and mixes, 'expected --class-weights balanced without --mixup and --cutmix, got both'),
        (balanced and given.balanced_sampling,
         'expected --class-weights balanced or --balanced-sampling, got both: each makes up for the other'),
        ((given.mean is None) != (given.std is None), 'expected --mean with --std, got one of them'),
        (given.monitor == ('test_top1' if given.multi_label else 'test_map'),
         f'expected a --monitor that is measured, test_loss or the default, got {given.monitor}'),
    ):  # fmt: skip
        if wrong:
            raise ValueError(message)
    check_data(settings)


def _first(names: Sequence[str]) -> str:
    return flag(names[0]) if names else ''


def check_epochs(settings: Settings) -> None:
    """Raise ValueError if something is to last longer than the training."""
    epochs = settings.epochs or 0
    if (settings.warmup or 0) >= epochs:
        began = '' if settings.resume is None else ', a warmup that the run began with'
        raise ValueError(f'expected --warmup below --epochs, got {settings.warmup:g} of {epochs}{began}')
    for name in ('freeze_backbone_epochs', 'freeze_localizer_epochs', 'jitter_epochs'):
        value = getattr(settings, name)
        if value is not None and value > epochs:
            raise ValueError(f'expected {flag(name)} of at most --epochs, got {value} of {epochs}')


def check_batches(settings: Settings, samples: int, split: BatchSplit) -> None:
    """Raise ValueError unless batches divide evenly into micro-batches, and these into pairs if images are mixed."""
    batch = min(settings.images_of_update, samples)
    mixes = settings.mixup > 0 or settings.cutmix > 0
    unit = split.parts * (2 if mixes else 1)
    if batch % unit or batch < unit:
        pairs = ', in pairs for --mixup and --cutmix' if mixes else ''
        few = f' (there are {samples} training images)' if samples < settings.images_of_update else ''
        raise ValueError(
            f'expected a --batch-size that divides by {unit}: {split.world} processes x {split.accumulated} of '
            f'--grad-accum{pairs}, got {batch}{few}'
        )


def check_budgets(budgets: Sequence[Budget] | None, pixels: int) -> None:
    """Raise ValueError if patches would by far outnumber the pixels of an image."""
    most = max(map(count, budgets or (1,)))
    if most > pixels:
        raise ValueError(f'expected --num-patches of at most the {pixels} pixels of an image, got {most}')


def _with_absolute_paths(given: dict[str, Any]) -> dict[str, Any]:
    """Options whose paths hold in any folder, so that --resume does; a folder of a model is taken for the model."""
    names = [name for name in ('data', 'data_dir', 'class_map', 'checkpoint') if given.get(name) is not None]
    paths = [name for name in names if (is_path(given[name]) if name == 'data' else not ADDRESS.match(given[name]))]
    absolute = {name: str(Path(given[name]).resolve()) for name in paths}
    for name in ('model', 'teacher'):
        value = given.get(name)
        if value is None or (name == 'teacher' and value == SELF):
            continue
        if name == 'teacher' and Path(value).is_file():
            absolute[name] = str(Path(value).resolve())
        elif (folder := folder_of(value)) is not None:
            absolute[name] = f'local-dir:{folder.absolute()}'  # whatever its links come to mean
    return {**given, **absolute}
