"""Registered models: ViTs of timm with adaptive patches, each with every pretrained tag of its ViT.

The pretrained configurations are timm's own, so mean, standard deviation, classes and licence have one source.
"""

import dataclasses
from typing import Any

from timm.models import adapt_input_conv, build_model_with_cfg, generate_default_cfgs, get_arch_pretrained_cfgs, register_model
from timm.models.vision_transformer import checkpoint_filter_fn as vit_checkpoint_filter_fn
from torch import Tensor, nn

from timm_apvit.patch_embed import complete_state_dict
from timm_apvit.vision_transformer import APViT

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


def checkpoint_filter_fn(state_dict: dict[str, Any], model: APViT) -> dict[str, Any]:
    """Fit a checkpoint of a ViT or an APViT to a model, and refuse any other by the names of its keys.

    timm's own filter converts foreign layouts and resamples the position embedding. timm then loads leniently whenever the number of
    classes differs or ``features_only`` is set, and a wrong file would pass unnoticed: so keys are compared here, in every mode.

    Raises:
        ValueError: keys are missing or unexpected, or the localisation network has other channels than 3 or the model's.
    """
    fitted: dict[str, Any] = vit_checkpoint_filter_fn(state_dict, model)
    _adapt_stem(fitted, model.patch_embed.patching.in_chans)
    complete_state_dict(model.patch_embed, fitted, 'patch_embed.')

    missing = {key for key in model.state_dict() if key not in fitted and not key.startswith('head.')}
    unexpected = {key for key in fitted if key not in model.state_dict() and not key.startswith('head.')}
    # Pooling decides which of the two norms a ViT has, and whether it pools by attention; timm's strict mode sees to that.
    if isinstance(model.fc_norm, nn.Identity) != isinstance(model.norm, nn.Identity):
        norms = {'norm.weight', 'norm.bias', 'fc_norm.weight', 'fc_norm.bias'}
        if (missing & norms) and (unexpected & norms):
            missing, unexpected = missing - norms, unexpected - norms
    if model.attn_pool is None:
        unexpected = {key for key in unexpected if not key.startswith('attn_pool.')}
    if missing or unexpected:
        raise ValueError(
            f'expected a checkpoint of a ViT or an APViT that fits this {type(model).__name__}; '
            f'missing keys: {_listed(missing)}; unexpected keys: {_listed(unexpected)}'
        )
    return fitted


def _adapt_stem(state_dict: dict[str, Tensor], in_chans: int) -> None:
    """Adapt the localisation network's first convolution from 3 channels, as timm adapts ``patch_embed.proj``."""
    key = 'patch_embed.patching.localizer.stem.0.0.weight'
    weight = state_dict.get(key)
    if weight is None or weight.shape[1] == in_chans:
        return
    if weight.shape[1] != 3:
        raise ValueError(f'expected {key} of 3 or {in_chans} input channels, got {list(weight.shape)}')
    state_dict[key] = adapt_input_conv(in_chans, weight)


def _listed(keys: set[str], most: int = 5) -> str:
    """Name the first few keys."""
    names = sorted(keys)
    more = f' and {len(names) - most} more' if len(names) > most else ''
    return (', '.join(names[:most]) + more) or 'none'


def _create(name: str, pretrained: bool, model_args: dict[str, Any], kwargs: dict[str, Any]) -> Any:
    out_indices = kwargs.pop('out_indices', 3)
    return build_model_with_cfg(
        APViT,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={'out_indices': out_indices, 'feature_cls': 'getter'},
        **{**model_args, **kwargs},
    )


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
def test_apvit(pretrained: bool = False, **kwargs: Any) -> APViT:
    """Tiny APViT for tests: timm's ``test_vit`` with adaptive patches."""
    model_args = {'patch_size': 16, 'embed_dim': 64, 'depth': 6, 'num_heads': 2, 'mlp_ratio': 3, 'dynamic_img_size': True}
    return _create('test_apvit', pretrained, model_args, kwargs)
