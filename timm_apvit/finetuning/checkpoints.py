"""The folder of a run: checkpoints that survive an interruption at any instant, metrics, and a lock.

A version is written completely under a temporary name, flushed to disk and renamed; then the links ``last`` and
``best`` are swapped, each atomically. Whoever follows a link always finds a whole version.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from timm_apvit.failures import one_line
from timm_apvit.files import flush, write_atomically, write_csv
from timm_apvit.finetuning.settings import CONFIG_FILE

VERSIONS = 'checkpoints'
LAST, BEST = 'last', 'best'
TWIN = 'twin'  # folder of the fixed grid's training, in that of the run
STATE_FILE = 'training.pt'
LOCK_FILE = '.lock'
SNAPSHOT = re.compile(r'epoch-\d+')
JSON_LOG, CSV_LOG = 'metrics.jsonl', 'metrics.csv'


class CheckpointStore:
    """Versioned checkpoints of one training in a directory, with links to the last and the best of them.

    ``directory/checkpoints/epoch-0003/`` holds a version, ``directory/last`` and ``directory/best`` link to versions.
    What no link names is removed, but for its exported model if snapshots are kept.

    Args:
        directory: exists.
        keeps_snapshots: whether the models of all versions are kept.
    """

    def __init__(self, directory: Path, keeps_snapshots: bool = False) -> None:
        self.directory = directory
        self.keeps_snapshots = keeps_snapshots
        self.versions = directory / VERSIONS

    def save(self, name: str, state: dict[str, Any], best: str | None, export: Callable[[Path], None]) -> None:
        """Save a version and let the links name it.

        Args:
            name: of the version; becomes ``last``.
            state: what resumes the training: tensors, numbers, strings and containers of them.
            best: the version that becomes ``best``, this one or an earlier one; None: none yet.
            export: writes further files of the version into the directory it is given.
        """
        self.versions.mkdir(exist_ok=True)
        unfinished = self.versions / f'.{name}.unfinished'
        _remove(unfinished)
        try:
            unfinished.mkdir()
            export(unfinished)
            torch.save(state, unfinished / STATE_FILE)
            for path in (*unfinished.iterdir(), unfinished):
                flush(path)
        # A full disk is an OSError to Python, a RuntimeError to torch and an error of its own to safetensors.
        except Exception as error:
            free = shutil.disk_usage(self.directory).free / 2**20
            with suppress(OSError):
                _remove(unfinished)
            raise OSError(
                f'cannot write the checkpoint {name} into {self.directory}, where {free:.0f} MiB are free: '
                f'{one_line(error)}' + '; the checkpoint before it is whole' * (self.directory / LAST).is_symlink()
            ) from error
        # An interrupted save may have left a version that no link names.
        _remove(self.versions / name)
        unfinished.rename(self.versions / name)
        flush(self.versions)
        self._link(LAST, name)
        self.mark_best(best)

    def mark_best(self, name: str | None) -> None:
        """Let ``best`` name a version, and remove the versions that no link names, or at least what resumes them."""
        if name is not None:
            self._link(BEST, name)
        links = [self.directory / link for link in (LAST, BEST)]
        linked = {link.readlink().name for link in links if link.is_symlink()}
        for path in self.versions.iterdir():
            if path.name not in linked:
                # Of what was saved within an epoch nothing is a snapshot.
                _remove(path / STATE_FILE if self.keeps_snapshots and SNAPSHOT.fullmatch(path.name) else path)

    def load(self) -> dict[str, Any] | None:
        """Load the state of the last version; None: nothing was saved yet."""
        last = self.directory / LAST
        if not last.is_symlink():
            if last.exists():
                raise ValueError(f'expected a link, got {last}: was the run copied without its links?')
            # A link that was lost, or not made yet when the process was killed: versions are whole.
            whole = sorted(self.versions.glob(f'[!.]*/{STATE_FILE}'))
            if not whole:
                return None
            last = whole[-1].parent
        path = last / STATE_FILE
        try:
            state: dict[str, Any] = torch.load(path, map_location='cpu', weights_only=True)
        # A damaged file fails in many ways: OSError, EOFError, RuntimeError, pickle.UnpicklingError, KeyError.
        except Exception as error:
            best = (self.directory / BEST).is_dir() and (self.directory / BEST).resolve() != last.resolve()
            remedy = (
                f'; a new run can start from the best: --model local-dir:{self.directory / BEST} --pretrained' * best
            )
            raise ValueError(f'expected a readable state, got a damaged {path}: {one_line(error)}{remedy}') from error
        return state

    def _link(self, link: str, name: str) -> None:
        """Point a link at a version, atomically."""
        swapped = self.directory / f'.{link}.unfinished'
        _remove(swapped)
        swapped.symlink_to(Path(VERSIONS, name), target_is_directory=True)
        swapped.replace(self.directory / link)
        flush(self.directory)


def lock(directory: Path) -> Any:
    """Keep other processes from training in a directory until what is returned is left as a context, or we end."""
    try:
        return FileLock(directory / LOCK_FILE).acquire(timeout=0)
    except Timeout:
        message = (
            f'expected the folder of a run that no process trains in, got {str(directory)!r}: wait or end the other'
        )
        raise BlockingIOError(message) from None


def create_run(directory: Path, config: str) -> None:
    """Make the directory of a run, which must not exist or be empty, and write the run's configuration file."""
    check_vacant(directory)
    directory.mkdir(parents=True, exist_ok=True)
    probe = directory / '.link.unfinished'
    try:
        probe.symlink_to(CONFIG_FILE)
    except OSError as error:
        message = f'expected an output folder where links can be made, as for last and best, got {str(directory)!r}: '
        raise OSError(message + one_line(error)) from None
    probe.unlink()
    write_atomically(directory / CONFIG_FILE, config)


def discard(directory: Path) -> bool:
    """Remove the directory of a run that has trained nothing, so that the same command can begin it again."""
    found = list(directory.iterdir()) if directory.is_dir() else []
    if not {path.name for path in found} <= {CONFIG_FILE, LOCK_FILE}:
        return False
    with suppress(OSError):  # a link, or where something is mounted: it stays, and is empty
        for path in found:
            path.unlink()
        directory.rmdir()
    return True


def write_metrics(directory: Path, rows: list[dict[str, float]]) -> None:
    """Write the metrics of all epochs so far, in place of what there is: ``metrics.jsonl`` and ``metrics.csv``."""
    write_atomically(directory / JSON_LOG, ''.join(json.dumps(row) + '\n' for row in rows))
    names = list(dict.fromkeys(name for row in rows for name in row))
    write_csv(directory / CSV_LOG, [names, *([row.get(name, '') for name in names] for row in rows)])


def check_vacant(directory: Path) -> None:
    """Raise FileExistsError unless a directory can be made at this path without touching what exists."""
    if directory.is_dir() and not any(directory.iterdir()):
        return
    if os.path.lexists(directory):
        raise FileExistsError(f'expected an output folder that does not exist yet, got {str(directory)!r}')
    above = next(path for path in directory.absolute().parents if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise NotADirectoryError(f'expected an output folder that can be made, got {str(directory)!r}')


def _remove(path: Path) -> None:
    """Remove a file, a link or a directory, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
