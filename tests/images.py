"""Image files for tests, and how they are loaded."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from timm_apvit.finetuning.samples import Splits
from timm_apvit.finetuning.settings import Settings
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


# For tests whose readers of datasets leave files to the garbage collector, and whose many workers have nothing to do.
QUIET = [
    pytest.mark.filterwarnings('ignore:unclosed file:ResourceWarning'),
    pytest.mark.filterwarnings('ignore:This DataLoader will create:UserWarning'),
    pytest.mark.usefixtures('collected_files'),
]


@pytest.fixture(scope='module')
def collected_files() -> Iterator[None]:
    """Have the files of a module's tests closed while their warnings are ignored."""
    yield
    gc.collect()


def load(**options: Any) -> Splits:
    """Load data by options, as the command does."""
    return load_splits(Settings(**options), CONFIG, workers=1)


def load_folder(folder: Path, seed: int = 0, config: dict[str, Any] = CONFIG, **options: Any) -> Splits:
    """Load a folder as the command does."""
    return load_splits(Settings(data=str(folder), seed=seed, **options), config, workers=1)
