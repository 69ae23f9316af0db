"""From options to settings: what depends on others is filled in, and what cannot be is refused before any work."""

import time
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from timm.optim import list_optimizers

from timm_apvit.finetuning.batches import Division
from timm_apvit.finetuning.config import resumed_settings, with_config
from timm_apvit.finetuning.folder import check_vacant
from timm_apvit.finetuning.models import is_of_a_vit
from timm_apvit.finetuning.settings import Settings
from timm_apvit.finetuning.sources import EMBEDDED_SAMPLES, EMBEDDED_TEST_SAMPLES, check_data, is_path
from timm_apvit.finetuning.values import count, flag
from timm_apvit.hub.access import check_access

# What trains without any argument: a model small enough for a CPU on images that need no network.
EMBEDDED_MODEL = 'test_apvit'
# Patches that only move read 0.88, 0.93 and 0.91 of the digits after 6 epochs (three seeds), those that also change in
# size 0.66 (the first of these).
EMBEDDED: dict[str, Any] = {'img_size': 112, 'num_patches': ((4, 4),), 'transform': 'translation'}
EMBEDDED_MODEL_KWARGS: dict[str, Any] = {
    'embed_dim': 128,
    'depth': 4,
    'num_heads': 4,
    'max_shift': 1.5,
    # Without these three a ViT this small takes several times as long to learn anything at all from scratch.
    'class_token': False,
    'global_pool': 'avg',
    'weight_init': 'jax',
}
TEACHING = ('distill_weight', 'distill_temperature', 'token_weight', 'attention_weight')


def settle(given: dict[str, Any]) -> tuple[Settings, Path]:
    """The settings of a run, and its folder, from the options that were given; with ``resume`` those it has.

    Raises:
        ValueError, OSError: bad input.
    """
    given = _with_absolute_paths(with_config(given))
    if given.get('resume') is not None:
        if given.get('output') is not None:
            raise ValueError('expected --output or --resume, got both')
        directory = Path(given['resume'])
        settings = resumed_settings(directory, given)
    else:
        settings = Settings(**given)
        check_settings(settings)
        settings = with_defaults(settings)
        name = ''.join(c if c.isalnum() or c in '._-' else '-' for c in str(settings.model))
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
            changes['model_kwargs'] = {**EMBEDDED_MODEL_KWARGS, **settings.model_kwargs}
            open_ = [name for name in EMBEDDED if getattr(settings, name) is None and name not in settings.model_kwargs]
            changes.update({name: EMBEDDED[name] for name in open_})
    fine_tuned = settings.pretrained or settings.checkpoint is not None
    epochs = settings.epochs or (6 if embedded else 10)
    # A registered name: what was saved has a localiser of its own.
    chooses = settings.localizer is None and 'localizer' not in settings.model_kwargs and ':' not in str(settings.model)
    of_vit = chooses and (settings.pretrained or (settings.checkpoint is not None and is_of_a_vit(settings.checkpoint)))
    filled = {
        'localizer': 'glance' if of_vit else None,
        'glance_epochs': 10 if fine_tuned and settings.localizer in (None, 'glance') else 0,
        'twin': embedded,
        'epochs': epochs,
        'lr': 2e-4 if fine_tuned else 1e-3,
        'layer_decay': 0.75 if fine_tuned else 1.0,
        'warmup': epochs / 10,
        'samples': EMBEDDED_SAMPLES if embedded else None,
        'test_samples': EMBEDDED_TEST_SAMPLES if embedded else None,
    }
    changes.update({name: value for name, value in filled.items() if getattr(settings, name) is None})
    return replace(settings, **changes)


