"""Registered models: ViTs of timm with adaptive patches, each with every pretrained tag of its ViT.

The pretrained configurations are timm's own, so mean, standard deviation, classes and licence have one source.
"""

import dataclasses
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, get_arch_pretrained_cfgs, register_model

from timm_apvit.vision_transformer import APViT
from timm_apvit.weights import checkpoint_filter_fn, source_repository

_VIT_NAMES = {
    'apvit_tiny': 'vit_tiny_patch16_224',
    'apvit_small': 'vit_small_patch16_224',
    'apvit_base': 'vit_base_patch16_224',
    'apvit_large': 'vit_large_patch16_224',
    'test_apvit': 'test_vit',
}


def vit_name(model_name: str) -> str:
    """Name of the timm ViT that a registered APViT starts from.

    Raises:
        ValueError: not the name of a registered APViT.
    """
    architecture = model_name.partition('.')[0]
    if architecture not in _VIT_NAMES:
        raise ValueError(f'expected the name of an APViT, one of {", ".join(_VIT_NAMES)}, got {model_name!r}')
    return _VIT_NAMES[architecture]


def _cfgs_of_vits() -> dict[str, Any]:
    """Every pretrained configuration of every ViT, under our name; its repository holds a native checkpoint."""
    cfgs = {}
    for name, vit in _VIT_NAMES.items():
        for vit_with_tag, cfg in get_arch_pretrained_cfgs(vit).items():
            tag = vit_with_tag.partition('.')[2]
            cfgs[f'{name}.{tag}'] = dataclasses.replace(cfg, url=None, custom_load=False)
    return cfgs


default_cfgs = generate_default_cfgs(_cfgs_of_vits())


def _create(name: str, pretrained: bool, model_args: dict[str, Any], kwargs: dict[str, Any]) -> APViT:
    out_indices = kwargs.pop('out_indices', 3)
    model: APViT = build_model_with_cfg(
        APViT,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={'out_indices': out_indices, 'feature_cls': 'getter'},
        **{**model_args, **kwargs},
    )
    if pretrained and isinstance(model, APViT):  # features_only wraps it
        model.base_model = source_repository(model.pretrained_cfg)
    return model


@register_model
def apvit_tiny(pretrained: bool = False, **kwargs: Any) -> APViT:
    """APViT-Ti/16: timm's ``vit_tiny_patch16_224`` with adaptive patches."""
    model_args = {'patch_size': 16, 'embed_dim': 192, 'depth': 12, 'num_heads': 3}
    return _create('apvit_tiny', pretrained, model_args, kwargs)


@register_model
def apvit_small(pretrained: bool = False, **kwargs: Any) -> APViT:
    """APViT-S/16: timm's ``vit_small_patch16_224`` with adaptive patches."""
    model_args = {'patch_size': 16, 'embed_dim': 384, 'depth': 12, 'num_heads': 6}
    return _create('apvit_small', pretrained, model_args, kwargs)


@register_model
def apvit_base(pretrained: bool = False, **kwargs: Any) -> APViT:
    """APViT-B/16: timm's ``vit_base_patch16_224`` with adaptive patches."""
    model_args = {'patch_size': 16, 'embed_dim': 768, 'depth': 12, 'num_heads': 12}
    return _create('apvit_base', pretrained, model_args, kwargs)


@register_model
def apvit_large(pretrained: bool = False, **kwargs: Any) -> APViT:
    """APViT-L/16: timm's ``vit_large_patch16_224`` with adaptive patches."""
    model_args = {'patch_size': 16, 'embed_dim': 1024, 'depth': 24, 'num_heads': 16}
    return _create('apvit_large', pretrained, model_args, kwargs)


@register_model
def test_apvit(pretrained: bool = False, **kwargs: Any) -> APViT:  # noqa: PT028  a model, not a test
    """Tiny APViT for tests: timm's ``test_vit`` with adaptive patches."""
    model_args = {
        'patch_size': 16,
        'embed_dim': 64,
        'depth': 6,
        'num_heads': 2,
        'mlp_ratio': 3,
        'dynamic_img_size': True,
    }
    return _create('test_apvit', pretrained, model_args, kwargs)
