"""The export command: a run, a saved model, one of the Hub or a registered one -> a file, checked."""

import argparse
import sys
from collections.abc import Callable
from typing import Any

from timm_apvit.cli.options import add_shared, load
from timm_apvit.export import FORMATS, OLDEST_OPSET, OPSET, checked_format, export_model
from timm_apvit.failures import FailedError, explain
from timm_apvit.files import check_writable
from timm_apvit.finetuning.models import MODEL_HELP
from timm_apvit.finetuning.values import number
from timm_apvit.pictures.images import image_config

REMEDY = 'lower --num-patches or --img-size'
SETTINGS = ('img_size', 'opset', 'overwrite')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to a parser."""
    add = parser.add_argument
    add('model', metavar='MODEL', help=MODEL_HELP)
    add('-o', '--output', required=True, metavar='FILE', help='file to write: .onnx, or .pt2')
    add(
        '--format',
        choices=tuple(FORMATS),
        help='onnx; torch, for torch.export.load; aoti, compiled for processors like this one (default: by the ending, '
        'torch for .pt2)',
    )
    add('--opset', type=number(int, OLDEST_OPSET), help=f'of ONNX (default: {OPSET})')
    add('--overwrite', action='store_true', help='replace a file that is there (default: fail)')
    add_shared(parser, 'checkpoint', 'num_patches', 'img_size')


def prepare(given: dict[str, Any]) -> Callable[[], None]:
    """Load the model, which the work exports, telling what it takes and gives."""
    format, settings = given.get('format'), {name: given[name] for name in SETTINGS if name in given}
    if isinstance(settings.get('img_size'), int):
        settings['img_size'] = (settings['img_size'],) * 2
    # First what needs no model: it may take long to load.
    checked_format(given['output'], format, settings.get('opset', OPSET))
    check_writable(given['output'], settings.get('overwrite', False))
    model = load({**given, 'device': 'cpu'})
    if 'num_patches' in given:
        model.set_num_patches(given['num_patches'])

    def work() -> None:
        try:
            exported = export_model(model, given['output'], format, **settings)
        except (RuntimeError, MemoryError) as error:
            raise FailedError(f'{explain(error, REMEDY)}; nothing was written') from error
        config = image_config(model)
        size = 'x'.join(map(str, exported.img_size))
        mean, std = (', '.join(f'{value:g}' for value in config[key]) for key in ('mean', 'std'))
        sys.stdout.write(
            f'{exported.path}: images of {size} pixels, normalised by the mean '
            f'({mean}) and the standard deviation ({std}), in batches of any size -> {exported.output}\n{exported}\n'
        )

    return work
