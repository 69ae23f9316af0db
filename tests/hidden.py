"""A small task that a coarse grid fails: a fine pattern in one place of a noisy image, of six that name it."""

from typing import Any

import timm
import torch
from torch import Tensor, nn

SIDE, CELL, CLASSES = 64, 8, 6
# Of 512 images in batches of 32 at a constant rate; whether five epochs do depends on the order of the images.
EPOCHS = 7
UPDATES = EPOCHS * 512 // 32


def hidden_patterns(number: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Images ``(n, 3, 64, 64)``, labels ``(n,)``, and the centres (x, y) of the patterns, normalised, ``(n, 2)``.

    Stripes and chequers are a pixel wide, dark or bright first: averages of two pixels know nothing of them.
    """
    generator = torch.Generator().manual_seed(seed)
    images = 0.1 * torch.randn(number, 3, SIDE, SIDE, generator=generator)
    labels = torch.randint(CLASSES, (number,), generator=generator)
    places = torch.randint(SIDE // CELL, (number, 2), generator=generator)
    columns = (torch.arange(CELL) % 2 * 2.0 - 1).expand(CELL, CELL)
    patterns = [columns, columns.T, columns * columns.T]
    patterns += [-pattern for pattern in patterns]
    for image, label, (row, column) in zip(images, labels.tolist(), (CELL * places).tolist(), strict=True):
        image[:, row : row + CELL, column : column + CELL] += patterns[label]
    return images, labels, (2 * places.flip(1) + 1) * CELL / SIDE - 1


def small_model(localizer: Any = None, **kwargs: Any) -> nn.Module:
    """A model from scratch, of four patches, that is to find them by a glance."""
    torch.manual_seed(0)
    glance = {'name': 'glance', 'blocks': 1, 'grid': 8}
    arguments = {'img_size': SIDE, 'num_patches': 4, 'num_classes': CLASSES, 'localizer': localizer or glance, **kwargs}
    return timm.create_model('test_apvit', **arguments).train()


def assert_finds(model: Any, named: bool = True) -> None:
    """The windows of new images hold the patterns, and most are small; so it names them.

    Of one class it may see that there is none of the others, in the whole image.
    """
    images, labels, centres = hidden_patterns(100, seed=1)
    with torch.no_grad():
        window = model.eval().patch_geometry(images).window
        right = (model(images).argmax(dim=1) == labels).float().mean()
    assert ((centres - window[:, :2]).abs() < window[:, 2:]).all(dim=1).float().mean() > 0.9
    assert window[:, 2].mean() < 0.6
    assert not named or right > 0.9
