"""Where images come from: folders, the datasets that timm reads, or embedded digits."""

import importlib.util
from dataclasses import fields
from pathlib import Path
from typing import Any

from timm.data import create_transform

from timm_apvit.failures import first_line
from timm_apvit.finetuning.data import SeededSamples, Splits
from timm_apvit.finetuning.data_options import DataOptions
from timm_apvit.finetuning.digits import load_embedded_digits
from timm_apvit.finetuning.folders import find_folders, find_test_folder
from timm_apvit.finetuning.options import EMBEDDED_SAMPLES, EMBEDDED_TEST_SAMPLES, Options
from timm_apvit.finetuning.parsing import flag
from timm_apvit.finetuning.timm_datasets import (
    READERS,
    STREAMS,
    class_map,
    create_timm_dataset,
    label_names_of,
    reader_of,
    samples_of,
)

FOLDER_NAMES = ('imagefolder', 'folder')
AUGMENTATION = {
    'no_aug': 'no_aug',
    'aa': 'auto_augment',
    'reprob': 're_prob',
    'color_jitter': 'color_jitter',
    'hflip': 'hflip',
    'vflip': 'vflip',
    'scale': 'scale',
    'ratio': 'ratio',
    'train_interpolation': 'interpolation',
}
OF_STREAMS = {'train_samples', 'val_samples'}
KEYS = {'image_key', 'target_key'}
OF_TIMM_DATASETS = OF_STREAMS | KEYS | {'num_classes', 'download', 'train_split', 'val_split'}


def is_path(data: str) -> bool:
    """Whether DATA is the path of a folder, rather than the name of a dataset or an address."""
    return reader_of(data) is None and data.lower() not in FOLDER_NAMES and '://' not in data


def load_splits(options: Options, data_config: dict[str, Any], workers: int) -> Splits:
    """Load what the options name, for training and test.

    Args:
        options: of the run.
        data_config: what timm's `resolve_data_config` returns for the model.
        workers: threads that check the images of a folder.

    Raises:
        ValueError, OSError: the data are not as they should be, or options contradict each other.
        ModuleNotFoundError: a package that reads them is missing.
    """
    check(options)
    if options.data is None:
        return load_digits(options, data_config)
    train_transform, test_transform = create_transforms(options, data_config)
    if reader_of(options.data) is None:
        class_to_idx = class_map(options)
        train, test = find_folders(_folder(options), _mode(data_config), class_to_idx, max(1, workers))
        train.transform, test.transform = train_transform, test_transform
        return Splits(SeededSamples(train, options.seed), SeededSamples(test, options.seed), tuple(train.class_to_idx))
    mode = _mode(data_config)
    train_data, test_data = (create_timm_dataset(options, mode, is_training) for is_training in (True, False))
    names = label_names_of(train_data, options)
    return Splits(
        samples_of(train_data, train_transform, options, mode, names),
        samples_of(test_data, test_transform, options, mode, names),
        names,
    )


def load_test(
    options: Options, data_config: dict[str, Any], workers: int, label_names: tuple[str, ...] | None
) -> Splits:
    """Load what the options name, for a test only: both splits are the test's.

    Args:
        options: as for `load_splits`.
        data_config: as for `load_splits`.
        workers: as for `load_splits`.
        label_names: those that the model was trained on, where they are known: a folder of such names is numbered
            by them.

    Raises:
        ValueError, OSError, ModuleNotFoundError: as for `load_splits`.
    """
    check(options)
    if options.data is None:
        return load_digits(options, data_config)
    transform = create_transforms(options, data_config)[1]
    mode = _mode(data_config)
    if reader_of(options.data) is None:
        class_to_idx = class_map(options)
        if class_to_idx is None and label_names is not None:
            class_to_idx = {name: number for number, name in enumerate(label_names)}
        files = find_test_folder(_folder(options), mode, class_to_idx, max(1, workers))
        files.transform = transform
        names, samples = tuple(files.class_to_idx), SeededSamples(files, options.seed)
        return Splits(samples, samples, names)
    dataset = create_timm_dataset(options, mode, is_training=False)
    names = label_names_of(dataset, options)
    test = samples_of(dataset, transform, options, mode, names)
    return Splits(test, test, names)


