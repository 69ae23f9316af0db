"""The command that draws what a model looks at: images and a model -> a picture, an animation or both."""

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from timm_apvit.failures import FailedError, explain, refusing
from timm_apvit.files import check_writable, replacing
from timm_apvit.finetuning.folder import BEST, LAST, snapshots
from timm_apvit.finetuning.models import load_model
from timm_apvit.finetuning.processes import check_device
from timm_apvit.finetuning.values import number, parse_num_patches
from timm_apvit.models.mixin import APViT
from timm_apvit.pictures.figures import PANELS, load_drawing
from timm_apvit.pictures.plots import COLOURED_BY, animate, animate_training, compare, plot_patches, read_images

DPI = 150
MOST_FRAMES = 48  # of an animation over a training


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to a parser, which then returns only those that are given."""
    parser.argument_default = argparse.SUPPRESS
    parser.add_argument('images', nargs='+', metavar='IMAGE', help='files that Pillow reads, of any size')
    add = parser.add_argument
    add(
        '--checkpoint',
        required=True,
        metavar='MODEL',
        help="folder of a run (its best model) or of a saved model, a model's name on the Hugging Face Hub, or a "
        "registered model's name (its pretrained weights)",
    )
    add(
        '--num-patches',
        type=parse_num_patches,
        metavar='N[,N...]',
        help="number of patches, or GHxGW; several are compared (default: the model's own)",
    )
    add('-o', '--output', metavar='FILE', help='picture to write: .png, .jpg, .pdf, .svg, ...')
    add(
        '--animate',
        metavar='FILE.gif',
        help='animation to write: over the training, of a run that kept --snapshots; else, or with several numbers of '
        "patches, over these (default: a sixteenth to all of the model's own)",
    )
    add(
        '--panels',
        type=_parse_panels,
        metavar='PANEL[,...]',
        help=f'what to draw of each image, among {", ".join(PANELS)} (default: image,fixed,adaptive,outlines; '
        'outlines,adaptive to compare or animate)',
    )
    add(
        '--color-by',
        choices=COLOURED_BY,
        help='colour of an outline: by the order of the patches, so that neighbours differ, or by the attention that '
        'each receives from the class token (default: order)',
    )
    add(
        '--img-size',
        type=number(int, 1),
        metavar='PIXELS',
        help='longer side that images are resized to (default: their own, at most 1024)',
    )
    add('--device', help='cpu, cuda, cuda:1, ... (default: cuda if there is one)')


def run(given: dict[str, Any]) -> None:
    """Draw, and tell which files were written."""
    with refusing():
        outputs = check_outputs(given)
        device = check_device(given.get('device') or ('cuda' if torch.cuda.is_available() else 'cpu'), None)
        model = load_model(given['checkpoint']).to(device).eval()
        try:
            drawn = draw(model, given)
        except (MemoryError, RuntimeError) as error:
            raise FailedError(explain(error, 'lower --num-patches or --img-size')) from error
        for path in outputs:
            with replacing(path) as unfinished:
                unfinished.write_bytes(drawn[path])
    sys.stdout.write(''.join(f'{path}\n' for path in outputs))


def check_outputs(given: dict[str, Any]) -> list[Path]:
    """The files to write, which can be written as far as one can tell before.

    Raises:
        OSError: one cannot be written.
        ValueError: none is asked for, or one is of an unknown ending, or an image that is drawn.
        ModuleNotFoundError: matplotlib is not installed.
    """
    load_drawing()
    from matplotlib.backend_bases import FigureCanvasBase

    known = {'output': sorted(FigureCanvasBase.get_supported_filetypes()), 'animate': ['gif']}
    options = {'output': '--output', 'animate': '--animate'}
    outputs = []
    for name, endings in known.items():
        if name not in given:
            continue
        path = Path(given[name])
        if path.suffix[1:].lower() not in endings:
            raise ValueError(f'expected {options[name]} to end in .{", .".join(endings)}, got {given[name]!r}')
        check_writable(path)
        if any(_same_file(path, Path(image)) for image in given['images']):
            raise ValueError(f'expected {options[name]} to be another file than the images, got {given[name]!r}')
        outputs.append(path)
    if len(outputs) == 2 and _same_file(*outputs):
        raise ValueError(f'expected --output and --animate to be two files, got {given["output"]!r} for both')
    if not outputs:
        raise ValueError('expected --output FILE, --animate FILE.gif or both, got neither')
    return outputs


def _same_file(first: Path, second: Path) -> bool:
    """Whether two paths are of one file, by whatever links, or would be once it is written."""
    return first.resolve() == second.resolve() or (first.exists() and second.exists() and first.samefile(second))


def draw(model: APViT, given: dict[str, Any]) -> dict[Path, bytes]:
    """Draw what the options ask for: the files as bytes, by their paths.

    Raises:
        FileNotFoundError, ValueError: bad input.
    """
    images = read_images(model, given['images'], given.get('img_size'))
    budgets = given.get('num_patches')
    style: dict[str, Any] = {key: given[key] for key in ('panels', 'color_by') if key in given}
    style['titles'] = [Path(image).name for image in given['images']]
    drawn = {}
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Glyph')  # of file names in a script that matplotlib's font does not have
        if 'output' in given:
            several = budgets is not None and len(budgets) > 1
            budget = None if budgets is None else budgets[0]
            figure = (
                compare(model, images, budgets, **style) if several else plot_patches(model, images, budget, **style)
            )
            path = Path(given['output'])
            drawn[path] = load_drawing().file_bytes(figure, path.suffix[1:].lower(), DPI)
        if 'animate' in given:
            kept = {} if budgets is not None and len(budgets) > 1 else _snapshots(given['checkpoint'])
            device = next(model.parameters()).device
            models = ((epoch, load_model(str(folder)).to(device)) for epoch, folder in kept.items())
            if not kept and budgets is not None and len(budgets) == 1:
                raise ValueError(
                    f'expected several numbers of patches to animate, or a run with --snapshots, got {budgets[0]}'
                )
            drawn[Path(given['animate'])] = (
                animate_training(models, images, budgets and budgets[0], **style)
                if kept
                else animate(model, images, budgets, **style)
            )
    return drawn


def _snapshots(name: str) -> dict[str, Path]:
    """Models that a run kept of its training, at most `MOST_FRAMES`, evenly apart; none where it kept no others."""
    found = list(snapshots(Path(name)).items())
    frames = min(len(found), MOST_FRAMES)
    if len(found) <= len({(Path(name) / link).resolve() for link in (BEST, LAST)}):
        return {}
    return dict(found[round(n * (len(found) - 1) / (frames - 1))] for n in range(frames))


def _parse_panels(text: str) -> tuple[str, ...]:
    """Parse names of panels between commas."""
    panels = tuple(part.strip() for part in text.split(','))
    if not set(panels) <= set(PANELS):
        raise argparse.ArgumentTypeError(f'expected panels among {", ".join(PANELS)}, got {text!r}')
    return panels
