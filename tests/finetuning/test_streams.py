"""Streams of samples: shards of a WebDataset, shared out to workers and processes."""

import io
import json
import tarfile
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from images import QUIET, collected_files, load  # noqa: F401
from PIL import Image

from timm_apvit.cli.main import main
from timm_apvit.finetuning.samples import BatchSplit, Splits
from timm_apvit.finetuning.streams import Stream

SHARDS, PER_SHARD = 4, 5
TINY = '--model test_apvit --img-size 32 --num-patches 2 --epochs 1 --batch-size 4 --device cpu'

pytestmark = QUIET


def png(identity: int) -> bytes:
    """A small grey image whose brightness tells it from others."""
    image, buffer = Image.new('RGB', (30, 28), (10 * identity + 5,) * 3), io.BytesIO()
    image.save(buffer, 'png')
    return buffer.getvalue()


def write_shards(folder: Path, split: str, shards: int = SHARDS, per_shard: int = PER_SHARD, classes: int = 2) -> None:
    """Write shards whose images are of brightness 0, 1, 2, ... and of class 0, 1, 0, ..."""
    folder.mkdir(exist_ok=True)
    for shard in range(shards):
        with tarfile.open(folder / f'{split}-{shard:02}.tar', 'w') as tar:
            for n in range(shard * per_shard, (shard + 1) * per_shard):
                label = str(n % classes).encode()
                for name, content in ((f'{n:04}.png', png(n)), (f'{n:04}.cls', label)):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path: Path) -> dict[str, Any]:
    """Options of a WebDataset of 20 training and 7 test images."""
    pytest.importorskip('webdataset', reason='wds/ needs webdataset')
    write_shards(tmp_path / 'shards', 'train')
    write_shards(tmp_path / 'shards', 'val', shards=1, per_shard=7)
    return {
        'data': 'wds/',
        'data_dir': str(tmp_path / 'shards'),
        'train_split': 'train-{00..03}.tar|20',
        'val_split': 'val-00.tar|7',
        'num_classes': 2,
        'no_aug': True,
    }


def identities(images: torch.Tensor) -> list[int]:
    return ((images[:, 0, 12, 12] * 0.5 + 0.5) * 255 / 10).int().tolist()


