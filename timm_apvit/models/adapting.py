"""From a built ViT to an APViT and back."""

import copy
from typing import Any

from timm.layers import PatchEmbed
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from timm_apvit.models.apvit import twin_name, vit_name
from timm_apvit.models.mixin import ADAPTIVE_ARGS, APViT, check_apvit, split_adaptive, where_is
from timm_apvit.models.patch_embed import TAKEN_OVER
from timm_apvit.models.vits import ADAPTIVE_CLASSES
from timm_apvit.patching.anchors import NumPatches


def adapt(model: nn.Module, num_patches: NumPatches | None = None, **adaptive: Any) -> APViT:
    """Make an APViT of a built ViT of timm: with its weights, its modes, its device and dtype, and its own output.

    The model that is given stays as it is; nothing is shared.

    Args:
        model: of timm's classes ``VisionTransformer``, ``VisionTransformerDistilled`` and ``Eva``.
        num_patches: as for `APViT`; default: the model's own grid.
        adaptive: further arguments of `APViT`: ``transform``, ``localizer``, ``jitter``, ``max_shift``, ...

    Returns:
        A model that `timm_apvit.save_pretrained` saves, if one of timm's registered entrypoints made the ViT.

    Raises:
        ValueError: not such a model, one that another library wrapped or quantised, one without weights, or an argument
            out of range.
        TypeError: an unknown argument.
    """
    _check_vit(model)
    known, unknown = split_adaptive({'num_patches': num_patches, **adaptive})
    if unknown:
        raise TypeError(f'expected arguments among {", ".join(sorted(ADAPTIVE_ARGS))}, got {", ".join(unknown)}')
    try:
        twin: Any = copy.deepcopy(model)
    except RuntimeError as error:  # weights that a hook computes, as weight_norm and prune do
        raise ValueError(f'expected a ViT that can be copied, got one that cannot: {error}') from error
    twin.__class__ = ADAPTIVE_CLASSES[type(model)]
    twin.make_adaptive(**known)
    _rename(twin, twin_name)
    adapted: APViT = twin
    return adapted


def vit_of(model: APViT) -> nn.Module:
    """The ViT of timm that an APViT is without its adaptive patches: the fixed grid of its ``img_size``.

    The model that is given stays as it is; nothing is shared.

    Raises:
        ValueError: not an APViT.
    """
    check_apvit(model)
    vit: Any = copy.deepcopy(model)
    vit.__class__ = next(theirs for theirs, ours in ADAPTIVE_CLASSES.items() if isinstance(model, ours))
    adaptive = vit.patch_embed
    embed = PatchEmbed.__new__(PatchEmbed)
    nn.Module.__init__(embed)
    for name in TAKEN_OVER:
        setattr(embed, name, getattr(adaptive, name))
    embed.strict_img_size = adaptive.flatten
    vit.patch_embed = embed.train(adaptive.training)
    left_out = ADAPTIVE_ARGS | adaptive.patching.arguments().keys()
    vit._model_args = {k: v for k, v in vit._model_args.items() if k not in left_out}
    _rename(vit, vit_name)
    fixed: nn.Module = vit
    return fixed


def _rename(model: Any, rename: Any) -> None:
    """Give a model's configuration the name of its twin, if it has one; else saving refuses it."""
    cfg = dict(getattr(model, 'pretrained_cfg', None) or {})
    try:
        cfg['architecture'] = rename(cfg.get('architecture') or '')
    except ValueError:
        cfg['architecture'] = None
    model.pretrained_cfg = model.default_cfg = cfg


def _check_vit(model: Any) -> None:
    """Raise ValueError unless a model is a ViT that can be made adaptive."""
    if isinstance(model, APViT):
        raise ValueError(
            'expected a ViT without adaptive patches, got an APViT; set_num_patches changes how many it has'
        )
    if type(model) not in ADAPTIVE_CLASSES:
        known = ', '.join(each.__name__ for each in ADAPTIVE_CLASSES)
        raise ValueError(f"expected a ViT of timm's classes {known}, got {type(model).__name__}{where_is(model)}")
    if any(type(each).__module__.startswith('peft.') for each in model.modules()):
        raise ValueError('expected a ViT without adapters, got one with those of PEFT; give its merge_and_unload()')
    projection = getattr(model.patch_embed, 'proj', None)
    if type(model.patch_embed) is not PatchEmbed or type(projection) is not nn.Conv2d or is_parametrized(projection):
        raise ValueError(
            'expected a ViT that takes its patches by one convolution, got one whose patch_embed is '
            f'{type(model.patch_embed).__name__} with {type(projection).__name__}'
        )
    if model.patch_embed._forward_hooks or model.patch_embed._forward_pre_hooks:
        raise ValueError('expected a ViT without hooks on its patch_embed, which gives other things here, got some')
    quantised = [name for name, each in model.named_modules() if '.quantized' in type(each).__module__]
    if quantised or not projection.weight.is_floating_point():
        raise ValueError(
            f'expected a ViT of floating-point weights, got a quantised one: {quantised[:3] or projection}'
        )
    if any(each.is_meta for each in (*model.parameters(), *model.buffers())):
        raise ValueError('expected a ViT with weights, got one on the meta device')
