"""Datasets that timm reads by a name: torchvision's and those of the Hub, all of local files."""

import json
import struct
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from images import QUIET, collected_files, load, write_images  # noqa: F401

from timm_apvit.cli.main import main

TINY = '--model test_apvit --img-size 32 --num-patches 2 --epochs 1 --batch-size 4 --device cpu'

pytestmark = QUIET


def write_idx(path: Path, values: np.ndarray[Any, Any]) -> None:
    """Write MNIST's own format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack(f'>{values.ndim + 1}I', 0x800 + values.ndim, *values.shape) + values.tobytes())


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for split, number in (('train', 12), ('t10k', 6)):
        raw = tmp_path / 'files/FashionMNIST/raw'
        write_idx(raw / f'{split}-images-idx3-ubyte', rng.integers(256, size=(number, 28, 28), dtype=np.uint8))
        write_idx(raw / f'{split}-labels-idx1-ubyte', (np.arange(number) % 10).astype(np.uint8))
    return tmp_path / 'files'


def test_torchvision_datasets_are_seeded_converted_and_named(fashion: Path) -> None:
    arguments = {'data': 'torch/fashion_mnist', 'data_dir': str(fashion)}
    splits = load(**arguments)
    assert [len(splits.train), len(splits.test)] == [12, 6]
    assert splits.label_names[:2] == ('T-shirt/top', 'Trouser')
    image, label = splits.train[3]
    assert image.shape == (3, 24, 24)
    assert label == 3
    assert torch.equal(image, load(**arguments).train[3][0])
    assert not torch.equal(image, load(**arguments, seed=1).train[3][0])
    with pytest.raises(ValueError, match='expected --num-classes 10, as the data have, or none, got 3'):
        load(**arguments, num_classes=3)


def test_command_trains_on_a_torchvision_dataset(fashion: Path, tmp_path: Path) -> None:
    output = tmp_path / 'run'
    source = ['torch/fashion_mnist', '--data-dir', str(fashion)]
    assert main(['finetune', *source, *TINY.split(), '--workers', '0', '--output', str(output)]) == 0
    config = json.loads((output / 'best/config.json').read_text())
    assert config['label_names'][9] == 'Ankle boot'


@pytest.fixture
def hub_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder that the Hub's library takes for a dataset."""
    pytest.importorskip('datasets', reason='hfds/ and hfids/ need datasets')
    for n, name in enumerate(('train/cat', 'train/dog', 'validation/cat', 'validation/dog')):
        write_images(tmp_path / 'hub' / name, 3, seed=n)
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    return str(tmp_path / 'hub')


@pytest.mark.parametrize('reader', ['hfds', 'hfids'])
def test_datasets_of_the_hub(reader: str, hub_folder: str, tmp_path: Path) -> None:
    stream = reader == 'hfids'  # which reads no more than it is asked for
    told: dict[str, Any] = {'train_samples': 6, 'val_samples': 6, 'num_classes': 2} if stream else {}
    splits = load(data=f'{reader}/{hub_folder}', data_dir=str(tmp_path / 'cache'), **told)
    assert splits.label_names == (('0', '1') if stream else ('cat', 'dog'))
    assert [len(splits.train), len(splits.test)] == [6, 6]
    batches = list(islice(splits.train.training_batches(0, 3), 2))
    assert [images.shape for images, _ in batches] == [(3, 3, 24, 24)] * 2
    assert sorted(label for _, labels in splits.test.test_batches(4) for label in labels.tolist()) == [0] * 3 + [1] * 3


def test_class_map_renumbers_the_classes_of_the_hub(hub_folder: str, tmp_path: Path) -> None:
    names = tmp_path / 'names.txt'
    names.write_text('dog\nbird\ncat\n')
    splits = load(data=f'hfds/{hub_folder}', data_dir=str(tmp_path / 'cache'), class_map=str(names))
    assert splits.label_names == ('dog', 'bird', 'cat')
    assert [splits.test[n][1] for n in range(6)] == [2, 2, 2, 0, 0, 0]
    names.write_text('dog\nbird\n')
    with pytest.raises(ValueError, match=r"a --class-map of all classes of hfds/.*, got none of 'cat'"):
        load(data=f'hfds/{hub_folder}', data_dir=str(tmp_path / 'cache'), class_map=str(names))


@pytest.mark.parametrize(('reader', 'module'), [('wds', 'webdataset'), ('hfds', 'datasets'), ('hfids', 'datasets')])
def test_missing_package_is_named(reader: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        ModuleNotFoundError, match=rf"{reader}/ dataset needs {module}: pip install 'timm-apvit\[{module}\]'"
    ):
        load(data=f'{reader}/x', num_classes=2)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'num_classes': 3}, r'DATA that --num-classes can be given for, got embedded digits'),
        ({'aa': 'rand-m9'}, r'DATA that --aa can be given for, got embedded digits'),
        (
            {'data': 'photographs', 'image_key': 'x', 'data_dir': '.'},
            'that --data-dir, --image-key can be given for, got a folder',
        ),
        ({'data': 's3://birds', 'data_dir': '.'}, 'that --data-dir can be given for, got a folder'),
        ({'data': 'torch/mnist'}, r'expected --data-dir, the folder that holds the files of torch/mnist'),
        ({'data': 'torch/mnist', 'data_dir': '.', 'train_samples': 3}, 'that --train-samples can be given for'),
        ({'data': 'torch/nothing', 'data_dir': '.'}, "cannot read split 'train' of torch/nothing"),
        ({'data': 'photographs', 'no_aug': True, 'hflip': 0.1}, 'expected --no-aug or --hflip, got both'),
        ({'data': 'photographs', 'scale': (1.0, 0.5)}, 'expected --scale MIN MAX with MIN <= MAX, got 1 0.5'),
        ({'data': 'photographs', 'aa': 'rand-foo'}, "--aa of sections such as rand-m9.*, got 'rand-foo'"),
        ({'data': 'photographs', 'aa': 'nonsense'}, "cannot make the augmentation of auto_augment='nonsense'"),
    ],
)
def test_rejects_options_that_the_data_cannot_have(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(**options)
