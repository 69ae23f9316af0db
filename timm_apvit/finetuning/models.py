"""Models to fine-tune: created by name, with weights from where they are."""

import re
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from safetensors import safe_open
from timm.models import clean_state_dict, load_state_dict

from timm_apvit.failures import one_line
from timm_apvit.finetuning.checkpoints import BEST
from timm_apvit.finetuning.settings import CONFIG_FILE, Settings
from timm_apvit.finetuning.values import count
from timm_apvit.models.apvit import twin_name
from timm_apvit.models.checkpoint import LOCALIZER, source_repository
from timm_apvit.models.mixin import APViT
from timm_apvit.pictures.images import image_config, per_channel

MODEL_HELP = (
    "folder of a run (its best model) or of a saved model, a model's name on the Hugging Face Hub, or a registered "
    "model's name, with its pretrained weights"
)
HUB_NAME = re.compile(r'\w[\w.-]*/[\w.-]+')
CLASSIFIER_ENDS = ('head.bias', 'head/bias')
PROJECTION = 'patch_embed.proj.weight'

Shapes = dict[str, tuple[int, ...]]


class Start(NamedTuple):
    """A model before its training.

    Attributes:
        model: with the weights that it starts from.
        knows_classes: whether its classifier was trained, on as many classes as it has.
        notes: what people should know of it.
    """

    model: APViT
    knows_classes: bool
    notes: tuple[str, ...]


def start_model(settings: Settings, num_classes: int, weights: bool = True) -> Start:
    """Create the model of the settings, with their weights, if wanted, and a classifier for so many classes."""
    if not weights:
        model = create_model(settings, num_classes)
        model.base_model = source_repository(model.pretrained_cfg)
        return Start(model, False, ())
    if settings.checkpoint is None and not settings.pretrained:
        source = f'; --pretrained takes the weights of {settings.model}' if ':' in str(settings.model) else ''
        notes: tuple[str, ...] = (f'the model starts untrained{source}',) if settings.data is not None or source else ()
        return Start(create_model(settings, num_classes), False, notes)
    file = settings.checkpoint
    shapes = None if file is None else shapes_of_checkpoint(file)
    known = None if file is None or shapes is None else _classes_in(shapes, file)
    model = create_model(settings, num_classes, weights=True, known_classes=known)
    notes = () if shapes is None else _notes_on_weights(model, settings, shapes)
    if known is None:
        known = int(model.pretrained_cfg.get('num_classes') or 0)
    if known == num_classes:
        return Start(model, True, notes)
    has = f'has {known} classes' if known else 'is none'
    anew = f'the classifier starts anew: that of the weights {has}, the data have {num_classes}'
    return Start(model, False, (anew, *notes))


def _notes_on_weights(model: APViT, settings: Settings, shapes: Shapes) -> tuple[str, ...]:
    """What the model takes for granted of the weights in a file, which do not say it."""
    notes: list[str] = []
    held, own = shapes.get(PROJECTION, ())[2:], tuple(model.patch_embed.patch_size)
    if len(held) == 2 and held != own:
        sizes = [f'{h} x {w}' for h, w in (held, own)]
        notes.append(f'the weights are of patches of {sizes[0]} pixels, resampled to {sizes[1]}: is it their model?')
    if settings.mean is None:
        mean, std = (', '.join(f'{value:g}' for value in image_config(model)[key]) for key in ('mean', 'std'))
        notes.append(
            f'images are normalised by mean {mean} and std {std}, as {settings.model} has them (--mean, --std)'
        )
    return tuple(notes)


