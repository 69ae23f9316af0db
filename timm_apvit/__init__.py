"""Adaptive-patching Vision Transformers for timm.

Importing this package registers a twin of every ViT of timm that takes its patches by one convolution, and does nothing
else. Names follow from the ViT's: ``vit_small_patch14_dinov2`` -> ``apvit_small_patch14_dinov2``, and ``apvit_`` goes
before any other: ``eva02_base_patch14_224`` -> ``apvit_eva02_base_patch14_224``; tags are the ViT's own.
``timm.list_models('*apvit*')`` has them all; `twin_name` and `vit_name` go from one name to the other.
``apvit_tiny``, ``apvit_small``, ``apvit_base`` and ``apvit_large`` are short for the twins of patch 16 at 224 pixels.
`adapt` makes an APViT of a ViT that is built already. `AdaptivePatching`, `interpolate_pos_embed` and
`resample_pos_embed` stand alone, for other ViTs.

Shapes: ``B`` batch, ``C`` channels, ``H, W`` image pixels, ``gh, gw`` grid, ``N`` patches, ``R`` rows of anchors, ``P``
(``P_h, P_w``) samples along a patch's side, ``D`` embedding width, ``T`` prefix tokens. Points are (x, y) in [-1, 1]
over pixel edges, sizes are (h, w).
"""

from timm_apvit.hub.card import CardDetails
from timm_apvit.hub.pushing import Pushed, push_to_hub
from timm_apvit.hub.saving import save_pretrained
from timm_apvit.learning.glance import fit_glance
from timm_apvit.models.adapting import adapt, vit_of
from timm_apvit.models.apvit import twin_name, vit_name
from timm_apvit.models.mixin import APViT
from timm_apvit.models.pyramid import FeaturePyramid, pyramid
from timm_apvit.patching.anchors import LAYOUTS, Anchors, Layout, Rows, register_layout
from timm_apvit.patching.geometry import PatchGeometry
from timm_apvit.patching.layer import AdaptivePatching
from timm_apvit.patching.localizers import LOCALIZERS, Localizer, Look, register_localizer
from timm_apvit.patching.pos_embed import interpolate_pos_embed, resample_pos_embed
from timm_apvit.patching.transforms import TRANSFORMS, Bound, PatchTransform, register_transform

__version__ = '0.1.0'

__all__ = [
    'LAYOUTS',
    'LOCALIZERS',
    'TRANSFORMS',
    'APViT',
    'AdaptivePatching',
    'Anchors',
    'Bound',
    'CardDetails',
    'FeaturePyramid',
    'Layout',
    'Localizer',
    'Look',
    'PatchGeometry',
    'PatchTransform',
    'Pushed',
    'Rows',
    '__version__',
    'adapt',
    'fit_glance',
    'interpolate_pos_embed',
    'push_to_hub',
    'pyramid',
    'register_layout',
    'register_localizer',
    'register_transform',
    'resample_pos_embed',
    'save_pretrained',
    'twin_name',
    'vit_name',
    'vit_of',
]
