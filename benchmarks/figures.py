"""Make pictures of photographs: train patches on them, then draw where these lie.

    python benchmarks/figures.py --weights vit_small_patch14_dinov2.safetensors [--run DIR]

The patches of DINOv2's ViT-S/14 learn from crops of scikit-image's photographs to lie where the dense model attends,
which is a matter of minutes on a CPU. A run that is there is drawn and not repeated.
"""

import argparse
from pathlib import Path

import numpy as np
from environment import counted
from numpy.typing import NDArray
from PIL import Image
from skimage import data

from timm_apvit.cli.main import main as timm_apvit
from timm_apvit.files import replacing
from timm_apvit.finetuning.checkpoints import snapshots
from timm_apvit.finetuning.models import load_model
from timm_apvit.pictures.figures import load_drawing
from timm_apvit.pictures.plots import animate_training, compare, plot_patches

FIGURES = Path(__file__).parent / 'figures'
PHOTOGRAPHS = ('astronaut', 'chelsea', 'coffee', 'rocket')
SIDE = 224
CROPS = {'train': 120, 'val': 10}  # of each photograph
SMALLEST = 0.4  # side of a crop, in those of the photograph's shorter side


def main() -> None:
    """Train if there is no run yet, then draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--weights', type=Path, help="DINOv2's ViT-S/14, for a run that is not there yet")
    parser.add_argument('--run', type=Path, default=Path('runs/photographs'))
    parser.add_argument('--threads', type=counted, default=1)
    parser.add_argument('--output', type=Path, default=FIGURES)
    options = parser.parse_args()
    photographs = {name: getattr(data, name)() for name in PHOTOGRAPHS}
    if not options.run.exists():
        if options.weights is None:
            parser.error(f'expected --weights, as there is no run in {options.run} yet')
        train(photographs, options.weights, options.run, options.threads)
    draw(photographs, options.run, options.output)


def train(photographs: dict[str, NDArray[np.uint8]], weights: Path, run: Path, threads: int) -> None:
    """Train patches on crops of photographs, which are to tell which photograph they are of."""
    folder = run.with_name(f'{run.name}-crops')
    generator = np.random.default_rng(0)
    for split, number in CROPS.items():
        for name, photograph in photographs.items():
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for n in range(number):
                crop(photograph, generator).save(folder / split / name / f'{n:03d}.png')
    status = timm_apvit(
        ['finetune', str(folder), '--model', 'apvit_small_patch14_dinov2', '--checkpoint', str(weights),
         '--localizer', 'cnn', '--img-size', str(SIDE), '--model-kwargs', 'max_shift=2', '--num-patches', '8x8',
         '--teacher', 'self', '--distill-weight', '0', '--attention-weight', '3', '--localizer-lr-scale', '10',
         '--epochs', '6', '--batch-size', '16', '--workers', '0', '--threads', str(threads),
         '--snapshots', '--output', str(run)]
    )  # fmt: skip
    if status:
        raise SystemExit(status)


def crop(photograph: NDArray[np.uint8], generator: np.random.Generator) -> Image.Image:
    """A square of a photograph at random, mirrored or not."""
    height, width = photograph.shape[:2]
    side = int(min(height, width) * generator.uniform(SMALLEST, 1))
    top, left = generator.integers(height - side + 1), generator.integers(width - side + 1)
    pixels = photograph[top : top + side, left : left + side]
    if generator.random() < 0.5:
        pixels = pixels[:, ::-1]
    return Image.fromarray(np.ascontiguousarray(pixels)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def draw(photographs: dict[str, NDArray[np.uint8]], run: Path, output: Path) -> None:
    """Draw the figures of a run."""
    model = load_model(str(run / 'last'))  # rather than the best: that is the first, which knows all classes already
    images, names = list(photographs.values()), list(photographs)
    models = ((epoch, load_model(str(folder))) for epoch, folder in snapshots(run).items())
    as_file = load_drawing().file_bytes
    drawn = {
        'photographs.png': as_file(plot_patches(model, images, titles=names), dpi=80),
        'budgets.png': as_file(compare(model, images[0], (16, 64, 196), panels=('outlines',)), dpi=80),
        'training.gif': animate_training(models, images[:2], titles=names[:2], panels=('outlines', 'coverage')),
    }
    for name, file in drawn.items():
        with replacing(output / name) as unfinished:
            unfinished.write_bytes(file)


if __name__ == '__main__':
    main()