def create_model(
    settings: Settings,
    num_classes: int | None,
    weights: bool = False,
    known_classes: int | None = None,
    any_vit: bool = False,
) -> APViT:
    """Create the model of the settings.

    Args:
        settings: its name, arguments and weights.
        num_classes: 0: without a classifier; None: as many as its weights have.
        weights: whether to load them.
        known_classes: classes of the weights, if they say so.
        any_vit: whether models of timm without adaptive patches will do.
    """
    name = str(settings.model)
    optional = {'transform': settings.transform, 'img_size': settings.img_size, 'localizer': settings.localizer}
    kwargs = {**settings.model_kwargs, **{key: value for key, value in optional.items() if value is not None}}
    if settings.num_patches:
        kwargs['num_patches'] = max(settings.num_patches, key=count)
    if num_classes is not None:
        kwargs['num_classes'] = num_classes
    check_registered(name, '*apvit*')
    twin = None
    with suppress(ValueError):  # it is none of timm's ViTs, or has no twin
        twin = twin_name(name)
    if twin is not None and not any_vit:
        raise ValueError(f'expected an APViT, got {name!r}, which is a ViT; its twin is {twin}')
    overlay: dict[str, Any] = {} if known_classes is None else {'num_classes': known_classes}
    if weights and settings.checkpoint is not None:
        overlay |= {'file': settings.checkpoint, 'custom_load': settings.checkpoint.endswith('.npz')}
    if overlay:
        kwargs['pretrained_cfg_overlay'] = {**kwargs.get('pretrained_cfg_overlay', {}), **overlay}
    try:
        model = timm.create_model(name, pretrained=weights, **kwargs)
    # Weights that are damaged, of another model or out of reach fail in as many ways as there are formats.
    except Exception as error:
        source = f' with the weights in {settings.checkpoint}' if weights and settings.checkpoint else ''
        raise ValueError(f'cannot create {name}{source}: {one_line(error)}') from error
    if not isinstance(model, APViT) and not any_vit:
        raise ValueError(f'expected an APViT, got {name!r}, which is a {type(model).__name__}')
    created: APViT = model
    return created


def with_images(model: APViT, settings: Settings) -> APViT:
    """The model, which takes images cropped and normalised as the settings say, here and wherever it is loaded."""
    in_chans = image_config(model)['input_size'][0]
    for key in ('mean', 'std', 'crop_pct'):
        if (value := getattr(settings, key)) is not None:
            if isinstance(value, list) and len(value) not in (1, in_chans):
                raise ValueError(f'expected --{key} of {in_chans} channels, got {len(value)} values')
            model.pretrained_cfg[key] = value if key == 'crop_pct' else per_channel(value, in_chans)
    return model


def load_model(name: str, any_vit: bool = False) -> APViT:
    """Load the best model of a run, a saved one, one of the Hub, or a registered one with its pretrained weights.

    Args:
        name: of one of them.
        any_vit: whether models of timm without adaptive patches will do.
    """
    address = address_of(name)
    if ':' not in address and not any_vit:  # before its weights are looked for
        with torch.device('meta'):
            create_model(Settings(model=address), None)
    try:
        return create_model(Settings(model=address), None, True, any_vit=any_vit)
    except ValueError as error:
        if HUB_NAME.fullmatch(name) and address.startswith('hf-hub:'):
            raise ValueError(f'expected a folder or a name on the Hub, got {name!r}, no folder: {error}') from error
        raise


def address_of(name: str) -> str:
    """What timm knows a model by whose name is that of a run, a folder, on the Hub, or registered."""
    directory = folder_of(name)
    if directory is not None:
        return f'local-dir:{directory}'
    if HUB_NAME.fullmatch(name):
        return f'hf-hub:{name}'
    if '/' in name and ':' not in name:
        raise FileNotFoundError(f'expected the folder of a run or of a saved model, got {name!r}, which does not exist')
    check_registered(name, '*apvit*')
    return name


