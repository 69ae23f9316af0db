"""The baseline of an APViT: the same ViT with as many tokens on a fixed grid, on the image made smaller.

A fixed grid of fewer tokens sees the whole image at a lower resolution. Adaptive patches are measured against that.
"""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

from timm.models import save_for_hf
from torch import Tensor, nn

from timm_apvit.hub.labels import kind_notes
from timm_apvit.models.adapting import vit_of
from timm_apvit.models.mixin import APViT
from timm_apvit.patching.deterministic import resize
from timm_apvit.pictures.images import normalisation_of

SOURCE_SIZE = 'source_size'  # key of config.json


def fixed_grid(model: APViT) -> tuple[int, int]:
    """Grid ``(gh, gw)`` of at least as many cells as the model has patches, of about the base grid's shape."""
    layout = model.patch_embed.layout
    base_h, base_w = (int(side) for side in model.patch_embed.grid_size)
    if layout is None:
        return base_h, base_w
    number = layout.num_patches
    if len(layout.grids) == 1 and number % layout.grids[0].rows == 0:
        grid: tuple[int, int] = layout.grids[0].grid
        return grid
    candidates = [(gh, math.ceil(number / gh)) for gh in range(1, number + 1)]

    def cost(grid: tuple[int, int]) -> tuple[float, float]:
        elongation = abs(math.log(grid[0] / grid[1] * base_w / base_h))
        # More elongated than 2 to 1 only if nothing else is left.
        return max(elongation - math.log(2), 0.0) * number + grid[0] * grid[1], elongation

    return min(candidates, key=cost)


def create_baseline(model: APViT) -> nn.Module:
    """Make the baseline of a model: timm's ViT with the model's own weights, which resizes its input.

    Args:
        model: its weights are copied; the position embedding is resampled to the smaller grid, as timm does it.

    Returns:
        A ViT of timm that takes the images ``(B, C, H, W)`` that the model takes.
    """
    grid, patch_size = fixed_grid(model), model.patch_embed.patch_size
    size = (grid[0] * patch_size[0], grid[1] * patch_size[1])
    vit: Any = vit_of(model)
    vit.set_input_size(img_size=size)
    vit.pretrained_cfg = {
        **vit.pretrained_cfg,
        **normalisation_of(model),
        'input_size': (vit.patch_embed.proj.in_channels, *size),
    }
    vit.source_size = tuple(model.patch_embed.img_size)
    return resizing(vit)


def resizing(vit: Any) -> nn.Module:
    """Let a ViT resize its images to its own size, in place."""
    vit.register_forward_pre_hook(partial(_resize_input, size=tuple(vit.patch_embed.img_size)))
    resized: nn.Module = vit
    return resized


def save_baseline(model: nn.Module, directory: Path, label_names: list[str], multi_label: bool = False) -> None:
    """Save a baseline for ``timm.create_model('local-dir:DIRECTORY', pretrained=True)``, a ViT that resizes nothing."""
    vit: Any = model
    config = {'label_names': label_names, 'num_classes': vit.num_classes, SOURCE_SIZE: list(vit.source_size)}
    vit.pretrained_cfg = {**vit.pretrained_cfg, 'notes': kind_notes(vit, multi_label)}
    args = {name: value for name, value in vit._model_args.items() if name not in ('num_classes', 'in_chans')}
    args |= {'img_size': list(vit.patch_embed.img_size), 'in_chans': vit.patch_embed.proj.in_channels}
    save_for_hf(vit, directory, model_config=config, model_args=args, safe_serialization=True)


def source_size(directory: Path) -> tuple[int, int] | None:
    """Size of the images that a saved baseline was trained on, and resized; None: it is no baseline."""
    path = directory / 'config.json'
    size = json.loads(path.read_text(encoding='utf-8')).get(SOURCE_SIZE) if path.is_file() else None
    return None if size is None else (int(size[0]), int(size[1]))


def _resize_input(_: nn.Module, args: tuple[Tensor, ...], size: tuple[int, int]) -> tuple[Tensor, ...]:
    """Resize ``(B, C, H, W)`` to ``(B, C, *size)`` with anti-aliasing, in front of a forward."""
    image, *others = args
    if image.shape[-2:] == size:
        return args
    return resize(image, list(size), 'bilinear'), *others
