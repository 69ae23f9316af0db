"""Saving models so that timm rebuilds them with every adaptive argument."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any, Optional, Union

from timm.models._hub import save_for_hf
from torch import nn

from timm_apvit.vision_transformer import APViT


def reconstruction_args(model: APViT) -> dict[str, Any]:
    """Arguments of ``create_model`` that rebuild a model as it is now, without its classes and its drop rates.

    Raises:
        ValueError: the model was made with an argument that config.json cannot hold.
    """
    recorded = {**model._model_args, **model.adaptive_args()}
    args = {k: v for k, v in recorded.items() if k != 'num_classes' and not k.endswith('_rate')}
    for name, value in args.items():
        try:
            json.dumps(value)
        except TypeError:
            raise ValueError(f'expected arguments that config.json can hold, got {name}={value!r}') from None
    in_chans, img_size = model.patch_embed.patching.in_chans, list(model.patch_embed.img_size)
    now = {'in_chans': in_chans, 'img_size': img_size, 'global_pool': model.global_pool, 'depth': len(model.blocks)}
    if isinstance(model.norm, nn.Identity) and isinstance(model.fc_norm, nn.Identity):
        now['final_norm'] = False
    return {**args, **now}


def save_pretrained(
    model: APViT,
    directory: Union[str, os.PathLike[str]],
    label_names: Optional[list[str]] = None,
    model_config: Optional[dict[str, Any]] = None,
) -> None:
    """Save a model as ``model.safetensors`` and ``config.json``, which hold all that rebuilds it.

    ``timm.create_model('local-dir:DIRECTORY', pretrained=True)`` gives the model back, with the same logits and every
    adaptive argument, also after ``set_num_patches``, ``set_input_size`` and ``reset_classifier``. Use this rather
    than timm's own functions, which lose the number of patches before timm 1.0.31. Each file appears whole or not at
    all.

    Args:
        model: an APViT.
        directory: made if it does not exist; files of the same names in it are replaced.
        label_names: of the classes, in order.
        model_config: further entries of config.json.

    Raises:
        ValueError: not an APViT, or made with an argument that config.json cannot hold.
    """
    if not isinstance(model, APViT):
        raise ValueError(f'expected an APViT, got {type(model).__name__}')
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    config = {**(model_config or {}), **({'label_names': list(label_names)} if label_names else {})}
    with tempfile.TemporaryDirectory(dir=target, prefix='.saving-') as unfinished:
        save_for_hf(
            model, unfinished, model_config=config, model_args=reconstruction_args(model), safe_serialization=True
        )
        _mend_config(Path(unfinished, 'config.json'), model.patch_embed.patching.in_chans, model.patch_embed.img_size)
        for name in ('model.safetensors', 'config.json'):
            Path(unfinished, name).replace(target / name)


def _mend_config(path: Path, in_chans: int, img_size: tuple[int, int]) -> None:
    """Mend what some releases of timm write and cannot read back, and the size that images are to have."""
    config = json.loads(path.read_text())
    # timm 1.0.31 repeats num_classes here, and transformers then passes it twice.
    config['model_args'].pop('num_classes', None)
    pretrained_cfg = config['pretrained_cfg']
    pretrained_cfg['input_size'] = [in_chans, *img_size]
    pretrained_cfg.pop('test_input_size', None)
    if in_chans != 3:
        # timm < 1.0.31 takes any first convolution for one of 3 channels and drops weights that it cannot convert.
        pretrained_cfg['first_conv'] = None
    path.write_text(json.dumps(config, indent=2) + '\n')
