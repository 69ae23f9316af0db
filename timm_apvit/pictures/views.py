"""What a model sees of an image, ready to be drawn: its patches, their outlines, the attention to them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from timm_apvit.models.attention import attends, calls_of, patch_attention
from timm_apvit.models.mixin import APViT, check_apvit, in_eval_mode
from timm_apvit.patching.anchors import Layout, NumPatches, Rows
from timm_apvit.patching.sampling import mip_pyramid
from timm_apvit.pictures.images import image_config

# Enough for a curved side to look smooth.
POINTS_PER_SIDE = 12


class PatchView(NamedTuple):
    """What a model sees of an image.

    Convention:
        Points are (x, y) in pixels, (0, 0) is the image's top-left corner, y points down. Pixels are in [0, 1].

    Attributes:
        pixels: what the patches tile, ``(H, W, 3)``: the image, padded or cropped if the model does that.
        layout: of the anchors.
        fixed: patches of a fixed grid of as many, ``(N, P_h, P_w, 3)``.
        patches: as the network takes them, ``(N, P_h, P_w, 3)``.
        outlines: closed, clockwise from the patch's own top-left corner, ``(N, 4 * POINTS_PER_SIDE + 1, 2)``.
        centres: ``(N, 2)``.
        window: outline of where the anchors were put, ``(5, 2)``; None: all over the image.
        leaves: of a quadtree, centres and half-extents ``(N, 2)`` that the patches started from; None: no crowd.
        attention: that each patch receives, 1 being an even share, ``(N,)``; None: not asked for.
    """

    pixels: Tensor
    layout: Layout
    fixed: Tensor
    patches: Tensor
    outlines: Tensor
    centres: Tensor
    window: Tensor | None
    leaves: tuple[Tensor, Tensor] | None
    attention: Tensor | None


@torch.no_grad()
def view_patches(
    model: APViT, image: Tensor, num_patches: NumPatches | None = None, attention: bool = False
) -> PatchView:
    """Run a model on an image ``(C, H, W)`` of values in [0, 1], which is normalised here, and keep what it sees.

    The model is left as it was.

    Args:
        model: in any mode; it is run in eval mode.
        image: of any size.
        num_patches: as the model takes them; None: those that it has.
        attention: whether to read the attention, for which all of the model must run, not just its patch embedding.

    Raises:
        ValueError: not an APViT, no number of patches, or an attention that cannot be read.
    """
    check_apvit(model)
    if attention and not attends(model):
        raise ValueError("expected timm's ordinary attention at the model's end to colour by it, got a model without")
    patching = model.patch_embed.patching
    batch = normalised(model, image)
    with at_rest(model, num_patches):
        layer = model.blocks[-1].attn if attention else None
        with calls_of(patching) as seen, calls_of(layer) as attended:
            if attention:
                model.forward_features(batch)
            else:
                model.patch_embed(batch)
        _, layout = model.patch_embed.anchor_layout((batch.shape[2], batch.shape[3]))
        canvas, (patches, geometry) = seen[0]
        received = patch_attention(model, layer, attended[-1][0])[0] if attention else None
        canvas = canvas.float()
        fixed = fixed_patches(model, canvas, layout)

    size = canvas.new_tensor([canvas.shape[3], canvas.shape[2]])
    window = None
    if geometry.window is not None:
        corners = canvas.new_tensor([[-1, -1], [1, -1], [1, 1], [-1, 1], [-1, -1]])
        window = _in_pixels(geometry.window[0, :2] + geometry.window[0, 2] * corners, size)
    crowd = None if geometry.started is None or window is not None else geometry.started
    mean, std = statistics_of(model)
    return PatchView(
        pixels=_shown(canvas[0], mean, std),
        layout=layout,
        fixed=_shown(fixed, mean, std),
        patches=_shown(patches[0], mean, std),
        outlines=_in_pixels(geometry.outlines(POINTS_PER_SIDE)[0], size),
        centres=_in_pixels(geometry.centres[0], size),
        window=window,
        leaves=None if crowd is None else (crowd.centres[0].cpu(), crowd.extents[0].cpu()),
        attention=None if received is None else received.cpu() * len(received),
    )


def statistics_of(model: APViT) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation that a model's images are normalised by: ``(C, 1, 1)`` each, where it is."""
    config, device = image_config(model), model.patch_embed.proj.weight.device
    mean, std = (torch.tensor(config[key], device=device).view(-1, 1, 1) for key in ('mean', 'std'))
    return mean, std


