"""Where images come from: folders, the datasets that timm reads, or embedded digits."""

import importlib.util
from pathlib import Path
from typing import Any

from timm.data import create_transform

from timm_apvit.failures import one_line
from timm_apvit.finetuning.batches import Splits
from timm_apvit.finetuning.digits import load_embedded_digits
from timm_apvit.finetuning.folders import find_folders, find_test_folder
from timm_apvit.finetuning.samples import SeededSamples
from timm_apvit.finetuning.settings import OF_AUGMENTATION, OF_DATA, Settings, default_of
from timm_apvit.finetuning.streams import (
    READERS,
    STREAMS,
    class_map,
    create_timm_dataset,
    label_names_of,
    reader_of,
    samples_of,
)
from timm_apvit.finetuning.values import flag

FOLDER_NAMES = ('imagefolder', 'folder')
# Names that timm has for some of ours.
THEIRS = {'aa': 'auto_augment', 'reprob': 're_prob', 'train_interpolation': 'interpolation'}
EMBEDDED_SAMPLES, EMBEDDED_TEST_SAMPLES = 8_000, 1_000
OF_STREAMS = {'train_samples', 'val_samples'}
KEYS = {'image_key', 'target_key'}
OF_TIMM_DATASETS = OF_STREAMS | KEYS | {'num_classes', 'download', 'train_split', 'val_split'}


def is_path(data: str) -> bool:
    """Whether DATA is the path of a folder, rather than the name of a dataset or an address."""
    return reader_of(data) is None and data.lower() not in FOLDER_NAMES and '://' not in data


def load_splits(
    settings: Settings,
    data_config: dict[str, Any],
    workers: int = 0,
    testing: bool = False,
    label_names: tuple[str, ...] | None = None,
) -> Splits:
    """Load what the settings name.

    Args:
        settings: of the run.
        data_config: what timm's `resolve_data_config` returns for the model.
        workers: threads that look at the images of a folder.
        testing: whether to load the test images only, which are then both splits.
        label_names: of a test: those that the model was trained on, by which a folder of such names is numbered.

    Raises:
        ValueError, OSError: the data are not as they should be, or options contradict each other.
        ModuleNotFoundError: a package that reads them is missing.
    """
    check_data(settings)
    if settings.data is None:
        shape, mean, std = (data_config[key] for key in ('input_size', 'mean', 'std'))
        lengths = settings.samples or EMBEDDED_SAMPLES, settings.test_samples or EMBEDDED_TEST_SAMPLES
        return load_embedded_digits(settings.seed, shape, *lengths, mean, std)
    in_chans = data_config['input_size'][0]
    if in_chans not in (1, 3):
        raise ValueError(f'expected in_chans of 1 or 3 for image files, got {in_chans}')
    transforms = create_transforms(settings, data_config)
    if reader_of(settings.data) is None:
        numbers = class_map(settings)
        if testing:
            if numbers is None and label_names is not None:
                numbers = {name: number for number, name in enumerate(label_names)}
            found = [find_test_folder(_folder(settings), in_chans, numbers, workers)]
        else:
            found = list(find_folders(_folder(settings), in_chans, numbers, workers))
        for files, transform in zip(found, transforms[1:] if testing else transforms, strict=True):
            files.transform = transform
        samples = [SeededSamples(files, settings.seed) for files in found]
        return Splits(samples[0], samples[-1], tuple(found[0].class_to_idx))
    datasets = [create_timm_dataset(settings, is_training) for is_training in ([False] if testing else [True, False])]
    names = label_names_of(datasets[0], settings)
    made = [
        samples_of(dataset, transform, settings, in_chans, names)
        for dataset, transform in zip(datasets, transforms[1:] if testing else transforms, strict=True)
    ]
    return Splits(made[0], made[-1], names)


def check_data(settings: Settings) -> None:
    """Raise ValueError if options of the data contradict each other, ModuleNotFoundError if their reader is missing."""
    given = {name for name in [*OF_DATA, *OF_AUGMENTATION] if getattr(settings, name) != default_of(name)} - {'data'}
    kind = None if settings.data is None else reader_of(settings.data)
    if settings.data is None:
        needless, what = given - {'mean', 'std'}, 'embedded digits, made as they are'
    elif kind is None:
        needless, what = given & (OF_TIMM_DATASETS | ({'data_dir'} if is_path(settings.data) else set())), 'a folder'
    else:
        of_others = (OF_STREAMS if kind not in STREAMS else set()) | (KEYS if kind == 'torch' else set())
        needless, what = given & of_others, settings.data
    if needless:
        raise ValueError(f'expected DATA that {_flags(needless)} can be given for, got {what}')
    if settings.no_aug and (others := given & (set(OF_AUGMENTATION) - {'no_aug', 'train_interpolation'})):
        raise ValueError(f'expected --no-aug or {_flags(others)}, got both')
    for name in ('scale', 'ratio'):
        low, high = getattr(settings, name) or (0, 1)
        if low > high:
            raise ValueError(f'expected --{name} MIN MAX with MIN <= MAX, got {low:g} {high:g}')
    if kind is not None:
        module, package = READERS[kind]
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(f'a {kind}/ dataset needs {module}: pip install {package}')


def _flags(names: set[str]) -> str:
    """Names of options as they are given."""
    return ', '.join(sorted(map(flag, names)))


def create_transforms(settings: Settings, data_config: dict[str, Any]) -> tuple[Any, Any]:
    """Make timm's transforms for training and for the test.

    Raises:
        ValueError: timm does not take the augmentation.
    """
    config = {key: data_config[key] for key in ('input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')}
    config |= {key: getattr(settings, key) for key in ('mean', 'std', 'crop_pct') if getattr(settings, key) is not None}
    augmentation = {THEIRS.get(name, name): getattr(settings, name) for name in OF_AUGMENTATION}
    given = {name: value for name, value in augmentation.items() if value is not None and value is not False}
    if settings.color_jitter == 0:
        given['color_jitter'] = None  # as timm spells it
    try:
        made = create_transform(**{**config, **given}, is_training=True), create_transform(**config)
    # timm asserts, and looks policies up in dictionaries.
    except Exception as error:
        values = ', '.join(f'{name}={value!r}' for name, value in given.items())
        raise ValueError(f'cannot make the augmentation of {values}: {one_line(error)}') from error
    # What has no number, and names no set of transforms, timm passes over without a word.
    sections = [part for part in (settings.aa or '').split('-')[1:] if not part.startswith('t')]
    if any(not any(sign.isdecimal() for sign in part) for part in sections):
        raise ValueError(f'expected --aa of sections such as rand-m9-mstd0.5-inc1, got {settings.aa!r}')
    return made


def _folder(settings: Settings) -> Path:
    """The folder that DATA or, for ``ImageFolder``, --data-dir names."""
    data = str(settings.data)
    if is_path(data):
        return Path(data)
    if settings.data_dir is None:
        raise ValueError(f'expected --data-dir with {data}, got none')
    return Path(settings.data_dir)
