"""Parts that one chooses by name: a table of classes, and the notation that config.json and the command line hold.

A part is asked for by its name, ``'cnn'``, or by a mapping with its name and options, ``{'name': 'cnn', 'side': 32}``.
"""

import json
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

Part = TypeVar('Part', bound=type)


class Parts(dict[str, Part], Generic[Part]):
    """The classes of one kind of part, by name.

    Args:
        kind: of part, which is also the argument that asks for one, as errors are to call it.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def register(self, name: str, part: Part) -> None:
        """Add a class. To register one again, as a notebook does whose cell is run twice, replaces it.

        Raises:
            ValueError: no name, or that of another class.
        """
        if not (isinstance(name, str) and name.isidentifier()):
            raise ValueError(f'expected a name such as my_{self.kind} for {part.__qualname__}, got {name!r}')
        taken = self.get(name)
        if taken is not None and (taken.__module__, taken.__qualname__) != (part.__module__, part.__qualname__):
            raise ValueError(f'expected a new name for {part.__qualname__}, got {name!r} of {taken.__qualname__}')
        self[name] = part

    def named(self, name: Any) -> Part:
        """The class of a name.

        Raises:
            ValueError: there is none.
        """
        if not isinstance(name, str) or name not in self:
            raise ValueError(
                f'expected {self.kind} to be one of {", ".join(self)}, or one given to register_{self.kind} by a '
                f'module that is imported before (on the command line with --import), got {name!r}'
            )
        return self[name]

    def create(self, wanted: Any, *args: Any, **kwargs: Any) -> Any:
        """Make the part that is asked for, with further arguments of ours.

        Raises:
            ValueError: neither a name nor a mapping with one, no class of that name, options that config.json cannot
                hold, or one that the class does not take, or whose value it refuses.
        """
        options = dict(wanted) if isinstance(wanted, Mapping) else {'name': wanted}
        if 'name' not in options:
            raise ValueError(f'expected a {self.kind} with its name, one of {", ".join(self)}, got {wanted!r}')
        name = options.pop('name')
        part = self.named(name)
        try:
            json.dumps(options, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f'expected options of {name} that JSON can hold, got {options!r}: {error}') from None
        try:
            return part(*args, **kwargs, **options)
        except TypeError as error:
            raise ValueError(f'expected options that the {self.kind} {name!r} takes, got {options}: {error}') from error