def normalised(model: APViT, image: Tensor) -> Tensor:
    """An image ``(C, H, W)`` of values in [0, 1] as a model takes it: ``(1, C, H, W)``."""
    mean, std = statistics_of(model)
    return ((image.to(mean.device, torch.float32) - mean) / std).to(model.patch_embed.proj.weight.dtype)[None]


def fixed_patches(model: APViT, canvas: Tensor, layout: Layout) -> Tensor:
    """Patches of the anchors that tile an image ``(1, C, H, W)``, none of them moved: ``(N, C, P_h, P_w)``."""
    patching = model.patch_embed.patching
    num_levels = patching.num_levels((canvas.shape[2], canvas.shape[3]), layout)
    patches: Tensor = patching.unmoved(mip_pyramid(canvas, num_levels), layout)[0][0]
    return patches


def mosaic(patches: Tensor, layout: Layout) -> Tensor:
    """Put patches back together, each on its anchor: ``(N, P_h, P_w, 3)`` -> ``(h, w, 3)``.

    Of several grids the finest alone. At the full grid of unmoved patches that is the image. Where rows have different
    numbers of patches, their columns are repeated to one width.
    """
    _, height, width, _ = patches.shape
    rows, first = finest(layout)
    patches = patches[first : first + rows.num_patches]
    lengths = rows.lengths
    longest = max(lengths) * width
    total = longest if min(lengths) == max(lengths) else 4 * longest
    strips = []
    for row in torch.split(patches, lengths):
        strip = row.transpose(0, 1).reshape(height, -1, 3)  # (P_h, columns * P_w, 3)
        repeated = (torch.arange(total) * 2 + 1) * strip.shape[1] // (2 * total)
        strips.append(strip[:, repeated].repeat_interleave(total // longest, dim=0))
    return torch.cat(strips)


def leaf_mosaic(patches: Tensor, centres: Tensor, extents: Tensor) -> Tensor:
    """Put patches that crowd back together, each on its leaf: as `mosaic`, for leaves ``(N, 2)`` of a quadtree."""
    _, height, width, _ = patches.shape
    cells = (1 / extents.amin(dim=0)).round().long()  # (x, y) of the smallest leaf
    image = patches.new_zeros(int(cells[1]) * height, int(cells[0]) * width, 3)
    corners, sizes = ((centres - extents + 1) / 2 * cells).round().long(), (extents * cells).round().long()
    for patch, (left, top), (across, down) in zip(patches, corners.tolist(), sizes.tolist(), strict=True):
        pixels = patch.repeat_interleave(down, dim=0).repeat_interleave(across, dim=1)
        image[top * height : (top + down) * height, left * width : (left + across) * width] = pixels
    return image


def finest(layout: Layout) -> tuple[Rows, int]:
    """The grid of a layout that has the most patches, and which of all is its first."""
    index = max(range(len(layout.grids)), key=lambda index: layout.grids[index].num_patches)
    return layout.grids[index], sum(each.num_patches for each in layout.grids[:index])


@contextmanager
def at_rest(model: APViT, num_patches: NumPatches | None) -> Iterator[None]:
    """Let a model run in eval mode with a number of patches, then be as it was."""
    requested = model.patch_embed.requested
    try:
        if num_patches is not None:
            model.patch_embed.set_num_patches(num_patches)  # of which the model takes no note
        with in_eval_mode(model):
            yield
    finally:
        model.patch_embed.set_num_patches(requested)


def _in_pixels(points: Tensor, size: Tensor) -> Tensor:
    """Points ``(..., 2)`` of [-1, 1] in pixels of an image of a size ``(W, H)``."""
    return ((points.double() + 1) / 2 * size).cpu()


def _shown(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Pixels as people see them: normalised ``(..., C, H, W)`` -> ``(..., H, W, 3)`` in [0, 1]."""
    pixels = (pixels.float() * std + mean).clamp(0, 1)
    if pixels.shape[-3] != 3:
        pixels = pixels[..., :1, :, :].expand(*pixels.shape[:-3], 3, *pixels.shape[-2:])
    return pixels.movedim(-3, -1).cpu()
