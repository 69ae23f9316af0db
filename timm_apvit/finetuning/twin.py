"""The fixed-grid twin of an APViT: the same ViT with as many tokens, on the image made smaller.

A fixed grid of fewer tokens sees the whole image at a lower resolution. Adaptive patches are measured against that.
"""

import inspect
import math
from functools import partial
from typing import Any

import timm
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from timm_apvit.apvit import vit_name
from timm_apvit.hub import reconstruction_args
from timm_apvit.vision_transformer import ADAPTIVE_KEYS, APViT

ADAPTIVE_ARGS = frozenset(
    name for name, p in inspect.signature(APViT).parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY
)


def fixed_grid(model: APViT) -> tuple[int, int]:
    """Grid ``(gh, gw)`` of at least as many cells as the model has patches, of about the base grid's shape."""
    layout = model.patch_embed.layout
    base_h, base_w = model.patch_embed.grid_size
    if layout is None:
        return base_h, base_w
    number, rows = layout
    if number % rows == 0:
        return rows, number // rows
    candidates = [(gh, math.ceil(number / gh)) for gh in range(1, number + 1)]

    def cost(grid: tuple[int, int]) -> tuple[float, float]:
        elongation = abs(math.log(grid[0] / grid[1] * base_w / base_h))
        # More elongated than 2 to 1 only if nothing else is left.
        return max(elongation - math.log(2), 0.0) * number + grid[0] * grid[1], elongation

    return min(candidates, key=cost)


def create_twin(model: APViT, **model_kwargs: Any) -> nn.Module:
    """Make the fixed-grid twin of a model: timm's ViT with the model's own weights, which resizes its input.

    Args:
        model: its weights are copied; the position embedding is resampled to the smaller grid, as timm does it.
        model_kwargs: those that the model was made with; the adaptive ones are left out.

    Returns:
        A timm ``VisionTransformer`` that takes the images ``(B, C, H, W)`` that the model takes.
    """
    grid = fixed_grid(model)
    patch_size = model.patch_embed.patch_size
    size = (grid[0] * patch_size[0], grid[1] * patch_size[1])
    wanted = {**reconstruction_args(model), **model_kwargs, 'img_size': size, 'num_classes': model.num_classes}
    kwargs = {name: value for name, value in wanted.items() if name not in ADAPTIVE_ARGS}
    vit: nn.Module = timm.create_model(vit_name(model.pretrained_cfg['architecture']), **kwargs)
    weights = {k: v for k, v in model.state_dict().items() if not k.startswith(ADAPTIVE_KEYS)}
    if 'pos_embed' in weights:
        # timm's checkpoint filter takes every grid of another model for a square one.
        weights['pos_embed'] = resample_abs_pos_embed(
            weights['pos_embed'],
            new_size=list(grid),
            old_size=list(model.patch_embed.grid_size),
            num_prefix_tokens=0 if model.no_embed_class else model.num_prefix_tokens,
        )
    vit.load_state_dict(weights)
    vit.register_forward_pre_hook(partial(_resize_input, size=size))
    return vit


def _resize_input(_: nn.Module, args: tuple[Tensor, ...], size: tuple[int, int]) -> tuple[Tensor, ...]:
    """Resize ``(B, C, H, W)`` to ``(B, C, *size)`` with anti-aliasing, in front of a forward."""
    image, *others = args
    if image.shape[-2:] == size:
        return args
    return F.interpolate(image, size, mode='bilinear', antialias=True, align_corners=False), *others