def load_digits(options: Options, data_config: dict[str, Any]) -> Splits:
    """Load the embedded digits for images of this size and normalisation."""
    input_size, mean, std = (data_config[key] for key in ('input_size', 'mean', 'std'))
    lengths = options.samples or EMBEDDED_SAMPLES, options.test_samples or EMBEDDED_TEST_SAMPLES
    return load_embedded_digits(options.seed, input_size, *lengths, mean, std)


def check(options: Options) -> None:
    """Raise ValueError if options of the data contradict each other, ModuleNotFoundError if their reader is missing."""
    defaults = Options()
    given = {name for name in vars(options) if getattr(options, name) != getattr(defaults, name)}
    kind = None if options.data is None else reader_of(options.data)
    if options.data is None:
        needless, what = given & {field.name for field in fields(DataOptions)}, 'embedded digits, made as they are'
    elif kind is None:
        needless, what = given & (OF_TIMM_DATASETS | ({'data_dir'} if is_path(options.data) else set())), 'a folder'
    else:
        of_others = (OF_STREAMS if kind not in STREAMS else set()) | (KEYS if kind == 'torch' else set())
        needless, what = given & of_others, options.data
    if needless:
        raise ValueError(f'expected DATA that {flags(needless)} can be given for, got {what}')
    if options.no_aug and (others := given & (set(AUGMENTATION) - {'no_aug', 'train_interpolation'})):
        raise ValueError(f'expected --no-aug or {flags(others)}, got both')
    for name in ('scale', 'ratio'):
        low, high = getattr(options, name) or (0, 1)
        if low > high:
            raise ValueError(f'expected --{name} MIN MAX with MIN <= MAX, got {low:g} {high:g}')
    if kind is not None:
        module, package = READERS[kind]
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(f'a {kind}/ dataset needs {module}: pip install {package}')


def flags(names: set[str]) -> str:
    """Names of options as they are given."""
    return ', '.join(sorted(map(flag, names)))


def create_transforms(options: Options, data_config: dict[str, Any]) -> tuple[Any, Any]:
    """Make timm's transforms for training and for the test.

    Raises:
        ValueError: timm does not take the augmentation.
    """
    config = {key: data_config[key] for key in ('input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')}
    if options.crop_pct is not None:
        config['crop_pct'] = options.crop_pct
    augmentation = {theirs: getattr(options, ours) for ours, theirs in AUGMENTATION.items()}
    given = {name: value for name, value in augmentation.items() if value is not None and value is not False}
    if options.color_jitter == 0:
        given['color_jitter'] = None  # as timm spells it
    try:
        return create_transform(**{**config, **given}, is_training=True), create_transform(**config)
    # timm asserts, and looks policies up in dictionaries.
    except Exception as error:
        values = ', '.join(f'{name}={value!r}' for name, value in given.items())
        raise ValueError(f'cannot make the augmentation of {values}: {first_line(error)}') from error


def _mode(data_config: dict[str, Any]) -> str:
    """Pillow's mode for the channels that a model takes."""
    channels = data_config['input_size'][0]
    if channels not in (1, 3):
        raise ValueError(f'expected in_chans of 1 or 3 for image files, got {channels}')
    return 'L' if channels == 1 else 'RGB'


def _folder(options: Options) -> Path:
    """The folder that DATA or, for ``ImageFolder``, --data-dir names."""
    data = str(options.data)
    if is_path(data):
        return Path(data)
    if options.data_dir is None:
        raise ValueError(f'expected --data-dir with {data}, got none')
    return Path(options.data_dir)
