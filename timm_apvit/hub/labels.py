"""Names of classes: what users have at hand for them, as the list that config.json holds."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

# Of the classes in order, or by number, as transformers' id2label has them.
LabelNames = Iterable[str] | Mapping[int, str] | Mapping[str, str]


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
            raise ValueError(
                f'expected label_names by number, from 0 to {len(wanted) - 1}, got the keys {_listed(label_names)}'
            )
        names = [by_number[number] for number in wanted]
    else:
        names = list(label_names)
    others = [name for name in names if not isinstance(name, str)]
    if others:
        raise ValueError(f'expected label_names that are strings, got {_listed(others)}')
    if len(names) != num_classes:
        raise ValueError(f'expected names of {num_classes} classes, got {len(names)}: {_listed(names)}')
    if twice := [name for name, number in Counter(names).items() if number > 1]:
        raise ValueError(f'expected label_names that all differ, got {_listed(twice)} more than once')
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


def _listed(values: Iterable[object], most: int = 5) -> str:
    """The first few of some values."""
    shown = [repr(value) for value in values]
    return ', '.join(shown[:most] + ['...'] * (len(shown) > most))