def folder_of(name: str) -> Path | None:
    """The folder of the saved model that a name stands for: that of a run's best; None: it is no folder's."""
    local = name.startswith('local-dir:')
    path = Path(name.removeprefix('local-dir:'))
    if (path / CONFIG_FILE).is_file():
        if not (path / BEST).is_dir():
            raise FileNotFoundError(f'expected a run with a saved model, got {name!r}, which has none yet')
        return path / BEST
    if local and not path.is_dir():
        raise FileNotFoundError(f'expected a folder with a model, got {name!r}')
    if local or (path / 'config.json').is_file():
        return path
    if path.exists() and not timm.is_model(name):
        what = f'which holds neither {CONFIG_FILE} nor config.json' if path.is_dir() else 'a file'
        raise ValueError(f'expected the folder of a run or of a saved model, got {name!r}, {what}')
    return None


def load_weights(name: str, checkpoint: str) -> APViT:
    """Create a registered model with the weights in a file, and as many classes as these have."""
    if ':' in name:
        raise ValueError(f'expected a registered model with --checkpoint, got {name!r}, which has weights of its own')
    classes = classes_of_checkpoint(checkpoint)
    if classes == 0:
        raise ValueError(f'expected weights with a classifier, got {checkpoint}, which has none')
    return create_model(Settings(model=name, checkpoint=checkpoint), classes, weights=True, known_classes=classes)


def check_registered(name: str, among: str) -> None:
    """Raise ValueError unless timm knows a model of this name, or where to look for it; say which names are near."""
    architecture = name.partition('.')[0]
    if ':' not in name and not timm.is_model(architecture):
        near = ', '.join(get_close_matches(architecture, timm.list_models(among), n=4, cutoff=0))
        raise ValueError(f'expected a registered model, such as {near}, got {name!r}, which is no folder either')


def classes_of_checkpoint(path: str) -> int | None:
    """The number of classes of a checkpoint of a ViT or an APViT; 0: it has no classifier; None: it does not say."""
    return _classes_in(shapes_of_checkpoint(path), path)


def check_checkpoint(path: str) -> None:
    """Raise FileNotFoundError unless a checkpoint is a file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f'expected a checkpoint file, got {path!r}, which is not a file')


def shapes_of_checkpoint(path: str) -> Shapes:
    """The shapes of the weights in a file; ValueError if it is not readable."""
    check_checkpoint(path)
    try:
        return _shapes(path)
    # Damaged files fail in as many ways as there are formats.
    except Exception as error:
        raise ValueError(f'expected a checkpoint, got an unreadable {path}: {one_line(error)}') from error


def _classes_in(shapes: Shapes, path: str) -> int | None:
    """See `classes_of_checkpoint`."""
    if not any(key.startswith('blocks.') for key in shapes) and not path.endswith('.npz'):
        return None  # of a layout that timm converts
    return next((shape[0] for key, shape in shapes.items() if key.endswith(CLASSIFIER_ENDS)), 0)


def is_of_a_vit(path: str) -> bool:
    """Whether a checkpoint is of a model without a localiser; one that cannot be read is, as it is refused later."""
    try:
        return not any(LOCALIZER in key for key in _shapes(path))
    except Exception:  # of any kind: there are many formats
        return True


def _shapes(path: str) -> Shapes:
    """The shapes of the weights in a file, by keys as timm cleans them; of a .npz in JAX's layout the classifier's."""
    if path.endswith('.npz'):
        with np.load(path, allow_pickle=False) as arrays:
            return {key: arrays[key].shape for key in arrays.files if key.endswith(CLASSIFIER_ENDS)}
    if path.endswith('.safetensors'):
        with safe_open(path, framework='pt') as tensors:
            shapes = {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118  no dict
        return dict(clean_state_dict(shapes))
    weights = load_state_dict(path)
    if nested := [key for key, value in weights.items() if isinstance(value, dict)]:
        names = ', '.join(repr(key) for key in nested)
        raise ValueError(f'its weights lie one level deeper, under {names}: save one of these as a file of its own')
    return {key: tuple(value.shape) for key, value in weights.items() if hasattr(value, 'shape')}
