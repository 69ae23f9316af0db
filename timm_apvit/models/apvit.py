"""Registered models: a twin with adaptive patches of every ViT of timm that has one, with its pretrained tags.

A twin is built by timm's own entrypoint, run with a builder of ours: its arguments are stated nowhere else. The
pretrained configurations are timm's own too, so mean, standard deviation, classes and licence have one source.
"""

import dataclasses
from functools import cache, partial
from types import FunctionType, ModuleType
from typing import Any

from timm.models import (
    DefaultCfg,
    NaFlexVit,
    build_model_with_cfg,
    deit,
    eva,
    is_model,
    list_models,
    model_entrypoint,
    register_model,
    register_model_deprecations,
    vision_transformer,
)

import timm_apvit.models.glance  # noqa: F401  registers it
from timm_apvit.models.checkpoint import checkpoint_filter_fn, source_repository
from timm_apvit.models.mixin import APViT
from timm_apvit.models.vits import ADAPTIVE_CLASSES
from timm_apvit.patching.coords import check_counts

MODULES = (vision_transformer, deit, eva)
# Names of their own, beside those that follow from the ViT's.
SHORT_NAMES = {
    'apvit_tiny': 'vit_tiny_patch16_224',
    'apvit_small': 'vit_small_patch16_224',
    'apvit_base': 'vit_base_patch16_224',
    'apvit_large': 'vit_large_patch16_224',
}
# Why other ViTs of timm have no twin, and what to take instead, by the module that builds them.
WITHOUT = {
    'beit': 'its blocks add a bias for each pair of cells of a fixed grid; take the twin of an EVA-02 or a DINOv2',
    'vision_transformer_hybrid': 'a CNN makes its tokens: there are no patches to move; take the twin of a plain ViT',
    'vitamin': 'a CNN makes its tokens: there are no patches to move; take the twin of a plain ViT',
    'naflexvit': 'its tokens come from grids that vary; take the twin of the ViT with the same weights',
    '_registry': 'timm has it under another name, which create_model tells',
    'swin_transformer': 'it attends within windows of a fixed grid; take the twin of a plain ViT',
}

default_cfgs: dict[str, DefaultCfg] = {}
_VITS: dict[str, str] = dict(SHORT_NAMES)
_WITHOUT_TWIN: dict[str, str] = {}


def twin_name(name: str) -> str:
    """Name of the adaptive twin of a ViT of timm, with its tag if it has one: ``'apvit_small_patch14_dinov2'``.

    ``vit_`` at its start becomes ``apvit_``, which else goes before it; ``test_vit`` becomes ``test_apvit``.

    Raises:
        ValueError: the model has no twin; why, and what to take instead.
    """
    vit, dot, tag = str(name).partition('.')
    if _rule(vit) in _VITS:
        return _rule(vit) + dot + tag
    why = 'timm has no such model'
    if vit in _VITS:
        why = 'it is adaptive already'
    elif is_model(vit):
        module = model_entrypoint(vit).__module__.rpartition('.')[2]
        why = WITHOUT.get(module, 'it is none of VisionTransformer, VisionTransformerDistilled and Eva')
    raise ValueError(f'expected a ViT of timm that has an adaptive twin, got {name!r}: {why}')


def vit_name(name: str) -> str:
    """Name of the timm ViT that a registered APViT starts from, with its tag if it has one.

    Raises:
        ValueError: not the name of a registered APViT; why, if it is that of a ViT which has none.
    """
    architecture, dot, tag = str(name).partition('.')
    if architecture in _WITHOUT_TWIN:
        twin_name(_WITHOUT_TWIN[architecture])
    if architecture not in _VITS:
        raise ValueError(f'expected the name of an APViT, such as {", ".join(SHORT_NAMES)}, got {name!r}')
    return _VITS[architecture] + dot + tag


def no_twin(pretrained: bool = False, pretrained_cfg: str = '', **kwargs: Any) -> None:
    """What is called for the name that a twin would have: its ValueError says why the ViT, given by name, has none."""
    twin_name(pretrained_cfg)


