"""Options of the data: where images come from, and how they are augmented."""

import argparse
from dataclasses import dataclass

from timm_apvit.finetuning.parsing import number

DATA_HELP = (
    'folder with train/ and val/ (or validation/, test/), each with one folder of images per class, or the name of a '
    'timm dataset: hfds/NAME, hfids/NAME, wds/, torch/NAME, tfds/NAME (a folder of such a name: ./wds); '
    'default: real digits among clutter, which need no network'
)


@dataclass(frozen=True)
class DataOptions:
    """Options of the data; None stands for the dataset's, the model's or timm's own."""

    data: str | None = None
    data_dir: str | None = None
    train_split: str = 'train'
    val_split: str = 'validation'
    train_samples: int | None = None
    val_samples: int | None = None
    num_classes: int | None = None
    class_map: str | None = None
    image_key: str | None = None
    target_key: str | None = None
    download: bool = False
    no_aug: bool = False
    aa: str | None = None
    reprob: float | None = None
    color_jitter: float | None = None
    hflip: float | None = None
    vflip: float | None = None
    scale: list[float] | None = None
    ratio: list[float] | None = None
    train_interpolation: str | None = None
    crop_pct: float | None = None


def add_data_arguments(parser: argparse.ArgumentParser, training: bool) -> None:
    """Add the options that say where images come from; those of training images only for training."""
    counted = number(int, 1)
    add = parser.add_argument_group('data: for timm datasets').add_argument
    add(
        '--data-dir',
        metavar='DIR',
        help='folder of the files, or of the cache (default: none, which hfds/ and hfids/ take for their own cache)',
    )
    if training:
        add(
            '--train-split',
            metavar='NAME',
            help='of training images; for wds/ a pattern of shards and their number of images will do: '
            "'train-{0000..0063}.tar|81920' (default: train, which most datasets have)",
        )
        add(
            '--train-samples',
            type=counted,
            metavar='N',
            help='training images of a stream, which make an epoch (default: as the data say; some do not)',
        )
    add('--val-split', metavar='NAME', help="of test images (default: validation, timm's own default)")
    add(
        '--val-samples',
        type=counted,
        metavar='N',
        help='test images of a stream that does not say how many (default: as it says; all are read in any case)',
    )
    add(
        '--num-classes',
        type=counted,
        metavar='N',
        help='number of classes (default: as the data say; wds/ does not)',
    )
    add(
        '--class-map',
        metavar='FILE',
        help="names of the classes, one a line, in order of their numbers; for folders too (default: the data's own)",
    )
    add('--image-key', metavar='NAME', help="field of the image (default: timm's: image; for wds/ jpg;png;webp)")
    add('--target-key', metavar='NAME', help="field of the class (default: timm's: label; for wds/ the .cls file)")
    add('--download', action='store_true', help='fetch torch/, hfids/ and tfds/ first (default: not, to touch no disk)')
    add(
        '--crop-pct',
        type=number(float, 0, 1, open_low=True),
        metavar='X',
        help="side of the central crop of a test image (default: the model's own, which its accuracy was measured at)",
    )


def add_augmentation_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of timm's augmentation, which need DATA."""
    share, positive = number(float, 0, 1), number(float, 0, open_low=True)
    add = parser.add_argument_group('augmentation: of DATA').add_argument
    add('--no-aug', action='store_true', help='resize and crop the centre only (default: not, as few images overfit)')
    add(
        '--aa',
        metavar='POLICY',
        help="timm's AutoAugment or RandAugment, such as rand-m9-mstd0.5-inc1, in place of the colour jitter "
        '(default: none, which suits short fine-tuning)',
    )
    add('--reprob', type=share, metavar='P', help='of erasing a random box (default: 0; long trainings profit from it)')
    add(
        '--color-jitter',
        type=number(float, 0),
        metavar='X',
        help="greatest change of brightness, contrast and saturation (default: 0.4, timm's); 0: none",
    )
    add('--hflip', type=share, metavar='P', help='of mirroring (default: 0.5; 0 where left and right differ: text)')
    add('--vflip', type=share, metavar='P', help='of turning upside down (default: 0; photographs have an up)')
    add(
        '--scale',
        type=positive,
        nargs=2,
        metavar=('MIN', 'MAX'),
        help="share of the image's area that a random crop takes (default: 0.08 1, as ImageNet is trained)",
    )
    add(
        '--ratio',
        type=positive,
        nargs=2,
        metavar=('MIN', 'MAX'),
        help='width to height of a random crop (default: 0.75 1.3333, as ImageNet is trained)',
    )
    add(
        '--train-interpolation',
        choices=('random', 'bilinear', 'bicubic', 'nearest', 'lanczos'),
        help="of training images (default: the model's own, as in the test)",
    )
