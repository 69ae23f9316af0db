"""Saving models, so that timm rebuilds them with every adaptive argument."""

import json
import os
import shutil
import tempfile
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from timm import create_model
from timm.models import is_model, save_for_hf
from timm.models.eva import Eva
from torch import nn

from timm_apvit.failures import one_line
from timm_apvit.hub.labels import (
    MULTI_LABEL,
    LabelNames,
    checked_label_names,
    is_multi_label,
    kind_notes,
    own_label_names,
)
from timm_apvit.models.mixin import APViT, check_apvit
from timm_apvit.patching.transforms import other_bounds
from timm_apvit.pictures.images import normalisation_of

SAVED = ('model.safetensors', 'config.json')


def reconstruction_args(model: APViT) -> dict[str, Any]:
    """Arguments of ``create_model`` that rebuild a model as it is now, without its classes and its drop rates.

    Raises:
        ValueError: no registered entrypoint made the model, it was made with an argument that config.json cannot hold,
            or it was changed in a way that no argument rebuilds.
    """
    recorded: dict[str, Any] = {**model._model_args, **model.adaptive_args()}
    rates = {k: v for k, v in recorded.items() if k.endswith('_rate')}
    args = {k: v for k, v in recorded.items() if k != 'num_classes' and k not in rates}
    for name, value in args.items():
        try:
            json.dumps(value)
        except TypeError:
            raise ValueError(f'expected arguments that config.json can hold, got {name}={value!r}') from None
    in_chans, img_size = model.patch_embed.patching.in_chans, list(model.patch_embed.img_size)
    args |= {'in_chans': in_chans, 'img_size': img_size, 'global_pool': model.global_pool, 'depth': len(model.blocks)}
    if isinstance(model.norm, nn.Identity) and isinstance(model.fc_norm, nn.Identity):
        args |= dict.fromkeys(
            ('use_post_transformer_norm', 'use_fc_norm') if isinstance(model, Eva) else ('final_norm',), False
        )
    _check_rebuilt(model, {**args, **rates, 'num_classes': model.num_classes})
    return args


def _check_rebuilt(model: APViT, args: dict[str, Any]) -> None:
    """Raise ValueError unless the registered entrypoint of a model makes the same one of some arguments."""
    architecture = (getattr(model, 'pretrained_cfg', None) or {}).get('architecture')
    if not architecture or not is_model(architecture):
        raise ValueError(
            'expected a model that timm.create_model made, or adapt of such a one, got one of no registered name: what '
            'rebuilds it is not known'
        )
    try:
        with torch.device('meta'):
            rebuilt = create_model(architecture, **args)
    except Exception as error:
        raise ValueError(f'expected a model that {architecture} rebuilds, which fails: {one_line(error)}') from error
    pairs = [(repr(model).splitlines(), repr(rebuilt).splitlines())]
    pairs += [tuple([f'{k}: {tuple(v.shape)}' for k, v in each.state_dict().items()] for each in (model, rebuilt))]  # type: ignore[list-item]
    for now, then in pairs:
        differing = next(((a, b) for a, b in zip_longest(now, then, fillvalue='nothing') if a != b), None)
        if differing is not None:
            raise ValueError(
                f'expected a model that {architecture} rebuilds from its arguments, got one with '
                f'{differing[0].strip()!r} where that has {differing[1].strip()!r}; give create_model the arguments '
                'that make it so, or save weights alone, by safetensors'
            )


def save_pretrained(
    model: APViT,
    directory: str | os.PathLike[str],
    label_names: LabelNames | None = None,
    model_config: dict[str, Any] | None = None,
) -> None:
    """Save a model as ``model.safetensors`` and ``config.json``, which hold all that rebuilds it.

    ``timm.create_model('local-dir:DIRECTORY', pretrained=True)`` gives the model back, with the same logits and every
    adaptive argument, also after ``set_num_patches``, ``set_input_size`` and ``reset_classifier``. Each file appears
    whole or not at all.

    Args:
        model: an APViT.
        directory: made if it does not exist; files of the same names in it are replaced.
        label_names: of the classes, in order, or by number as transformers' ``id2label``; default: those that the
            model was loaded with, if it still has as many classes.
        model_config: further entries of config.json. A ``'problem_type'`` of ``'multi_label_classification'`` says that
            classes do not exclude each other; default of it: as the model was loaded, if it still has as many classes.

    Raises:
        ValueError: not an APViT, without weights, one that no registered entrypoint rebuilds from arguments that
            config.json can hold, or labels of other classes.
    """
    check_apvit(model)
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise ValueError('expected weights, got a model on the meta device')
    target = Path(directory)
    if (before := _loaded_by_transformers(model, target)) is not None:
        model.pretrained_cfg = {**model.pretrained_cfg, **before['pretrained_cfg'], **_labels_in(before)}
    config = {**({'base_model': model.base_model} if model.base_model else {}), **(model_config or {})}
    if label_names is None and own_label_names(model):
        config |= _labels_in(model.pretrained_cfg)
    elif label_names is not None:
        config['label_names'] = checked_label_names(label_names, model.num_classes)
    inherited = (before or {}).get('problem_type') or (MULTI_LABEL if is_multi_label(model) else None)
    kind = config.pop('problem_type', inherited)
    config |= {'problem_type': kind} if kind else {}
    model_args = reconstruction_args(model)
    model.pretrained_cfg = {
        **model.pretrained_cfg,
        **normalisation_of(model),
        'notes': kind_notes(model, kind == MULTI_LABEL),
    }
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target, prefix='.saving-') as unfinished:
        try:
            save_for_hf(model, unfinished, model_config=config, model_args=model_args, safe_serialization=True)
        except RuntimeError as error:
            raise ValueError(f'expected weights that safetensors can hold: {one_line(error)}') from error
        _mend_config(Path(unfinished, 'config.json'), model.patch_embed.patching.in_chans, model.patch_embed.img_size)
        for name in SAVED:
            # safetensors makes files that only their owner reads.
            shutil.copymode(Path(unfinished, 'config.json'), Path(unfinished, name))
            Path(unfinished, name).replace(target / name)


def _loaded_by_transformers(model: APViT, folder: Path) -> dict[str, Any] | None:
    """The configuration in a folder of which transformers made a model, as that does not tell the model of it."""
    path = folder / 'config.json'
    if not path.is_file() or not any(getattr(p, '_is_hf_initialized', False) for p in model.parameters()):
        return None
    config: dict[str, Any] = json.loads(path.read_text())
    return config if config.get('architecture') == model.pretrained_cfg.get('architecture') else None


def _labels_in(config: dict[str, Any]) -> dict[str, Any]:
    """The names of classes that a configuration has, and what it says of them."""
    return {key: config[key] for key in ('label_names', 'label_descriptions') if config.get(key)}


def _mend_config(path: Path, in_chans: int, img_size: tuple[int, int]) -> None:
    """Mend what timm writes and others cannot read back, and the size that images are to have."""
    config = json.loads(path.read_text())
    # timm repeats num_classes here, and transformers then passes it twice; it also records all that it was given, and
    # so bounds of a family that the model had before.
    for name in ('num_classes', *other_bounds(config['model_args']['transform'])):
        config['model_args'].pop(name, None)
    pretrained_cfg = config['pretrained_cfg']
    pretrained_cfg['input_size'] = [in_chans, *img_size]
    pretrained_cfg.pop('test_input_size', None)
    if 'label_names' in config:
        pretrained_cfg.pop('label_names', None)
        pretrained_cfg.pop('label_descriptions', None)
    path.write_text(json.dumps(config, indent=2) + '\n')
