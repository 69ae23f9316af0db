"""Image files for tests, and how they are loaded."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from timm_apvit.finetuning.data import Splits
from timm_apvit.finetuning.options import Options
from timm_apvit.finetuning.sources import load_splits

CONFIG: dict[str, Any] = {
    'input_size': (3, 24, 24),
    'interpolation': 'bicubic',
    'mean': (0.5, 0.5, 0.5),
    'std': (0.5, 0.5, 0.5),
    'crop_pct': 1.0,
    'crop_mode': 'center',
}


def write_images(folder: Path, number: int, seed: int = 0) -> None:
    """Write random photographs-to-be of 32 x 40 pixels."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for n in range(number):
        Image.fromarray(rng.integers(256, size=(32, 40, 3), dtype=np.uint8)).save(folder / f'{n}.jpg')


def load_folder(folder: Path, seed: int = 0, config: dict[str, Any] = CONFIG, **options: Any) -> Splits:
    """Load a folder as the command does."""
    return load_splits(Options(data=str(folder), seed=seed, **options), config, workers=1)
