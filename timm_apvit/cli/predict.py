"""The prediction command: images and a model -> classes, their probabilities, and where the model looked."""

import argparse
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from timm.data import create_transform

from timm_apvit.cli.evaluate import write_csv
from timm_apvit.failures import FailedError, explain, refusing
from timm_apvit.files import check_writable
from timm_apvit.finetuning.folders import images_below
from timm_apvit.finetuning.models import MODEL_HELP, load_model
from timm_apvit.finetuning.processes import check_device
from timm_apvit.finetuning.values import number, parse_budget
from timm_apvit.pictures.images import eight_bit, image_config, opened
from timm_apvit.results import aligned


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to a parser, which then returns only those that are given."""
    parser.argument_default = argparse.SUPPRESS
    parser.add_argument('paths', nargs='+', metavar='PATH', help='images, and folders of them')
    add = parser.add_argument
    add('--checkpoint', required=True, metavar='MODEL', help=MODEL_HELP)
    add('--csv', metavar='FILE', help='write the table there (default: print it)')
    add('--top-k', type=number(int, 1), metavar='K', help='classes of each image (default: 1)')
    add('--num-patches', type=parse_budget, metavar='N', help="number of patches, or GHxGW (default: the model's own)")
    add('--batch-size', type=number(int, 1), help='(default: 32)')
    add('--device', help='cpu, cuda, cuda:1, ... (default: cuda if there is one)')


def run(given: dict[str, Any]) -> None:
    """Predict, and print or write a line for each image."""
    with refusing():
        if 'csv' in given:
            check_writable(given['csv'])
        device = check_device(given.get('device') or ('cuda' if torch.cuda.is_available() else 'cpu'), None)
        if missing := [each for each in given['paths'] if not Path(each).exists()]:
            raise FileNotFoundError(f'expected images and folders that exist, got {missing[0]!r}')
        paths = [path for each in given['paths'] for path in images_below(Path(each))]
        if not paths:
            raise ValueError(f'expected images in {", ".join(given["paths"])}, got none')
        model = load_model(given['checkpoint']).to(device).eval()
        if model.num_classes == 0:
            raise ValueError(f'expected a model with a classifier, got {given["checkpoint"]!r}, which has none')
        if 'num_patches' in given:
            model.set_num_patches(given['num_patches'])
    best = min(given.get('top_k', 1), model.num_classes)
    titles = ['image', *(f'{what}{n}' for n in range(1, best + 1) for what in ('class', 'probability'))]
    try:
        rows = list(predictions(model, paths, best, given.get('batch_size', 32)))
    except (RuntimeError, MemoryError, ValueError, OSError) as error:
        raise FailedError(explain(error, 'lower --batch-size or --num-patches')) from error
    titles += ['x', 'y', 'half_extent']
    if 'csv' in given:
        write_csv(Path(given['csv']), [titles, *rows])
    else:
        sys.stdout.write(aligned(titles, rows) + '\n')


@torch.inference_mode()
def predictions(model: Any, paths: list[Path], best: int, batch_size: int) -> Iterator[list[str]]:
    """A row for each image: path, classes and probabilities, and centre and half-extent of where the patches lie.

    Raises:
        ValueError: an image that cannot be read.
    """
    config = image_config(model)
    keys = ('input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')
    transform = create_transform(**{key: config[key] for key in keys})
    names = model.pretrained_cfg.get('label_names') or [str(n) for n in range(model.num_classes)]
    device, left = next(model.parameters()).device, iter(paths)
    while batch := list(islice(left, batch_size)):
        images = []
        for path in batch:
            with opened(path) as image:
                images.append(transform(eight_bit(image, config['input_size'][0])))
        tokens = model.patch_embed(torch.stack(images).to(device))
        probabilities, classes = torch.softmax(model(tokens).float(), dim=1).topk(best)
        window = tokens.geometry.window
        for n, path in enumerate(batch):
            found = [
                word
                for p, c in zip(probabilities[n].tolist(), classes[n].tolist(), strict=True)
                for word in (names[c], f'{p:.4f}')
            ]
            where = [0.0, 0.0, 1.0] if window is None else window[n].tolist()
            yield [str(path), *found, *(f'{value:.3f}' for value in where)]
