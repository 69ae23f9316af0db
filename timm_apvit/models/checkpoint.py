"""Checkpoints: what fits a model is adapted to it, and anything else is refused by the names of its keys.

All repair of checkpoints is in this room, but for that of a localiser's own parameters, which is its own business
(`Localizer.fit`).
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from timm.models import VisionTransformer
from torch import nn
from torch.nn.functional import pad

from timm_apvit.failures import listed
from timm_apvit.patching.layers import convert_channels
from timm_apvit.patching.transforms import TRANSFORMS

StateDict = dict[str, Any]

# Of a model; as everywhere below, keys of what a ViT does not have are under these.
EMBED, LOCALIZER, GEOMETRY = 'patch_embed.', 'patching.localizer.', 'geometry_embed.'
ADAPTIVE_KEYS = (EMBED + 'patching.', EMBED + GEOMETRY)


def complete_state_dict(module: Any, state_dict: StateDict, prefix: str, *_: Any) -> None:
    """Complete a checkpoint of an `AdaptivePatchEmbed`, whose keys have a prefix, in place.

    A plain ViT's, without any parameter of ours, gets the module's own, so that it loads strictly. One of an older or
    smaller APViT is widened by zeros, which change nothing. What else it lacks, loading reports. A part of a
    checkpoint, without the projection, is left as it is.
    """
    if f'{prefix}proj.weight' not in state_dict:
        return
    ours = tuple(prefix + key.removeprefix(EMBED) for key in ADAPTIVE_KEYS)
    if not any(key.startswith(ours) for key in state_dict):
        own = module.state_dict(prefix=prefix)
        # What holds no value is reported as missing.
        state_dict.update({k: v for k, v in own.items() if k.startswith(ours) and not v.is_meta})
        return
    module.patching.localizer.fit(state_dict, prefix + LOCALIZER)
    weight = state_dict.get(f'{prefix}{GEOMETRY}weight')
    wanted = module.geometry_embed.weight.shape[1]
    if weight is not None and weight.dim() == 2 and weight.shape[1] < wanted:  # from before windows had features
        state_dict[f'{prefix}{GEOMETRY}weight'] = pad(weight, [0, wanted - weight.shape[1]])


def checkpoint_filter_fn(
    state_dict: StateDict, model: Any, vit_filter: Callable[[StateDict, Any], StateDict]
) -> StateDict:
    """Fit a checkpoint of a ViT or an APViT to a model, and refuse any other by the names of its keys.

    timm's own filter of the ViT converts foreign layouts and resamples the position embedding. timm then loads
    leniently whenever the number of classes differs or ``features_only`` is set, and a wrong file would pass unnoticed:
    so keys are compared here, in every mode.

    Args:
        state_dict: of the checkpoint.
        model: an APViT.
        vit_filter: timm's own.

    Raises:
        ValueError: keys are missing or unexpected, or a first convolution has other input channels than 3 or the
            model's.
    """
    ours = {key: value for key, value in state_dict.items() if key.startswith(ADAPTIVE_KEYS)}
    fitted = _fit_layout({k: v for k, v in state_dict.items() if k not in ours}, model, vit_filter) | ours
    complete_state_dict(model.patch_embed, fitted, EMBED)
    projection = f'{EMBED}proj.weight'
    if projection in fitted:  # timm converts it; here it is refused by name if it cannot
        convert_channels(fitted[projection], model.patch_embed.proj.in_channels, projection)

    # timm's strict mode compares the classifier, and drops it where the number of classes differs.
    classifier = model.pretrained_cfg.get('classifier') or 'head'
    names = [classifier] if isinstance(classifier, str) else classifier
    heads = {f'{name}.{kind}' for name in names for kind in ('weight', 'bias')}
    missing = model.state_dict().keys() - fitted.keys() - heads
    if f'{EMBED}proj.weight' in missing:  # then ours were not completed either
        missing = {key for key in missing if not key.startswith(ADAPTIVE_KEYS)}
    unexpected = fitted.keys() - model.state_dict().keys() - heads
    if not isinstance(model.fc_norm, nn.Identity):
        # Average pooling has its norm after the pool; as in timm, that norm starts afresh from a ViT that pools its
        # class token.
        missing -= {'fc_norm.weight', 'fc_norm.bias'} if unexpected & {'norm.weight'} else set()
        unexpected -= {'norm.weight', 'norm.bias'}
    if model.attn_pool is None:
        unexpected = {key for key in unexpected if not key.startswith('attn_pool.')}
    if missing or unexpected:
        raise ValueError(
            f'expected a checkpoint of a ViT or an APViT that fits this {type(model).__name__}; '
            f'missing keys: {listed(sorted(missing))}; unexpected keys: {listed(sorted(unexpected))}'
            f'{_hint(missing, unexpected)}'
        )
    return fitted


def _hint(missing: set[str], unexpected: set[str]) -> str:
    """What the keys that do not fit say of the model that they are of."""
    if any('.focus.' in key for key in unexpected):
        return "; the checkpoint is of a model with max_focus, in whose place localizer='glance' is now"
    if any(key.endswith('.ls1.gamma') for key in unexpected):
        return '; the checkpoint has LayerScale: take the twin of its ViT by name, or init_values=1e-5'
    if 'reg_token' in unexpected:
        return '; the checkpoint has registers: take the twin of its ViT by name, or reg_tokens'
    if fields := {key.split('.')[-2] for key in unexpected if key.startswith(f'{EMBED}{LOCALIZER}fields.')}:
        known = [name for name, family in TRANSFORMS.items() if fields <= set(family.fields)]
        named = f' such as transform={" or ".join(map(repr, known))}' if known else ''
        return f'; the checkpoint is of a larger transform{named}, and its {", ".join(sorted(fields))} is not zero'
    if any(key.startswith(EMBED + LOCALIZER) for key in missing | unexpected):
        return '; if it is whole, it is of a model with another localizer, other options of it, or a larger transform'
    return ''


def _fit_layout(state_dict: StateDict, model: Any, vit_filter: Callable[[StateDict, Any], StateDict]) -> StateDict:
    """Timm's own filter, which fails on other prefix tokens without a name: here they are named."""
    try:
        return dict(vit_filter(state_dict, model))
    except RuntimeError as error:
        shapes = {
            key: list(state_dict[key].shape) for key in ('pos_embed', 'cls_token', 'reg_token') if key in state_dict
        }
        num_prefix_tokens = 0 if model.no_embed_class else model.num_prefix_tokens
        raise ValueError(
            f'expected a pos_embed of {num_prefix_tokens} prefix tokens and a grid, got a checkpoint with {shapes}'
        ) from error


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
