"""Where images come from: folders, the datasets that timm reads, or embedded digits."""

from pathlib import Path
from typing import Any

from timm.data import create_transform

from timm_apvit.failures import one_line, require
from timm_apvit.finetuning.digits import load_embedded_digits
from timm_apvit.finetuning.image_files import ImageFiles, find_splits, find_test
from timm_apvit.finetuning.samples import Samples, SeededSamples, Splits
from timm_apvit.finetuning.settings import OF_AUGMENTATION, OF_DATA, Settings
from timm_apvit.finetuning.streams import READERS, STREAMS, Stream, create_timm_dataset, own_label_names, reader_of
from timm_apvit.finetuning.values import flag
from timm_apvit.pictures.images import eight_bit

# Names that timm has for some of ours.
THEIRS = {'aa': 'auto_augment', 'reprob': 're_prob', 'train_interpolation': 'interpolation'}
EMBEDDED_SAMPLES, EMBEDDED_TEST_SAMPLES = 8_000, 1_000
IMAGES = {'mean', 'std'}  # options that embedded digits take too
OF_STREAMS = {'train_samples', 'val_samples'}
KEYS = {'image_key', 'target_key'}
OF_TIMM_DATASETS = OF_STREAMS | KEYS | {'num_classes', 'download', 'train_split', 'val_split'}


def is_path(data: str) -> bool:
    """Whether DATA is the path of a folder, rather than the name of a dataset or an address."""
    return reader_of(data) is None and '://' not in data


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
    """
    check_data(settings)
    if settings.data is None:
        shape, mean, std = (data_config[key] for key in ('input_size', 'mean', 'std'))
        lengths = settings.samples or EMBEDDED_SAMPLES, settings.test_samples or EMBEDDED_TEST_SAMPLES
        return load_embedded_digits(settings.seed, shape, *lengths, mean, std)
    in_chans = data_config['input_size'][0]
    if in_chans not in (1, 3):
        raise ValueError(f'expected in_chans of 1 or 3 for image files, got {in_chans}')
    transforms = create_transforms(settings, data_config)[testing:]
    made: list[Any]
    if reader_of(settings.data) is None:
        numbers = class_map(settings)
        if testing and numbers is None and label_names is not None:
            numbers = {name: number for number, name in enumerate(label_names)}
        find: Any = find_test if testing else find_splits
        found = find(Path(settings.data), numbers, workers, settings.multi_label)
        files: list[ImageFiles] = [found] if testing else list(found)
        for each, transform in zip(files, transforms, strict=True):
            each.in_chans, each.transform = in_chans, transform
        made, names = [SeededSamples(each, settings.seed) for each in files], tuple(files[0].class_to_idx)
        test_name = files[-1].source.stem
    else:
        test_name = settings.val_split
        datasets = [create_timm_dataset(settings, training) for training in ([False] if testing else [True, False])]
        names = _label_names(datasets[0], settings)
        made = [
            _samples(dataset, _Transform(in_chans, transform), settings, names)
            for dataset, transform in zip(datasets, transforms, strict=True)
        ]
    return Splits(made[0], made[-1], names, settings.multi_label, test_name)


def check_data(settings: Settings) -> None:
    """Raise ValueError if options of the data contradict each other, ModuleNotFoundError if their reader is missing."""
    usual = Settings()
    given = {name for name in [*OF_DATA, *OF_AUGMENTATION] if getattr(settings, name) != getattr(usual, name)}
    kind = None if settings.data is None else reader_of(settings.data)
    if settings.data is None:
        needless, what = given - IMAGES, 'embedded digits, made as they are'
    elif kind is None:
        needless, what = given & (OF_TIMM_DATASETS | {'data_dir'}), 'a folder or an address'
    else:
        of_others = (OF_STREAMS if kind not in STREAMS else set()) | (KEYS if kind == 'torch' else set())
        needless, what = given & (of_others | {'multi_label'}), settings.data
    if needless:
        raise ValueError(f'expected DATA that {_flags(needless)} can be given for, got {what}')
    if settings.no_aug and (others := given & (set(OF_AUGMENTATION) - {'no_aug', 'train_interpolation'})):
        raise ValueError(f'expected --no-aug or {_flags(others)}, got both')
    for name in ('scale', 'ratio'):
        low, high = getattr(settings, name) or (0, 1)
        if low > high:
            raise ValueError(f'expected --{name} MIN MAX with MIN <= MAX, got {low:g} {high:g}')
    if kind is not None:
        require(READERS[kind][0], f'a {kind}/ dataset', READERS[kind][1])


def create_transforms(settings: Settings, data_config: dict[str, Any]) -> tuple[Any, Any]:
    """Make timm's transforms for training and for the test."""
    augmentation = {THEIRS.get(name, name): getattr(settings, name) for name in OF_AUGMENTATION}
    given = {name: value for name, value in augmentation.items() if value is not None and value is not False}
    if settings.color_jitter == 0:
        given['color_jitter'] = None  # as timm spells it
    try:
        made = create_transform(**{**data_config, **given}, is_training=True), create_transform(**data_config)
    # timm asserts, and looks policies up in dictionaries.
    except Exception as error:
        values = ', '.join(f'{name}={value!r}' for name, value in given.items())
        raise ValueError(f'cannot make the augmentation of {values}: {one_line(error)}') from error
    # What has no number, and names no set of transforms, timm passes over without a word.
    sections = [part for part in (settings.aa or '').split('-')[1:] if not part.startswith('t')]
    if any(not any(sign.isdecimal() for sign in part) for part in sections):
        raise ValueError(f'expected --aa of sections such as rand-m9-mstd0.5-inc1, got {settings.aa!r}')
    return made


