"""Checkpoints that are whole whenever the process is interrupted."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from timm_apvit.files import check_writable, write_atomically
from timm_apvit.finetuning.checkpoints import CheckpointStore, check_vacant, create_run

TRAINED = {'w': torch.arange(3.0)}


def save(store: CheckpointStore, epoch: int, best: int) -> None:
    def export(directory: Path) -> None:
        (directory / 'model.txt').write_text(f'model of epoch {epoch}')

    store.save(f'epoch-{epoch}', {'epoch': epoch, **TRAINED}, f'epoch-{best}', export)


def exported(directory: Path, link: str) -> str:
    return (directory / link / 'model.txt').read_text()


def versions(directory: Path) -> set[str]:
    return {path.name for path in (directory / 'checkpoints').iterdir()}


def test_links_name_the_last_and_the_best_and_others_are_removed(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    assert store.load() is None
    for epoch, best in ((1, 1), (2, 2), (3, 2), (4, 2)):
        save(store, epoch, best)
    assert exported(tmp_path, 'last') == 'model of epoch 4'
    assert exported(tmp_path, 'best') == 'model of epoch 2'
    assert versions(tmp_path) == {'epoch-4', 'epoch-2'}
    state = store.load()
    assert state is not None
    assert state['epoch'] == 4
    assert torch.equal(state['w'], TRAINED['w'])
    save(store, 5, 5)
    assert versions(tmp_path) == {'epoch-5'}
    assert not any(path.name.startswith('.') for path in tmp_path.rglob('*'))


def test_a_run_that_is_moved_keeps_its_links(tmp_path: Path) -> None:
    (tmp_path / 'run').mkdir()
    save(CheckpointStore(tmp_path / 'run'), 1, 1)
    (tmp_path / 'run').rename(tmp_path / 'moved')
    assert exported(tmp_path / 'moved', 'best') == 'model of epoch 1'


class Interrupted(BaseException):
    """Stands for the end of the process: nothing may catch it."""


class Interrupter:
    """Ends the process before the n-th change to the disk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = -1
        for owner, name in (
            (os, 'fsync'),
            (shutil, 'rmtree'),
            (torch, 'save'),
            *((Path, method) for method in ('mkdir', 'rename', 'replace', 'symlink_to', 'unlink', 'write_bytes')),
        ):
            monkeypatch.setattr(owner, name, self.guard(getattr(owner, name)))

    def guard(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            if self.left == 0:
                raise Interrupted
            self.left -= 1
            return call(*args, **kwargs)

        return guarded


@pytest.mark.parametrize('improved', [True, False])
def test_interruption_at_any_instant_leaves_whole_checkpoints(
    improved: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupter = Interrupter(monkeypatch)
    best = 2 if improved else 1
    for instant in range(100):
        directory = tmp_path / str(instant)
        directory.mkdir()
        store = CheckpointStore(directory)
        save(store, 1, 1)
        interrupter.left = instant
        try:
            save(store, 2, best)
        except Interrupted:
            interrupter.left = -1
        else:
            break
        state = store.load()
        assert state is not None
        assert exported(directory, 'last') == f'model of epoch {state["epoch"]}'
        assert exported(directory, 'best') in {'model of epoch 1', f'model of epoch {best}'}
        # What a resumed training does: it mends the link to the best, and saves what was not saved.
        if state['epoch'] == 2:
            store.mark_best(f'epoch-{best}')
        else:
            save(store, 2, best)
        assert exported(directory, 'last') == 'model of epoch 2'
        assert exported(directory, 'best') == f'model of epoch {best}'
        assert versions(directory) == {'epoch-2', f'epoch-{best}'}
    assert 10 < instant < 99


def test_rejects_a_damaged_state_by_name(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1, 1)
    state = tmp_path / 'last' / 'training.pt'
    content = state.read_bytes()
    for damaged in (content[: len(content) // 2], b'', b'junk'):
        state.write_bytes(damaged)
        with pytest.raises(ValueError, match=r'a damaged .*last/training\.pt'):
            store.load()


def test_runs_are_made_in_new_or_empty_folders_only(tmp_path: Path) -> None:
    (tmp_path / 'empty').mkdir()
    for name in ('new/nested', 'empty'):
        create_run(tmp_path / name, 'epochs: 3')
        assert (tmp_path / name / 'config.yaml').read_text() == 'epochs: 3'
    with pytest.raises(FileExistsError, match=r'folder that does not exist yet, got .*empty'):
        create_run(tmp_path / 'empty', '')
    assert (tmp_path / 'empty/config.yaml').read_text() == 'epochs: 3'
    (tmp_path / 'file').write_text('precious')
    (tmp_path / 'link').symlink_to('nowhere')
    for name in ('file', 'link'):
        with pytest.raises(FileExistsError):
            check_vacant(tmp_path / name)


def test_write_atomically_replaces_or_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / 'summary.json'
    write_atomically(path, 'first')
    interrupter = Interrupter(monkeypatch)
    found = []
    for instant in range(5):
        interrupter.left = instant
        try:
            write_atomically(path, 'second')
        except Interrupted:
            found.append(path.read_text())
    interrupter.left = -1
    assert found[0] == 'first'
    assert set(found) <= {'first', 'second'}
    write_atomically(path, 'third')
    assert path.read_text() == 'third'
    assert [p.name for p in tmp_path.iterdir()] == ['summary.json']


def test_links_are_followed_and_into_pipes_it_is_written(tmp_path: Path) -> None:
    (tmp_path / 'shared').write_text('before')
    (tmp_path / 'link').symlink_to('shared')
    write_atomically(tmp_path / 'link', 'after')
    assert (tmp_path / 'link').is_symlink()
    assert (tmp_path / 'shared').read_text() == 'after'
    os.mkfifo(tmp_path / 'pipe')
    check_writable(tmp_path / 'pipe')
    reader = os.open(tmp_path / 'pipe', os.O_RDONLY | os.O_NONBLOCK)
    write_atomically(tmp_path / 'pipe', 'through')
    assert os.read(reader, 100) == b'through'
    os.close(reader)
    assert (tmp_path / 'pipe').is_fifo()


def test_a_file_system_without_links_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise OSError(1, 'Operation not permitted')

    monkeypatch.setattr(Path, 'symlink_to', refused)
    with pytest.raises(OSError, match=r'an output folder where links can be made, as for last and best, got .*new'):
        create_run(tmp_path / 'new', 'epochs: 3')
    assert not (tmp_path / 'new/config.yaml').exists()


def test_a_lost_link_is_found_again(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1, 1)
    save(store, 2, 1)
    (tmp_path / 'last').unlink()
    state = store.load()
    assert state is not None
    assert state['epoch'] == 2


def test_a_damaged_state_names_the_best_model_as_a_way_out(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1, 1)
    save(store, 2, 1)
    (tmp_path / 'last/training.pt').write_bytes(b'junk')
    with pytest.raises(ValueError, match=r'a new run can start from the best: --model local-dir:.*best --pretrained'):
        store.load()
