"""The prediction command: images and a model -> classes, their probabilities, and where the model looked."""

import argparse
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from timm.data import create_transform

from timm_apvit.cli.options import BATCH_SIZE, add_model, add_shared, load
from timm_apvit.failures import FailedError
from timm_apvit.files import check_writable, write_csv
from timm_apvit.finetuning.image_files import images_below
from timm_apvit.finetuning.values import number
from timm_apvit.hub.labels import class_names, probabilities
from timm_apvit.pictures.images import eight_bit, image_config, opened
from timm_apvit.results import aligned


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to a parser."""
    parser.add_argument('paths', nargs='+', metavar='PATH', help='images, and folders of them')
    add_model(parser)
    add = parser.add_argument
    add('--csv', metavar='FILE.csv', help='write the table there (default: print it)')
    add('--top-k', type=number(int, 1), metavar='K', help='classes of each image (default: 1)')
    add(
        '--multi-label',
        action='store_true',
        help='probabilities of classes that do not exclude each other (default: as the model says)',
    )
    add_shared(parser, 'num_patches', 'batch_size', 'threads', 'device')


def prepare(given: dict[str, Any]) -> Callable[[], None]:
    """Load the model, whose predictions the work prints or writes, a line for each image."""
    if 'csv' in given:
        check_writable(given['csv'])
    if missing := [each for each in given['paths'] if not Path(each).exists()]:
        raise FileNotFoundError(f'expected images and folders that exist, got {missing[0]!r}')
    paths = [path for each in given['paths'] for path in images_below(Path(each))]
    if not paths:
        raise ValueError(f'expected images in {", ".join(given["paths"])}, got none')
    model = load(given)
    if 'num_patches' in given:
        model.set_num_patches(given['num_patches'])
    if model.num_classes == 0:
        raise ValueError(f'expected a model with a classifier, got {given["model"]!r}, which has none')
    best = min(given.get('top_k', 1), model.num_classes)
    titles = ['image', *(f'{what}{n}' for n in range(1, best + 1) for what in ('class', 'probability'))]
    titles += ['x', 'y', 'half_extent']

    def work() -> None:
        left_out: list[str] = []
        rows = list(
            predictions(model, paths, best, given.get('batch_size', BATCH_SIZE), given.get('multi_label'), left_out)
        )
        if len(left_out) == len(paths):
            raise FailedError(f'{left_out[0]}; nothing was predicted')
        if 'csv' in given:
            write_csv(Path(given['csv']), [titles, *rows])
        else:
            sys.stdout.write(aligned(titles, rows) + '\n')
        if left_out:
            more = f' ({len(left_out)} of {len(paths)} are left out)'
            raise FailedError(left_out[0] + more)

    return work


@torch.inference_mode()
def predictions(
    model: Any,
    paths: list[Path],
    best: int,
    batch_size: int,
    multi_label: bool | None,
    left_out: list[str],
) -> Iterator[list[str]]:
    """A row for each image: path, classes and probabilities, and centre and half-extent of where the patches lie.

    Args:
        model: in eval mode.
        paths: of the images.
        best: number of classes of each image.
        batch_size: of the model.
        multi_label: whether classes do not exclude each other; None: as the model says.
        left_out: gets what is wrong with each image that cannot be read.
    """
    config = image_config(model)
    transform, names = create_transform(**config), class_names(model)
    device, left = next(model.parameters()).device, iter(paths)
    while candidates := list(islice(left, batch_size)):
        batch, images = [], []
        for path in candidates:
            try:
                with opened(path) as image:
                    images.append(transform(eight_bit(image, config['input_size'][0])))
                batch.append(path)
            except ValueError as error:
                left_out.append(str(error))
        if not batch:
            continue
        tokens = model.patch_embed(torch.stack(images).to(device))
        values, classes = probabilities(model, model(tokens), multi_label).topk(best)
        window = tokens.geometry.window
        for n, path in enumerate(batch):
            found = [
                word
                for p, c in zip(values[n].tolist(), classes[n].tolist(), strict=True)
                for word in (names[c], f'{p:.4f}')
            ]
            where = [0.0, 0.0, 1.0] if window is None else window[n].tolist()
            yield [str(path), *found, *(f'{value:.3f}' for value in where)]
