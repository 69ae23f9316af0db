"""What is compared: models that differ in where their patches lie and in nothing else."""

import math
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from timm_apvit import APViT
from timm_apvit.coords import anchors
from timm_apvit.finetuning.twin import create_twin
from timm_apvit.geometry import PatchGeometry, place_inside
from timm_apvit.localizer import Localizer
from timm_apvit.patching import AdaptivePatching
from timm_apvit.transforms import PatchTransform

CONTESTANTS = {
    'fixed': "timm's ViT on a fixed grid, on the image resized with anti-aliasing",
    'random': 'patches at random places, others for every image',
    'centre': 'patches closer together in the middle',
    'frozen': 'patches where an untrained localisation network puts them',
    'adaptive': 'the learned patches',
    'object': 'the ceiling: a grid put on the object by ground truth',
}
VARIANTS = {
    'no-pyramid': 'patches sampled bilinearly, which aliases',
    'no-context': 'a localisation network that sees at each anchor only what is near it',
    'no-geometry': 'tokens that are not told what their patches cover',
    'localizer-32': 'a localisation network that sees 32 instead of 64 pixels along a side',
    'localizer-96': 'one that sees 96',
    'localizer-narrow': 'one with half the channels',
}
# A ViT small enough for a CPU, from scratch. Without the last three it takes several times as long to learn anything.
SCRATCH: dict[str, Any] = {
    'embed_dim': 128,
    'depth': 4,
    'num_heads': 4,
    'class_token': False,
    'global_pool': 'avg',
    'weight_init': 'jax',
}
# DINOv2's ViT-S/14.
DINOV2: dict[str, Any] = {'patch_size': 14, 'init_values': 1e-5}


class PlacedPatching(AdaptivePatching):
    """Patches of the anchors' size whose centres no network chooses."""

    by_chance = False

    def forward(self, image: Tensor, layout: tuple[int, int] | None = None) -> tuple[Tensor, PatchGeometry]:
        """Take the patches of a batch; see `AdaptivePatching`."""
        used = layout or self.layout
        centres, extents = (each.expand(len(image), -1, -1) for each in anchors(used, image.device))
        if self.by_chance:
            # Other places for every image in training; for a test always the same ones.
            generator = None if self.training else torch.Generator(image.device).manual_seed(0)
            centres = torch.rand(centres.shape, generator=generator, device=image.device) * 2 - 1
        else:
            centres = centres.sign() * centres.abs() ** 1.5
        zeros = torch.zeros_like(centres[..., 0])
        geometry = place_inside(centres, extents, zeros, zeros, (image.shape[2], image.shape[3]))
        return self.sample(image, geometry, used), geometry


class PointSampledTransform(PatchTransform):
    """A transform whose patches are read as if none covered more pixels than it has samples."""

    def max_footprint(self, layout: tuple[int, int], image_size: tuple[int, int], patch_size: tuple[int, int]) -> float:
        """No more than one pixel per sample, which needs no pyramid."""
        return 1.0


class Nothing(nn.Module):
    """In place of a linear layer: zeros, of ``width`` features."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, features: Tensor) -> Tensor:
        """``(..., anything)`` -> ``(..., width)``."""
        return features.new_zeros([*features.shape[:-1], self.width])


def square(num_patches: int) -> tuple[int, int]:
    """The rows and columns of a square number of patches."""
    rows = math.isqrt(num_patches)
    if rows**2 != num_patches:
        raise ValueError(f'expected a square number of patches, which a fixed grid can have too, got {num_patches}')
    return rows, rows


def crop_side(name: str, num_patches: int, pretrained: bool) -> int | None:
    """Pixels along the side of the crops that a contestant is given instead of whole images; None: it is not."""
    patch: int = DINOV2['patch_size'] if pretrained else 16
    return math.isqrt(num_patches) * patch if name == 'object' else None


def create_contestant(
    name: str, side: int, num_patches: int, weights: Path | None, variant: str | None = None, **kwargs: Any
) -> nn.Module:
    """Make a model for images of ``side`` pixels and 10 classes.

    Args:
        name: a key of `CONTESTANTS`.
        side: of the images.
        num_patches: a square number.
        weights: DINOv2's file for a pretrained ViT-S/14; None: a small ViT from scratch.
        variant: a key of `VARIANTS`, for the adaptive patches.
        kwargs: of ``timm.create_model``, for the adaptive patches.
    """
    if name != 'adaptive' and kwargs.get('max_focus', 1) > 1:
        raise ValueError(f'expected max_focus for the adaptive patches only, got it for {name!r}')
    if name != 'adaptive' and variant is not None:
        raise ValueError(f'expected a variant of the adaptive patches only, got {variant!r} for {name!r}')
    common = {'num_patches': square(num_patches), 'num_classes': 10, 'img_size': side, **kwargs}
    if weights is None:
        model = timm.create_model('test_apvit', **{**SCRATCH, 'in_chans': 1, **common})
    else:
        overlay = {'file': str(weights), 'custom_load': False, 'num_classes': 0, 'input_size': (3, 518, 518)}
        model = timm.create_model('apvit_small', pretrained=True, pretrained_cfg_overlay=overlay, **DINOV2, **common)
    if name in ('fixed', 'object'):
        return create_twin(model, **(DINOV2 if weights else SCRATCH))
    if variant is not None:
        vary(model, variant)
    return place(model, name)


def vary(model: APViT, variant: str) -> None:
    """Make a new model one of the `VARIANTS`."""
    patching = model.patch_embed.patching
    localizer = patching.localizer
    if variant == 'no-pyramid':
        family = type(patching.transform)
        patching.transform.__class__ = type(family.__name__, (PointSampledTransform, family), {})
    elif variant == 'no-context':
        localizer.from_context = Nothing(localizer.width)
    elif variant == 'no-geometry':
        model.patch_embed.geometry_embed = Nothing(model.embed_dim)
    else:
        own = {'localizer-32': {'side': 32}, 'localizer-96': {'side': 96}, 'localizer-narrow': {'width': 32}}[variant]
        patching.localizer = Localizer(patching.transform.fields, patching.in_chans, **own)


def place(model: APViT, name: str) -> APViT:
    """Let a model take its patches in the way of a contestant."""
    patching = model.patch_embed.patching
    if name in ('random', 'centre'):
        patching.__class__ = PlacedPatching
        patching.by_chance = name == 'random'
    if name == 'frozen':
        # Layers at zero would be the fixed grid: these move a patch by up to half its range.
        for layer in patching.localizer.fields.values():
            nn.init.normal_(layer.weight, std=0.1)
    return model