def check_settings(settings: Settings) -> None:
    """Raise ValueError if settings that were given exclude each other."""
    usual = Settings()
    if settings.pretrained and settings.checkpoint is not None:
        raise ValueError('expected --pretrained or --checkpoint, got both: each says where the weights come from')
    for name in ('samples', 'test_samples'):
        if settings.data is not None and getattr(settings, name) is not None:
            given = f'{flag(name)} without DATA only, whose images count themselves'
            raise ValueError(f'expected {given}, got {flag(name)} with DATA')
    for name in ('num_patches', 'transform', 'img_size', 'jitter', 'localizer'):
        if getattr(settings, name) is not None and name in settings.model_kwargs:
            raise ValueError(f'expected {flag(name)} or {name} among --model-kwargs, got both')
    if 'num_classes' in settings.model_kwargs:
        raise ValueError('expected the number of classes of the data, got num_classes among --model-kwargs')
    for name in ('private', 'push_picture'):
        if getattr(settings, name) != getattr(usual, name) and settings.push_to_hub is None:
            shown = flag(name) if name == 'private' else '--no-push-picture'
            raise ValueError(f'expected --push-to-hub with {shown}, got none')
    _check_training(settings, usual)
    check_data(settings)


def _check_training(settings: Settings, usual: Settings) -> None:
    """Raise ValueError if settings of what is learnt exclude each other."""
    if settings.glance_epochs and settings.localizer not in (None, 'glance'):
        raise ValueError(f'expected --localizer glance with --glance-epochs, got {settings.localizer}')
    terms = [name for name in TEACHING if getattr(settings, name) != getattr(usual, name)]
    if settings.teacher is None and terms:
        raise ValueError(f'expected --teacher with {flag(terms[0])}, got none')
    if settings.opt.lower() not in list_optimizers():
        near = ', '.join(get_close_matches(settings.opt.lower(), list_optimizers(), n=3, cutoff=0))
        raise ValueError(f'expected --opt of one of the optimisers of timm, such as {near}, got {settings.opt!r}')
    if settings.jitter_epochs is not None and not settings.jitter:
        raise ValueError('expected a --jitter above 0 for --jitter-epochs to lower, got none')
    if settings.mixup_prob != usual.mixup_prob and not (settings.mixup or settings.cutmix):
        raise ValueError('expected --mixup or --cutmix with --mixup-prob, got neither')
    if settings.class_weights == 'balanced' and (settings.mixup or settings.cutmix):
        raise ValueError('expected --class-weights balanced without --mixup and --cutmix, got both')
    if settings.class_weights == 'balanced' and settings.balanced_sampling:
        raise ValueError(
            'expected --class-weights balanced or --balanced-sampling, got both: each makes up for the other'
        )
    if (settings.mean is None) != (settings.std is None):
        raise ValueError('expected --mean with --std, got one of them')


def check_destination(settings: Settings) -> None:
    """Ask the Hub, without writing, whether the model can be pushed to where the settings say.

    Raises:
        ValueError: a malformed name.
        OSError: the Hub does not answer, or does not let this token write there.
    """
    if settings.push_to_hub is not None:
        check_access(settings.push_to_hub)


def check_epochs(settings: Settings) -> None:
    """Raise ValueError if something is to last longer than the training."""
    epochs = settings.epochs or 0
    if (settings.warmup or 0) >= epochs:
        raise ValueError(f'expected --warmup below --epochs, got {settings.warmup:g} of {epochs}')
    for name in ('freeze_backbone_epochs', 'freeze_localizer_epochs', 'jitter_epochs'):
        value = getattr(settings, name)
        if value is not None and value > epochs:
            raise ValueError(f'expected {flag(name)} of at most --epochs, got {value} of {epochs}')


def check_batches(settings: Settings, samples: int, division: Division) -> None:
    """Raise ValueError unless batches divide evenly into micro-batches, and these into pairs if images are mixed."""
    batch = min(settings.batch_size, samples)
    mixes = settings.mixup > 0 or settings.cutmix > 0
    unit = division.parts * (2 if mixes else 1)
    if batch % unit or batch < unit:
        pairs = ', in pairs for --mixup and --cutmix' if mixes else ''
        few = f' (there are {samples} training images)' if samples < settings.batch_size else ''
        raise ValueError(
            f'expected a --batch-size that divides by {unit}: {division.world} processes x {division.accumulated} of '
            f'--grad-accum{pairs}, got {batch}{few}'
        )


def check_budgets(settings: Settings, pixels: int) -> None:
    """Raise ValueError if patches would by far outnumber the pixels of an image."""
    most = max(map(count, settings.num_patches or (1,)))
    if most > pixels:
        raise ValueError(f'expected --num-patches of at most the {pixels} pixels of an image, got {most}')


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