def _rule(vit: str) -> str:
    return 'test_ap' + vit.removeprefix('test_') if vit.startswith('test_vit') else 'apvit_' + vit.removeprefix('vit_')


def _default_cfg(vit: str, cfg: DefaultCfg) -> DefaultCfg:
    """The configurations of a ViT for its twin; those on the Hub, which has native checkpoints, from there alone."""
    cfgs = {}
    for tag, each in cfg.cfgs.items():
        if each.hf_hub_id:
            repository = f'timm/{vit}.{tag}' if each.hf_hub_id == 'timm/' else each.hf_hub_id
            each = dataclasses.replace(each, hf_hub_id=repository, url=None, custom_load=False)
        cfgs[tag] = each
    return dataclasses.replace(cfg, cfgs=cfgs)


def _build(
    vit_class: type, variant: str, pretrained: bool, *, name: str, pretrained_filter_fn: Any, **kwargs: Any
) -> Any:
    """What timm's entrypoints call in place of ``build_model_with_cfg``: the same, of our class, name and filter."""
    if kwargs.get('img_size') is not None:
        kwargs['img_size'] = check_counts('img_size', 'h, w', kwargs['img_size'])
    model = build_model_with_cfg(
        ADAPTIVE_CLASSES[vit_class],
        name,
        pretrained,
        pretrained_filter_fn=partial(checkpoint_filter_fn, vit_filter=pretrained_filter_fn),
        **kwargs,
    )
    if pretrained and isinstance(model, APViT):  # features_only wraps it
        model.base_model = source_repository(model.pretrained_cfg)
    return model


@cache
def _rebound(module: ModuleType, name: str) -> dict[str, Any]:
    """The globals of a module of timm for the twin of a name: its functions that build models build ours."""
    shadow = {**vars(module), 'build_model_with_cfg': partial(_build, name=name)}
    for key, function in vars(module).items():
        if isinstance(function, FunctionType) and 'build_model_with_cfg' in function.__code__.co_names:
            shadow[key] = _with_globals(function, shadow)
    return shadow


def _with_globals(function: FunctionType, others: dict[str, Any]) -> FunctionType:
    """The same code, with other globals."""
    copy = FunctionType(function.__code__, others, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _register(name: str, module: ModuleType, entrypoint: FunctionType) -> None:
    """Register the twin of a ViT under a name."""

    def create(pretrained: bool = False, **kwargs: Any) -> APViT:
        model: APViT = _with_globals(entrypoint, _rebound(module, name))(pretrained=pretrained, **kwargs)
        inner = getattr(model, 'model', model)  # of what features_only makes by default
        if isinstance(inner, NaFlexVit) or not (isinstance(inner, APViT) or kwargs.get('features_only')):
            raise ValueError(
                f'expected timm to build an adaptive {name}, got a {type(model).__name__}; NaFlexViT has no adaptive '
                'patches: leave use_naflex out, and TIMM_USE_NAFLEX unset'
            )
        return model

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"{name}: timm's `{entrypoint.__name__}` with adaptive patches.\n\n{entrypoint.__doc__ or ''}"
    globals()[name] = create
    cfg = module.default_cfgs.get(entrypoint.__name__)
    if cfg is not None:
        default_cfgs[name] = _default_cfg(entrypoint.__name__, cfg)
    register_model(create)


def _register_all() -> None:
    for module in MODULES:
        for vit in list_models(module=module.__name__.rpartition('.')[2]):
            if vit not in vars(module):  # of somebody else's module of that name
                continue
            _VITS[_rule(vit)] = vit
            for name in (_rule(vit), *(short for short, of in SHORT_NAMES.items() if of == vit)):
                _register(name, module, vars(module)[vit])
    _WITHOUT_TWIN.update({_rule(vit): vit for vit in list_models(module=list(WITHOUT))})
    # As names that are gone: in no list, and timm gives what follows the dot to `no_twin` as its pretrained_cfg.
    register_model_deprecations(__name__, {name: f'no_twin.{vit}' for name, vit in _WITHOUT_TWIN.items()})


_register_all()
