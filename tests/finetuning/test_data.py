"""Samples that are functions of (seed, epoch, index), and folders of images, sound and unsound."""

import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from timm_apvit.finetuning.data import Samples, SeededSamples, Splits, create_batches, load_folder
from timm_apvit.finetuning.digits import ClutteredDigits, load_embedded_digits

CONFIG = {
    'input_size': (3, 24, 24),
    'interpolation': 'bicubic',
    'mean': (0.5, 0.5, 0.5),
    'std': (0.5, 0.5, 0.5),
    'crop_pct': 1.0,
    'crop_mode': 'center',
}


def write_images(folder: Path, number: int, seed: int = 0) -> None:
    """Write random photographs-to-be of 32 x 40 pixels."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for n in range(number):
        Image.fromarray(rng.integers(256, size=(32, 40, 3), dtype=np.uint8)).save(folder / f'{n}.jpg')


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for n, name in enumerate(('train/cat', 'train/dog', 'val/cat', 'val/dog')):
        write_images(tmp_path / 'images' / name, 3, seed=n)
    return tmp_path / 'images'


def epoch_of(samples: Samples, epoch: int, workers: int = 0, shuffle: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    batches = list(create_batches(samples, epoch, 2, shuffle=shuffle, workers=workers))
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


@pytest.mark.parametrize('source', ['folder', 'digits'])
def test_samples_depend_on_seed_epoch_and_index_alone(source: str, folder: Path) -> None:
    def load(seed: int) -> Splits:
        if source == 'folder':
            return load_folder(folder, seed, CONFIG)
        return load_embedded_digits(seed, (3, 24, 24), 6, 6)

    first, second = load(0), load(0)
    images, labels = epoch_of(first.train, 3)
    assert images.shape == (6, 3, 24, 24)
    epoch_of(second.train, 0)
    torch.rand(5)
    again, labels_again = epoch_of(second.train, 3)
    by_workers, _ = epoch_of(load(0).train, 3, workers=2)
    assert torch.equal(images, again)
    assert torch.equal(labels, labels_again)
    assert torch.equal(images, by_workers)
    for other in (epoch_of(first.train, 4)[0], epoch_of(load(1).train, 3)[0]):
        assert not torch.equal(images, other)
    # Not only in another order: other images.
    in_order = [epoch_of(first.train, epoch, shuffle=False)[0][0] for epoch in (0, 1)]
    assert not torch.equal(*in_order)
    tested = [epoch_of(load(seed).test, 0, shuffle=False)[0] for seed in (0, 0, 1)]
    assert all(torch.equal(a, b) for a, b in pairwise(tested))


def test_seeded_samples_leave_the_global_generators_alone(folder: Path) -> None:
    image = Image.open(folder / 'train/cat/0.jpg').copy()
    transform = create_transform((3, 24, 24), is_training=True, auto_augment='rand-m9-mstd0.5')

    class Photographs:
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return transform(image), index

    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    expected = torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    samples = SeededSamples(Photographs(), seed=1)
    assert torch.equal(samples[2][0], samples[2][0])
    assert not torch.equal(samples[2][0], samples[3][0])
    assert expected == (torch.rand(1), random.random(), np.random.rand())  # noqa: NPY002


def test_last_small_batch_is_dropped_in_training_only() -> None:
    splits = load_embedded_digits(0, (1, 16, 16), 7, 7)
    assert [len(labels) for _, labels in create_batches(splits.train, 0, 3, shuffle=True)] == [3, 3]
    assert [len(labels) for _, labels in create_batches(splits.train, 0, 8, shuffle=True)] == [7]
    assert [len(labels) for _, labels in create_batches(splits.test, 0, 3)] == [3, 3, 1]


def test_a_digit_is_painted_whole_and_inside() -> None:
    digits = np.random.default_rng(0).uniform(0.1, 1, size=(5, 8, 8)).astype(np.float32)
    samples = ClutteredDigits(digits, np.arange(5), 50, 0, (1, 20, 32), (0.0,), (1.0,), sides=(0.4, 0.4), pieces=0)
    places = set()
    for n in range(len(samples)):
        image, label = samples[n]
        rows, columns = torch.nonzero(image[0], as_tuple=True)
        y, x = int(rows.min()), int(columns.min())
        # 0.4 of 20 pixels is the digit's own side, so that its pixels are those of the image.
        assert torch.equal(image[0, y : y + 8, x : x + 8], torch.from_numpy(digits[label]))
        assert torch.count_nonzero(image) == 64
        places.add((y, x))
    assert {0, 12} <= {y for y, _ in places}
    assert max(x for _, x in places) > 20


def test_clutter_is_made_of_pieces_that_are_no_whole_digits() -> None:
    digits = np.ones((5, 8, 8), np.float32)
    cluttered, bare = (
        ClutteredDigits(digits, np.arange(5), 1, 3, (1, 64, 64), (0.0,), (1.0,), sides=(0.25, 0.25), pieces=pieces)
        for pieces in (4, 0)
    )
    assert bare[0][0].sum() == 16**2
    assert 16**2 < cluttered[0][0].sum() <= 16**2 + 4 * 8**2


def test_no_digit_is_both_trained_and_tested_on() -> None:
    train, test, names = load_embedded_digits(0, (3, 16, 16), 4, 4)
    assert isinstance(train, ClutteredDigits)
    assert isinstance(test, ClutteredDigits)
    assert len(train.digits) + len(test.digits) == 1797
    assert not {digit.tobytes() for digit in train.digits} & {digit.tobytes() for digit in test.digits}
    assert names == tuple('0123456789')
    other_seed = load_embedded_digits(9, (3, 16, 16), 4, 4).test
    assert isinstance(other_seed, ClutteredDigits)
    assert np.array_equal(other_seed.digits, test.digits)


def test_embedded_digits_are_normalised_by_channel() -> None:
    plain = load_embedded_digits(0, (3, 16, 16), 4, 4, mean=(0.0,), std=(1.0,)).test[0][0]
    image = load_embedded_digits(0, (3, 16, 16), 4, 4, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 4.0)).test[0][0]
    expected = (plain - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1)
    torch.testing.assert_close(image, expected)


def test_folder_numbers_classes_alike_in_both_splits(folder: Path) -> None:
    for image in (folder / 'val/cat').iterdir():
        image.unlink()
    splits = load_folder(folder, 0, CONFIG)
    assert splits.label_names == ('cat', 'dog')
    assert {label for _, label in (splits.test[n] for n in range(len(splits.test)))} == {1}
    assert [len(splits.train), len(splits.test)] == [6, 3]


@pytest.mark.parametrize('name', ['validation', 'test'])
def test_folder_splits_go_by_several_names(name: str, folder: Path) -> None:
    (folder / 'val').rename(folder / name)
    assert len(load_folder(folder, 0, CONFIG).test) == 3 + 3


def test_rejects_folders_without_the_images_they_should_hold(folder: Path, tmp_path: Path) -> None:
    empty = tmp_path / 'empty'
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match=r"'.*missing', which is not a folder"):
        load_folder(tmp_path / 'missing', 0, CONFIG)
    with pytest.raises(FileNotFoundError, match=r'a folder named train or training in .*, got nothing'):
        load_folder(empty, 0, CONFIG)
    with pytest.raises(FileNotFoundError, match=r'a folder named train or training in .*, got cat/, dog/'):
        load_folder(folder / 'train', 0, CONFIG)
    (empty / 'train/cat').mkdir(parents=True)
    (empty / 'val').mkdir()
    with pytest.raises(ValueError, match=r'folders of images, one for each class, .* got no images'):
        load_folder(empty, 0, CONFIG)
    write_images(empty / 'train/dog', 2)
    with pytest.raises(ValueError, match=r"at least 2 classes in .*, got those of 'dog' only"):
        load_folder(empty, 0, CONFIG)
    write_images(folder / 'val/bird', 2)
    with pytest.raises(ValueError, match=r'only classes of the training images in .*val.*, got bird'):
        load_folder(folder, 0, CONFIG)


@pytest.mark.parametrize('damage', ['garbage', 'truncated', 'empty'])
def test_rejects_broken_images_by_name(damage: str, folder: Path) -> None:
    broken = folder / 'train/dog/1.jpg'
    content = broken.read_bytes()
    broken.write_bytes({'garbage': b'no image', 'truncated': content[: len(content) // 2], 'empty': b''}[damage])
    with pytest.raises(ValueError, match=r'readable images, got a broken one: .*dog/1\.jpg'):
        load_folder(folder, 0, CONFIG)
    (folder / 'val/dog/0.jpg').write_bytes(b'')
    with pytest.raises(ValueError, match=r'and 1 more'):
        load_folder(folder, 0, CONFIG)


def test_rejects_channels_that_image_files_do_not_have(folder: Path) -> None:
    with pytest.raises(ValueError, match='in_chans of 1 or 3 for image files, got 5'):
        load_folder(folder, 0, {**CONFIG, 'input_size': (5, 24, 24)})
    grey = load_folder(folder, 0, {**CONFIG, 'input_size': (1, 24, 24), 'mean': (0.5,), 'std': (0.5,)})
    assert grey.train[0][0].shape == (1, 24, 24)


def test_a_class_is_the_folder_right_below_and_hidden_files_are_left_out(tmp_path: Path) -> None:
    for split in ('train', 'val'):
        for name in ('a/1.png', 'a/more/2.webp', 'a/.cache/3.png', 'b/inner/4.bmp', 'b/._5.png', '.hidden/6.png'):
            path = tmp_path / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new('RGB', (8, 8)).save(path)
    splits = load_folder(tmp_path, 0, CONFIG)
    assert splits.label_names == ('a', 'b')
    assert len(splits.train) == len(splits.test) == 3


def test_images_of_16_bits_keep_their_contrast(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    for split in ('train', 'val'):
        for name in 'ab':
            (tmp_path / split / name).mkdir(parents=True)
            Image.fromarray(ramp).save(tmp_path / split / name / '1.png')
    image, _ = load_folder(tmp_path, 0, CONFIG).test[0]
    middle = (torch.tensor([0.5]) - torch.tensor(CONFIG['mean'])) / torch.tensor(CONFIG['std'])
    assert (image.mean(dim=(1, 2)) - middle).abs().max() < 0.1
