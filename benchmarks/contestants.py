"""What is compared: models that differ in where their patches lie and in nothing else."""

import math
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from timm_apvit import TRANSFORMS, Anchors, Layout, Localizer, Look, register_localizer, register_transform
from timm_apvit.finetuning.baseline import create_baseline
from timm_apvit.patching.cnn import CNNLocalizer

CONTESTANTS = {
    'fixed': "timm's ViT on a fixed grid, on the image resized with anti-aliasing",
    'random': 'patches at random places, others for every image',
    'centre': 'patches closer together in the middle',
    'frozen': 'patches where an untrained localisation network puts them',
    'evidence': 'the fixed grid, with the answer that a glance takes from its middle block',
    'adaptive': 'the learned patches',
    'object': 'the ceiling: a grid put on the object by ground truth',
}
# How far patches may move that reach all of the image, in cells.
FAR = 1000.0
VARIANTS = {
    'no-pyramid': 'patches sampled bilinearly, which aliases',
    'no-context': 'a localisation network that sees at each anchor only what is near it',
    'no-geometry': 'tokens that are not told what their patches cover',
    'localizer-32': 'a localisation network that sees 32 instead of 64 pixels along a side',
    'localizer-96': 'one that sees 96',
    'localizer-narrow': 'one with half the channels',
}
# How a model is made one of the `VARIANTS`; tokens without geometry are not a matter of arguments.
VARIANT_ARGS: dict[str, dict[str, Any]] = {
    'no-pyramid': {'transform': 'point_sampled'},
    'no-context': {'localizer': 'no_context'},
    'no-geometry': {},
    'localizer-32': {'localizer': {'name': 'cnn', 'side': 32}},
    'localizer-96': {'localizer': {'name': 'cnn', 'side': 96}},
    'localizer-narrow': {'localizer': {'name': 'cnn', 'width': 32}},
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
DINOV2_PATCH = 14


class Placed(Localizer):
    """Patches of the anchors' size whose centres no network chooses: by chance, or closer together in the middle.

    For the family ``'translation'`` with `FAR`, which reaches all of the image.
    """

    def __init__(self, fields: dict[str, int], by_chance: bool, **_: Any) -> None:
        super().__init__()
        self.by_chance = by_chance

    def level(self, image_size: tuple[int, int]) -> int:
        """It looks at nothing."""
        return 0

    def look(self, pyramid: list[Tensor]) -> Look:
        """See `Localizer`; its memory is the number of images."""
        return Look(len(pyramid[0]))

    def forward(self, look: Look, anchors: Anchors) -> dict[str, Tensor]:
        """See `Localizer`."""
        centres = anchors.centres.expand(look.memory, -1, -1)
        if self.by_chance:
            # Other places for every image in training; for a test always the same ones.
            generator = None if self.training else torch.Generator(centres.device).manual_seed(0)
            wanted = torch.rand(centres.shape, generator=generator, device=centres.device) * 2 - 1
        else:
            wanted = centres.sign() * centres.abs() ** 1.5
        return {'shift': torch.atanh((wanted - centres) / (2 * FAR * anchors.extents))}


class NoContext(CNNLocalizer):
    """The localisation network without its context branch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.context, self.from_context = nn.Flatten(), Nothing(self.width)


class PointSampled(TRANSFORMS['scale']):  # type: ignore[misc]
    """A transform whose patches are read as if none covered more pixels than it has samples."""

    def max_footprint(self, layout: Layout, image_size: tuple[int, int], patch_size: tuple[int, int]) -> float:
        """No more than one pixel per sample, which needs no pyramid."""
        return 1.0


def register_parts() -> None:
    """Make the parts above known by name; when they are needed, so that to import this file changes nothing."""
    register_localizer('placed', Placed)
    register_localizer('no_context', NoContext)
    register_transform('point_sampled', PointSampled)


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
    patch = DINOV2_PATCH if pretrained else 16
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
    if name == 'evidence':  # a window that is always the whole image, and as many cells as patches
        glance = {'name': 'glance', 'grid': square(num_patches)[0], 'max_focus': 1.0}
        kwargs = {**kwargs, 'localizer': glance, 'transform': 'translation', 'max_shift': 0.0}
    elif name != 'adaptive' and 'localizer' in kwargs:
        raise ValueError(f'expected a localizer of the adaptive patches only, got it for {name!r}')
    if name != 'adaptive' and variant is not None:
        raise ValueError(f'expected a variant of the adaptive patches only, got {variant!r} for {name!r}')
    register_parts()
    arguments = {**placed(name), **VARIANT_ARGS.get(variant or '', {}), **kwargs}
    common = {'num_patches': square(num_patches), 'num_classes': 10, 'img_size': side, **arguments}
    if weights is None:
        model = timm.create_model('test_apvit', **{**SCRATCH, 'in_chans': 1, **common})
    else:
        overlay = {'file': str(weights), 'custom_load': False, 'num_classes': 0, 'input_size': (3, 518, 518)}
        name_of_twin = 'apvit_small_patch14_dinov2'
        model = timm.create_model(name_of_twin, pretrained=True, pretrained_cfg_overlay=overlay, **common)
    if name in ('fixed', 'object'):
        return create_baseline(model)
    if variant == 'no-geometry':
        model.patch_embed.geometry_embed = Nothing(model.embed_dim)
    if name == 'frozen':
        # Layers at zero would be the fixed grid: these move a patch by up to half its range.
        for layer in model.patch_embed.patching.localizer.fields.values():
            nn.init.normal_(layer.weight, std=0.1)
    return model


def placed(name: str) -> dict[str, Any]:
    """The arguments of a contestant whose patches no trained network places."""
    if name not in ('random', 'centre'):
        return {}
    localizer = {'name': 'placed', 'by_chance': name == 'random'}
    return {'transform': 'translation', 'max_shift': FAR, 'localizer': localizer}
