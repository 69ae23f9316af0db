"""What a model's outputs mean: the names of its classes, and whether one image is of several."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from timm.data import ImageNetInfo
from torch import Tensor

from timm_apvit.failures import listed

# Of the classes in order, or by number, as transformers' id2label has them.
LabelNames = Iterable[str] | Mapping[int, str] | Mapping[str, str]
# The `problem_type` of config.json, as transformers has it; in a model of timm it is one of the notes.
MULTI_LABEL = 'multi_label_classification'
IMAGENET = 1000


def class_names(model: Any) -> list[str]:
    """The names of a model's classes, in order: as it was saved with, ImageNet's for timm's weights, or numbers."""
    config = model.pretrained_cfg
    if names := own_label_names(model):
        return names
    of_timm = str(config.get('hf_hub_id') or '').startswith('timm/') and not config.get('file')
    if model.num_classes == IMAGENET and of_timm:
        info = ImageNetInfo('imagenet-1k')
        return [info.index_to_description(n) for n in range(IMAGENET)]
    return [str(n) for n in range(model.num_classes)]


def own_label_names(model: Any) -> list[str] | None:
    """The names that a model was saved with; None: it has none, or other classes since then."""
    names = model.pretrained_cfg.get('label_names') or ()
    return [str(name) for name in names] if len(names) == model.num_classes > 0 else None


def is_multi_label(model: Any) -> bool:
    """Whether a model was trained to tell of any number of its classes in an image, which do not exclude each other."""
    return _note(model) in (model.pretrained_cfg.get('notes') or ())


def kind_notes(model: Any, multi_label: bool) -> list[str] | None:
    """The notes of a model of timm, of which one says whether it is `is_multi_label`; None: there are none."""
    others = [note for note in model.pretrained_cfg.get('notes') or () if not note.startswith(MULTI_LABEL)]
    return others + [_note(model)] * multi_label or None


def _note(model: Any) -> str:
    """With how many classes, so that it does not hold of others."""
    return f'{MULTI_LABEL}, {model.num_classes} classes'


def probabilities(model: Any, logits: Tensor, multi_label: bool | None = None) -> Tensor:
    """Of logits ``(B, classes)``: each class's own if several may hold (default: as the model says), else of sum 1."""
    several = is_multi_label(model) if multi_label is None else multi_label
    return logits.float().sigmoid() if several else logits.float().softmax(dim=1)


def checked_label_names(label_names: LabelNames, num_classes: int) -> list[str]:
    """The names of classes, in order.

    Args:
        label_names: in order, or by number: ``{0: 'owl', 1: 'tit'}``, whose keys may be strings of digits.
        num_classes: that there are to be names of.

    Raises:
        ValueError: not one string for each class, one twice, or without an order.
    """
    if isinstance(label_names, str | bytes | set | frozenset):
        raise ValueError(f'expected label_names as a list of strings, or by number, got {label_names!r}')
    if isinstance(label_names, Mapping):
        by_number = {str(number): name for number, name in label_names.items()}
        wanted = [str(number) for number in range(len(by_number))]
        if by_number.keys() != set(wanted):
            keys = listed(map(repr, label_names))
            raise ValueError(f'expected label_names by number, from 0 to {len(wanted) - 1}, got the keys {keys}')
        names = [by_number[number] for number in wanted]
    else:
        names = list(label_names)
    others = [name for name in names if not isinstance(name, str)]
    if others:
        raise ValueError(f'expected label_names that are strings, got {listed(map(repr, others))}')
    if len(names) != num_classes:
        raise ValueError(f'expected names of {num_classes} classes, got {len(names)}: {listed(map(repr, names))}')
    if twice := [name for name, number in Counter(names).items() if number > 1]:
        raise ValueError(f'expected label_names that all differ, got {listed(map(repr, twice))} more than once')
    return [str(name) for name in names]  # numpy's strings too


def saved_label_names(folder: Path, num_classes: int) -> list[str] | None:
    """The names of the classes that a saved model has, in order.

    Raises:
        ValueError: they are of other classes than the model has, as after a change of its head in another library.
    """
    config = json.loads((folder / 'config.json').read_text())
    names = config.get('label_names') or config['pretrained_cfg'].get('label_names')
    if not names:
        return None
    try:
        return checked_label_names(names, num_classes)
    except ValueError as error:
        raise ValueError(
            f'{error}, in {str(folder / "config.json")!r}; save the model with its own names, by '
            'timm_apvit.save_pretrained(model, directory, label_names=...)'
        ) from None