def read(samples: Any, epoch: int, batch_size: int, workers: int = 0) -> tuple[list[int], list[int]]:
    """Which images an epoch has, in order, and the sizes of its batches."""
    if isinstance(samples, Stream) and not samples.is_training:
        batches = [images for images, _ in samples.test_batches(batch_size, workers)]
    else:
        loader = samples.training_batches(epoch, batch_size, workers=workers)
        batches = [images for images, _ in islice(loader, len(samples) // batch_size)]
    return [n for images in batches for n in identities(images)], [len(images) for images in batches]


@pytest.mark.parametrize('workers', [0, 2, 3])
def test_an_epoch_of_a_stream_has_whole_batches_whatever_the_workers(
    workers: int, shards: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    splits = load(**shards)
    assert not caplog.records
    assert splits.label_names == ('0', '1')
    assert len(splits.train) == 20
    seen, sizes = read(splits.train, 0, 6, workers)
    assert sizes == [6, 6, 6]
    assert max(seen) < 20
    if not workers:
        assert len(set(seen)) == 18
    else:  # a worker whose shards are used up reads them again
        assert len(set(seen)) > 10
    for images, labels in islice(splits.train.training_batches(1, 4, workers=workers), 5):
        assert [n % 2 for n in identities(images)] == labels.tolist()


def test_micro_batches_of_a_stream_are_as_large_as_others(shards: dict[str, Any]) -> None:
    loader = load(**shards).train.training_batches(0, 6, BatchSplit(accumulated=2))
    assert [len(images) for images, _ in islice(loader, 6)] == [3] * 6


def test_workers_share_the_shards(shards: dict[str, Any]) -> None:
    seen, _ = read(load(**shards).train, 0, 5, workers=4)
    assert sorted(seen) == list(range(20))


@pytest.mark.parametrize('workers', [0, 2])
def test_an_epoch_of_a_stream_is_a_function_of_seed_and_epoch(workers: int, shards: dict[str, Any]) -> None:
    shards.pop('no_aug')

    def epoch(splits: Splits, number: int) -> torch.Tensor:
        loader = splits.train.training_batches(number, 4, workers=workers)
        return torch.cat([images for images, _ in islice(loader, 5)])

    unbroken = load(**shards)
    first, second = (epoch(unbroken, number) for number in (0, 1))
    assert not torch.equal(first, second)
    resumed = load(**shards)
    torch.rand(3)
    assert torch.equal(epoch(resumed, 1), second)
    assert not torch.equal(epoch(load(**shards, seed=1), 1), second)


@pytest.mark.parametrize('workers', [0, 2])
def test_a_test_reads_every_sample_of_a_stream_once(workers: int, shards: dict[str, Any]) -> None:
    test = load(**shards).test
    for _ in range(2):
        assert read(test, 0, 4, workers) == (list(range(7)), [4, 3])
    assert len(test.some(3)[0]) == 3
    undeclared = load(**{**shards, 'val_split': 'val-00.tar'}).test
    assert len(undeclared) == 0
    assert read(undeclared, 0, 4, workers)[0] == list(range(7))


def test_processes_share_the_shards_of_training_and_test(
    shards: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    shards.update(val_split='train-{00..03}.tar')
    seen: dict[str, list[int]] = {'train': [], 'test': []}

    def start(rank: int, world: int) -> None:
        # timm's readers ask torch.
        for name, result in (('is_initialized', True), ('get_rank', rank), ('get_world_size', world)):
            monkeypatch.setattr(torch.distributed, name, lambda result=result: result)

    for rank in range(3):
        start(rank, 3)
        splits = load(**shards)
        loader = splits.train.training_batches(0, 6, BatchSplit(rank, 3))
        seen['train'] += [n for images, _ in islice(loader, 3) for n in identities(images)]
        seen['test'] += [n for images, _ in splits.test.test_batches(2) for n in identities(images)]
    assert sorted(seen['test']) == list(range(20))
    # A process without as many images as its share of an epoch reads its shards again.
    assert len(seen['train']) == 18
    assert len(set(seen['train'])) > 13
    start(0, 5)
    with pytest.raises(ValueError, match='a shard for each of 5 processes, got 4'):
        load(**shards)


def test_shards_described_by_a_file_need_no_pattern(shards: dict[str, Any], tmp_path: Path) -> None:
    info = {
        name: {
            'name': name,
            'num_samples': count * len(names),
            'filenames': names,
            'shard_lengths': [count] * len(names),
        }
        for name, count, names in (
            ('train', PER_SHARD, [f'train-{n:02}.tar' for n in range(SHARDS)]),
            ('validation', 7, ['val-00.tar']),
        )
    }
    (tmp_path / 'shards/_info.json').write_text(json.dumps({'splits': info}))
    splits = load(data='wds/', data_dir=shards['data_dir'], num_classes=2)
    assert [len(splits.train), len(splits.test)] == [20, 7]
    assert len(read(splits.test, 0, 4)[0]) == 7


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'num_classes': None}, 'which names 0: give --num-classes or --class-map'),
        ({'train_split': 'train-{00..03}.tar'}, '; give --train-samples where the data do not say'),
        ({'train_split': 'train-{00..09}.tar|50'}, r'shards that exist, got .*train-04\.tar'),
        ({'train_split': 'train'}, "cannot read split 'train' of wds/"),
    ],
)
def test_rejects_shards_that_are_not_fully_described(
    change: dict[str, Any], message: str, shards: dict[str, Any]
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load(**{**shards, **change})


@pytest.mark.parametrize('workers', [0, 1])
def test_rejects_labels_that_are_not_of_a_class_when_it_meets_them(
    workers: int, shards: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(tmp_path / 'shards', 'train', classes=3)
    command = ['finetune', *arguments_of(shards), *TINY.split(), '--workers', str(workers)]
    assert main([*command, '--output', str(tmp_path / 'run')]) == 1
    assert capsys.readouterr().err.startswith('error: expected labels from 0 to 1, got 2: see --num-classes; nothing')


def test_a_stream_without_the_images_it_declares_is_an_error(shards: dict[str, Any], tmp_path: Path) -> None:
    splits = load(**shards)
    for path in (tmp_path / 'shards').glob('train-*.tar'):
        with tarfile.open(path, 'w'):
            pass
    with pytest.raises(RuntimeError, match='expected images for training in the shards of a worker, got none'):
        read(splits.train, 0, 5)


def arguments_of(shards: dict[str, Any]) -> list[str]:
    """The source of images as the command line has it."""
    names = ('data_dir', 'train_split', 'val_split', 'num_classes')
    return ['wds/', *(word for name in names for word in (f'--{name.replace("_", "-")}', str(shards[name])))]


@pytest.mark.slow
def test_command_trains_on_shards_and_resumes_at_the_beginning_of_an_epoch(
    shards: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ('whole', 'parts'):
        command = ['finetune', *arguments_of(shards), *TINY.split(), '--workers', '2', '--epochs', '2']
        command += ['--output', str(tmp_path / name)]
        if name == 'parts':
            # Stops after the first epoch has been saved.
            with monkeypatch.context() as patched:
                patched.setattr(torch.optim.AdamW, 'step', interrupting(torch.optim.AdamW.step, 6))
                assert main(command) == 130
            command = ['finetune', '--resume', str(tmp_path / name), '--workers', '2']
        assert main(command) == 0
    whole, parts = ((tmp_path / name / 'last/model.safetensors').read_bytes() for name in ('whole', 'parts'))
    assert whole == parts


def interrupting(step: Any, number: int) -> Any:
    """An optimizer's step that is interrupted at the n-th call."""
    calls = []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) > number:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    return interrupted