def class_map(settings: Settings) -> dict[str, int] | None:
    """Numbers of the classes that --class-map names."""
    if settings.class_map is None:
        return None
    path = Path(settings.class_map)
    if not path.is_file():
        raise FileNotFoundError(f'expected a file of names of classes, got {str(path)!r}, which is not a file')
    try:
        lines = path.read_text(encoding='utf-8-sig').splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f'expected names of classes in UTF-8, got another encoding in {path}: {error}') from None
    names = [line.strip() for line in lines if line.strip()]
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f'expected 2 or more names of classes in {path}, a line each and all different, got {names}')
    return {name: number for number, name in enumerate(names)}


class _Transform:
    """Convert an image to what a model takes, then transform it: an object that worker processes can be sent."""

    def __init__(self, in_chans: int, transform: Any) -> None:
        self.in_chans, self.transform = in_chans, transform

    def __call__(self, image: Any) -> Any:
        return self.transform(eight_bit(image, self.in_chans))


def _samples(dataset: Any, transform: Any, settings: Settings, names: tuple[str, ...]) -> Samples:
    """Samples of a timm dataset, transformed and with checked labels."""
    own_names = own_label_names(dataset)
    if own_names and own_names != names:
        if unknown := sorted(set(own_names) - set(names)):
            raise ValueError(f'expected a --class-map of all classes of {settings.data}, got none of {unknown[0]!r}')
        dataset.target_transform = [names.index(name) for name in own_names].__getitem__
    if reader_of(str(settings.data)) in STREAMS:
        return Stream(dataset, settings.seed, transform, len(names))
    if not len(dataset):
        raise ValueError(f'expected images, got none in {settings.data}')
    dataset.transform = transform
    return SeededSamples(dataset, settings.seed, len(names))


def _label_names(dataset: Any, settings: Settings) -> tuple[str, ...]:
    """Names of the classes: those of the map, or the dataset's own, or numbers."""
    names = tuple(class_map(settings) or ()) or own_label_names(dataset)
    if settings.num_classes is not None and names and len(names) != settings.num_classes:
        raise ValueError(f'expected --num-classes {len(names)}, as the data have, or none, got {settings.num_classes}')
    names = names or tuple(map(str, range(settings.num_classes or 0)))
    if len(names) < 2:
        raise ValueError(
            f'expected data of 2 classes or more, got {settings.data}, which names {len(names)}: '
            'give --num-classes or --class-map'
        )
    return names


def _flags(names: set[str]) -> str:
    """Names of options as they are given."""
    return ', '.join(sorted(map(flag, names)))
