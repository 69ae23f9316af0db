"""Checkpoints: what fits a model is adapted to it, and anything else is refused by the names of its keys."""

import json
import re
from pathlib import Path
from typing import Any

from timm.models import VisionTransformer, adapt_input_conv
from timm.models.vision_transformer import checkpoint_filter_fn as vit_checkpoint_filter_fn
from torch import Tensor, nn

from timm_apvit.patch_embed import complete_state_dict

_PROJECTION = 'patch_embed.proj.weight'
_STEM = 'patch_embed.patching.localizer.stem.0.0.weight'
_HEAD = {'head.weight', 'head.bias'}


def checkpoint_filter_fn(state_dict: dict[str, Any], model: VisionTransformer) -> dict[str, Any]:
    """Fit a checkpoint of a ViT or an APViT to a model, and refuse any other by the names of its keys.

    timm's own filter converts foreign layouts and resamples the position embedding. timm then loads leniently
    whenever the number of classes differs or ``features_only`` is set, and a wrong file would pass unnoticed: so keys
    are compared here, in every mode. Where a model's images do not have 3 channels, its
    ``pretrained_cfg['first_conv']`` may become None.

    Raises:
        ValueError: keys are missing or unexpected, or a first convolution has other input channels than 3 or the
            model's.
    """
    fitted = _fit_layout(state_dict, model)
    _fit_channels(fitted, model)
    complete_state_dict(model.patch_embed, fitted, 'patch_embed.')

    # timm's strict mode compares the classifier, and drops it where the number of classes differs.
    missing = model.state_dict().keys() - fitted.keys() - _HEAD
    unexpected = fitted.keys() - model.state_dict().keys() - _HEAD
    if not isinstance(model.fc_norm, nn.Identity):
        # Average pooling has its norm after the pool; as in timm, that norm starts afresh from a ViT that pools its
        # class token.
        missing -= {'fc_norm.weight', 'fc_norm.bias'} if unexpected & {'norm.weight'} else set()
        unexpected -= {'norm.weight', 'norm.bias'}
    if model.attn_pool is None:
        unexpected = {key for key in unexpected if not key.startswith('attn_pool.')}
    if missing or unexpected:
        focuses = any('.focus.' in key for key in unexpected)
        hint = '; the checkpoint is of a model with max_focus above 1' if focuses else ''
        raise ValueError(
            f'expected a checkpoint of a ViT or an APViT that fits this {type(model).__name__}; '
            f'missing keys: {_listed(missing)}; unexpected keys: {_listed(unexpected)}{hint}'
        )
    return fitted


def _fit_layout(state_dict: dict[str, Any], model: VisionTransformer) -> dict[str, Any]:
    """Timm's own filter, which fails on other prefix tokens without a name: here they are named."""
    try:
        fitted: dict[str, Any] = vit_checkpoint_filter_fn(state_dict, model)
    except RuntimeError as error:
        shapes = {
            key: list(state_dict[key].shape) for key in ('pos_embed', 'cls_token', 'reg_token') if key in state_dict
        }
        num_prefix_tokens = 0 if model.no_embed_class else model.num_prefix_tokens
        raise ValueError(
            f'expected a pos_embed of {num_prefix_tokens} prefix tokens and a grid, got a checkpoint with {shapes}'
        ) from error
    return fitted


def _fit_channels(state_dict: dict[str, Tensor], model: VisionTransformer) -> None:
    """Adapt the localisation network's first convolution from 3 channels, as timm adapts the projection."""
    in_chans = model.patch_embed.patching.in_chans
    for key in (_PROJECTION, _STEM):
        weight = state_dict.get(key)
        if weight is not None and weight.shape[1] not in (3, in_chans):
            raise ValueError(f'expected {key} of 3 or {in_chans} input channels, got {list(weight.shape)}')
    if _PROJECTION in state_dict and state_dict[_PROJECTION].shape[1] == in_chans != 3:
        # timm < 1.0.31 takes any first convolution for one of 3 channels and drops weights that it cannot convert.
        model.pretrained_cfg['first_conv'] = None
    if _STEM in state_dict and state_dict[_STEM].shape[1] != in_chans:
        state_dict[_STEM] = adapt_input_conv(in_chans, state_dict[_STEM])


def source_repository(pretrained_cfg: dict[str, Any]) -> str | None:
    """The repository on the Hub that timm takes pretrained weights from; None: a file, or it is not known."""
    source = pretrained_cfg.get('source')
    if source == 'local-dir':
        # What was saved says it, if it was saved by us.
        base: str | None = json.loads(Path(pretrained_cfg['file'], 'config.json').read_text()).get('base_model')
        return base
    if source != 'hf-hub' and (pretrained_cfg.get('file') or pretrained_cfg.get('state_dict')):
        return None
    repository = pretrained_cfg.get('hf_hub_id')
    return str(repository).partition('@')[0] if repository else None


def check_npz(path: str, model: VisionTransformer) -> None:
    """Refuse a JAX checkpoint (.npz) of another size, which timm's reader would skip or broadcast in part.

    Raises:
        ValueError: blocks beyond the model's depth, norms of another width, or other classes than it was trained for.
    """
    import numpy as np

    with np.load(path, allow_pickle=False) as arrays:
        for name in arrays.files:
            block = re.search(r'encoderblock_(\d+)/', name)
            if block and int(block[1]) >= len(model.blocks):
                raise ValueError(f'expected {len(model.blocks)} blocks, got {name}')
            if '/LayerNorm_' in name and arrays[name].shape[-1] != model.embed_dim:
                raise ValueError(f'expected {name} of width {model.embed_dim}, got {list(arrays[name].shape)}')
            trained_for_these = model.num_classes == model.pretrained_cfg.get('num_classes')
            if name.endswith('head/bias') and trained_for_these and arrays[name].shape[-1] != model.num_classes:
                raise ValueError(f'expected {name} of {model.num_classes} classes, got {list(arrays[name].shape)}')


def _listed(keys: set[str], most: int = 5) -> str:
    """Name the first few keys."""
    names = sorted(keys)
    more = f' and {len(names) - most} more' if len(names) > most else ''
    return (', '.join(names[:most]) + more) or 'none'
