"""The datasets that timm reads by a name: torchvision's, those of the Hugging Face Hub, WebDataset's shards."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import create_dataset

from timm_apvit.failures import first_line
from timm_apvit.finetuning.data import AnySamples, SeededSamples, Stream
from timm_apvit.finetuning.folders import in_mode
from timm_apvit.finetuning.options import Options

# What begins the name of a timm dataset -> the package that reads it, and how to install that.
READERS: dict[str, tuple[str, str]] = {
    'hfds': ('datasets', "'timm-apvit[datasets]'"),
    'hfids': ('datasets', "'timm-apvit[datasets]'"),
    'wds': ('webdataset', "'timm-apvit[webdataset]'"),
    'tfds': ('tensorflow_datasets', 'tensorflow tensorflow-datasets'),
    'torch': ('torchvision', 'torchvision'),
}
STREAMS = ('hfids', 'wds', 'tfds')


def reader_of(data: str) -> str | None:
    """What reads the timm dataset of this name, ``'wds'`` for instance; None: it is a folder."""
    prefix, slash, _ = data.partition('/')
    return prefix.lower() if slash and prefix.lower() in READERS else None


def class_map(options: Options) -> dict[str, int] | None:
    """Numbers of the classes that --class-map names."""
    if options.class_map is None:
        return None
    path = Path(options.class_map)
    if not path.is_file():
        raise FileNotFoundError(f'expected a file of names of classes, got {str(path)!r}, which is not a file')
    names = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f'expected 2 or more names of classes in {path}, a line each and all different, got {names}')
    return {name: number for number, name in enumerate(names)}


def create_timm_dataset(options: Options, mode: str, is_training: bool) -> Any:
    """Make timm's dataset of one split, without transforms.

    Args:
        options: of the run.
        mode: Pillow's, of the images.
        is_training: the training split, shuffled if it is a stream.

    Raises:
        ValueError, OSError: it cannot be read.
    """
    name = str(options.data)
    split = options.train_split if is_training else options.val_split
    is_stream = reader_of(name) in STREAMS
    arguments = _stream_arguments(options, is_training) if is_stream else {}
    if reader_of(name) == 'torch':
        if options.data_dir is None:
            raise ValueError(f'expected --data-dir, the folder that holds the files of {name}, got none')
        arguments.update(root=options.data_dir, download=options.download)
    else:
        # timm joins the folder and the names of wds/ shards, which may be addresses.
        root = options.data_dir or ('' if reader_of(name) == 'wds' else None)
        arguments.update(root=root, input_img_mode=mode, input_key=options.image_key, target_key=options.target_key)
    try:
        with _without_warnings():
            dataset = create_dataset(name, split=split, **arguments)
        if reader_of(name) == 'wds':
            _check_shards_exist(dataset.reader)
    except FileNotFoundError:
        raise
    # Whatever reads them fails in its own ways: HTTP errors, assertions, KeyError, ...
    except Exception as error:
        length = '--train-samples' if is_training else '--val-samples'
        hint = f'; give {length} where the data do not say how many images they have' * is_stream
        raise ValueError(f'cannot read split {split!r} of {name}: {first_line(error)}{hint}') from error
    return dataset


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Keep timm from warning of a file that shards may have, and need not if their pattern is given."""
    logger = logging.getLogger('timm.data.readers.reader_wds')
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _stream_arguments(options: Options, is_training: bool) -> dict[str, Any]:
    """Arguments of timm's readers of streams."""
    number = options.train_samples if is_training else options.val_samples
    # timm seeds generators of 32 bits.
    arguments = {'is_training': is_training, 'seed': options.seed % 2**31, 'num_samples': number}
    return arguments if reader_of(str(options.data)) == 'wds' else {**arguments, 'download': options.download}


def _check_shards_exist(reader: Any) -> None:
    """Raise FileNotFoundError for a local shard that is not there, which would be left out with a warning only."""
    for name in reader.split_info.filenames:
        path = Path(reader.root, name)
        if not any(sign in name or sign in reader.root for sign in ('://', 'pipe:', '::')) and not path.is_file():
            raise FileNotFoundError(f'expected shards that exist, got {str(path)!r}: give --data-dir or a pattern')


def label_names_of(dataset: Any, options: Options) -> tuple[str, ...]:
    """Names of the classes: those of the map, or the dataset's own, or numbers.

    Raises:
        ValueError: nobody says how many classes there are, or not the same number.
    """
    names = tuple(class_map(options) or ()) or _own_names(dataset)
    if options.num_classes is not None and names and len(names) != options.num_classes:
        raise ValueError(f'expected --num-classes {len(names)}, as the data have, or none, got {options.num_classes}')
    names = names or tuple(map(str, range(options.num_classes or 0)))
    if len(names) < 2:
        raise ValueError(
            f'expected data of 2 classes or more, got {options.data}, which names {len(names)}: '
            'give --num-classes or --class-map'
        )
    return names


def _own_names(dataset: Any) -> tuple[str, ...]:
    """Names that a dataset has for its classes, in order of their numbers; none: it does not say."""
    numbers = getattr(getattr(dataset, 'reader', None), 'class_to_idx', None)
    if numbers:
        return tuple(map(str, sorted(numbers, key=numbers.__getitem__)))
    own: Any = getattr(dataset, 'classes', None) or getattr(dataset, 'all_categories', ())
    # torchvision's ImageNet has several names for a class, the first of which two classes may share.
    return tuple(each if isinstance(each, str) else ', '.join(map(str, each)) for each in own)


class _Transform:
    """Convert an image to a mode, then transform it: an object that worker processes can be sent."""

    def __init__(self, mode: str, transform: Any) -> None:
        self.mode = mode
        self.transform = transform

    def __call__(self, image: Image.Image) -> Any:
        return self.transform(in_mode(image, self.mode))


def samples_of(dataset: Any, transform: Any, options: Options, mode: str, names: tuple[str, ...]) -> AnySamples:
    """Samples of a timm dataset, transformed and with checked labels."""
    converted = _Transform(mode, transform)
    own_names = _own_names(dataset)
    if own_names and own_names != names:
        if unknown := sorted(set(own_names) - set(names)):
            raise ValueError(f'expected a --class-map of all classes of {options.data}, got none of {unknown[0]!r}')
        dataset.target_transform = [names.index(name) for name in own_names].__getitem__
    if reader_of(str(options.data)) not in STREAMS:
        if not len(dataset):
            raise ValueError(f'expected images, got none in {options.data}')
        dataset.transform = converted
        return SeededSamples(dataset, options.seed, len(names))
    reader = dataset.reader
    return Stream(dataset, reader.num_samples or 0, options.seed, converted, len(names), _number_of_shards(reader))


def _number_of_shards(reader: Any) -> int | None:
    """How many shards workers can share; None: as many as they want, or unknown."""
    if (info := getattr(reader, 'split_info', None)) is not None and hasattr(info, 'filenames'):
        return len(info.filenames)
    if hasattr(reader, 'builder') and hasattr(reader, 'split') and not getattr(reader, 'download', False):
        shards: int | None = getattr(reader.builder.as_streaming_dataset(split=reader.split), 'num_shards', None)
        return shards
    return None
