"""The command that draws what a model looks at: images and a model -> a picture, an animation or both."""

import argparse
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from timm_apvit.cli.options import add_model, add_shared, load
from timm_apvit.files import check_writable, write_atomically
from timm_apvit.finetuning.checkpoints import VERSIONS
from timm_apvit.finetuning.config import read_mapping, run_folder
from timm_apvit.finetuning.image_files import images_below
from timm_apvit.finetuning.models import load_model
from timm_apvit.finetuning.settings import CONFIG_FILE
from timm_apvit.finetuning.values import number, parse_num_patches
from timm_apvit.models.mixin import APViT
from timm_apvit.pictures.figures import PANELS, check_picture, load_drawing
from timm_apvit.pictures.plots import COLOURED_BY, animate, animate_training, compare, plot_patches, read_images
from timm_apvit.pictures.views import at_rest

DPI = 150
MOST_FRAMES = 48  # of an animation over a training

_logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to a parser."""
    parser.add_argument('images', nargs='+', metavar='IMAGE', help='files that Pillow reads, of any size, and folders')
    add_model(parser)
    add = parser.add_argument
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
    add_shared(parser, 'device')


def prepare(given: dict[str, Any]) -> Callable[[], None]:
    """Load the model and the images, which the work draws, telling which files were written."""
    paths = [str(path) for each in given['images'] for path in images_below(Path(each))]
    if not paths:
        raise ValueError(f'expected images in {", ".join(given["images"])}, got none')
    outputs = check_outputs(given, paths)
    budgets = given.get('num_patches')
    kept: dict[str, Path] = {}
    if 'animate' in given and (budgets is None or len(budgets) == 1):
        kept = kept_snapshots(given['model'])
        if not kept and budgets is None and (run_folder(given['model']) / CONFIG_FILE).is_file():
            _logger.warning('%s kept no --snapshots: the animation is over numbers of patches.', given['model'])
        if not kept and budgets is not None:
            raise ValueError(
                f'expected several numbers of patches to animate, or a run with --snapshots, got {budgets[0]}'
            )
    model = load(given)
    for budget in budgets or ():  # that it can have them
        with at_rest(model, budget):
            pass
    images = read_images(model, paths, given.get('img_size'))
    style: dict[str, Any] = {key: given[key] for key in ('panels', 'color_by') if key in given}
    style['titles'] = [Path(path).name for path in paths]

    def work() -> None:
        drawn = draw(model, images, given, kept, style)
        for path in outputs:
            write_atomically(path, drawn[path])
        sys.stdout.write(''.join(f'{path}\n' for path in outputs))

    return work


def check_outputs(given: dict[str, Any], images: list[str]) -> list[Path]:
    """The files to write, which can be written as far as one can tell before."""
    outputs = []
    for name, endings in (('output', ()), ('animate', ('gif',))):
        if name not in given:
            continue
        check_picture(f'--{name}', given[name], endings)
        path = Path(given[name])
        check_writable(path)
        if any(_same_file(path, Path(image)) for image in images):
            raise ValueError(f'expected --{name} to be another file than the images, got {given[name]!r}')
        outputs.append(path)
    if len(outputs) == 2 and _same_file(*outputs):
        raise ValueError(f'expected --output and --animate to be two files, got {given["output"]!r} for both')
    if not outputs:
        raise ValueError('expected --output FILE, --animate FILE.gif or both, got neither')
    return outputs


def _same_file(first: Path, second: Path) -> bool:
    """Whether two paths are of one file, by whatever links, or would be once it is written."""
    return first.resolve() == second.resolve() or (first.exists() and second.exists() and first.samefile(second))


def draw(
    model: APViT, images: list[Tensor], given: dict[str, Any], kept: dict[str, Path], style: dict[str, Any]
) -> dict[Path, bytes]:
    """Draw what the options ask for: the files as bytes, by their paths."""
    budgets, drawn = given.get('num_patches'), {}
    several = budgets is not None and len(budgets) > 1
    first = None if budgets is None else budgets[0]
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Glyph')  # of file names in a script that matplotlib's font does not have
        if 'output' in given:
            figure = (
                compare(model, images, budgets, **style) if several else plot_patches(model, images, first, **style)
            )
            path = Path(given['output'])
            drawn[path] = load_drawing().file_bytes(figure, path.suffix[1:].lower(), DPI)
        if 'animate' in given:
            device = next(model.parameters()).device
            models = ((epoch, load_model(str(folder)).to(device)) for epoch, folder in kept.items())
            drawn[Path(given['animate'])] = (
                animate_training(models, images, first, **style) if kept else animate(model, images, budgets, **style)
            )
    return drawn


def kept_snapshots(name: str) -> dict[str, Path]:
    """Models that a run kept of its training, at most `MOST_FRAMES`, evenly apart; none where it kept no others."""
    run = run_folder(name)
    found = [path.parent for path in sorted((run / VERSIONS).glob('[!.]*/config.json'))]
    frames = min(len(found), MOST_FRAMES)
    if frames < 2 or not read_mapping(run / CONFIG_FILE).get('snapshots'):
        return {}
    return {path.name: path for path in (found[round(n * (len(found) - 1) / (frames - 1))] for n in range(frames))}


def _parse_panels(text: str) -> tuple[str, ...]:
    """Parse names of panels between commas."""
    panels = tuple(part.strip() for part in text.split(','))
    if not set(panels) <= set(PANELS):
        raise argparse.ArgumentTypeError(f'expected panels among {", ".join(PANELS)}, got {text!r}')
    return panels
