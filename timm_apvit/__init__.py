"""Adaptive-patching Vision Transformers for timm.

Importing this package registers ``apvit_tiny``, ``apvit_small``, ``apvit_base``, ``apvit_large`` and, for tests,
``test_apvit`` with timm, and does nothing else. `AdaptivePatching`, `interpolate_pos_embed` and `resample_pos_embed`
stand alone, for other ViTs.

Shapes: ``B`` batch, ``C`` channels, ``H, W`` image pixels, ``gh, gw`` grid, ``N`` patches, ``R`` rows of anchors, ``P``
(``P_h, P_w``) samples along a patch's side, ``D`` embedding width, ``T`` prefix tokens. Points are (x, y) in [-1, 1]
over pixel edges, sizes are (h, w).
"""

from timm_apvit.apvit import vit_name
from timm_apvit.card import CardDetails
from timm_apvit.geometry import PatchGeometry
from timm_apvit.hub import Pushed, push_to_hub, save_pretrained
from timm_apvit.patching import AdaptivePatching
from timm_apvit.pos_embed import interpolate_pos_embed, resample_pos_embed
from timm_apvit.transforms import TRANSFORMS, Bound, PatchTransform, register_transform
from timm_apvit.vision_transformer import APViT

__version__ = '0.1.0'

__all__ = [
    'TRANSFORMS',
    'APViT',
    'AdaptivePatching',
    'Bound',
    'CardDetails',
    'PatchGeometry',
    'PatchTransform',
    'Pushed',
    '__version__',
    'interpolate_pos_embed',
    'push_to_hub',
    'register_transform',
    'resample_pos_embed',
    'save_pretrained',
    'vit_name',
]
