"""Teachers by name: what a model can learn from another, checked before any work."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from torch import nn

from timm_apvit.failures import one_line
from timm_apvit.finetuning.models import Start, check_registered, classes_of_checkpoint, create_model
from timm_apvit.finetuning.settings import SELF, Settings
from timm_apvit.learning.distillation import DistillationWeights, Teacher, check_attends, outputs_of
from timm_apvit.models.mixin import APViT


def create_teacher(
    settings: Settings, start: Start, data_config: dict[str, Any]
) -> tuple[Teacher, DistillationWeights] | None:
    """Make the teacher of the settings, and settle the weights of its terms; None: there is none.

    Args:
        settings: name the teacher.
        start: the student, with the weights that it starts from.
        data_config: of the images that the student takes.
    """
    if settings.teacher is None:
        return None
    check_teacher(settings)
    model, knows_classes = _teacher_model(settings, start)
    if settings.attention_weight > 0:
        check_attends(model)
    teacher = _fit_images(model, settings.teacher, data_config)
    with torch.no_grad():
        image = torch.zeros(1, *data_config['input_size'])
        try:
            taught = teacher.eval()(image, settings.attention_weight > 0)
        # A model that is not made like a ViT may fail in any way.
        except Exception as error:
            raise ValueError(f'cannot take {settings.teacher} for a teacher: {one_line(error)}') from error
        learned = outputs_of(deepcopy(start.model).eval(), image)
    knows_classes &= taught.logits.shape == learned.logits.shape
    return teacher, _weights(settings, knows_classes, taught.features.shape, learned.features.shape)


def check_teacher(settings: Settings) -> None:
    """Raise ValueError, before any work, for a teacher of a name that nobody knows, or ``self`` without weights."""
    name, trained = settings.teacher, settings.checkpoint is not None or settings.pretrained
    if name == SELF and not trained:
        raise ValueError('expected --pretrained or --checkpoint with --teacher self, got an untrained model')
    if name not in (None, SELF) and not Path(str(name)).is_file():
        check_registered(str(name), 'vit_*_patch16_224')


def _teacher_model(settings: Settings, start: Start) -> tuple[nn.Module, bool]:
    """The teacher, and whether its classifier was trained."""
    name = str(settings.teacher)
    if name == SELF:
        model = deepcopy(start.model)
        model.set_num_patches(None)
        return model, start.knows_classes
    if Path(name).is_file():
        known = classes_of_checkpoint(name) or 0
        kwargs = {key: value for key, value in settings.model_kwargs.items() if key != 'num_patches'}
        full_grid = replace(settings, checkpoint=name, pretrained=False, num_patches=None, model_kwargs=kwargs)
        return create_model(full_grid, known, weights=True, known_classes=known), known > 0
    try:
        return timm.create_model(name, pretrained=True), True
    # Weights that are out of reach or damaged fail in many ways.
    except Exception as error:
        raise ValueError(f'cannot create the teacher {name}: {one_line(error)}') from error


def _fit_images(model: nn.Module, name: str, data_config: dict[str, Any]) -> Teacher:
    """Make the student's images those that a teacher takes."""
    own = data_config if name == SELF else resolve_data_config({}, model=model)
    size = None if isinstance(model, APViT) else (own['input_size'][1], own['input_size'][2])
    channels = data_config['input_size'][0]
    if own['input_size'][0] != channels:
        raise ValueError(f'expected a teacher of images with {channels} channels, got {name} of {own["input_size"][0]}')
    values = zip(data_config['mean'], data_config['std'], own['mean'], own['std'], strict=True)
    scale_and_shift = [(std / own_std, (mean - own_mean) / own_std) for mean, std, own_mean, own_std in values]
    return Teacher(model, size, *(list(each) for each in zip(*scale_and_shift, strict=True)))


def _weights(settings: Settings, knows_classes: bool, taught: torch.Size, learned: torch.Size) -> DistillationWeights:
    """Settle the weights that the settings leave open, and refuse those that cannot be."""
    fits = taught == learned
    logits, token = settings.distill_weight, settings.token_weight
    if logits and not knows_classes:
        raise ValueError(
            f"expected a teacher whose classifier was trained on the data's classes for --distill-weight {logits:g}, "
            f'got {settings.teacher}; set --distill-weight 0 and take --token-weight or --attention-weight'
        )
    if token and not fits:
        raise ValueError(
            f'expected a teacher as wide as the model for --token-weight, features of {list(learned[1:])}, '
            f'got {list(taught[1:])} of {settings.teacher}'
        )
    if logits is None:
        logits = 0.5 if knows_classes else 0.0
    if token is None:
        token = 1.0 if fits and not knows_classes else 0.0
    if not (logits or token or settings.attention_weight):
        raise ValueError(
            f'expected something to learn from the teacher {settings.teacher}, got weights of 0 only: its classes are '
            f'{"" if knows_classes else "not "}those of the data, its width {"fits" if fits else "does not fit"}'
        )
    return DistillationWeights(logits, settings.distill_temperature, token, settings.attention_weight)
