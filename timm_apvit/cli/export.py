"""The export command: a run, a saved model, one of the Hub or a registered one -> a file, checked."""

import argparse
import sys
from typing import Any

from timm_apvit.export import FORMATS, OLDEST_OPSET, OPSET, checked_format, export_model
from timm_apvit.failures import FailedError, one_line, refusing
from timm_apvit.files import check_writable
from timm_apvit.finetuning.models import load_model, load_weights
from timm_apvit.finetuning.values import number, parse_budget, parse_size
from timm_apvit.models.mixin import APViT
from timm_apvit.pictures.images import image_config

SETTINGS = ('img_size', 'opset', 'overwrite')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to a parser, which then returns only those that are given."""
    parser.argument_default = argparse.SUPPRESS
    parser.add_argument(
        'model',
        metavar='MODEL',
        help="folder of a run (its best model) or of a saved model, a model's name on the Hugging Face Hub, or a "
        "registered model's name (its pretrained weights)",
    )
    add = parser.add_argument
    add('--checkpoint', metavar='FILE', help='weights for a registered model (default: its pretrained ones)')
    add('-o', '--output', required=True, metavar='FILE', help='file to write: .onnx, or .pt2')
    add(
        '--format',
        choices=tuple(FORMATS),
        help='onnx; torch, for torch.export.load; aoti, compiled for processors like this one (default: by the ending, '
        'torch for .pt2)',
    )
    add('--num-patches', type=parse_budget, metavar='N', help="number of patches, or GHxGW (default: the model's own)")
    add('--img-size', type=parse_size, metavar='PIXELS', help="side of the images, or HxW (default: the model's own)")
    add('--opset', type=number(int, OLDEST_OPSET), help=f'of ONNX (default: {OPSET})')
    add('--overwrite', action='store_true', help='replace a file that is there (default: fail)')


def run(given: dict[str, Any]) -> None:
    """Export a model and tell what it takes and gives."""
    format, settings = given.get('format'), {name: given[name] for name in SETTINGS if name in given}
    if isinstance(settings.get('img_size'), int):
        settings['img_size'] = (settings['img_size'],) * 2
    with refusing():
        # First what needs no model: it may take long to load.
        checked_format(given['output'], format, settings.get('opset', OPSET))
        check_writable(given['output'], settings.get('overwrite', False))
        model = _load(given)
        try:
            exported = export_model(model, given['output'], format, **settings)
        except (RuntimeError, MemoryError) as error:
            raise FailedError(f'{one_line(error)}; nothing was written') from error
    config = image_config(model)
    size = 'x'.join(map(str, exported.img_size))
    mean, std = (', '.join(f'{value:g}' for value in config[key]) for key in ('mean', 'std'))
    sys.stdout.write(
        f'{exported.path}: images of {size} pixels, normalised by the mean '
        f'({mean}) and the standard deviation ({std}), in batches of any size -> {exported.output}\n{exported}\n'
    )


def _load(given: dict[str, Any]) -> APViT:
    """Load the model, with the number of patches that is asked for."""
    checkpoint = given.get('checkpoint')
    model = load_model(given['model']) if checkpoint is None else load_weights(given['model'], checkpoint)
    if 'num_patches' in given:
        model.set_num_patches(given['num_patches'])
    return model
