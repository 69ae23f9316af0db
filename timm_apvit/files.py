"""Files that appear whole or not at all."""

import csv
import io
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from timm_apvit.failures import one_line

AnyPath = str | os.PathLike[str]


def check_writable(path: AnyPath, overwrite: bool = True) -> None:
    """Raise an OSError unless a file can be written, and replaces none but if it may."""
    path = Path(path)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise FileNotFoundError(f'expected a file in a folder that exists, got {str(path)!r}')
    if path.exists() and not overwrite:
        raise FileExistsError(
            f'expected a file that does not exist yet, got {str(path)!r} (overwrite=True, or --overwrite, replaces it)'
        )
    if path.exists() and not path.is_file():  # a pipe or a device, which is written into
        return
    try:
        tempfile.TemporaryFile(dir=path.resolve().parent).close()
    except OSError as error:
        why = error.strerror or one_line(error)
        raise PermissionError(f'expected a file in a folder that can be written to, got {str(path)!r}: {why}') from None


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file by another of this content: whoever reads it finds the one or the other, whole."""
    with replacing(path) as unfinished:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)


def write_csv(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    """Write a table, its titles first, as `write_atomically` does."""
    table = io.StringIO(newline='')
    csv.writer(table, lineterminator='\n').writerows(rows)
    write_atomically(path, table.getvalue())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to, whose file then replaces the one at ``path`` atomically, or leaves nothing.

    Links are followed. Into what is no file, such as a pipe or a device, the bytes are written when they are whole.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():
        with tempfile.TemporaryDirectory() as folder:
            unfinished = Path(folder, path.name)
            yield unfinished
            with path.open('wb') as opened:
                opened.write(unfinished.read_bytes())
        return
    unfinished = path.with_name(f'.unfinished-{path.name}')
    try:
        yield unfinished
        flush(unfinished)
        unfinished.replace(path)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise
    flush(path.parent)


def flush(path: Path) -> None:
    """Flush a file, or the entries of a directory, to disk."""
    if path.is_dir() and os.name == 'nt':  # Windows cannot open directories
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != 'nt' else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
